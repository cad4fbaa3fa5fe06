//! What time brings: fills that waited go on, and requests that waited too long are answered.
//!
//! An operation that hangs in the kernel cannot be taken back: it keeps its slot, its memory and its files until it
//! ends, however late. Its readers are not kept that long.

use nix::errno::Errno;

use super::{Action, Answered, Handle, Machine, NONE, State};
use crate::engine::fill::Next;
use crate::front::Outcome;
use crate::range::{ByteRange, intersect};

/// Answered requests among those that are watched, beyond as many as there are unanswered ones: then they are cleared
/// away.
const ANSWERED_MAX: usize = 64;
/// Pause between two counts of the operations that are stuck.
const LOOK_NS: u64 = 1_000_000_000;

/// What keeps a part of an object from coming.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delay {
    /// A read of its source.
    Source,
    /// A write to its sink.
    Sink,
    /// There was no room for a write.
    Room,
    /// It had no operation: others of the same file system have all the slots that it may have.
    Turn,
}

impl<T> Machine<T> {
    /// Time has passed: fills that waited may go on, requests may have waited too long.
    pub fn tick(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        self.wake_waiting();
        self.expire();
        if self.look_ns <= self.now_ns {
            self.look_ns = self.now_ns.saturating_add(LOOK_NS);
            let since_ns = self.now_ns.saturating_sub(self.limits.timeout_ns);
            let is_stuck = |job: &super::Job| job.state == State::Running && job.begun_ns < since_ns;
            self.stuck = self.jobs.iter().filter(|(_, job)| is_stuck(job)).count();
        }
    }

    fn wake_waiting(&mut self) {
        let mut i = 0;
        while i < self.waiting.len() {
            let (key, generation) = self.waiting[i];
            match self.jobs.get_mut(key).filter(|job| job.generation == generation) {
                None => drop(self.waiting.swap_remove(i)),
                Some(job) => {
                    job.fill.wake(self.now_ns);
                    if matches!(job.fill.next(), Next::Wait { .. }) {
                        i += 1;
                    } else {
                        self.waiting.swap_remove(i);
                        self.run(key);
                    }
                }
            }
        }
    }

    /// When [`Machine::tick`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        let due = |&(key, generation): &(usize, u32)| match self.jobs.get(key) {
            Some(job) if job.generation == generation => match job.fill.next() {
                Next::Wait { until_ns } => Some(until_ns),
                _ => None,
            },
            _ => None,
        };
        let expiry = self.oldest().map(|since_ns| since_ns.saturating_add(self.limits.timeout_ns));
        self.waiting.iter().filter_map(due).chain(self.background_due()).chain(expiry).min()
    }

    /// When the oldest request came that waits for its answer.
    #[must_use]
    pub fn oldest(&self) -> Option<u64> {
        self.arrivals.front().and_then(|&(key, _)| self.needs.get(key)).map(|need| need.since_ns)
    }

    /// An operation that began then has ended: it is not stuck any more, if it was counted.
    pub(super) const fn unstick(&mut self, begun_ns: u64) {
        let looked_ns = self.look_ns.saturating_sub(LOOK_NS);
        if self.stuck > 0 && begun_ns < looked_ns.saturating_sub(self.limits.timeout_ns) {
            self.stuck -= 1;
        }
    }

    /// Operations that are in flight and were so for longer than any request may wait when it was looked at last, at most
    /// a second ago.
    #[must_use]
    pub const fn stuck(&self) -> usize {
        self.stuck
    }

    /// What keeps a part of an object from coming, as far as an operation does.
    #[must_use]
    pub fn delay(&self, object: Handle, range: &ByteRange) -> Delay {
        let jobs = self.objects.get(object.0).map_or(&[][..], |object| &object.jobs);
        let of_range = jobs.iter().map(|&(_, key)| &self.jobs[key]).filter(|job| intersect(job.fill.range(), range).is_some());
        let delays = of_range.filter(|job| job.state != State::Queued).map(|job| match job.fill.next() {
            Next::Read { .. } => Delay::Source,
            Next::Write { .. } | Next::Finished(_) => Delay::Sink,
            Next::Wait { .. } => Delay::Room,
        });
        delays.into_iter().next().unwrap_or(Delay::Turn)
    }

    /// Watches over a request that has just come.
    pub(super) fn watch(&mut self, key: usize) {
        self.arrivals.push_back((key, self.needs[key].serial));
        if self.arrivals.len() > 2 * self.needs.len() + ANSWERED_MAX {
            let needs = &self.needs;
            self.arrivals.retain(|&(key, serial)| needs.get(key).is_some_and(|need| need.serial == serial));
        }
    }

    /// Has the oldest one that is watched be one that is not answered.
    pub(super) fn forget_answered(&mut self) {
        while let Some(&(key, serial)) = self.arrivals.front()
            && self.needs.get(key).is_none_or(|need| need.serial != serial)
        {
            self.arrivals.pop_front();
        }
    }

    /// Answers what has waited too long. Requests are watched in the order in which they came.
    fn expire(&mut self) {
        let mut expired = std::mem::take(&mut self.expired);
        while let Some(since_ns) = self.oldest()
            && since_ns.saturating_add(self.limits.timeout_ns) <= self.now_ns
            && let Some((key, _)) = self.arrivals.pop_front()
        {
            let need = &mut self.needs[key];
            if let Some(ticket) = need.ticket.take() {
                let (object, range, begun_ns) = (Some(need.object), need.asked.clone(), need.begun_ns);
                self.counters.needs_timed_out += 1;
                self.answer(Answered { ticket, outcome: Outcome::Failed(Errno::ETIMEDOUT), object, range, since_ns, begun_ns });
            }
            expired.push(key);
            self.forget_answered();
        }
        // All are marked before the first one goes, so that a fill's links are walked once, not once for each.
        for key in expired.drain(..) {
            self.let_go(key);
            self.needs.remove(key);
        }
        self.expired = expired;
    }

    /// Unlinks a need that has its answer from the fills it waited for, and drops those that were not begun and for
    /// which nobody else waits.
    fn let_go(&mut self, key: usize) {
        let (handle, range) = (self.needs[key].object, self.needs[key].range.clone());
        let jobs = &self.objects[handle.0].jobs;
        let mut at = jobs.partition_point(|&(start, _)| start <= range.start).saturating_sub(1);
        while self.needs[key].outstanding > 0
            && let Some(&(_, job)) = self.objects[handle.0].jobs.get(at)
        {
            if self.unlink_answered(job) && self.jobs[job].links == NONE && self.jobs[job].state == State::Queued {
                self.objects[handle.0].jobs.remove(at);
                self.remove_job(job);
            } else {
                at += 1;
            }
        }
        debug_assert_eq!(self.needs[key].outstanding, 0, "linked to a fill outside of its range");
    }

    /// Removes a job's links to needs that have their answer. Whether there were any.
    fn unlink_answered(&mut self, job: usize) -> bool {
        let (mut link, mut kept, mut any) = (std::mem::replace(&mut self.jobs[job].links, NONE), NONE, false);
        while link != NONE {
            let (need, next) = (&mut self.needs[self.links[link].need], self.links[link].next);
            if need.ticket.is_none() {
                need.outstanding -= 1;
                self.links.remove(link);
                any = true;
            } else {
                self.links[link].next = kept;
                kept = link;
            }
            link = next;
        }
        self.jobs[job].links = kept;
        any
    }

    /// Gives an operation to the driver.
    pub(super) fn operate(&mut self, job: usize, action: Action<T>) {
        self.jobs[job].begun_ns = self.now_ns;
        self.counters.operations += 1;
        self.actions.push_back(action);
    }
}
