//! The cache of images that are mounted from files, as `ops::space` looks after it: each blob has a file and a map, and both go
//! when nobody has the blob mounted.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::blobs::Blobs;
use crate::engine::room::NoRoom;
use crate::front::cachefiles::cache_dir::CacheDirError;
use crate::front::cachefiles::tree::{self, Dir, Kind};
use crate::front::fanotify::{BlobFile, MAP_SUFFIX};
use crate::ops::reflink;
use crate::ops::space::cache::{Answer, Cache, Counted};
use crate::ops::space::policy::Candidate;

/// Digits of the name of a blob's file, which is a hash.
const NAME_DIGITS: usize = 64;
/// Pauses between two tries to make a file where there is no room: together as long as a fill waits.
const ROOM_PAUSES: [Duration; 3] = [Duration::from_millis(180), Duration::from_millis(360), Duration::from_millis(720)];

/// See the module's description.
#[derive(Debug)]
pub struct BlobCache {
    blobs: Arc<Blobs>,
    dir: Dir,
    /// Whether files there can have blocks in common with those of a store.
    shares: bool,
    /// How many blobs were released before the last look.
    released: u64,
    /// The blobs of the last count.
    names: Vec<String>,
}

impl Blobs {
    /// Rings `no_room` from now on when a blob's file finds no room: whoever hears it looks after a [`BlobCache`].
    pub fn ring_for_room(&self, no_room: NoRoom) {
        // Who is told first hears it.
        let _ = self.no_room.set(no_room);
    }

    /// Does something that takes room on the cache's file system; again some time later if there is none, as fills do. It may
    /// wait, so the table of blobs must not be locked.
    pub(super) fn with_room<T>(&self, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
        for pause in ROOM_PAUSES {
            match make() {
                Err(error) if is_no_room(&error) && self.no_room.get().is_some_and(NoRoom::ring) => {
                    std::thread::sleep(pause);
                }
                result => return result,
            }
        }
        make()
    }
}

impl BlobCache {
    /// That of `blobs`.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn new(blobs: Arc<Blobs>) -> Result<Self, CacheDirError> {
        let missing = || CacheDirError::io(&blobs.dir, "look after its space")(Errno::ENOENT);
        let dir = Dir::open(&blobs.dir)?.ok_or_else(missing)?;
        let shares = tree::can_share(&dir);
        Ok(Self { blobs, dir, shares, released: 0, names: Vec::new() })
    }

    /// The files that are served.
    fn look_at_served(&self) -> HashMap<String, Arc<BlobFile>> {
        self.blobs.served().iter().map(|(name, served)| (name.clone(), Arc::clone(&served.file))).collect()
    }

    /// Adds what one file of a blob takes. A map that has lost its blob counts as never used.
    fn add(&self, to: &mut Candidate, name: &OsStr, file: Option<&Arc<BlobFile>>) -> Result<(), CacheDirError> {
        let Some(stat) = self.dir.stat(name)? else { return Ok(()) };
        to.files += 1;
        to.bytes += tree::bytes(&stat);
        if is_map(name) {
            return Ok(());
        }
        to.last_use = tree::last_use(&stat);
        if self.shares {
            // Who is served is not opened: somebody who looks whether it is mounted would take us for a mount.
            let shared = match file {
                Some(file) => reflink::shared_bytes(file.as_fd()),
                None if to.stays => Ok(0),
                None => self.dir.open_file(name, OFlag::O_RDONLY).and_then(reflink::shared_bytes),
            };
            to.bytes = to.bytes.saturating_sub(shared.unwrap_or(0));
        }
        Ok(())
    }
}

fn is_no_room(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|errno| NoRoom::is_meant_by(Errno::from_raw(errno)))
}

/// The blob to which a file of this name belongs; `None`: it is not ours.
fn blob_of(name: &OsStr) -> Option<&str> {
    let stem = if is_map(name) { Path::new(name).file_stem()? } else { name };
    stem.to_str().filter(|name| is_blob_name(name))
}

fn is_map(name: &OsStr) -> bool {
    Path::new(name).extension() == Some(MAP_SUFFIX.as_ref())
}

/// Whether a file of this name in the cache directory may be that of a blob.
pub(super) fn is_blob_name(name: &str) -> bool {
    name.len() == NAME_DIGITS && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Cache for BlobCache {
    fn dir(&self) -> &Dir {
        &self.dir
    }

    fn may_cull(&self) -> bool {
        true
    }

    /// A blob's use is noted when it begins and when it ends.
    fn note_uses(&mut self) -> Result<bool, CacheDirError> {
        let released = self.blobs.released.load(Ordering::Relaxed);
        Ok(std::mem::replace(&mut self.released, released) != released)
    }

    fn finish(&mut self) {}

    fn tidy(&mut self) -> Result<(), CacheDirError> {
        Ok(())
    }

    fn count(&mut self) -> Result<Counted, CacheDirError> {
        let files = self.look_at_served();
        let mut found: BTreeMap<String, Candidate> = BTreeMap::new();
        let mut unread = None;
        for entry in self.dir.entries()?.into_iter().filter(|entry| entry.kind == Kind::File) {
            let Some(blob) = blob_of(&entry.name) else { continue };
            let none = Candidate { bytes: 0, files: 0, last_use: (0, 0), stays: files.contains_key(blob) };
            let counted = self.add(found.entry(blob.to_owned()).or_insert(none), &entry.name, files.get(blob));
            unread = unread.or_else(|| counted.err().map(|error| error.to_string()));
        }
        let objects;
        (self.names, objects) = found.into_iter().unzip();
        Ok(Counted { objects, unread })
    }

    /// Whoever has the file in this moment keeps it: a lock on it says so, not what was counted.
    fn cull(&mut self, object: usize) -> Result<Answer, CacheDirError> {
        let name = &self.names[object];
        match BlobFile::remove(&self.blobs.dir, name) {
            Ok(removed) => Ok(if removed { Answer::Free } else { Answer::Busy }),
            Err(error) => {
                let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
                Err(CacheDirError::io(&self.dir.path_of(name.as_ref()), "remove it from the cache")(errno))
            }
        }
    }

    fn cull_volumes(&mut self) -> Result<(u64, u64), CacheDirError> {
        Ok((0, 0))
    }
}
