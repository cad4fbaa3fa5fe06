//! The answers of a turn, which go out back to back: how many of them may wait for each other, and for how long.

use super::machine::Answered;
use crate::front::Ticket;

/// Answers that wait for each other at most; in a turn with more of them they go out in between.
const ANSWERS_MAX: usize = 64;
/// Longest time in microseconds that a reader whose bytes are there waits for the other work of its shard's turn: no
/// step of a turn (a message taken, an operation begun) starts after it while answers wait, so only a single system
/// call can make it longer. A fill takes several times as long.
pub(super) const ANSWER_WAIT_MAX_US: u64 = 100;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Batch {
    answers: Vec<Answered<Ticket>>,
    /// Nothing in it, or about to come into it, has waited since an earlier time.
    since_ns: u64,
}

impl Batch {
    /// From now on answers can come in: what has completed was just taken, or all answers were just given.
    pub(super) const fn begin(&mut self, now_ns: u64) {
        self.since_ns = now_ns;
    }

    pub(super) fn push(&mut self, answered: Answered<Ticket>) {
        self.answers.push(answered);
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// No other one may come in.
    pub(super) const fn is_full(&self) -> bool {
        self.answers.len() >= ANSWERS_MAX
    }

    /// The first ones have waited for as long as they may.
    pub(super) const fn is_due(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.since_ns) >= ANSWER_WAIT_MAX_US * 1000
    }

    /// Takes them all, to be given; the room comes back with [`Batch::reuse`].
    pub(super) fn take(&mut self) -> Vec<Answered<Ticket>> {
        std::mem::take(&mut self.answers)
    }

    /// Room for the next ones, so that nothing is allocated for them.
    pub(super) fn reuse(&mut self, room: Vec<Answered<Ticket>>) {
        debug_assert!(room.is_empty() && self.answers.is_empty(), "answers would be lost");
        self.answers = room;
    }

    /// Takes those of a kind.
    pub(super) fn extract(&mut self, of_kind: impl FnMut(&mut Answered<Ticket>) -> bool) -> impl Iterator<Item = Answered<Ticket>> {
        self.answers.extract_if(.., of_kind)
    }
}
