//! The engine: one shard a core, the same for every front end.
//!
//! | file | its subject |
//! |---|---|
//! | `start` | starting all of it, and stopping it |
//! | `router`, `mailbox` | the way of a request from the front end to its shard |
//! | `opens`, `opener`, `metadata` | opens: which blob is it, how long, where is its metadata |
//! | `shard`, `attached` | the event loop and its answers, and what it knows of an object |
//! | `machine` | what to do: needs, fills, answers; no system calls |
//! | `plan`, `fill`, `presence` | its parts: which range, one fill's life, what is there |
//! | `probe` | what a sink already holds |
//! | `io` | reads and writes: `ring` (io_uring), `blocking` (threads), or `null` (none, to measure the rest) |
//! | `edges` | waiting without a ring |
//! | `fds` | the descriptor budget |
//! | `placement`, `spin` | which CPUs are whose; when a shard does not sleep |
//! | `buffers` | memory that operations use |
//! | `room` | the bell for writes that found no room |
//! | `stats`, `trace`, `advice`, `clock` | what is counted, what is shown, what is said, and when |
//! | `pulse` | whether all shards go on |

mod advice;
mod attached;
pub mod blocking;
pub mod buffers;
mod clock;
mod edges;
mod entry;
pub mod fds;
pub mod fill;
pub mod io;
pub mod machine;
mod mailbox;
mod metadata;
mod null;
mod opener;
mod opens;
pub mod placement;
pub mod plan;
pub mod presence;
mod probe;
pub mod pulse;
pub mod ring;
pub mod room;
mod router;
mod shard;
mod spin;
mod start;
pub mod stats;
pub mod trace;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use self::clock::Clock;
use self::fds::Budget;
use self::mailbox::Bell;
use self::stats::{Objects, ShardStats, Snapshot};
use crate::front::{FrontError, left_tickets, unanswered_tickets};
use crate::store::remembered::Remembered;

pub use self::entry::Entry;
pub use self::opens::OPENERS_MAX;
pub use self::start::{Engine, Observer, Started};

/// How reads and writes are done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// io_uring, or threads that block where it is refused.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Threads that block.
    Blocking,
    /// No I/O: every operation ends well and does nothing. For benchmarks; no setting leads here.
    #[value(skip)]
    #[serde(skip)]
    Null,
}

/// How the engine is to run. Made and checked by [`crate::config`].
#[derive(Clone, Debug)]
pub struct Settings {
    /// Event loops.
    pub shards: usize,
    /// Where they run, in this order and again from the first; none: wherever the scheduler wants.
    pub seats: Vec<placement::Seat>,
    /// How reads and writes are done.
    pub kind: EngineKind,
    /// How much is brought for a demand.
    pub window: plan::Window,
    /// What is brought when there is nothing better to do.
    pub completion: plan::Completion,
    /// Size of a buffer slot and longest single fill.
    pub slot_bytes: u64,
    /// Buffer slots of a shard, and operations that it may have in flight.
    pub slots: u32,
    /// Threads of a shard that may block at a time: in writes if it has a ring, else in all of its operations.
    pub workers: u32,
    /// Descriptors that objects may have: their sinks and sources.
    pub fd_budget: u64,
    /// How long the lookup of a blob may take, with all its tries.
    pub open_timeout: Duration,
    /// How long a reader may wait for its bytes before it gets an error.
    pub request_timeout: Duration,
    /// To be told of writes that found no room.
    pub no_room: Option<room::NoRoom>,
    /// Records every answer.
    pub tracer: Option<trace::Tracer>,
    /// What the objects of the cache were made of.
    pub remembered: Arc<Remembered>,
    /// See [`Engine::leave_rest`]: whether it does from the start on.
    pub leave_rest: bool,
}

/// What of [`Settings`] can be changed while the engine runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// How long the lookup of a blob may take: one that begins from now on.
    pub open_timeout: Duration,
    /// How long a reader may wait, also one that waits already.
    pub request_timeout: Duration,
    /// How fast blobs are completed at most, in bytes a second for each shard.
    pub complete_bytes_per_s: Option<NonZeroU64>,
}

/// Fills that one reader's request may wait for at a time.
pub const FILLS_PER_NEED: u32 = 16;
/// Failures that are logged a second; the others are only counted.
const FAILURES_LOGGED_PER_SECOND: u64 = 10;

/// Why the engine could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The front end failed.
    #[error(transparent)]
    Front(#[from] FrontError),
    /// The ring or the wait failed.
    #[error("waiting for I/O failed: {0}")]
    Io(#[source] std::io::Error),
    /// No ring, and the setting allows nothing else.
    #[error("no io_uring: {0}; or run with --engine blocking")]
    NoRing(String),
    /// A thread, descriptor or memory could not be had.
    #[error("cannot start a shard: {0}; lower --shards, --slots or --slot-size, or raise the limits that `infill doctor` shows")]
    Resources(#[source] std::io::Error),
}

/// A time as the machine counts it.
fn as_ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What all threads of the engine share. Shards only write what is their own; the flags change rarely.
#[derive(Debug)]
struct Shared {
    shards: Vec<ShardStats>,
    bells: Vec<Arc<Bell>>,
    /// Take nothing new.
    stopping: AtomicBool,
    /// Shards that may still hand something on that they received.
    receivers: AtomicUsize,
    /// Fail what is left.
    out_of_time: AtomicBool,
    /// Do not fail it: another daemon gets it.
    leaves_rest: AtomicBool,
    /// The front end may have something although it woke nobody.
    look_again: AtomicBool,
    opens: AtomicU64,
    opens_ok: AtomicU64,
    opens_failed: AtomicU64,
    closes: AtomicU64,
    evictions: AtomicU64,
    reopens: AtomicU64,
    objects: Objects,
    malformed: AtomicU64,
    /// Descriptors of objects.
    budget: Arc<Budget>,
    clock: Clock,
    failures_logged: AtomicU64,
    /// Readable once a shard has ended.
    ended: EventFd,
}

impl Shared {
    fn new(clock: Clock, bells: Vec<Arc<Bell>>, budget: Arc<Budget>) -> std::io::Result<Self> {
        Ok(Self {
            shards: bells.iter().map(|_| ShardStats::default()).collect(),
            bells,
            stopping: AtomicBool::new(false),
            receivers: AtomicUsize::new(0),
            out_of_time: AtomicBool::new(false),
            leaves_rest: AtomicBool::new(false),
            look_again: AtomicBool::new(false),
            opens: AtomicU64::new(0),
            opens_ok: AtomicU64::new(0),
            opens_failed: AtomicU64::new(0),
            closes: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            reopens: AtomicU64::new(0),
            objects: Objects::default(),
            budget,
            malformed: AtomicU64::new(0),
            clock,
            failures_logged: AtomicU64::new(0),
            ended: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Makes the first receiving shard read from the front end once more.
    fn look_again(&self) {
        self.look_again.store(true, Ordering::Release);
        self.bells[0].wake();
    }

    fn leaves_rest(&self) -> bool {
        self.leaves_rest.load(Ordering::Acquire)
    }

    fn wake_all(&self) {
        self.bells.iter().for_each(|bell| bell.wake());
    }

    /// Whether one more failure may be logged: a broken disk must not fill another one with messages.
    fn may_log_failure(&self) -> bool {
        let allowed = (self.clock.now_ns() / 1_000_000_000 + 1) * FAILURES_LOGGED_PER_SECOND;
        let logged = self.failures_logged.load(Ordering::Relaxed);
        // What was not used up in quiet times is not saved for later.
        let floor = allowed - FAILURES_LOGGED_PER_SECOND;
        logged < allowed && self.failures_logged.fetch_max(floor, Ordering::Relaxed) < allowed && {
            self.failures_logged.fetch_add(1, Ordering::Relaxed);
            true
        }
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::sum(self.shards.iter(), self.clock.now_ns());
        snapshot.opens = self.opens.load(Ordering::Relaxed);
        snapshot.opens_ok = self.opens_ok.load(Ordering::Relaxed);
        snapshot.opens_failed = self.opens_failed.load(Ordering::Relaxed);
        snapshot.closes = self.closes.load(Ordering::Relaxed);
        snapshot.evictions = self.evictions.load(Ordering::Relaxed);
        snapshot.reopens = self.reopens.load(Ordering::Relaxed);
        snapshot.fds = self.budget.used();
        snapshot.fds_peak = self.budget.peak();
        snapshot.fds_budget = self.budget.limit();
        snapshot.malformed = self.malformed.load(Ordering::Relaxed);
        snapshot.unanswered = unanswered_tickets();
        snapshot.left = left_tickets();
        snapshot
    }
}

#[cfg(test)]
mod tests;
