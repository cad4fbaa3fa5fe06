//! Holes of sparse files: which parts of a file are zeros that nobody has to read.
//!
//! The map is made when a blob is opened, by a thread that may block: `SEEK_DATA` takes the inode's lock on ext4.
//! A shard only looks it up.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::range::{ByteRange, align_down, align_up};

/// Runs of data that are looked for in a file; what lies behind the last is taken for data. Bounds the time of an
/// open (two system calls a run) and the memory of a map (16 bytes a hole).
const RUNS_MAX: usize = 4096;
/// Shortest hole that is filled by itself. A shorter one is read with its neighbours: to leave it out would save the
/// clearing of so much memory, but cost one more fill, and each fill pays for its journal transaction.
pub const HOLE_MIN_BYTES: u64 = 256 << 10;

/// The holes of a file, ascending.
#[derive(Clone, Default, Debug)]
pub struct Holes(Vec<ByteRange>);

impl Holes {
    /// The holes of an open file of `len_bytes`. The file position is left somewhere.
    #[must_use]
    pub fn of_file(file: impl AsFd, len_bytes: u64, page_bytes: u64) -> Self {
        Self::between(runs(file, len_bytes), len_bytes, page_bytes, HOLE_MIN_BYTES)
    }

    /// What lies between `runs` of data (ascending) in a file of `len_bytes`, in whole pages, if it is at least
    /// `min_bytes` long. The last hole reaches to the end of the file, which may lie inside a page.
    #[must_use]
    pub fn between(runs: impl IntoIterator<Item = ByteRange>, len_bytes: u64, page_bytes: u64, min_bytes: u64) -> Self {
        let mut holes = Vec::new();
        let mut add = |start: u64, end: u64| {
            let start = align_up(start, page_bytes);
            let end = if end < len_bytes { align_down(end, page_bytes) } else { len_bytes };
            if end > start && end - start >= min_bytes {
                holes.push(start..end);
            }
        };
        let mut at = 0;
        for run in runs {
            add(at, run.start);
            at = run.end;
        }
        add(at, len_bytes);
        Self(holes)
    }

    /// Whether the byte at `offset` is in a hole, and where that, or the data, ends (`u64::MAX`: with the file).
    #[must_use]
    pub fn at(&self, offset: u64) -> (bool, u64) {
        let next = self.0.partition_point(|hole| hole.end <= offset);
        match self.0.get(next) {
            Some(hole) if hole.start <= offset => (true, hole.end),
            Some(hole) => (false, hole.start),
            None => (false, u64::MAX),
        }
    }
}

/// The runs of data in a file, as the file system tells them. Where it cannot tell, or after [`RUNS_MAX`], all that
/// is left is data.
fn runs(file: impl AsFd, len_bytes: u64) -> impl Iterator<Item = ByteRange> {
    let (mut at, mut left) = (0, RUNS_MAX);
    std::iter::from_fn(move || {
        if at >= len_bytes {
            return None;
        }
        let run = if left == 0 { Ok(at..len_bytes) } else { next_run(&file, at) };
        left = left.saturating_sub(1);
        let run = match run {
            Ok(run) if run.end > at && run.start < run.end => run,
            Err(Errno::ENXIO) => return None,
            _ => at..len_bytes,
        };
        at = run.end;
        Some(run)
    })
}

/// The first run of data that ends behind `at`; `ENXIO` if there is none.
fn next_run(file: impl AsFd, at: u64) -> Result<ByteRange, Errno> {
    let start = lseek(&file, at.cast_signed(), Whence::SeekData)?;
    let end = lseek(&file, start, Whence::SeekHole)?;
    Ok(start.cast_unsigned()..end.cast_unsigned())
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    const PAGE: u64 = 4096;

    #[test]
    fn small_holes_belong_to_their_neighbours() {
        let runs = || [0..PAGE, 3 * PAGE..3 * PAGE + 100, 20 * PAGE + 1..20 * PAGE + 2].into_iter();
        assert_eq!(Holes::between(runs(), 30 * PAGE + 5, PAGE, 4 * PAGE).0, [4 * PAGE..20 * PAGE, 21 * PAGE..30 * PAGE + 5]);
        assert_eq!(Holes::between(runs(), 20 * PAGE + 2, PAGE, 4 * PAGE).0, [4 * PAGE..20 * PAGE]);
        let holes = Holes::between(runs(), 30 * PAGE + 5, PAGE, 4 * PAGE);
        assert_eq!(holes.at(0), (false, 4 * PAGE));
        assert_eq!(holes.at(4 * PAGE), (true, 20 * PAGE));
        assert_eq!(holes.at(20 * PAGE), (false, 21 * PAGE));
        assert_eq!(Holes::default().at(7), (false, u64::MAX));
    }

    #[test]
    fn a_file_of_many_pieces_is_data_after_the_limit() {
        let file = tempfile::tempfile().unwrap();
        let step = HOLE_MIN_BYTES + PAGE;
        let pieces = RUNS_MAX as u64 + 3;
        file.set_len(pieces * step).unwrap();
        for piece in 0..pieces {
            file.write_all_at(b"data", piece * step).unwrap();
        }
        let holes = Holes::of_file(&file, pieces * step, PAGE);
        if holes.0.is_empty() {
            return println!("not run: this file system does not report holes");
        }
        assert_eq!(holes.0.len(), RUNS_MAX - 1, "the first run is at the start");
        assert_eq!(holes.at((pieces - 2) * step), (false, u64::MAX));
    }

    proptest! {
        /// Whatever the data, no byte of it is in a hole, and holes end on pages or with the file.
        #[test]
        fn data_is_never_in_a_hole(
            cuts in prop::collection::vec(0u64..2_000_000, 0..20), tail in 0u64..5000, min_pages in 1u64..40,
        ) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            cuts.dedup();
            let runs: Vec<_> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
            let len = runs.last().map_or(0, |run| run.end) + tail;
            let holes = Holes::between(runs.iter().cloned(), len, PAGE, min_pages * PAGE);
            for hole in &holes.0 {
                prop_assert!(hole.start % PAGE == 0 && (hole.end % PAGE == 0 || hole.end == len));
                prop_assert!(hole.end - hole.start >= min_pages * PAGE);
                prop_assert!(runs.iter().all(|run| run.end <= hole.start || run.start >= hole.end));
            }
        }
    }
}
