//! What the planner makes of whole access lists: a model of an object that is filled as it says, read in every
//! order we could think of, with the hits invisible as cachefiles has them, or told of as fanotify does. The bounds are on
//! requests (each costs a reader a fifth of a millisecond) and on what is brought in vain.
//!
//! The trees are made by chance from seeds; nothing here is taken from the traces that the constants were chosen by.

use proptest::prelude::*;

use super::adaptive::{Known, Planner, ReadOn};
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
    /// On its way because of reads of what is there.
    ahead: Vec<ByteRange>,
    len: u64,
    /// Requests that had to wait.
    misses: u64,
    /// Those that had not, where they are told of.
    hits: u64,
}

impl Filled {
    fn new(len: u64) -> Self {
        let set = || PageSet::new(len, PAGE);
        let planner = Planner::new(len, BUDGET_PERCENT);
        Self { planner, present: set(), asked: set(), goal: set(), ahead: Vec::new(), len, misses: 0, hits: 0 }
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
            self.misses += 1;
            self.bring(&(absent.start..absent.end.min(absent.start + REQUEST_BYTES)));
        }
    }

    fn bring(&mut self, demand: &ByteRange) {
        let reach = self.planner.reach(demand);
        let known = Known { present: &self.present, asked: &self.asked, end_bytes: self.len };
        let advice = self.planner.advise(demand, &known);
        let region = advice.region;
        assert!(region.start <= demand.start && region.end >= demand.end && region.end <= self.len, "{region:?} for {demand:?}");
        assert!(region.start.is_multiple_of(PAGE) && region.end.is_multiple_of(PAGE), "{region:?}");
        assert!(reach.start <= region.start && reach.end >= region.end, "{region:?} outside of {reach:?}");
        self.asked.insert(demand);
        self.present.insert(&region);
        if let Some(part) = advice.complete {
            self.goal.insert(&part);
        }
    }

    /// The same where every request is told of, whether it has to wait or not. What is brought because of one that had not is
    /// there when the next one has been answered: that one waits if it wants it.
    fn access_told(&mut self, wanted: &ByteRange) {
        for start in (wanted.start..wanted.end).step_by(REQUEST_BYTES as usize) {
            let read = start..wanted.end.min(start + REQUEST_BYTES);
            let ahead = std::mem::take(&mut self.ahead);
            let waits = !self.present.contains(&read);
            ahead.iter().for_each(|region| self.present.insert(region));
            self.misses += u64::from(waits);
            if let Some(absent) = self.present.first_absent(&read) {
                // What is there of it already is not the planner's to bring.
                self.bring(&(absent.start..read.end));
            } else if !waits {
                self.read_on(&read);
            }
            self.asked.insert(&read);
        }
    }

    fn read_on(&mut self, read: &ByteRange) {
        self.hits += 1;
        self.asked.insert(read);
        let ReadOn { region, all } = self.planner.read_on(read, &self.asked, self.len);
        if let Some(region) = region {
            assert!(region.start < region.end && region.end <= self.len, "{region:?} for {read:?}");
            assert!(region.start.is_multiple_of(PAGE) && region.end.is_multiple_of(PAGE), "{region:?}");
            self.ahead.push(region);
        }
        if all {
            self.goal.insert(&(0..self.len));
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
        std::mem::take(&mut self.ahead).iter().for_each(|region| self.present.insert(region));
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

/// Most waits of one reader that goes through an object in order, where what it finds is told of: the first block, and the windows
/// that are shorter than two of its requests.
const WAITS_IN_ORDER_MAX: u64 = 6;

#[test]
fn told_in_order_nobody_waits_once_it_is_a_stream() {
    for seed in SEEDS {
        let mut dice = Dice(seed);
        let len = [24, 57, 200, 400][seed as usize % 4] * MIB;
        let mut object = Filled::new(len);
        tree(&mut dice, len).iter().for_each(|file| object.access_told(file));
        println!("seed {seed}: {} MiB, {} waits of {} requests", len / MIB, object.misses, object.misses + object.hits);
        assert!(object.misses <= WAITS_IN_ORDER_MAX, "seed {seed}: {} waits", object.misses);
        assert_eq!(object.percent(), 100, "seed {seed}");
    }
}

/// How much more of an object may be brought because hits are told of, in percent, as long as so little was asked for
/// that nobody seems to want all of it. As elsewhere, [`SMALL_BYTES`] are always allowed.
const MORE_PERCENT: u64 = 2;

#[test]
fn told_sparse_readers_bring_hardly_more() {
    for seed in SEEDS {
        let mut dice = Dice(seed);
        let len = [24, 57, 200, 400][seed as usize % 4] * MIB;
        let files = tree(&mut dice, len);
        let mut files = shuffled(&mut dice, files);
        let mut left = len * 8 / 100;
        files.retain(|file| {
            let fits = range::len(file) <= left;
            left -= if fits { range::len(file) } else { 0 };
            fits
        });
        let (mut silent, mut told) = (Filled::new(len), Filled::new(len));
        for file in &files {
            silent.access(file);
            told.access_told(file);
        }
        let waits = (silent.misses, told.misses);
        let (silent, told) = (silent.percent(), told.percent());
        println!("seed {seed}: {} MiB, {silent} % filled, told {told} %; waits {waits:?}", len / MIB);
        assert!(told <= silent + MORE_PERCENT || told * len / 100 <= SMALL_BYTES, "seed {seed}: {told} % instead of {silent} %");
    }
}

/// Reads of what is there after which it is looked at once at least how much was asked for.
const COUNTED_AFTER: u64 = 64;

#[test]
fn told_all_is_brought_when_an_eighth_was_asked_for() {
    for seed in SEEDS {
        let mut dice = Dice(seed);
        let len = [24, 57, 200, 400][seed as usize % 4] * MIB;
        let files = tree(&mut dice, len);
        let (mut object, mut wanted_since) = (Filled::new(len), None);
        for file in shuffled(&mut dice, files) {
            object.access_told(&file);
            if object.asked.present_bytes() * 100 >= len * 13 {
                wanted_since.get_or_insert(object.hits);
            }
            if wanted_since.is_some_and(|hits| object.hits >= hits + COUNTED_AFTER) {
                break;
            }
        }
        let asked = object.asked.present_bytes() * 100 / len;
        println!("seed {seed}: {} MiB, {asked} % asked for, {} waits", len / MIB, object.misses);
        assert_eq!(object.percent(), 100, "seed {seed}: with {asked} % asked for");
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
