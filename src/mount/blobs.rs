//! The groups, and the blobs that they are asked for: what is made before an image can be mounted.

use std::collections::{HashMap, HashSet};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use crate::engine::Entry;
use crate::front::fanotify::{BlobFile, Group, map};
use crate::front::{Answer, FrontEnd, NeedRequest, ObjectId, OpenRequest, Outcome, Sink, Ticket};
use crate::key::Key;
use crate::ops::bag::Bag;
use crate::store::{Blob, Store, StoreError};

/// Blobs' files in the cache directory.
pub(super) const BLOBS_DIR: &str = "blobs";
/// Only ours: whoever reads a blob's file beside a mount has it filled.
const DIR_MODE: u32 = 0o700;
/// Name of the two answers that a blob waits for.
const TOKEN: u64 = 0;

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
}

/// Blobs that are served, by the names of their files.
pub(super) type All = HashMap<String, Served>;

/// A blob that is served.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) file: Arc<BlobFile>,
    pub(super) key: Key,
    /// The place of the group that is asked for it.
    pub(super) group: usize,
    /// The engine knows it, or nobody has to.
    pub(super) opened: bool,
    /// Who is about to mount it.
    pub(super) pins: usize,
}

/// Names of blobs that are being made ready. Who makes one has it for itself, so that two mounts of one blob share what the
/// first one made; and nobody waits for another blob, whose store may hang.
#[derive(Debug, Default)]
pub(super) struct Claims {
    names: Mutex<HashSet<String>>,
    /// Some of them are free.
    freed: Condvar,
}

/// One of them, until it is dropped.
struct Claim<'a> {
    claims: &'a Claims,
    name: &'a str,
}

impl Claims {
    /// Waits until nobody else has `name`; `None`: not as long as `patience`.
    fn take<'a>(&'a self, name: &'a str, patience: Duration) -> Option<Claim<'a>> {
        let is_taken = |names: &mut HashSet<String>| names.contains(name);
        let waited = self.freed.wait_timeout_while(self.names(), patience, is_taken);
        let (mut names, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        names.insert(name.to_owned());
        Some(Claim { claims: self, name })
    }

    fn has(&self, name: &str) -> bool {
        self.names().contains(name)
    }

    fn names(&self) -> MutexGuard<'_, HashSet<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.names().remove(self.name);
        self.claims.freed.notify_all();
    }
}

/// A blob that is ready to be mounted, and stays so until this is dropped; after that, as long as it is mounted.
#[derive(Debug)]
pub struct Pinned {
    blobs: Arc<Blobs>,
    file: Arc<BlobFile>,
}

impl Pinned {
    /// Its file.
    #[must_use]
    pub fn file(&self) -> &BlobFile {
        &self.file
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for served in self.blobs.served().values_mut().filter(|served| Arc::ptr_eq(&served.file, &self.file)) {
            served.pins -= 1;
        }
    }
}

/// Why blobs cannot be served at all.
#[derive(Debug, thiserror::Error)]
pub enum BlobsError {
    /// The kernel asks for a capability.
    #[error("fanotify: not permitted; run as root, with CAP_SYS_ADMIN in the initial user namespace")]
    NotPermitted,
    /// It gives no group.
    #[error("fanotify: no group: {errno}: {}", group_advice(*.errno))]
    NoGroup {
        /// Why not.
        errno: Errno,
    },
    /// It has no such events, or not there.
    #[error("fanotify: cannot watch files in {}: {errno}: {}", dir.display(), watch_advice(*.errno))]
    NoEvents {
        /// Where.
        dir: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// Nothing can outlive the process, or what an earlier one has left is of no use.
    #[error("fanotify: cannot keep files watched over a restart: {0}; see RLIMIT_NOFILE, and infill release")]
    Bag(#[source] io::Error),
    /// The cache directory cannot be used.
    #[error("cannot use {} as a cache directory: {source}", dir.display())]
    Dir {
        /// Which.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

const fn group_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EMFILE => "too many groups; raise fs.fanotify.max_user_groups, or lower --shards",
        Errno::EINVAL | Errno::ENOSYS => "this kernel was built without CONFIG_FANOTIFY_ACCESS_PERMISSIONS",
        _ => "see infill doctor",
    }
}

/// Why a blob cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No store has it.
    #[error("no store has the blob {0}; look at the stores that infill was started with")]
    NotFound(Key),
    /// It does not say which blobs its devices are.
    #[error("the image {image} has {devices} devices, and does not name all of them; say which blobs they are, in order, with --device")]
    Nameless {
        /// Which image.
        image: String,
        /// How many it has.
        devices: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The cache directory.
    #[error("cannot keep {key} in {}: {source}; see the free space and the rights there", dir.display())]
    Cache {
        /// What.
        key: Key,
        /// Where.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel does not watch the file.
    #[error("cannot watch {}: {errno}: {}", path.display(), watch_advice(*.errno))]
    Mark {
        /// Which file.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// The engine refused it.
    #[error("cannot serve {key}: {errno}; {}", open_advice(*.errno))]
    Refused {
        /// What.
        key: Key,
        /// Why not.
        errno: Errno,
    },
    /// It could not be kept over a restart, and nothing is served that is not.
    #[error("cannot keep {key} watched over a restart: {source}; raise LimitNOFILE=")]
    Unkept {
        /// What.
        key: Key,
        /// Why not.
        source: io::Error,
    },
    /// It did not answer.
    #[error("{0} was not brought in time; see whether its store can be read, and request_timeout_ms")]
    TimedOut(Key),
}

const fn watch_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EOPNOTSUPP => "its file system has no pre-content events; use a cache directory on ext4, XFS or btrfs",
        Errno::EINVAL => "this kernel has no pre-content events (Linux 6.14)",
        Errno::ENOSPC => "there are too many marks; raise fs.fanotify.max_user_marks",
        _ => "see infill doctor",
    }
}

const fn open_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::ENFILE => "fd_budget is used up; raise it, or unmount images",
        Errno::EAGAIN => "too many blobs are being opened; try again",
        _ => "the log says why",
    }
}

/// Waits for one answer of the engine. Gives a new object its length as soon as the engine knows it.
struct Waiter {
    answers: SyncSender<Outcome>,
    file: Arc<BlobFile>,
}

impl Answer for Waiter {
    fn answer(&self, _: u64, outcome: Outcome) -> io::Result<bool> {
        if let Outcome::Opened { len_bytes } = outcome {
            self.file.stretch(len_bytes)?;
        }
        // Nobody may wait any more.
        Ok(self.answers.try_send(outcome).is_ok())
    }
}

/// An open that the engine has not answered yet.
pub(super) struct Opening {
    engine: Entry,
    answer: Receiver<Outcome>,
    file: Arc<BlobFile>,
    key: Key,
}

impl Opening {
    /// Has the engine open a blob whose store was looked at.
    pub(super) fn begin(engine: &Entry, served: &Served) -> Self {
        let (answers, answer) = sync_channel(1);
        let Served { file, key, .. } = served;
        let ticket = Ticket::new(Arc::new(Waiter { answers, file: Arc::clone(file) }) as Arc<dyn Answer>, TOKEN);
        engine.open(OpenRequest { object: file.object(), key: key.clone(), ticket, sink: Arc::clone(file) as Arc<dyn Sink> });
        Self { engine: engine.clone(), answer, file: Arc::clone(file), key: key.clone() }
    }

    /// Waits until it is open.
    pub(super) fn end(self, patience: Duration) -> Result<(), AttachError> {
        let opened = wait(&self.answer, &self.key, patience).and_then(|outcome| match outcome {
            Outcome::Opened { len_bytes } if len_bytes == self.file.len_bytes() => Ok(()),
            Outcome::Failed(errno) => Err(AttachError::Refused { key: self.key.clone(), errno }),
            _ => Err(AttachError::Refused { key: self.key.clone(), errno: Errno::ESTALE }),
        });
        // It may be open all the same.
        opened.inspect_err(|_| self.engine.close(self.file.object()))
    }
}

fn wait(answer: &Receiver<Outcome>, key: &Key, patience: Duration) -> Result<Outcome, AttachError> {
    answer.recv_timeout(patience).map_err(|error| match error {
        RecvTimeoutError::Timeout => AttachError::TimedOut(key.clone()),
        RecvTimeoutError::Disconnected => AttachError::Refused { key: key.clone(), errno: Errno::ECANCELED },
    })
}

impl Blobs {
    /// Groups for so many shards, and what they serve from now on, kept in `dir`.
    ///
    /// # Errors
    /// The kernel gives no groups or watches no files there, or the directory cannot be used.
    pub fn new(dir: &Path, shards: usize) -> Result<Self, BlobsError> {
        let no_group = |errno| if errno == Errno::EPERM { BlobsError::NotPermitted } else { BlobsError::NoGroup { errno } };
        let groups = (0..shards).map(|_| Group::new().map(Arc::new)).collect::<Result<Vec<_>, _>>().map_err(no_group)?;
        let dir = dir.join(BLOBS_DIR);
        let unusable = |source| BlobsError::Dir { dir: dir.clone(), source };
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(&dir).map_err(unusable)?;
        // Verbs that mount its files may work elsewhere.
        let dir = std::fs::canonicalize(&dir).map_err(unusable)?;
        let unusable = |source| BlobsError::Dir { dir: dir.clone(), source };
        let boot_id = map::boot_id().map_err(unusable)?;
        let bag = Bag::new().map_err(BlobsError::Bag)?;
        groups[0].can_watch(&dir).map_err(unusable)?.map_err(|errno| BlobsError::NoEvents { dir: dir.clone(), errno })?;
        let (next, bag) = (AtomicU32::new(0), Mutex::new(bag));
        let blobs = Self { dir, boot_id, groups, next, served: Mutex::default(), claims: Claims::default(), bag };
        blobs.pack(&All::new()).map_err(BlobsError::Bag)?;
        Ok(blobs)
    }

    /// The sources of requests, one for each shard.
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
            None => self.make(engine, &name, key, &*blob, patience)?,
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
        let pinned = Pinned { blobs: Arc::clone(self), file };
        if whole && !pinned.file.map().is_full() {
            self.bring(engine, &pinned.file, key, blob.len_bytes(), patience)?;
        }
        Ok(pinned)
    }

    /// Opens the blob's file, and has it served if something is missing. Its name is claimed.
    fn make(&self, engine: &Entry, name: &str, key: &Key, blob: &dyn Blob, patience: Duration) -> Result<(), AttachError> {
        let object = ObjectId(self.next.fetch_add(1, Ordering::Relaxed));
        // The one whose shard owns it, if there is a group for each.
        let place = engine.owner(object) % self.groups.len();
        let failed = |source| AttachError::Cache { key: key.clone(), dir: self.dir.clone(), source };
        let file = BlobFile::open(&self.dir, name, blob.len_bytes(), &self.boot_id, &self.groups[place], object).map_err(failed)?;
        let served = Served { file: Arc::new(file), key: key.clone(), group: place, opened: true, pins: 0 };
        let file = &served.file;
        if file.map().is_full() || blob.whole_file().map_or(Ok(false), |source| file.share(source.fd.as_fd())).map_err(failed)? {
            self.served().insert(name.to_owned(), served);
            return Ok(());
        }
        Opening::begin(engine, &served).end(patience)?;
        self.watch(engine, name, served)
    }

    /// Has the kernel ask for a blob that the engine knows. From then on another process can go on with it.
    fn watch(&self, engine: &Entry, name: &str, served: Served) -> Result<(), AttachError> {
        let Served { file, key, group, .. } = &served;
        let (file, key, group) = (Arc::clone(file), key.clone(), &self.groups[*group]);
        let mut all = self.served();
        all.insert(name.to_owned(), served);
        let kept = self.pack(&all).map_err(|source| AttachError::Unkept { key, source });
        let mark = || group.mark(file.as_fd(), file.object(), file.len_bytes());
        kept.and_then(|()| mark().map_err(|errno| AttachError::Mark { path: file.path().to_owned(), errno })).inspect_err(|_| {
            file.unwatch();
            engine.close(file.object());
            all.remove(name);
            self.repack(&all);
        })
    }

    /// Brings all of a blob.
    fn bring(&self, engine: &Entry, file: &Arc<BlobFile>, key: &Key, len_bytes: u64, patience: Duration) -> Result<(), AttachError> {
        let (answers, answer) = sync_channel(1);
        let ticket = Ticket::new(Arc::new(Waiter { answers, file: Arc::clone(file) }) as Arc<dyn Answer>, TOKEN);
        engine.need(NeedRequest { object: file.object(), range: 0..len_bytes, ticket });
        match wait(&answer, key, patience)? {
            Outcome::Done => Ok(()),
            Outcome::Failed(errno) => Err(AttachError::Refused { key: key.clone(), errno }),
            Outcome::Opened { .. } => Err(AttachError::Refused { key: key.clone(), errno: Errno::EINVAL }),
        }
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
        }
        released
    }

    /// Whether the blob in the file of this name is served.
    #[must_use]
    pub fn serves(&self, name: &str) -> bool {
        self.served().contains_key(name)
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
                tracing::error!(blob = %file.path().display(), "what is in the cache cannot be noted, and would be lost by a loss of power: {error}");
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
