//! Removes from a cache that is not bound what the kernel would stumble over.
//!
//! The kernel marks every object and every volume with an extended attribute of an exact length
//! (fs/cachefiles/xattr.c). It replaces what has a wrong one, but kernels since 6.1.100, 6.6.41 and 6.9.10
//! fail the mount where it is missing or too long, until somebody deletes the file. A crash, or a cache that was
//! filled by hand, leaves such files. What is removed is only cached and will be fetched again.

use std::ffi::CStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::cache_dir::CacheDirError;
use crate::ops::xattr;

/// The kernel's mark on objects and volumes.
const MARK: &CStr = c"user.CacheFiles.cache";

/// Length of an object's mark in bytes: `struct cachefiles_xattr`, and EROFS adds nothing.
const OBJECT_MARK_BYTES: usize = 18;

/// Length of a volume's mark in bytes: `struct cachefiles_vol_xattr`, and EROFS adds nothing.
const VOLUME_MARK_BYTES: usize = 4;

/// How the names of volumes begin that EROFS made: `I` and the volume key. Marks of others have other lengths.
const VOLUME_PREFIX: &[u8] = b"Ierofs,";

/// How the names of a volume's directories begin; a hash follows.
const FANOUT_PREFIX: &[u8] = b"@";

/// What was found.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct FsckReport {
    /// Objects that were looked at.
    pub checked: u64,
    /// Objects and volumes without a proper mark, which are gone now.
    pub removed: Vec<PathBuf>,
    /// Entries deleted from `graveyard`, where the kernel leaves what it cannot use.
    pub buried: u64,
}

/// Checks the cache in `dir`, which must not be bound. A directory that never was a cache is fine.
///
/// # Errors
/// Something could not be read or removed.
pub fn fsck(dir: &Path) -> Result<FsckReport, CacheDirError> {
    let mut report = FsckReport::default();
    for volume in subdirs(&dir.join("cache"), VOLUME_PREFIX)? {
        if mark_bytes(&volume)? == Some(VOLUME_MARK_BYTES) {
            check_volume(&volume, &mut report)?;
        } else {
            remove(&volume)?;
            report.removed.push(volume);
        }
    }
    for (path, _) in entries(&dir.join("graveyard"))? {
        remove(&path)?;
        report.buried += 1;
    }
    Ok(report)
}

fn check_volume(volume: &Path, report: &mut FsckReport) -> Result<(), CacheDirError> {
    for fanout in subdirs(volume, FANOUT_PREFIX)? {
        for (object, kind) in entries(&fanout)? {
            if !kind.is_file() {
                continue;
            }
            report.checked += 1;
            if mark_bytes(&object)? != Some(OBJECT_MARK_BYTES) {
                remove(&object)?;
                report.removed.push(object);
            }
        }
    }
    Ok(())
}

fn subdirs(dir: &Path, prefix: &[u8]) -> Result<Vec<PathBuf>, CacheDirError> {
    let mut found = entries(dir)?;
    found.retain(|(path, kind)| {
        let name = path.file_name().unwrap_or_default();
        kind.is_dir() && name.as_bytes().starts_with(prefix)
    });
    Ok(found.into_iter().map(|(path, _)| path).collect())
}

/// What is in a directory; nothing if it does not exist. The kinds are those of the entries themselves: no
/// symbolic link is followed.
fn entries(dir: &Path) -> Result<Vec<(PathBuf, fs::FileType)>, CacheDirError> {
    let listed = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed,
    };
    listed
        .and_then(|entries| entries.map(|entry| entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))).collect())
        .map_err(CacheDirError::io(dir, "list the directory"))
}

fn mark_bytes(path: &Path) -> Result<Option<usize>, CacheDirError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(CacheDirError::io(path, "open it to check its mark"))?;
    xattr::len_bytes(file.as_fd(), MARK).map_err(CacheDirError::io(path, "read its mark"))
}

fn remove(path: &Path) -> Result<(), CacheDirError> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(CacheDirError::io(path, "remove it from the cache"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

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

        let mut report = fsck(dir.path()).unwrap();
        report.removed.sort();
        let mut removed = vec![lost_volume, unmarked, too_long];
        removed.sort();
        assert_eq!(report, FsckReport { checked: 3, removed: removed.clone(), buried: 1 });
        for path in [good, stray, foreign] {
            assert!(path.exists(), "{} was removed", path.display());
        }
        for path in removed.iter().chain([&buried]) {
            assert!(!path.exists(), "{} is still there", path.display());
        }
        let again = fsck(dir.path()).unwrap();
        assert_eq!((again.checked, again.removed.len(), again.buried), (1, 0, 0));
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
        let report = fsck(dir.path()).unwrap();
        assert_eq!((report.checked, report.buried), (0, 1));
        assert!(outside.exists());
    }

    #[test]
    fn a_fresh_directory_is_clean() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(fsck(dir.path()).unwrap(), FsckReport::default());
    }
}
