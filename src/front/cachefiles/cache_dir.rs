//! The cache directory before it is bound: is its file system one that the kernel can cache on?
//!
//! The kernel's own answer comes late and in one errno, and for some file systems it never comes: reads fail
//! later. So each thing cachefiles relies on (fs/cachefiles/cache.c, io.c, namei.c) is tried here on a
//! nameless file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{self, FsType, XFS_SUPER_MAGIC};
use nix::unistd::{Whence, lseek};

use super::tree::CACHE;
use crate::ops::{erofs, exit, extsize, xattr};
use crate::range::page_bytes;

/// Mode of a cache directory that is created: cached data is nobody else's business.
const CACHE_DIR_MODE: u32 = 0o700;

/// An attribute that any file system with user attributes takes.
const PROBE_XATTR: &std::ffi::CStr = c"user.infill.probe";

/// Bytes written for the probe: a block on any file system that qualifies, aligned as the kernel's own
/// writes are (`CACHEFILES_DIO_BLOCK_SIZE`).
const PROBE_BLOCK_BYTES: usize = 4096;

/// Length of the probe's file in bytes: larger than any block, so that it ends in a hole.
const PROBE_FILE_BYTES: u64 = 1 << 20;

/// Size of the pieces in which a cache file takes its space on XFS.
pub const EXTENT_BYTES: u32 = 2 << 20;

/// Below [`CACHE`] are volumes, and in them the directories that hold the files.
const VOLUME_LEVELS: u32 = 2;

/// File systems that do not do, whatever they claim: no `sync_fs` (memory), no real direct I/O or holes (stacked
/// ones), a server behind them that may need us to answer first. Numbers are `f_type` of statfs(2), names those
/// of mount(8).
const UNFIT: [(u32, &str); 11] = [
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x794c_7630, "overlay"),
    (erofs::MAGIC, "erofs"),
    (0x7371_7368, "squashfs"),
    (0x6969, "nfs"),
    (0x6573_5546, "fuse"),
    (0xff53_4d42, "cifs"),
    (0xfe53_4d42, "smb3"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "ceph"),
];

/// Why a directory cannot be the cache. Each message is one line that says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CacheDirError {
    /// The file system is of a kind that does not do.
    #[error("{}: cannot cache on {kind}: use a directory on ext4 or XFS with blocks of 4 KiB", dir.display())]
    Unfit {
        /// The directory.
        dir: PathBuf,
        /// The kind of file system.
        kind: &'static str,
    },
    /// The file system lacks something.
    #[error("{}: its file system lacks {what}: use a directory on ext4 or XFS with blocks of 4 KiB", dir.display())]
    Lacks {
        /// The directory.
        dir: PathBuf,
        /// What it lacks.
        what: &'static str,
    },
    /// The way to the directory leads through a mount that we may have to serve.
    #[error(
        "{}: it lies below {}, which is EROFS: reading the cache could wait for the cache; use a directory outside of mounted images",
        dir.display(), mount.display()
    )]
    InsideImage {
        /// The directory.
        dir: PathBuf,
        /// The part of its path that is on EROFS.
        mount: PathBuf,
    },
    /// An operation failed.
    #[error("{}: cannot {doing}: {source}: {}", path.display(), advice(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The reason.
        source: io::Error,
    },
}

impl CacheDirError {
    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let Self::Io { source, .. } = self else {
            return exit::BAD_CONFIGURATION;
        };
        match source.kind() {
            io::ErrorKind::PermissionDenied => exit::NO_PERMISSION,
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory | io::ErrorKind::NotFound => exit::BAD_CONFIGURATION,
            _ => exit::FAILED,
        }
    }

    /// For `map_err`: what was tried on `path`.
    pub fn io<E: Into<io::Error>>(path: &Path, doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { path: path.to_owned(), doing, source: source.into() }
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run as root",
        io::ErrorKind::ReadOnlyFilesystem => "remount its file system for writing",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room on its file system",
        io::ErrorKind::NotADirectory | io::ErrorKind::NotFound => "check the path in the settings",
        _ => "check its file system and `dmesg`",
    }
}

/// Makes sure that `dir` can be the cache: creates it if it is not there, tries its file system, sees to it that cache
/// files will have few extents (on XFS, of `xfs_extent_bytes` if that is given), and returns its absolute path without
/// symbolic links.
///
/// # Errors
/// See [`CacheDirError`].
pub fn prepare(dir: &Path, xfs_extent_bytes: Option<u32>) -> Result<PathBuf, CacheDirError> {
    DirBuilder::new().recursive(true).mode(CACHE_DIR_MODE).create(dir).map_err(CacheDirError::io(dir, "create the cache directory"))?;
    let dir = check(dir)?;
    keep_unfragmented(&dir, xfs_extent_bytes);
    Ok(dir)
}

/// Tries whether an existing directory can be the cache, without changing it; returns its absolute path without
/// symbolic links.
///
/// # Errors
/// See [`CacheDirError`].
pub fn check(dir: &Path) -> Result<PathBuf, CacheDirError> {
    let dir = fs::canonicalize(dir).map_err(CacheDirError::io(dir, "resolve its path"))?;
    check_kind(&dir)?;
    check_way(&dir)?;
    check_behaviour(&dir)?;
    Ok(dir)
}

fn check_kind(dir: &Path) -> Result<(), CacheDirError> {
    let stat = statfs::statfs(dir).map_err(CacheDirError::io(dir, "query its file system"))?;
    let kind = magic(stat.filesystem_type());
    if let Some((_, kind)) = UNFIT.iter().find(|(unfit, _)| *unfit == kind) {
        return Err(CacheDirError::Unfit { dir: dir.to_owned(), kind });
    }
    // The type of f_bsize differs between targets.
    if u64::try_from(stat.block_size()).is_ok_and(|bytes| bytes > page_bytes()) {
        return Err(lacks(dir, "blocks as small as a page"));
    }
    Ok(())
}

/// On XFS, sees to it that cache files made from now on have few extents: takes their space in pieces of `wanted_bytes`,
/// or if nobody wants anything, and the operator has set nothing, of [`EXTENT_BYTES`]. Only an improvement, so failing
/// at it is no reason not to serve.
fn keep_unfragmented(dir: &Path, wanted_bytes: Option<u32>) {
    if !statfs::statfs(dir).is_ok_and(|stat| stat.filesystem_type() == XFS_SUPER_MAGIC) {
        return;
    }
    let set = |dir: &Path| {
        let dir = File::open(dir).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        match (wanted_bytes, extsize::hinted(&dir)?) {
            (None, Some(_)) => Ok(()),
            (wanted, _) => extsize::hint(dir, wanted.unwrap_or(EXTENT_BYTES)),
        }
    };
    // Volumes inherited what was set when they were made.
    let volumes = wanted_bytes.map(|_| dirs_below(&dir.join(CACHE), VOLUME_LEVELS)).unwrap_or_default();
    for dir in hinted_dirs(dir).iter().chain(&volumes) {
        if let Err(errno) = set(dir)
            && errno != Errno::ENOENT
        {
            tracing::warn!(
                "{}: cannot set an extent size hint: {errno}; cached reads may become slow, see docs/performance.md",
                dir.display()
            );
        }
    }
}

/// The directories in `dir`, `levels` deep; those that cannot be read are as good as empty.
fn dirs_below(dir: &Path, levels: u32) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path());
    dirs.flat_map(|dir| {
        let below = if levels > 1 { dirs_below(&dir, levels - 1) } else { Vec::new() };
        std::iter::once(dir).chain(below)
    })
    .collect()
}

/// The directories of a cache that need the hint: one that was made before its parent had it did not inherit it.
#[must_use]
pub fn hinted_dirs(dir: &Path) -> [PathBuf; 2] {
    [dir.to_owned(), dir.join(CACHE)]
}

/// The number in `f_type`: 32 bits, in a field that is signed and wider on most targets.
fn magic(kind: FsType) -> u32 {
    kind.0 as u32
}

/// The directory's own file system may be fine and yet be mounted inside an image.
fn check_way(dir: &Path) -> Result<(), CacheDirError> {
    for ancestor in dir.ancestors().skip(1) {
        let stat = statfs::statfs(ancestor).map_err(CacheDirError::io(ancestor, "query its file system"))?;
        if erofs::is_erofs(stat.filesystem_type()) {
            return Err(CacheDirError::InsideImage { dir: dir.to_owned(), mount: ancestor.to_owned() });
        }
    }
    Ok(())
}

/// A block of zeros, aligned for direct I/O.
#[repr(align(4096))]
struct Block([u8; PROBE_BLOCK_BYTES]);

static BLOCK: Block = Block([0; PROBE_BLOCK_BYTES]);

/// Does with a nameless file what the kernel does with objects.
fn check_behaviour(dir: &Path) -> Result<(), CacheDirError> {
    let file = nameless(dir)?;
    match xattr::set(file.as_fd(), PROBE_XATTR, b"1") {
        Ok(()) => {}
        Err(Errno::EOPNOTSUPP) => return Err(lacks(dir, "extended attributes of users")),
        Err(errno) => return Err(CacheDirError::io(dir, "set an extended attribute")(errno)),
    }
    let attribute = xattr::len_bytes(file.as_fd(), PROBE_XATTR);
    if attribute != Ok(Some(1)) {
        return Err(lacks(dir, "extended attributes that can be read back"));
    }
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_DIRECT)).map_err(|_| lacks(dir, "direct I/O (O_DIRECT)"))?;
    file.set_len(PROBE_FILE_BYTES).map_err(CacheDirError::io(dir, "resize a file in it"))?;
    match file.write_at(&BLOCK.0, 0) {
        Ok(PROBE_BLOCK_BYTES) => {}
        Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
            return Err(CacheDirError::io(dir, "write to a file in it")(error));
        }
        Ok(_) | Err(_) => return Err(lacks(dir, "direct I/O (O_DIRECT) in blocks of 4 KiB")),
    }
    let data = lseek(&file, 0, Whence::SeekData);
    let hole = lseek(&file, 0, Whence::SeekHole);
    let end = i64::try_from(PROBE_FILE_BYTES).unwrap_or(i64::MAX);
    if data != Ok(0) || !hole.is_ok_and(|hole| hole < end) {
        return Err(lacks(dir, "holes that can be found (SEEK_HOLE)"));
    }
    Ok(())
}

/// A new file without a name in `dir`, with mode 0600.
pub(crate) fn nameless(dir: &Path) -> Result<File, CacheDirError> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EISDIR) => lacks(dir, "nameless files (O_TMPFILE)"),
            _ => CacheDirError::io(dir, "create a file in it")(error),
        }
    })
}

fn lacks(dir: &Path, what: &'static str) -> CacheDirError {
    CacheDirError::Lacks { dir: dir.to_owned(), what }
}

/// A new directory beside the test program: on a disk, which a directory for temporary files may not be.
#[cfg(test)]
pub(super) fn scratch_on_disk() -> tempfile::TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn memory_and_kernel_file_systems_are_refused() {
        let error = prepare(Path::new("/dev/shm"), None).unwrap_err();
        assert_eq!(error.to_string(), "/dev/shm: cannot cache on tmpfs: use a directory on ext4 or XFS with blocks of 4 KiB");
        assert_eq!(error.exit_code(), 78);
        // Not in the list of the unfit: found out by trying.
        assert!(prepare(Path::new("/proc/self"), None).is_err());
    }

    #[test]
    fn a_path_that_is_no_directory_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = prepare(&file.path().join("cache"), None).unwrap_err();
        assert_eq!(error.exit_code(), 78, "{error}");
        assert!(error.to_string().contains("check the path"), "{error}");
    }

    #[test]
    fn a_directory_on_a_disk_is_created_and_accepted() {
        let parent = scratch_on_disk();
        let dir = parent.path().join("a/cache");
        match prepare(&dir, None) {
            Ok(prepared) => {
                assert_eq!(prepared, dir.canonicalize().unwrap());
                assert_eq!(prepare(&dir, None).unwrap(), prepared, "nothing is left behind");
                assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
            }
            // The checkout may itself be on a file system that does not do, such as a container's overlay.
            Err(error @ (CacheDirError::Unfit { .. } | CacheDirError::Lacks { .. })) => {
                eprintln!("skipped: {error}");
            }
            Err(error) => panic!("{error}"),
        }
        let mode = dir.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, CACHE_DIR_MODE);
    }
}
