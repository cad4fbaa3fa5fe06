//! The readers in the guest: who reads what in which order, how long each item took, and whether it was right.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::data::Listing;
use super::{Reading, Scenario};
use crate::front::sim::rng::Rng;

/// Unit of random reads.
pub(super) const BLOCK_BYTES: usize = 4096;
/// How many of them.
const BLOCKS: usize = 2000;
/// Buffer of one reader.
const BUFFER_BYTES: usize = 128 << 10;
/// Seed of all random orders.
const ORDER_SEED: u64 = 42;
/// Wrong items that are described.
const WRONG_SHOWN: usize = 10;

/// Lanes of a [`Sum`], and their bytes in a row.
const LANES: usize = 8;
const ROW_BYTES: usize = LANES * 8;

/// A running checksum that costs a quarter of an instruction a byte: two sums in each lane, the second of which
/// weighs each word by its place. It tells different contents apart by accident, not by attack.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Sum {
    first: [u64; LANES],
    second: [u64; LANES],
}

impl Sum {
    /// The checksum of the whole.
    pub(super) fn of(bytes: &[u8]) -> u64 {
        let mut sum = Self::default();
        sum.add(bytes);
        sum.value(bytes.len() as u64)
    }

    /// Goes on with the next bytes; all parts but the last are a multiple of [`ROW_BYTES`] long.
    fn add(&mut self, bytes: &[u8]) {
        let (rows, rest) = bytes.as_chunks::<ROW_BYTES>();
        // In registers as long as it takes.
        let mut sum = *self;
        for row in rows {
            sum.row(row);
        }
        if !rest.is_empty() {
            let mut row = [0; ROW_BYTES];
            row[..rest.len()].copy_from_slice(rest);
            sum.row(&row);
        }
        *self = sum;
    }

    fn row(&mut self, row: &[u8; ROW_BYTES]) {
        let (words, _) = row.as_chunks::<8>();
        for ((first, second), word) in self.first.iter_mut().zip(&mut self.second).zip(words) {
            *first = first.wrapping_add(u64::from_le_bytes(*word));
            *second = second.wrapping_add(*first);
        }
    }

    fn value(&self, len_bytes: u64) -> u64 {
        let parts = self.first.iter().chain(&self.second);
        parts.fold(len_bytes, |hash, part| (hash ^ part).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29))
    }
}

/// What a scenario reads, in order: indices of files, or of blocks.
fn order(scenario: Scenario, listing: &Listing) -> Vec<usize> {
    let len = if scenario.reads_blocks() { listing.blocks.len() } else { listing.files.len() };
    let mut order: Vec<usize> = (0..len).collect();
    if !matches!(scenario, Scenario::Seq1 | Scenario::Par8) {
        let mut rng = Rng::new(ORDER_SEED);
        for last in (1..len).rev() {
            order.swap(last, rng.index(last + 1));
        }
    }
    match scenario {
        Scenario::Part1 => order.truncate(len / 10),
        Scenario::Rand1 | Scenario::Rand8 | Scenario::Many8 => order.truncate(BLOCKS),
        Scenario::Seq1 | Scenario::Par8 | Scenario::Shuf1 => {}
    }
    order
}

/// The same as queues that readers take from: one that they share, or one for each, with what it has of one image.
fn queues(scenario: Scenario, listing: &Listing) -> Vec<Vec<usize>> {
    let order = order(scenario, listing);
    if scenario != Scenario::Many8 {
        return vec![order];
    }
    let of_image = |file: &usize| order.iter().copied().filter(|block| listing.place(*block).0 == *file).collect();
    listing.in_blocks.iter().map(of_image).collect()
}

/// A scenario ready to be read, so that the timed part only reads.
pub(super) struct Plan {
    scenario: Scenario,
    queues: Vec<Vec<usize>>,
    paths: Vec<PathBuf>,
    listing: Listing,
}

/// What one reader takes from, maybe beside others.
struct Queue<'a> {
    items: &'a [usize],
    next: AtomicUsize,
}

/// What one reader saw.
#[derive(Default)]
struct Seen {
    took: Vec<Duration>,
    first: Option<Instant>,
    bytes: u64,
    wrong: Vec<String>,
}

impl Plan {
    pub(super) fn new(scenario: Scenario, listing: Listing, root: &Path) -> Self {
        let queues = queues(scenario, &listing);
        let paths = listing.files.iter().map(|file| root.join(&file.path)).collect();
        Self { scenario, queues, paths, listing }
    }

    /// Reads everything with all readers. Of the result, everything but the phase's cost is filled in.
    pub(super) fn read(&self, began: Instant) -> Reading {
        let queues: Vec<Queue<'_>> = self.queues.iter().map(|items| Queue { items, next: AtomicUsize::new(0) }).collect();
        let seen: Vec<Seen> = std::thread::scope(|scope| {
            let readers = queues.iter().cycle().take(self.scenario.readers());
            let threads: Vec<_> = readers.map(|queue| scope.spawn(|| self.reader(queue))).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        self.sum_up(seen, began)
    }

    fn reader(&self, queue: &Queue<'_>) -> Seen {
        let mut seen = Seen { took: Vec::with_capacity(queue.items.len()), ..Seen::default() };
        let mut buffer = vec![0; BUFFER_BYTES];
        let open = |index: &usize| File::open(&self.paths[*index]).map(|file| (*index, file)).map_err(|error| error.to_string());
        let in_blocks: Option<Result<HashMap<_, _>, _>> =
            self.scenario.reads_blocks().then(|| self.listing.in_blocks.iter().map(open).collect());
        loop {
            let at = queue.next.fetch_add(1, Ordering::Relaxed);
            let Some(&item) = queue.items.get(at) else { return seen };
            let began = Instant::now();
            let result = match &in_blocks {
                None => self.file(item, &mut buffer),
                Some(Ok(files)) => self.block(files, item, &mut buffer[..BLOCK_BYTES]),
                Some(Err(error)) => Err(error.clone()),
            };
            let ended = Instant::now();
            match result {
                Ok(len) => seen.bytes += len,
                Err(why) => seen.wrong.push(format!("{} item {item}: {why}", self.scenario.name())),
            }
            if at == 0 {
                seen.first = Some(ended);
            }
            seen.took.push(ended - began);
        }
    }

    fn file(&self, index: usize, buffer: &mut [u8]) -> Result<u64, String> {
        let listed = &self.listing.files[index];
        let mut sum = Sum::default();
        let mut len_bytes = 0;
        let mut read = || -> std::io::Result<()> {
            let mut file = File::open(&self.paths[index])?;
            loop {
                let len = fill(&mut file, buffer)?;
                sum.add(&buffer[..len]);
                len_bytes += len as u64;
                if len < buffer.len() {
                    return Ok(());
                }
            }
        };
        read().map_err(|error| format!("{}: {error}", listed.path))?;
        if len_bytes != listed.len_bytes || sum.value(len_bytes) != listed.sum {
            return Err(format!("{}: {len_bytes} bytes of {}, or wrong ones", listed.path, listed.len_bytes));
        }
        Ok(len_bytes)
    }

    fn block(&self, files: &HashMap<usize, File>, block: usize, buffer: &mut [u8]) -> Result<u64, String> {
        let (index, offset) = self.listing.place(block);
        files[&index].read_exact_at(buffer, offset).map_err(|error| error.to_string())?;
        if Sum::of(buffer) != self.listing.blocks[block] {
            return Err(format!("{}: the bytes at {offset} are wrong", self.listing.files[index].path));
        }
        Ok(buffer.len() as u64)
    }

    fn sum_up(&self, seen: Vec<Seen>, began: Instant) -> Reading {
        let mut took: Vec<u64> = seen.iter().flat_map(|s| &s.took).map(|took| nanoseconds(*took)).collect();
        took.sort_unstable();
        let rank = |share: usize| took.get(took.len() * share / 100).or(took.last()).copied().unwrap_or(0);
        let first = seen.iter().filter_map(|s| s.first).min();
        let mut wrong: Vec<String> = seen.iter().flat_map(|s| s.wrong.iter().cloned()).collect();
        let all: usize = self.queues.iter().map(Vec::len).sum();
        if took.len() != all {
            wrong.push(format!("{} of {all} items were read", took.len()));
        }
        wrong.truncate(WRONG_SHOWN);
        Reading {
            items: took.len(),
            bytes: seen.iter().map(|s| s.bytes).sum(),
            wrong,
            first_ns: first.map_or(0, |at| nanoseconds(at - began)),
            p50_ns: rank(50),
            p99_ns: rank(99),
            max_ns: rank(100),
            ..Reading::default()
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..])? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::bench::data::Listed;

    #[test]
    fn the_sum_sees_a_flipped_bit_anywhere_a_swap_and_the_length() {
        let base: Vec<u8> = (0..1003_u32).map(|n| n.to_le_bytes()[0]).collect();
        let sum = Sum::of(&base);
        for at in 0..base.len() {
            let mut other = base.clone();
            other[at] ^= 0x80;
            assert_ne!(Sum::of(&other), sum, "byte {at}");
        }
        let mut swapped = base.clone();
        swapped[..2 * ROW_BYTES].rotate_left(ROW_BYTES);
        assert_ne!(Sum::of(&swapped), sum);
        assert_ne!(Sum::of(&base[..1002]), sum);
        assert_ne!(Sum::of(&[0; ROW_BYTES]), Sum::of(&[0; 2 * ROW_BYTES]));
    }

    #[test]
    fn orders_are_what_they_are_called() {
        let file = Listed { path: String::new(), len_bytes: 0, sum: 0 };
        let listing = Listing { files: vec![file; 50], in_blocks: vec![0, 3], blocks: vec![0; 4096] };
        assert!(order(Scenario::Par8, &listing).is_sorted());
        let shuffled = order(Scenario::Shuf1, &listing);
        assert!(!shuffled.is_sorted());
        assert_eq!(order(Scenario::Part1, &listing), shuffled[..5]);
        let mut blocks = order(Scenario::Rand8, &listing);
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), BLOCKS);
        assert_eq!((listing.place(2047), listing.place(2049)), ((0, 2047 * 4096), (3, 4096)));
        assert_eq!(queues(Scenario::Rand8, &listing), [order(Scenario::Rand8, &listing)]);
        let queues = queues(Scenario::Many8, &listing);
        let is_of = |queue: &Vec<usize>, file| queue.iter().all(|block| listing.place(*block).0 == file);
        assert!(queues.len() == 2 && is_of(&queues[0], 0) && is_of(&queues[1], 3));
        assert_eq!(queues.concat().len(), BLOCKS);
    }

    #[test]
    fn a_wrong_byte_is_reported() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        std::fs::write(dir.path().join("a"), b"right").expect("write");
        let listed = |sum| Listed { path: "a".into(), len_bytes: 5, sum };
        let listing = Listing { files: vec![listed(Sum::of(b"right")), listed(Sum::of(b"wrong"))], ..Listing::default() };
        let reading = Plan::new(Scenario::Seq1, listing, dir.path()).read(Instant::now());
        assert_eq!((reading.items, reading.bytes, reading.wrong.len()), (2, 5, 1));
    }
}
