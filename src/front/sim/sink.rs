//! The cache file behind an anonymous fd, and the rules by which the fd takes writes.
//!
//! Modelled on `cachefiles_ondemand_fd_write_iter` and `__cachefiles_prepare_write`. The model kernel is
//! faithful also where the real one is unkind: it does what a careless daemon asked for and leaves it to
//! the checker to notice.

use nix::errno::Errno;

use super::blob::{PAGE_BYTES, SimBlob};
use super::content::{Origins, equal};
use crate::range::{ByteRange, align_down, align_up};

/// How a kernel version treats writes, closed fds and small blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flavour {
    /// Which kernels these are.
    pub name: &'static str,
    /// A start that is not page aligned is rounded down without a word; otherwise it fails with `ENOBUFS`.
    pub misplaces: bool,
    /// A write reports its length rounded up to a page, whatever was written; otherwise the real count.
    pub rounds_result: bool,
    /// A CLOSE that was not delivered when the daemon closes the fd vanishes; otherwise it is delivered with
    /// the object id `0xFFFFFFFF`.
    pub flushes_close: bool,
    /// Block size of the file system with the cache: a part of a page may be present if it is below a page.
    pub block_bytes: u64,
}

/// The kernels that are simulated.
pub const FLAVOURS: [Flavour; 5] = [
    Flavour { name: "6.1.100", misplaces: true, rounds_result: true, flushes_close: false, block_bytes: PAGE_BYTES },
    Flavour { name: "6.1.192", misplaces: true, rounds_result: false, flushes_close: false, block_bytes: PAGE_BYTES },
    Flavour { name: "6.12.117", misplaces: false, rounds_result: false, flushes_close: true, block_bytes: PAGE_BYTES },
    Flavour { name: "6.1.192, 1 KiB blocks", misplaces: true, rounds_result: false, flushes_close: false, block_bytes: 1024 },
    Flavour { name: "6.12.117, 1 KiB blocks", misplaces: false, rounds_result: false, flushes_close: true, block_bytes: 1024 },
];

/// Sector size of the disk below: direct writes are multiples of it, in length and in memory.
pub const SECTOR_BYTES: u64 = 512;

/// One block of the cache file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Block {
    /// Not there.
    Hole,
    /// There, with the right bytes.
    Good,
    /// There, with wrong bytes: what must never be.
    Bad,
}

/// A write as the daemon asked for it.
#[derive(Clone, Copy, Debug)]
pub struct SinkWrite<'a> {
    /// Where in the cache file.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// What is written: from this position of `content` on.
    pub position: u64,
    /// The memory that is written from.
    pub content: &'a dyn Origins,
    /// Address of the first byte, as far as its alignment goes.
    pub address: u64,
    /// The disk takes at most this much now (a fault), if given.
    pub at_most: Option<u64>,
}

/// A cache file.
#[derive(Clone, Debug)]
pub struct CacheFile {
    block_bytes: u64,
    blocks: Vec<Block>,
    bad_blocks: usize,
}

impl CacheFile {
    /// An empty file on a file system with blocks of `block_bytes`.
    #[must_use]
    pub const fn new(block_bytes: u64) -> Self {
        Self { block_bytes, blocks: Vec::new(), bad_blocks: 0 }
    }

    /// A write through the anonymous fd of an object whose file is published.
    ///
    /// # Errors
    /// `ENOBUFS` for an unaligned start (newer kernels), `EINVAL` for unaligned length or memory.
    pub fn write(&mut self, flavour: &Flavour, blob: &SimBlob, write: &SinkWrite<'_>) -> Result<u64, Errno> {
        let start = align_down(write.offset, PAGE_BYTES);
        if start != write.offset && !flavour.misplaces {
            return Err(Errno::ENOBUFS);
        }
        if !write.len.is_multiple_of(SECTOR_BYTES) || !write.address.is_multiple_of(SECTOR_BYTES) {
            return Err(Errno::EINVAL);
        }
        let taken = write.at_most.unwrap_or(write.len).min(write.len);
        self.store(blob, start, taken, write);
        if flavour.rounds_result { Ok(align_up(write.len, PAGE_BYTES)) } else { Ok(taken) }
    }

    /// Puts `len` bytes at `start`. A block that is written in part stays what it was.
    fn store(&mut self, blob: &SimBlob, start: u64, len: u64, write: &SinkWrite<'_>) {
        let block_bytes = self.block_bytes;
        for done in (0..len / block_bytes).map(|block| block * block_bytes) {
            let position = write.position + done;
            let good = equal(write.content, position, blob, start + done, self.block_bytes);
            self.set(start + done, if good { Block::Good } else { Block::Bad });
        }
    }

    fn set(&mut self, at: u64, block: Block) {
        let index = self.index(at);
        if index >= self.blocks.len() {
            self.blocks.resize(index + 1, Block::Hole);
        }
        self.bad_blocks += usize::from(block == Block::Bad);
        self.bad_blocks -= usize::from(self.blocks[index] == Block::Bad);
        self.blocks[index] = block;
    }

    #[expect(clippy::cast_possible_truncation, reason = "blobs of the simulation are small")]
    const fn index(&self, at: u64) -> usize {
        (at / self.block_bytes) as usize
    }

    fn is_data(&self, index: usize) -> bool {
        self.blocks.get(index).is_some_and(|block| *block != Block::Hole)
    }

    /// How many blocks hold wrong bytes.
    #[must_use]
    pub const fn bad_blocks(&self) -> usize {
        self.bad_blocks
    }

    /// End of the last block that holds anything.
    #[must_use]
    pub fn data_end(&self) -> u64 {
        let last = self.blocks.iter().rposition(|block| *block != Block::Hole);
        last.map_or(0, |index| (index as u64 + 1) * self.block_bytes)
    }

    /// `SEEK_DATA`: the first byte from `at` on that is there, if below `end`.
    #[must_use]
    pub fn seek_data(&self, at: u64, end: u64) -> Option<u64> {
        let first = self.index(at);
        let found = (first..self.blocks.len()).find(|&index| self.is_data(index))?;
        let found = (found as u64 * self.block_bytes).max(at);
        (found < end).then_some(found)
    }

    /// `SEEK_HOLE`: the first byte from `at` on that is not there, at most `end`.
    #[must_use]
    pub fn seek_hole(&self, at: u64, end: u64) -> u64 {
        let mut hole = at;
        while hole < end && self.is_data(self.index(hole)) {
            hole = align_down(hole, self.block_bytes) + self.block_bytes;
        }
        hole.min(end)
    }

    /// Whether every byte of a range is there.
    #[must_use]
    pub fn is_present(&self, range: &ByteRange) -> bool {
        self.seek_hole(range.start, range.end) == range.end
    }

    /// The parts of a range that are there.
    #[must_use]
    pub fn present(&self, range: &ByteRange) -> Vec<ByteRange> {
        let mut parts = Vec::new();
        let mut at = range.start;
        while let Some(data) = self.seek_data(at, range.end) {
            at = self.seek_hole(data, range.end);
            parts.push(data..at);
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::SourceMode;

    const OLD: Flavour = FLAVOURS[0];
    const NEW: Flavour = FLAVOURS[2];

    fn write(blob: &SimBlob, offset: u64, len: u64) -> SinkWrite<'_> {
        SinkWrite { offset, len, position: offset, content: blob, address: 0, at_most: None }
    }

    #[test]
    fn old_kernels_misplace_and_new_ones_refuse_an_unaligned_start() {
        let blob = SimBlob::whole_file(0, 16 * PAGE_BYTES, SourceMode::Buffered);
        let mut file = CacheFile::new(PAGE_BYTES);
        assert_eq!(file.write(&OLD, &blob, &write(&blob, PAGE_BYTES + 512, PAGE_BYTES)), Ok(PAGE_BYTES));
        assert_eq!(file.bad_blocks(), 1, "the bytes landed at the wrong place");
        let refused = file.write(&NEW, &blob, &write(&blob, 512, PAGE_BYTES));
        assert_eq!(refused, Err(Errno::ENOBUFS));
    }

    #[test]
    fn length_and_memory_must_be_whole_sectors() {
        let blob = SimBlob::whole_file(0, 16 * PAGE_BYTES, SourceMode::Buffered);
        let mut file = CacheFile::new(PAGE_BYTES);
        for bad in [write(&blob, 0, 100), SinkWrite { address: 1, ..write(&blob, 0, PAGE_BYTES) }] {
            assert_eq!(file.write(&NEW, &blob, &bad), Err(Errno::EINVAL));
        }
        assert_eq!(file.write(&OLD, &blob, &write(&blob, 0, 512)), Ok(4096));
    }

    #[test]
    fn a_short_write_leaves_the_broken_block_a_hole() {
        let blob = SimBlob::whole_file(0, 16 * PAGE_BYTES, SourceMode::Buffered);
        let mut file = CacheFile::new(PAGE_BYTES);
        let short = SinkWrite { at_most: Some(PAGE_BYTES + 1536), ..write(&blob, 0, 4 * PAGE_BYTES) };
        assert_eq!(file.write(&NEW, &blob, &short), Ok(PAGE_BYTES + 1536));
        assert!(file.is_present(&(0..PAGE_BYTES)) && !file.is_present(&(0..PAGE_BYTES + 1)));
        assert_eq!(file.seek_data(PAGE_BYTES, 16 * PAGE_BYTES), None);
    }
}
