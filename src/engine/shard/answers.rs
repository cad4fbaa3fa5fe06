//! The answers of a turn, which go out back to back: how many of them may wait for each other, and for how long.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::Shard;
use crate::engine::advice::{Device, advice, patience};
use crate::engine::io::{Io, REPLIES_MAX};
use crate::engine::machine::{Answered, Handle};
use crate::engine::trace::Record;
use crate::front::{Outcome, Replied, Reply, Ticket};
use crate::range::ByteRange;

/// Answers that wait for each other at most; in a turn with more of them they go out in between.
const ANSWERS_MAX: usize = REPLIES_MAX;
/// From so many replies on, given in one call, their readers may go first: each turn of a shard that has few questions costs
/// as much as one that has many.
const YIELD_MIN: usize = 4;
/// Longest time in microseconds that a reader whose bytes are there waits for the other work of its shard's turn: no
/// step of a turn (a message taken, an operation begun) starts after it while answers wait, so only a single system
/// call can make it longer. A fill takes several times as long.
pub(in crate::engine) const ANSWER_WAIT_MAX_US: u64 = 100;

/// See the module's description.
#[derive(Debug)]
pub(super) struct Batch {
    answers: Vec<Answered<Ticket>>,
    /// Room for those that are messages, and for what became of them.
    replies: Vec<Reply>,
    results: Vec<i32>,
    /// Nothing in it, or about to come into it, has waited since an earlier time.
    since_ns: u64,
}

/// When an answered request came, was begun, and was answered.
#[derive(Clone, Copy, Debug)]
struct Times {
    since_ns: u64,
    begun_ns: Option<u64>,
    now_ns: u64,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            answers: Vec::with_capacity(ANSWERS_MAX),
            replies: Vec::with_capacity(ANSWERS_MAX),
            results: Vec::with_capacity(ANSWERS_MAX),
            since_ns: 0,
        }
    }
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
}

impl<I: Io> Shard<I> {
    /// Gives this turn's answers, back to back.
    pub(super) fn answer(&mut self) {
        let mut answers = self.answers.take();
        self.stats().batch(answers.len());
        let given = u32::try_from(answers.len()).unwrap_or(u32::MAX);
        self.reply(&mut answers);
        let mut last_ns = None;
        for answered in answers.drain(..) {
            let Answered { ticket, outcome, object, range, since_ns, begun_ns } = answered;
            let delivered = ticket.answer(outcome);
            let now_ns = self.clock.now_ns();
            last_ns = Some(now_ns);
            let times = Times { since_ns, begun_ns, now_ns };
            self.account(delivered, (object, range, outcome), times);
        }
        self.answers.reuse(answers);
        self.answers.begin(last_ns.unwrap_or_else(|| self.clock.now_ns()));
        self.intakes.iter_mut().fold(given, |given, intake| intake.router.answered(given));
    }

    /// Gives those answers that are messages, in one call if the I/O can do that. Others are left.
    fn reply(&mut self, answers: &mut Vec<Answered<Ticket>>) {
        // All of them are of one front end.
        if answers.first().is_none_or(|first| first.ticket.reply(first.outcome).is_none()) {
            return;
        }
        let (mut replies, mut results) = (std::mem::take(&mut self.answers.replies), std::mem::take(&mut self.answers.results));
        replies.extend(answers.iter().map_while(|answered| answered.ticket.reply(answered.outcome)));
        if self.io.reply(&replies, &mut results) {
            let now_ns = self.clock.now_ns();
            for (answered, result) in answers.drain(..replies.len()).zip(results.drain(..)) {
                let Answered { ticket, outcome, object, range, since_ns, begun_ns } = answered;
                let delivered = match usize::try_from(result).map_err(|_| Errno::from_raw(-result)) {
                    // Not given, or nobody knows: once more by itself. Until then its name is nobody else's.
                    Err(errno) if errno != Errno::ENOENT => ticket.answer(outcome),
                    written => {
                        let Replied { delivered, close } = ticket.replied(written);
                        close.into_iter().for_each(|fd| self.io.close(fd));
                        delivered
                    }
                };
                self.account(delivered, (object, range, outcome), Times { since_ns, begun_ns, now_ns });
            }
            if self.caps.readers_preempt {
                self.spin.answered(replies.len(), now_ns);
            }
        }
        if replies.len() >= YIELD_MIN {
            // Readers on this CPU ask again before it goes on, and are answered together.
            std::thread::yield_now();
        }
        replies.clear();
        (self.answers.replies, self.answers.results) = (replies, results);
    }

    /// Counts and reports an answer that was given.
    fn account(&mut self, delivered: io::Result<bool>, (object, range, outcome): (Option<Handle>, ByteRange, Outcome), times: Times) {
        let latency_ns = times.now_ns.saturating_sub(times.since_ns);
        self.stats().answered(outcome, latency_ns, times.begun_ns.map(|begun_ns| begun_ns.saturating_sub(times.since_ns)));
        if let Some(stats) = object.and_then(|object| self.attached(object)).map(|attached| &attached.stats) {
            stats.answered(times.begun_ns.map(|_| latency_ns), outcome != Outcome::Done, times.now_ns);
        }
        match delivered {
            Ok(true) => {}
            Ok(false) => self.stats().late(),
            Err(error) => {
                self.stats().refused();
                if self.shared.may_log_failure() {
                    tracing::error!("the kernel did not take the answer to a read: {error}");
                }
            }
        }
        if outcome != Outcome::Done || self.tracer.is_some() {
            self.report(object, range, latency_ns, outcome);
        }
        if let (Outcome::Failed(_), Some(object)) = (outcome, object) {
            self.let_go_if_lost(object);
        }
    }

    /// Closes an object whose blob could not be found, so that the next request has it looked for again.
    fn let_go_if_lost(&mut self, object: Handle) {
        if self.caps.reopens && self.attached(object).is_some_and(|attached| attached.blob.is_lost()) && self.machine.pick(object) {
            self.offer(object);
            self.shared.look_again();
        }
    }

    /// Tells of an answer: a failure in the log, any in the trace.
    fn report(&self, object: Option<Handle>, range: ByteRange, latency_ns: u64, outcome: Outcome) {
        let attached = object.and_then(|object| self.attached(object));
        let delay = object.filter(|_| outcome == Outcome::Failed(Errno::ETIMEDOUT)).map(|object| self.machine.delay(object, &range));
        let record = Record { key: attached.map(|attached| Arc::clone(&attached.key)), range, latency_ns, outcome };
        if let Outcome::Failed(errno) = outcome
            && errno != Errno::ECANCELED
            && self.shared.may_log_failure()
        {
            match delay.zip(attached) {
                Some((delay, attached)) => {
                    let (why, device) = (patience(delay), Device(attached.blob.device()));
                    tracing::error!("a reader gets an I/O error: {record}: {why}; its source lies on {device}");
                }
                None => tracing::error!("a reader gets an I/O error: {record}: {}", advice(errno)),
            }
        }
        if let Some(tracer) = &self.tracer {
            tracer.send(record);
        }
    }

    /// Whether a request is left to the next daemon: it fails only because this one ends.
    pub(super) fn leaves(&self, answered: &Answered<Ticket>) -> bool {
        self.is_ending && answered.outcome == Outcome::Failed(Errno::ECANCELED) && self.shared.leaves_rest()
    }
}
