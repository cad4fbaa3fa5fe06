//! The rules that always hold, and the book that is kept to check them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::range::ByteRange;

/// A rule of the design that was broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// Every request ends in exactly one answer.
    OneAnswer,
    /// "Done" is said only when every byte of the range is there.
    DoneMeansThere,
    /// No page ever holds a wrong byte.
    RightBytes,
    /// A request fails only for a reason.
    FailureHasReason,
    /// No request waits for longer than it may, and none fails earlier because of that.
    Deadline,
    /// What hangs is not noticed by who reads from elsewhere.
    Isolation,
    /// Only whole, aligned pages inside the object go to a sink; direct reads are aligned.
    Aligned,
    /// A slot has one operation at a time, and memory of an operation is its own until it ended.
    SlotOwner,
    /// No byte is written by two operations at once.
    NoOverlap,
    /// Operations in flight, fills and queues stay within their limits.
    Limits,
    /// Nothing is done with an object that was released, and none is released with an operation in flight.
    Release,
    /// When all is over, nothing is left.
    NothingLeft,
    /// Things come to rest when the faults end.
    Ends,
}

/// A broken rule.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// How.
    pub how: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.how)
    }
}

/// What a check gives.
pub(super) type Checked<T = ()> = Result<T, Violation>;

/// Fails with `rule` unless `holds`.
///
/// # Errors
/// The violation, described by `how`.
pub(super) fn ensure(holds: bool, rule: Rule, how: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Violation { rule, how: how() }) }
}

/// The ticket that the simulation gives to a machine: the number of one delivery of one request. A request
/// that is delivered twice has two.
#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct SimTicket(pub u64);

/// A delivered request that waits for its answer.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    /// The kernel's name for it.
    pub(super) msg_id: u32,
    /// The object's id in the message.
    pub(super) object: u32,
    /// What was asked.
    pub(super) range: ByteRange,
    /// Why it may fail, if something happened that is reason enough.
    pub(super) excuse: Option<&'static str>,
}

/// Every request that was delivered and not answered.
#[derive(Clone, Default, Debug)]
pub(super) struct Ledger {
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
    /// Objects of which a kernel reported a short write as complete: what the machine believes of them is
    /// wrong, in good faith, until it looks again.
    lied_to: BTreeSet<u32>,
}

impl Ledger {
    /// Notes a delivery and makes its ticket.
    pub(super) fn issue(&mut self, waiting: Waiting) -> SimTicket {
        self.next += 1;
        self.waiting.insert(self.next, waiting);
        SimTicket(self.next)
    }

    /// Notes an answer.
    ///
    /// # Errors
    /// The request was answered before.
    pub(super) fn answered(&mut self, ticket: &SimTicket) -> Checked<Waiting> {
        let waiting = self.waiting.remove(&ticket.0);
        waiting.ok_or_else(|| Violation { rule: Rule::OneAnswer, how: format!("{ticket:?} is answered a second time") })
    }

    /// Something happened to an object that is reason enough for its requests to fail.
    pub(super) fn excuse(&mut self, object: u32, reason: &'static str) {
        for waiting in self.waiting.values_mut().filter(|waiting| waiting.object == object) {
            waiting.excuse = Some(reason);
        }
    }

    /// Something happened that is reason enough for every request to fail.
    pub(super) fn excuse_all(&mut self, reason: &'static str) {
        for waiting in self.waiting.values_mut() {
            waiting.excuse = Some(reason);
        }
    }

    /// The kernel lied about a write to an object.
    pub(super) fn lie(&mut self, object: u32) {
        self.lied_to.insert(object);
    }

    /// Whether the kernel ever lied about a write to an object.
    pub(super) fn was_lied_to(&self, object: u32) -> bool {
        self.lied_to.contains(&object)
    }

    /// Whether a request for an object is waiting.
    #[must_use]
    pub(super) fn has(&self, object: u32) -> bool {
        self.waiting.values().any(|waiting| waiting.object == object)
    }

    /// How many are waiting.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none is waiting.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The daemon died: its tickets are void.
    pub(super) fn forget_all(&mut self) {
        self.waiting.clear();
    }
}
