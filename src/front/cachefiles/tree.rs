//! The files of a cache as they lie on disk, walked name by name from an open directory: no symbolic link is
//! followed, so nothing outside of the cache directory is ever seen, counted or removed.
//!
//! The layout is described in [`super::layout`].

use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags, fstatat, utimensat};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::cache_dir::CacheDirError;
use super::layout::{Place, VOLUME_PREFIX, fanout_of};
use crate::ops::reflink;

/// Where in a cache directory the kernel keeps volumes.
pub const CACHE: &str = "cache";

/// Where in a cache directory the kernel puts directories that are to be deleted; deleting them is left to us.
pub const GRAVEYARD: &str = "graveyard";

/// Unit of `st_blocks` in bytes (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// How directories are opened.
const DIR_FLAGS: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// Anything else: a symbolic link, a device, a socket.
    Other,
}

/// A name in a directory.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name.
    pub name: OsString,
    /// What it stands for.
    pub kind: Kind,
}

/// An open directory of a cache. Its path is only for messages.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Dir {
    /// Opens a cache directory; its own path may lead over symbolic links. `None`: it does not exist.
    ///
    /// # Errors
    /// It cannot be opened, or is no directory.
    pub fn open(path: &Path) -> Result<Option<Self>, CacheDirError> {
        match open(path, DIR_FLAGS.difference(OFlag::O_NOFOLLOW), Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path: path.to_owned() })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(CacheDirError::io(path, "open the directory")(errno)),
        }
    }

    /// Opens a directory in this one. `None`: there is none of this name.
    ///
    /// # Errors
    /// It cannot be opened, or is no directory; also if it is a symbolic link to one.
    pub fn sub(&self, name: impl AsRef<OsStr>) -> Result<Option<Self>, CacheDirError> {
        let path = self.path_of(name.as_ref());
        match openat(&self.fd, name.as_ref(), DIR_FLAGS, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(CacheDirError::io(&path, "open the directory")(errno)),
        }
    }

    /// Its path, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of something in it, for messages.
    #[must_use]
    pub fn path_of(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// What is in it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>, CacheDirError> {
        let failed = |errno| CacheDirError::io(&self.path, "list the directory")(errno);
        let mut listing = dir::Dir::openat(&self.fd, c".", DIR_FLAGS, Mode::empty()).map_err(failed)?;
        let mut entries = Vec::new();
        for entry in listing.iter() {
            let entry = entry.map_err(failed)?;
            let name = CString::from(entry.file_name());
            if matches!(name.as_bytes(), b"." | b"..") {
                continue;
            }
            let name = OsString::from_vec(name.into_bytes());
            let kind = match entry.file_type() {
                Some(dir::Type::File) => Some(Kind::File),
                Some(dir::Type::Directory) => Some(Kind::Dir),
                Some(_) => Some(Kind::Other),
                // Some file systems do not keep the kind in the directory.
                None => self.stat(&name)?.as_ref().map(kind_of),
            };
            entries.extend(kind.map(|kind| Entry { name, kind }));
        }
        Ok(entries)
    }

    /// What the file system knows of a name itself. `None`: it is gone.
    ///
    /// # Errors
    /// It cannot be looked up.
    pub fn stat(&self, name: &OsStr) -> Result<Option<FileStat>, CacheDirError> {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(CacheDirError::io(&self.path_of(name), "examine it")(errno)),
        }
    }

    /// Opens a file in it without following a symbolic link and without waiting for anything.
    ///
    /// # Errors
    /// What openat(2) says.
    pub fn open_file(&self, name: &OsStr, flags: OFlag) -> Result<OwnedFd, Errno> {
        openat(&self.fd, name, flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
    }

    /// Notes that a file was used at that time: in its access time, as the kernel does when it looks an object up
    /// (`cachefiles_open_file`), only that a mount option cannot forbid it. `false`: there is no such file.
    ///
    /// # Errors
    /// It cannot be noted.
    pub fn touch(&self, name: &OsStr, at: SystemTime) -> Result<bool, CacheDirError> {
        let at = TimeSpec::from_duration(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        match utimensat(&self.fd, name, &at, &TimeSpec::UTIME_OMIT, UtimensatFlags::NoFollowSymlink) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(CacheDirError::io(&self.path_of(name), "note its last use")(errno)),
        }
    }

    /// Removes an entry, and if it is a directory, all that is in it. One that is gone is fine.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn remove(&self, entry: &Entry) -> Result<(), CacheDirError> {
        let flag = if entry.kind == Kind::Dir {
            if let Some(dir) = self.sub(&entry.name)? {
                dir.entries()?.iter().try_for_each(|inner| dir.remove(inner))?;
            }
            UnlinkatFlags::RemoveDir
        } else {
            UnlinkatFlags::NoRemoveDir
        };
        match unlinkat(&self.fd, entry.name.as_os_str(), flag) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(CacheDirError::io(&self.path_of(&entry.name), "remove it from the cache")(errno)),
        }
    }
}

fn kind_of(stat: &FileStat) -> Kind {
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => Kind::File,
        SFlag::S_IFDIR => Kind::Dir,
        _ => Kind::Other,
    }
}

/// Whether a name in `cache` is that of a volume which EROFS made. Others are left alone.
#[must_use]
pub fn is_volume(entry: &Entry) -> bool {
    entry.name.as_bytes().strip_prefix(b"I").is_some_and(|key| key.starts_with(VOLUME_PREFIX))
}

/// Whether a name in a volume is that of one of its directories.
#[must_use]
pub fn is_fanout(entry: &Entry) -> bool {
    fanout_of(&entry.name).is_some()
}

/// An object that has a name. Those of images that are mounted for the first time have none until they are
/// unmounted (`cachefiles_commit_tmpfile`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// Where it is.
    pub place: Place,
    /// Space that would be free without it: blocks that it shares with other files do not count.
    pub bytes: u64,
    /// When it was last looked up or filled, in seconds and nanoseconds of the epoch. Mount options may keep the
    /// kernel from noting that it was looked up.
    pub last_use: (i64, i64),
}

/// All volumes and objects of a cache at about one moment.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Census {
    /// Volumes' directories, and when they were made, in seconds of the epoch.
    pub volumes: Vec<(OsString, i64)>,
    /// Objects that have a name.
    pub objects: Vec<Object>,
    /// Why something is missing, if anything is: the first directory that could not be read.
    pub unread: Option<String>,
}

/// Counts what is in the cache directory `root`. What disappears meanwhile is left out, and so is what cannot be read;
/// a volume of which that is a part is not among the volumes, for it may look empty.
///
/// # Errors
/// The directory of the volumes cannot be read.
pub fn census(root: &Dir) -> Result<Census, CacheDirError> {
    let mut census = Census::default();
    let Some(cache) = root.sub(CACHE)? else { return Ok(census) };
    let shares = can_share(root);
    for volume in cache.entries()?.into_iter().filter(|entry| entry.kind == Kind::Dir && is_volume(entry)) {
        match count_volume(&cache, &volume.name, shares, &mut census.objects) {
            Ok(made_s) => census.volumes.extend(made_s.map(|made_s| (volume.name, made_s))),
            Err(error) => drop(census.unread.get_or_insert_with(|| error.to_string())),
        }
    }
    Ok(census)
}

/// Adds the objects of one volume; gives when it was made, or `None` if it is gone. All that can be counted is, also if
/// something cannot.
fn count_volume(cache: &Dir, volume: &OsStr, shares: bool, objects: &mut Vec<Object>) -> Result<Option<i64>, CacheDirError> {
    let (Some(stat), Some(dir)) = (cache.stat(volume)?, cache.sub(volume)?) else { return Ok(None) };
    let mut complete = Ok(());
    for entry in dir.entries()?.into_iter().filter(|entry| entry.kind == Kind::Dir) {
        let Some(fanout) = fanout_of(&entry.name) else { continue };
        let place = |object| Place { volume: volume.to_owned(), fanout, object };
        complete = complete.and(count_fanout(&dir, &entry.name, shares, place, objects));
    }
    complete.map(|()| Some(stat.st_mtime))
}

/// Adds the objects of one of a volume's directories.
fn count_fanout(
    volume: &Dir,
    fanout: &OsStr,
    shares: bool,
    place: impl Fn(OsString) -> Place,
    objects: &mut Vec<Object>,
) -> Result<(), CacheDirError> {
    let Some(dir) = volume.sub(fanout)? else { return Ok(()) };
    for object in dir.entries()?.into_iter().filter(|entry| entry.kind == Kind::File) {
        let Some(stat) = dir.stat(&object.name)? else { continue };
        // What cannot be looked into counts in full.
        let shared = if shares { dir.open_file(&object.name, OFlag::O_RDONLY).and_then(reflink::shared_bytes).unwrap_or(0) } else { 0 };
        objects.push(Object { place: place(object.name), bytes: bytes(&stat).saturating_sub(shared), last_use: last_use(&stat) });
    }
    Ok(())
}

/// Whether files of this file system can have blocks in common.
pub fn can_share(dir: &Dir) -> bool {
    fstatfs(dir).is_ok_and(|stat| matches!(stat.filesystem_type(), XFS_SUPER_MAGIC | BTRFS_SUPER_MAGIC))
}

/// Space that a file takes, in bytes; a hole takes none.
#[must_use]
pub fn bytes(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK_BYTES
}

/// When a file was last used, in seconds and nanoseconds of the epoch: the access time is the kernel's note and ours; a fill is
/// seen in the modification time.
#[must_use]
pub fn last_use(stat: &FileStat) -> (i64, i64) {
    (stat.st_atime, stat.st_atime_nsec).max((stat.st_mtime, stat.st_mtime_nsec))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn the_census_has_every_object_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join(CACHE);
        let fanout = cache.join("Ierofs,dom/@4a");
        fs::create_dir_all(&fanout).unwrap();
        fs::write(fanout.join("Dimg1"), vec![1; 10_000]).unwrap();
        fs::write(fanout.join("Dimg2"), b"").unwrap();
        let foreign = cache.join("Infs,server/@00");
        fs::create_dir_all(&foreign).unwrap();
        fs::write(foreign.join("Dfile"), b"x").unwrap();
        symlink(&cache, cache.join("Ierofs,link")).unwrap();
        symlink(&fanout, cache.join("Ierofs,dom/@link")).unwrap();
        symlink(fanout.join("Dimg1"), fanout.join("Dlink")).unwrap();
        let root = Dir::open(dir.path()).unwrap().unwrap();
        let mut found = census(&root).unwrap();
        found.objects.sort_by(|a, b| a.place.object.cmp(&b.place.object));
        let names: Vec<_> = found.objects.iter().map(|object| (object.place.object.to_str().unwrap(), object.bytes >= 10_000)).collect();
        assert_eq!(names, [("Dimg1", true), ("Dimg2", false)]);
        assert_eq!(found.volumes.len(), 1);

        let before = found.objects[1].last_use;
        let fanout = root.sub(CACHE).unwrap().unwrap().sub("Ierofs,dom").unwrap().unwrap().sub("@4a").unwrap().unwrap();
        assert!(fanout.touch("Dimg2".as_ref(), SystemTime::now()).unwrap());
        assert!(!fanout.touch("Dimg3".as_ref(), SystemTime::now()).unwrap());
        let stat = fanout.stat("Dimg2".as_ref()).unwrap().unwrap();
        assert!(last_use(&stat) >= before);
    }

    /// As root everything can be read, so what cannot be is a link in the place of a directory.
    #[test]
    fn what_cannot_be_read_is_left_out_and_its_volume_does_not_look_empty() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join(CACHE);
        for volume in ["Ierofs,good", "Ierofs,bad"] {
            fs::create_dir_all(cache.join(volume).join("@4a")).unwrap();
            fs::write(cache.join(volume).join("@4a/Dimg"), b"x").unwrap();
        }
        let cache = Dir::open(&cache).unwrap().unwrap();
        let bad = cache.sub("Ierofs,bad").unwrap().unwrap();
        let mut objects = Vec::new();
        symlink("/", bad.path().join("@4b")).unwrap();
        let place = |object| Place { volume: "Ierofs,bad".into(), fanout: 0x4b, object };
        assert!(count_fanout(&bad, "@4b".as_ref(), false, place, &mut objects).is_err());
        assert!(objects.is_empty());
        fs::set_permissions(bad.path().join("@4a"), fs::Permissions::from_mode(0o000)).unwrap();
        let found = census(&Dir::open(dir.path()).unwrap().unwrap()).unwrap();
        if nix::unistd::geteuid().is_root() {
            println!("not run: a directory without permission, which root can read");
        } else {
            assert!(found.unread.unwrap().contains("Ierofs,bad"));
            assert_eq!((found.objects.len(), found.volumes.len()), (1, 1));
        }
        fs::set_permissions(bad.path().join("@4a"), fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn removal_takes_a_link_and_not_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("precious"), b"x").unwrap();
        fs::create_dir_all(dir.path().join("grave/deep")).unwrap();
        symlink(outside.path(), dir.path().join("grave/deep/link")).unwrap();
        symlink(outside.path(), dir.path().join("graveyard")).unwrap();
        let root = Dir::open(dir.path()).unwrap().unwrap();
        assert!(root.sub(GRAVEYARD).is_err(), "a link is no directory");
        root.entries().unwrap().iter().for_each(|entry| root.remove(entry).unwrap());
        assert!(root.entries().unwrap().is_empty());
        assert!(outside.path().join("precious").exists());
        assert!(Dir::open(&dir.path().join("nowhere")).unwrap().is_none());
    }
}
