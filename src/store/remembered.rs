//! What the objects of a cache were made of: which blob it was that had an object's name when the object was filled.
//!
//! A store's names are not forever: an operator puts another file in the place of a blob, perhaps while infill does not
//! run. What a cache has of the old one must then not be mixed with the new one. The blob's length alone does not tell,
//! because the images of a tree that changed a little are often equally long. So each blob that an object was made of is
//! noted, in a file that lies in the cache directory and so shares the fate of what it describes.
//!
//! The file grows by a line for each new object, and is read by whoever opens it; more than one process may (`infill
//! prefetch --seed` beside the daemon). A line that is damaged is none. Whatever is missing costs only certainty.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::{FileIdentity, Identity};
use crate::hex::{hex, unhex};
use crate::key::Key;
use crate::ops::extsize;

/// The file's name in the cache directory.
pub const FILE: &str = "blobs.seen";
/// Its name while it is written anew.
const NEW_FILE: &str = "blobs.seen.new";
/// Blobs that are remembered; of more, those that were opened last.
const REMEMBERED_MAX: usize = 65_536;
/// Length of the file in bytes at which nothing is added to it any more; it is made shorter at the next start.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Longest line in bytes: both parts of a key in hexadecimal digits, and more numbers than any blob has.
const LINE_BYTES_MAX: usize = 4096;
/// The file is written anew when it has more than so many lines for each that counts.
const LINES_PER_BLOB: usize = 4;
const FILE_MODE: u32 = 0o600;

/// What an object was made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Made {
    /// The blob.
    pub identity: Identity,
    /// The length in bytes that the kernel was told: the blob's, or one more. The kernel throws the cached bytes of an object
    /// away whose length is not what it is told (`cachefiles_check_auxdata`, fs/cachefiles/xattr.c), and nobody else can
    /// while it opens it. So if the bytes are those of another blob that is equally long, another length is told. It
    /// reads no byte more because of that: images do not reach beyond their blobs.
    pub told_bytes: u64,
}

impl Made {
    /// What the object of a blob is that is opened for the first time, where the cache may have what `before` says.
    #[must_use]
    pub fn anew(identity: Identity, before: Option<&Self>) -> Self {
        let len_bytes = identity.len_bytes;
        let told_bytes = match before {
            Some(before) if before.identity == identity => before.told_bytes,
            Some(before) if before.told_bytes == len_bytes => len_bytes + 1,
            _ => len_bytes,
        };
        Self { identity, told_bytes }
    }
}

/// See the module's description. Used by threads that may block.
#[derive(Debug, Default)]
pub struct Remembered {
    state: Mutex<State>,
    /// It was said that the file is of no use.
    said: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// With the time of the last use, in uses.
    made: HashMap<Key, (u64, Made)>,
    uses: u64,
    record: Option<Record>,
    /// Since when something waits to be synced.
    unsynced: Option<Instant>,
}

/// The file.
#[derive(Debug)]
struct Record {
    file: Arc<File>,
    dir: PathBuf,
    /// Up to where it was read.
    read_bytes: u64,
    lines: usize,
    damaged: usize,
}

impl Remembered {
    /// What is noted in the cache directory `dir`, to which is added what becomes known. If the file cannot be had, that is
    /// said, and all is forgotten when the process ends.
    #[must_use]
    pub fn open(dir: &Path) -> Self {
        let remembered = Self::default();
        match Record::open(dir) {
            Ok(record) => remembered.lock().record = Some(record),
            Err(error) => remembered.complain(&dir.join(FILE), &error),
        }
        drop(remembered.up_to_date());
        remembered
    }

    /// Writes the file anew if most of it does not count any more. Only for the one that serves, at its start.
    pub fn tidy(&self) {
        let mut state = self.lock();
        let State { made, record: Some(record), .. } = &mut *state else { return };
        if record.damaged > 0 {
            tracing::warn!(
                "{}: {} damaged lines: of the blobs in them only the length is known, if they are replaced now",
                record.dir.join(FILE).display(),
                record.damaged
            );
        }
        if record.damaged > 0 || record.lines > LINES_PER_BLOB * made.len() {
            let mut sorted: Vec<_> = made.iter().map(|(key, (used, made))| (*used, key, made)).collect();
            sorted.sort_unstable_by_key(|(used, ..)| *used);
            if let Err(error) = record.rewrite(sorted.into_iter().map(|(_, key, made)| (key, made))) {
                let path = record.dir.join(FILE);
                drop(state);
                self.complain(&path, &error);
            }
        }
    }

    /// What the object of `key` was made of, as far as is known.
    pub fn get(&self, key: &Key) -> Option<Made> {
        let mut state = self.up_to_date();
        state.uses += 1;
        let now = state.uses;
        let (used, made) = state.made.get_mut(key)?;
        *used = now;
        Some(made.clone())
    }

    /// Notes what an object is made of; [`Remembered::sync`] makes it last.
    pub fn note(&self, key: &Key, made: &Made) {
        let mut state = self.up_to_date();
        if state.made.get(key).is_some_and(|(_, known)| known == made) {
            return;
        }
        let added = state.record.as_ref().map(|record| (record.append(key, made), record.dir.join(FILE)));
        state.insert(key.clone(), made.clone());
        state.unsynced.get_or_insert_with(Instant::now);
        drop(state);
        if let Some((Err(error), path)) = added {
            self.complain(&path, &error);
        }
    }

    /// Waits until what was noted survives a loss of power; if some of it was noted so long ago, else there is no hurry.
    pub fn sync(&self, ago: Duration) {
        let mut state = self.lock();
        if state.unsynced.take_if(|since| since.elapsed() >= ago).is_none() {
            return;
        }
        let Some(file) = state.record.as_ref().map(|record| Arc::clone(&record.file)) else { return };
        drop(state);
        // The disk of the cache fails: whoever reads it will say so.
        let _ = file.sync_data();
    }

    /// The state with all that others have added to the file meanwhile.
    fn up_to_date(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        for line in state.record.as_mut().map(Record::news).unwrap_or_default() {
            match decode(&line) {
                Some((key, made)) => state.insert(key, made),
                None => state.record.iter_mut().for_each(|record| record.damaged += 1),
            }
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complain(&self, path: &Path, error: &io::Error) {
        if !self.said.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{}: cannot note which blobs are in the cache: {error}; make room and see that infill may write there, else a blob that is replaced while infill does not run is known by its length only",
                path.display()
            );
        }
    }
}

impl State {
    fn insert(&mut self, key: Key, made: Made) {
        self.uses += 1;
        if self.made.len() >= REMEMBERED_MAX && !self.made.contains_key(&key) {
            let mut uses: Vec<_> = self.made.values().map(|(used, _)| *used).collect();
            let (_, middle, _) = uses.select_nth_unstable(REMEMBERED_MAX / 2);
            let middle = *middle;
            self.made.retain(|_, (used, _)| *used >= middle);
        }
        self.made.insert(key, (self.uses, made));
    }
}

impl Record {
    fn open(dir: &Path) -> io::Result<Self> {
        let file = open(&dir.join(FILE), OpenOptions::new().read(true).append(true).create(true))?;
        // So that the name of a new file lasts as well, where a directory can be synced.
        let _ = File::open(dir).and_then(|dir| dir.sync_all());
        Ok(Self { file: Arc::new(file), dir: dir.to_owned(), read_bytes: 0, lines: 0, damaged: 0 })
    }

    /// Lines that were not read yet.
    fn news(&mut self) -> Vec<Vec<u8>> {
        let len_bytes = self.file.metadata().map_or(0, |found| found.len()).min(FILE_BYTES_MAX);
        let Some(more) = len_bytes.checked_sub(self.read_bytes).filter(|more| *more > 0) else { return Vec::new() };
        let mut text = vec![0; usize::try_from(more).unwrap_or(0)];
        if self.file.read_exact_at(&mut text, self.read_bytes).is_err() {
            return Vec::new();
        }
        // The rest is still being written, or was cut off.
        let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        self.read_bytes += end as u64 + 1;
        let lines: Vec<_> = text[..end].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect();
        self.lines += lines.len();
        lines
    }

    fn append(&self, key: &Key, made: &Made) -> io::Result<()> {
        let line = encode(key, made);
        if line.len() > LINE_BYTES_MAX || self.file.metadata()?.len() + line.len() as u64 > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // In one piece, and behind a line that was cut off.
        (&*self.file).write_all(&[b"\n", &line[..], b"\n"].concat())
    }

    fn rewrite<'a>(&mut self, all: impl Iterator<Item = (&'a Key, &'a Made)>) -> io::Result<()> {
        let (new, path) = (self.dir.join(NEW_FILE), self.dir.join(FILE));
        let _ = fs::remove_file(&new);
        let file = open(&new, OpenOptions::new().read(true).append(true).create_new(true))?;
        let lines: Vec<_> = all.map(|(key, made)| encode(key, made)).collect();
        let text = lines.iter().flat_map(|line| [&line[..], b"\n"]).collect::<Vec<_>>().concat();
        (&file).write_all(&text)?;
        file.sync_all()?;
        renameat2(AT_FDCWD, &new, AT_FDCWD, &path, RenameFlags::empty())?;
        let _ = File::open(&self.dir).and_then(|dir| dir.sync_all());
        *self = Self { file: Arc::new(file), dir: self.dir.clone(), read_bytes: text.len() as u64, lines: lines.len(), damaged: 0 };
        Ok(())
    }
}

/// Opens a regular file that has no other name: who may write in the directory must not lead us to another file.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.mode(FILE_MODE).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file of its own; remove it"));
    }
    if found.len() == 0 {
        // On XFS it would take as large a piece of the disk as each of the cache's files; elsewhere there is no such hint.
        let _ = extsize::unhint(&file);
    }
    Ok(file)
}

/// A line: a checksum of the rest, then with blanks between them domain and name in hexadecimal digits, the length that
/// was told, the blob's, and of each of its files the inode, when it was born, and when it was changed, in seconds and
/// nanoseconds.
fn encode(key: &Key, made: &Made) -> Vec<u8> {
    let mut rest = format!("{} {} {} {}", hex(key.domain()), hex(key.name()), made.told_bytes, made.identity.len_bytes);
    for FileIdentity { inode, born: (born_s, born_ns), modified: (modified_s, modified_ns) } in &made.identity.files {
        rest.push_str(&format!(" {inode} {born_s} {born_ns} {modified_s} {modified_ns}"));
    }
    format!("{:016x} {rest}", checksum(rest.as_bytes())).into_bytes()
}

/// What a line says; `None` if it is damaged.
#[must_use]
pub fn decode(line: &[u8]) -> Option<(Key, Made)> {
    let (sum, rest) = str::from_utf8(line).ok().filter(|line| line.len() <= LINE_BYTES_MAX)?.split_once(' ')?;
    if sum.len() != 16 || u64::from_str_radix(sum, 16).ok()? != checksum(rest.as_bytes()) {
        return None;
    }
    let mut words = rest.split(' ');
    let mut part = || unhex(words.next()?.as_bytes());
    let key = Key::new(&part()?, &part()?);
    let (told_bytes, len_bytes): (u64, u64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let words: Vec<_> = words.collect();
    let file = |words: &[&str]| -> Option<FileIdentity> {
        let [inode, born_s, born_ns, modified_s, modified_ns] = words else { return None };
        let time = |s: &str, ns: &str| Some((s.parse().ok()?, ns.parse().ok()?));
        Some(FileIdentity { inode: inode.parse().ok()?, born: time(born_s, born_ns)?, modified: time(modified_s, modified_ns)? })
    };
    let files = words.chunks(5).map(file).collect::<Option<_>>()?;
    let is_told = told_bytes == len_bytes || Some(told_bytes) == len_bytes.checked_add(1);
    is_told.then_some((key, Made { identity: Identity { len_bytes, files }, told_bytes }))
}

/// FNV-1a, of 64 bits: against accidents, not against people.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn made(inode: u64, len_bytes: u64) -> Made {
        let file = FileIdentity { inode, born: (1, 2), modified: (-3, 4) };
        Made::anew(Identity { len_bytes, files: [file].into() }, None)
    }

    fn key(name: &str) -> Key {
        Key::new(b"dom", name.as_bytes())
    }

    fn text(dir: &Path) -> String {
        fs::read_to_string(dir.join(FILE)).unwrap()
    }

    #[test]
    fn another_blob_of_the_same_length_is_told_with_another_length() {
        let first = made(1, 8192);
        assert_eq!(first.told_bytes, 8192);
        let told = |inode, len_bytes, before: &Made| Made::anew(made(inode, len_bytes).identity, Some(before));
        assert_eq!(told(1, 8192, &first), first);
        let second = told(2, 8192, &first);
        assert_eq!(second.told_bytes, 8193);
        assert_eq!(told(2, 8192, &second), second);
        assert_eq!((told(3, 8192, &second).told_bytes, told(3, 8193, &second).told_bytes), (8192, 8194));
        assert_eq!(told(3, 100, &second).told_bytes, 100);
    }

    #[test]
    fn what_one_process_notes_the_others_know() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (Remembered::open(dir.path()), Remembered::open(dir.path()));
        [1, 1].iter().for_each(|inode| one.note(&key("a"), &made(*inode, 10)));
        assert_eq!(text(dir.path()).split_whitespace().count(), 10, "once");
        assert_eq!(other.get(&key("a")), Some(made(1, 10)));
        other.note(&key("a"), &made(2, 10));
        assert_eq!(one.get(&key("a")), Some(made(2, 10)));
        assert_eq!(Remembered::open(dir.path()).get(&key("a")), Some(made(2, 10)));
        assert_eq!(Remembered::open(dir.path()).get(&key("b")), None);
        assert_eq!(fs::metadata(dir.path().join(FILE)).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn damage_costs_the_lines_it_is_in() {
        let dir = tempfile::tempdir().unwrap();
        let all = Remembered::open(dir.path());
        ["a", "b", "c"].iter().for_each(|name| all.note(&key(name), &made(1, 10)));
        // One byte flips, and the last line is cut off.
        let mut bytes = fs::read(dir.path().join(FILE)).unwrap();
        bytes[40] ^= 4;
        bytes.truncate(bytes.len() - 5);
        fs::write(dir.path().join(FILE), &bytes).unwrap();
        let after = Remembered::open(dir.path());
        assert_eq!(["a", "b", "c"].map(|name| after.get(&key(name)).is_some()), [false, true, false]);
        after.note(&key("d"), &made(4, 10));
        let again = Remembered::open(dir.path());
        assert_eq!(["b", "c", "d"].map(|name| again.get(&key(name)).is_some()), [true, false, true]);
        again.tidy();
        assert_eq!(text(dir.path()).lines().count(), 2);
        again.note(&key("e"), &made(5, 10));
        assert_eq!(Remembered::open(dir.path()).get(&key("e")), Some(made(5, 10)));
    }

    #[test]
    fn the_file_is_made_shorter_when_most_of_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let all = Remembered::open(dir.path());
        for inode in 0..10 {
            all.note(&key("a"), &made(inode, 10));
        }
        all.note(&key("b"), &made(1, 10));
        let again = Remembered::open(dir.path());
        again.tidy();
        assert_eq!(text(dir.path()).lines().count(), 2);
        again.tidy();
        assert_eq!((again.get(&key("a")), again.get(&key("b"))), (Some(made(9, 10)), Some(made(1, 10))));
    }

    #[test]
    fn memory_is_bounded_and_what_was_used_last_stays() {
        let all = Remembered::default();
        for n in 0..REMEMBERED_MAX {
            all.note(&key(&n.to_string()), &made(1, 10));
        }
        assert!(all.get(&key("0")).is_some());
        all.note(&key("new"), &made(1, 10));
        assert!(all.lock().made.len() <= REMEMBERED_MAX / 2 + 2);
        assert_eq!(["0", "1", "new"].map(|name| all.get(&key(name)).is_some()), [true, false, true]);
    }

    /// Whoever may write in the directory must not have root add to a file elsewhere.
    #[test]
    fn another_file_in_its_place_is_left_alone() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        for make in [std::os::unix::fs::symlink::<&Path, PathBuf>, |from, to| fs::hard_link(from, to)] {
            if make(outside.path(), dir.path().join(FILE)).is_err() {
                continue;
            }
            let all = Remembered::open(dir.path());
            all.note(&key("a"), &made(1, 10));
            assert!(all.get(&key("a")).is_some(), "it is remembered as long as the process lives");
            assert_eq!(fs::read(outside.path()).unwrap(), b"");
            fs::remove_file(dir.path().join(FILE)).unwrap();
        }
    }

    proptest! {
        #[test]
        fn a_line_is_read_as_it_was_written(domain: Vec<u8>, name: Vec<u8>, len_bytes: u64, numbers: Vec<(u64, i64, i64)>) {
            let file = |(inode, s, ns)| FileIdentity { inode, born: (s, ns), modified: (ns, s) };
            let identity = Identity { len_bytes, files: numbers.into_iter().map(file).collect() };
            let (key, made) = (Key::new(&domain, &name), Made { identity, told_bytes: len_bytes });
            let line = encode(&key, &made);
            prop_assert_eq!(decode(&line).is_some(), line.len() <= LINE_BYTES_MAX);
            prop_assert!(decode(&line).is_none_or(|read| read == (key, made)));
        }
    }
}
