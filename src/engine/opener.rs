//! Answers opens. Looking a blob up may block (a slow disk, a network file system), so it happens on threads
//! of its own, never on a shard: the kernel's mount, and a limited number of its workers, wait for the answer.
//! Threads come and go with the work; one that hangs in a store holds up neither its open nor the others'.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use nix::errno::Errno;

use super::mailbox::{Adopted, Mailbox, Message};
use super::opens::{News, Opens, Pending};
use super::router::owner;
use super::{EngineError, Shared};
use crate::front::{OpenRequest, Outcome, Ticket};
use crate::key::Key;
use crate::store::{Blob, LostBlob, Store};

/// Longest blob that is served, that of a file on ext4. What is known of its pages takes 1 MiB before the first
/// is read; and a sparse file may claim to be of any length.
const BLOB_BYTES_MAX: u64 = 1 << 44;
/// Blobs whose length is remembered after they were opened.
const REMEMBERED_MAX: usize = 65_536;

/// What an opener thread works with.
#[derive(Clone, Debug)]
pub(super) struct Opener {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Arc<dyn Store>,
    pub(super) shards: Vec<Mailbox>,
    pub(super) opens: Arc<Opens>,
    /// Lengths of blobs that were opened before.
    pub(super) remembered: Arc<Mutex<HashMap<Key, u64>>>,
}

/// How a lookup ended.
enum Found {
    Blob(Arc<dyn Blob>),
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
                self.refuse(pending.open.ticket, errno);
            }
            if ended {
                return;
            }
            for _ in 0..threads {
                let opener = self.clone();
                if let Err(error) = Builder::new().name("infill-open".into()).spawn(move || opener.run()) {
                    self.opens.not_started(1);
                    tracing::error!("cannot start a thread to look blobs up, mounts may fail: {error}; see TasksMax= and ulimit -u");
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
            Found::Blob(blob) => self.open(pending, blob),
            Found::Never(errno) => self.refuse(pending.open.ticket, errno),
            Found::Later(why, errno) => match self.opens.again(pending) {
                None => tracing::warn!("{why}; trying again"),
                Some(pending) => {
                    if self.shared.may_log_failure() {
                        tracing::error!("{why}; its mount or its reads fail");
                    }
                    self.refuse(pending.open.ticket, errno);
                }
            },
        }
    }

    fn open(&self, pending: Pending, blob: Arc<dyn Blob>) {
        let Pending { open: OpenRequest { object, key, ticket, sink }, mut charge, .. } = pending;
        charge.set(1 + blob.files().len() as u64);
        let len_bytes = blob.len_bytes();
        self.remember(&key, len_bytes);
        let shard = &self.shards[owner(object, self.shards.len())];
        // The shard must know the object before the kernel hears that it is open: its requests follow at once.
        let adopted = Adopted { object, key: Arc::new(key), blob, sink, charge };
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

    fn refuse(&self, ticket: Ticket, errno: Errno) {
        Shared::count(&self.shared.opens_failed);
        if let Err(error) = ticket.answer(Outcome::Failed(errno))
            && self.shared.may_log_failure()
        {
            tracing::error!("the kernel did not take the refusal of an open: {error}");
        }
    }

    fn remember(&self, key: &Key, len_bytes: u64) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() < REMEMBERED_MAX || remembered.contains_key(key) {
            remembered.insert(key.clone(), len_bytes);
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
                Found::Blob(blob)
            }
            Ok(None) => self.is_gone(key),
            Err(error) if error.is_transient() => Found::Later(error.to_string(), error.errno()),
            Err(error) => {
                self.complain(|| format!("{error}; its mount or its reads fail"));
                Found::Never(error.errno())
            }
        }
    }

    /// No store has it. If it was served before, its image is probably still mounted, and the kernel opens the
    /// object again because somebody reads it; it would do so for ever if it were refused, and the reader would
    /// wait for ever. So it is opened, what the cache has of it stays readable, and the rest fails.
    fn is_gone(&self, key: &Key) -> Found {
        let len_bytes = self.remembered.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied();
        self.complain(|| match len_bytes {
            Some(_) => format!("the blob {key} was served and is gone: what is not cached of it gives I/O errors; put it back into {} and mount its image anew", self.store.name()),
            None => format!("no store has the blob {key}: its mount or its reads fail; looked in {}", self.store.name()),
        });
        len_bytes.map_or(Found::Never(Errno::ENOENT), |len_bytes| Found::Blob(Arc::new(LostBlob { len_bytes })))
    }

    fn complain(&self, what: impl Fn() -> String) {
        if self.shared.may_log_failure() {
            tracing::error!("{}", what());
        }
    }
}
