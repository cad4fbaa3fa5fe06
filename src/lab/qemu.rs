//! Boots guests in QEMU and watches their console.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::{LabError, Result, Trying, cache_dir, packages};

/// How long a KVM guest may take to print its first line. It takes a fifth of a second where KVM works.
const PROBE_LIMIT: Duration = Duration::from_secs(6);
/// How long the console is still read after the kernel reported a crash, to have the whole report.
const LAST_WORDS: Duration = Duration::from_millis(1500);
/// A boot that dies within this time without having reached the job is tried once more.
const EARLY: Duration = Duration::from_secs(60);
/// Console lines with which a kernel says that it is done for.
const FATAL: [&str; 6] = ["Kernel panic - not syncing", "Oops: ", "BUG: ", "kernel BUG at", "blocked for more than", "soft lockup"];

/// One instruction a nanosecond. With `erms` or `fsrm` the kernel would copy with one instruction a byte, without
/// them it is eight bytes.
const COUNTING: &[&str] =
    &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-rtc", "base=2026-01-01,clock=vm", "-cpu", "max,-erms,-fsrm"];

/// What executes the guest's instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's translator: ten to fifty times slower, works everywhere.
    Tcg,
    /// The same on one thread, with a guest clock that counts instructions, one a nanosecond: what is timed
    /// repeats whatever else the machine does. An idle guest's clock jumps to its next timer.
    TcgCounting,
}

impl Accelerator {
    /// The name QEMU uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::TcgCounting => "tcg, counting instructions",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max"],
            Self::TcgCounting => COUNTING,
        }
    }
}

/// A disk of a guest; the first is `/dev/vda`.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Raw image.
    pub path: PathBuf,
    /// What the guest writes is forgotten when it ends; the image stays as it is.
    pub throw_away: bool,
}

/// A guest to boot.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM file system; without one the kernel panics once it is up.
    pub initrd: Option<PathBuf>,
    /// Disks in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// Guest memory.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Added to the kernel's command line.
    pub append: String,
    /// Where QEMU's monitor is to listen (a Unix socket), for a harness that does something to the machine while it runs.
    pub monitor: Option<PathBuf>,
    /// A guest that prints nothing for this long is taken for hung.
    pub idle_limit: Duration,
    /// A guest that runs longer is stopped.
    pub total_limit: Duration,
}

/// How a guest's life ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// It switched itself off.
    PoweredOff,
    /// Its kernel crashed or reported a hang; the line that said so.
    Crashed(String),
    /// It printed nothing for too long.
    Silent(Duration),
    /// It ran for too long.
    TooLong(Duration),
    /// The emulator ended with a failure.
    EmulatorDied(String),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest switched itself off"),
            Self::Crashed(line) => write!(f, "the guest's kernel reported: {line}"),
            Self::Silent(limit) => write!(f, "the guest printed nothing for {} s", limit.as_secs()),
            Self::TooLong(limit) => write!(f, "the guest ran longer than {} s", limit.as_secs()),
            Self::EmulatorDied(how) => write!(f, "QEMU died: {how}"),
        }
    }
}

impl Machine {
    /// Boots and blocks until the guest is gone. Every console line goes to `on_line`, which says
    /// whether the guest has got to its job. A guest that dies early, before that, is booted once more:
    /// multi-threaded emulation loses about one boot in a hundred to the kernel's own code patching.
    ///
    /// # Errors
    /// QEMU could not be started.
    pub fn run(&self, accelerator: Accelerator, on_line: &mut dyn FnMut(&str) -> bool) -> Result<Ending> {
        let began = Instant::now();
        let mut working = false;
        let mut watch = |line: &str| working |= on_line(line);
        let ending = self.boot(accelerator, &mut watch)?;
        if working || ending == Ending::PoweredOff || began.elapsed() > EARLY {
            return Ok(ending);
        }
        eprintln!("infill: {ending}, before it did anything; booting it once more");
        self.boot(accelerator, &mut |line| {
            on_line(line);
        })
    }

    fn boot(&self, accelerator: Accelerator, on_line: &mut dyn FnMut(&str)) -> Result<Ending> {
        let began = Instant::now();
        let qemu = Qemu::start(self, accelerator)?;
        let mut fatal: Option<(String, Instant)> = None;
        loop {
            let left = self.total_limit.saturating_sub(began.elapsed());
            let wait = match &fatal {
                Some((_, at)) => LAST_WORDS.saturating_sub(at.elapsed()),
                None => self.idle_limit.min(left),
            };
            match qemu.lines.recv_timeout(wait) {
                Ok(line) => {
                    on_line(&line);
                    if fatal.is_none() && FATAL.iter().any(|sign| line.contains(sign)) {
                        fatal = Some((line, Instant::now()));
                    }
                }
                Err(RecvTimeoutError::Disconnected) if fatal.is_none() => return qemu.ended(),
                Err(reason) => {
                    return Ok(match fatal {
                        Some((line, _)) => Ending::Crashed(line),
                        None if reason == RecvTimeoutError::Timeout && left > self.idle_limit => Ending::Silent(self.idle_limit),
                        None => Ending::TooLong(self.total_limit),
                    });
                }
            }
        }
    }

    fn command(&self, accelerator: Accelerator) -> Result<Command> {
        let program = packages::find("qemu-system-x86_64")
            .ok_or_else(|| LabError::Failed("qemu-system-x86_64 is not installed (package qemu-system-x86)".into()))?;
        let mut command = Command::new(program);
        command.args(accelerator.arguments());
        command.args(["-m", &self.memory_mib.to_string(), "-smp", &self.cpus.to_string()]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
        let monitor = self.monitor.as_deref().map(|path| format!("unix:{},server=on,wait=off", as_value(path)));
        command.args(["-monitor", monitor.as_deref().unwrap_or("none")]);
        command.args(["-serial", "stdio"]).arg("-kernel").arg(&self.kernel);
        // The kernel tries for a moment whether timer interrupts arrive (`timer_irq_works`) and panics if none does; on a
        // busy machine an emulated timer may be that late. KVM guests leave the check out by themselves.
        let append = format!("console=ttyS0 panic=-1 no_timer_check null_blk.nr_devices=0 {}", self.append);
        command.args(["-append", &append]);
        if let Some(initrd) = &self.initrd {
            command.arg("-initrd").arg(initrd);
        }
        for disk in &self.disks {
            let path = as_value(&disk.path);
            let snapshot = if disk.throw_away { "on" } else { "off" };
            command.arg("-drive").arg(format!("file={path},if=virtio,format=raw,cache=unsafe,snapshot={snapshot}"));
        }
        Ok(command)
    }
}

/// A path inside of an option. A comma would end it; QEMU reads two commas as one.
fn as_value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// A running emulator; killed when dropped.
#[derive(Debug)]
struct Qemu {
    child: Child,
    lines: Receiver<String>,
    complaints: std::thread::JoinHandle<String>,
}

impl Qemu {
    fn start(machine: &Machine, accelerator: Accelerator) -> Result<Self> {
        let mut command = machine.command(accelerator)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().trying(|| "cannot start qemu-system-x86_64")?;
        let console = child.stdout.take();
        let mut errors = child.stderr.take();
        let (send, lines) = channel();
        std::thread::spawn(move || {
            let lines = console.into_iter().flat_map(|c| BufReader::new(c).split(b'\n'));
            for line in lines.map_while(std::result::Result::ok) {
                let line = String::from_utf8_lossy(&line);
                if send.send(line.trim_end_matches('\r').to_owned()).is_err() {
                    return;
                }
            }
        });
        let complaints = std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(errors) = &mut errors {
                let _ = errors.read_to_string(&mut text);
            }
            text
        });
        Ok(Self { child, lines, complaints })
    }

    /// The console was closed: the emulator is ending by itself.
    fn ended(mut self) -> Result<Ending> {
        let status: ExitStatus = self.child.wait().trying(|| "cannot wait for QEMU")?;
        if status.success() {
            return Ok(Ending::PoweredOff);
        }
        let nothing = std::thread::spawn(String::new);
        let text = std::mem::replace(&mut self.complaints, nothing).join().unwrap_or_default();
        Ok(Ending::EmulatorDied(format!("{status}: {}", text.trim())))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Which accelerator works on this machine, found out once a boot of the machine.
///
/// That `/dev/kvm` opens says little: under some hypervisors KVM starts and the guest never leaves its
/// firmware. So a kernel is booted, and has to print a line soon.
///
/// # Errors
/// The cache directory cannot be used or QEMU not be started.
pub fn accelerator(kernel: &Path) -> Result<Accelerator> {
    if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accelerator::Tcg);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let memory = cache_dir()?.join("accelerator");
    if let Ok(text) = fs::read_to_string(&memory)
        && let Some(name) = text.strip_prefix(boot.trim())
    {
        return Ok(if name.trim() == "kvm" { Accelerator::Kvm } else { Accelerator::Tcg });
    }
    let found = if kvm_boots(kernel)? { Accelerator::Kvm } else { Accelerator::Tcg };
    if found == Accelerator::Tcg {
        eprintln!("infill: KVM is there, but a guest does not start with it; emulating instead");
    }
    fs::write(&memory, format!("{} {}\n", boot.trim(), found.name())).trying(|| format!("cannot write {}", memory.display()))?;
    Ok(found)
}

fn kvm_boots(kernel: &Path) -> Result<bool> {
    let machine = Machine {
        kernel: kernel.to_owned(),
        initrd: None,
        disks: Vec::new(),
        memory_mib: 256,
        cpus: 1,
        append: String::new(),
        monitor: None,
        idle_limit: PROBE_LIMIT,
        total_limit: PROBE_LIMIT,
    };
    let mut spoke = false;
    machine.boot(Accelerator::Kvm, &mut |line| spoke |= line.contains("Linux version"))?;
    Ok(spoke)
}
