//! The background: objects of which readers seem to want all are completed, piece by piece, when no fill that
//! somebody asked for or that a window wants is left to start.

use std::num::NonZeroU64;

use super::groups::Class;
use super::{Action, Handle, Machine, Object};
use crate::engine::plan::Complete;
use crate::engine::presence::PageSet;
use crate::range::{ByteRange, align_down, align_up, intersect};

/// Longest background fill. A reader may have to wait for the disk, or for the lock of the cache file, that it
/// holds; but every fill costs much before its first byte, and the longer the background takes, the more readers
/// ask for what it has not brought yet.
const PIECE_BYTES: u64 = 1 << 20;
/// Background fills of a group in flight: one reads while another one writes.
pub(super) const IN_FLIGHT_MAX: u32 = 2;
/// How much of an object is looked through for a piece at a time.
const STEP_BYTES: u64 = 16 << 20;
/// Unit of what is to be completed.
const GOAL_BYTES: u64 = 1 << 20;

/// What a shard does in the background.
#[derive(Debug, Default)]
pub(super) struct Background {
    /// When the rate limit allows the next piece.
    due_ns: u64,
}

/// What is to be completed of an object.
#[derive(Debug)]
pub(super) struct Goal {
    parts: PageSet,
    /// Everything before it was brought, or is on its way.
    at: u64,
    queued: bool,
}

/// What is next for an object.
enum Step {
    Fill(ByteRange),
    Look(ByteRange),
    Nothing,
}

impl Goal {
    pub(super) fn new(len_bytes: u64) -> Self {
        Self { parts: PageSet::new(len_bytes, GOAL_BYTES), at: 0, queued: false }
    }
}

impl<T> Machine<T> {
    /// Wants a part of an object to be completed.
    pub(super) fn complete(&mut self, handle: Handle, part: &ByteRange) {
        let object = &mut self.objects[handle.0];
        if self.limits.completion.when == Complete::Off || object.goal.parts.contains(part) {
            return;
        }
        let part = align_down(part.start, GOAL_BYTES)..align_up(part.end, GOAL_BYTES);
        object.goal.parts.insert(&part);
        object.goal.at = object.goal.at.min(part.start);
        self.resume_background(handle);
    }

    /// Keeps to another rate; the pause that belongs to the old one is over.
    pub(super) const fn set_background_rate(&mut self, bytes_per_s: Option<NonZeroU64>) {
        self.limits.completion.bytes_per_s = bytes_per_s;
        self.background.due_ns = 0;
    }

    /// Goes on with what is to be completed of an object.
    pub(super) fn resume_background(&mut self, handle: Handle) {
        let object = &mut self.objects[handle.0];
        if !object.goal.queued && !object.leaving && object.goal.parts.page_count() > 0 {
            object.goal.queued = true;
            self.enqueue_background(handle);
        }
    }

    /// Starts background fills, as far as slots, fairness, the rate limit and [`IN_FLIGHT_MAX`] allow.
    pub(super) fn start_background(&mut self) {
        while self.background.due_ns <= self.now_ns
            && let Some(handle) = self.next_object(Class::Background)
        {
            match self.next_step(handle) {
                Step::Nothing => self.objects[handle.0].goal.queued = false,
                Step::Look(range) => {
                    self.enqueue_background(handle);
                    // The driver does it at once, and then asks for more.
                    return self.actions.push_back(Action::Look { object: handle, range });
                }
                Step::Fill(piece) => {
                    self.enqueue_background(handle);
                    self.fill_in_background(handle, piece);
                }
            }
        }
    }

    fn fill_in_background(&mut self, handle: Handle, piece: ByteRange) {
        let (key, end) = self.make_job(handle, piece.clone());
        self.objects[handle.0].goal.at = end;
        self.counters.background += 1;
        self.jobs[key].background = true;
        if let Some(rate) = self.limits.completion.bytes_per_s {
            let took_ns = u128::from(end - piece.start) * 1_000_000_000 / u128::from(rate.get());
            self.background.due_ns = self.now_ns.saturating_add(u64::try_from(took_ns).unwrap_or(u64::MAX));
        }
        self.begin(key);
    }

    /// When the rate limit allows the next piece, if there is one and nothing else holds it up.
    pub(super) fn background_due(&self) -> Option<u64> {
        let due_ns = self.background.due_ns;
        let is_wanted = || self.groups.iter().any(|(_, group)| group.wants(Class::Background));
        (due_ns > self.now_ns && is_wanted()).then_some(due_ns)
    }

    /// A background fill of an object failed: so may the others, and nobody waits for them.
    pub(super) fn give_up_background(&mut self, handle: Handle) {
        self.objects[handle.0].goal.at = u64::MAX;
    }

    /// Forgets an object that is closed or about to leave.
    pub(super) fn drop_background(&mut self, handle: Handle) {
        if std::mem::take(&mut self.objects[handle.0].goal.queued) {
            self.drop_turns(handle, Class::Background);
        }
    }

    fn next_step(&mut self, handle: Handle) -> Step {
        let object = &self.objects[handle.0];
        let (mut at, end) = (object.goal.at, align_up(object.blob.len_bytes(), self.limits.page_bytes));
        let step = loop {
            let Some(part) = object.next_part(&(at..end)) else { break Step::Nothing };
            if let Some(unknown) = object.probed.first_absent(&part).and_then(|unknown| intersect(&unknown, &part)) {
                break Step::Look(unknown);
            }
            match self.next_piece(handle, &part, PIECE_BYTES) {
                Some((piece, None)) => break Step::Fill(piece),
                Some((piece, Some(_))) => at = piece.end,
                None => at = part.end,
            }
        };
        self.objects[handle.0].goal.at = at;
        step
    }
}

impl Object {
    /// The next part to complete, at most [`STEP_BYTES`] of it.
    fn next_part(&self, range: &ByteRange) -> Option<ByteRange> {
        let part = intersect(&self.goal.parts.first_present(range)?, range)?;
        Some(part.start..part.end.min(part.start + STEP_BYTES))
    }
}
