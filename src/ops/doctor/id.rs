//! The names of findings. Scripts rely on them: a name is never given to something else.

use std::fmt;

macro_rules! ids {
    ($($(#[$doc:meta])* $id:ident = $name:literal,)*) => {
        /// What a finding is about.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
        pub enum Id {
            $($(#[$doc])* #[serde(rename = $name)] $id,)*
        }

        impl Id {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$id),*];

            /// As it is printed.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$id => $name,)*
                }
            }
        }
    };
}

ids! {
    /// The kernel's version, for cachefiles.
    Kernel = "kernel",
    /// Its known bugs.
    KernelBugs = "kernel-bugs",
    /// Whether it opens blobs again.
    KernelReopen = "kernel-reopen",
    /// fscache in it.
    Fscache = "fscache",
    /// The driver of the device.
    Cachefiles = "cachefiles",
    /// Its on-demand part.
    CachefilesOndemand = "cachefiles-ondemand",
    /// The file system of images.
    Erofs = "erofs",
    /// Its on-demand part.
    ErofsOndemand = "erofs-ondemand",
    /// The device node.
    Device = "device",
    /// Who has it.
    DeviceHolder = "device-holder",
    /// Who waits for data.
    Readers = "readers",
    /// What this process may do.
    Rights = "rights",
    /// The kernel's version, for images that are mounted from files.
    KernelFiles = "kernel-files",
    /// Pre-content events.
    Fanotify = "fanotify",
    /// EROFS that mounts files.
    ErofsFiles = "erofs-files",
    /// Whether the kernel asks for metadata.
    ErofsMetadata = "erofs-metadata",
    /// Groups, of which a user has a number.
    FanotifyGroups = "fanotify-groups",
    /// Loop devices over the cache.
    CacheLoop = "cache-loop",
    /// The cache directory.
    CacheDir = "cache-dir",
    /// Its file system.
    CacheFs = "cache-fs",
    /// The blocks of that.
    CacheBlocks = "cache-blocks",
    /// What direct I/O asks for there.
    CacheDirectIo = "cache-direct-io",
    /// Pieces in which files take their space.
    CacheExtents = "cache-extents",
    /// How full it is.
    CacheSpace = "cache-space",
    /// What is in the cache.
    CacheObjects = "cache-objects",
    /// The state directory.
    StateDir = "state-dir",
    /// Whether a daemon serves.
    Daemon = "daemon",
    /// What that daemon may have.
    DaemonLimits = "daemon-limits",
    /// Rings.
    IoUring = "io-uring",
    /// What buffers lie in.
    BufferPages = "buffer-pages",
    /// Descriptors of the process.
    OpenFiles = "open-files",
    /// Those of blobs.
    FdBudget = "fd-budget",
    /// Those of the host.
    HostFiles = "host-files",
    /// Longest file.
    FileSize = "file-size",
    /// Memory that may be locked.
    LockedMemory = "locked-memory",
    /// What the daemon can give up of files.
    Landlock = "landlock",
    /// And of system calls.
    Seccomp = "seccomp",
    /// A store.
    Store = "store",
    /// Whether it can share its blocks with the cache.
    StoreReflink = "store-reflink",
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
