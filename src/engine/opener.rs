//! Answers opens. Looking a blob up may block (a slow disk, a network file system), so it happens on threads
//! of its own, never on a shard: the kernel's mount, and a limited number of its workers, wait for the answer.
//! Threads come and go with the work; one that hangs in a store holds up neither its open nor the others'.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
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
use crate::store::remembered::{Made, Remembered};
use crate::store::{Blob, LostBlob, Store};

/// Longest blob that is served, that of a file on ext4. What is known of its pages takes 1 MiB before the first
/// is read; and a sparse file may claim to be of any length.
const BLOB_BYTES_MAX: u64 = 1 << 44;
/// Unit in which the kernel makes cache files: `CACHEFILES_DIO_BLOCK_SIZE`.
const SINK_BLOCK_BYTES: u64 = 4096;

/// What an opener thread works with.
#[derive(Clone, Debug)]
pub(super) struct Opener {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Arc<dyn Store>,
    pub(super) shards: Vec<Mailbox>,
    pub(super) opens: Arc<Opens>,
    /// What was opened before, perhaps by an earlier daemon.
    pub(super) remembered: Arc<Remembered>,
}

/// How a lookup ended.
enum Found {
    /// The blob, and where its metadata is, as far as known.
    Blob(Arc<dyn Blob>, Option<ByteRange>),
    /// It may succeed later; why not now.
    Later(String, Errno),
    Never(Errno),
}

/// What a blob is to the object that is opened. With the length that the kernel is to be told.
enum Recognised {
    /// What it was made of before.
    Known(u64),
    /// What it is made of from now on, which was noted.
    New(u64),
    /// Not what it was made of.
    Replaced(u64),
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
                if ended {
                    self.fail(pending, Errno::ECANCELED);
                    continue;
                }
                let (key, store) = (&pending.open.key, self.store.name());
                self.complain(|| {
                    format!("the lookup of {key} takes longer than open_timeout_ms: its mount or its reads fail; see whether {store} can be read")
                });
                self.fail(pending, Errno::ETIMEDOUT);
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
            Recognised::Known(len_bytes) => self.adopt(pending, blob, len_bytes, metadata),
            Recognised::New(len_bytes) => {
                self.adopt(pending, blob, len_bytes, metadata);
                // The mount does not wait for it: an object that was just made has no bytes that could be taken for others.
                self.remembered.sync();
            }
            Recognised::Replaced(len_bytes) => {
                let key = &pending.open.key;
                self.complain(|| format!("the blob {key} was replaced while its image is mounted: what is not cached of it gives I/O errors; mount the image anew"));
                self.adopt(pending, Arc::new(LostBlob { len_bytes }), len_bytes, None);
            }
        }
    }

    /// Whether a blob is what its object was made of, if that is opened again; a new object takes what there is. Other
    /// bytes must not come beside those that are cached, also if they were cached when the image was mounted before.
    fn recognise(&self, open: &OpenRequest, blob: &dyn Blob) -> Recognised {
        static SAID: Once = Once::new();
        let (key, identity) = (&open.key, blob.identity());
        let before = self.remembered.get(key);
        if let Some(len_bytes) = known_len(open.sink.as_fd()) {
            return match before {
                Some(before) if before.identity == identity => Recognised::Known(before.told_bytes),
                Some(before) => Recognised::Replaced(before.told_bytes),
                None if align_up(identity.len_bytes, SINK_BLOCK_BYTES) != align_up(len_bytes, SINK_BLOCK_BYTES) => {
                    Recognised::Replaced(len_bytes)
                }
                None => {
                    SAID.call_once(|| {
                        tracing::warn!("nothing is noted of {key} and perhaps other blobs of mounted images: only by their lengths they are known to be what they were");
                    });
                    self.note(key, &Made::anew(identity, None))
                }
            };
        }
        let made = Made::anew(identity, before.as_ref());
        let is_other = before.is_some_and(|before| before.identity != made.identity);
        let noted = self.note(key, &made);
        if is_other {
            tracing::info!("the blob {key} was replaced since it was mounted last: what the cache has of the old one is not used");
            // Before the kernel hears of it: what is noted must be no older than what is in the cache.
            self.remembered.sync();
        }
        noted
    }

    fn note(&self, key: &Key, made: &Made) -> Recognised {
        if self.remembered.note(key, made) { Recognised::New(made.told_bytes) } else { Recognised::Known(made.told_bytes) }
    }

    /// Opens an object: its shard serves it from `blob`, and the kernel is told that it is `len_bytes` long.
    fn adopt(&self, pending: Pending, blob: Arc<dyn Blob>, len_bytes: u64, metadata: Option<ByteRange>) {
        let Pending { open: OpenRequest { object, key, ticket, sink }, mut charge, .. } = pending;
        charge.set(1 + blob.files().len() as u64);
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
        let known_len_bytes = known_len(pending.open.sink.as_fd()).filter(|_| !self.ends(errno));
        let Some(known_len_bytes) = known_len_bytes else { return self.refuse(pending.open.ticket, errno) };
        let len_bytes = self.remembered.get(&pending.open.key).map_or(known_len_bytes, |before| before.told_bytes);
        self.adopt(pending, Arc::new(LostBlob { len_bytes }), len_bytes, None);
    }

    /// Whether an open that fails with `errno` fails because the engine ends, or while it does: a refusal is final, and the
    /// next daemon may find what this one had no time to look for.
    fn ends(&self, errno: Errno) -> bool {
        errno == Errno::ECANCELED || self.shared.stopping.load(Ordering::Acquire)
    }

    fn refuse(&self, ticket: Ticket, errno: Errno) {
        if self.ends(errno) && self.shared.leaves_rest() {
            return ticket.leave();
        }
        Shared::count(&self.shared.opens_failed);
        if let Err(error) = ticket.answer(Outcome::Failed(errno)) {
            self.complain(|| format!("the kernel did not take the refusal of an open: {error}"));
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
