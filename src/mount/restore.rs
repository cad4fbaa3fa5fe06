//! Going on with what another process served before it died: with its groups, with the files that they watch, and with what it
//! was asked and did not answer. While no process serves, readers wait; nothing is lost, as long as somebody keeps the bag.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};
use serde::{Deserialize, Serialize};

use super::blobs::{All, AttachError, BLOBS_DIR, Blobs, BlobsError, Claims, Opening, Served, name_of};
use crate::engine::Entry;
use crate::front::ObjectId;
use crate::front::fanotify::{BlobFile, Group, map};
use crate::key::Key;
use crate::ops::bag::{Bag, Item};
use crate::store::Store;

/// Blobs that are being opened at a time; far fewer than the engine takes.
const OPENS_MAX: usize = 64;

/// What a descriptor in the bag is. It is read by other versions: fields may come, but none may change.
#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Label {
    /// A group; the place counts, because it is that of a shard.
    Group(usize),
    /// The journal of the group in this place.
    Journal(usize),
    /// The file of a blob.
    Blob(BlobLabel),
}

/// What there is to know of a blob.
#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
struct BlobLabel {
    domain: Vec<u8>,
    name: Vec<u8>,
    /// In the cache directory.
    file: String,
    /// The place of its group.
    group: usize,
    object: u32,
    len_bytes: u64,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Restored {
    /// Groups; there must be as many shards at least.
    pub groups: usize,
    /// Blobs that are watched.
    pub blobs: usize,
    /// Reads that wait for an answer which the dead process owes.
    pub unanswered: usize,
    /// Blobs that cannot be served any more: whoever reads what is missing of them gets an error.
    pub lost: Vec<AttachError>,
}

impl Blobs {
    /// Goes on with the `bag` of a process that is dead ([`Blobs::bag`]), and with its groups, however many those are. To be
    /// called before there are threads that open descriptors. Readers wait until [`Blobs::resume`].
    ///
    /// # Errors
    /// The bag is of no use: what it has stays as it is. The directory cannot be used.
    pub fn restore(dir: &Path, bag: OwnedFd) -> Result<(Self, Restored), BlobsError> {
        let dir = dir.join(BLOBS_DIR);
        let unusable = |source| BlobsError::Dir { dir: dir.clone(), source };
        let boot_id = map::boot_id().map_err(unusable)?;
        let dir = std::fs::canonicalize(&dir).map_err(unusable)?;
        let (bag, items) = Bag::open(bag).map_err(BlobsError::Bag)?;
        let (groups, files) = sort(items).map_err(BlobsError::Bag)?;
        let groups = groups.into_iter().map(|(group, journal)| Group::restore(group, journal).map(Arc::new));
        let groups = groups.collect::<io::Result<Vec<_>>>().map_err(BlobsError::Bag)?;
        let unanswered = groups.iter().map(|group| group.unanswered()).sum();
        let mut restored = Restored { groups: groups.len(), unanswered, ..Restored::default() };
        let (next, bag) = (AtomicU32::new(0), Mutex::new(bag));
        let blobs = Self { dir, boot_id, groups, next, served: Mutex::default(), claims: Claims::default(), bag };
        for (label, file) in files {
            blobs.next.fetch_max(label.object.wrapping_add(1), Ordering::Relaxed);
            match blobs.adopt(&label, file) {
                Ok(served) => drop(blobs.served().insert(label.file, served)),
                Err(error) => restored.lost.push(error),
            }
        }
        restored.blobs = blobs.served().len();
        Ok((blobs, restored))
    }

    /// A blob that was served.
    fn adopt(&self, label: &BlobLabel, file: OwnedFd) -> Result<Served, AttachError> {
        let (key, object) = (Key::new(&label.domain, &label.name), ObjectId(label.object));
        let failed = |source| AttachError::Cache { key: key.clone(), dir: self.dir.clone(), source };
        let group = self.groups.get(label.group).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        let file = BlobFile::restore(&self.dir, &label.file, file, label.len_bytes, &self.boot_id, group, object).map_err(failed)?;
        let complete = file.map().is_full();
        let adopted = group.adopt(file.as_fd(), object, label.len_bytes, complete);
        adopted.map_err(|errno| AttachError::Mark { path: file.path().to_owned(), errno })?;
        Ok(Served { file: Arc::new(file), key, group: label.group, opened: complete, pins: 0 })
    }

    /// Has `engine` serve again what was restored, from `store`, and answers what was left unanswered. From then on readers are
    /// served, and of what could not be served, which it gives, they get errors. That is tried again by the next call, or
    /// when it is attached. `patience` is for one blob; it should be longer than the engine's `open_timeout`.
    pub fn resume(&self, engine: &Entry, store: &dyn Store, patience: Duration) -> Vec<AttachError> {
        let mut failed = Vec::new();
        let mut all = self.served();
        let mut closed: Vec<_> = all.iter_mut().filter(|(_, served)| !served.opened).collect();
        for some in closed.chunks_mut(OPENS_MAX) {
            let begin = |(name, served): &(&String, &mut Served)| check(name, &served.key, store).map(|()| Opening::begin(engine, served));
            let begun: Vec<_> = some.iter().map(begin).collect();
            for ((_, served), opening) in some.iter_mut().zip(begun) {
                let opened = opening.and_then(|opening| opening.end(patience));
                served.opened = opened.is_ok();
                failed.extend(opened.err());
            }
        }
        drop(all);
        for group in &self.groups {
            group.resume(|need| engine.need(need));
        }
        failed
    }

    /// What must outlive this process, so that another can go on: one descriptor, the same for ever. What is in it is
    /// always what is served.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn bag(&self) -> io::Result<OwnedFd> {
        self.bag.lock().unwrap_or_else(PoisonError::into_inner).as_fd().try_clone_to_owned()
    }

    /// Puts into the bag what is served, and nothing else.
    pub(super) fn pack(&self, all: &All) -> io::Result<()> {
        let mut items: Vec<(Vec<u8>, BorrowedFd<'_>)> = Vec::new();
        for (place, group) in self.groups.iter().enumerate() {
            let (group, journal) = group.kept();
            items.push((serde_json::to_vec(&Label::Group(place))?, group));
            items.push((serde_json::to_vec(&Label::Journal(place))?, journal));
        }
        for (name, Served { file, key, group, .. }) in all {
            let label = Label::Blob(BlobLabel {
                domain: key.domain().to_vec(),
                name: key.name().to_vec(),
                file: name.clone(),
                group: *group,
                object: file.object().0,
                len_bytes: file.len_bytes(),
            });
            items.push((serde_json::to_vec(&label)?, (**file).as_fd()));
        }
        self.bag.lock().unwrap_or_else(PoisonError::into_inner).pack(&items)
    }

    /// The same where less is served than before: if it fails, too much is kept, until it is packed again.
    pub(super) fn repack(&self, all: &All) {
        if let Err(error) = self.pack(all) {
            tracing::warn!("what is not served any more is kept over a restart all the same: {error}");
        }
    }
}

/// Whether what was kept over a restart is a bag: what cachefiles has kept is a device.
#[must_use]
pub fn is_bag(kept: &OwnedFd) -> bool {
    fstat(kept).is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK)
}

/// Whether the store still has the blob whose bytes lie in the file `name`.
fn check(name: &str, key: &Key, store: &dyn Store) -> Result<(), AttachError> {
    let blob = store.open(key)?.ok_or_else(|| AttachError::NotFound(key.clone()))?;
    if name_of(key, &*blob) == name { Ok(()) } else { Err(AttachError::Refused { key: key.clone(), errno: Errno::ESTALE }) }
}

/// A group and its journal.
type Pair = (OwnedFd, OwnedFd);

/// A blob and its file.
type Labeled = (BlobLabel, OwnedFd);

/// Groups with their journals, and the rest.
fn sort(items: Vec<Item>) -> io::Result<(Vec<Pair>, Vec<Labeled>)> {
    let (mut groups, mut journals, mut files) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for (label, fd) in items {
        match serde_json::from_slice(&label)? {
            Label::Group(place) => drop(groups.insert(place, fd)),
            Label::Journal(place) => drop(journals.insert(place, fd)),
            Label::Blob(label) => files.push((label, fd)),
        }
    }
    // The places are those from 0 on, of both.
    let complete = !groups.is_empty() && groups.keys().eq(journals.keys()) && groups.keys().copied().eq(0..groups.len());
    if !complete {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((groups.into_values().zip(journals.into_values()).collect(), files))
}
