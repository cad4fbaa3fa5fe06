//! What the planner makes of whole access lists: a model of an object that is filled as it says, read in every
//! order we could think of, with the hits invisible as they are in life. The bounds are on requests (each costs
//! a reader a fifth of a millisecond) and on what is brought in vain.
//!
//! The trees are made by chance from seeds; nothing here is taken from the traces that the constants were chosen by.

use proptest::prelude::*;

use super::adaptive::{Known, Planner};
use crate::engine::presence::PageSet;
use crate::range::{self, ByteRange, align_down, align_up};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Longest request: what the kernel reads ahead at a time.
const REQUEST_BYTES: u64 = 128 << 10;
/// What the background brings while a reader reads one file.
const BACKGROUND_BYTES: u64 = 512 << 10;
const BUDGET_PERCENT: u8 = 10;
const SEEDS: std::ops::Range<u64> = 1..17;

/// Numbers by chance, from a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((u128::from(self.0) * u128::from(limit)) >> 64) as u64
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// Files of a tree one behind the other: many small ones, a few large.
fn tree(dice: &mut Dice, len: u64) -> Vec<ByteRange> {
    let (mut files, mut at) = (Vec::new(), 0);
    while at < len {
        let pages = (1 << dice.below(6)) + dice.below(4);
        let end = (at + pages * PAGE).min(len);
        files.push(at..end);
        at = end;
    }
    files
}

/// An object that is filled as its planner says.
struct Filled {
    planner: Planner,
    present: PageSet,
    asked: PageSet,
    goal: PageSet,
    len: u64,
    misses: u64,
}

impl Filled {
    fn new(len: u64) -> Self {
        let set = || PageSet::new(len, PAGE);
        let planner = Planner::new(len, BUDGET_PERCENT);
        Self { planner, present: set(), asked: set(), goal: set(), len, misses: 0 }
    }

    /// Reads files in the order given; the background goes on meanwhile.
    fn read(len: u64, files: &[ByteRange]) -> Self {
        let mut object = Self::new(len);
        for file in files {
            object.access(file);
            object.background();
        }
        object
    }

    /// Reads a range as the kernel does: each hole in it is a miss.
    fn access(&mut self, wanted: &ByteRange) {
        while let Some(absent) = self.present.first_absent(wanted) {
            let demand = absent.start..absent.end.min(absent.start + REQUEST_BYTES);
            self.misses += 1;
            let reach = self.planner.reach(&demand);
            let known = Known { present: &self.present, asked: &self.asked, end_bytes: self.len };
            let advice = self.planner.advise(&demand, &known);
            let region = advice.region;
            assert!(region.start <= demand.start && region.end >= demand.end && region.end <= self.len, "{region:?} for {demand:?}");
            assert!(region.start.is_multiple_of(PAGE) && region.end.is_multiple_of(PAGE), "{region:?}");
            assert!(reach.start <= region.start && reach.end >= region.end, "{region:?} outside of {reach:?}");
            self.asked.insert(&demand);
            self.present.insert(&region);
            if let Some(part) = advice.complete {
                self.goal.insert(&part);
            }
        }
    }

    fn background(&mut self) {
        let mut at = 0;
        while let Some(part) = self.goal.first_present(&(at..self.len)) {
            if let Some(absent) = self.present.first_absent(&part) {
                return self.present.insert(&(absent.start..absent.end.min(absent.start + BACKGROUND_BYTES)));
            }
            at = part.end;
        }
    }

    /// Share of the object that is there at last, in percent; the background has all the time it wants.
    fn percent(mut self) -> u64 {
        let mut at = 0;
        while let Some(part) = self.goal.first_present(&(at..self.len)) {
            self.present.insert(&part);
            at = part.end;
        }
        self.present.present_bytes() * 100 / self.len
    }
}

/// A test's order of files from a tree.
type Order = fn(&mut Dice, Vec<ByteRange>) -> Vec<ByteRange>;

/// What an order may cost.
#[derive(Clone, Copy)]
struct Bounds {
    /// Misses for each 100 MiB of the tree.
    misses: u64,
    /// How much of the object is brought, in percent: on the average of all seeds,
    average: u64,
    /// and of any. Objects of which [`SMALL_BYTES`] are brought do not count: so much is always allowed.
    most: u64,
}

/// What may be brought of any object: the budget, and what is close together.
const SMALL_BYTES: u64 = 24 * MIB;

/// Reads trees of several lengths in an order.
fn bounded(order: Order, bounds: Bounds) {
    let mut sum = 0;
    for seed in SEEDS {
        let mut dice = Dice(seed);
        let len = [24, 57, 200, 400][seed as usize % 4] * MIB;
        let files = tree(&mut dice, len);
        let object = Filled::read(len, &order(&mut dice, files));
        let misses = object.misses * 100 * MIB / len;
        let filled = object.percent();
        println!("seed {seed}: {} MiB, {misses} misses per 100 MiB, {filled} % filled", len / MIB);
        assert!(misses <= bounds.misses, "seed {seed}: {misses} misses");
        assert!(filled <= bounds.most || filled * len / 100 <= SMALL_BYTES, "seed {seed}: {filled} % filled");
        sum += filled;
    }
    let average = sum / (SEEDS.end - SEEDS.start);
    println!("{average} % filled on the average");
    assert!(average <= bounds.average, "{average} % filled on the average");
}

fn shuffled(dice: &mut Dice, mut files: Vec<ByteRange>) -> Vec<ByteRange> {
    dice.shuffle(&mut files);
    files
}

#[test]
fn in_order() {
    bounded(|_, files| files, Bounds { misses: 150, average: 100, most: 100 });
}

#[test]
fn backwards() {
    bounded(|_, files| files.into_iter().rev().collect(), Bounds { misses: 150, average: 100, most: 100 });
}

#[test]
fn by_eight_readers_that_share_the_work() {
    let order: Order = |dice, mut files| {
        // Each is up to eight files late.
        files.chunks_mut(8).for_each(|chunk| dice.shuffle(chunk));
        files
    };
    bounded(order, Bounds { misses: 400, average: 100, most: 100 });
}

#[test]
fn two_streams_that_take_turns() {
    let order: Order = |_, mut files| {
        let second = files.split_off(files.len() / 2);
        files.into_iter().zip(second).flat_map(|(a, b)| [a, b]).collect()
    };
    bounded(order, Bounds { misses: 200, average: 100, most: 100 });
}

#[test]
fn everything_in_random_order() {
    bounded(shuffled, Bounds { misses: 700, average: 100, most: 100 });
}

#[test]
fn one_file_in_ten_in_random_order() {
    bounded(|dice, files| shuffled(dice, files).into_iter().step_by(10).collect(), Bounds { misses: 300, average: 35, most: 80 });
}

#[test]
fn one_file_in_twenty_in_random_order() {
    bounded(|dice, files| shuffled(dice, files).into_iter().step_by(20).collect(), Bounds { misses: 150, average: 25, most: 30 });
}

#[test]
fn one_file_in_ten_in_order() {
    bounded(|_, files| files.into_iter().step_by(10).collect(), Bounds { misses: 300, average: 40, most: 60 });
}

#[test]
fn one_file_in_ten_backwards() {
    bounded(|_, files| files.into_iter().rev().step_by(10).collect(), Bounds { misses: 300, average: 40, most: 60 });
}

#[test]
fn every_other_file_in_order_is_nearly_a_stream() {
    bounded(|_, files| files.into_iter().step_by(2).collect(), Bounds { misses: 600, average: 100, most: 100 });
}

#[test]
fn a_few_files_again_and_again() {
    let order: Order = |dice, files| {
        // Zipf-like: the rank falls with the square of a number by chance.
        let n = files.len() as u64;
        let popular = shuffled(dice, files);
        (0..n).map(|_| popular[(dice.below(n) * dice.below(n) / n * dice.below(n) / n) as usize].clone()).collect()
    };
    bounded(order, Bounds { misses: 700, average: 100, most: 100 });
}

#[test]
fn random_pages_of_one_file_in_a_large_object_bring_that_file() {
    for seed in SEEDS {
        let mut dice = Dice(seed);
        let (len, start) = (200 * MIB, dice.below(180) * MIB);
        let pages: Vec<_> = (0..2000).map(|_| start + dice.below(4096) * PAGE).map(|at| at..at + PAGE).collect();
        let object = Filled::read(len, &pages);
        assert!(object.misses <= 40, "seed {seed}: {}", object.misses);
        assert!(object.percent() <= 9, "seed {seed}");
    }
}

#[test]
fn without_completion_random_turns_dense_all_the_same() {
    for seed in SEEDS {
        let mut dice = Dice(seed);
        let len = 57 * MIB;
        let files = tree(&mut dice, len);
        let mut object = Filled::new(len);
        shuffled(&mut dice, files).iter().for_each(|file| object.access(file));
        assert!(object.misses <= 550, "seed {seed}: {}", object.misses);
    }
}

#[test]
fn a_part_to_be_brought_whole_is_brought_at_the_first_miss_in_it() {
    let mut object = Filled::new(64 * MIB);
    object.planner.bring_whole(4 * MIB..9 * MIB);
    object.access(&(PAGE..2 * PAGE));
    assert_eq!(object.present.count_bytes(&(4 * MIB..9 * MIB)), 0);
    object.access(&(5 * MIB..5 * MIB + PAGE));
    assert_eq!(object.present.count_bytes(&(4 * MIB..9 * MIB)), 5 * MIB);
}

proptest! {
    /// The operator's bound. Whatever is asked, what nobody asked for is no more than: the budget for guesses, the
    /// close part, what is around each demand (a cluster, or twice what was read before in that place), and ten
    /// times what was asked for where that made all of a neighbourhood wanted.
    #[test]
    fn what_is_brought_in_vain_is_bounded(
        pages in 1u64..100_000, asks in prop::collection::vec((any::<u64>(), 1u64..64), 1..200), budget in 0u8..=100,
    ) {
        let len = pages * PAGE;
        let mut object = Filled::new(len);
        object.planner = Planner::new(len, budget);
        for (at, n) in asks {
            let start = at % pages * PAGE;
            object.access(&(start..(start + n * PAGE).min(len)));
        }
        let share = if budget == 0 { 0 } else { (len * u64::from(budget) / 100).max(4 * MIB) };
        let around = object.misses * (128 << 10) * 2;
        let wanted = object.goal.present_bytes();
        let asked = object.asked.present_bytes();
        // Every neighbourhood that is wanted has a tenth asked; two of them share what was asked at most.
        prop_assert!(wanted <= 20 * asked + 2 * MIB, "{wanted} wanted with {asked} asked");
        let most = share + 21 * MIB + around + wanted + asked;
        prop_assert!(object.present.present_bytes() <= most, "{} of {most}", object.present.present_bytes());
    }
}

/// Also ranges that make no sense to a planner must not upset it.
#[test]
fn the_ends_of_an_object_are_no_trouble() {
    let len = align_up(u64::from(u32::MAX), PAGE);
    let mut object = Filled::new(len);
    for demand in [len - PAGE..len, 0..PAGE, len / 2..len / 2 + 64 * MIB] {
        object.access(&(align_down(demand.start, PAGE)..demand.end));
        assert!(range::len(&demand) <= object.present.present_bytes());
    }
}
