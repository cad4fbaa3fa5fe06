//! Simulated blobs: where each byte should come from, and which sectors of the sources are broken.

use std::fs::File;
use std::sync::Arc;

use super::content::{Origin, Origins};
use super::rng::Rng;
use crate::range::{ByteRange, align_down, align_up, intersect};
use crate::store::holes::Holes;
use crate::store::{Blob, Data, Extent, SourceFile, SourceMode};

/// Page size of the simulated machine.
pub const PAGE_BYTES: u64 = 4096;
/// File systems that blobs lie on.
pub const DEVICES: u64 = 3;
/// Longest blob that is made by chance.
const BLOB_MAX_BYTES: u64 = 3 << 20;
/// Whether extents may start and end anywhere; otherwise they start at pages, in the
/// blob and in mapped files, and a mapped file ends where the blob ends.
const ODD_EXTENTS: bool = false;
/// Most extents in a blob that is made by chance.
const EXTENTS_MAX: u64 = 12;
/// Shortest hole of a sparse file that is an extent of its own; shorter ones are read.
const HOLE_MIN_BYTES: u64 = 4 * PAGE_BYTES;

/// A blob of which only the layout exists.
#[derive(Debug)]
pub struct SimBlob {
    id: u32,
    len: u64,
    /// Start and place of each extent, ascending; the first starts at 0.
    extents: Vec<(u64, Data)>,
    /// All holes of the first file, whatever their length; they read as zeros.
    holes: Holes,
    files: Vec<Arc<SourceFile>>,
    /// Ranges of each file that give `EIO` for ever.
    broken: Vec<Vec<ByteRange>>,
}

impl SimBlob {
    /// A blob of `len` bytes in one file, read as `mode` says.
    #[must_use]
    pub fn whole_file(id: u32, len: u64, mode: SourceMode) -> Self {
        let data = match mode {
            SourceMode::Mmap => Data::Mapped { file: 0, offset: 0 },
            _ => Data::Read { file: 0, offset: 0 },
        };
        Self { id, len, extents: vec![(0, data)], holes: Holes::default(), files: vec![source_file(len, mode)], broken: vec![Vec::new()] }
    }

    /// The same with holes wherever there is none of `runs` of data.
    #[must_use]
    pub fn sparse(id: u32, len: u64, mode: SourceMode, runs: &[ByteRange]) -> Self {
        let mut blob = Self::whole_file(id, len, mode);
        let Some(&(_, whole)) = blob.extents.first() else { return blob };
        let holes = |min_bytes| Holes::between(runs.iter().cloned(), len, PAGE_BYTES, min_bytes);
        let (mut extents, mut at) = (Vec::new(), 0);
        while at < len {
            let (is_hole, end) = holes(HOLE_MIN_BYTES).at(at);
            extents.push((at, if is_hole { Data::Zero } else { moved(whole, at) }));
            at = end;
        }
        blob.holes = holes(1);
        Self { extents, ..blob }
    }

    /// A sparse file by chance.
    fn sparse_by_chance(id: u32, len: u64, mode: SourceMode, rng: &mut Rng) -> Self {
        let mut cuts: Vec<u64> = (0..2 * rng.between(0, EXTENTS_MAX)).map(|_| rng.below(len)).collect();
        cuts.sort_unstable();
        let runs: Vec<ByteRange> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).filter(|run| !run.is_empty()).collect();
        Self::sparse(id, len, mode, &runs)
    }

    /// Whether its file may be mapped although it is read: bytes behind the end of the blob must be zeros then.
    #[must_use]
    pub fn may_be_mapped(&self) -> bool {
        self.files.len() == 1
    }

    /// A blob by chance: empty, one file, or extents of every kind and of odd sizes.
    #[must_use]
    pub fn by_chance(id: u32, rng: &mut Rng) -> Self {
        let len = match rng.below(8) {
            0 => rng.below(2 * PAGE_BYTES),
            1 => rng.between(1, 64) * PAGE_BYTES,
            2 => rng.below(BLOB_MAX_BYTES),
            _ => rng.below(BLOB_MAX_BYTES / 8),
        };
        if rng.chance(400) || len == 0 {
            let mode = rng.pick(&[SourceMode::Direct, SourceMode::Buffered, SourceMode::Mmap]);
            if len > 0 && rng.chance(500) {
                return Self::sparse_by_chance(id, len, mode, rng);
            }
            return Self::whole_file(id, len, mode);
        }
        Self::pieces(id, len, rng)
    }

    /// Extents of odd sizes in a buffered file (0) and a mapped one (1), at odd places.
    fn pieces(id: u32, len: u64, rng: &mut Rng) -> Self {
        let count = rng.between(1, EXTENTS_MAX);
        let mut starts = vec![0];
        for _ in 1..count {
            let start = rng.below(len);
            starts.push(if !ODD_EXTENTS || rng.chance(500) { align_down(start, PAGE_BYTES) } else { start });
        }
        starts.sort_unstable();
        starts.dedup();
        let mut used = [0, 0];
        let mut extents = Vec::new();
        for (i, &start) in starts.iter().enumerate() {
            let end = starts.get(i + 1).copied().unwrap_or(len);
            let kind = rng.index(3);
            let data = if kind == 2 {
                Data::Zero
            } else {
                let offset = place(used[kind], start, kind == 1, rng);
                used[kind] = offset + (end - start);
                match kind {
                    0 => Data::Read { file: 0, offset },
                    _ => Data::Mapped { file: 1, offset },
                }
            };
            extents.push((start, data));
        }
        // A source may go on behind the last byte that this blob uses.
        let slack = rng.pick(&[0, 0, 1, 100, 3 * PAGE_BYTES]);
        let mapped_slack = if ODD_EXTENTS { slack } else { 0 };
        Self {
            id,
            len,
            extents,
            holes: Holes::default(),
            files: vec![source_file(used[0] + slack, SourceMode::Buffered), source_file(used[1] + mapped_slack, SourceMode::Mmap)],
            broken: vec![Vec::new(), Vec::new()],
        }
    }

    /// Makes the sector that holds a byte of the blob unreadable for ever; `false` if it is no file's.
    pub fn break_at(&mut self, position: u64) -> bool {
        const SECTOR_BYTES: u64 = 512;
        let (Origin::File { file, offset, .. }, _) = self.at(position) else {
            return false;
        };
        let sector = offset & !(SECTOR_BYTES - 1);
        self.broken[file as usize].push(sector..sector + SECTOR_BYTES);
        true
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Length rounded up to a page: what the cache file holds.
    #[must_use]
    pub const fn padded_len(&self) -> u64 {
        align_up(self.len, PAGE_BYTES)
    }

    /// Length of one of its files.
    #[must_use]
    pub fn file_len(&self, file: usize) -> u64 {
        self.files[file].len_bytes
    }

    /// Where the first broken byte of a range of a file is.
    #[must_use]
    pub fn first_broken(&self, file: usize, range: &ByteRange) -> Option<u64> {
        self.broken[file].iter().filter_map(|sector| intersect(sector, range)).map(|common| common.start).min()
    }

    /// Whether a range of the blob cannot be had for ever.
    #[must_use]
    pub fn is_broken(&self, range: &ByteRange) -> bool {
        let mut at = range.start;
        while at < range.end.min(self.len) {
            let (origin, run) = self.at(at);
            let run = run.min(range.end - at);
            if let Origin::File { file, offset, .. } = origin
                && self.first_broken(file as usize, &(offset..offset + run)).is_some()
            {
                return true;
            }
            at += run;
        }
        false
    }

    /// The extent that holds a byte: its end and its place, moved on to that byte.
    fn find(&self, position: u64) -> (u64, Data) {
        let next = self.extents.partition_point(|(start, _)| *start <= position);
        let (start, data) = self.extents[next - 1];
        let end = self.extents.get(next).map_or(self.len, |(start, _)| *start);
        (end, moved(data, position - start))
    }

    /// What file a byte is taken from, and where in it, and for how many bytes that goes on.
    pub fn source(&self, position: u64) -> (Option<(usize, u64)>, u64) {
        let (end, data) = self.find(position);
        let source = match data {
            Data::Zero => None,
            Data::Read { file, offset } | Data::Mapped { file, offset } => Some((file, offset)),
        };
        (source, end - position)
    }

    /// What a byte of one of its files is, and for how many bytes that goes on.
    #[expect(clippy::cast_possible_truncation, reason = "a blob has one or two files")]
    fn in_file(&self, file: usize, offset: u64) -> (Origin, u64) {
        let (is_hole, end) = if file == 0 { self.holes.at(offset) } else { (false, u64::MAX) };
        let origin = if is_hole { Origin::Zero } else { Origin::File { blob: self.id, file: file as u32, offset } };
        (origin, end - offset)
    }
}

/// The place `by` bytes further on.
const fn moved(data: Data, by: u64) -> Data {
    match data {
        Data::Zero => Data::Zero,
        Data::Read { file, offset } => Data::Read { file, offset: offset + by },
        Data::Mapped { file, offset } => Data::Mapped { file, offset: offset + by },
    }
}

/// Where in a file to put an extent: behind what is used, as far from page boundaries as the blob's own
/// offset (so that whole pages can be mapped), or anywhere.
const fn place(used: u64, start: u64, mapped: bool, rng: &mut Rng) -> u64 {
    if (mapped && !ODD_EXTENTS) || rng.chance(600) { align_up(used, PAGE_BYTES) + start % PAGE_BYTES } else { used + rng.below(700) }
}

/// A file that is never read: the simulation only asks for its length and mode.
fn source_file(len: u64, mode: SourceMode) -> Arc<SourceFile> {
    let null = File::open("/dev/null").expect("/dev/null is there and readable");
    let found = null.metadata().expect("it is open");
    Arc::new(SourceFile { len_bytes: len, mode, ..SourceFile::unchecked(null, &found) })
}

impl Blob for SimBlob {
    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn extent(&self, offset: u64) -> Extent {
        assert!(offset < self.len, "asked for byte {offset} of {} bytes", self.len);
        let (end, data) = self.find(offset);
        Extent { len_bytes: end - offset, data }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &self.files
    }

    /// Some share one.
    fn device(&self) -> u64 {
        u64::from(self.id) % DEVICES
    }
}

/// What each byte of the blob must be; zeros behind its end.
impl Origins for SimBlob {
    fn at(&self, position: u64) -> (Origin, u64) {
        if position >= self.len {
            return (Origin::Zero, u64::MAX);
        }
        let (source, run) = self.source(position);
        let Some((file, offset)) = source else { return (Origin::Zero, run) };
        let (origin, same) = self.in_file(file, offset);
        (origin, run.min(same))
    }
}

/// What reading a source file, or looking at its mapping, gives: its bytes, then zeros up to the end of the
/// last page, then nothing good.
#[derive(Clone, Copy, Debug)]
pub struct FileBytes<'a> {
    /// The blob that the file belongs to.
    pub blob: &'a SimBlob,
    /// Which file.
    pub file: usize,
    /// Its length now; it may have been truncated.
    pub len: u64,
}

impl Origins for FileBytes<'_> {
    fn at(&self, position: u64) -> (Origin, u64) {
        let padded = align_up(self.len, PAGE_BYTES);
        if position < self.len {
            let (origin, run) = self.blob.in_file(self.file, position);
            (origin, run.min(self.len - position))
        } else if position < padded {
            (Origin::Zero, padded - position)
        } else {
            (Origin::Garbage, u64::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_cover_every_blob_without_a_gap() {
        for seed in 0..200 {
            let blob = SimBlob::by_chance(3, &mut Rng::new(seed));
            let mut at = 0;
            while at < blob.len_bytes() {
                let extent = blob.extent(at);
                assert!(extent.len_bytes > 0);
                if let Data::Read { file, offset } | Data::Mapped { file, offset } = extent.data {
                    assert!(offset + extent.len_bytes <= blob.file_len(file));
                }
                at += extent.len_bytes;
            }
            assert_eq!(at, blob.len_bytes());
        }
    }

    #[test]
    fn small_holes_are_read_and_zeros_all_the_same() {
        let runs = [0..PAGE_BYTES, 3 * PAGE_BYTES..4 * PAGE_BYTES + 1];
        let blob = SimBlob::sparse(0, 20 * PAGE_BYTES, SourceMode::Direct, &runs);
        let at = |page: u64| (blob.extent(page * PAGE_BYTES).data, blob.at(page * PAGE_BYTES).0);
        assert_eq!(at(2), (Data::Read { file: 0, offset: 2 * PAGE_BYTES }, Origin::Zero));
        assert_eq!(at(3).1, Origin::File { blob: 0, file: 0, offset: 3 * PAGE_BYTES });
        assert_eq!(at(5), (Data::Zero, Origin::Zero));
    }

    #[test]
    fn a_broken_sector_is_seen_through_the_extents() {
        let mut blob = SimBlob::whole_file(0, 10_000, SourceMode::Buffered);
        assert!(blob.break_at(5000));
        assert!(blob.is_broken(&(4096..8192)));
        assert!(!blob.is_broken(&(0..4096)));
        assert_eq!(blob.first_broken(0, &(0..10_000)), Some(4608));
    }
}
