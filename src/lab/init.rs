//! The first process of a guest: `infill lab-init`.
//!
//! It mounts what a program expects, does the one job of `/job.json`, prints how that ended, and
//! switches the machine off. Kernel messages are taken off the console and printed from here as lines
//! of their own, so that they never land in the middle of a line of the job.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, sync};

use super::{LabError, Result, Trying};

/// Where the job is found in the initramfs.
pub const JOB_FILE: &str = "/job.json";
/// Where the initramfs holds this program.
pub const INIT_PROGRAM: &str = "/bin/infill";
/// What the kernel's command line needs so that the guest runs the job.
pub const KERNEL_ARGUMENTS: &str = "rdinit=/bin/infill -- lab-init";
/// The line after which the console belongs to the job.
pub const BEGIN_MARK: &str = "lab: the job begins";
/// The line with this beginning ends with the job's exit status.
pub const EXIT_MARK: &str = "lab: the job ended with ";
/// Kernel messages begin with this on the console.
pub const KERNEL_MARK: &str = "kernel: ";
/// Descriptors a process of the guest may have, the value systemd gives services as a hard limit.
const MAX_OPEN_FILES: u64 = 524_288;

/// What a guest is to do.
#[derive(Clone, Default, Debug, serde::Serialize, serde::Deserialize)]
pub struct Job {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// Disks to mount before.
    pub mounts: Vec<Mount>,
}

/// A disk to mount in the guest.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Mount {
    /// Such as `/dev/vda`.
    pub device: String,
    /// Made if it is not there.
    pub on: String,
    /// Such as `ext4`.
    pub fs: String,
    /// Whether nothing may be written to it.
    pub read_only: bool,
}

impl Job {
    /// The job as the content of [`JOB_FILE`].
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| LabError::Failed(format!("cannot write the guest's job: {e}")))
    }
}

/// Runs as PID 1 of a guest; comes back only to say why it cannot.
///
/// # Errors
/// This is not PID 1, or the machine cannot be switched off.
pub fn main() -> Result<Infallible> {
    if std::process::id() != 1 {
        return Err(LabError::Failed("lab-init is what a lab guest runs as its first process; there is no other use for it".into()));
    }
    match prepare().and_then(|job| execute(&job)) {
        Ok(status) => println!("\n{EXIT_MARK}{}", describe(status)),
        Err(e) => println!("\n{EXIT_MARK}an error before it ran: {e}"),
    }
    sync();
    reboot(RebootMode::RB_POWER_OFF).trying(|| "cannot switch the guest off")
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => code.to_string(),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

fn prepare() -> Result<Job> {
    for (fs, on) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/dev/shm"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("configfs", "/sys/kernel/config"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        mount_at(fs, on, fs, MsFlags::empty())?;
    }
    relay_kernel_messages()?;
    fs::write("/proc/sys/kernel/hostname", "lab").trying(|| "cannot set the guest's name")?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES).trying(|| "cannot raise the limit of open files")?;
    // Control-Alt-Delete comes to PID 1 as a signal instead of ending the machine.
    let _ = set_cad_enabled(false);
    let text = fs::read(JOB_FILE).trying(|| format!("cannot read {JOB_FILE}"))?;
    let job: Job = serde_json::from_slice(&text).map_err(|e| LabError::Failed(format!("{JOB_FILE} makes no sense: {e}")))?;
    for m in &job.mounts {
        let access = if m.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        mount_at(&m.device, &m.on, &m.fs, access | MsFlags::MS_NOATIME)?;
    }
    Ok(job)
}

fn mount_at(device: &str, on: &str, fs: &str, flags: MsFlags) -> Result<()> {
    fs::create_dir_all(on).trying(|| format!("cannot make {on}"))?;
    mount(Some(device), on, Some(fs), flags, None::<&str>).trying(|| format!("cannot mount {device} on {on} as {fs}"))
}

/// Leaves only emergencies to the kernel's own console and prints the rest line by line. A crash raises
/// the console's level by itself (`console_verbose` in kernel/panic.c), so its report is never lost.
fn relay_kernel_messages() -> Result<()> {
    let path = "/dev/kmsg";
    let mut log = fs::File::open(path).trying(|| format!("cannot open {path}"))?;
    log.seek(SeekFrom::End(0)).trying(|| format!("cannot go to the end of {path}"))?;
    fs::write("/proc/sys/kernel/printk", "1").trying(|| "cannot set the console's level")?;
    std::thread::spawn(move || {
        // A record is "priority,sequence,time,flags;text\n" and comes whole with one read; EPIPE says
        // that some were overwritten before they were read (Documentation/ABI/testing/dev-kmsg).
        let mut record = [0_u8; 8192];
        loop {
            match log.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    let message = text.split_once(';').map_or(&*text, |(_, m)| m);
                    println!("{KERNEL_MARK}{}", message.lines().next().unwrap_or_default());
                }
                Err(e) if e.raw_os_error() == Some(nix::libc::EPIPE) => {}
                Err(_) => return,
            }
        }
    });
    Ok(())
}

/// Runs the job; until it is done, takes leave of every other child that ends.
fn execute(job: &Job) -> Result<ExitStatus> {
    let (program, arguments) = job.argv.split_first().ok_or_else(|| LabError::Failed(format!("{JOB_FILE} names no program")))?;
    let mut command = Command::new(program);
    command.args(arguments).envs(&job.env).stdin(Stdio::null());
    println!("{BEGIN_MARK}");
    let child = command.spawn().trying(|| format!("cannot start {program}"))?;
    let child = Pid::from_raw(child.id().cast_signed());
    loop {
        match waitpid(None, None).trying(|| "cannot wait for the job")? {
            WaitStatus::Exited(pid, code) if pid == child => {
                return Ok(ExitStatus::from_raw(code << 8));
            }
            WaitStatus::Signaled(pid, signal, _) if pid == child => {
                return Ok(ExitStatus::from_raw(signal as i32));
            }
            _ => {}
        }
    }
}
