//! Why the device could not be bound, and what to do about it.

use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::DEFAULT_DEVNODE;
use crate::front::cachefiles::cache_dir::CacheDirError;
use crate::front::cachefiles::command::CommandError;
use crate::front::cachefiles::limits::BadLimits;
use crate::ops::exit;
use crate::ops::processes::{self, Process};

/// Why the device could not be bound. Each message is one line that says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// There is no device.
    #[error(
        "{}: no such device: load it with `modprobe cachefiles`; if there is no such module, this kernel was built without CONFIG_CACHEFILES (see docs/kernels.md)",
        .0.display()
    )]
    NoDevice(PathBuf),
    /// The path names something else.
    #[error(
        "{}: this is not the cachefiles device: give the path of the device, usually {DEFAULT_DEVNODE}",
        .0.display()
    )]
    NotTheDevice(PathBuf),
    /// We may not open it.
    #[error(
        "{}: cannot open the device: {errno}: run as root, with CAP_SYS_ADMIN in the initial user namespace",
        devnode.display()
    )]
    NotPermitted {
        /// The device.
        devnode: PathBuf,
        /// `EPERM` or `EACCES`.
        errno: Errno,
    },
    /// Somebody else has it: the kernel lets one process open it.
    #[error(
        "{}: the device is in use by {}: only one daemon can serve a kernel; stop it first",
        devnode.display(),
        processes::describe(holders)
    )]
    Busy {
        /// The device.
        devnode: PathBuf,
        /// Who has it, as far as `/proc` tells.
        holders: Vec<Process>,
    },
    /// Opening failed in some other way.
    #[error("{}: cannot open the device: {errno}", devnode.display())]
    Open {
        /// The device.
        devnode: PathBuf,
        /// The reason.
        errno: Errno,
    },
    /// A setting that the kernel would misread.
    #[error("cannot set `{verb}` of the cache to `{value}`: {why}")]
    BadValue {
        /// The kernel's name of the setting.
        verb: &'static str,
        /// The value, escaped for printing.
        value: String,
        /// The reason.
        why: CommandError,
    },
    /// A directory that cannot hold a cache.
    #[error(transparent)]
    Directory(#[from] CacheDirError),
    /// Limits that contradict each other.
    #[error("bad culling limits: {0}")]
    BadLimits(#[from] BadLimits),
    /// The kernel refused a command before `bind`.
    #[error("{}: the kernel refused `{command}`: {errno}: {}", devnode.display(), setup_advice(command))]
    Setup {
        /// The device.
        devnode: PathBuf,
        /// The command, escaped for printing.
        command: String,
        /// The reason.
        errno: Errno,
    },
    /// The kernel knows cachefiles but not its on-demand mode.
    #[error(
        "{}: this kernel has no on-demand mode: it was built without CONFIG_CACHEFILES_ONDEMAND, or is 7.3 or later (see docs/kernels.md)",
        .0.display()
    )]
    NoOnDemand(PathBuf),
    /// What was kept is something else.
    #[error(
        "what was kept over the restart as the cachefiles device is {0}: end whoever keeps it (`infill release`, or stop the unit), then start again"
    )]
    KeptIsNotTheDevice(&'static str),
    /// What was kept serves another cache.
    #[error(
        "the device that was kept over the restart is bound to {noted}, not to {}: with that directory it goes on; to use another one, unmount the images and give the device up with `infill release`, or all that they have not read yet fails",
        cache_dir.display()
    )]
    KeptForAnother {
        /// The directory that was asked for.
        cache_dir: PathBuf,
        /// The directory of the kept device, as far as it is known.
        noted: String,
    },
    /// Its cache has failed.
    #[error(
        "the cache of the device that was kept over the restart has failed (`dmesg` says why): unmount the images, give the device up with `infill release`, and start again"
    )]
    KeptIsDead,
    /// It cannot be asked.
    #[error("cannot ask the device that was kept over the restart whether it is bound to {}: {errno}", cache_dir.display())]
    Kept {
        /// The directory that was asked for.
        cache_dir: PathBuf,
        /// The reason.
        errno: Errno,
    },
    /// The kernel refused to make a cache of the directory.
    #[error("{}: the kernel refused to use this cache directory: {errno}: {}", cache_dir.display(), bind_advice(*errno))]
    CacheDir {
        /// The directory.
        cache_dir: PathBuf,
        /// The reason.
        errno: Errno,
    },
}

impl BindError {
    /// Why open(2) of the device failed, and if somebody has it, who.
    pub(super) fn of_open(devnode: &Path, errno: Errno) -> Self {
        let devnode = devnode.to_owned();
        match errno {
            Errno::ENOENT | Errno::ENXIO | Errno::ENODEV => Self::NoDevice(devnode),
            Errno::EPERM | Errno::EACCES => Self::NotPermitted { devnode, errno },
            Errno::EBUSY => Self::Busy { holders: processes::find_holders(&devnode), devnode },
            _ => Self::Open { devnode, errno },
        }
    }

    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoDevice(_) | Self::Busy { .. } | Self::NoOnDemand(_) => exit::UNAVAILABLE,
            Self::NotPermitted { .. } => exit::NO_PERMISSION,
            Self::NotTheDevice(_) | Self::BadValue { .. } | Self::BadLimits(_) | Self::Setup { .. } => exit::BAD_CONFIGURATION,
            Self::CacheDir { errno, .. } => match errno {
                Errno::EBUSY => exit::UNAVAILABLE,
                Errno::EIO | Errno::ENOMEM | Errno::ENOSPC => exit::FAILED,
                _ => exit::BAD_CONFIGURATION,
            },
            Self::Directory(error) => error.exit_code(),
            Self::KeptIsNotTheDevice(_) | Self::KeptForAnother { .. } => exit::BAD_CONFIGURATION,
            Self::KeptIsDead | Self::Kept { .. } | Self::Open { .. } => exit::FAILED,
        }
    }
}

fn setup_advice(command: &str) -> &'static str {
    if command.starts_with("secctx") {
        "check the security context and that its security module is enabled"
    } else {
        "`dmesg` has the details"
    }
}

/// What to do when `cachefiles_add_cache` (fs/cachefiles/cache.c) fails with `errno`.
const fn bind_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EINVAL => "it lies on an idmapped mount; use one that is not",
        Errno::EOPNOTSUPP => {
            "its file system lacks something (O_TMPFILE, extended attributes, sync) or has blocks larger than a page; use ext4 or XFS with blocks of 4 KiB"
        }
        Errno::EROFS => "its file system is read-only; remount it for writing or use another one",
        Errno::EBUSY => {
            "it, or a cache of the same tag, is in use; unmount the images of the daemon that had it, or choose another directory and tag"
        }
        Errno::ERANGE => "the culling limits or the file system's block size are out of range",
        Errno::ENOENT | Errno::ENOTDIR => "it is no directory; create it",
        Errno::EACCES | Errno::EPERM => "a security module forbids it; check `secctx` and the audit log",
        _ => "`dmesg` has the details",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_the_device_name_the_cause_and_the_remedy() {
        let path = Path::new("/dev/cachefiles");
        let error = BindError::of_open(path, Errno::EPERM);
        assert_eq!(
            error.to_string(),
            "/dev/cachefiles: cannot open the device: EPERM: Operation not permitted: run as root, with CAP_SYS_ADMIN in the initial user namespace"
        );
        assert_eq!(error.exit_code(), 77);
        let error = BindError::Busy { devnode: path.to_owned(), holders: vec![Process { pid: 7, command: "nydusd".to_owned() }] };
        assert_eq!(
            error.to_string(),
            "/dev/cachefiles: the device is in use by pid 7 (nydusd): only one daemon can serve a kernel; stop it first"
        );
        assert_eq!(error.exit_code(), 69);
        let error = BindError::NoOnDemand(path.to_owned());
        assert!(error.to_string().contains("CONFIG_CACHEFILES_ONDEMAND"));
        assert_eq!(error.exit_code(), 69);
        assert_eq!(BindError::of_open(path, Errno::EIO).exit_code(), 1);
    }

    #[test]
    fn refusals_of_the_directory_name_the_cause_and_the_remedy() {
        let code = |errno| {
            let error = BindError::CacheDir { cache_dir: "/c".into(), errno };
            let text = error.to_string();
            assert!(text.starts_with("/c: the kernel refused to use this cache directory: "), "{text}");
            assert!(!text.contains('\n') && !text.contains("dmesg"), "{text}");
            error.exit_code()
        };
        for errno in [Errno::EINVAL, Errno::EOPNOTSUPP, Errno::EROFS, Errno::ERANGE, Errno::ENOENT] {
            assert_eq!(code(errno), 78);
        }
        assert_eq!(code(Errno::EBUSY), 69);
    }
}
