//! The tree that the guest bench reads: generated, the same on every machine, so that figures can be compared.
//!
//! Its numbers are those of the tree that the targets were set with (a Perl library, Linux and C++ headers, one large
//! incompressible file): 3,157 files, 52.1 MB, 3,066 of them at most 64 KiB. What the files say does not matter, because
//! the images are not compressed.

use std::fs;
use std::path::Path;

use crate::front::sim::rng::Rng;
use crate::lab::{Result, Trying};

/// Files beside the large one.
const SMALL_FILES: usize = 3156;
/// Lengths of the small files in bytes by their rank in percent; between two entries they rise evenly.
const LENGTHS: [(usize, usize); 11] = [
    (0, 100),
    (10, 600),
    (30, 1600),
    (50, 3300),
    (70, 6900),
    (80, 11_400),
    (90, 24_400),
    (95, 43_000),
    (97, 62_000),
    (99, 112_000),
    (100, 335_000),
];
/// Directories beside the one that holds two files of eleven, as the one of kernel headers does.
const DIRS: usize = 274;
/// The file that is read in pieces. Last in the order of paths.
const LARGE_FILE: &str = "zz/random.bin";
/// Its length.
pub(super) const LARGE_BYTES: usize = 16 << 20;
/// Seed of everything; of many, one with which part1 wants as much as it did of the yardstick's tree, 2.3 MB.
const SEED: u64 = 20_241_138;
/// Lengths are drawn by keys of two such numbers, one of the directory and one of the file: half of what lengths differ by
/// lies between directories, as in the tree that this one stands for.
const KEY_RANGE: u64 = 1 << 32;

/// Writes the tree.
///
/// # Errors
/// What the operating system said.
pub(super) fn make(tree: &Path) -> Result<()> {
    let mut rng = Rng::new(SEED);
    for (rank, n) in by_len(&mut rng).into_iter().enumerate() {
        write(tree, &small_path(n), &bytes(&mut rng, small_len(rank)))?;
    }
    write(tree, LARGE_FILE, &bytes(&mut rng, LARGE_BYTES))
}

/// Numbers of the small files from the shortest to the longest.
fn by_len(rng: &mut Rng) -> Vec<usize> {
    let of_dirs: Vec<u64> = (0..=DIRS).map(|_| rng.below(KEY_RANGE)).collect();
    let mut keys: Vec<(u64, usize)> = (0..SMALL_FILES).map(|n| (of_dirs[small_dir(n)] + rng.below(KEY_RANGE), n)).collect();
    keys.sort_unstable();
    keys.into_iter().map(|(_, n)| n).collect()
}

/// Writes `count` trees of one file each, into directories named by their numbers below `dir`; together they are as long
/// as the large file.
///
/// # Errors
/// What the operating system said.
pub(super) fn make_many(dir: &Path, count: usize) -> Result<()> {
    let mut rng = Rng::new(SEED + 1);
    (0..count).try_for_each(|n| write(dir, &format!("{n}/{LARGE_FILE}"), &bytes(&mut rng, LARGE_BYTES / count)))
}

/// The directory of a small file by its number, [`DIRS`] being the large one.
const fn small_dir(n: usize) -> usize {
    if n % 11 < 2 { DIRS } else { n % DIRS }
}

fn small_path(n: usize) -> String {
    match small_dir(n) {
        DIRS => format!("usr/include/linux/header_{n:04}.h"),
        dir => format!("usr/share/library/part_{:02}/unit_{dir:03}/item_{n:04}", dir / 16),
    }
}

/// Length of the file of this rank, 0 being the shortest.
fn small_len(rank: usize) -> usize {
    // In parts of a percent small enough that no rank is lost.
    let place = (2 * rank + 1) * 50;
    let scaled = |percent: usize| percent * SMALL_FILES;
    let mut pairs = LENGTHS.iter().zip(&LENGTHS[1..]);
    let (&(from, low), &(to, high)) = pairs.find(|(_, (percent, _))| place <= scaled(*percent)).unwrap_or((&LENGTHS[0], &LENGTHS[1]));
    low + (high - low) * (place - scaled(from)) / (scaled(to) - scaled(from))
}

fn bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
    (0..len.div_ceil(8)).flat_map(|_| rng.next().to_le_bytes()).take(len).collect()
}

fn write(tree: &Path, path: &str, bytes: &[u8]) -> Result<()> {
    let path = tree.join(path);
    let dir = path.parent().unwrap_or(tree);
    fs::create_dir_all(dir).and_then(|()| fs::write(&path, bytes)).trying(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_has_the_numbers_it_claims() {
        let lens: Vec<usize> = (0..SMALL_FILES).map(small_len).collect();
        assert!(lens.is_sorted());
        let bytes: usize = lens.iter().sum::<usize>() + LARGE_BYTES;
        let pages: usize = lens.iter().map(|len| len.div_ceil(4096)).sum::<usize>() + LARGE_BYTES / 4096;
        let short = lens.iter().filter(|len| **len <= 64 << 10).count();
        assert!((52_000_000..52_200_000).contains(&bytes), "{bytes}");
        assert!((14_450..14_650).contains(&pages), "{pages}");
        assert!((3050..3080).contains(&short), "{short}");
    }
}
