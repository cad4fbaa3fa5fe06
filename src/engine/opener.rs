//! Answers opens. Looking a blob up may block (a slow disk, a network file system), so it happens on threads
//! of its own, never on a shard: the kernel's mount, and a limited number of its workers, wait for the answer.
//! Threads come and go with the work; one that hangs in a store holds up neither its open nor the others'.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::thread::Builder;
use std::time::Duration;

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
/// Pieces of a sink that are looked at when it is opened; one that lies in more of them is known in part.
const EXTENTS_MAX: usize = 1024;
/// How long what was noted of blobs may be lost by a loss of power, while opens come without end; else it lasts when the
/// threads that looked them up have nothing left to do. No mount waits for the disk because of it.
const SYNC_PAUSE: Duration = Duration::from_secs(1);

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
            self.remembered.sync(SYNC_PAUSE);
            self.opens.ready();
        }
        self.remembered.sync(Duration::ZERO);
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
            Ok(len_bytes) => self.adopt(pending, blob, len_bytes, metadata),
            Err(len_bytes) => {
                let key = &pending.open.key;
                self.complain(|| format!("the blob {key} was replaced while its image is mounted: what is not cached of it gives I/O errors; mount the image anew"));
                self.adopt(pending, Arc::new(LostBlob { len_bytes }), len_bytes, None);
            }
        }
    }

    /// Whether a blob is what its object was made of, if that is opened again; a new object takes what there is. Other bytes
    /// must not come beside those that are cached, also if they were cached when the image was mounted before. Gives the
    /// length that the kernel is to be told, either way.
    fn recognise(&self, open: &OpenRequest, blob: &dyn Blob) -> Result<u64, u64> {
        static SAID: Once = Once::new();
        let (key, identity) = (&open.key, blob.identity());
        let before = self.remembered.get(key);
        if let Some(len_bytes) = known_len(open.sink.as_fd()) {
            match before {
                Some(before) if before.identity == identity => return Ok(before.told_bytes),
                Some(before) => return Err(before.told_bytes),
                None if align_up(identity.len_bytes, SINK_BLOCK_BYTES) != align_up(len_bytes, SINK_BLOCK_BYTES) => return Err(len_bytes),
                None => SAID.call_once(|| {
                    tracing::warn!("nothing is noted of {key} and perhaps other blobs of mounted images: only by their lengths they are known to be what they were");
                }),
            }
        }
        let made = Made::anew(identity, before.as_ref());
        self.remembered.note(key, &made);
        if before.is_some_and(|before| before.identity != made.identity) {
            tracing::info!("the blob {key} was replaced since it was mounted last: what the cache has of the old one is not used");
            // Before the kernel hears of it: what is noted must be no older than what is in the cache.
            self.remembered.sync(Duration::ZERO);
        }
        Ok(made.told_bytes)
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
        let (stats, again) = self.shared.objects.open(&key, len_bytes, blob.device());
        if again {
            Shared::count(&self.shared.reopens);
        }
        // The shard is told by sinks that know.
        stats.holds(data_bytes(sink.as_fd()));
        let adopted = Adopted { object, key: Arc::new(key), blob, metadata, sink, stats, charge };
        if let Err(message) = shard.send(Message::Adopt(adopted)) {
            self.refuse(ticket, Errno::ECANCELED);
            return drop(message);
        }
        match ticket.answer(Outcome::Opened { len_bytes }) {
            Ok(true) => {
                tracing::debug!(%object, len_bytes, "opened");
                Shared::count(&self.shared.opens_ok);
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

/// How much of a sink is data, for operators: as far as a limited number of looks tells.
fn data_bytes(sink: BorrowedFd<'_>) -> u64 {
    let (mut at, mut data) = (0, 0);
    for _ in 0..EXTENTS_MAX {
        let Ok(start) = lseek(sink, at, Whence::SeekData) else { break };
        let Ok(end) = lseek(sink, start, Whence::SeekHole) else { break };
        (at, data) = (end, data + u64::try_from(end - start).unwrap_or(0));
    }
    data
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::clock::Clock;
    use super::super::fds::Budget;
    use super::super::mailbox::Inbox;
    use super::*;
    use crate::front::{Answer, ObjectId};
    use crate::store::Stores;

    #[derive(Default)]
    struct Answers(Mutex<Vec<Outcome>>);

    impl Answer for Answers {
        fn answer(&self, _: u64, outcome: Outcome) -> std::io::Result<bool> {
            self.0.lock().unwrap().push(outcome);
            Ok(true)
        }
    }

    /// An open whose lookup took too long; of an object that was open before, so that its image is mounted. How it ends
    /// while the engine runs, while it stops, and while it stops and somebody keeps the kernel's interface.
    #[test]
    fn an_open_that_fails_while_the_engine_stops_is_left_to_the_next_daemon() {
        let lost = Outcome::Opened { len_bytes: 8192 };
        for (stopping, kept, expected) in
            [(false, true, Some(lost)), (true, false, Some(Outcome::Failed(Errno::ETIMEDOUT))), (true, true, None)]
        {
            let (mailbox, mut inbox) = Inbox::pair().unwrap();
            let budget = Budget::new(100, false);
            let shared = Shared::new(Clock::start(), vec![Arc::clone(mailbox.bell())], Arc::clone(&budget)).unwrap();
            shared.stopping.store(stopping, Ordering::Release);
            shared.leaves_rest.store(kept, Ordering::Release);
            let opener = Opener {
                shared: Arc::new(shared),
                store: Arc::new(Stores::new(Vec::new())),
                shards: vec![mailbox],
                opens: Arc::new(Opens::new(Duration::from_secs(1))),
                remembered: Arc::default(),
            };
            let answers = Arc::<Answers>::default();
            let sink = tempfile::tempfile().unwrap();
            sink.set_len(8192).unwrap();
            let ticket = Ticket::new(Arc::clone(&answers) as Arc<dyn Answer>, 1);
            let open = OpenRequest { object: ObjectId(7), key: Key::new(b"dom", b"blob"), ticket, sink: Arc::new(sink) };
            opener.opens.push(open, budget.charge_open()).unwrap();
            let (place, _) = opener.opens.take().unwrap();
            opener.fail(opener.opens.give_back(place).unwrap(), Errno::ETIMEDOUT);
            assert_eq!(*answers.0.lock().unwrap(), Vec::from_iter(expected), "stopping {stopping}, kept {kept}");
            assert_eq!(inbox.take().is_some(), !stopping, "an object is adopted only as long as it will be served");
        }
    }
}
