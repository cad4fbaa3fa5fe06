//! Opening files below a directory, and never outside of it.
//!
//! The kernel does the watching: `openat2(2)` with `RESOLVE_BENEATH` follows symbolic links as long as they
//! stay below the directory. Where a seccomp filter blocks that call (the kernels that infill needs all
//! have it), no symbolic link is followed at all.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, stat};
use nix::unistd::{AccessFlags, faccessat};

use super::error::{Cause, Unusable};
use super::name::FileName;
use crate::ops::erofs::on_erofs;

/// How often a lookup is repeated that the kernel gave up with `EAGAIN`, because something was renamed or
/// mounted while it followed a `..` (openat2(2)).
const RACE_RETRIES: u32 = 16;

/// A directory that lookups cannot leave. It is held open, so the files found are those of the directory
/// that was checked at start. The path is looked at again only when a name is not found: if another
/// directory is there by then (made anew, exchanged by renaming, or mounted over), that one is checked in
/// the same way and takes over.
#[derive(Debug)]
pub(super) struct Beneath {
    path: PathBuf,
    lookup: Lookup,
    dir: RwLock<Arc<OwnedFd>>,
}

/// How a path is followed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lookup {
    /// By the kernel, with links that stay below.
    Beneath,
    /// Name by name, without links.
    NoLinks,
}

impl Beneath {
    /// Opens and checks the directory at `path`.
    pub(super) fn new(path: &Path) -> Result<Self, Unusable> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let dir = open_dir(&path)?;
        let lookup = match open_beneath(&dir, Path::new("."), OFlag::O_PATH | OFlag::O_CLOEXEC) {
            // Older container runtimes answer system calls they do not know with EPERM.
            Err(Errno::ENOSYS | Errno::EPERM) => Lookup::NoLinks,
            _ => Lookup::Beneath,
        };
        Ok(Self { path, lookup, dir: RwLock::new(Arc::new(dir)) })
    }

    /// The same directory as if `openat2` were blocked.
    #[cfg(test)]
    pub(super) fn without_links(mut self) -> Self {
        self.lookup = Lookup::NoLinks;
        self
    }

    /// Opens the file or directory that `names` lead to; `None` if there is none.
    pub(super) fn open(&self, names: &[FileName<'_>], flags: OFlag) -> Result<Option<OwnedFd>, Cause> {
        let held = Arc::clone(&self.dir.read().unwrap_or_else(PoisonError::into_inner));
        let mut result = self.lookup(&held, names, flags);
        if let Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ESTALE) = result
            && let Some(renewed) = self.renew(&held)?
        {
            result = self.lookup(&renewed, names, flags);
        }
        match result {
            Ok(fd) => Ok(Some(fd)),
            // ENAMETOOLONG: this file system could not have it.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG) => Ok(None),
            Err(Errno::EXDEV) => Err(Cause::Leaves),
            Err(Errno::ELOOP) => Err(Cause::Link),
            // What open(2) says about a socket, and about a device that has no driver.
            Err(Errno::ENXIO | Errno::ENODEV) => Err(Cause::NotAFile("a socket or a device")),
            Err(errno) => Err(Cause::Os(errno)),
        }
    }

    /// The directory that is at the path now, if it is not the one that is held.
    fn renew(&self, held: &OwnedFd) -> Result<Option<Arc<OwnedFd>>, Cause> {
        let now = match stat(&self.path) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Err(Cause::Gone(self.path.clone())),
            now => now?,
        };
        if identity(&now) == identity(&fstat(held)?) {
            return Ok(None);
        }
        let new = match open_dir(&self.path) {
            Ok(new) => Arc::new(new),
            Err(Unusable::OnErofs(_)) => return Err(Cause::OnErofs),
            Err(Unusable::NotReadable(_)) => return Err(Cause::Os(Errno::EACCES)),
            Err(Unusable::Os { errno, .. }) => return Err(Cause::Os(errno)),
            Err(_) => return Err(Cause::Gone(self.path.clone())),
        };
        *self.dir.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&new);
        Ok(Some(new))
    }

    fn lookup(&self, dir: &OwnedFd, names: &[FileName<'_>], flags: OFlag) -> Result<OwnedFd, Errno> {
        match self.lookup {
            Lookup::Beneath => {
                let path: PathBuf = names.iter().map(|name| name.as_os_str()).collect();
                open_beneath(dir, &path, flags)
            }
            Lookup::NoLinks => open_without_links(dir, names, flags),
        }
    }
}

/// `openat2` that follows links as long as they stay below `dir`.
fn open_beneath(dir: &OwnedFd, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut result = openat2(dir, path, how);
    for _ in 0..RACE_RETRIES {
        match result {
            Err(Errno::EAGAIN | Errno::EINTR) => result = openat2(dir, path, how),
            _ => break,
        }
    }
    result
}

/// Walks name by name; `ELOOP` if one of them is a symbolic link.
fn open_without_links(dir: &OwnedFd, names: &[FileName<'_>], flags: OFlag) -> Result<OwnedFd, Errno> {
    let (last, parents) = names.split_last().ok_or(Errno::ENOENT)?;
    let step = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut parent: Option<OwnedFd> = None;
    for name in parents {
        let from = parent.as_ref().unwrap_or(dir);
        parent = Some(open_no_follow(from, name.as_os_str(), step)?);
    }
    let from = parent.as_ref().unwrap_or(dir);
    open_no_follow(from, last.as_os_str(), flags | OFlag::O_NOFOLLOW)
}

/// `openat` of one name; the kernel says `ENOTDIR` of a link where a directory is wanted, this `ELOOP`.
fn open_no_follow(dir: &OwnedFd, name: &OsStr, flags: OFlag) -> Result<OwnedFd, Errno> {
    openat(dir, name, flags, Mode::empty()).map_err(|errno| {
        let is_link = errno == Errno::ENOTDIR
            && fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|stat| file_type(&stat) == SFlag::S_IFLNK);
        if is_link { Errno::ELOOP } else { errno }
    })
}

/// Opens a directory by path and checks that blobs can be read from it.
fn open_dir(path: &Path) -> Result<OwnedFd, Unusable> {
    let unusable = |errno| match errno {
        Errno::ENOENT => Unusable::Missing(path.to_owned()),
        Errno::ENOTDIR => Unusable::NotADirectory(path.to_owned()),
        Errno::EACCES | Errno::EPERM => Unusable::NotReadable(path.to_owned()),
        errno => Unusable::Os { path: path.to_owned(), errno },
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = open(path, flags, Mode::empty()).map_err(unusable)?;
    let search = AccessFlags::R_OK | AccessFlags::X_OK;
    faccessat(&dir, ".", search, AtFlags::AT_EACCESS).map_err(unusable)?;
    if on_erofs(&dir).map_err(unusable)? {
        return Err(Unusable::OnErofs(path.to_owned()));
    }
    Ok(dir)
}

/// The kind of file, without the permission bits.
pub(super) fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn identity(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}
