//! A guest whose first process is systemd: a small Debian root file system, made once of the packages that this machine's
//! release offers, or a newer suite, then kept as `root/PACKAGES-SETUP.img` in the cache directory, where both parts of the name are checksums.
//!
//! The root file system has no udev, no D-Bus and none of the services that a guest does without, so that it boots in
//! seconds also where it is emulated. It mounts the disk of a job, runs the script there, and switches itself off as
//! any machine with systemd does.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::apt::Apt;
use super::disk::{self, CacheFs};
use super::guest::{self, CACHE_BYTES};
use super::initramfs::stripped;
use super::kernel::Kernel;
use super::progress::Progress;
use super::qemu::Machine;
use super::{LabError, Result, Scratch, Trying, cache_dir, checksum, packages};

/// Where the guest has the job's disk.
pub const JOB_DIR: &str = "/job";
/// Where it has the store's.
pub const STORE_DIR: &str = "/store";
/// Where it has the cache's: where the unit wants it.
pub const CACHE_DIR: &str = "/var/cache/infill";
/// The script on the job's disk.
const SCRIPT: &str = "run";
/// What is in the root file system, with all that it depends on.
const PACKAGES: [&str; 10] = ["systemd", "kmod", "procps", "util-linux", "mount", "coreutils", "dash", "diffutils", "erofs-utils", "grep"];
/// What of it is left out: nothing reads it there.
const LEFT_OUT: [&str; 6] = [
    "./usr/share",
    "./lib/udev",
    "./usr/lib/udev",
    "./lib/systemd/system-generators",
    "./usr/lib/systemd/system-generators",
    "./usr/lib/x86_64-linux-gnu/gconv",
];
/// Directories that Debian has as links since 12.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];
/// More directories.
const DIRS: [&str; 10] = ["dev", "etc/systemd/system", "job", "proc", "run", "store", "sys", "tmp", "var/cache/infill", "var/log"];
/// Units that the guest does without.
const MASKED: [&str; 28] = [
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "getty.target",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "proc-sys-fs-binfmt_misc.automount",
    "remote-fs.target",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-debug.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-binfmt.service",
    "systemd-boot-system-token.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-modules-load.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
];
/// More files.
const FILES: [(&str, &str); 6] = [
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"),
    ("etc/group", "root:x:0:\ntty:x:5:\nsystemd-journal:x:101:\nnogroup:x:65534:\n"),
    ("etc/machine-id", "11111111111111111111111111111111\n"),
    ("etc/hostname", "lab\n"),
    ("etc/systemd/system/default.target", "[Unit]\nRequires=basic.target lab.service\nAfter=basic.target\n"),
    ("etc/systemd/system/lab.service", LAB_UNIT),
];
/// Runs the job. Disks are mounted by hand: without udev, systemd would wait for their devices.
const LAB_UNIT: &str = "[Unit]
SuccessAction=poweroff
FailureAction=poweroff
[Service]
Type=oneshot
ExecStartPre=/bin/mount -t ext4 /dev/vdb /job
ExecStart=/bin/sh /job/run
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
TimeoutStartSec=infinity
TimeoutStopSec=10s
";
/// The root file system's size; the image is sparse.
const ROOT_BYTES: u64 = 256 << 20;
/// The size of the job's disk.
const JOB_BYTES: u64 = 192 << 20;
/// What the kernel's command line needs. Kernel messages below errors stay off the console, which is the job's.
const KERNEL_ARGUMENTS: &str = "root=/dev/vda rootfstype=ext4 rw init=/lib/systemd/systemd quiet loglevel=4 systemd.show_status=0";

/// What goes into a guest.
#[derive(Debug)]
pub struct SystemdPlan<'a> {
    /// What boots.
    pub kernel: &'a Kernel,
    /// Debian suite of its packages; `None`: this machine's release.
    pub suite: Option<&'a str>,
    /// Programs for the job's disk: the name there, and where on this machine.
    pub programs: &'a [(&'a str, &'a Path)],
    /// Directories for it: the name there, and where on this machine. Of their files only.
    pub dirs: &'a [(&'a str, &'a Path)],
    /// File system under the cache.
    pub cache_fs: CacheFs,
    /// An ext4 image with the blobs; the guest may write to it, but the image stays as it is.
    pub store_disk: &'a Path,
    /// What to run, as a line for a shell.
    pub command: String,
    /// How long the whole boot may take.
    pub total_limit: Duration,
}

impl SystemdPlan<'_> {
    /// Makes the disks in `scratch`; gives the machine that boots with them.
    ///
    /// # Errors
    /// There is no root file system, a file cannot be read or a disk not be made.
    pub fn build(&self, scratch: &Path) -> Result<Machine> {
        let (job, cache) = (scratch.join("job.img"), scratch.join("cache.img"));
        disk::ext4(&job, JOB_BYTES, Some(&self.job(&scratch.join("job"))?))?;
        self.cache_fs.make(&cache, CACHE_BYTES)?;
        let disks = [(ensure_root(self.suite)?, true), (job, false), (cache, false), (self.store_disk.to_owned(), true)];
        Ok(guest::machine(self.kernel, None, &disks, KERNEL_ARGUMENTS, self.total_limit))
    }

    /// Fills a directory with what is to be on the job's disk.
    fn job(&self, dir: &Path) -> Result<PathBuf> {
        let script = format!(
            "mount -t {fs} -o noatime /dev/vdc {CACHE_DIR}\nmount -t ext4 -o noatime /dev/vdd {STORE_DIR}\nexec {command}\n",
            fs = self.cache_fs.name(),
            command = self.command
        );
        write(&dir.join(SCRIPT), script.as_bytes())?;
        for (name, program) in self.programs {
            let path = dir.join(name);
            write(&path, &stripped(program)?)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).trying(|| format!("cannot change {}", path.display()))?;
        }
        for (name, from) in self.dirs {
            let entries = fs::read_dir(from).trying(|| format!("cannot list {}", from.display()))?;
            for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()) {
                let data = fs::read(&path).trying(|| format!("cannot read {}", path.display()))?;
                write(&dir.join(name).join(path.file_name().unwrap_or_default()), &data)?;
            }
        }
        Ok(dir.to_owned())
    }
}

fn write(path: &Path, data: &[u8]) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    fs::create_dir_all(path.parent().unwrap_or(path)).and_then(|()| fs::write(path, data)).trying(what)
}

/// Gives the image of a suite's root file system (`None`: of this machine's release): the cached one, or one made now.
///
/// # Errors
/// There is none in the cache, and its packages cannot be had or the tools for it are missing.
pub fn ensure_root(suite: Option<&str>) -> Result<PathBuf> {
    let home = cache_dir()?.join("root");
    fs::create_dir_all(&home).trying(|| format!("cannot make {}", home.display()))?;
    let apt = suite.map_or_else(|| Ok(Apt::of_machine()), |suite| Apt::of_suite(suite, &home))?;
    let setup = format!("{:016x}.img", checksum(format!("{suite:?}{FILES:?}{MASKED:?}{LEFT_OUT:?}{DIRS:?}").as_bytes()));
    let offered = || apt.offered_with_dependencies(&PACKAGES);
    let Some(offered) = offered().or_else(|| apt.refresh().ok().and_then(|()| offered())) else {
        // No lists: whatever is there will do.
        let found = fs::read_dir(&home).into_iter().flatten().flatten().map(|entry| entry.path());
        let none = || LabError::Failed(format!("no package lists, and no root file system in {}; run: apt-get update", home.display()));
        return found.filter(|path| path.to_string_lossy().ends_with(&setup)).last().ok_or_else(none);
    };
    let image = home.join(format!("{:016x}-{setup}", checksum(offered.join(" ").as_bytes())));
    if image.is_file() {
        return Ok(image);
    }
    packages::ensure(packages::ROOT_TOOLS)?;
    let work = Scratch::make("root-work")?;
    let progress = Progress::begin(format!("making a root file system of {} packages", offered.len()));
    let (archives, tree, part) = (work.path().join("archives"), work.path().join("tree"), work.path().join("root.img"));
    apt.download_with_dependencies(&PACKAGES, &archives)?;
    grow(&tree, &archives)?;
    disk::ext4(&part, ROOT_BYTES, Some(&tree))?;
    fs::rename(&part, &image).trying(|| format!("cannot store {}", image.display()))?;
    progress.finish("done");
    Ok(image)
}

/// Makes the tree of the root file system. No script of a package is run.
fn grow(tree: &Path, archives: &Path) -> Result<()> {
    let at = |path: &str| tree.join(path);
    for dir in DIRS.map(str::to_owned).into_iter().chain(MERGED.map(|name| format!("usr/{name}"))) {
        fs::create_dir_all(at(&dir)).trying(|| format!("cannot make {dir}"))?;
    }
    for name in MERGED {
        symlink(format!("usr/{name}"), at(name)).trying(|| format!("cannot make {name}"))?;
    }
    let entries = fs::read_dir(archives).trying(|| format!("cannot list {}", archives.display()))?;
    for deb in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "deb")) {
        unpack(&deb, tree)?;
    }
    for unit in MASKED {
        symlink("/dev/null", at("etc/systemd/system").join(unit)).trying(|| format!("cannot mask {unit}"))?;
    }
    FILES.iter().try_for_each(|(path, text)| write(&at(path), text.as_bytes()))
}

/// Unpacks a package's files below `tree`, through the links that are there for directories.
fn unpack(deb: &Path, tree: &Path) -> Result<()> {
    let what = || format!("cannot unpack {}", deb.display());
    let mut reader = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb).stdout(Stdio::piped()).spawn().trying(what)?;
    let archive = reader.stdout.take().ok_or_else(|| LabError::Failed(what()))?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--keep-directory-symlink", "--no-same-owner", "-C"]).arg(tree);
    tar.args(LEFT_OUT.map(|path| format!("--exclude={path}"))).stdin(archive);
    let unpacked = tar.output().trying(what)?;
    let read = reader.wait().trying(what)?;
    if unpacked.status.success() && read.success() {
        return Ok(());
    }
    Err(LabError::Failed(format!("{}: {}", what(), String::from_utf8_lossy(&unpacked.stderr).trim())))
}
