//! Takes requests from the front end and hands each to who does it: needs and closes to the shard that owns
//! the object, opens to the [`super::opener`]. One shard does this, because the kernel wakes everyone who
//! waits for its requests.

use std::sync::Arc;
use std::time::Duration;

use super::mailbox::{Mailbox, Message};
use super::opens::Opens;
use super::{Shared, clock::Clock};
use crate::front::{FrontEnd, FrontError, ObjectId, OpenRequest, Outcome, Request};
use nix::errno::Errno;

/// Requests read in one turn; completions of earlier ones are looked at in between.
const REQUESTS_PER_TURN: u32 = 256;
/// Requests for data that may wait for their answer at a time. Beyond it nothing is read from the kernel,
/// which keeps what comes; opens and closes wait then too, so it is far above what readers reach.
const PENDING_MAX: u64 = 65_536;

/// Pause while there is no room for what comes next. Nobody says when there is; but a shard that is behind
/// needs its core, and this one may share it.
const FULL_PAUSE: Duration = Duration::from_millis(1);

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
    opens: Arc<Opens>,
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
    pub(super) const fn new(shared: Arc<Shared>, clock: Clock, shards: Vec<Mailbox>, opens: Arc<Opens>) -> Self {
        Self { shared, clock, shards, opens, held: None, more: true }
    }

    /// The kernel may have requests.
    pub(super) const fn notice(&mut self) {
        self.more = true;
    }

    /// After which time it wants to run again, whatever happens; `None`: when the kernel has something.
    pub(super) fn next_turn(&self) -> Option<Duration> {
        match (&self.held, self.more) {
            (None, false) => None,
            (None, true) if self.has_room() => Some(Duration::ZERO),
            _ => Some(FULL_PAUSE),
        }
    }

    /// Reads requests until there are none, a limit is reached, or a queue is full. Those for the shard on
    /// which this runs go through its mailbox too: only so does a request find the object that an opener put
    /// there just before it told the kernel that it is open.
    ///
    /// # Errors
    /// The front end is broken.
    pub(super) fn drain(&mut self, front: &dyn FrontEnd) -> Result<(), FrontError> {
        if let Some(held) = self.held.take() {
            self.deliver(held);
        }
        // Once a turn: it looks at memory that every shard writes.
        let mut left = if self.has_room() { REQUESTS_PER_TURN } else { 0 };
        while self.held.is_none() && self.more && left > 0 {
            left -= 1;
            match front.next() {
                Ok(None) => self.more = false,
                Ok(Some(request)) => self.route(request),
                Err(FrontError::Malformed(what)) => {
                    Shared::count(&self.shared.malformed);
                    if self.shared.may_log_failure() {
                        tracing::warn!("ignored a malformed message from the kernel: {what}");
                    }
                }
                Err(error @ FrontError::OutOfDescriptors(_)) => {
                    Shared::count(&self.shared.opens);
                    Shared::count(&self.shared.opens_failed);
                    if self.shared.may_log_failure() {
                        tracing::error!("{error}");
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Answers what it still holds, or leaves it, when the engine stops.
    pub(super) fn give_up(&mut self) {
        self.opens.end();
        let ticket = match self.held.take() {
            Some(Held::Open(open)) => open.ticket,
            Some(Held::Message(_, Message::Need(need, _))) => need.ticket,
            _ => return,
        };
        if self.shared.leaves_rest() {
            return ticket.leave();
        }
        // The engine ends: a refusal by the kernel changes nothing.
        let _ = ticket.answer(Outcome::Failed(Errno::ECANCELED));
    }

    fn has_room(&self) -> bool {
        self.shared.shards.iter().map(super::stats::ShardStats::pending).sum::<u64>() < PENDING_MAX
    }

    fn route(&mut self, request: Request) {
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
        self.deliver(held);
    }

    fn deliver(&mut self, held: Held) {
        self.held = match held {
            Held::Open(open) => self.opens.push(open).err().map(Held::Open),
            Held::Message(shard, message) => self.shards[shard].try_send(message).err().map(|message| Held::Message(shard, message)),
        };
    }
}
