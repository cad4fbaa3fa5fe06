//! Takes requests from the front end and hands each to who does it: needs and closes to the shard that owns
//! the object, opens to the [`super::opener`]. One shard does this, because the kernel wakes everyone who
//! waits for its requests.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};

use super::mailbox::{Mailbox, Message};
use super::{Shared, clock::Clock};
use crate::front::{FrontEnd, FrontError, ObjectId, OpenRequest, Outcome, Request};
use nix::errno::Errno;

/// Requests read in one turn; completions of earlier ones are looked at in between.
const REQUESTS_PER_TURN: u32 = 256;
/// Requests for data that may wait for their answer at a time. Beyond it nothing is read from the kernel,
/// which keeps what comes; opens and closes wait then too, so it is far above what readers reach.
const PENDING_MAX: u64 = 65_536;

/// Which shard owns an object. The kernel counts ids up, so neighbours spread.
pub(super) const fn owner(object: ObjectId, shards: usize) -> usize {
    object.0 as usize % shards
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Router {
    shared: Arc<Shared>,
    clock: Clock,
    shards: Vec<Mailbox>,
    openers: SyncSender<OpenRequest>,
    /// What found its receiver's queue full; nothing else is read before it is delivered.
    held: Option<Held>,
    /// The kernel may have more.
    more: bool,
}

#[derive(Debug)]
enum Held {
    Open(OpenRequest),
    Message(usize, Message),
}

impl Router {
    pub(super) const fn new(shared: Arc<Shared>, clock: Clock, shards: Vec<Mailbox>, openers: SyncSender<OpenRequest>) -> Self {
        Self { shared, clock, shards, openers, held: None, more: true }
    }

    /// The kernel may have requests.
    pub(super) const fn notice(&mut self) {
        self.more = true;
    }

    /// Whether it wants to run again without waiting for anything.
    pub(super) const fn is_busy(&self) -> bool {
        self.more || self.held.is_some()
    }

    /// Reads requests until there are none, a limit is reached, or a queue is full. `own` gets those for
    /// shard 0, on which this runs.
    ///
    /// # Errors
    /// The front end is broken.
    pub(super) fn drain(&mut self, front: &dyn FrontEnd, own: &mut dyn FnMut(Message)) -> Result<(), FrontError> {
        if let Some(held) = self.held.take() {
            self.deliver(held, own);
        }
        let mut left = REQUESTS_PER_TURN;
        while self.held.is_none() && self.more && left > 0 && self.has_room() {
            left -= 1;
            match front.next() {
                Ok(None) => self.more = false,
                Ok(Some(request)) => self.route(request, own),
                Err(FrontError::Malformed(what)) => {
                    Shared::count(&self.shared.malformed);
                    tracing::warn!("ignored a malformed message from the kernel: {what}");
                }
                Err(error @ FrontError::OutOfDescriptors(_)) => {
                    Shared::count(&self.shared.opens);
                    Shared::count(&self.shared.opens_failed);
                    tracing::error!("{error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Answers what it still holds, when the engine stops.
    pub(super) fn give_up(&mut self) {
        let ticket = match self.held.take() {
            Some(Held::Open(open)) => open.ticket,
            Some(Held::Message(_, Message::Need(need, _))) => need.ticket,
            _ => return,
        };
        // The engine ends: a refusal by the kernel changes nothing.
        let _ = ticket.answer(Outcome::Failed(Errno::ECANCELED));
    }

    fn has_room(&self) -> bool {
        self.shared.shards.iter().map(super::stats::ShardStats::pending).sum::<u64>() < PENDING_MAX
    }

    fn route(&mut self, request: Request, own: &mut dyn FnMut(Message)) {
        let held = match request {
            Request::Open(open) => {
                Shared::count(&self.shared.opens);
                Held::Open(open)
            }
            Request::Need(need) => Held::Message(owner(need.object, self.shards.len()), Message::Need(need, self.clock.now_ns())),
            Request::Close(object) => {
                Shared::count(&self.shared.closes);
                Held::Message(owner(object, self.shards.len()), Message::Close(object))
            }
        };
        self.deliver(held, own);
    }

    fn deliver(&mut self, held: Held, own: &mut dyn FnMut(Message)) {
        self.held = match held {
            Held::Open(open) => match self.openers.try_send(open) {
                Ok(()) => None,
                Err(TrySendError::Full(open) | TrySendError::Disconnected(open)) => Some(Held::Open(open)),
            },
            Held::Message(0, message) => {
                own(message);
                None
            }
            Held::Message(shard, message) => self.shards[shard].try_send(message).err().map(|message| Held::Message(shard, message)),
        };
    }
}
