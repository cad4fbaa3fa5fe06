//! Which bytes are where, without the bytes.
//!
//! The simulation moves no data. It remembers of every byte where it came from: two bytes are taken to be
//! equal only if they came from the same place, so a byte that landed one position off is seen at once.

use std::collections::BTreeMap;

/// Where a byte came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// It is a zero that nobody read from anywhere.
    Zero,
    /// It is this byte of a source file.
    File {
        /// The blob that the file belongs to.
        blob: u32,
        /// Index into the blob's files.
        file: u32,
        /// Where in the file.
        offset: u64,
    },
    /// Nobody can say: memory that was never filled, or that a failed read left behind.
    Garbage,
}

impl Origin {
    /// The origin of the byte `distance` after this one in the same run.
    #[must_use]
    pub const fn after(self, distance: u64) -> Self {
        match self {
            Self::File { blob, file, offset } => Self::File { blob, file, offset: offset + distance },
            other => other,
        }
    }
}

/// Something that has bytes at positions: memory, a mapping, a blob.
pub trait Origins: std::fmt::Debug {
    /// The origin of the byte at `position`, and for how many bytes (at least 1) it goes on from there.
    fn at(&self, position: u64) -> (Origin, u64);
}

/// Whether `len` bytes of `a` from `a_start` on equal those of `b` from `b_start` on.
#[must_use]
pub fn equal(a: &dyn Origins, a_start: u64, b: &dyn Origins, b_start: u64, len: u64) -> bool {
    let mut done: u64 = 0;
    while done < len {
        let (from_a, run_a) = a.at(a_start + done);
        let (from_b, run_b) = b.at(b_start + done);
        if from_a != from_b || from_a == Origin::Garbage {
            return false;
        }
        done = done.saturating_add(run_a.min(run_b));
    }
    true
}

/// Zeros without end.
#[derive(Clone, Copy, Debug)]
pub struct Zeros;

impl Origins for Zeros {
    fn at(&self, _position: u64) -> (Origin, u64) {
        (Origin::Zero, u64::MAX)
    }
}

/// Memory that can be written, such as a slot. What was never written is garbage.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Runs by where they start; they do not overlap, and the gaps between them are garbage.
    runs: BTreeMap<u64, Run>,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    len: u64,
    origin: Origin,
}

impl Memory {
    /// Writes `len` bytes at `start` that come from `origin` and what follows it.
    pub fn fill(&mut self, start: u64, len: u64, origin: Origin) {
        if len == 0 {
            return;
        }
        self.clear(start, len);
        if origin != Origin::Garbage {
            self.runs.insert(start, Run { len, origin });
        }
    }

    /// Forgets what `len` bytes at `start` were.
    fn clear(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let touched: Vec<(u64, Run)> =
            self.runs.range(..end).rev().take_while(|(at, run)| *at + run.len > start).map(|(at, run)| (*at, *run)).collect();
        for (at, run) in touched {
            self.runs.remove(&at);
            if at < start {
                self.runs.insert(at, Run { len: start - at, ..run });
            }
            if at + run.len > end {
                self.runs.insert(end, Run { len: at + run.len - end, origin: run.origin.after(end - at) });
            }
        }
    }
}

impl Origins for Memory {
    fn at(&self, position: u64) -> (Origin, u64) {
        if let Some((at, run)) = self.runs.range(..=position).next_back()
            && position < at + run.len
        {
            let into = position - at;
            return (run.origin.after(into), run.len - into);
        }
        let next = self.runs.range(position..).next();
        (Origin::Garbage, next.map_or(u64::MAX, |(at, _)| at - position))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn file(offset: u64) -> Origin {
        Origin::File { blob: 0, file: 0, offset }
    }

    #[test]
    fn an_overwrite_splits_what_was_there() {
        let mut memory = Memory::default();
        memory.fill(0, 100, file(1000));
        memory.fill(40, 20, Origin::Zero);
        assert_eq!(memory.at(39), (file(1039), 1));
        assert_eq!(memory.at(40), (Origin::Zero, 20));
        assert_eq!(memory.at(60), (file(1060), 40));
        assert_eq!(memory.at(100).0, Origin::Garbage);
    }

    #[test]
    fn a_byte_that_is_one_off_differs_and_garbage_equals_nothing() {
        let (mut a, mut b) = (Memory::default(), Memory::default());
        a.fill(0, 100, file(0));
        b.fill(10, 50, file(10));
        assert!(equal(&a, 10, &b, 10, 50));
        assert!(!equal(&a, 10, &b, 11, 10));
        assert!(!equal(&a, 10, &b, 10, 51));
        assert!(!equal(&a, 200, &b, 200, 1));
    }
}
