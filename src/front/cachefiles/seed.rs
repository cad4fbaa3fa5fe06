//! Seeding: making a blob's object before the kernel looks for it, out of the blob's own blocks.
//!
//! Where blobs and cache share a file system that can share blocks (XFS, btrfs), the object becomes a clone of the
//! blob. The kernel then finds everything there: it asks for nothing, and the data exists once. What is made is what
//! the kernel itself would have made (see [`super::layout`]), so it cannot tell, nor need it be told.
//!
//! An object appears under its name only when it is complete, and never takes the place of another. Nothing here
//! has to be undone: whatever is not seeded is read on demand.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::unistd::linkat;

use super::cache_dir::{CacheDirError, nameless};
use super::cookies;
use super::layout::{MARK, NoPlace, OBJECT_ALIGN_BYTES, Place, VOLUME_MARK, fanout_name, object_len_bytes, object_mark};
use super::tree::{CACHE, GRAVEYARD};
use crate::key::Key;
use crate::ops::{reflink, xattr};

/// Mode of the directories of a cache (`cachefiles_get_directory`). Objects have 0600, as those of newer kernels
/// (6.12); those of 6.1 have no permissions at all, which makes no difference to the kernel.
const DIR_MODE: u32 = 0o700;

/// What fills the last block of an object.
const ZEROS: [u8; OBJECT_ALIGN_BYTES as usize] = [0; OBJECT_ALIGN_BYTES as usize];

/// How a seeding ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The object was made and is complete, but for the blob's holes.
    Seeded,
    /// There is an object by that name; it was left alone.
    AlreadyThere,
    /// It cannot be done; the blob is read on demand.
    Refused(Refusal),
}

/// Why a blob was not seeded. None of these is a fault.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// The kernel could not have this blob in a cache.
    #[error(transparent)]
    NoPlace(#[from] NoPlace),
    /// There is nothing to seed.
    #[error("the blob is empty")]
    Empty,
    /// It is part of a mounted image, and its object may not have a name yet.
    #[error("it is in use; unmount its images to seed it")]
    InUse,
    /// Blocks cannot be shared between file systems.
    #[error("blob and cache are on different file systems; put both on one XFS or btrfs")]
    OtherFileSystem,
    /// Blocks cannot be shared on this file system.
    #[error("this file system cannot share blocks between files ({0:?}); put blobs and cache on one XFS (reflink=1) or btrfs")]
    CannotShare(Errno),
    /// The file has another length than the blob had a moment ago.
    #[error("the blob has changed while it was cloned; leave blobs alone once they are in a store")]
    Changed,
    /// The volume's directory is not one that the kernel would use.
    #[error("the volume's directory {} lacks the kernel's mark; if that lasts, stop infill and start it again: it removes such directories", .0.display())]
    BadVolume(PathBuf),
}

/// Seeds the object of `key` in `cache_dir` from `blob`, a file whose bytes are the blob's and whose length is
/// `len_bytes`. The cache may be bound or not; one that has never been bound is laid out as the kernel would.
///
/// The blob's holes stay holes, which the kernel takes for data that is missing: it will ask for them. That costs
/// requests when they are read but no space; filling them with zeros would do the opposite.
///
/// # Errors
/// Something that should work did not. The cache is as before, but perhaps for an empty volume.
pub fn seed(cache_dir: &Path, key: &Key, blob: BorrowedFd<'_>, len_bytes: u64) -> Result<Outcome, CacheDirError> {
    let place = match Place::of(key) {
        Ok(place) if len_bytes > 0 => place,
        Ok(_) => return Ok(Outcome::Refused(Refusal::Empty)),
        Err(error) => return Ok(Outcome::Refused(error.into())),
    };
    let cache = cache_dir.join(CACHE);
    let volume = cache.join(&place.volume);
    let fanout = volume.join(fanout_name(place.fanout));
    let object = fanout.join(&place.object);
    if exists(&object)? {
        return Ok(Outcome::AlreadyThere);
    }
    if cookies::in_use(key)? {
        return Ok(Outcome::Refused(Refusal::InUse));
    }
    make_dir(&cache)?;
    // In `cache`, so that it inherits what the directories below it inherited: labels, quota projects.
    let file = nameless(&cache)?;
    if let Some(refusal) = clone_into(&file, blob, len_bytes).map_err(CacheDirError::io(&object, "clone the blob"))? {
        return Ok(Outcome::Refused(refusal));
    }
    finish(&file, len_bytes).map_err(CacheDirError::io(&object, "complete the object"))?;
    if !make_volume(cache_dir, &volume)? {
        return Ok(Outcome::Refused(Refusal::BadVolume(volume)));
    }
    // The kernel makes what it misses when it begins to use a volume, so an older one may be incomplete.
    make_dir(&fanout)?;
    link(&file, &object)
}

/// Makes `file` a clone of `blob`, unless there is a reason not to.
fn clone_into(file: &File, blob: BorrowedFd<'_>, len_bytes: u64) -> io::Result<Option<Refusal>> {
    match reflink::clone_whole(file.as_fd(), blob) {
        Ok(()) => Ok((file.metadata()?.len() != len_bytes).then_some(Refusal::Changed)),
        Err(Errno::EXDEV) => Ok(Some(Refusal::OtherFileSystem)),
        Err(errno @ (Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EINVAL | Errno::ETXTBSY)) => Ok(Some(Refusal::CannotShare(errno))),
        Err(errno) => Err(errno.into()),
    }
}

/// Fills the last block with zeros, which also gives the object the length the kernel wants, marks it, and waits
/// until it is on disk.
///
/// The zeros are written, not left to a change of length: where blocks are smaller than [`OBJECT_ALIGN_BYTES`] that
/// would leave a hole. The block they are in is no longer shared; that is all the space an object costs.
///
/// The wait is for what is true of every file system: a name that survives a crash must not stand for an object
/// that did not, because nobody would ever look at its bytes again. A name that is lost only means reading on
/// demand, so the directory is not waited for.
fn finish(file: &File, len_bytes: u64) -> io::Result<()> {
    let missing = usize::try_from(object_len_bytes(len_bytes).saturating_sub(len_bytes)).unwrap_or(0);
    if let Some(zeros) = ZEROS.get(..missing) {
        file.write_all_at(zeros, len_bytes)?;
    }
    xattr::set(file.as_fd(), MARK, &object_mark(len_bytes))?;
    file.sync_all()
}

/// Gives the object its name, if nothing has it. Through `/proc`, because a descriptor alone can be linked only with
/// `CAP_DAC_READ_SEARCH` (linkat(2)). Every file system that can be a cache can do this: the kernel makes its own
/// objects in the same way (`cachefiles_commit_tmpfile`).
///
/// If the kernel has just begun to use the blob, so that its object has no name yet, it will give it this one
/// later and delete ours. Its readers see the same bytes either way.
fn link(file: &File, object: &Path) -> Result<Outcome, CacheDirError> {
    let nameless = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match linkat(AT_FDCWD, &nameless, AT_FDCWD, object, AtFlags::AT_SYMLINK_FOLLOW) {
        Ok(()) => Ok(Outcome::Seeded),
        Err(Errno::EEXIST) => Ok(Outcome::AlreadyThere),
        Err(errno) => Err(CacheDirError::io(object, "give the object its name")(errno)),
    }
}

/// Makes sure that there is a volume. `false`: there is one that the kernel would not use.
fn make_volume(cache_dir: &Path, volume: &Path) -> Result<bool, CacheDirError> {
    if !exists(volume)? {
        new_volume(cache_dir, volume)?;
    }
    let dir = File::open(volume).map_err(CacheDirError::io(volume, "open the volume's directory"))?;
    match xattr::get(dir.as_fd(), MARK) {
        Ok(mark) => Ok(mark == Some(VOLUME_MARK)),
        Err(Errno::ERANGE) => Ok(false),
        Err(errno) => Err(CacheDirError::io(volume, "read its mark")(errno)),
    }
}

/// Makes a volume. It gets its name only when it is complete: the kernel refuses one without a mark.
fn new_volume(cache_dir: &Path, volume: &Path) -> Result<(), CacheDirError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let graveyard = cache_dir.join(GRAVEYARD);
    make_dir(&graveyard)?;
    let unnamed = graveyard.join(format!("seed-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    let made = fill_volume(&unnamed).and_then(|()| {
        match renameat2(AT_FDCWD, &unnamed, AT_FDCWD, volume, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => Ok(true),
            // Somebody else has just made it: the kernel, or another infill.
            Err(Errno::EEXIST) => Ok(false),
            Err(errno) => Err(CacheDirError::io(volume, "give the new volume its name")(errno)),
        }
    });
    if !matches!(made, Ok(true)) {
        // What stays is deleted at the next start.
        let _ = fs::remove_dir_all(&unnamed);
    }
    made.map(drop)
}

fn fill_volume(dir: &Path) -> Result<(), CacheDirError> {
    make_dir(dir)?;
    (0..=u8::MAX).try_for_each(|fanout| make_dir(&dir.join(fanout_name(fanout))))?;
    File::open(dir)
        .and_then(|opened| xattr::set(opened.as_fd(), MARK, &VOLUME_MARK).map_err(io::Error::from))
        .map_err(CacheDirError::io(dir, "mark the new volume"))
}

fn make_dir(dir: &Path) -> Result<(), CacheDirError> {
    match DirBuilder::new().mode(DIR_MODE).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(CacheDirError::io(dir, "create the directory")),
    }
}

fn exists(path: &Path) -> Result<bool, CacheDirError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(CacheDirError::io(path, "look for it")(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;

    use super::super::cache_dir::scratch_on_disk;
    use super::super::fsck::repair;
    use super::super::layout::OBJECT_MARK_BYTES;
    use super::*;

    /// A directory that could be a cache; `None` if the checkout is on a file system that could not.
    fn scratch() -> Option<TempDir> {
        let dir = scratch_on_disk();
        match super::super::cache_dir::prepare(dir.path(), None) {
            Ok(_) => Some(dir),
            Err(error) => {
                eprintln!("skipped: {error}");
                None
            }
        }
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o7777
    }

    /// An object of these bytes, which on most machines' file systems cannot be clones of others.
    fn object(dir: &Path, bytes: &[u8]) -> File {
        let file = nameless(dir).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        finish(&file, bytes.len() as u64).unwrap();
        file
    }

    #[test]
    fn an_object_is_whole_blocks_and_never_replaces_another() {
        let Some(dir) = scratch() else { return };
        let path = dir.path().join("Dobject");
        assert_eq!(link(&object(dir.path(), &[7; 5000]), &path).unwrap(), Outcome::Seeded);
        assert_eq!(link(&object(dir.path(), &[8; 100]), &path).unwrap(), Outcome::AlreadyThere);
        assert_eq!(fs::read(&path).unwrap(), [&[7; 5000][..], &[0; 3192]].concat());
        let mark = xattr::get::<OBJECT_MARK_BYTES>(File::open(&path).unwrap().as_fd(), MARK);
        assert_eq!(mark, Ok(Some(object_mark(5000))));
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_volume_is_made_whole_and_others_are_left_alone() {
        let Some(dir) = scratch() else { return };
        let cache = dir.path().join(CACHE);
        let volume = cache.join("Ierofs,dom");
        make_dir(&cache).unwrap();
        assert!(make_volume(dir.path(), &volume).unwrap());
        assert!(make_volume(dir.path(), &volume).unwrap());
        let names: Vec<_> = fs::read_dir(&volume).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(names.len(), 256);
        assert!(names.iter().any(|name| name == "@0a") && names.iter().any(|name| name == "@ff"));
        assert_eq!((mode(&cache), mode(&volume), mode(&volume.join("@0a"))), (0o700, 0o700, 0o700));
        let report = repair(dir.path()).unwrap();
        assert!(report.damaged.is_empty() && report.buried == 0, "{report:?}");
        let unmarked = cache.join("Ierofs,unmarked");
        make_dir(&unmarked).unwrap();
        assert!(!make_volume(dir.path(), &unmarked).unwrap());
        assert_eq!(fs::read_dir(&unmarked).unwrap().count(), 0);
    }

    /// True of any file system: it is seeded, or refused and nothing is left that the kernel would see.
    #[test]
    fn a_blob_is_seeded_or_refused() {
        let Some(dir) = scratch() else { return };
        let blob_path = dir.path().join("blob");
        fs::write(&blob_path, [1; 5000]).unwrap();
        let blob = File::open(&blob_path).unwrap();
        let cache_dir = dir.path().join("cache_dir");
        make_dir(&cache_dir).unwrap();
        let key = Key::new(b"dom", b"blob0");
        let object = cache_dir.join("cache/Ierofs,dom/@5a/Dblob0");
        assert_eq!(seed(&cache_dir, &key, blob.as_fd(), 0).unwrap(), Outcome::Refused(Refusal::Empty));
        match seed(&cache_dir, &key, blob.as_fd(), 5000).unwrap() {
            Outcome::Seeded => {
                assert_eq!(object.metadata().unwrap().len(), 8192);
                assert_eq!(seed(&cache_dir, &key, blob.as_fd(), 5000).unwrap(), Outcome::AlreadyThere);
                let other = Key::new(b"dom", b"other");
                assert_eq!(seed(&cache_dir, &other, blob.as_fd(), 4999).unwrap(), Outcome::Refused(Refusal::Changed));
            }
            Outcome::Refused(Refusal::CannotShare(_)) => assert_eq!(fs::read_dir(cache_dir.join(CACHE)).unwrap().count(), 0),
            other => panic!("{other:?}"),
        }
    }
}
