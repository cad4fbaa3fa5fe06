//! Readers that go through an object in order.
//!
//! What was brought for one miss is a **stretch**. A miss at one of its ends means that somebody went through
//! it and wants more: the stretch grows there, each time by twice as much. Readers that go on a little beyond
//! the end still count, because several of them may share a stretch and overtake each other; those that leave
//! out more than a fraction of what was brought do not, so a reader that skips most of an object is no stream.

use crate::range::{self, ByteRange};

/// First window of a stream, before it doubles for the first time.
const WINDOW_MIN_BYTES: u64 = 64 << 10;
/// Largest window of a stream.
pub(super) const WINDOW_MAX_BYTES: u64 = 4 << 20;
/// How far beyond an end, as a share of what was brought last, a miss still belongs to the stretch: an eighth.
const SLACK_SHIFT: u32 = 3;
/// The same at most, in bytes.
const SLACK_MAX_BYTES: u64 = 64 << 10;
/// Stretches of one object that are remembered; the one that was quiet longest makes room.
const STRETCHES: usize = 8;

/// See the module's description.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
struct Stretch {
    brought: ByteRange,
    window_bytes: u64,
    /// How much came last.
    last_bytes: u64,
    /// What of it was a bet, to be given back once the stretch has proved to be a stream.
    bet_bytes: u64,
    /// When it last grew, in misses.
    moved: u64,
}

/// The stretches of one object.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(super) struct Streams {
    stretches: [Stretch; STRETCHES],
    misses: u64,
}

/// How a stretch grows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Step {
    /// The next window.
    pub(super) region: ByteRange,
    /// The bet that is won by it.
    pub(super) won_bytes: u64,
    /// The window before: somebody has gone through it.
    pub(super) passed: ByteRange,
}

impl Streams {
    /// The next window for a demand at the end of a stretch.
    pub(super) fn go_on(&mut self, demand: &ByteRange) -> Option<Step> {
        self.misses += 1;
        let continued = self.stretches.iter_mut().find_map(|stretch| stretch.leads_to(demand).map(|forward| (stretch, forward)));
        let (stretch, forward) = continued?;
        let ByteRange { start, end } = stretch.brought;
        let last_bytes = stretch.last_bytes;
        let passed = if forward { end.saturating_sub(last_bytes)..end } else { start..start.saturating_add(last_bytes) };
        stretch.window_bytes = (stretch.window_bytes * 2).min(WINDOW_MAX_BYTES);
        let region = if forward {
            stretch.brought.end..demand.end.max(demand.start.saturating_add(stretch.window_bytes))
        } else {
            demand.start.min(demand.end.saturating_sub(stretch.window_bytes))..stretch.brought.start
        };
        stretch.brought = stretch.brought.start.min(region.start)..stretch.brought.end.max(region.end);
        stretch.last_bytes = range::len(&region);
        stretch.moved = self.misses;
        Some(Step { region, won_bytes: std::mem::take(&mut stretch.bet_bytes), passed })
    }

    /// The next window where somebody reads the last half of what came last, before it ends: so that nobody waits for it.
    pub(super) fn read_on(&mut self, read: &ByteRange) -> Option<ByteRange> {
        let nearly_through = |stretch: &&mut Stretch| {
            let last_half = stretch.brought.end.saturating_sub(stretch.last_bytes / 2)..stretch.brought.end;
            stretch.window_bytes > WINDOW_MIN_BYTES && last_half.contains(&read.start)
        };
        let end = self.stretches.iter_mut().find(nearly_through)?.brought.end;
        self.go_on(&(end..end)).map(|step| step.region)
    }

    /// Remembers what was brought for a demand that is not at the end of any stretch.
    pub(super) fn begin(&mut self, region: &ByteRange, bet_bytes: u64) {
        let quiet = self.stretches.iter_mut().min_by_key(|stretch| stretch.moved);
        if let Some(stretch) = quiet {
            let last_bytes = range::len(region);
            *stretch = Stretch { brought: region.clone(), window_bytes: WINDOW_MIN_BYTES, last_bytes, bet_bytes, moved: self.misses };
        }
    }
}

impl Stretch {
    /// Whether a demand continues the stretch at its end (`true`) or at its start (`false`).
    fn leads_to(&self, demand: &ByteRange) -> Option<bool> {
        if self.window_bytes == 0 {
            return None;
        }
        let slack = (self.last_bytes >> SLACK_SHIFT).min(SLACK_MAX_BYTES);
        let ByteRange { start, end } = self.brought;
        if (end..=end.saturating_add(slack)).contains(&demand.start) {
            return Some(true);
        }
        (start.saturating_sub(slack)..=start).contains(&demand.end).then_some(false)
    }
}
