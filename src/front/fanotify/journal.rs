//! What a group was asked and has not answered yet, in memory that outlives the process: so that the next one can answer.
//!
//! ```text
//!   0          64 KiB   68 KiB
//!   | messages | head   | table: one entry for each number of a descriptor |
//! ```
//!
//! The kernel itself writes an event into the journal: the engine has messages read into the first part, so there is no
//! moment in which an event was read and nobody knows of it. A message stays there until everything in it was noted in the
//! table or answered. The table has an event at the number of its descriptor, which is its name to the kernel, until it has
//! its answer; only then is that descriptor closed, so that no other event gets the name.
//!
//! A message does not say which file it is about: only its descriptor does, and that is closed with the process. So what
//! is found in a message alone may be about any object of the group.
//!
//! Nobody looks into a journal while another process writes to it, and a store that has been done is seen by whoever comes
//! after: only the order of stores counts. The memory belongs to no file that a loss of power could leave behind.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::wire::{Events, PRE_ACCESS};
use crate::front::{MESSAGE_MAX_BYTES, MESSAGES_MAX, ObjectId};
use crate::range::ByteRange;

/// What the head begins with; the last digit is the version of the layout.
const MAGIC: u64 = u64::from_le_bytes(*b"INFILLJ1");
/// Bytes of a word.
const WORD_BYTES: usize = size_of::<u64>();
/// Bytes of the messages' part.
const MESSAGES_BYTES: usize = MESSAGES_MAX as usize * MESSAGE_MAX_BYTES;
/// Words of the head, a page: the magic, then how many entries were ever used.
const HEAD_WORDS: usize = 512;
/// Words of an entry: of which object, and where what is wanted begins and ends.
const ENTRY_WORDS: usize = 3;
/// Entries: as many descriptors as a process can have where nobody has raised fs.nr_open. They take memory when they are used.
const ENTRIES: usize = 1 << 20;
/// Bytes of the whole.
const LEN_BYTES: usize = MESSAGES_BYTES + (HEAD_WORDS + ENTRIES * ENTRY_WORDS) * WORD_BYTES;

/// In the place of an object: the entry is free.
const FREE: u64 = 0;
/// In the place of an object: it may be any one of the group.
const ANY: u64 = 1;
/// In the place of an object: its id, and this.
const FIRST_OBJECT: u64 = 2;

/// See the module's description.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    messages: Arc<MmapRaw>,
    /// The head and the table.
    table: MmapRaw,
}

/// An event that has no answer, or whose answer was not noted any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Unanswered {
    /// The kernel's name for it.
    pub(super) number: RawFd,
    /// What it is about; `None`: any object of the group.
    pub(super) object: Option<ObjectId>,
    /// What is wanted; not clamped to the object if that is not known.
    pub(super) range: ByteRange,
}

impl Journal {
    /// An empty one.
    ///
    /// # Errors
    /// No memory, or no descriptor for it.
    pub(super) fn new() -> io::Result<Self> {
        let file = File::from(memfd_create("infill-journal", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(LEN_BYTES as u64)?;
        let journal = Self::map(file)?;
        journal.head(0).store(MAGIC, Ordering::Release);
        Ok(journal)
    }

    /// The one that another process has left.
    ///
    /// # Errors
    /// It is none, or one of another version.
    pub(super) fn open(file: OwnedFd) -> io::Result<Self> {
        let file = File::from(file);
        if file.metadata()?.len() != LEN_BYTES as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let journal = Self::map(file)?;
        if journal.head(0).load(Ordering::Acquire) != MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(journal)
    }

    fn map(file: File) -> io::Result<Self> {
        // The kernel refuses an event that it cannot write, and while a process is being killed it waits for no page.
        let messages = MmapOptions::new().len(MESSAGES_BYTES).populate().map_raw(&file)?;
        let _ = messages.lock();
        let table = MmapOptions::new().offset(MESSAGES_BYTES as u64).len(LEN_BYTES - MESSAGES_BYTES).map_raw(&file)?;
        Ok(Self { file, messages: Arc::new(messages), table })
    }

    /// Where messages are to be read into.
    pub(super) fn messages(&self) -> Arc<MmapRaw> {
        Arc::clone(&self.messages)
    }

    /// Notes an event that was read. Only one thread at a time may. `false`: the number is higher than the journal has room for.
    pub(super) fn note(&self, number: RawFd, object: ObjectId, range: &ByteRange) -> bool {
        let Some(entry) = self.entry(number) else { return false };
        write(entry, u64::from(object.0) + FIRST_OBJECT, range);
        let used = number.unsigned_abs().into();
        if self.used().load(Ordering::Relaxed) <= used {
            self.used().store(used + 1, Ordering::Release);
        }
        true
    }

    /// The event of this number was answered. To be called before another one can have it.
    pub(super) fn clear(&self, number: RawFd) {
        if let Some(entry) = self.entry(number) {
            entry[0].store(FREE, Ordering::Release);
        }
    }

    /// What another process has left unanswered, each number once. All of it is in the table afterwards, and no message is
    /// left; being killed in between changes nothing. Nobody may read messages meanwhile.
    pub(super) fn take_stock(&self) -> Vec<Unanswered> {
        let mut found: BTreeMap<RawFd, Unanswered> = self.noted().map(|event| (event.number, event)).collect();
        for event in self.read_only().filter(|event| self.entry(event.number).is_some()) {
            let range = event.range.clone();
            let known = found.entry(event.number).or_insert(event);
            // Its entry may be that of an event before it. Whichever it is about: it has its data if both are brought.
            *known = Unanswered { object: None, range: known.range.start.min(range.start)..known.range.end.max(range.end), ..*known };
        }
        // Behind what was used nothing counts, whatever is there; nor may it when more is used.
        let end = found.keys().next_back().map_or(0, |number| number + 1);
        let used = RawFd::try_from(self.used().load(Ordering::Acquire)).unwrap_or(end);
        (used..end).filter(|number| !found.contains_key(number)).for_each(|number| self.clear(number));
        for event in found.values() {
            if let Some(entry) = self.entry(event.number) {
                write(entry, event.object.map_or(ANY, |object| u64::from(object.0) + FIRST_OBJECT), &event.range);
                self.used().fetch_max(u64::from(event.number.unsigned_abs()) + 1, Ordering::Release);
            }
        }
        words(&self.messages).iter().for_each(|word| word.store(0, Ordering::Release));
        found.into_values().collect()
    }

    /// What the table has.
    fn noted(&self) -> impl Iterator<Item = Unanswered> {
        let used = usize::try_from(self.used().load(Ordering::Acquire)).unwrap_or(ENTRIES).min(ENTRIES);
        words(&self.table)[HEAD_WORDS..].chunks_exact(ENTRY_WORDS).take(used).enumerate().filter_map(|(number, entry)| {
            let object = match entry[0].load(Ordering::Acquire) {
                FREE => return None,
                ANY => None,
                object => Some(ObjectId(u32::try_from(object - FIRST_OBJECT).ok()?)),
            };
            let range = entry[1].load(Ordering::Relaxed)..entry[2].load(Ordering::Relaxed);
            Some(Unanswered { number: RawFd::try_from(number).ok()?, object, range })
        })
    }

    /// What was read, but perhaps not noted.
    fn read_only(&self) -> impl Iterator<Item = Unanswered> {
        words(&self.messages).chunks_exact(MESSAGE_MAX_BYTES / WORD_BYTES).flat_map(|message| {
            let bytes: Vec<u8> = message.iter().flat_map(|word| word.load(Ordering::Acquire).to_ne_bytes()).collect();
            let events: Vec<_> = Events::new(&bytes).filter(|event| event.mask & PRE_ACCESS != 0).collect();
            events
                .into_iter()
                .filter_map(|event| Some(Unanswered { number: event.fd?, object: None, range: event.range.unwrap_or(0..u64::MAX) }))
        })
    }

    fn entry(&self, number: RawFd) -> Option<&[AtomicU64]> {
        let at = HEAD_WORDS + usize::try_from(number).ok()?.checked_mul(ENTRY_WORDS)?;
        words(&self.table).get(at..at + ENTRY_WORDS)
    }

    /// All entries from this one on were never used.
    fn used(&self) -> &AtomicU64 {
        self.head(1)
    }

    fn head(&self, word: usize) -> &AtomicU64 {
        &words(&self.table)[word]
    }
}

/// Its file, for who keeps it.
impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Fills an entry: what is wanted first, so that it is never taken for one of another event.
fn write(entry: &[AtomicU64], object: u64, range: &ByteRange) {
    entry[1].store(range.start, Ordering::Relaxed);
    entry[2].store(range.end, Ordering::Relaxed);
    entry[0].store(object, Ordering::Release);
}

/// A mapping as words.
fn words(map: &MmapRaw) -> &[AtomicU64] {
    // SAFETY: the mapping is alive as long as the borrow, begins on a page and is made of whole words. Its file is as long as the
    // mapping and is shortened by nobody. The table is only ever accessed as atomics, and the messages are while no read of
    // messages is under way (`take_stock`).
    unsafe { std::slice::from_raw_parts(map.as_ptr().cast::<AtomicU64>(), map.len() / WORD_BYTES) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::fanotify::wire::tests::event;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// A process with its journal, and the kernel's side of it: what it does is a list of single stores, any of which may
    /// be the last one.
    struct Process {
        journal: Journal,
        /// Numbers of events that the kernel has handed out and that have no answer, with their object and range.
        open: BTreeMap<RawFd, (u32, ByteRange)>,
    }

    fn message(journal: &Journal, at: usize) -> &[AtomicU64] {
        let words = MESSAGE_MAX_BYTES / WORD_BYTES;
        &words_of(journal)[at * words..(at + 1) * words]
    }

    fn words_of(journal: &Journal) -> &[AtomicU64] {
        words(&journal.messages)
    }

    fn range(page: u64) -> ByteRange {
        page * 4096..(page + 1) * 4096
    }

    impl Process {
        fn new() -> Self {
            Self { journal: Journal::new().unwrap(), open: BTreeMap::new() }
        }

        /// The kernel writes so many events into a message, with the lowest numbers that are free.
        fn read(&mut self, at: usize, events: &[(u32, u64)]) -> Vec<RawFd> {
            let (mut bytes, mut numbers) = (Vec::new(), Vec::new());
            for &(object, page) in events {
                let number = (10..).find(|number| !self.open.contains_key(number)).unwrap();
                bytes.extend(event(number, PRE_ACCESS, Some((range(page).start, 4096))));
                self.open.insert(number, (object, range(page)));
                numbers.push(number);
            }
            for (word, bytes) in message(&self.journal, at).iter().zip(bytes.chunks_exact(WORD_BYTES)) {
                word.store(u64::from_ne_bytes(*bytes.first_chunk().unwrap()), Ordering::Relaxed);
            }
            numbers
        }

        /// What the process does with a message that was read, and with answers; gives up after `steps` of it.
        fn run(&mut self, numbers: &[Vec<RawFd>], answers: &[bool], steps: &mut usize) -> Option<()> {
            let mut step = || {
                *steps = steps.checked_sub(1)?;
                Some(())
            };
            for (at, numbers) in numbers.iter().enumerate() {
                for number in numbers {
                    step()?;
                    let (object, range) = self.open[number].clone();
                    assert!(self.journal.note(*number, ObjectId(object), &range));
                }
                for word in message(&self.journal, at).iter().take(numbers.len() * 6) {
                    step()?;
                    word.store(0, Ordering::Release);
                }
                for number in numbers.iter().zip(answers).filter_map(|(number, answered)| answered.then_some(number)) {
                    step()?;
                    // The kernel has the answer; its name is free only after the second step.
                    let (object, range) = self.open.remove(number).unwrap();
                    if step().is_none() {
                        // Nobody else got the name: an answer too many finds no event.
                        self.open.insert(*number, (object, range));
                        return None;
                    }
                    self.journal.clear(*number);
                }
            }
            Some(())
        }
    }

    fn events() -> impl Strategy<Value = Vec<(u32, u64)>> {
        proptest::collection::vec((0u32..3, 0u64..9), 0..5)
    }

    proptest! {
        /// Killed anywhere, and again while it takes stock: each event without an answer is found once, with its range.
        #[test]
        fn every_event_without_an_answer_is_found_once(
            first in proptest::collection::vec(events(), 1..4),
            second in proptest::collection::vec(events(), 1..3),
            answers in proptest::collection::vec(any::<bool>(), 5),
            mut steps in 0usize..300,
        ) {
            let mut process = Process::new();
            'life: for batch in [&first, &second] {
                let numbers: Vec<_> = batch.iter().enumerate().map(|(at, events)| process.read(at, events)).collect();
                if process.run(&numbers, &answers, &mut steps).is_none() {
                    break 'life;
                }
            }
            let open = process.open.clone();
            let next = Journal::open(process.journal.as_fd().try_clone_to_owned().unwrap()).unwrap();
            drop(process);
            let found = next.take_stock();
            let numbers: BTreeSet<_> = found.iter().map(|event| event.number).collect();
            prop_assert_eq!(numbers.len(), found.len());
            prop_assert_eq!(&numbers, &open.keys().copied().collect());
            for event in &found {
                let (object, range) = &open[&event.number];
                prop_assert!(event.object.is_none_or(|found| found == ObjectId(*object)), "{event:?} is about {object}");
                prop_assert!(event.range.start <= range.start && range.end <= event.range.end, "{event:?} wants {range:?}");
            }
            // Another one may be killed too, before it has done anything.
            let third = Journal::open(next.as_fd().try_clone_to_owned().unwrap()).unwrap();
            prop_assert_eq!(third.take_stock(), found.clone());
            found.iter().for_each(|event| third.clear(event.number));
            prop_assert_eq!(next.take_stock(), []);
        }
    }

    /// Where the answer and the end of its name are one step, the next event of that name may be read before the first one's
    /// entry is cleared: then both are brought.
    #[test]
    fn an_entry_of_an_event_before_hides_none() {
        let journal = Journal::new().unwrap();
        assert!(journal.note(7, ObjectId(1), &(0..4096)));
        for (word, bytes) in words_of(&journal).iter().zip(event(7, PRE_ACCESS, Some((8192, 4096))).chunks_exact(WORD_BYTES)) {
            word.store(u64::from_ne_bytes(*bytes.first_chunk().unwrap()), Ordering::Relaxed);
        }
        assert_eq!(journal.take_stock(), [Unanswered { number: 7, object: None, range: 0..12288 }]);
    }

    #[test]
    fn what_is_no_journal_is_refused_and_numbers_that_are_too_high_are_not_noted() {
        assert!(Journal::open(tempfile::tempfile().unwrap().into()).is_err());
        let zeros = tempfile::tempfile().unwrap();
        zeros.set_len(LEN_BYTES as u64).unwrap();
        assert!(Journal::open(zeros.into()).is_err());
        let journal = Journal::new().unwrap();
        let last = RawFd::try_from(ENTRIES).unwrap() - 1;
        assert!(!journal.note(last + 1, ObjectId(0), &(0..1)) && !journal.note(-1, ObjectId(0), &(0..1)));
        assert!(journal.note(last, ObjectId(u32::MAX), &(5..6)));
        assert_eq!(journal.take_stock(), [Unanswered { number: last, object: Some(ObjectId(u32::MAX)), range: 5..6 }]);
    }
}
