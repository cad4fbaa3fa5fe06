//! Needs: how a waiting reader is linked to fills, and when it has its answer.

use nix::errno::Errno;

use super::groups::Class;
use super::{Action, Answered, FAILURES_MAX, Handle, Job, Limits, Link, Machine, NONE, Need, Object, State};
use crate::engine::plan::adaptive::{Advice, Known, ReadOn};
use crate::engine::plan::{self, Window};
use crate::front::Outcome;
use crate::range::{ByteRange, align_down, align_up, intersect};

/// Fills of an object that nobody waits for yet and that have not been started. Beyond it no more are made.
pub(super) const AHEAD_MAX: usize = 256;

/// Most bytes between two holes that are written again, so that one fill closes both: they take less time than
/// what another fill costs before its first byte.
const GAP_MAX_BYTES: u64 = 64 << 10;
/// What is asked is filled alone, before the rest of its region, if the rest is at least this much: less is
/// cheaper to bring in one write than to write twice.
const AHEAD_MIN_BYTES: u64 = 256 << 10;

impl Object {
    /// Somebody reads a range that was not asked for before: how much of it had been brought ahead.
    pub(super) fn use_ahead(&mut self, read: &ByteRange) -> u64 {
        if self.ahead_bytes == 0 {
            return 0;
        }
        let used = self.present.count_bytes_without(read, &self.asked).min(self.ahead_bytes);
        self.ahead_bytes -= used;
        used
    }
}

impl<T> Machine<T> {
    pub(super) fn answer(&mut self, answered: Answered<T>) {
        if matches!(answered.outcome, Outcome::Failed(_)) {
            self.counters.needs_failed += 1;
        }
        self.actions.push_back(Action::Answer(answered));
    }

    /// Looks again at every need whose last fill ended, until all of them wait or have their answer.
    pub(super) fn settle(&mut self) {
        while let Some(key) = self.revisit.pop_front() {
            if let Some(outcome) = self.verdict(key) {
                self.conclude(key, outcome);
            }
        }
    }

    /// Gives a need its answer.
    pub(super) fn conclude(&mut self, key: usize, outcome: Outcome) {
        let need = self.needs.remove(key);
        self.forget_answered();
        let Need { ticket, object, asked: range, since_ns, begun_ns, .. } = need;
        if let Some(ticket) = ticket {
            self.answer(Answered { ticket, outcome, object: Some(object), range, since_ns, begun_ns });
        }
    }

    /// The answer of a need whose fills ended. `None`: more fills were made for it.
    fn verdict(&mut self, key: usize) -> Option<Outcome> {
        let need = &mut self.needs[key];
        let object = &self.objects[need.object.0];
        let failed = need.failed.take();
        need.exact |= failed.is_some();
        // After a failure nothing new may be tried before the verdict; so it costs another walk over the pages.
        if (object.closed || failed.is_some() && need.failures >= FAILURES_MAX) && !object.present.contains(&need.range) {
            return Some(Outcome::Failed(failed.filter(|_| !object.closed).unwrap_or(Errno::ECANCELED)));
        }
        if !object.closed {
            self.schedule(key);
        }
        (self.needs[key].outstanding == 0).then_some(Outcome::Done)
    }

    /// Links a need to the fills that bring its bytes, and makes those that are missing. If it is linked to none
    /// afterwards, all of its bytes are there.
    pub(super) fn schedule(&mut self, key: usize) {
        let need = &self.needs[key];
        let (handle, range) = (need.object, need.range.clone());
        let region = if need.exact { range.clone() } else { need.region.clone() };
        let Limits { fill_max_bytes, fills_per_need, .. } = self.limits;
        // What is asked comes alone and first, if much more is brought behind it.
        let alone = region.end - range.end >= AHEAD_MIN_BYTES && range.start - region.start < AHEAD_MIN_BYTES;
        let (mut at, end) = if alone {
            (range.start, range.end)
        } else {
            (align_down(range.start, fill_max_bytes).max(region.start), align_up(range.end, fill_max_bytes).min(region.end))
        };
        while self.needs[key].outstanding < fills_per_need
            && let Some((piece, job)) = self.next_piece(handle, &(at..end), fill_max_bytes)
        {
            at = piece.end;
            if intersect(&piece, &range).is_none() {
                continue;
            }
            let job = if let Some(job) = job {
                self.counters.joined += 1;
                job
            } else {
                let (job, end) = self.make_job(handle, piece);
                at = end;
                job
            };
            if intersect(self.jobs[job].fill.range(), &range).is_some() {
                self.link(job, key);
            } else {
                // It was cut at an extent's end before the demand begins.
                self.enqueue(job, Class::Ahead);
            }
        }
        if self.needs[key].outstanding > 0 {
            self.fill_ahead(handle, &(range.end..region.end));
            self.fill_ahead(handle, &(region.start..range.start));
        }
    }

    /// The region to bring for a demand that has just come. What the planner wants besides goes to the background.
    pub(super) fn region(&mut self, handle: Handle, range: &ByteRange) -> ByteRange {
        let (page_bytes, window) = (self.limits.page_bytes, self.limits.window);
        let len = self.objects[handle.0].blob.len_bytes();
        let missing = match window {
            Window::Fixed(bytes) => return plan::window(range, bytes, len, page_bytes),
            Window::Adaptive { .. } => self.first_missing(handle, range),
        };
        // All of it is there or on its way: it says nothing new of the reader.
        let Some(start) = missing else { return range.clone() };
        let object = &mut self.objects[handle.0];
        let Some(planner) = &mut object.planner else { return range.clone() };
        let known = Known { present: &object.present, asked: &object.asked, end_bytes: align_up(len, page_bytes) };
        // A request that begins in what is there goes on where that ends: so a stream is known as one.
        let Advice { region, complete, passed } = planner.advise(&(start..range.end), &known);
        // Else it is told of each read.
        if let Some(passed) = passed.filter(|_| !self.limits.sinks_know) {
            self.counters.bytes_ahead_used += object.use_ahead(&passed);
        }
        if let Some(part) = complete {
            self.complete(handle, &part);
        }
        region.start.min(range.start)..region.end
    }

    /// Somebody has read what is there, where that is told of: so streams are brought before they are asked for.
    pub fn has_read(&mut self, handle: Handle, read: &ByteRange) {
        let Some(object) = self.objects.get_mut(handle.0).filter(|object| !object.closed) else { return };
        let end_bytes = align_up(object.blob.len_bytes(), self.limits.page_bytes);
        self.counters.bytes_ahead_used += object.use_ahead(read);
        object.asked.insert(read);
        let Some(ReadOn { region, all }) = object.planner.as_mut().map(|planner| planner.read_on(read, &object.asked, end_bytes)) else {
            return;
        };
        if let Some(region) = region {
            self.fill_ahead(handle, &region);
        }
        if all {
            self.complete(handle, &(0..end_bytes));
        }
    }

    /// Where something of a range begins that is neither there nor on its way.
    fn first_missing(&self, handle: Handle, range: &ByteRange) -> Option<u64> {
        let mut at = range.start;
        while let Some((piece, job)) = self.next_piece(handle, &(at..range.end), self.limits.fill_max_bytes) {
            if job.is_none() {
                return Some(piece.start);
            }
            at = piece.end;
        }
        None
    }

    /// Makes fills for the rest of a region, as far as the queue for them allows.
    fn fill_ahead(&mut self, handle: Handle, region: &ByteRange) {
        let mut at = region.start;
        while self.objects[handle.0].queues[Class::Ahead as usize].len() < AHEAD_MAX
            && let Some((piece, job)) = self.next_piece(handle, &(at..region.end), self.limits.fill_max_bytes)
        {
            at = piece.end;
            if job.is_none() {
                let (job, end) = self.make_job(handle, piece);
                at = end;
                self.enqueue(job, Class::Ahead);
            }
        }
    }

    /// The first piece of `range` that is not there: a job that already brings it, or a range to make one of, of
    /// at most `max_bytes`.
    pub(super) fn next_piece(&self, handle: Handle, range: &ByteRange, max_bytes: u64) -> Option<(ByteRange, Option<usize>)> {
        if range.start >= range.end {
            return None;
        }
        let object = &self.objects[handle.0];
        let absent = intersect(&object.present.first_absent(range)?, range)?;
        let after = object.jobs.partition_point(|&(start, _)| start <= absent.start);
        if let Some(&(_, key)) = after.checked_sub(1).and_then(|before| object.jobs.get(before))
            && self.jobs[key].fill.range().end > absent.start
        {
            return Some((self.jobs[key].fill.range().clone(), Some(key)));
        }
        let free = absent.start..object.jobs.get(after).map_or(range.end, |&(start, _)| start.min(range.end));
        let piece = plan::piece(&free, max_bytes.min(self.limits.fill_max_bytes));
        Some((piece.start..self.worth_one_fill(object, absent.end.min(piece.end), piece.end), None))
    }

    /// How far a fill that reaches to `end` goes on, `limit` at most: over what is there already, if that is
    /// little and something is missing behind it. To write the same bytes once more is cheaper than another fill.
    fn worth_one_fill(&self, object: &Object, mut end: u64, limit: u64) -> u64 {
        while let Some(next) = object.present.first_absent(&(end..limit))
            && next.start - end <= GAP_MAX_BYTES
        {
            end = next.end.min(limit);
        }
        end
    }

    fn link(&mut self, job: usize, need: usize) {
        let next = self.jobs[job].links;
        if next == NONE && self.jobs[job].state == State::Queued {
            // Somebody waits for it now: it overtakes what nobody waits for.
            self.enqueue(job, Class::Demand);
        }
        self.jobs[job].links = self.links.insert(Link { need, next });
        self.needs[need].outstanding += 1;
    }

    /// Tells every need that waits for a job how it ended.
    pub(super) fn unlink(&mut self, job: usize, result: Result<(), Errno>) {
        let mut link = std::mem::replace(&mut self.jobs[job].links, NONE);
        let Job { state, started_ns, .. } = self.jobs[job];
        let started = state != State::Queued;
        while link != NONE {
            let Link { need: key, next } = self.links.remove(link);
            link = next;
            let need = &mut self.needs[key];
            need.outstanding -= 1;
            if started {
                need.begun_ns.get_or_insert(started_ns.max(need.since_ns));
            }
            if let Err(errno) = result {
                need.failed = Some(errno);
                // A fill that brought more than was asked may have failed where nobody asked: no verdict on this need.
                let fill = self.jobs[job].fill.range();
                need.failures += u8::from(fill.start >= need.range.start && fill.end <= need.range.end);
            }
            if need.outstanding == 0 {
                self.revisit.push_back(key);
            }
        }
    }
}
