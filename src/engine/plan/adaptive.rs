//! The window that adapts to how an object is read.
//!
//! The kernel asks only for what is missing, so reads that find their data are invisible here: a planner sees
//! misses. What it can tell from them:
//!
//! * A miss where an earlier window ended is a **stream**: somebody reads in order. Its window doubles with
//!   each miss, from `STREAM_MIN_BYTES` to `STREAM_MAX_BYTES`. Several streams of an object are followed.
//! * Any other miss is a **jump**. It brings a whole block of `BLOCK_BYTES`, because a fill costs much before
//!   its first byte, as long as all that was asked lies close together, or a budget for such bets lasts. An
//!   image of which little is used so stays mostly empty. After that a jump brings `CLUSTER_BYTES`.
//! * Jumps into a neighbourhood of which much was *asked* (not merely brought) bring `DENSE_BLOCK_BYTES`:
//!   readers have shown that they want it all. That is how random turns into dense.

use super::super::presence::PageSet;
use crate::range::{self, ByteRange, align_down, align_up};

/// What a jump brings as long as the budget lasts.
const BLOCK_BYTES: u64 = 1 << 20;
/// What a jump brings in a dense neighbourhood.
const DENSE_BLOCK_BYTES: u64 = 4 << 20;
/// What a jump brings when the budget is spent.
const CLUSTER_BYTES: u64 = 32 << 10;
/// First window of a stream, before it doubles for the first time.
const STREAM_MIN_BYTES: u64 = 64 << 10;
/// Largest window of a stream.
const STREAM_MAX_BYTES: u64 = 4 << 20;
/// How far beyond a stream's end, at most, a miss still belongs to it: several readers share one stream and
/// overtake each other. A stream that has not proved itself, by its window, is given less.
const STREAM_SLACK_BYTES: u64 = 256 << 10;
/// Streams of one object that are followed; the one that was quiet longest makes room.
const STREAMS: usize = 8;
/// How far to both sides a jump's neighbourhood reaches.
const NEIGHBOURHOOD_BYTES: u64 = 16 << 20;
/// Share of a neighbourhood's clusters, in percent, that must have been asked for to make it dense.
const DENSE_PERCENT: u64 = 23;
/// A smaller neighbourhood says nothing.
const DENSE_MIN_BYTES: u64 = 4 << 20;
/// While all that was asked lies within this much, bets are free: it is one file, or a small image.
const CLOSE_BYTES: u64 = 20 << 20;
/// Least budget for bets, whatever the object's length.
const BUDGET_MIN_BYTES: u64 = 4 << 20;

/// A reader, or several, going through an object in order.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Stream {
    /// Where its last window ended.
    next: u64,
    window_bytes: u64,
    /// When it last moved, in misses.
    moved: u64,
}

/// What is known of how one object is read.
#[derive(Debug)]
pub struct Planner {
    streams: [Stream; STREAMS],
    /// From the first to the last byte that was ever asked for.
    hull: ByteRange,
    /// Clusters that were asked for.
    asked: PageSet,
    budget_bytes: u64,
    misses: u64,
}

impl Planner {
    /// A planner for an object of `len_bytes`, `budget_percent` of which may be brought on mere bets.
    #[must_use]
    pub fn new(len_bytes: u64, budget_percent: u8) -> Self {
        let share = u64::try_from(u128::from(len_bytes) * u128::from(budget_percent) / 100).unwrap_or(u64::MAX);
        let budget_bytes = if budget_percent == 0 { 0 } else { share.max(BUDGET_MIN_BYTES) };
        let asked = PageSet::new(len_bytes, CLUSTER_BYTES);
        Self { streams: [Stream::default(); STREAMS], hull: 0..0, asked, budget_bytes, misses: 0 }
    }

    /// The furthest that [`Planner::region`] may reach for a demand.
    #[must_use]
    pub fn reach(demand: &ByteRange) -> ByteRange {
        let end = demand.end.saturating_add(STREAM_MAX_BYTES);
        align_down(demand.start.saturating_sub(STREAM_SLACK_BYTES), DENSE_BLOCK_BYTES)..align_up(end, DENSE_BLOCK_BYTES)
    }

    /// The region to bring for a demand that misses: it holds the demand (whole pages), and ends at `end_bytes`,
    /// the object's length as whole pages, at the latest.
    pub fn region(&mut self, demand: &ByteRange, present: &PageSet, end_bytes: u64) -> ByteRange {
        self.misses += 1;
        self.hull = match self.hull.is_empty() {
            true => demand.clone(),
            false => self.hull.start.min(demand.start)..self.hull.end.max(demand.end),
        };
        let region = match self.stream_at(demand.start) {
            Some(stream) => self.go_on(stream, demand),
            None => self.jump(demand, present),
        };
        self.asked.insert(&aligned(demand, CLUSTER_BYTES));
        region.start.min(demand.start)..region.end.min(end_bytes).max(demand.end)
    }

    fn stream_at(&self, offset: u64) -> Option<usize> {
        self.streams.iter().position(|stream| {
            let slack = (stream.window_bytes / 4).min(STREAM_SLACK_BYTES);
            stream.window_bytes > 0 && (stream.next..=stream.next + slack).contains(&offset)
        })
    }

    /// The next window of a stream, twice as large as the last.
    fn go_on(&mut self, stream: usize, demand: &ByteRange) -> ByteRange {
        let stream = &mut self.streams[stream];
        stream.window_bytes = (stream.window_bytes * 2).min(STREAM_MAX_BYTES);
        let region = stream.next..demand.end.max(demand.start.saturating_add(stream.window_bytes));
        (stream.next, stream.moved) = (region.end, self.misses);
        region
    }

    fn jump(&mut self, demand: &ByteRange, present: &PageSet) -> ByteRange {
        let block = aligned(demand, BLOCK_BYTES);
        let region = if self.is_dense(demand) {
            aligned(demand, DENSE_BLOCK_BYTES)
        } else if self.bet(&block, present) {
            block
        } else {
            aligned(demand, CLUSTER_BYTES)
        };
        let quiet = self.streams.iter_mut().min_by_key(|stream| stream.moved);
        if let Some(stream) = quiet {
            *stream = Stream { next: region.end, window_bytes: STREAM_MIN_BYTES, moved: self.misses };
        }
        region
    }

    fn is_dense(&self, demand: &ByteRange) -> bool {
        let start = demand.start.saturating_sub(NEIGHBOURHOOD_BYTES).max(self.hull.start);
        let end = demand.end.saturating_add(NEIGHBOURHOOD_BYTES).min(self.hull.end);
        end - start >= DENSE_MIN_BYTES && self.asked.count_bytes(&(start..end)) * 100 >= (end - start) * DENSE_PERCENT
    }

    /// Whether a whole block may be brought for one demand in it; takes what it still lacks out of the budget.
    fn bet(&mut self, block: &ByteRange, present: &PageSet) -> bool {
        let absent = range::len(block).saturating_sub(present.count_bytes(block));
        let may = range::len(&self.hull) <= CLOSE_BYTES || absent <= self.budget_bytes;
        if may {
            self.budget_bytes = self.budget_bytes.saturating_sub(absent);
        }
        may
    }
}

/// Every aligned unit that a demand touches.
fn aligned(demand: &ByteRange, unit_bytes: u64) -> ByteRange {
    align_down(demand.start, unit_bytes)..align_up(demand.end, unit_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;
    const MIB: u64 = 1 << 20;

    /// An object that is filled as its planner says.
    struct Filled {
        planner: Planner,
        present: PageSet,
        len: u64,
        misses: u64,
    }

    impl Filled {
        fn new(len: u64) -> Self {
            Self { planner: Planner::new(len, 6), present: PageSet::new(len, PAGE), len, misses: 0 }
        }

        /// Reads a range as the kernel does: each hole in it is a miss.
        fn read(&mut self, range: &ByteRange) {
            while let Some(absent) = self.present.first_absent(range) {
                self.misses += 1;
                let region = self.planner.region(&absent, &self.present, self.len);
                assert!(region.start <= absent.start && region.end >= absent.end && region.end <= self.len, "{region:?} for {absent:?}");
                self.present.insert(&region);
            }
        }

        fn filled(&self) -> u64 {
            self.present.page_count() * PAGE
        }
    }

    /// `n` items in a random order that is always the same.
    fn scattered(n: u64) -> impl Iterator<Item = u64> {
        let mut items: Vec<u64> = (0..n).collect();
        let mut state = 20_241_120_u64;
        for i in (1..items.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            items.swap(i, (state >> 33) as usize % (i + 1));
        }
        items.into_iter()
    }

    #[test]
    fn a_stream_takes_few_misses() {
        let mut object = Filled::new(64 * MIB);
        for at in 0..64 * 8 {
            object.read(&(at * MIB / 8..(at + 1) * MIB / 8));
        }
        assert!(object.misses <= 24, "{}", object.misses);
    }

    #[test]
    fn several_streams_are_followed_at_a_time() {
        let mut object = Filled::new(256 * MIB);
        for at in 0..16 * 8 {
            for stream in 0..6 {
                let start = stream * 40 * MIB + at * MIB / 8;
                object.read(&(start..start + MIB / 8));
            }
        }
        assert!(object.misses <= 6 * 12, "{}", object.misses);
    }

    #[test]
    fn an_image_of_which_little_is_used_stays_mostly_empty() {
        let mut object = Filled::new(57 * MIB);
        // One of ten files of 16 KiB, in random order.
        for file in scattered(57 * 64).filter(|file| file % 10 == 3) {
            object.read(&(file * MIB / 64..file * MIB / 64 + 3 * PAGE));
        }
        assert!(object.filled() <= 18 * MIB, "{}", object.filled());
        // The worst order: each jump is close to the last, and never looks like a stream.
        let mut object = Filled::new(57 * MIB);
        for file in (0..57 * 64).rev().filter(|file| file % 10 == 3) {
            object.read(&(file * MIB / 64..file * MIB / 64 + 3 * PAGE));
        }
        assert!(object.filled() <= 32 * MIB, "{}", object.filled());
    }

    #[test]
    fn everything_in_random_order_soon_turns_dense() {
        let mut object = Filled::new(57 * MIB);
        for file in scattered(57 * 64) {
            object.read(&(file * MIB / 64..(file + 1) * MIB / 64));
        }
        assert!(object.misses <= 650, "{}", object.misses);
    }

    #[test]
    fn random_reads_of_one_file_in_a_large_blob_bring_that_file() {
        let mut object = Filled::new(57 * MIB);
        for block in scattered(4093).take(2000) {
            object.read(&(40 * MIB + block * PAGE..40 * MIB + (block + 1) * PAGE));
        }
        assert!(object.misses <= 20, "{}", object.misses);
        assert!(object.filled() <= 17 * MIB, "{}", object.filled());
    }

    #[test]
    fn without_a_budget_far_jumps_bring_little() {
        let mut planner = Planner::new(1 << 30, 0);
        let present = PageSet::new(1 << 30, PAGE);
        assert_eq!(planner.region(&(MIB..MIB + PAGE), &present, 1 << 30), MIB..2 * MIB);
        assert_eq!(planner.region(&(90 * MIB..90 * MIB + PAGE), &present, 1 << 30), 90 * MIB..90 * MIB + CLUSTER_BYTES);
    }

    proptest! {
        /// Whatever is asked, the region holds it, stays inside the object and inside what was announced.
        #[test]
        fn regions_hold_demands_and_stay_in_bounds(
            pages in 1u64..100_000, asks in prop::collection::vec((any::<u64>(), 1u64..512), 1..200), budget in 0u8..=100,
        ) {
            let end = pages * PAGE;
            let mut planner = Planner::new(end - 100, budget);
            let mut present = PageSet::new(end, PAGE);
            for (at, n) in asks {
                let start = at % pages * PAGE;
                let demand = start..(start + n * PAGE).min(end);
                let region = planner.region(&demand, &present, end);
                prop_assert!(region.start <= demand.start && region.end >= demand.end && region.end <= end);
                prop_assert!(region.start.is_multiple_of(PAGE) && region.end.is_multiple_of(PAGE));
                let reach = Planner::reach(&demand);
                prop_assert!(reach.start <= region.start && reach.end >= region.end);
                present.insert(&region);
            }
        }
    }
}
