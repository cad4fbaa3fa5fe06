//! What a sink holds, where nobody but us knows: one bit a page, in a file beside it.
//!
//! ```text
//!   0        4096                 4096 + n             4096 + 2n
//!   | header | durable bits       | live bits          |      n: bits of all pages, in whole pages
//! ```
//!
//! *Live* bits are set when a write to the sink has ended. They lie in a shared mapping, so they outlive the process, but a
//! loss of power may keep a bit and lose its data: they count only in the boot in which they were set. *Durable* bits are
//! copied from them after the sink has been synced; they count for ever. Holes of the sink are not asked: a page of zeros that
//! somebody read from a preallocated part looks like data to `SEEK_DATA`. When a sync of the sink fails, live bits become those of
//! no boot, and none is made durable any more: nobody knows which data was lost.
//!
//! The header says which file the bits are about ([`SinkId`]). A map that outlives its sink, whatever removed or exchanged that,
//! says nothing of the file that has its name then.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::posix_fallocate;

use crate::range::{ByteRange, align_up};

/// Unit in which presence is known and sinks are as long; EROFS reads its devices in blocks of at most that.
pub const PAGE_BYTES: u64 = 4096;
/// What a file begins with; the last digit is the version of the layout.
const MAGIC: [u8; 8] = *b"INFILLP2";
/// Room of the header: so that the bits begin on a page.
const HEADER_BYTES: u64 = 4096;
/// Bits of a word.
const WORD_BITS: u64 = 64;
/// Bytes of a word.
const WORD_BYTES: u64 = 8;
/// Longest sink of which presence is kept; its map is half a gigabyte.
const LEN_MAX_BYTES: u64 = 1 << 44;
/// Bytes of a boot's id as /proc/sys/kernel/random/boot_id shows it.
const BOOT_ID_BYTES: usize = 36;
/// Where it is in the header.
const BOOT_ID_AT: u64 = 4 * WORD_BYTES + NAME_MAX_BYTES as u64;
/// Longest name of a sink, which is a hash in hexadecimal digits.
const NAME_MAX_BYTES: usize = 64;

/// A sink as no other one ever is: also not one that is made later with the same name and length.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SinkId {
    /// Name of its file, which says which blob's bytes it has.
    pub name: String,
    /// Length of the blob.
    pub len_bytes: u64,
    /// Number of the file, and how often the number was given away before ([`crate::ops::inode::generation`]).
    pub inode: u64,
    /// See `inode`.
    pub generation: u32,
}

/// See the module's description.
#[derive(Debug)]
pub struct PresenceMap {
    file: File,
    live: MmapRaw,
    pages: u64,
    /// Pages whose live bit is set.
    present: AtomicU64,
    /// There are live bits that are not durable.
    dirty: AtomicBool,
    /// One saves at a time.
    saving: Mutex<Sound>,
}

/// Whether the sink can be believed to hold what was written to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sound {
    Yes,
    /// A sync of it failed. The kernel says that once, and takes the data that it could not write for written: the next sync would
    /// succeed, and make bits durable whose data is lost. The file is yet to say so.
    No,
    /// And the file says so.
    Noted,
}

/// Why what is live could not be made durable.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// For good.
    #[error(
        "the disk did not take all of what was written to this file, so after a reboot nothing counts that came since it was last noted: {0}; look at the disk and at the kernel's log, then unmount its images and mount them anew"
    )]
    Sink(#[source] io::Error),
    /// It is tried again.
    #[error("what is in the cache cannot be noted, and would be lost by a loss of power: {0}")]
    Map(#[from] io::Error),
}

impl PresenceMap {
    /// The map in `file`, of the sink `of`; a new one if it is empty, of another sink, or no map. Bits of another boot than
    /// `boot_id` that are not durable are dropped. One process at a time may have it.
    ///
    /// # Errors
    /// The file cannot be read, written or mapped; a sink that is longer than 16 TiB.
    pub fn open(file: File, of: &SinkId, boot_id: &str) -> io::Result<Self> {
        if of.len_bytes > LEN_MAX_BYTES || of.name.len() > NAME_MAX_BYTES || boot_id.len() > BOOT_ID_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let pages = of.len_bytes.div_ceil(PAGE_BYTES);
        let bits = bits_bytes(pages);
        let header = header(of, boot_id);
        let mut found = vec![0; header.len()];
        let known = file.metadata()?.len() == HEADER_BYTES + 2 * bits && file.read_exact_at(&mut found, 0).is_ok();
        let same_sink = known && found[..header.len() - BOOT_ID_BYTES] == header[..header.len() - BOOT_ID_BYTES];
        if !same_sink {
            file.set_len(0)?;
            file.set_len(HEADER_BYTES + 2 * bits)?;
        }
        // A store into a mapped hole of a file system that is full ends the process (SIGBUS).
        match posix_fallocate(&file, 0, i64::try_from(HEADER_BYTES + 2 * bits).map_err(|_| io::ErrorKind::InvalidInput)?) {
            Ok(()) | Err(Errno::EOPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
        if same_sink && found != header {
            copy(&file, HEADER_BYTES, HEADER_BYTES + bits, bits)?;
        }
        // After the bits: a crash in between must not make those of another boot count.
        if found != header || !same_sink {
            file.sync_data()?;
            file.write_all_at(&header, 0)?;
        }
        let len = usize::try_from(bits).map_err(|_| io::ErrorKind::InvalidInput)?;
        let live = MmapOptions::new().offset(HEADER_BYTES + bits).len(len).map_raw(&file)?;
        let (present, dirty, saving) = (AtomicU64::new(0), AtomicBool::new(true), Mutex::new(Sound::Yes));
        let map = Self { file, live, pages, present, dirty, saving };
        if !pages.is_multiple_of(WORD_BITS) {
            // There are no pages behind the last one, whatever the file says.
            map.word(pages / WORD_BITS).fetch_and((1 << (pages % WORD_BITS)) - 1, Ordering::Relaxed);
        }
        let count: u32 = (0..map.words()).map(|word| map.word(word).load(Ordering::Relaxed).count_ones()).sum();
        map.present.store(count.into(), Ordering::Relaxed);
        Ok(map)
    }

    /// The whole pages of `range` are in the sink. Only one thread may say so at a time.
    pub fn insert(&self, range: &ByteRange) {
        let (mut page, end) = (range.start / PAGE_BYTES, (range.end / PAGE_BYTES).min(self.pages));
        while page < end {
            let (word, bit) = (page / WORD_BITS, page % WORD_BITS);
            let n = (WORD_BITS - bit).min(end - page);
            let mask = (u64::MAX >> (WORD_BITS - n)) << bit;
            // Pairs with the swap in `save`: who finds the mark finds the bits, or they are marked anew.
            let before = self.word(word).fetch_or(mask, Ordering::Release);
            self.present.fetch_add((mask & !before).count_ones().into(), Ordering::Relaxed);
            page += n;
        }
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether the sink holds all pages of `range`, which is made of whole ones or reaches to its end.
    #[must_use]
    pub fn contains(&self, range: &ByteRange) -> bool {
        let (mut page, end) = (range.start / PAGE_BYTES, range.end.div_ceil(PAGE_BYTES).min(self.pages));
        while page < end {
            let (word, bit) = (page / WORD_BITS, page % WORD_BITS);
            let n = (WORD_BITS - bit).min(end - page);
            let mask = (u64::MAX >> (WORD_BITS - n)) << bit;
            // Who finds a bit finds what was written before it was set.
            if self.word(word).load(Ordering::Acquire) & mask != mask {
                return false;
            }
            page += n;
        }
        true
    }

    /// What the sink holds, in order.
    #[must_use]
    pub fn ranges(&self) -> Vec<ByteRange> {
        let mut ranges: Vec<ByteRange> = Vec::new();
        for word in 0..self.words() {
            let mut bits = self.word(word).load(Ordering::Relaxed);
            while bits != 0 {
                let first = u64::from(bits.trailing_zeros());
                let run = u64::from((!(bits >> first)).trailing_zeros()).min(WORD_BITS - first);
                bits &= if first + run == WORD_BITS { 0 } else { u64::MAX << (first + run) };
                let start = (word * WORD_BITS + first) * PAGE_BYTES;
                let end = start + run * PAGE_BYTES;
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
        }
        ranges
    }

    /// The sink holds nothing that counts. To be called before anybody was told what it holds.
    ///
    /// # Errors
    /// The disk.
    pub fn forget(&self) -> io::Result<()> {
        (0..self.words()).for_each(|word| self.word(word).store(0, Ordering::Relaxed));
        self.present.store(0, Ordering::Relaxed);
        let none = vec![0; usize::try_from(self.words() * WORD_BYTES).map_err(|_| io::ErrorKind::InvalidInput)?];
        self.file.write_all_at(&none, HEADER_BYTES)?;
        self.file.sync_data()
    }

    /// Whether the sink holds everything.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.present.load(Ordering::Relaxed) >= self.pages
    }

    /// How many bytes the sink holds, in whole pages.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        self.present.load(Ordering::Relaxed) * PAGE_BYTES
    }

    /// Makes durable what is live: syncs `sink`, then the bits. `false`: there was nothing to do.
    ///
    /// # Errors
    /// The sink's disk: nothing is saved any more, and once this map is opened again only what was durable before counts. The map's: what was
    /// live before is saved by a later call.
    pub fn save(&self, sink: &File) -> Result<bool, SaveError> {
        self.save_after(|| sink.sync_data())
    }

    fn save_after(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<bool, SaveError> {
        let mut sound = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        if *sound != Sound::Yes {
            return self.disown(&mut sound).map(|()| false).map_err(SaveError::Map);
        }
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(false);
        }
        // A copy of before the sync: what is set meanwhile is not synced.
        let bits: Vec<u8> = (0..self.words()).flat_map(|word| self.word(word).load(Ordering::Acquire).to_ne_bytes()).collect();
        if let Err(error) = sync() {
            *sound = Sound::No;
            // Else it is tried again.
            let _ = self.disown(&mut sound);
            return Err(SaveError::Sink(error));
        }
        let saved = self.file.write_all_at(&bits, HEADER_BYTES).and_then(|()| self.file.sync_data());
        saved.map(|()| true).map_err(|error| {
            self.dirty.store(true, Ordering::Release);
            SaveError::Map(error)
        })
    }

    /// Makes the live bits those of no boot, so that they count for nobody who opens the map.
    fn disown(&self, sound: &mut Sound) -> io::Result<()> {
        if *sound == Sound::Noted {
            return Ok(());
        }
        self.file.write_all_at(&[0; BOOT_ID_BYTES], BOOT_ID_AT)?;
        self.file.sync_data()?;
        *sound = Sound::Noted;
        Ok(())
    }

    const fn words(&self) -> u64 {
        self.pages.div_ceil(WORD_BITS)
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        assert!(index < self.words(), "a page outside of the sink");
        let at = usize::try_from(index * WORD_BYTES).unwrap_or(usize::MAX);
        // SAFETY: the mapping is as long as all words (`open`), lives as long as `self`, and begins on a page, so each word is
        // aligned; it is only ever accessed as atomics. The file is not shortened while it is mapped: nobody else may have it.
        unsafe { AtomicU64::from_ptr(self.live.as_mut_ptr().wrapping_add(at).cast()) }
    }
}

/// Room for a bit for each of `pages`, at least one page.
const fn bits_bytes(pages: u64) -> u64 {
    let bytes = pages.div_ceil(WORD_BITS) * WORD_BYTES;
    if bytes == 0 { PAGE_BYTES } else { align_up(bytes, PAGE_BYTES) }
}

fn header(of: &SinkId, boot_id: &str) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend([of.len_bytes, of.inode, of.generation.into()].iter().flat_map(|word| word.to_ne_bytes()));
    header.extend(of.name.bytes().chain(std::iter::repeat(0)).take(NAME_MAX_BYTES));
    header.extend(boot_id.bytes().chain(std::iter::repeat(0)).take(BOOT_ID_BYTES));
    header
}

/// Copies `len` bytes inside of a file.
fn copy(file: &File, from: u64, to: u64, len: u64) -> io::Result<()> {
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?];
    file.read_exact_at(&mut bytes, from)?;
    file.write_all_at(&bytes, to)
}

/// The present boot.
///
/// # Errors
/// /proc is not there.
pub fn boot_id() -> io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim_end().to_owned())
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests {
    use super::*;
    use crate::engine::presence::PageSet;
    use proptest::prelude::*;

    fn of(len_bytes: u64) -> SinkId {
        SinkId { name: "ab".into(), len_bytes, inode: 12, generation: 7 }
    }

    fn open(dir: &tempfile::TempDir, len: u64, boot: &str) -> PresenceMap {
        open_of(dir, &of(len), boot)
    }

    fn open_of(dir: &tempfile::TempDir, of: &SinkId, boot: &str) -> PresenceMap {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(dir.path().join("map")).unwrap();
        PresenceMap::open(file, of, boot).unwrap()
    }

    #[test]
    fn a_map_says_nothing_of_another_sink() {
        let (len, mine) = (100 * PAGE_BYTES, of(100 * PAGE_BYTES));
        let others = [
            SinkId { name: "cd".into(), ..mine.clone() },
            SinkId { len_bytes: len - PAGE_BYTES, ..mine.clone() },
            SinkId { inode: 13, ..mine.clone() },
            SinkId { generation: 8, ..mine.clone() },
        ];
        for other in others {
            let (dir, sink) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap());
            let map = open_of(&dir, &mine, "one");
            map.insert(&(0..8192));
            map.save(&sink).unwrap();
            drop(map);
            assert_eq!(open_of(&dir, &other, "one").ranges(), [], "{other:?}");
            assert_eq!(open_of(&dir, &mine, "one").ranges(), [], "what was dropped does not come back");
        }
    }

    #[test]
    fn what_is_forgotten_does_not_come_back_and_pages_behind_the_end_do_not_count() {
        let (dir, sink, len) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap(), 70 * PAGE_BYTES);
        let map = open(&dir, len, "one");
        map.insert(&(0..8192));
        map.save(&sink).unwrap();
        map.forget().unwrap();
        drop(map);
        let map = open(&dir, len, "two");
        assert_eq!((map.ranges(), map.present_bytes()), (vec![], 0));
        // Damage: a file whose last word has all bits.
        map.word(1).store(u64::MAX, Ordering::Relaxed);
        drop(map);
        let map = open(&dir, len, "two");
        assert_eq!((map.ranges(), map.present_bytes()), (vec![64 * PAGE_BYTES..len], 6 * PAGE_BYTES));
    }

    #[test]
    fn bits_outlive_the_process_in_a_boot_and_a_boot_when_they_were_saved() {
        let (dir, sink, len) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap(), 1000 * PAGE_BYTES + 5);
        let map = open(&dir, len, "one");
        map.insert(&(0..8192));
        assert!(map.save(&sink).unwrap() && !map.save(&sink).unwrap());
        map.insert(&(65 * 4096..200 * 4096));
        drop(map);
        // Killed: all of it counts. After a loss of power: what was saved.
        assert_eq!(open(&dir, len, "one").ranges(), [0..8192, 65 * 4096..200 * 4096]);
        let map = open(&dir, len, "two");
        assert_eq!((map.ranges(), map.present_bytes()), (vec![0..8192], 8192));
        drop(map);
        assert_eq!(open(&dir, len, "one").ranges(), [0..8192], "what was dropped does not come back");
        assert_eq!(open(&dir, len + 1, "one").ranges(), [], "it belongs to another sink");
    }

    #[test]
    fn what_a_failed_sync_may_have_lost_is_never_durable() {
        let (dir, sink, len) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap(), 100 * PAGE_BYTES);
        let map = open(&dir, len, "one");
        map.insert(&(0..8192));
        assert!(map.save(&sink).unwrap());
        map.insert(&(8192..16384));
        let failed = map.save_after(|| Err(Errno::EIO.into()));
        assert!(matches!(failed, Err(SaveError::Sink(_))), "{failed:?}");
        // The kernel would not say it again.
        map.insert(&(16384..20480));
        assert!(!map.save(&sink).unwrap());
        assert_eq!(map.ranges(), [0..20480], "it is served meanwhile");
        drop(map);
        let map = open(&dir, len, "one");
        assert_eq!(map.ranges(), [0..8192], "nor does the next process believe it");
        map.insert(&(8192..12288));
        assert!(map.save(&sink).unwrap());
        drop(map);
        assert_eq!(open(&dir, len, "two").ranges(), [0..12288]);
    }

    #[test]
    fn a_file_that_is_no_map_becomes_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("map"), vec![0xff; 3 * 4096]).unwrap();
        assert!(open(&dir, 4096, "one").ranges().is_empty());
        let map = open(&dir, 4096, "one");
        map.insert(&(0..4096));
        assert!(map.is_full());
        assert!(open(&dir, 0, "one").is_full(), "nothing is missing of nothing");
    }

    proptest! {
        #[test]
        fn it_says_what_a_set_of_pages_says(pages in 1u64..300, ranges in proptest::collection::vec((0u64..300, 0u64..130), 0..12)) {
            let dir = tempfile::tempdir().unwrap();
            let (map, len) = (open(&dir, pages * PAGE_BYTES, "b"), pages * PAGE_BYTES);
            let mut set = PageSet::new(len, PAGE_BYTES);
            for (start, n) in ranges {
                let range = start.min(pages) * PAGE_BYTES..(start + n).min(pages) * PAGE_BYTES;
                map.insert(&range);
                set.insert(&range);
            }
            let mut expected = Vec::new();
            let mut at = 0;
            while let Some(run) = set.first_present(&(at..len)) {
                at = run.end;
                expected.push(run);
            }
            prop_assert_eq!(map.ranges(), expected);
            for start in 0..pages {
                let range = start * PAGE_BYTES..(start + 70).min(pages) * PAGE_BYTES;
                prop_assert_eq!(map.contains(&range), set.contains(&range));
            }
            prop_assert_eq!(map.is_full(), set.is_full());
            prop_assert_eq!(map.present_bytes(), set.page_count() * PAGE_BYTES);
        }
    }
}
