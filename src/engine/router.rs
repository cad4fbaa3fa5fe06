//! Takes requests from the front end and hands each to who does it: needs and closes to the shard that owns
//! the object, opens to the [`super::opener`]. One shard does this, because the kernel wakes everyone who
//! waits for its requests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::fds::{Charge, Evictor};
use super::mailbox::{Mailbox, Message};
use super::opens::Opens;
use crate::front::{Caps, Found, FrontEnd, FrontError, MESSAGES_MAX, NeedRequest, ObjectId, OpenRequest, Outcome, Request};
use nix::errno::Errno;

/// Messages read at a time at most.
pub(super) const BATCH_MAX: u32 = MESSAGES_MAX;
/// From so many answers in a turn on their readers are expected to ask again at once.
const AGAIN_MIN: u32 = 4;
/// Requests for data that may wait for their answer at a time. Beyond it nothing is read from the kernel,
/// which keeps what comes; opens and closes wait then too, so it is far above what readers reach.
const PENDING_MAX: u64 = 65_536;

/// Pause while there is no room for what comes next. Nobody says when there is; but a shard that is behind
/// needs its core, and this one may share it.
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// Which shard owns an object. The kernel counts ids up, and an image has several in a row (itself and its blobs), so a
/// remainder could put all blobs on one shard. Multiples of the golden ratio lie apart from each other whatever the step.
pub(super) const fn owner(object: ObjectId, shards: usize) -> usize {
    /// The ratio's fraction, of 32 bits.
    const GOLDEN: u32 = 0x9E37_79B9;
    let place = object.0.wrapping_mul(GOLDEN);
    ((place as u64 * shards as u64) >> u32::BITS) as usize
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Router {
    /// The shard on which it runs.
    index: usize,
    shared: Arc<Shared>,
    shards: Vec<Mailbox>,
    /// Which of them have messages for which they were not woken: that is done once for a batch, because a wake-up on
    /// another core costs as much as several requests.
    unrung: Vec<bool>,
    opens: Arc<Opens>,
    /// On the first shard only.
    evictor: Option<Evictor>,
    /// There are no descriptors for what may come, or the front end must settle first.
    starved: bool,
    /// What found its receiver's queue full, and what was read behind it; nothing else is read before it is delivered.
    held: VecDeque<Held>,
    batch: Batch,
    events_per_read: u32,
    /// Readers whose questions were read here, and of whom it is not known that they have an answer.
    unanswered: u32,
    /// Something was read since the front end was last settled.
    unsettled: bool,
    /// Room for the requests of one read.
    requests: Vec<Request>,
}

/// How many messages to read at a time. A read that finds none costs little; a turn for one message costs a lot.
#[derive(Debug)]
struct Batch {
    /// The kernel may have more.
    more: bool,
    /// How many to read next.
    size: u32,
    /// Reads of the present batch: all, those not ended, and those that gave something.
    asked: u32,
    left: u32,
    got: u32,
}

impl Batch {
    const fn new() -> Self {
        Self { more: true, size: 1, asked: 0, left: 0, got: 0 }
    }

    /// How many reads to begin, `max` at most.
    fn begin(&mut self, max: u32) -> u32 {
        if self.left > 0 || !self.more {
            return 0;
        }
        (self.asked, self.got) = (self.size.min(BATCH_MAX).min(max), 0);
        self.left = self.asked;
        self.asked
    }

    /// A read has ended. What the last one found tells whether there is more; a batch that was full is
    /// followed by one of twice its size.
    fn end(&mut self, found: Found) {
        self.left = self.left.saturating_sub(1);
        self.got += u32::from(found == Found::Part);
        if self.left == 0 {
            self.more = found == Found::Part;
            self.size = if self.got == self.asked { self.asked * 2 } else { self.got + 1 };
        }
    }

    /// A read was interrupted.
    const fn interrupted(&mut self) {
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            (self.more, self.size) = (true, self.got + 1);
        }
    }

    /// So many readers have had their answer, and may ask again in so many messages.
    fn answered(&mut self, readers: u32, messages: u32) {
        if readers >= AGAIN_MIN {
            self.size = self.size.max(messages + 1);
            self.more = true;
        }
    }
}

#[derive(Debug)]
enum Held {
    Open(OpenRequest, Charge),
    Message(usize, Message),
}

impl Router {
    pub(super) fn new(
        index: usize,
        caps: Caps,
        shared: Arc<Shared>,
        shards: Vec<Mailbox>,
        opens: Arc<Opens>,
        evictor: Option<Evictor>,
    ) -> Self {
        let unrung = vec![false; shards.len()];
        Self {
            index,
            shared,
            shards,
            unrung,
            opens,
            evictor,
            starved: false,
            held: VecDeque::new(),
            batch: Batch::new(),
            events_per_read: caps.events_per_read.max(1),
            unanswered: 0,
            unsettled: false,
            requests: Vec::new(),
        }
    }

    /// The kernel may have requests.
    pub(super) const fn notice(&mut self) {
        self.batch.more = true;
    }

    /// So many readers have had their answer, and may have the next question. Gives how many of them may be those of another
    /// source.
    pub(super) fn answered(&mut self, readers: u32) -> u32 {
        let own = self.unanswered.min(readers);
        self.unanswered -= own;
        self.batch.answered(own, own / self.events_per_read);
        readers - own
    }

    /// Whether it was read until there was nothing.
    pub(super) const fn is_idle(&self) -> bool {
        !self.batch.more
    }

    /// Whether reads have begun and not ended.
    pub(super) const fn is_reading(&self) -> bool {
        self.batch.left > 0
    }

    /// After which time it wants to run again, whatever happens; `None`: when the kernel has something.
    pub(super) fn next_turn(&self) -> Option<Duration> {
        match (self.held.is_empty(), self.batch.more) {
            (true, false) => None,
            // The reads end by themselves, and with them the wait.
            (true, true) if self.is_reading() => None,
            (true, true) if self.has_room() && !self.starved => Some(Duration::ZERO),
            _ => Some(FULL_PAUSE),
        }
    }

    /// How many messages are to be read from the front end now, `max` at most; what each read gives must come to
    /// [`Router::take`]. None while a queue is full.
    pub(super) fn wanted(&mut self, front: &dyn FrontEnd, now_ns: u64, max: u32) -> u32 {
        if self.is_reading() {
            return 0;
        }
        if let Some(evictor) = &mut self.evictor {
            evictor.turn(now_ns, |shard, message| self.held.push_back(Held::Message(shard, message)));
        }
        let has_news = self.batch.more || self.unsettled || !self.held.is_empty();
        while let Some(held) = self.held.pop_front() {
            if let Err(held) = self.deliver(held) {
                self.held.push_front(held);
                break;
            }
        }
        if !has_news {
            return 0;
        }
        self.ring();
        if !self.held.is_empty() {
            return 0;
        }
        if !front.settle() {
            (self.starved, self.batch.more) = (true, true);
            return 0;
        }
        self.unsettled = false;
        // The room once a turn: it looks at memory that every shard writes.
        if !self.batch.more || !self.has_room() {
            return 0;
        }
        let credits = self.credits(front.caps(), now_ns).min(max);
        self.starved = credits == 0;
        self.batch.begin(credits)
    }

    /// How many messages may be read, because of the descriptors that they may bring.
    fn credits(&mut self, caps: Caps, now_ns: u64) -> u32 {
        let for_opens = self.evictor.as_mut().map_or(u32::MAX, |evictor| evictor.credits(now_ns));
        if !caps.needs_hold_fds {
            return for_opens;
        }
        let pending = self.shared.shards[self.index].pending();
        let room = self.shared.budget.requests_max(self.shards.len() as u64).saturating_sub(pending);
        // However small the budget is, a shard that has nothing to answer reads.
        u32::try_from(room / u64::from(caps.events_per_read)).unwrap_or(u32::MAX).max(u32::from(pending == 0))
    }

    /// What one read gave, which had ended at `now_ns`. Requests for the shard on which this runs go through its mailbox
    /// too: only so does a request find the object that an opener put there just before it told the kernel that it is open.
    ///
    /// Requests that ask for nothing but their answer go to `present`. Gives how many requests there were.
    ///
    /// # Errors
    /// The front end is broken.
    pub(super) fn take(
        &mut self,
        front: &dyn FrontEnd,
        read: Result<&[u8], Errno>,
        now_ns: u64,
        present: &mut Vec<NeedRequest>,
    ) -> Result<usize, FrontError> {
        let taken = self.take_one(front, read, now_ns, present);
        if !self.is_reading() {
            self.ring();
        }
        taken
    }

    fn take_one(
        &mut self,
        front: &dyn FrontEnd,
        read: Result<&[u8], Errno>,
        now_ns: u64,
        present: &mut Vec<NeedRequest>,
    ) -> Result<usize, FrontError> {
        if matches!(read, Err(Errno::EINTR | Errno::ECANCELED)) {
            self.batch.interrupted();
            return Ok(0);
        }
        let mut requests = std::mem::take(&mut self.requests);
        let parsed = front.parse(read, &mut requests);
        let found = parsed.as_ref().map_or(Found::Part, |found| *found);
        self.unsettled |= found != Found::Nothing;
        self.batch.end(found);
        let count = requests.len();
        self.unanswered = self.unanswered.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        for request in requests.drain(..) {
            match request {
                Request::Present(need) => present.push(need),
                request => self.route(request, now_ns),
            }
        }
        self.requests = requests;
        match parsed {
            Ok(_) => {}
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
        Ok(count)
    }

    /// Answers what it still holds, or leaves it, when the engine stops.
    pub(super) fn give_up(&mut self) {
        self.opens.end();
        if let Some(evictor) = &self.evictor {
            evictor.give_back(|shard, message| self.held.push_back(Held::Message(shard, message)));
        }
        for held in self.held.drain(..) {
            let ticket = match held {
                Held::Open(open, _) => open.ticket,
                Held::Message(_, Message::Need(need, _)) => need.ticket,
                Held::Message(shard, message) => {
                    // If it has no room for that, it ends all the same.
                    let _ = self.shards[shard].try_send(message);
                    continue;
                }
            };
            if self.shared.leaves_rest() {
                ticket.leave();
                continue;
            }
            // The engine ends: a refusal by the kernel changes nothing.
            let _ = ticket.answer(Outcome::Failed(Errno::ECANCELED));
        }
    }

    /// Fails an open for which there are no descriptors.
    fn refuse(&self, open: OpenRequest) {
        Shared::count(&self.shared.opens_failed);
        if self.shared.may_log_failure() {
            tracing::error!(
                "{} gets no descriptors, its mount or its reads fail: fd_budget = {} is used up by blobs that cannot be closed; raise it, or unmount images",
                open.key,
                self.shared.budget.limit()
            );
        }
        // A kernel that takes no refusal has forgotten the open.
        let _ = open.ticket.answer(Outcome::Failed(Errno::ENFILE));
    }

    fn has_room(&self) -> bool {
        self.shared.shards.iter().map(super::stats::ShardStats::pending).sum::<u64>() < PENDING_MAX
    }

    fn route(&mut self, request: Request, now_ns: u64) {
        let held = match request {
            Request::Open(open) => {
                Shared::count(&self.shared.opens);
                let Some(charge) = self.evictor.as_mut().and_then(|evictor| evictor.admit(now_ns)) else { return self.refuse(open) };
                Held::Open(open, charge)
            }
            Request::Need(need) | Request::Present(need) => {
                Held::Message(owner(need.object, self.shards.len()), Message::Need(need, now_ns))
            }
            Request::Close(object) => {
                Shared::count(&self.shared.closes);
                Held::Message(owner(object, self.shards.len()), Message::Close(object))
            }
        };
        // In the order of the kernel.
        let delivered = if self.held.is_empty() { self.deliver(held) } else { Err(held) };
        self.held.extend(delivered.err());
    }

    /// Hands it on, or gives it back if there is no room; [`Router::ring`] must follow.
    fn deliver(&mut self, held: Held) -> Result<(), Held> {
        match held {
            Held::Open(open, charge) => self.opens.push(open, charge).map_err(|(open, charge)| Held::Open(open, charge)),
            Held::Message(shard, message) => {
                self.shards[shard].put(message).map_err(|message| Held::Message(shard, message))?;
                self.unrung[shard] = true;
                Ok(())
            }
        }
    }

    /// Wakes the shards that have got messages.
    fn ring(&mut self) {
        for (mailbox, unrung) in self.shards.iter().zip(&mut self.unrung) {
            if std::mem::take(unrung) {
                mailbox.ring();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_spread_over_the_shards_whatever_the_step_of_their_ids() {
        for shards in 1..=64 {
            for step in 1..=4 {
                let mut owned = vec![0; shards];
                (1..=64 * shards).for_each(|n| owned[owner(ObjectId((n * step).try_into().unwrap()), shards)] += 1);
                assert!(owned.iter().all(|owned| (48..=80).contains(owned)), "{shards} shards, step {step}: {owned:?}");
            }
        }
    }

    fn run(batch: &mut Batch, waiting: u32, max: u32) -> u32 {
        let reads = batch.begin(max);
        (0..reads).for_each(|n| batch.end(if n < waiting { Found::Part } else { Found::Nothing }));
        reads
    }

    #[test]
    fn batches_double_while_they_are_full_and_end_with_the_messages() {
        let mut batch = Batch::new();
        assert_eq!([100, 99, 97, 93, 85].map(|waiting| run(&mut batch, waiting, 100)), [1, 2, 4, 8, 16]);
        assert_eq!(run(&mut batch, 20, 100), 32);
        assert_eq!(run(&mut batch, 20, 100), 0, "there were none left");
        batch.more = true;
        assert_eq!(run(&mut batch, 0, 100), 21, "as many may come again");
        batch.more = true;
        assert_eq!(run(&mut batch, 0, 100), 1);
    }

    #[test]
    fn credits_bound_a_batch_and_answers_announce_one() {
        let mut batch = Batch::new();
        assert_eq!((run(&mut batch, 0, 0), batch.more), (0, true), "without credits it knows nothing");
        assert_eq!(run(&mut batch, 0, 9), 1);
        batch.answered(AGAIN_MIN - 1, AGAIN_MIN - 1);
        assert_eq!(run(&mut batch, 0, 9), 0);
        batch.answered(20, 20);
        assert_eq!(run(&mut batch, 9, 9), 9);
        assert_eq!(run(&mut batch, 64, 1000), 18);
        batch.answered(1000, 1000);
        assert_eq!(run(&mut batch, 64, 1000), BATCH_MAX);
    }

    #[test]
    fn an_interrupted_read_says_nothing() {
        let mut batch = Batch::new();
        assert_eq!(batch.begin(9), 1);
        assert_eq!(batch.begin(9), 0, "one at a time");
        batch.interrupted();
        assert_eq!(run(&mut batch, 0, 9), 1);
    }
}
