//! The guest that both the demo and the tests boot: infill inside, a fresh cache disk on `/cache`, a
//! disk with blobs on `/store`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::disk::CacheFs;
use super::init::{INIT_PROGRAM, JOB_FILE, Job, KERNEL_ARGUMENTS, Mount};
use super::initramfs::Archive;
use super::kernel::Kernel;
use super::qemu::{Disk, Machine};
use super::{LabError, Result, Trying};

/// Guest memory: the initramfs, the page cache of a test tree, and the daemon's buffers.
const MEMORY_MIB: u32 = 1024;
/// Two processors: enough for races, and what small build machines have.
const CPUS: u32 = 2;
/// The cache disk's size; the image is sparse.
pub(super) const CACHE_BYTES: u64 = 768 << 20;
/// A guest that has work prints something more often than this, also when it is emulated.
const IDLE_LIMIT: Duration = Duration::from_secs(180);

/// What goes into a guest.
#[derive(Debug)]
pub struct GuestPlan<'a> {
    /// What boots.
    pub kernel: &'a Kernel,
    /// The infill program to put inside.
    pub infill: &'a Path,
    /// More programs: where in the guest, and where on this machine.
    pub programs: &'a [(&'a str, &'a Path)],
    /// More files: where in the guest, and their content.
    pub files: &'a [(&'a str, &'a [u8])],
    /// File system under the cache.
    pub cache_fs: CacheFs,
    /// An ext4 image with the blobs; the guest may write to it, but the image stays as it is.
    pub store_disk: &'a Path,
    /// What to run.
    pub argv: Vec<String>,
    /// How long the whole boot may take.
    pub total_limit: Duration,
}

impl GuestPlan<'_> {
    /// Writes initramfs and cache disk into `scratch`; gives the machine that boots with them. A cache disk that is there stays
    /// as it is: it is that of a guest whose power was cut.
    ///
    /// # Errors
    /// A file cannot be read or written, a disk not be made, or this is not an x86-64 machine.
    pub fn build(&self, scratch: &Path) -> Result<Machine> {
        if !cfg!(target_arch = "x86_64") {
            return Err(LabError::Failed("guests run this machine's programs on x86-64 kernels: the lab needs an x86-64 machine".into()));
        }
        let cache = scratch.join("cache.img");
        if !cache.exists() {
            self.cache_fs.make(&cache, CACHE_BYTES)?;
        }
        let disks = [(cache, false), (self.store_disk.to_owned(), true)];
        let initrd = initramfs(scratch, self.infill, self.programs, self.files, &self.job())?;
        Ok(machine(self.kernel, Some(initrd), &disks, KERNEL_ARGUMENTS, self.total_limit))
    }

    fn job(&self) -> Job {
        let disk = |device: &str, on: &str, fs: &str| Mount { device: device.into(), on: on.into(), fs: fs.into(), read_only: false };
        Job {
            argv: self.argv.clone(),
            env: environment(),
            mounts: vec![disk("/dev/vda", "/cache", self.cache_fs.name()), disk("/dev/vdb", "/store", "ext4")],
        }
    }
}

/// The machine of every guest, with these disks, of which those marked stay as they are.
pub(super) fn machine(
    kernel: &Kernel,
    initrd: Option<PathBuf>,
    disks: &[(PathBuf, bool)],
    arguments: &str,
    total_limit: Duration,
) -> Machine {
    Machine {
        kernel: kernel.image.clone(),
        initrd,
        disks: disks.iter().map(|(path, throw_away)| Disk { path: path.clone(), throw_away: *throw_away }).collect(),
        memory_mib: MEMORY_MIB,
        cpus: CPUS,
        append: arguments.to_owned(),
        monitor: None,
        idle_limit: IDLE_LIMIT,
        total_limit,
    }
}

/// Writes an initial RAM file system into `scratch`: infill as init, programs, files, and the job.
///
/// # Errors
/// A file cannot be read or written.
pub(super) fn initramfs(scratch: &Path, infill: &Path, programs: &[(&str, &Path)], files: &[(&str, &[u8])], job: &Job) -> Result<PathBuf> {
    let path = scratch.join("initramfs");
    let file = File::create(&path).trying(|| format!("cannot write {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file))?;
    archive.program(INIT_PROGRAM, infill)?;
    for (guest_path, program) in programs {
        archive.program(guest_path, program)?;
    }
    for (guest_path, data) in files {
        archive.file(guest_path, 0o644, data)?;
    }
    archive.file(JOB_FILE, 0o644, &job.to_json()?)?;
    archive.finish()?;
    Ok(path)
}

/// What the guest's programs find in their environment.
pub(super) fn environment() -> BTreeMap<String, String> {
    let env = [("PATH", "/bin:/sbin"), ("HOME", "/tmp"), ("RUST_BACKTRACE", "1")];
    env.map(|(name, value)| (name.into(), value.into())).into()
}
