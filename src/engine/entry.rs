//! The way into the engine for requests that come from no kernel: where a daemon itself says what is opened, as it must
//! before a kernel can ask for it.

use std::sync::Arc;

use nix::errno::Errno;

use super::mailbox::{Mailbox, Message};
use super::opens::Opens;
use super::router::owner;
use super::{Shared, Tuning};
use crate::front::{NeedRequest, ObjectId, OpenRequest, Outcome};

/// See the module's description. Cheap to clone; it may outlive the engine, which then refuses everything.
#[derive(Clone, Debug)]
pub struct Entry {
    shared: Arc<Shared>,
    shards: Vec<Mailbox>,
    opens: Arc<Opens>,
}

impl Entry {
    pub(super) const fn new(shared: Arc<Shared>, shards: Vec<Mailbox>, opens: Arc<Opens>) -> Self {
        Self { shared, shards, opens }
    }

    /// Opens an object, as if a front end had said so. Its ticket is answered in any case.
    pub fn open(&self, open: OpenRequest) {
        Shared::count(&self.shared.opens);
        let refused = match self.shared.budget.has_room_for_open() {
            false => Some((open, Errno::ENFILE)),
            true => self.opens.push(open, self.shared.budget.charge_open()).err().map(|(open, _)| (open, Errno::EAGAIN)),
        };
        if let Some((open, errno)) = refused {
            Shared::count(&self.shared.opens_failed);
            // Who asked hears of it by the answer, whatever becomes of that.
            let _ = open.ticket.answer(Outcome::Failed(errno));
        }
    }

    /// Has data brought of an object that was opened here; its ticket is answered in any case.
    pub fn need(&self, need: NeedRequest) {
        let refused = self.shard(need.object).send(Message::Need(need, self.shared.clock.now_ns()));
        // The shard has ended.
        if let Err(Message::Need(need, _)) = refused {
            let _ = need.ticket.answer(Outcome::Failed(Errno::ECANCELED));
        }
    }

    /// Closes an object that was opened here.
    pub fn close(&self, object: ObjectId) {
        Shared::count(&self.shared.closes);
        // A shard that has ended has closed all of its objects.
        drop(self.shard(object).send(Message::Close(object)));
    }

    /// Has the engine go on by other settings. `false`: not all shards could be told, because one is busy or hangs.
    #[must_use]
    pub fn tune(&self, tuning: Tuning) -> bool {
        self.opens.set_timeout(tuning.open_timeout);
        self.shards.iter().all(|shard| shard.try_send(Message::Tune(tuning)).is_ok())
    }

    /// The shard that owns an object, and so the place of the source that may ask for it.
    #[must_use]
    pub const fn owner(&self, object: ObjectId) -> usize {
        owner(object, self.shards.len())
    }

    /// How many shards there are.
    #[must_use]
    pub const fn shards(&self) -> usize {
        self.shards.len()
    }

    fn shard(&self, object: ObjectId) -> &Mailbox {
        &self.shards[self.owner(object)]
    }
}
