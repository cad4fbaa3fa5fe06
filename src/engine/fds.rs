//! The descriptor budget: how many descriptors objects may have, and who makes room when it runs out.
//!
//! An open that finds no free descriptor is lost for good, so messages are read from the kernel only while there
//! is room for what they may bring. When room becomes scarce the router asks the shards for objects that nobody
//! waits for: complete ones first, then those that have missed nothing for longest. The kernel opens them again
//! when somebody reads what is missing, if it can; if it cannot, only complete ones are given up.
//!
//! A sink is closed by the thread that reads the kernel's messages, between two reads, and only if no request
//! of its object has been read meanwhile: the kernel hands out a request once, and takes its answer only
//! through the object's own descriptor. Else the shard gets its sink back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::Shared;
use super::mailbox::Message;
use super::router::owner;
use crate::front::{ObjectId, Sink};

/// What an open may take before its blob is known: its sink and a source.
const FDS_PER_OPEN: u64 = 2;
/// The part of the budget, one in so many, below which room is made.
const RESERVE_DIVISOR: u64 = 8;
/// The part of the budget, one in so many, that is for requests where each brings a descriptor.
const REQUESTS_DIVISOR: u64 = 4;
/// What may be used beyond the budget, slowly, when every shard says that nothing can be closed: the kernel's closes come in the same
/// queue as its opens, so not to read at all could last for ever.
pub const EMERGENCY_FDS: u64 = 64;
/// Pause after an open that took of the emergency reserve: so opens are slowed down, and not failed.
const EMERGENCY_PAUSE_NS: u64 = 50_000_000;
/// Pause before the shards are asked for room again; doubles up to [`ASK_PAUSE_MAX_NS`] while they have none.
const ASK_PAUSE_NS: u64 = 5_000_000;
/// Longest such pause.
const ASK_PAUSE_MAX_NS: u64 = 1_000_000_000;

/// How many descriptors objects may have, and have.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    /// Of them, those of requests.
    for_requests: u64,
    used: AtomicU64,
    peak: AtomicU64,
}

/// So many descriptors are in use, until it is dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    fds: u64,
}

impl Budget {
    /// A budget of `limit` descriptors, none of which is used. Where `needs_hold_fds` a part of them is set aside for requests.
    #[must_use]
    pub fn new(limit: u64, needs_hold_fds: bool) -> Arc<Self> {
        let for_requests = if needs_hold_fds { limit / REQUESTS_DIVISOR } else { 0 };
        Arc::new(Self { limit: limit - for_requests, for_requests, used: AtomicU64::new(0), peak: AtomicU64::new(0) })
    }

    /// Whether another object may be opened.
    pub(super) fn has_room_for_open(&self) -> bool {
        self.room() >= FDS_PER_OPEN
    }

    /// How many requests may wait for their answer at each of some `shards`, because each holds a descriptor.
    pub(super) const fn requests_max(&self, shards: u64) -> u64 {
        self.for_requests / shards
    }

    /// Counts what an open may take.
    pub(super) fn charge_open(self: &Arc<Self>) -> Charge {
        let mut charge = Charge { budget: Arc::clone(self), fds: 0 };
        charge.set(FDS_PER_OPEN);
        charge
    }

    /// Most descriptors that objects may have.
    #[must_use]
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    /// Descriptors that objects have.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Most that they ever had.
    #[must_use]
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    fn room(&self) -> u64 {
        self.limit.saturating_sub(self.used())
    }

    fn reserve(&self) -> u64 {
        (self.limit / RESERVE_DIVISOR).max(FDS_PER_OPEN)
    }
}

impl Charge {
    /// It is known how many there are.
    pub(super) fn set(&mut self, fds: u64) {
        let used = self.budget.used.fetch_add(fds.wrapping_sub(self.fds), Ordering::Relaxed).wrapping_add(fds.wrapping_sub(self.fds));
        self.budget.peak.fetch_max(used, Ordering::Relaxed);
        self.fds = fds;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.fds, Ordering::Relaxed);
    }
}

/// What a shard says when it was asked for room.
#[derive(Debug)]
pub(super) enum Offer {
    /// The sink of an object that may be closed.
    Sink(ObjectId, Arc<dyn Sink>),
    /// That was all.
    End,
}

/// On the thread that reads the kernel's messages: makes room.
#[derive(Debug)]
pub(super) struct Evictor {
    shared: Arc<Shared>,
    offers: Receiver<Offer>,
    /// Shards that were asked and have not said that it was all.
    asked: usize,
    /// Whether anything was closed since they were asked.
    gained: bool,
    ask_again_ns: u64,
    ask_pause_ns: u64,
    /// Since when there is no room at all, or when the last open came since then.
    starved_ns: Option<u64>,
}

impl Evictor {
    /// It, and where shards put their offers.
    pub(super) fn new(shared: Arc<Shared>) -> (Self, Sender<Offer>) {
        let (sender, offers) = channel();
        (Self { shared, offers, asked: 0, gained: false, ask_again_ns: 0, ask_pause_ns: ASK_PAUSE_NS, starved_ns: None }, sender)
    }

    /// How many messages may be read now: each may be an open. If there is no room for long, then one at a time all the
    /// same, because closes make room and requests for data need none; after an open not before another pause.
    pub(super) fn credits(&mut self, now_ns: u64) -> u32 {
        let credits = self.shared.budget.room() / FDS_PER_OPEN;
        if credits > 0 {
            self.starved_ns = None;
            return u32::try_from(credits).unwrap_or(u32::MAX);
        }
        let since_ns = *self.starved_ns.get_or_insert(now_ns);
        // A shard that is slow to say what can be closed, or to close it, is no emergency.
        let in_vain = self.asked == 0 && !self.gained;
        u32::from(in_vain && now_ns.saturating_sub(since_ns) >= EMERGENCY_PAUSE_NS)
    }

    /// Counts what an open may take. `None`: the emergency reserve is used up too.
    pub(super) fn admit(&mut self, now_ns: u64) -> Option<Charge> {
        if let Some(since_ns) = &mut self.starved_ns {
            *since_ns = now_ns;
        }
        let budget = &self.shared.budget;
        (budget.used() + FDS_PER_OPEN <= budget.limit() + EMERGENCY_FDS).then(|| budget.charge_open())
    }

    /// Closes what was offered, and asks for more if room is scarce. No read of the kernel's messages may be
    /// under way, and what was read must have been routed. Gives messages for shards.
    pub(super) fn turn(&mut self, now_ns: u64, mut send: impl FnMut(usize, Message)) {
        let shards = self.shared.shards.len();
        while let Ok(offer) = self.offers.try_recv() {
            match offer {
                Offer::Sink(object, sink) => {
                    self.ask_pause_ns = ASK_PAUSE_NS;
                    send(owner(object, shards), self.close(object, sink));
                }
                Offer::End => self.asked -= 1,
            }
        }
        let (room, reserve) = (self.shared.budget.room(), self.shared.budget.reserve());
        if self.asked == 0 && room < reserve && now_ns >= self.ask_again_ns {
            self.gained = false;
            self.ask_again_ns = now_ns + self.ask_pause_ns;
            self.ask_pause_ns = (self.ask_pause_ns * 2).min(ASK_PAUSE_MAX_NS);
            self.ask((2 * reserve - room).div_ceil(FDS_PER_OPEN), send);
        }
    }

    /// Closes a sink if no request of its object was read since its shard offered it.
    fn close(&mut self, object: ObjectId, sink: Arc<dyn Sink>) -> Message {
        // Each request of it holds one, and nobody but this thread reads requests.
        if Arc::strong_count(&sink) > 1 {
            return Message::Keep(object, sink);
        }
        drop(sink);
        self.gained = true;
        Shared::count(&self.shared.evictions);
        Message::Close(object)
    }

    /// Asks each shard for its part of `objects`.
    fn ask(&mut self, objects: u64, mut send: impl FnMut(usize, Message)) {
        let all: u64 = self.shared.shards.iter().map(super::stats::ShardStats::objects).sum();
        for (index, shard) in self.shared.shards.iter().enumerate() {
            let part = (objects * shard.objects()).div_ceil(all.max(1));
            if part > 0 {
                self.asked += 1;
                send(index, Message::Evict(usize::try_from(part).unwrap_or(usize::MAX)));
            }
        }
    }

    /// Gives back what was offered: the engine ends, and requests that were read are finished first.
    pub(super) fn give_back(&self, mut send: impl FnMut(usize, Message)) {
        let shards = self.shared.shards.len();
        for offer in self.offers.try_iter() {
            if let Offer::Sink(object, sink) = offer {
                send(owner(object, shards), Message::Keep(object, sink));
            }
        }
    }
}
