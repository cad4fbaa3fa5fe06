//! What a machine tells its driver to do, and what it counts.

use crate::engine::fill;
use crate::front::Outcome;
use crate::range::ByteRange;

/// Where an object lives in the machine; valid from [`super::Machine::open`] to [`Action::Release`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Handle(pub usize);

/// Names an operation in flight, with a generation, so that a late completion cannot hit another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct OpKey(pub u64);

/// What the driver has to do.
#[derive(Debug)]
pub enum Action<T> {
    /// Read from a file of the object's blob into a slot, then report [`super::Machine::io_done`].
    Read {
        /// Names the operation.
        op: OpKey,
        /// Whose blob.
        object: Handle,
        /// Index into the blob's files.
        file: usize,
        /// Where in the file.
        offset: u64,
        /// The slot, owned by this operation until it is reported done.
        slot: u32,
        /// Where in the slot.
        slot_offset: u64,
        /// How much.
        len: u64,
        /// Where in the object's sink all of it goes next, if the read gives all of it. The driver may have that
        /// done at once, and then reports [`Machine::io_copied`].
        then: Option<u64>,
    },
    /// Write to the object's sink, then report [`super::Machine::io_done`].
    Write {
        /// Names the operation.
        op: OpKey,
        /// Whose sink.
        object: Handle,
        /// Where in the sink.
        offset: u64,
        /// How much.
        len: u64,
        /// The slot, if `from` is [`fill::From::Slot`].
        slot: Option<u32>,
        /// What.
        from: fill::From,
    },
    /// Find out what the object's sink holds there, and report it with [`super::Machine::learn_of`], before any other
    /// action of the object is carried out.
    Look {
        /// Whose sink.
        object: Handle,
        /// Where.
        range: ByteRange,
    },
    /// Tell the object's sink that it holds these whole pages now: only if sinks know what they hold
    /// ([`super::Limits::sinks_know`]), and before the answers of those who waited for them.
    Filled {
        /// Whose sink.
        object: Handle,
        /// Which pages.
        range: ByteRange,
        /// With them all of the object is there.
        complete: bool,
    },
    /// Answer a request.
    Answer(Answered<T>),
    /// The object was closed and nothing of it is in flight any more: drop its sink and its blob.
    Release {
        /// Which.
        object: Handle,
    },
}

/// A request that has its answer.
#[derive(Debug)]
pub struct Answered<T> {
    /// To be answered.
    pub ticket: T,
    /// With this.
    pub outcome: Outcome,
    /// Whose it was; `None` if no such object was open.
    pub object: Option<Handle>,
    /// What was asked, as the kernel said it.
    pub range: ByteRange,
    /// When the request came, on the machine's clock.
    pub since_ns: u64,
    /// When the first fill that it waited for got its slot, or when it came if that was later. `None`: it waited for none,
    /// or for none that ended.
    pub begun_ns: Option<u64>,
}

/// What a machine has done; each only grows.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counters {
    /// Requests for data.
    pub needs: u64,
    /// Of them, answered with failure.
    pub needs_failed: u64,
    /// Of them, because their time was over.
    pub needs_timed_out: u64,
    /// Of them, for an object that was not open.
    pub unknown_object: u64,
    /// Of those that failed, wholly beyond the end of the blob.
    pub beyond_end: u64,
    /// Of them, answered at once because the bytes were already there.
    pub already_there: u64,
    /// Times a need waited for a fill that another had started.
    pub joined: u64,
    /// Fills finished well.
    pub fills: u64,
    /// Fills that failed.
    pub fills_failed: u64,
    /// Bytes that were asked for, as whole pages; what several readers asked for counts for each.
    pub bytes_asked: u64,
    /// Bytes put into sinks.
    pub bytes_filled: u64,
    /// Of them, those that no request had asked for by the time they were there.
    pub bytes_unasked: u64,
    /// Of those, what was read later. Where the kernel asks only for what is missing, that is known only of streams: a reader
    /// that goes on where one ended has read it.
    pub bytes_ahead_used: u64,
    /// Of those, what nobody is known to have read when the object was closed.
    pub bytes_ahead_wasted: u64,
    /// Fills begun in the background.
    pub background: u64,
    /// Of the fills, written from mapped pages of a source.
    pub fills_mapped: u64,
    /// Bytes of those.
    pub bytes_mapped: u64,
    /// Of the fills, read past the page cache.
    pub fills_direct: u64,
    /// Bytes of those.
    pub bytes_direct: u64,
    /// Of the fills, read through the page cache.
    pub fills_buffered: u64,
    /// Bytes of those.
    pub bytes_buffered: u64,
    /// Of the fills, zeros that nobody read.
    pub fills_zero: u64,
    /// Bytes of those.
    pub bytes_zero: u64,
    /// Operations given to the driver.
    pub operations: u64,
    /// Completions of operations that were not in flight.
    pub stale: u64,
}

impl<T> Answered<T> {
    /// A request that came at `now_ns` and waited for nothing.
    pub const fn at_once(ticket: T, outcome: Outcome, object: Option<Handle>, range: ByteRange, now_ns: u64) -> Self {
        Self { ticket, outcome, object, range, since_ns: now_ns, begun_ns: None }
    }
}

impl OpKey {
    #[allow(clippy::cast_possible_truncation, reason = "a slab of jobs is bounded far below 2^32 entries")]
    pub(super) fn new(key: usize, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(key as u32))
    }

    #[allow(clippy::cast_possible_truncation, reason = "takes the two halves apart again")]
    pub(super) const fn parts(self) -> (usize, u32) {
        (self.0 as u32 as usize, (self.0 >> 32) as u32)
    }
}
