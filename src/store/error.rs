//! What can go wrong with a store: at start ([`SetupError`]) and at the opening of a blob ([`StoreError`]).

use std::path::PathBuf;

use nix::errno::Errno;

use super::name::NameError;

/// Why a store could not open a blob that it has or may have.
#[derive(Debug, thiserror::Error)]
#[error("store {store}: cannot open the blob {key}: {source}")]
pub struct StoreError {
    /// The store's setting.
    pub store: String,
    /// The blob, escaped for printing.
    pub key: String,
    /// What stood in the way.
    pub source: Cause,
}

impl StoreError {
    /// Whether trying again may help: the blob exists and the failure may pass. An open that is failed
    /// for such a reason would be lost for good, so it is worth waiting.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.source.is_transient()
    }

    /// The error number to answer the kernel with.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        self.source.errno()
    }
}

/// What stood in the way of opening a blob.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Cause {
    /// The key cannot be a file name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is something by that name, but not a regular file.
    #[error("it is {0}, and a blob must be a regular file; replace it")]
    NotAFile(&'static str),
    /// A symbolic link points out of the store.
    #[error("it is a symbolic link that leaves the store; put the blob itself or a hard link in its place")]
    Leaves,
    /// A symbolic link, where the kernel offers no way to check where it leads; or a loop of links.
    #[error(
        "it is a symbolic link that cannot be followed safely (a loop, or openat2(2) is blocked by a \
         seccomp filter); put the blob itself or a hard link in its place"
    )]
    Link,
    /// The file lies on an EROFS mount, which may be one that waits for this very daemon.
    #[error("it lies on an EROFS mount, which could be waiting for infill itself; move it to another file system")]
    OnErofs,
    /// The store's directory went away, perhaps for the moment of an exchange.
    #[error("the store's directory {} is gone; put it back", .0.display())]
    Gone(PathBuf),
    /// What the file system said.
    #[error("{0}{advice}", advice = advice(*.0))]
    Os(#[from] Errno),
}

impl Cause {
    /// See [`StoreError::is_transient`].
    #[must_use]
    pub fn is_transient(&self) -> bool {
        use Errno::{EAGAIN, EBUSY, EINTR, EIO, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOTCONN, ESTALE, ETIMEDOUT};
        match self {
            Self::Gone(_) => true,
            Self::Os(errno) => {
                matches!(errno, EAGAIN | EBUSY | EINTR | EIO | EMFILE | ENFILE | ENOBUFS | ENOMEM | ENOTCONN | ESTALE | ETIMEDOUT)
            }
            _ => false,
        }
    }

    /// See [`StoreError::errno`].
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Name(NameError::TooLong(_)) => Errno::ENAMETOOLONG,
            Self::Name(_) | Self::NotAFile(_) => Errno::EINVAL,
            Self::Leaves => Errno::EXDEV,
            Self::Link => Errno::ELOOP,
            Self::OnErofs => Errno::EDEADLK,
            Self::Gone(_) => Errno::ENOENT,
            Self::Os(errno) => *errno,
        }
    }
}

/// What an operator can do about an error number, as the end of a sentence.
const fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EACCES | Errno::EPERM => {
            "; let the daemon's user read it (chmod o+r), or restart infill if a directory was mounted or replaced since its start (see --confine)"
        }
        Errno::EMFILE => "; raise LimitNOFILE=",
        Errno::ENFILE => "; raise the sysctl fs.file-max",
        Errno::EIO => "; look for disk errors in the kernel log",
        Errno::ENOTCONN | Errno::ESTALE | Errno::ETIMEDOUT => "; mount the store's file system again",
        _ => "",
    }
}

/// Why a store could not be set up at all.
#[derive(Debug, thiserror::Error)]
#[error("store {store}: {source}")]
pub struct SetupError {
    /// The store's setting.
    pub store: String,
    /// What is wrong with it.
    pub source: Unusable,
}

/// Why a directory cannot be a store.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unusable {
    /// Nothing is there.
    #[error("the directory {} does not exist; create it or correct the setting", .0.display())]
    Missing(PathBuf),
    /// Something else is there.
    #[error("{} is not a directory; name the directory that holds the blobs", .0.display())]
    NotADirectory(PathBuf),
    /// Permission is missing.
    #[error(
        "no permission to read and search the directory {}; give the daemon's user both (chmod o+rx), and search of those above it (chmod o+x)",
        .0.display()
    )]
    NotReadable(PathBuf),
    /// On a file system that the daemon may be serving.
    #[error(
        "{} lies on an EROFS mount, which could be waiting for infill itself; use another file system",
        .0.display()
    )]
    OnErofs(PathBuf),
    /// An `oci:` store without blobs.
    #[error(
        "{} holds neither blobs/sha256 (an OCI image layout or containerd's content store) nor \
         io.containerd.content.v1.content/blobs/sha256 (containerd's root); name one of these directories \
         (a symbolic link that leads out of it does not count)",
        .0.display()
    )]
    NoBlobs(PathBuf),
    /// Anything else.
    #[error("cannot open the directory {}: {errno}", path.display())]
    Os {
        /// The directory.
        path: PathBuf,
        /// What the file system said.
        errno: Errno,
    },
}
