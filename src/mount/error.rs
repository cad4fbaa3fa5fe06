//! Why blobs cannot be served.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::key::Key;
use crate::store::StoreError;

/// Why blobs cannot be served at all.
#[derive(Debug, thiserror::Error)]
pub enum BlobsError {
    /// The kernel asks for a capability.
    #[error("fanotify: not permitted; run as root, with CAP_SYS_ADMIN in the initial user namespace")]
    NotPermitted,
    /// It gives no group.
    #[error("fanotify: no group: {errno}: {}", group_advice(*.errno))]
    NoGroup {
        /// Why not.
        errno: Errno,
    },
    /// It has no such events, or not there.
    #[error("fanotify: cannot watch files in {}: {errno}: {}", dir.display(), watch_advice(*.errno))]
    NoEvents {
        /// Where.
        dir: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// Nothing can outlive the process, or what an earlier one has left is of no use.
    #[error("fanotify: cannot keep files watched over a restart: {0}; see RLIMIT_NOFILE, and infill release")]
    Bag(#[source] io::Error),
    /// The cache directory cannot be used.
    #[error("cannot use {} as a cache directory: {source}", dir.display())]
    Dir {
        /// Which.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

const fn group_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EMFILE => "too many groups; raise fs.fanotify.max_user_groups, or lower --shards",
        Errno::EINVAL | Errno::ENOSYS => "this kernel was built without CONFIG_FANOTIFY_ACCESS_PERMISSIONS",
        _ => "see infill doctor",
    }
}

/// Why a blob cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No store has it.
    #[error("no store has the blob {0}; look at the stores that infill was started with")]
    NotFound(Key),
    /// It does not say which blobs its devices are.
    #[error("the image {image} has {devices} devices, and does not name all of them; say which blobs they are, in order, with --device")]
    Nameless {
        /// Which image.
        image: String,
        /// How many it has.
        devices: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The cache directory.
    #[error("cannot keep {key} in {}: {source}; see the free space and the rights there", dir.display())]
    Cache {
        /// What.
        key: Key,
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel does not watch the file.
    #[error("cannot watch {}: {errno}: {}", path.display(), watch_advice(*.errno))]
    Mark {
        /// Which file.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// The engine refused it.
    #[error("cannot serve {key}: {errno}; {}", open_advice(*.errno))]
    Refused {
        /// What.
        key: Key,
        /// Why not.
        errno: Errno,
    },
    /// It could not be kept over a restart, and nothing is served that is not.
    #[error("cannot keep {key} watched over a restart: {source}; raise LimitNOFILE=")]
    Unkept {
        /// What.
        key: Key,
        /// Why not.
        source: io::Error,
    },
    /// It is mounted as too many different things.
    #[error("the image {0:?} is mounted with too many different lists of devices already; mount it with one of those, or unmount them all")]
    TooManyWays(String),
    /// It did not answer.
    #[error("{0} was not brought in time; see whether its store can be read, and request_timeout_ms")]
    TimedOut(Key),
}

const fn watch_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EOPNOTSUPP => "its file system has no pre-content events; use a cache directory on ext4, XFS or btrfs",
        Errno::EINVAL => "this kernel has no pre-content events (Linux 6.14)",
        Errno::ENOSPC => "there are too many marks; raise fs.fanotify.max_user_marks",
        _ => "see infill doctor",
    }
}

const fn open_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::ENFILE => "fd_budget is used up; raise it, or unmount images",
        Errno::EAGAIN => "too many blobs are being opened; try again",
        _ => "the log says why",
    }
}
