//! Readers: processes that read from a mounted image, as far as the daemon can tell.
//!
//! Modelled on `cachefiles_prepare_ondemand_read`: a reader looks at the cache file; at a hole it sends one
//! READ and sleeps; then it looks again, once. Still a hole: a read-ahead is tried again as a single page,
//! and a single page fails the application with `EIO`.

use std::collections::VecDeque;

use nix::errno::Errno;

use super::blob::PAGE_BYTES;
use super::sink::CacheFile;
use crate::range::{ByteRange, align_down};

/// What a reader does now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doing {
    /// About to look at the cache file.
    Looking {
        /// A READ for this position has just been completed: a hole there means that it failed.
        again: bool,
    },
    /// Asleep until its READ is completed.
    Asleep {
        /// The READ.
        msg_id: u32,
    },
    /// It has read all it wanted.
    Finished,
    /// The application got an error.
    Failed(Errno),
    /// It is dead.
    Killed,
}

/// One reader.
#[derive(Clone, Debug)]
pub struct Reader {
    /// Index of the cookie it reads.
    pub cookie: usize,
    /// What it has yet to read; the first range is the current one and shrinks.
    pub wanted: VecDeque<ByteRange>,
    /// Longest READ it sends.
    pub read_ahead: u64,
    /// The last READ failed; until the position moves on it asks for single pages.
    pub single: bool,
    /// Sends its ranges as they are, also beyond the end, and does not care what comes of them.
    pub careless: bool,
    /// What it does now.
    pub doing: Doing,
}

/// What a look at the cache file led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Look {
    /// It went on, or finished, or failed; see [`Reader::doing`].
    Moved,
    /// It needs this range brought.
    Ask {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
}

impl Reader {
    /// A reader of `wanted` ranges that cuts them into pieces of at most `read_ahead` bytes.
    #[must_use]
    pub fn new(cookie: usize, wanted: impl IntoIterator<Item = ByteRange>, read_ahead: u64) -> Self {
        let wanted = wanted.into_iter().collect();
        Self { cookie, wanted, read_ahead, single: false, careless: false, doing: Doing::Looking { again: false } }
    }

    /// Looks at the cache file and takes one step.
    pub fn look(&mut self, file: &CacheFile) -> Look {
        let Doing::Looking { again } = self.doing else {
            return Look::Moved;
        };
        let Some(range) = self.wanted.front().cloned() else {
            self.doing = Doing::Finished;
            return Look::Moved;
        };
        if self.careless {
            self.wanted.pop_front();
            return Look::Ask { offset: range.start, len: range.end - range.start };
        }
        let hole = file.seek_hole(range.start, range.end);
        if hole > range.start {
            self.advance(hole, range.end);
            return Look::Moved;
        }
        if again && self.single {
            self.doing = Doing::Failed(Errno::EIO);
            return Look::Moved;
        }
        self.single |= again;
        let most = if self.single { PAGE_BYTES } else { self.read_ahead };
        let reach = align_down(hole, PAGE_BYTES).saturating_add(most).min(range.end);
        let end = file.seek_data(hole, reach).unwrap_or(reach);
        Look::Ask { offset: hole, len: end - hole }
    }

    /// Everything before `to` has been read.
    fn advance(&mut self, to: u64, end: u64) {
        self.single = false;
        self.doing = Doing::Looking { again: false };
        self.wanted.pop_front();
        if to < end {
            self.wanted.push_front(to..end);
        }
    }

    /// Its READ was completed.
    pub const fn wake(&mut self) {
        self.doing = Doing::Looking { again: true };
    }

    /// Whether it will never do anything again.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.doing, Doing::Finished | Doing::Failed(_) | Doing::Killed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::sim::blob::SimBlob;
    use crate::front::sim::sink::{FLAVOURS, SinkWrite};
    use crate::store::SourceMode;

    fn fill(file: &mut CacheFile, blob: &SimBlob, range: &ByteRange) {
        let write = SinkWrite {
            offset: range.start,
            len: range.end - range.start,
            position: range.start,
            content: blob,
            address: 0,
            at_most: None,
        };
        file.write(&FLAVOURS[2], blob, &write).unwrap();
    }

    #[test]
    fn a_reader_asks_for_the_hole_only_and_goes_on() {
        let blob = SimBlob::whole_file(0, 10 * PAGE_BYTES, SourceMode::Buffered);
        let mut file = CacheFile::new(PAGE_BYTES);
        fill(&mut file, &blob, &(3 * PAGE_BYTES..4 * PAGE_BYTES));
        let mut reader = Reader::new(0, Some(0..6 * PAGE_BYTES), 8 * PAGE_BYTES);
        assert_eq!(reader.look(&file), Look::Ask { offset: 0, len: 3 * PAGE_BYTES });
        fill(&mut file, &blob, &(0..3 * PAGE_BYTES));
        reader.wake();
        assert_eq!(reader.look(&file), Look::Moved);
        assert_eq!(reader.look(&file), Look::Ask { offset: 4 * PAGE_BYTES, len: 2 * PAGE_BYTES });
        fill(&mut file, &blob, &(4 * PAGE_BYTES..6 * PAGE_BYTES));
        reader.wake();
        assert_eq!(reader.look(&file), Look::Moved);
        assert_eq!(reader.look(&file), Look::Moved);
        assert_eq!(reader.doing, Doing::Finished);
    }

    #[test]
    fn a_hole_after_a_completion_is_tried_once_more_and_then_an_error() {
        let file = CacheFile::new(PAGE_BYTES);
        let mut reader = Reader::new(0, Some(0..6 * PAGE_BYTES), 8 * PAGE_BYTES);
        assert_eq!(reader.look(&file), Look::Ask { offset: 0, len: 6 * PAGE_BYTES });
        reader.wake();
        assert_eq!(reader.look(&file), Look::Ask { offset: 0, len: PAGE_BYTES });
        reader.wake();
        assert_eq!(reader.look(&file), Look::Moved);
        assert_eq!(reader.doing, Doing::Failed(Errno::EIO));
    }
}
