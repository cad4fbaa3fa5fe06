//! Answers opens. Looking a blob up may block (a slow disk, a network file system), so it happens on threads
//! of its own, never on a shard: the kernel's mount, and a limited number of its workers, wait for the answer.

use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Shared;
use super::mailbox::{Adopted, Mailbox, Message};
use super::router::owner;
use crate::front::{OpenRequest, Outcome};
use crate::key::Key;
use crate::store::{Blob, Store, StoreError};

/// Threads that answer opens.
pub(super) const OPENERS: usize = 4;
/// Opens that may wait for one of them.
pub(super) const OPENS_MAX: usize = 1024;
/// Longest blob that is served, that of a file on ext4. What is known of its pages takes 1 MiB before the first
/// is read; and a sparse file may claim to be of any length.
const BLOB_BYTES_MAX: u64 = 1 << 44;
/// Pause before a lookup that failed for a passing reason is tried again; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// What an opener thread works with.
#[derive(Clone, Debug)]
pub(super) struct Opener {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Arc<dyn Store>,
    pub(super) shards: Vec<Mailbox>,
    pub(super) queue: Arc<Mutex<Receiver<OpenRequest>>>,
    /// How long a lookup that may succeed later is tried. A failed open is final for the kernel.
    pub(super) open_timeout: Duration,
}

impl Opener {
    /// Answers opens until the queue is closed.
    pub(super) fn run(&self) {
        loop {
            let next = self.queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(open) = next else { return };
            self.open(open);
        }
    }

    fn open(&self, open: OpenRequest) {
        let OpenRequest { object, key, ticket, sink } = open;
        let blob = match self.look_up(&key) {
            Ok(blob) => blob,
            // `sink` is closed after the answer, as the kernel wants it.
            Err(errno) => return self.refuse(ticket, errno),
        };
        let len_bytes = blob.len_bytes();
        let shard = &self.shards[owner(object, self.shards.len())];
        // Open until the kernel has its answer, whatever becomes of the shard: an answer that finds the descriptor
        // closed fails the open.
        let _open = Arc::clone(&sink);
        // The shard must know the object before the kernel hears that it is open: its requests follow at once.
        let adopted = Adopted { object, key: Arc::new(key), blob, sink };
        if let Err(message) = shard.send(Message::Adopt(adopted)) {
            self.refuse(ticket, Errno::ECANCELED);
            return drop(message);
        }
        match ticket.answer(Outcome::Opened { len_bytes }) {
            Ok(true) => tracing::debug!(%object, len_bytes, "opened"),
            Ok(false) => drop(shard.send(Message::Close(object))),
            Err(error) => {
                tracing::error!(%object, "the kernel refused the answer to an open: {error}");
                drop(shard.send(Message::Close(object)));
            }
        }
    }

    fn refuse(&self, ticket: crate::front::Ticket, errno: Errno) {
        // A refusal is final, and the next daemon may find what this one had no time to look for.
        if self.shared.stopping.load(Ordering::Acquire) && self.shared.leaves_rest() {
            return ticket.leave();
        }
        Shared::count(&self.shared.opens_failed);
        if let Err(error) = ticket.answer(Outcome::Failed(errno))
            && self.shared.may_log_failure()
        {
            tracing::error!("the kernel did not take the refusal of an open: {error}");
        }
        // The kernel opens an object that was open before again and again, as long as somebody reads it, but wakes
        // nobody for that. The receiving shard looks by itself once a second, which is often enough for such tries.
    }

    /// Finds a blob, trying again while that may help: the kernel does not ask twice.
    fn look_up(&self, key: &Key) -> Result<Arc<dyn Blob>, Errno> {
        let started = Instant::now();
        let mut pause = PAUSE_MIN;
        loop {
            let error = match self.store.open(key) {
                Ok(Some(blob)) if blob.len_bytes() > BLOB_BYTES_MAX => {
                    if self.shared.may_log_failure() {
                        tracing::error!(
                            "the blob {key} has {} bytes, and {BLOB_BYTES_MAX} is the most; its mount or its reads fail",
                            blob.len_bytes()
                        );
                    }
                    return Err(Errno::EFBIG);
                }
                Ok(Some(blob)) => {
                    tracing::info!("serving {key} ({} bytes)", blob.len_bytes());
                    return Ok(blob);
                }
                Ok(None) => {
                    if self.shared.may_log_failure() {
                        tracing::warn!("no store has the blob {key}: its mount or its reads fail; looked in {}", self.store.name());
                    }
                    return Err(Errno::ENOENT);
                }
                Err(error) => error,
            };
            if !self.worth_waiting(&error, started) {
                if self.shared.may_log_failure() {
                    tracing::error!("{error}; its mount or its reads fail");
                }
                return Err(error.errno());
            }
            tracing::warn!("{error}; trying again in {} ms", pause.as_millis());
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn worth_waiting(&self, error: &StoreError, started: Instant) -> bool {
        error.is_transient() && started.elapsed() < self.open_timeout && !self.shared.stopping.load(Ordering::Relaxed)
    }
}
