//! The groups, and the blobs that they are asked for: what is made before an image can be mounted.

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::claims::{Claim, Claims, Place};
use super::error::{AttachError, BlobsError};
use super::opening::{Opening, bring};
use crate::control::wire::BlobState;
use crate::engine::Entry;
use crate::engine::room::NoRoom;
use crate::engine::stats::ObjectReport;
use crate::front::fanotify::{BlobFile, Group, map};
use crate::front::{FrontEnd, ObjectId};
use crate::key::Key;
use crate::ops::bag::Bag;
use crate::range::ByteRange;
use crate::store::{Blob, Store};

/// Blobs' files in the cache directory.
pub(super) const BLOBS_DIR: &str = "blobs";
/// Only ours: whoever reads a blob's file beside a mount has it filled.
const DIR_MODE: u32 = 0o700;
/// Groups of a shard: so many blobs have one of their own. All that wait for events of a group are woken by every answer to
/// one of them, so readers of a hot blob should not share it with those who wait for a slow source.
const GROUPS_PER_SHARD: usize = 8;
/// Groups of a daemon at most; a user may have fs.fanotify.max_user_groups (128), and others want some too.
const GROUPS_MAX: usize = 64;

/// How many groups a daemon with so many shards makes: the same number for each of them.
#[must_use]
pub fn groups_wanted(shards: usize) -> usize {
    shards * (GROUPS_MAX / shards.max(1)).clamp(1, GROUPS_PER_SHARD)
}

/// See the module's description.
#[derive(Debug)]
pub struct Blobs {
    pub(super) dir: PathBuf,
    pub(super) boot_id: String,
    pub(super) groups: Vec<Arc<Group>>,
    pub(super) next: AtomicU32,
    /// Never locked while a store is waited for.
    pub(super) served: Mutex<All>,
    pub(super) claims: Claims,
    /// What another process needs to go on.
    pub(super) bag: Mutex<Bag>,
    /// How many were served and are not any more.
    pub(super) released: AtomicU64,
    /// Bytes that came by sharing blocks with a store.
    shared_bytes: AtomicU64,
    /// To be told of files that found no room.
    pub(super) no_room: OnceLock<NoRoom>,
}

/// Blobs that are served, by the names of their files.
pub(super) type All = HashMap<String, Served>;

/// A blob that is served.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) file: Arc<BlobFile>,
    pub(super) key: Key,
    pub(super) place: Place,
    /// The engine knows it, or nobody has to.
    pub(super) opened: bool,
    /// Who is about to mount it.
    pub(super) pins: usize,
}

/// A blob that is ready to be mounted, and stays so until this is dropped; after that, as long as it is mounted.
#[derive(Debug)]
pub struct Pinned {
    blobs: Arc<Blobs>,
    file: Arc<BlobFile>,
    key: Key,
}

impl Pinned {
    /// Its file.
    #[must_use]
    pub fn file(&self) -> &BlobFile {
        &self.file
    }

    /// Brings what is missing of a range.
    pub(super) fn bring(&self, engine: &Entry, range: ByteRange, patience: Duration) -> Result<(), AttachError> {
        // A blob that is complete need not be open.
        if self.file.map().contains(&range) { Ok(()) } else { bring(engine, &self.file, &self.key, range, patience) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for served in self.blobs.served().values_mut().filter(|served| Arc::ptr_eq(&served.file, &self.file)) {
            served.pins -= 1;
        }
    }
}

impl Blobs {
    /// Groups for so many shards, and what they serve from now on, kept in `dir`.
    ///
    /// # Errors
    /// The kernel gives no groups or watches no files there, or the directory cannot be used.
    pub fn new(dir: &Path, shards: usize) -> Result<Self, BlobsError> {
        let no_group = |errno| if errno == Errno::EPERM { BlobsError::NotPermitted } else { BlobsError::NoGroup { errno } };
        let groups = (0..groups_wanted(shards)).map(|_| Group::new().map(Arc::new)).collect::<Result<Vec<_>, _>>().map_err(no_group)?;
        let dir = dir.join(BLOBS_DIR);
        let unusable = |source| BlobsError::Dir { dir: dir.clone(), source };
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(&dir).map_err(unusable)?;
        // Verbs that mount its files may work elsewhere.
        let dir = std::fs::canonicalize(&dir).map_err(unusable)?;
        let unusable = |source| BlobsError::Dir { dir: dir.clone(), source };
        let boot_id = map::boot_id().map_err(unusable)?;
        let bag = Bag::new().map_err(BlobsError::Bag)?;
        groups[0].can_watch(&dir).map_err(unusable)?.map_err(|errno| BlobsError::NoEvents { dir: dir.clone(), errno })?;
        let blobs = Self::with(dir, boot_id, groups, bag);
        blobs.pack(&All::new()).map_err(BlobsError::Bag)?;
        Ok(blobs)
    }

    /// Nothing is served yet.
    pub(super) fn with(dir: PathBuf, boot_id: String, groups: Vec<Arc<Group>>, bag: Bag) -> Self {
        let (next, served, claims, bag) = (AtomicU32::new(0), Mutex::default(), Claims::default(), Mutex::new(bag));
        Self {
            dir,
            boot_id,
            groups,
            next,
            served,
            claims,
            bag,
            released: AtomicU64::new(0),
            shared_bytes: AtomicU64::new(0),
            no_room: OnceLock::new(),
        }
    }

    /// The sources of requests, some for each shard.
    #[must_use]
    pub fn fronts(&self) -> Vec<Arc<dyn FrontEnd>> {
        self.groups.iter().map(|group| Arc::clone(group) as Arc<dyn FrontEnd>).collect()
    }

    /// Has `engine` serve a blob from `store`, if it is not complete or served already, and gives the file to be mounted. With
    /// `whole` that is complete when this returns. May block for as long as `patience` says.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(
        self: &Arc<Self>,
        engine: &Entry,
        store: &dyn Store,
        key: &Key,
        whole: bool,
        patience: Duration,
    ) -> Result<Pinned, AttachError> {
        let blob = store.open(key)?.ok_or_else(|| AttachError::NotFound(key.clone()))?;
        let name = name_of(key, &*blob);
        let claim = self.claims.take(&name, patience).ok_or_else(|| AttachError::TimedOut(key.clone()))?;
        // Restored, but perhaps its store was not there then.
        let known = self.served().get(&name).map(|served| (!served.opened).then(|| Opening::begin(engine, served)));
        match known {
            None => self.make(engine, &claim, key, &*blob, patience)?,
            Some(None) => {}
            Some(Some(opening)) => opening.end(patience)?,
        }
        let file = {
            let mut all = self.served();
            let served = all.get_mut(&name).ok_or_else(|| AttachError::NotFound(key.clone()))?;
            served.opened = true;
            served.pins += 1;
            Arc::clone(&served.file)
        };
        drop(claim);
        let pinned = Pinned { blobs: Arc::clone(self), file, key: key.clone() };
        if whole {
            pinned.bring(engine, 0..pinned.file.len_bytes(), patience)?;
        }
        Ok(pinned)
    }

    /// Opens the blob's file, and has it served if something is missing.
    fn make(&self, engine: &Entry, claim: &Claim<'_>, key: &Key, blob: &dyn Blob, patience: Duration) -> Result<(), AttachError> {
        let (name, object) = (claim.name(), ObjectId(self.next.fetch_add(1, Ordering::Relaxed)));
        let place = self.place_for(claim, engine, object, blob.device());
        let failed = |source| AttachError::Cache { key: key.clone(), dir: self.dir.clone(), source };
        let open = || BlobFile::open(&self.dir, name, blob.len_bytes(), &self.boot_id, &self.groups[place.group], object);
        let file = Arc::new(self.with_room(open).map_err(failed)?);
        let served = Served { file, key: key.clone(), place, opened: true, pins: 0 };
        let file = &served.file;
        let share = || blob.whole_file().map_or(Ok(false), |source| file.share(source.fd.as_fd())).map_err(failed);
        let is_there = file.map().is_full();
        if is_there || share()? {
            if !is_there {
                self.shared_bytes.fetch_add(file.len_bytes(), Ordering::Relaxed);
            }
            self.served().insert(name.to_owned(), served);
            return Ok(());
        }
        Opening::begin(engine, &served).end(patience)?;
        self.watch(engine, name, served)
    }

    /// The group for a new object: one that is read by the shard that owns it, with as few blobs of other file systems as
    /// possible, and as few blobs. Those that are being made count as well.
    fn place_for(&self, claim: &Claim<'_>, engine: &Entry, object: ObjectId, device: u64) -> Place {
        let (shards, owner) = (engine.shards(), engine.owner(object));
        let all = self.served();
        claim.settle(|making| {
            let making = making.iter().filter(|(name, _)| !all.contains_key(*name)).map(|(_, place)| *place);
            let taken: Vec<_> = all.values().map(|served| served.place).chain(making).collect();
            let crowd = |group: &usize| {
                let there = taken.iter().filter(|place| place.group == *group);
                (there.clone().filter(|place| place.device != device).count(), there.count())
            };
            let group = (0..self.groups.len()).filter(|group| group % shards == owner).min_by_key(crowd);
            Place { group: group.unwrap_or(owner % self.groups.len()), device }
        })
    }

    /// Has the kernel ask for a blob that the engine knows. From then on another process can go on with it.
    fn watch(&self, engine: &Entry, name: &str, served: Served) -> Result<(), AttachError> {
        let (file, key, group) = (Arc::clone(&served.file), served.key.clone(), &self.groups[served.place.group]);
        let mut all = self.served();
        all.insert(name.to_owned(), served);
        let kept = self.pack(&all).map_err(|source| AttachError::Unkept { key, source });
        let watch = || group.watch(&file).map_err(|errno| AttachError::Mark { path: file.path().to_owned(), errno });
        kept.and_then(|()| watch()).inspect_err(|_| {
            file.unwatch();
            engine.close(file.object());
            all.remove(name);
            self.repack(&all);
        })
    }

    /// Ends the service of blobs that nobody has mounted any more. Gives how many.
    pub fn release(&self, engine: &Entry) -> usize {
        let mut served = self.served();
        let before = served.len();
        // Who goes on before this is packed watches them again, and finds them unused too.
        served.retain(|name, Served { file, pins, .. }| {
            let is_used = *pins > 0 || self.claims.has(name) || !file.is_unused();
            if !is_used {
                file.unwatch();
                engine.close(file.object());
            }
            is_used
        });
        let released = before - served.len();
        if released > 0 {
            self.repack(&served);
            self.released.fetch_add(released as u64, Ordering::Relaxed);
        }
        released
    }

    /// How many bytes came into the cache by sharing blocks with a store.
    #[must_use]
    pub fn shared_bytes(&self) -> u64 {
        self.shared_bytes.load(Ordering::Relaxed)
    }

    /// Adds what the files tell to what the engine knows of their blobs: also of those that it need not know, because they are
    /// complete.
    pub fn report(&self, known: &mut Vec<ObjectReport>) {
        let state = |Served { file, key, .. }: &Served| (key.to_string(), file.len_bytes(), file.present_bytes());
        let mut served: Vec<_> = self.served().values().map(state).collect();
        // Of two files of one name, one was replaced in the store.
        served.sort_unstable();
        served.dedup_by(|one, other| one.0 == other.0);
        let engines = known.len();
        for (blob, len_bytes, present_bytes) in served {
            match known[..engines].binary_search_by(|known| known.blob.cmp(&blob)) {
                Ok(at) => (known[at].present_bytes, known[at].open) = (present_bytes, true),
                Err(_) => known.push(ObjectReport { blob, len_bytes, present_bytes, open: true, ..ObjectReport::default() }),
            }
        }
        known.sort_unstable_by(|a, b| a.blob.cmp(&b.blob));
    }

    /// Whether the blob in the file of this name is served.
    #[must_use]
    pub fn serves(&self, name: &str) -> bool {
        self.served().contains_key(name)
    }

    /// Each blob that is served, by its name.
    #[must_use]
    pub fn list(&self) -> Vec<BlobState> {
        let state = |Served { file, key, .. }: &Served| BlobState {
            blob: key.to_string(),
            file: file.path().to_owned(),
            len_bytes: file.len_bytes(),
            present_bytes: file.present_bytes(),
        };
        let mut all: Vec<_> = self.served().values().map(state).collect();
        all.sort_unstable_by(|a, b| (&a.blob, &a.file).cmp(&(&b.blob, &b.file)));
        all
    }

    /// Where the files are kept, and what is noted of them.
    pub(super) fn cache_dir(&self) -> &Path {
        self.dir.parent().unwrap_or(&self.dir)
    }

    /// Whether nothing is served that somebody may read.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.served().values().all(|served| served.pins == 0 && served.file.is_unused())
    }

    /// Makes durable what the blobs' files hold. Gives how many had something new.
    pub fn save(&self) -> usize {
        let files: Vec<_> = self.served().values().map(|served| Arc::clone(&served.file)).collect();
        let saved = |file: &Arc<BlobFile>| {
            file.save().unwrap_or_else(|error| {
                tracing::error!(blob = %file.path().display(), "{error}");
                false
            })
        };
        files.iter().filter(|file| saved(file)).count()
    }

    pub(super) fn served(&self) -> MutexGuard<'_, All> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of a blob's file: another one for each blob that ever had this key, so that bytes of two never meet. A hash,
/// because keys may be longer than file names.
pub(super) fn name_of(key: &Key, blob: &dyn Blob) -> String {
    let mut hash = Sha256::new();
    for part in [key.domain(), key.name(), format!("{:?}", blob.identity()).as_bytes()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
