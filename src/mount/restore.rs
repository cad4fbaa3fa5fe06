//! Going on with what another process served before it died: with its groups, with the files that they watch, and with what it
//! was asked and did not answer. While no process serves, readers wait; nothing is lost, as long as somebody keeps the bag.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use nix::sys::stat::{SFlag, fstat};
use serde::{Deserialize, Serialize};

use super::blobs::{All, BLOBS_DIR, Blobs, Served};
use super::claims::Place;
use super::error::{AttachError, BlobsError};
use super::space::is_blob_name;
use crate::front::ObjectId;
use crate::front::fanotify::{BlobFile, Group, map};
use crate::key::Key;
use crate::ops::bag::{Bag, Item};

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
    /// The file system of its source.
    #[serde(default)]
    device: u64,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Restored {
    /// Groups.
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
        let blobs = Self::with(dir, boot_id, groups, bag);
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
        group.watch(&file).map_err(|errno| AttachError::Mark { path: file.path().to_owned(), errno })?;
        let opened = file.map().is_full();
        let place = Place { group: label.group, device: label.device };
        Ok(Served { file: Arc::new(file), key, place, opened, pins: 0 })
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
        for (name, Served { file, key, place, .. }) in all {
            let label = Label::Blob(BlobLabel {
                domain: key.domain().to_vec(),
                name: key.name().to_vec(),
                file: name.clone(),
                group: place.group,
                object: file.object().0,
                len_bytes: file.len_bytes(),
                device: place.device,
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

/// What is in a bag: how many groups, and the names of blobs' files in the cache directory.
///
/// # Errors
/// It is not what [`Blobs::bag`] gives.
pub fn contents(items: Vec<Item>) -> io::Result<(usize, Vec<String>)> {
    let (groups, files) = sort(items)?;
    Ok((groups.len(), files.into_iter().map(|(label, _)| label.file).collect()))
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
            Label::Blob(label) if is_blob_name(&label.file) => files.push((label, fd)),
            Label::Blob(_) => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    // The places are those from 0 on, of both.
    let complete = !groups.is_empty() && groups.keys().eq(journals.keys()) && groups.keys().copied().eq(0..groups.len());
    if !complete {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((groups.into_values().zip(journals.into_values()).collect(), files))
}
