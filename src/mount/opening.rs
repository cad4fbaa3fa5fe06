//! Opening a blob at the engine, and waiting for it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use nix::errno::Errno;

use super::blobs::Served;
use super::error::AttachError;
use crate::engine::Entry;
use crate::front::fanotify::BlobFile;
use crate::front::{Answer, NeedRequest, OpenRequest, Outcome, Sink, Ticket};
use crate::key::Key;
use crate::range::ByteRange;

/// Name of the two answers that a blob waits for.
const TOKEN: u64 = 0;

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

/// Brings a range of a blob.
pub(super) fn bring(engine: &Entry, file: &Arc<BlobFile>, key: &Key, range: ByteRange, patience: Duration) -> Result<(), AttachError> {
    let (answers, answer) = sync_channel(1);
    let ticket = Ticket::new(Arc::new(Waiter { answers, file: Arc::clone(file) }) as Arc<dyn Answer>, TOKEN);
    engine.need(NeedRequest { object: file.object(), range, ticket });
    match wait(&answer, key, patience)? {
        Outcome::Done => Ok(()),
        Outcome::Failed(errno) => Err(AttachError::Refused { key: key.clone(), errno }),
        Outcome::Opened { .. } => Err(AttachError::Refused { key: key.clone(), errno: Errno::EINVAL }),
    }
}
