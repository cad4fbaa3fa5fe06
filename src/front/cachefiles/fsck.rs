//! Finds in a cache that is not bound what the kernel would stumble over, and removes it.
//!
//! The kernel marks every object and every volume with an extended attribute of an exact length
//! (fs/cachefiles/xattr.c). It replaces what has a wrong one, but kernels since 6.1.100, 6.6.41 and 6.9.10
//! fail the mount where it is missing or too long, until somebody deletes the file. A crash, or a cache that was
//! filled by hand, leaves such files. It also gives up on a volume if that, or a directory in it, is none
//! (`cachefiles_get_directory`, fs/cachefiles/namei.c). What is removed is only cached and will be fetched again.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::cache_dir::CacheDirError;
use super::layout::{MARK, OBJECT_MARK_BYTES, VOLUME_MARK};
use super::tree::{CACHE, Dir, Entry, GRAVEYARD, Kind, is_fanout, is_volume};
use crate::ops::xattr;

/// What was found.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct FsckReport {
    /// Objects that were looked at.
    pub checked: u64,
    /// Objects and volumes that would make mounts fail.
    pub damaged: Vec<PathBuf>,
    /// Entries in `graveyard`, where the kernel leaves what it cannot use.
    pub buried: u64,
}

/// Removes from the cache in `dir`, which must not be bound, what would make mounts fail, and empties its graveyard. A
/// directory that never was a cache is fine.
///
/// # Errors
/// Something could not be read or removed.
pub fn repair(dir: &Path) -> Result<FsckReport, CacheDirError> {
    check(dir, Dir::remove)
}

/// Finds what [`repair`] would remove, and changes nothing.
///
/// # Errors
/// Something could not be read.
pub fn look(dir: &Path) -> Result<FsckReport, CacheDirError> {
    check(dir, |_, _| Ok(()))
}

/// What is done with an entry that must go.
type Fate = fn(&Dir, &Entry) -> Result<(), CacheDirError>;

fn check(dir: &Path, fate: Fate) -> Result<FsckReport, CacheDirError> {
    let mut report = FsckReport::default();
    let Some(root) = Dir::open(dir)? else { return Ok(report) };
    if let Some(cache) = root.sub(CACHE)? {
        for entry in cache.entries()?.iter().filter(|entry| is_volume(entry)) {
            let volume = if has_mark(&cache, entry, Kind::Dir, VOLUME_MARK.len())? { cache.sub(&entry.name)? } else { None };
            match volume {
                Some(volume) => check_volume(&volume, &mut report, fate)?,
                None => report.found(&cache, entry, fate)?,
            }
        }
    }
    if let Some(graveyard) = root.sub(GRAVEYARD)? {
        for entry in graveyard.entries()? {
            fate(&graveyard, &entry)?;
            report.buried += 1;
        }
    }
    Ok(report)
}

fn check_volume(volume: &Dir, report: &mut FsckReport, fate: Fate) -> Result<(), CacheDirError> {
    for entry in volume.entries()?.iter().filter(|entry| is_fanout(entry)) {
        if entry.kind != Kind::Dir {
            report.found(volume, entry, fate)?;
        } else if let Some(fanout) = volume.sub(&entry.name)? {
            check_objects(&fanout, report, fate)?;
        }
    }
    Ok(())
}

/// What is no file in the place of an object is buried by the kernel itself.
fn check_objects(fanout: &Dir, report: &mut FsckReport, fate: Fate) -> Result<(), CacheDirError> {
    for entry in fanout.entries()?.iter().filter(|entry| entry.kind == Kind::File) {
        report.checked += 1;
        if !has_mark(fanout, entry, Kind::File, OBJECT_MARK_BYTES)? {
            report.found(fanout, entry, fate)?;
        }
    }
    Ok(())
}

impl FsckReport {
    fn found(&mut self, dir: &Dir, entry: &Entry, fate: Fate) -> Result<(), CacheDirError> {
        fate(dir, entry)?;
        self.damaged.push(dir.path_of(&entry.name));
        Ok(())
    }
}

fn has_mark(dir: &Dir, entry: &Entry, kind: Kind, len_bytes: usize) -> Result<bool, CacheDirError> {
    Ok(entry.kind == kind && mark_bytes(dir, &entry.name)? == Some(len_bytes))
}

fn mark_bytes(dir: &Dir, name: &OsStr) -> Result<Option<usize>, CacheDirError> {
    let file = dir.open_file(name, OFlag::O_RDONLY).map_err(CacheDirError::io(&dir.path_of(name), "open it to check its mark"))?;
    xattr::len_bytes(file.as_fd(), MARK).map_err(CacheDirError::io(&dir.path_of(name), "read its mark"))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use tempfile::TempDir;

    use super::super::cache_dir::scratch_on_disk;
    use super::*;

    /// `None` if the file system has no user attributes.
    fn marked_dir() -> Option<TempDir> {
        let dir = scratch_on_disk();
        let file = File::open(dir.path()).unwrap();
        match xattr::set(file.as_fd(), c"user.infill.test", b"1") {
            Ok(()) => Some(dir),
            Err(errno) => {
                eprintln!("skipped: no user attributes here: {errno}");
                None
            }
        }
    }

    fn mark(path: &Path, len_bytes: usize) {
        let file = File::open(path).unwrap();
        xattr::set(file.as_fd(), MARK, &vec![0; len_bytes]).unwrap();
    }

    fn object(fanout: &Path, name: &str, mark_bytes: Option<usize>) -> PathBuf {
        fs::create_dir_all(fanout).unwrap();
        let path = fanout.join(name);
        File::create(&path).unwrap();
        if let Some(len) = mark_bytes {
            mark(&path, len);
        }
        path
    }

    #[test]
    fn only_what_lacks_its_mark_is_removed() {
        let Some(dir) = marked_dir() else { return };
        let cache = dir.path().join("cache");
        let volume = cache.join("Ierofs,dom");
        let good = object(&volume.join("@4a"), "Dimg1", Some(18));
        let unmarked = object(&volume.join("@4a"), "Dimg2", None);
        let too_long = object(&volume.join("@d3"), "Dimg3", Some(19));
        let stray = object(&volume, "stray", None);
        mark(&volume, 4);
        let lost_volume = cache.join("Ierofs,crashed");
        object(&lost_volume.join("@00"), "Dimg4", Some(18));
        let foreign = object(&cache.join("Infs,server").join("@00"), "Dfile", None);
        let buried = dir.path().join("graveyard/deep");
        object(&buried, "x", None);

        let no_dir = volume.join("@d4");
        File::create(&no_dir).unwrap();

        let mut removed = vec![lost_volume, unmarked, too_long, no_dir];
        removed.sort();
        let expected = FsckReport { checked: 3, damaged: removed.clone(), buried: 1 };
        for examine in [look, repair] {
            let mut report = examine(dir.path()).unwrap();
            report.damaged.sort();
            assert_eq!(report, expected, "looking changes nothing");
        }
        for path in [good, stray, foreign] {
            assert!(path.exists(), "{} was removed", path.display());
        }
        for path in removed.iter().chain([&buried]) {
            assert!(!path.exists(), "{} is still there", path.display());
        }
        let again = repair(dir.path()).unwrap();
        assert_eq!((again.checked, again.damaged.len(), again.buried), (1, 0, 0));
    }

    #[test]
    fn a_symbolic_link_leads_nowhere() {
        let Some(dir) = marked_dir() else { return };
        let outside = object(dir.path(), "precious", None);
        let cache = dir.path().join("cache");
        fs::create_dir(&cache).unwrap();
        std::os::unix::fs::symlink(dir.path(), cache.join("Ierofs,link")).unwrap();
        let graveyard = dir.path().join("graveyard");
        fs::create_dir(&graveyard).unwrap();
        std::os::unix::fs::symlink(dir.path(), graveyard.join("link")).unwrap();
        let report = repair(dir.path()).unwrap();
        assert_eq!((report.checked, report.damaged.len(), report.buried), (0, 1, 1));
        assert!(outside.exists());
        assert!(fs::symlink_metadata(cache.join("Ierofs,link")).is_err(), "no mount could use it");

        std::fs::remove_dir(&graveyard).unwrap();
        std::os::unix::fs::symlink(dir.path(), &graveyard).unwrap();
        assert!(repair(dir.path()).unwrap_err().to_string().contains("graveyard"));
        assert!(outside.exists());
    }

    #[test]
    fn a_fresh_directory_is_clean() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(repair(dir.path()).unwrap(), FsckReport::default());
    }
}
