//! A blob's file in the cache directory, as the engine's sink: where its bytes go, and what is known of them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use super::group::{Group, Inner};
use super::map::{PAGE_BYTES, PresenceMap};
use crate::front::{ObjectId, Sink};
use crate::ops::reflink;
use crate::range::{ByteRange, align_up};

/// Name of a blob's map: its own with this.
const MAP_SUFFIX: &str = "map";

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
    /// in whole blocks, from the beginning on: the kernel takes a file that is too short for one that is broken.
    ///
    /// # Errors
    /// The directory or the file system.
    pub fn open(dir: &Path, name: &str, len_bytes: u64, boot_id: &str, group: &Group, object: ObjectId) -> io::Result<Self> {
        let path = dir.join(name);
        let open = |path: &Path| File::options().read(true).write(true).create(true).truncate(false).open(path);
        let (file, map) = (open(&path)?, open(&path.with_extension(MAP_SUFFIX))?);
        if file.metadata()?.len() != align_up(len_bytes, PAGE_BYTES) {
            // What the map says is of a file of another length.
            map.set_len(0)?;
            file.set_len(0)?;
        }
        let map = PresenceMap::open(map, len_bytes, boot_id)?;
        Ok(Self { path, file, map: Arc::new(map), group: group.inner(), object, len_bytes })
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
        let map = PresenceMap::open(map, len_bytes, boot_id)?;
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

    /// What is in it.
    #[must_use]
    pub const fn map(&self) -> &Arc<PresenceMap> {
        &self.map
    }

    /// Whether nobody but us has the file open: no mount of it is left anywhere, in no namespace, and no event of it is
    /// under way. (Only such a file can be leased for writing: `check_conflicting_open`, fs/locks.c.)
    #[must_use]
    pub fn is_unused(&self) -> bool {
        let lease = |kind: libc::c_int| {
            // SAFETY: the descriptor is open as long as `self`; the argument is a plain number.
            Errno::result(unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLEASE, kind) })
        };
        lease(libc::F_WRLCK).is_ok() && lease(libc::F_UNLCK).is_ok()
    }

    /// The kernel asks for it no more: when it [`BlobFile::is_unused`], or could not be served.
    pub fn unwatch(&self) {
        self.group.forget(self.file.as_fd(), self.object);
    }

    /// Makes durable what it holds. `false`: there was nothing to do.
    ///
    /// # Errors
    /// The disk.
    pub fn save(&self) -> io::Result<bool> {
        self.map.save(&self.file)
    }
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
