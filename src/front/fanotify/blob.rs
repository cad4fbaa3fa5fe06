//! A blob's file in the cache directory, as the engine's sink: where its bytes go, and what is known of them.

use std::fs::{self, File, FileTimes};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use rustix::fs::{FlockOperation, flock};

use super::group::{Group, Inner};
use super::map::{PAGE_BYTES, PresenceMap, SaveError, SinkId};
use crate::front::{ObjectId, Sink};
use crate::ops::{inode, reflink};
use crate::range::{ByteRange, align_up};

/// Name of a blob's map: its own with this.
pub const MAP_SUFFIX: &str = "map";
/// How long a file may be held by somebody who is about to remove it: removing takes one look and two names.
const HOLD_MAX: Duration = Duration::from_secs(10);
/// Which signal says that somebody wants a leased file (include/uapi/asm-generic/fcntl.h).
const F_SETSIG: libc::c_int = 10;
/// Pause between two tries to hold it.
const HOLD_PAUSE: Duration = Duration::from_millis(1);

/// See the module's description.
#[derive(Debug)]
pub struct BlobFile {
    path: PathBuf,
    /// Opened before the file was marked: so the kernel never asks us about our own writes, for which nobody would have
    /// an answer (`FMODE_NONOTIFY`, fs/open.c).
    file: File,
    map: Arc<PresenceMap>,
    /// Who is asked for it, when it is served.
    group: Arc<Inner>,
    object: ObjectId,
    len_bytes: u64,
}

impl BlobFile {
    /// The file `name` in `dir`, of a blob of `len_bytes`, made if it is not there; it will be `object`. It has its whole length,
    /// in whole blocks, from the beginning on: the kernel takes a file that is too short for one that is broken. As long as
    /// anybody has its descriptor, [`BlobFile::remove`] leaves it alone.
    ///
    /// # Errors
    /// The directory or the file system.
    pub fn open(dir: &Path, name: &str, len_bytes: u64, boot_id: &str, group: &Group, object: ObjectId) -> io::Result<Self> {
        let path = dir.join(name);
        let file = hold(&path)?;
        let map = open_or_make(&path.with_extension(MAP_SUFFIX))?;
        let same_len = file.metadata()?.len() == align_up(len_bytes, PAGE_BYTES);
        if !same_len {
            // What the map says is of a file of another length.
            map.set_len(0)?;
        }
        let map = PresenceMap::open(map, &id_of(name, &file, len_bytes)?, boot_id)?;
        if same_len && has_hole(&file, &map.ranges())? {
            tracing::warn!(blob = %path.display(), "somebody has cut off or emptied part of this file; it is brought anew");
            map.forget()?;
        }
        if map.present_bytes() == 0 {
            // What nobody knows of takes no room, and keeps no other file from sharing its blocks.
            file.set_len(0)?;
        }
        let file = Self { path, file, map: Arc::new(map), group: group.inner(), object, len_bytes };
        file.note_use();
        Ok(file)
    }

    /// Removes the file `name` from `dir`, and its map, unless somebody has it: a [`BlobFile`] of any process, also of one that is
    /// dead if its bag is kept, or a mount. `false`: somebody has.
    ///
    /// Who opens it holds it by a lock that its descriptor has, and then sees whether it still has its name; who removes it
    /// takes that lock alone. So a file that was opened is never removed, and one that was removed is never used.
    ///
    /// # Errors
    /// The directory or the file system.
    pub fn remove(dir: &Path, name: &str) -> io::Result<bool> {
        let path = dir.join(name);
        // Made if it is not there: nobody may open the map that goes.
        let file = open_or_make(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
            result => result?,
        }
        if !is_at(&file, &path)? {
            return Ok(true);
        }
        if !is_alone(&file) {
            return Ok(false);
        }
        // Either may be lost by a loss of power: a map is that of one file only.
        match fs::remove_file(path.with_extension(MAP_SUFFIX)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::remove_file(&path).map(|()| true)
    }

    /// Makes an empty file whole by sharing all blocks of `source`, which has exactly the blob's bytes: where both lie on one
    /// XFS or btrfs nothing is copied. `false`: not possible, or something is there already.
    ///
    /// # Errors
    /// The file system.
    pub fn share(&self, source: BorrowedFd<'_>) -> io::Result<bool> {
        if self.map.present_bytes() > 0 {
            return Ok(false);
        }
        if let Err(errno) = reflink::clone_whole(self.file.as_fd(), source) {
            // Whatever the reason: it can be read on demand.
            tracing::debug!(blob = %self.path.display(), "shares no blocks with its source: {errno}");
            return Ok(false);
        }
        self.stretch(self.len_bytes)?;
        self.map.insert(&(0..align_up(self.len_bytes, PAGE_BYTES)));
        Ok(true)
    }

    /// The file of [`BlobFile::open`] in another process, which is dead: its descriptor was opened before the file was marked.
    ///
    /// # Errors
    /// The directory or the file system; `ESTALE`: it has another file of that name.
    pub fn restore(
        dir: &Path,
        name: &str,
        file: OwnedFd,
        len_bytes: u64,
        boot_id: &str,
        group: &Group,
        object: ObjectId,
    ) -> io::Result<Self> {
        let (path, file) = (dir.join(name), File::from(file));
        let (there, kept) = (std::fs::metadata(&path)?, file.metadata()?);
        if (there.dev(), there.ino()) != (kept.dev(), kept.ino()) || kept.len() != align_up(len_bytes, PAGE_BYTES) {
            return Err(Errno::ESTALE.into());
        }
        let map = File::options().read(true).write(true).open(path.with_extension(MAP_SUFFIX))?;
        let map = PresenceMap::open(map, &id_of(name, &file, len_bytes)?, boot_id)?;
        Ok(Self { path, file, map: Arc::new(map), group: group.inner(), object, len_bytes })
    }

    /// Gives the file its length, if it has another one: the kernel would ask about that too, once the file is marked.
    ///
    /// # Errors
    /// The file system.
    pub fn stretch(&self, len_bytes: u64) -> io::Result<()> {
        let len_bytes = align_up(len_bytes, PAGE_BYTES);
        if self.file.metadata()?.len() == len_bytes { Ok(()) } else { self.file.set_len(len_bytes) }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object that it is to the engine.
    #[must_use]
    pub const fn object(&self) -> ObjectId {
        self.object
    }

    /// Length of the blob.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// How much of it is there: never more than it has, though its last page is counted as a whole one.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        self.map.present_bytes().min(self.len_bytes)
    }

    /// What is in it.
    #[must_use]
    pub const fn map(&self) -> &Arc<PresenceMap> {
        &self.map
    }

    /// Whether nobody but us has the file open: no mount of it is left anywhere, in no namespace, and no event of it is
    /// under way.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        is_alone(&self.file)
    }

    /// The kernel asks for it no more: when it [`BlobFile::is_unused`], or could not be served. It counts as used until now.
    pub fn unwatch(&self) {
        self.group.forget(self.file.as_fd(), self.object);
        self.note_use();
    }

    /// In its access time, which `noatime` does not keep us from setting. What cannot be noted costs nothing but a better choice
    /// of what goes when room is short.
    fn note_use(&self) {
        let _ = self.file.set_times(FileTimes::new().set_accessed(SystemTime::now()));
    }

    /// Makes durable what it holds. `false`: there was nothing to do.
    ///
    /// # Errors
    /// See [`PresenceMap::save`].
    pub fn save(&self) -> Result<bool, SaveError> {
        self.map.save(&self.file)
    }
}

fn open_or_make(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Opens a blob's file, and keeps others from removing it as long as the descriptor or a copy of it is open anywhere.
fn hold(path: &Path) -> io::Result<File> {
    let began = Instant::now();
    loop {
        let file = open_or_make(path)?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) if is_at(&file, path)? => return Ok(file),
            // It was removed in between.
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < HOLD_MAX => std::thread::sleep(HOLD_PAUSE),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether a file is the one of this name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether this is the only descriptor of a file. (Only such a file can be leased for writing: `check_conflicting_open`,
/// fs/locks.c.) Who opens it in the moment of the lease waits until it is given back, and we are sent a signal: one that
/// does nothing, for SIGIO would end the process.
fn is_alone(file: &File) -> bool {
    let ask = |what: libc::c_int, value: libc::c_int| {
        // SAFETY: the descriptor is open while borrowed; the argument is a plain number.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), what, value) })
    };
    let lease = |kind: libc::c_int| ask(libc::F_SETLEASE, kind).is_ok();
    ask(F_SETSIG, libc::SIGURG).is_ok() && lease(libc::F_WRLCK) && lease(libc::F_UNLCK)
}

fn id_of(name: &str, file: &File, len_bytes: u64) -> io::Result<SinkId> {
    Ok(SinkId { name: name.to_owned(), len_bytes, inode: file.metadata()?.ino(), generation: inode::generation(file)? })
}

/// Whether any of `present`, which lie in the file, is a hole of it. What was written is none, on the disk or not yet; but a
/// file that shares the blocks of another has the holes of that, and is shared again.
fn has_hole(file: &File, present: &[ByteRange]) -> io::Result<bool> {
    for range in present {
        let from = i64::try_from(range.start).map_err(|_| Errno::EOVERFLOW)?;
        // The end of the file counts as one.
        if u64::try_from(lseek(file, from, Whence::SeekHole)?).unwrap_or(0) < range.end {
            return Ok(true);
        }
    }
    Ok(false)
}

impl AsFd for BlobFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Sink for BlobFile {
    fn present(&self) -> Vec<ByteRange> {
        self.map.ranges()
    }

    fn filled(&self, range: &ByteRange) {
        self.map.insert(range);
    }

    fn completed(&self) {
        match self.group.complete(self.file.as_fd()) {
            // Told before.
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => tracing::warn!(blob = %self.path.display(), "complete, but the kernel goes on asking for it: {errno}"),
        }
    }
}
