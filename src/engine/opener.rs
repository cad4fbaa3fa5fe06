//! Answers opens. Looking a blob up may block (a slow disk, a network file system), so it happens on threads
//! of its own, never on a shard: the kernel's mount, and a limited number of its workers, wait for the answer.
//! Threads come and go with the work; one that hangs in a store holds up neither its open nor the others'.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::mailbox::{Adopted, Mailbox, Message};
use super::metadata;
use super::opens::{News, Opens, Pending};
use super::router::owner;
use super::{EngineError, Shared};
use crate::front::{OpenRequest, Outcome, Ticket};
use crate::key::Key;
use crate::range::{ByteRange, align_up};
use crate::store::{Blob, Identity, LostBlob, Store};

/// Longest blob that is served, that of a file on ext4. What is known of its pages takes 1 MiB before the first
/// is read; and a sparse file may claim to be of any length.
const BLOB_BYTES_MAX: u64 = 1 << 44;
/// Unit in which the kernel makes cache files: `CACHEFILES_DIO_BLOCK_SIZE`.
const SINK_BLOCK_BYTES: u64 = 4096;
/// Blobs that are remembered after they were opened.
const REMEMBERED_MAX: usize = 65_536;

/// What an opener thread works with.
#[derive(Clone, Debug)]
pub(super) struct Opener {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Arc<dyn Store>,
    pub(super) shards: Vec<Mailbox>,
    pub(super) opens: Arc<Opens>,
    /// What was opened before, by key.
    pub(super) remembered: Arc<Mutex<HashMap<Key, Identity>>>,
}

/// How a lookup ended.
enum Found {
    /// The blob, and where its metadata is, as far as known.
    Blob(Arc<dyn Blob>, Option<ByteRange>),
    /// It may succeed later; why not now.
    Later(String, Errno),
    Never(Errno),
}

impl Opener {
    /// Starts the thread that watches over opens and starts the others.
    ///
    /// # Errors
    /// No thread could be had.
    pub(super) fn start(self) -> Result<(), EngineError> {
        Builder::new().name("infill-opens".into()).spawn(move || self.watch()).map(drop).map_err(EngineError::Resources)
    }

    fn watch(&self) {
        loop {
            let News { overdue, threads, ended } = self.opens.watch();
            for pending in overdue {
                let errno = if ended { Errno::ECANCELED } else { Errno::ETIMEDOUT };
                if !ended && self.shared.may_log_failure() {
                    let key = &pending.open.key;
                    tracing::error!(
                        "the lookup of {key} takes longer than open_timeout_ms: its mount or its reads fail; see whether {} can be read",
                        self.store.name()
                    );
                }
                self.fail(pending, errno);
            }
            if ended {
                return;
            }
            for _ in 0..threads {
                let opener = self.clone();
                if let Err(error) = Builder::new().name("infill-open".into()).spawn(move || opener.run()) {
                    self.opens.not_started();
                    self.complain(|| {
                        format!("cannot start a thread to look blobs up, mounts may fail: {error}; see TasksMax= and ulimit -u")
                    });
                }
            }
        }
    }

    /// Looks blobs up as long as there is something to do.
    fn run(&self) {
        while let Some((place, key)) = self.opens.take() {
            let found = self.look_up(&key);
            // Refused meanwhile: then nobody wants what was found.
            if let Some(pending) = self.opens.give_back(place) {
                self.finish(pending, found);
            }
        }
    }

    fn finish(&self, pending: Pending, found: Found) {
        match found {
            Found::Blob(blob, metadata) => self.open(pending, blob, metadata),
            Found::Never(errno) => self.fail(pending, errno),
            Found::Later(why, errno) => match self.opens.again(pending) {
                None => tracing::warn!("{why}; trying again"),
                Some(pending) => {
                    self.complain(|| format!("{why}; its mount or its reads fail"));
                    self.fail(pending, errno);
                }
            },
        }
    }

    fn open(&self, pending: Pending, blob: Arc<dyn Blob>, metadata: Option<ByteRange>) {
        match self.recognise(&pending.open, &*blob) {
            Ok(()) => self.adopt(pending, blob, metadata),
            Err(len_bytes) => {
                let key = &pending.open.key;
                self.complain(|| format!("the blob {key} was replaced while its image is mounted: what is not cached of it gives I/O errors; mount the image anew"));
                self.adopt(pending, Arc::new(LostBlob { len_bytes }), None);
            }
        }
    }

    /// Whether a blob is what its object was made of, if that is opened again; a new object takes what there is. If it
    /// is not: how long the object is. Other bytes must not come beside those that are cached.
    fn recognise(&self, open: &OpenRequest, blob: &dyn Blob) -> Result<(), u64> {
        let identity = blob.identity();
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        match (known_len(open.sink.as_fd()), remembered.get(&open.key)) {
            (Some(_), Some(before)) if *before != identity => return Err(before.len_bytes),
            // Served by an earlier daemon, which knew no more than this.
            (Some(len_bytes), None) if align_up(identity.len_bytes, SINK_BLOCK_BYTES) != align_up(len_bytes, SINK_BLOCK_BYTES) => {
                return Err(len_bytes);
            }
            _ => {}
        }
        if remembered.len() < REMEMBERED_MAX || remembered.contains_key(&open.key) {
            remembered.insert(open.key.clone(), identity);
        }
        Ok(())
    }

    fn adopt(&self, pending: Pending, blob: Arc<dyn Blob>, metadata: Option<ByteRange>) {
        let Pending { open: OpenRequest { object, key, ticket, sink }, mut charge, .. } = pending;
        charge.set(1 + blob.files().len() as u64);
        let len_bytes = blob.len_bytes();
        let shard = &self.shards[owner(object, self.shards.len())];
        // Open until the kernel has its answer, whatever becomes of the shard: an answer that finds the descriptor
        // closed fails the open.
        let _open = Arc::clone(&sink);
        // The shard must know the object before the kernel hears that it is open: its requests follow at once.
        let adopted = Adopted { object, key: Arc::new(key), blob, metadata, sink, charge };
        if let Err(message) = shard.send(Message::Adopt(adopted)) {
            self.refuse(ticket, Errno::ECANCELED);
            return drop(message);
        }
        match ticket.answer(Outcome::Opened { len_bytes }) {
            Ok(true) => {
                tracing::debug!(%object, len_bytes, "opened");
                drop(shard.send(Message::Opened(object)));
            }
            Ok(false) => drop(shard.send(Message::Close(object))),
            Err(error) => {
                tracing::error!(%object, "the kernel refused the answer to an open: {error}");
                drop(shard.send(Message::Close(object)));
            }
        }
    }

    /// Fails an open. If its object was open before, its image is mounted and somebody reads it: the kernel would open it
    /// again and again if it were refused, and the reader would wait for ever. So it is opened, what the cache has of it
    /// stays readable, and the rest fails; after each failure it is closed, so that the next reader tries anew.
    fn fail(&self, pending: Pending, errno: Errno) {
        let Some(known_len_bytes) = known_len(pending.open.sink.as_fd()).filter(|_| errno != Errno::ECANCELED) else {
            return self.refuse(pending.open.ticket, errno);
        };
        let remembered =
            self.remembered.lock().unwrap_or_else(PoisonError::into_inner).get(&pending.open.key).map(|before| before.len_bytes);
        let len_bytes = remembered.unwrap_or(known_len_bytes);
        self.adopt(pending, Arc::new(LostBlob { len_bytes }), None);
    }

    fn refuse(&self, ticket: Ticket, errno: Errno) {
        // A refusal is final, and the next daemon may find what this one had no time to look for.
        let ends = errno == Errno::ECANCELED || self.shared.stopping.load(Ordering::Acquire);
        if ends && self.shared.leaves_rest() {
            return ticket.leave();
        }
        Shared::count(&self.shared.opens_failed);
        if let Err(error) = ticket.answer(Outcome::Failed(errno))
            && self.shared.may_log_failure()
        {
            tracing::error!("the kernel did not take the refusal of an open: {error}");
        }
    }

    fn look_up(&self, key: &Key) -> Found {
        match self.store.open(key) {
            Ok(Some(blob)) if blob.len_bytes() > BLOB_BYTES_MAX => {
                self.complain(|| {
                    format!("the blob {key} has {} bytes, and {BLOB_BYTES_MAX} is the most; its mount or its reads fail", blob.len_bytes())
                });
                Found::Never(Errno::EFBIG)
            }
            Ok(Some(blob)) => {
                tracing::info!("serving {key} ({} bytes)", blob.len_bytes());
                // Within the time of the open: this reads, and may hang.
                let metadata = metadata::of(&*blob);
                Found::Blob(blob, metadata)
            }
            Ok(None) => {
                self.complain(|| format!("no store has the blob {key}: its mount or its reads fail; looked in {}", self.store.name()));
                Found::Never(Errno::ENOENT)
            }
            Err(error) if error.is_transient() => Found::Later(error.to_string(), error.errno()),
            Err(error) => {
                self.complain(|| format!("{error}; its mount or its reads fail"));
                Found::Never(error.errno())
            }
        }
    }

    fn complain(&self, what: impl Fn() -> String) {
        if self.shared.may_log_failure() {
            tracing::error!("{}", what());
        }
    }
}

/// The length of an object that was open before, rounded up to what its sink is made of. One that is opened for the
/// first time has no file yet (`cachefiles_ondemand_fd_llseek`, fs/cachefiles/ondemand.c: `ENOBUFS`).
fn known_len(sink: BorrowedFd<'_>) -> Option<u64> {
    let len_bytes = lseek(sink, 0, Whence::SeekEnd).ok()?;
    u64::try_from(len_bytes).ok().filter(|len_bytes| *len_bytes > 0)
}
