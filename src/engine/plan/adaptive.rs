//! The window that adapts to how an object is read.
//!
//! Most kernels ask only for what is missing, so reads that find their data are invisible here: a planner sees
//! misses. (Where it is told of the others, [`Planner::read_on`] learns from them too.) What it can tell from them:
//!
//! * A miss at the end of what was brought before is a **stream** (see [`super::stream`]).
//! * Any other miss is a **jump**. A fill costs much before its first byte, so it is worth to bring a whole block
//!   of `BLOCK_BYTES` where more of it may be wanted: if the readers return to a part of at most `CLOSE_BYTES`,
//!   or as a **bet**. Bets that nothing has confirmed are bounded by a budget, the operator's setting, so an
//!   image of which little is used stays mostly empty. With the budget spent a jump brings only what is close to it.
//! * Where readers have asked for `WANTED_PERCENT` of a neighbourhood, on both sides of a jump, they seem to want
//!   all of it, and the planner says so: the machine completes it in the background. What was brought unasked does
//!   not count in that, because nobody can ask for it any more. Both sides, because a reader that goes through an
//!   object in one direction and skips most of it leaves nothing that it returns to.
//!
//! The superblock of an image tells where its metadata is: that is brought whole at the first miss in it.

use super::super::presence::PageSet;
use super::stream::{self, Step, Streams};
use crate::range::{self, ByteRange, align_down, align_up, intersect};

/// What a jump brings if readers are likely to return, and as a bet.
const BLOCK_BYTES: u64 = 1 << 20;
/// What a jump brings when the budget is spent: so much before and behind what is asked, in whole units. Files that are
/// read together lie in the order of their names, so more of what follows is worth having than of what precedes.
const CLUSTER_BEFORE_BYTES: u64 = 8 << 10;
/// See [`CLUSTER_BEFORE_BYTES`].
const CLUSTER_BEHIND_BYTES: u64 = 24 << 10;
/// See [`CLUSTER_BEFORE_BYTES`].
const CLUSTER_UNIT_BYTES: u64 = 16 << 10;
/// How far to both sides a jump's neighbourhood reaches.
const NEIGHBOURHOOD_BYTES: u64 = 32 << 20;
/// A smaller neighbourhood, to either side, says nothing.
const SIDE_MIN_BYTES: u64 = 2 << 20;
/// Share of a neighbourhood, in percent, that must have been asked for to make all of it wanted, and half of it on
/// each side. Where one file in ten is read in random order that is seldom reached.
const WANTED_PERCENT: u64 = 13;
/// One jump in so many judges its neighbourhood: counting takes time, and what is judged more often is more often
/// judged wrongly by chance.
const JUDGED_EVERY: u64 = 2;
/// After so many reads of what is there it is counted how much of the object was asked for.
const COUNTED_EVERY: u64 = 64;
/// Blocks are free while readers return to a part of so much: it is one file, or a small image.
const CLOSE_BYTES: u64 = 20 << 20;
/// Least budget for bets, whatever the object's length.
const BUDGET_MIN_BYTES: u64 = 4 << 20;

/// What is known of an object.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// What is there.
    pub present: &'a PageSet,
    /// What was ever asked for.
    pub asked: &'a PageSet,
    /// The object's length as whole pages.
    pub end_bytes: u64,
}

impl Known<'_> {
    /// How much of a range was asked for, and of how much: what was brought unasked is left out, up to half of
    /// the range.
    fn asked_share(&self, range: &ByteRange) -> (u64, u64) {
        let (asked, len) = (self.asked.count_bytes(range), range::len(range));
        let absent = len.saturating_sub(self.present.count_bytes(range));
        (asked, (asked + absent).max(len / 2))
    }
}

/// What to do for a demand that misses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Advice {
    /// To be brought now: it holds the demand.
    pub region: ByteRange,
    /// To be brought when there is nothing better to do: readers seem to want all of it.
    pub complete: Option<ByteRange>,
    /// What was brought before for a stream and was read by now, because its reader goes on behind it.
    pub passed: Option<ByteRange>,
}

/// What to do because of a read that found its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadOn {
    /// To be brought soon, so that the reader does not have to wait for it.
    pub region: Option<ByteRange>,
    /// Readers seem to want all of the object. Where reads of what is there are told of they cost something, until
    /// nothing is missing.
    pub all: bool,
}

/// What is known of how one object is read.
#[derive(Debug)]
pub struct Planner {
    streams: Streams,
    /// From the first to the last byte that was ever asked for.
    hull: ByteRange,
    jumps: u64,
    /// Reads that found their bytes.
    reads: u64,
    /// What may still be brought on bets.
    budget_bytes: u64,
    /// To be brought whole.
    whole: ByteRange,
}

impl Planner {
    /// A planner for an object of `len_bytes`, `budget_percent` of which may be brought on mere bets.
    #[must_use]
    pub fn new(len_bytes: u64, budget_percent: u8) -> Self {
        let share = u64::try_from(u128::from(len_bytes) * u128::from(budget_percent) / 100).unwrap_or(u64::MAX);
        let budget_bytes = if budget_percent == 0 { 0 } else { share.max(BUDGET_MIN_BYTES) };
        Self { streams: Streams::default(), hull: 0..0, jumps: 0, reads: 0, budget_bytes, whole: 0..0 }
    }

    /// A part that is to be brought whole at the first miss in it.
    pub fn bring_whole(&mut self, range: ByteRange) {
        self.whole = range;
    }

    /// The furthest that [`Advice::region`] may reach for a demand.
    #[must_use]
    pub fn reach(&self, demand: &ByteRange) -> ByteRange {
        let start = align_down(demand.start.saturating_sub(stream::WINDOW_MAX_BYTES), BLOCK_BYTES);
        let end = align_up(demand.end.saturating_add(stream::WINDOW_MAX_BYTES), BLOCK_BYTES);
        match intersect(demand, &self.whole) {
            Some(_) => start.min(self.whole.start)..end.max(self.whole.end),
            None => start..end,
        }
    }

    /// What to bring because somebody reads what is there, where such reads are told of. `asked` has them all.
    pub fn read_on(&mut self, read: &ByteRange, asked: &PageSet, end_bytes: u64) -> ReadOn {
        self.reads += 1;
        let region = self.streams.read_on(read).filter(|region| region.start < end_bytes);
        let all = self.reads.is_multiple_of(COUNTED_EVERY) && asked.present_bytes() * 100 >= end_bytes * WANTED_PERCENT;
        ReadOn { region: region.map(|region| region.start..region.end.min(end_bytes)), all }
    }

    /// What to do for a demand (whole pages) that misses.
    pub fn advise(&mut self, demand: &ByteRange, known: &Known<'_>) -> Advice {
        let mut advice = if intersect(demand, &self.whole).is_some() {
            Advice { region: self.whole.clone(), complete: None, passed: None }
        } else if let Some(Step { region, won_bytes, passed }) = self.streams.go_on(demand) {
            self.budget_bytes += won_bytes;
            Advice { region, complete: None, passed: Some(passed) }
        } else {
            self.jump(demand, known)
        };
        self.hull = hull(&self.hull, demand);
        let region = advice.region;
        advice.region = region.start.min(demand.start)..region.end.min(known.end_bytes).max(demand.end);
        advice
    }

    fn jump(&mut self, demand: &ByteRange, known: &Known<'_>) -> Advice {
        let block = aligned(demand, BLOCK_BYTES);
        self.jumps += 1;
        let judges = self.jumps.is_multiple_of(JUDGED_EVERY);
        let wanted = if judges { self.wanted(demand, known) } else { None };
        let mut bet_bytes = 0;
        let region = if wanted.is_some() || self.returns(demand) {
            block
        } else if let Some(absent) = self.bet(&block, known) {
            bet_bytes = absent;
            block
        } else {
            cluster(demand)
        };
        self.streams.begin(&region, bet_bytes);
        Advice { region, complete: wanted, passed: None }
    }

    /// The neighbourhood of a demand, if its readers seem to want all of it.
    fn wanted(&self, demand: &ByteRange, known: &Known<'_>) -> Option<ByteRange> {
        let start = demand.start.saturating_sub(NEIGHBOURHOOD_BYTES).max(self.hull.start);
        let end = demand.end.saturating_add(NEIGHBOURHOOD_BYTES).min(self.hull.end);
        let (before, behind) = (start..demand.start, demand.end..end);
        if range::len(&before) < SIDE_MIN_BYTES || range::len(&behind) < SIDE_MIN_BYTES {
            return None;
        }
        let sides = [known.asked_share(&before), known.asked_share(&behind)];
        let [(asked_before, of_before), (asked_behind, of_behind)] = sides;
        let reaches = |asked: u64, of: u64, percent: u64| asked * 100 >= of * percent;
        let all = reaches(asked_before + asked_behind, of_before + of_behind, WANTED_PERCENT);
        (all && sides.iter().all(|&(asked, of)| reaches(asked, of, WANTED_PERCENT / 2))).then_some(start..end)
    }

    /// Whether a demand returns to where others were, and all of them lie close together.
    fn returns(&self, demand: &ByteRange) -> bool {
        range::len(&self.hull) <= CLOSE_BYTES && self.hull.start <= demand.start && demand.end <= self.hull.end
    }

    /// Takes what a block still lacks out of the budget, if it allows that.
    fn bet(&mut self, block: &ByteRange, known: &Known<'_>) -> Option<u64> {
        let absent = range::len(block).saturating_sub(known.present.count_bytes(block));
        self.budget_bytes = self.budget_bytes.checked_sub(absent)?;
        Some(absent)
    }
}

/// What is close to a demand.
fn cluster(demand: &ByteRange) -> ByteRange {
    let around = demand.start.saturating_sub(CLUSTER_BEFORE_BYTES)..demand.end.saturating_add(CLUSTER_BEHIND_BYTES);
    aligned(&around, CLUSTER_UNIT_BYTES)
}

/// Every aligned unit that a demand touches.
fn aligned(demand: &ByteRange, unit_bytes: u64) -> ByteRange {
    align_down(demand.start, unit_bytes)..align_up(demand.end, unit_bytes)
}

/// The smallest range that holds both; an empty one does not count.
fn hull(a: &ByteRange, b: &ByteRange) -> ByteRange {
    if a.is_empty() { b.clone() } else { a.start.min(b.start)..a.end.max(b.end) }
}
