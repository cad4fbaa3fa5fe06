//! The kernel's end: objects, waiting readers, and a thread that takes the daemon's answers.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::link::Link;
use super::{ANSWER_MAX_BYTES, Answered};
use crate::front::cachefiles::wire::{self, Body, Message};
use crate::front::sim::blob::PAGE_BYTES;
use crate::key::Key;
use crate::range::{ByteRange, align_down, align_up};

/// How long anything may wait for the daemon before it counts as left hanging.
const WATCHDOG: Duration = Duration::from_secs(20);

/// Why a reader or a mount did not get what it wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// The daemon left it hanging: a bug.
    #[error("no answer within {} s", WATCHDOG.as_secs())]
    Hangs,
    /// What the application sees.
    #[error("{0}")]
    Errno(Errno),
}

/// A kernel with readers, for a daemon at the other end of a socket. Used by many threads.
#[derive(Debug)]
pub struct SocketKernel {
    inner: Arc<Inner>,
    /// Where sinks are. Each is called by the number that stands for its descriptor in messages.
    dir: PathBuf,
    receivers: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    link: Arc<Link>,
    objects: BTreeMap<u32, Object>,
    /// READs and OPENs without an answer.
    waiting: HashMap<u32, Wait>,
    next_msg: u32,
    next_object: u32,
    /// Answers to nothing that waits: normal after a close, else a bug.
    late: u64,
    /// What the daemon must never do.
    violations: Vec<String>,
}

/// Objects keep their name for the tests, whatever id the daemon knows them by.
#[derive(Clone, Debug)]
struct Object {
    key: Key,
    /// The id in messages; a new one for every daemon.
    id: u32,
    sink: Arc<File>,
    len: Option<u64>,
    /// The current daemon has answered its OPEN.
    ready: bool,
    /// What the cache has of it since it was mounted before, and the length that was told then.
    cached: Option<(Arc<File>, u64)>,
}

/// A new file that any daemon may write, whoever it runs as.
fn make_sink(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    file.set_permissions(Permissions::from_mode(0o666))?;
    Ok(file)
}

/// The bytes of a message.
fn message(msg_id: u32, object_id: u32, body: Body) -> Vec<u8> {
    wire::encode(&Message { msg_id, object_id, body })
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Wait {
    /// The object's name.
    object: u32,
    /// What a READ asks for; `None` for an OPEN.
    range: Option<ByteRange>,
    answer: Option<Result<u64, Errno>>,
}

impl SocketKernel {
    /// A kernel that keeps its objects' data in files in `dir`, and the end of the socket for its daemon.
    ///
    /// # Errors
    /// No descriptors are free.
    pub fn new(dir: &Path) -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = Link::pair()?;
        let state = State {
            link: Arc::new(Link::for_kernel(ours)),
            objects: BTreeMap::new(),
            waiting: HashMap::new(),
            next_msg: 0,
            next_object: 1,
            late: 0,
            violations: Vec::new(),
        };
        let inner = Arc::new(Inner { state: Mutex::new(state), changed: Condvar::new() });
        let kernel = Self { inner, dir: dir.to_owned(), receivers: Mutex::default() };
        kernel.listen();
        Ok((kernel, theirs))
    }

    /// Where it keeps its objects.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes the answers that come from the current daemon, in a thread of its own that never sends.
    fn listen(&self) {
        let inner = Arc::clone(&self.inner);
        let link = Arc::clone(&inner.lock().link);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; ANSWER_MAX_BYTES];
            while let Ok(len @ 1..) = link.receive(&mut buffer) {
                let mut state = inner.lock();
                // A daemon that was replaced has nothing to say any more.
                if Arc::ptr_eq(&state.link, &link) {
                    state.take_answer(&buffer[..len]);
                }
                inner.changed.notify_all();
            }
        });
        self.receivers.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
    }

    /// A new daemon takes over, like after `restore`: every object is opened again, under a new id, and then
    /// every READ without an answer is sent again. Returns the new daemon's end of the socket, and what has to
    /// be called when it serves.
    ///
    /// # Errors
    /// No descriptors are free.
    pub fn restart(&self) -> io::Result<(OwnedFd, impl FnOnce() -> Result<(), ReadError>)> {
        let (ours, theirs) = Link::pair()?;
        let link = Arc::new(Link::for_kernel(ours));
        let mut state = self.inner.lock();
        let old = std::mem::replace(&mut state.link, link);
        let opens = state.reopen_all();
        drop(state);
        old.end();
        self.listen();
        let send_again = move || {
            self.send(opens)?;
            // The real kernel holds READs back until their object is open again.
            let state = self.wait_until(|state| state.objects.values().all(|object| object.ready))?;
            let reads = state.unanswered_reads();
            drop(state);
            self.send(reads)
        };
        Ok((theirs, send_again))
    }

    /// Mounts: opens an object and waits for its length. Returns its name.
    ///
    /// # Errors
    /// The daemon refused it or left it hanging.
    pub fn open(&self, key: &Key) -> Result<u32, ReadError> {
        self.open_cached(key, None)
    }

    /// Unmounts and mounts anew. What was cached is there again if the daemon tells the same length as before; if not, the
    /// kernel makes the object anew, as cachefiles does. Returns its name.
    ///
    /// # Errors
    /// It was not mounted, or as [`SocketKernel::open`].
    pub fn remount(&self, name: u32) -> Result<u32, ReadError> {
        let object = self.inner.lock().objects.get(&name).cloned().ok_or(ReadError::Errno(Errno::ENOENT))?;
        self.close(name)?;
        self.open_cached(&object.key, object.len.map(|len| (object.sink, len)))
    }

    fn open_cached(&self, key: &Key, cached: Option<(Arc<File>, u64)>) -> Result<u32, ReadError> {
        let mut state = self.inner.lock();
        let name = state.next_object;
        let sink = make_sink(&self.dir.join(name.to_string())).map_err(|_| ReadError::Errno(Errno::EIO))?;
        state.objects.insert(name, Object { key: key.clone(), id: 0, sink: Arc::new(sink), len: None, ready: false, cached });
        let (msg_id, packet) = state.open(name, None).ok_or(ReadError::Errno(Errno::EIO))?;
        drop(state);
        self.send(vec![packet])?;
        let result = self.wait_for(msg_id);
        if result.is_err() {
            self.inner.lock().forget(name);
        }
        result.map(|_| name)
    }

    /// Unmounts: the object is gone, and whoever reads it gets `EIO`.
    ///
    /// # Errors
    /// It was not mounted.
    pub fn close(&self, name: u32) -> Result<(), ReadError> {
        let mut state = self.inner.lock();
        let id = state.forget(name).ok_or(ReadError::Errno(Errno::ENOENT))?;
        for wait in state.waiting.values_mut().filter(|wait| wait.object == name) {
            wait.answer = Some(Err(Errno::EIO));
        }
        let msg_id = state.next_msg();
        drop(state);
        self.inner.changed.notify_all();
        self.send(vec![message(msg_id, id, Body::Close)])
    }

    /// Sends one READ and waits until it is completed, whatever came of it.
    ///
    /// # Errors
    /// It was left hanging, or the object was closed.
    pub fn demand(&self, name: u32, range: &ByteRange) -> Result<(), ReadError> {
        let mut state = self.wait_until(|state| state.objects.get(&name).is_none_or(|object| object.ready))?;
        let id = state.objects.get(&name).ok_or(ReadError::Errno(Errno::EIO))?.id;
        let msg_id = state.next_msg();
        state.waiting.insert(msg_id, Wait { object: name, range: Some(range.clone()), answer: None });
        drop(state);
        self.send(vec![message(msg_id, id, Body::Read(range.clone()))])?;
        self.wait_for(msg_id).map(drop)
    }

    /// Sends packets. The lock is not held: a daemon that is about to answer may be waiting for room itself. A
    /// daemon that is gone gets nothing; the next one will.
    fn send(&self, packets: Vec<Vec<u8>>) -> Result<(), ReadError> {
        let link = Arc::clone(&self.inner.lock().link);
        for bytes in packets {
            match link.send(&bytes) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe || error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(_) => return Err(ReadError::Errno(Errno::EIO)),
            }
        }
        Ok(())
    }

    /// Reads like a process on a mounted image: what is there at once, the rest in READs of at most
    /// `read_ahead` bytes, and `EIO` where a READ of a single page brought nothing.
    ///
    /// # Errors
    /// As said, or it was left hanging.
    pub fn read(&self, name: u32, range: &ByteRange, read_ahead: u64) -> Result<Vec<u8>, ReadError> {
        let sink = self.sink(name).ok_or(ReadError::Errno(Errno::EIO))?;
        let (mut at, mut tries) = (range.start, 0);
        while at < range.end {
            let hole = seek(&sink, at, Whence::SeekHole).unwrap_or(at).min(range.end);
            if hole > at {
                (at, tries) = (hole, 0);
                continue;
            }
            let most = match tries {
                0 => read_ahead,
                1 => PAGE_BYTES,
                _ => return Err(ReadError::Errno(Errno::EIO)),
            };
            tries += 1;
            let data = seek(&sink, at, Whence::SeekData).unwrap_or(range.end);
            let start = align_down(at, PAGE_BYTES);
            let end = (start + most).min(align_up(range.end, PAGE_BYTES)).min(data.max(start + PAGE_BYTES));
            self.demand(name, &(start..end))?;
        }
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        sink.read_exact_at(&mut bytes, range.start).map_err(|_| ReadError::Errno(Errno::EIO))?;
        Ok(bytes)
    }

    /// The sink of an object, to look at.
    #[must_use]
    pub fn sink(&self, name: u32) -> Option<Arc<File>> {
        self.inner.lock().objects.get(&name).map(|object| Arc::clone(&object.sink))
    }

    /// Sends bytes that need not be a message.
    ///
    /// # Errors
    /// The daemon is gone.
    pub fn send_noise(&self, bytes: &[u8]) -> io::Result<()> {
        let link = Arc::clone(&self.inner.lock().link);
        link.send(bytes)
    }

    /// How many answers came for requests that nobody waits for.
    #[must_use]
    pub fn late_answers(&self) -> u64 {
        self.inner.lock().late
    }

    /// What the daemon did that it must never do.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.inner.lock().violations.clone()
    }

    fn wait_until(&self, done: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>, ReadError> {
        let deadline = Instant::now() + WATCHDOG;
        let mut state = self.inner.lock();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReadError::Hangs);
            }
            (state, _) = self.inner.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state)
    }

    fn wait_for(&self, msg_id: u32) -> Result<u64, ReadError> {
        let result = self.wait_until(|state| state.waiting.get(&msg_id).is_none_or(|wait| wait.answer.is_some()));
        let answer = result?.waiting.remove(&msg_id).and_then(|wait| wait.answer);
        answer.unwrap_or(Err(Errno::EIO)).map_err(ReadError::Errno)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SocketKernel {
    fn drop(&mut self) {
        self.inner.lock().link.end();
        for thread in self.receivers.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = thread.join();
        }
    }
}

impl State {
    const fn next_msg(&mut self) -> u32 {
        let id = self.next_msg;
        self.next_msg = id.wrapping_add(1);
        id
    }

    /// Forgets an object. The id that its daemon knows it by.
    fn forget(&mut self, name: u32) -> Option<u32> {
        self.objects.remove(&name).map(|object| object.id)
    }

    /// Makes the OPEN of an object, under an id that its mount waits for already or a new one.
    fn open(&mut self, name: u32, pending: Option<u32>) -> Option<(u32, Vec<u8>)> {
        let msg_id = pending.unwrap_or_else(|| self.next_msg());
        let object = self.objects.get_mut(&name)?;
        (object.id, object.ready) = (self.next_object, false);
        self.next_object += 1;
        self.waiting.insert(msg_id, Wait { object: name, range: None, answer: None });
        let body = Body::Open { fd: name.cast_signed(), key: object.key.clone() };
        Some((msg_id, message(msg_id, object.id, body)))
    }

    /// Makes an OPEN for every object. One that was never answered keeps its id: its mount waits for that.
    fn reopen_all(&mut self) -> Vec<Vec<u8>> {
        let names: Vec<u32> = self.objects.keys().copied().collect();
        let pending = |state: &Self, name| {
            let mut opens = state.waiting.iter().filter(|(_, wait)| wait.range.is_none() && wait.answer.is_none());
            opens.find(|(_, wait)| wait.object == name).map(|(id, _)| *id)
        };
        names.into_iter().filter_map(|name| self.open(name, pending(self, name))).map(|(_, packet)| packet).collect()
    }

    fn unanswered_reads(&self) -> Vec<Vec<u8>> {
        let packet = |(msg_id, wait): (&u32, &Wait)| {
            let range = wait.range.clone().filter(|_| wait.answer.is_none())?;
            Some(message(*msg_id, self.objects.get(&wait.object)?.id, Body::Read(range)))
        };
        self.waiting.iter().filter_map(packet).collect()
    }

    fn take_answer(&mut self, bytes: &[u8]) {
        match Answered::parse(bytes) {
            Some(Answered::Open { msg_id, size }) => self.opened(msg_id, size),
            Some(Answered::Read { object, msg_id }) => self.completed(object, msg_id),
            None => self.violations.push(format!("not a command: {}", bytes.escape_ascii())),
        }
    }

    fn opened(&mut self, msg_id: u32, size: i64) {
        let Some(wait) = self.waiting.get_mut(&msg_id).filter(|wait| wait.range.is_none() && wait.answer.is_none()) else {
            return self.violations.push(format!("copen {msg_id} without an OPEN"));
        };
        let Ok(len) = u64::try_from(size) else {
            wait.answer = Some(Err(Errno::from_raw(i32::try_from(-size).unwrap_or(0))));
            return;
        };
        wait.answer = Some(Ok(len));
        let Some(object) = self.objects.get_mut(&wait.object) else { return };
        if object.len.is_some_and(|old| old != len) {
            self.violations.push(format!("{}: opened with {len} bytes, before with {:?}", object.key, object.len));
        }
        if object.len.is_some() {
            // Opened again: no mount waits for it.
            self.waiting.remove(&msg_id);
        } else if object.sink.set_len(align_up(len, PAGE_BYTES)).is_err() {
            self.violations.push(format!("{}: cannot be {len} bytes long", object.key));
        }
        if let Some((cached, _)) = object.cached.take().filter(|(_, told)| *told == len)
            && copy_data(&cached, &object.sink).is_err()
        {
            self.violations.push(format!("{}: what is cached cannot be copied", object.key));
        }
        (object.len, object.ready) = (Some(len), true);
    }

    fn completed(&mut self, object: u32, msg_id: u32) {
        match self.waiting.get_mut(&msg_id) {
            Some(wait) if wait.answer.is_none() && wait.range.is_some() => {
                if self.objects.get(&wait.object).is_some_and(|own| own.id == object) {
                    wait.answer = Some(Ok(0));
                } else {
                    self.violations.push(format!("READ {msg_id} is completed through object {object}, which is another one"));
                }
            }
            _ => self.late += 1,
        }
    }
}

/// Copies what is there, and leaves holes.
fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let mut at = 0;
    while let Some(start) = seek(from, at, Whence::SeekData) {
        let end = seek(from, start, Whence::SeekHole).unwrap_or(start);
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        from.read_exact_at(&mut bytes, start)?;
        to.write_all_at(&bytes, start)?;
        at = end;
    }
    Ok(())
}

/// `lseek(2)` for data or a hole; `None` behind the last of either.
fn seek(file: &File, at: u64, whence: Whence) -> Option<u64> {
    let found = lseek(file, i64::try_from(at).ok()?, whence).ok()?;
    u64::try_from(found).ok()
}
