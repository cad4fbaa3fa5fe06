//! Taking `/dev/cachefiles`: open it, say which directory is the cache, bind it in on-demand mode.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};
use nix::unistd::{chdir, fchdir};

mod error;

pub use self::error::BindError;
use super::limits::CullLimits;
use super::{cache_dir, command, fsck};

/// Where the kernel puts the device.
pub const DEFAULT_DEVNODE: &str = "/dev/cachefiles";

/// The cache's name in `/proc/fs/fscache/caches`.
const DEFAULT_TAG: &str = "infill";

/// Where the kernel lists miscellaneous devices: a minor number and a name each line.
const MISC_DEVICES: &str = "/proc/misc";

/// `MISC_MAJOR` (include/uapi/linux/major.h).
const MISC_MAJOR: u64 = 10;

/// How long a device that no process holds may stay busy: an io_uring, and whatever was in flight, is closed
/// some time after its process has ended.
const RELEASE_WAIT: Duration = Duration::from_secs(5);
/// Pause between two tries.
const RELEASE_POLL: Duration = Duration::from_millis(50);

/// What to bind.
#[derive(Clone, Debug)]
pub struct BindOptions {
    /// The device.
    pub devnode: PathBuf,
    /// The cache directory; made if it does not exist. Looked up by the kernel in this process's mount
    /// namespace.
    pub cache_dir: PathBuf,
    /// Name of the cache; only one of each name can exist.
    pub tag: String,
    /// Security context in which the kernel works on the cache's files (`SELinux`); none: the caller's.
    pub secctx: Option<String>,
    /// How full the cache's file system may become.
    pub limits: CullLimits,
    /// On XFS, the pieces in which cache files take their space; `None`: what is set, or the default.
    pub xfs_extent_bytes: Option<u32>,
}

impl BindOptions {
    /// Everything as usual, with the cache in `cache_dir`.
    #[must_use]
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            devnode: DEFAULT_DEVNODE.into(),
            cache_dir: cache_dir.into(),
            tag: DEFAULT_TAG.to_owned(),
            secctx: None,
            limits: CullLimits::default(),
            xfs_extent_bytes: None,
        }
    }

    /// The commands up to, but not including, `bind`, for a cache in `dir`.
    fn commands(&self, dir: &Path) -> Result<Vec<Vec<u8>>, BindError> {
        let set = |verb, value: &[u8]| {
            command::setup(verb, value).map_err(|why| BindError::BadValue { verb, value: value.escape_ascii().to_string(), why })
        };
        let mut commands = vec![set("dir", dir.as_os_str().as_bytes())?, set("tag", self.tag.as_bytes())?];
        if let Some(secctx) = &self.secctx {
            commands.push(set("secctx", secctx.as_bytes())?);
        }
        let limits = self.limits.commands()?;
        commands.extend(limits.into_iter().map(String::into_bytes));
        Ok(commands)
    }
}

/// A bound device.
pub(super) struct Bound {
    pub(super) devnode: OwnedFd,
    /// Whether the kernel has `restore`, and so opens objects again (Linux 6.8, 6.6.35, 6.1.95).
    pub(super) reopens: bool,
}

/// Opens and binds the device.
pub(super) fn bind(options: &BindOptions) -> Result<Bound, BindError> {
    // Settings first: bad ones should not cost a running daemon's replacement the device.
    options.commands(&options.cache_dir)?;
    let devnode = open(&options.devnode)?;
    // The device is ours, so no other daemon works in the directory.
    let dir = cache_dir::prepare(&options.cache_dir, options.xfs_extent_bytes)?;
    tidy(&dir)?;
    for command in options.commands(&dir)? {
        command::give(devnode.as_fd(), &command).map_err(|errno| BindError::Setup {
            devnode: options.devnode.clone(),
            command: command.escape_ascii().to_string(),
            errno,
        })?;
    }
    match command::give(devnode.as_fd(), b"bind ondemand") {
        Ok(()) => {}
        Err(Errno::EINVAL) if !has_on_demand_mode(&devnode) => {
            return Err(BindError::NoOnDemand(options.devnode.clone()));
        }
        Err(errno) => {
            return Err(BindError::CacheDir { cache_dir: options.cache_dir.clone(), errno });
        }
    }
    let reopens = command::give(devnode.as_fd(), b"restore").is_ok();
    Ok(Bound { devnode, reopens })
}

/// Takes over a device that was bound by another process, and asks for what that one left unanswered. Nothing is tidied
/// in the cache directory, because the kernel works in it. To be called before there are threads: the process's
/// directory changes for a moment.
pub(super) fn take_over(devnode: OwnedFd, options: &BindOptions, noted: &str) -> Result<Bound, BindError> {
    let found = fstat(&devnode).map_err(|errno| BindError::Kept { cache_dir: options.cache_dir.clone(), errno })?;
    if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT != SFlag::S_IFCHR || !is_cachefiles(found.st_rdev) {
        return Err(BindError::KeptIsNotTheDevice("something else"));
    }
    match is_bound_to(&devnode, &options.cache_dir) {
        Ok(true) => {}
        Ok(false) => return Err(BindError::KeptForAnother { cache_dir: options.cache_dir.clone(), noted: noted.to_owned() }),
        // A cache that failed refuses every command; one that was never bound knows at least its mode, or none.
        Err(Errno::EIO) if command::give(devnode.as_fd(), b"copen x") == Err(Errno::EIO) => return Err(BindError::KeptIsDead),
        Err(Errno::EIO) => return Err(BindError::KeptIsNotTheDevice("not bound to any directory")),
        Err(errno) => return Err(BindError::Kept { cache_dir: options.cache_dir.clone(), errno }),
    }
    let reopens = command::give(devnode.as_fd(), b"restore").is_ok();
    Ok(Bound { devnode, reopens })
}

/// Whether a device's cache is in `dir`. The kernel marks the directories of a cache (`S_KERNEL_FILE`), and its command
/// `inuse`, which looks in the directory that the process is in, says `EBUSY` of what is marked so
/// (`cachefiles_get_directory`, `cachefiles_lookup_for_cull`, fs/cachefiles/namei.c). As only one process can have
/// opened the device, and cachefiles alone makes such marks, the mark is this device's.
fn is_bound_to(devnode: &OwnedFd, dir: &Path) -> Result<bool, Errno> {
    let back = open_dir(Path::new("."));
    match chdir(dir) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(false),
        result => result?,
    }
    let answer = command::give(devnode.as_fd(), b"inuse cache");
    if let Ok(back) = back {
        fchdir(back)?;
    }
    match answer {
        Err(Errno::EBUSY) => Ok(true),
        Ok(()) | Err(Errno::ENOENT | Errno::ESTALE) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Removes what would make mounts fail, and says so.
fn tidy(dir: &Path) -> Result<(), BindError> {
    let report = fsck::repair(dir)?;
    for path in &report.damaged {
        tracing::warn!("removed the damaged cache file {}: its data will be fetched again", path.display());
    }
    if report.damaged.is_empty() && report.buried == 0 {
        tracing::debug!(checked = report.checked, "cache directory checked");
    } else {
        tracing::info!(checked = report.checked, removed = report.damaged.len(), buried = report.buried, "cache directory cleaned");
    }
    Ok(())
}

/// Whether the kernel knows the command `copen`, asked after `bind ondemand` was refused: that sets the mode
/// before it looks at the directory, and a `copen` without a comma is then `EINVAL`. Where the mode was not built
/// in, the verb is unknown: `EOPNOTSUPP`.
fn has_on_demand_mode(devnode: &OwnedFd) -> bool {
    command::give(devnode.as_fd(), b"copen x") == Err(Errno::EINVAL)
}

fn open(devnode: &Path) -> Result<OwnedFd, BindError> {
    let failed = |error: std::io::Error| BindError::of_open(devnode, errno_of(&error));
    // Before the open, because opening some other device may do something.
    let found = fs::metadata(devnode).map_err(failed)?;
    if !found.file_type().is_char_device() || !is_cachefiles(found.rdev()) {
        return Err(BindError::NotTheDevice(devnode.to_owned()));
    }
    let mut options = OpenOptions::new();
    // O_CLOEXEC is std's default. O_NONBLOCK makes no difference to read(2), but without it an io_uring would hand
    // a read of the device to a worker thread that waits there.
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let started = Instant::now();
    loop {
        match options.open(devnode).map_err(failed) {
            Ok(file) => return Ok(file.into()),
            // Nobody has it: the kernel is still closing what a daemon that has just ended left behind.
            Err(BindError::Busy { holders, .. }) if holders.is_empty() && started.elapsed() < RELEASE_WAIT => {
                std::thread::sleep(RELEASE_POLL);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether this is the kernel's device of that name. Also `true` if the kernel's list cannot be read: its
/// answers to the commands will tell.
fn is_cachefiles(rdev: u64) -> bool {
    let Ok(list) = fs::read_to_string(MISC_DEVICES) else {
        return true;
    };
    major(rdev) == MISC_MAJOR
        && list.lines().any(|line| {
            let mut fields = line.split_ascii_whitespace();
            fields.next().and_then(|field| field.parse().ok()) == Some(minor(rdev)) && fields.next() == Some("cachefiles")
        })
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind_error(options: &BindOptions) -> BindError {
        bind(options).err().expect("nothing to bind here")
    }

    fn options(devnode: impl Into<PathBuf>) -> BindOptions {
        BindOptions { devnode: devnode.into(), ..BindOptions::new("/var/cache/infill") }
    }

    #[test]
    fn a_missing_device_is_explained() {
        let error = bind_error(&options("/dev/no-such-device"));
        assert_eq!(
            error.to_string(),
            "/dev/no-such-device: no such device: load it with `modprobe cachefiles`; if there is no such module, this kernel was built without CONFIG_CACHEFILES (see docs/kernels.md)"
        );
        assert_eq!(error.exit_code(), 69);
    }

    #[test]
    fn other_files_and_devices_are_not_bound() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/dev/null")] {
            let error = bind_error(&options(path));
            assert_eq!(
                error.to_string(),
                format!("{}: this is not the cachefiles device: give the path of the device, usually /dev/cachefiles", path.display())
            );
            assert_eq!(error.exit_code(), 78);
        }
        assert_eq!(fs::read(file.path()).unwrap(), b"");
    }

    #[test]
    fn commands_come_in_the_order_the_kernel_wants() {
        let mut options = options("/dev/cachefiles");
        options.secctx = Some("system_u:object_r:cachefiles_t:s0".to_owned());
        options.limits.bstop_percent = Some(0);
        options.limits.frun_percent = Some(20);
        let commands = options.commands(&options.cache_dir).unwrap();
        let text: Vec<_> = commands.iter().map(|command| str::from_utf8(command).unwrap()).collect();
        assert_eq!(text, ["dir /var/cache/infill", "tag infill", "secctx system_u:object_r:cachefiles_t:s0", "bstop 0%", "frun 20%"]);
    }

    #[test]
    fn settings_the_kernel_would_misread_are_refused_before_the_device_is_touched() {
        let mut options = options("/dev/no-such-device");
        options.tag = "a\nb".to_owned();
        let error = bind_error(&options);
        assert_eq!(error.to_string(), "cannot set `tag` of the cache to `a\\nb`: it contains a NUL or a newline");
        assert_eq!(error.exit_code(), 78);
    }
}
