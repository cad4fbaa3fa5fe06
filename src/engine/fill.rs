//! The life of one fill: bring one range of a blob into its object. A state machine without system
//! calls; the machine asks [`Fill::next`] what to do and reports results with [`Fill::done`].
//!
//! A fill lies in one extent and fits one buffer slot. It has at most one operation in flight.

use nix::errno::Errno;

use super::room::NoRoom;
use crate::range::{self, ByteRange, align_down, align_up};
use crate::store::Data;

/// How often an operation that ended early for a passing reason (`EINTR`, `EAGAIN`, no progress) is
/// started again at once.
const RETRIES_MAX: u8 = 16;
/// How often a write that found no room ([`NoRoom::is_meant_by`]) is tried.
const ROOM_TRIES_MAX: u8 = 7;
/// Pause before a write that found no room is tried again; each further pause is twice as long. Together 1.26 s: time
/// to cull some objects also from a slow disk.
const ROOM_PAUSE_NS: u64 = 20_000_000;

/// What a fill wants to happen next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Read from a file of the blob into the slot.
    Read {
        /// Index into the blob's files.
        file: usize,
        /// Where in the file.
        offset: u64,
        /// Where in the slot.
        slot_offset: u64,
        /// How much.
        len: u64,
        /// If it gives all of that, exactly that is written next, to here in the object.
        then: Option<u64>,
    },
    /// Write to the object.
    Write {
        /// Where in the object.
        offset: u64,
        /// How much; whole pages.
        len: u64,
        /// What.
        from: From,
    },
    /// Nothing before this time.
    Wait {
        /// On the machine's clock.
        until_ns: u64,
    },
    /// It is over.
    Finished(Result<(), Errno>),
}

/// What is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// The slot from `slot_offset` on; bytes at and beyond `valid` (counted from the slot's start) have not
    /// been read and must be zeroed first.
    Slot {
        /// Where in the slot.
        slot_offset: u64,
        /// How many bytes of the slot came from the source.
        valid: u64,
    },
    /// Mapped pages of a file of the blob.
    Mapped {
        /// Index into the blob's files.
        file: usize,
        /// Where in the file.
        offset: u64,
    },
    /// Zeros.
    Zero,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Reading { done: u64 },
    Writing { done: u64 },
    Waiting { done: u64, until_ns: u64, errno: Errno },
    Finished(Result<(), Errno>),
}

/// One fill.
#[derive(Debug)]
pub struct Fill {
    /// The pages of the object that it brings.
    range: ByteRange,
    /// How many bytes of it are the blob's; the rest of the last page is zero padding.
    data_len: u64,
    data: Data,
    page_bytes: u64,
    stage: Stage,
    retries: u8,
    room_tries: u8,
}

impl Fill {
    /// A fill of `range` (whole pages, within the blob rounded up to a page), whose bytes up to the blob's
    /// length `blob_len_bytes` lie together at `data`.
    #[must_use]
    pub fn new(range: ByteRange, blob_len_bytes: u64, data: Data, page_bytes: u64) -> Self {
        let data_len = blob_len_bytes.min(range.end).saturating_sub(range.start);
        let stage = if matches!(data, Data::Read { .. }) { Stage::Reading { done: 0 } } else { Stage::Writing { done: 0 } };
        Self { range, data_len, data, page_bytes, stage, retries: 0, room_tries: 0 }
    }

    /// The pages of the object that it brings.
    #[must_use]
    pub fn range(&self) -> &ByteRange {
        &self.range
    }

    /// Where its bytes are.
    #[must_use]
    pub const fn data(&self) -> Data {
        self.data
    }

    /// The read that [`Fill::next`] asks for is not needed: its bytes are to be written from the file's mapped pages.
    /// `false`: a part was read already, so the rest must be too.
    pub fn use_mapped(&mut self) -> bool {
        let (Data::Read { file, offset }, Stage::Reading { done: 0 }) = (self.data, self.stage) else { return false };
        self.data = Data::Mapped { file, offset };
        self.stage = Stage::Writing { done: 0 };
        true
    }

    /// Whether it reads into a buffer slot.
    #[must_use]
    pub const fn needs_slot(&self) -> bool {
        matches!(self.data, Data::Read { .. })
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self) -> Next {
        match self.stage {
            Stage::Reading { done } => self.read_from(done),
            Stage::Writing { done } => self.write_from(done),
            Stage::Waiting { until_ns, .. } => Next::Wait { until_ns },
            Stage::Finished(result) => Next::Finished(result),
        }
    }

    /// The operation that [`Fill::next`] asked for ended: `result` bytes, or a negative errno.
    pub fn done(&mut self, result: i32, now_ns: u64) {
        self.stage = match (self.stage, u64::try_from(result)) {
            (Stage::Reading { done }, Ok(n)) => self.after_read(done, n),
            (Stage::Writing { done }, Ok(n)) => self.after_write(done, n),
            (stage @ (Stage::Reading { .. } | Stage::Writing { .. }), Err(_)) => self.after_error(stage, result, now_ns),
            (other, _) => other,
        };
    }

    /// The read that [`Fill::next`] asked for gave all its bytes; the write behind it was begun as well.
    pub const fn read_whole(&mut self) {
        if matches!(self.stage, Stage::Reading { .. }) {
            self.retries = 0;
            self.stage = Stage::Writing { done: 0 };
        }
    }

    /// Its waiting time is over.
    pub fn wake(&mut self, now_ns: u64) {
        if let Stage::Waiting { done, until_ns, .. } = self.stage
            && until_ns <= now_ns
        {
            self.stage = Stage::Writing { done };
        }
    }

    /// If it waits for room, it fails now.
    pub fn give_up_waiting(&mut self) {
        if let Stage::Waiting { errno, .. } = self.stage {
            self.stage = Stage::Finished(Err(errno));
        }
    }

    fn read_from(&self, done: u64) -> Next {
        let Data::Read { file, offset } = self.data else {
            return Next::Finished(Err(Errno::EINVAL));
        };
        // Whole pages are asked for: a direct read needs that, and stops at the end of the file by itself.
        let len = align_up(self.data_len, self.page_bytes) - done;
        let whole = done == 0 && len == self.data_len && len == range::len(&self.range);
        Next::Read { file, offset: offset + done, slot_offset: done, len, then: whole.then_some(self.range.start) }
    }

    fn write_from(&self, done: u64) -> Next {
        let from = match self.data {
            Data::Zero => From::Zero,
            Data::Mapped { file, offset } => From::Mapped { file, offset: offset + done },
            Data::Read { .. } => From::Slot { slot_offset: done, valid: self.data_len },
        };
        Next::Write { offset: self.range.start + done, len: range::len(&self.range) - done, from }
    }

    fn after_read(&mut self, done: u64, n: u64) -> Stage {
        if done + n >= self.data_len {
            self.retries = 0;
            return Stage::Writing { done: 0 };
        }
        if n == 0 {
            // The file ends before the blob does: it was truncated.
            return Stage::Finished(Err(Errno::EIO));
        }
        // A read that stopped inside a page is repeated from that page's start, as direct I/O must be.
        let whole = align_down(done + n, self.page_bytes);
        if whole > done { Stage::Reading { done: whole } } else { self.retry(Stage::Reading { done }, Errno::EIO) }
    }

    fn after_write(&mut self, done: u64, n: u64) -> Stage {
        // Kernels before 6.12.40 and 6.1.147 may return more than was asked (fs/cachefiles/ondemand.c).
        if done.saturating_add(n) >= range::len(&self.range) {
            return Stage::Finished(Ok(()));
        }
        let whole = align_down(done + n, self.page_bytes);
        if whole > done { Stage::Writing { done: whole } } else { self.retry(Stage::Writing { done }, Errno::EIO) }
    }

    fn after_error(&mut self, stage: Stage, result: i32, now_ns: u64) -> Stage {
        let errno = Errno::from_raw(result.wrapping_neg());
        match (stage, errno) {
            (_, Errno::EINTR | Errno::EAGAIN) => self.retry(stage, errno),
            (Stage::Writing { done }, _) if NoRoom::is_meant_by(errno) && self.room_tries + 1 < ROOM_TRIES_MAX => {
                let until_ns = now_ns + (ROOM_PAUSE_NS << self.room_tries);
                self.room_tries += 1;
                Stage::Waiting { done, until_ns, errno }
            }
            _ => Stage::Finished(Err(errno)),
        }
    }

    fn retry(&mut self, stage: Stage, errno: Errno) -> Stage {
        self.retries += 1;
        if self.retries > RETRIES_MAX { Stage::Finished(Err(errno)) } else { stage }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn read_fill(pages: u64, blob_len: u64) -> Fill {
        Fill::new(0..pages * PAGE, blob_len, Data::Read { file: 0, offset: 0 }, PAGE)
    }

    #[test]
    fn the_last_partial_page_is_padded_not_read() {
        let mut fill = read_fill(2, 5000);
        assert_eq!(fill.next(), Next::Read { file: 0, offset: 0, slot_offset: 0, len: 8192, then: None });
        fill.done(5000, 0);
        assert_eq!(fill.next(), Next::Write { offset: 0, len: 8192, from: From::Slot { slot_offset: 0, valid: 5000 } });
        fill.done(8192, 0);
        assert_eq!(fill.next(), Next::Finished(Ok(())));
    }

    #[test]
    fn mapped_pages_replace_a_read_that_has_not_begun() {
        let mut fill = read_fill(2, 5000);
        assert!(fill.use_mapped() && !fill.use_mapped());
        assert_eq!(fill.next(), Next::Write { offset: 0, len: 8192, from: From::Mapped { file: 0, offset: 0 } });
        let mut fill = read_fill(2, 8192);
        fill.done(4096, 0);
        assert!(!fill.use_mapped());
        assert!(matches!(fill.next(), Next::Read { offset: 4096, .. }));
    }

    #[test]
    fn a_truncated_source_fails_and_writes_nothing() {
        let mut fill = read_fill(4, 4 * PAGE);
        fill.done(5000, 0);
        assert!(matches!(fill.next(), Next::Read { offset: 4096, .. }));
        while matches!(fill.next(), Next::Read { .. }) {
            fill.done(904, 0);
        }
        assert_eq!(fill.next(), Next::Finished(Err(Errno::EIO)));
    }

    #[test]
    fn a_write_may_report_more_than_it_was_given() {
        let mut fill = Fill::new(0..PAGE, 100, Data::Zero, PAGE);
        fill.done(8192, 0);
        assert_eq!(fill.next(), Next::Finished(Ok(())));
    }

    #[test]
    fn no_room_is_waited_for_and_then_reported() {
        [Errno::ENOBUFS, Errno::ENOSPC, Errno::EDQUOT].into_iter().for_each(waits_and_fails);
    }

    fn waits_and_fails(no_room: Errno) {
        let mut fill = Fill::new(0..PAGE, PAGE, Data::Zero, PAGE);
        let mut now = 0;
        let mut waits = 0;
        loop {
            match fill.next() {
                Next::Write { .. } => fill.done(-(no_room as i32), now),
                Next::Wait { until_ns } => {
                    waits += 1;
                    fill.wake(until_ns - 1);
                    assert!(matches!(fill.next(), Next::Wait { .. }));
                    now = until_ns;
                    fill.wake(now);
                }
                Next::Finished(result) => break assert_eq!(result, Err(no_room)),
                Next::Read { .. } => unreachable!(),
            }
        }
        assert_eq!(waits, u32::from(ROOM_TRIES_MAX) - 1);
        assert_eq!(now, ROOM_PAUSE_NS * 63, "pauses double");

        let mut fill = Fill::new(0..PAGE, PAGE, Data::Zero, PAGE);
        fill.give_up_waiting();
        assert!(matches!(fill.next(), Next::Write { .. }), "it does not wait");
        fill.done(-(no_room as i32), 0);
        fill.give_up_waiting();
        assert_eq!(fill.next(), Next::Finished(Err(no_room)));
    }

    proptest! {
        /// Whatever the results, the fill ends, asks only for page-aligned writes inside its range, and
        /// says "done" only if the accepted writes cover the whole range.
        #[test]
        fn any_results_end_and_success_means_covered(
            pages in 1u64..64, tail in 1u64..=PAGE, results in prop::collection::vec(-130i32..300_000, 0..64), mapped in any::<bool>(),
        ) {
            let len = (pages - 1) * PAGE + tail;
            let data = if mapped { Data::Mapped { file: 0, offset: 0 } } else { Data::Read { file: 0, offset: 0 } };
            let mut fill = Fill::new(0..pages * PAGE, len, data, PAGE);
            let mut covered = 0;
            let mut results = results.into_iter();
            let mut now = 0;
            for step in 0.. {
                prop_assert!(step < 2000, "does not end");
                match fill.next() {
                    Next::Read { offset, slot_offset, len: n, .. } => {
                        prop_assert!(offset % PAGE == 0 && slot_offset == offset && offset + n <= pages * PAGE);
                        let most = i32::try_from(len.saturating_sub(offset)).unwrap();
                        fill.done(results.next().unwrap_or(most).min(most), now);
                    }
                    Next::Write { offset, len: n, .. } => {
                        prop_assert!(offset % PAGE == 0 && n % PAGE == 0 && offset + n == pages * PAGE);
                        prop_assert!(offset <= covered, "skips what was not written");
                        let result = results.next().unwrap_or(i32::try_from(n).unwrap());
                        covered = covered.max(offset + u64::try_from(result).unwrap_or(0).min(n));
                        fill.done(result, now);
                    }
                    Next::Wait { until_ns } => { now = until_ns; fill.wake(now); }
                    Next::Finished(result) => {
                        if result.is_ok() { prop_assert_eq!(covered, pages * PAGE); }
                        break;
                    }
                }
            }
        }
    }
}
