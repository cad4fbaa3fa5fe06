//! One fanotify group: a source of requests, for one shard and some of the objects that it owns.
//!
//! Every reader that waits for an event of a group is woken by every answer to one of them, so there are several for each
//! shard. The kernel names an event by the number of the descriptor that it brings; that stays open until the answer, so
//! that no other event gets the same name.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapRaw;
use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use nix::sys::stat::fstat;

use super::blob::BlobFile;
use super::journal::Journal;
use super::map::{PAGE_BYTES, PresenceMap};
use super::stale::{self, Stale};
use super::wire::{self, Event, Events};
use crate::front::{
    Answer, Caps, Found, FrontEnd, FrontError, MESSAGE_MAX_BYTES, NeedRequest, ObjectId, Outcome, Replied, Reply, Request, Ticket,
};
use crate::range::align_up;

/// Events that one read gives at most.
#[expect(clippy::cast_possible_truncation, reason = "a few")]
const EVENTS_PER_READ: u32 = (MESSAGE_MAX_BYTES / wire::EVENT_BYTES) as u32;

/// What /proc shows as the file of a group.
const GROUP_LINK: &str = "anon_inode:[fanotify]";
/// Of a file that is made to see what the kernel does with it.
const FILE_MODE: u32 = 0o600;

/// A file, by its number and its file system's: what an event's descriptor says of itself.
type Inode = (u64, u64);

/// See the module's description.
#[derive(Debug)]
pub struct Group(Arc<Inner>);

/// What the group shares with the tickets of its events.
#[derive(Debug)]
pub(super) struct Inner {
    fanotify: Fanotify,
    journal: Journal,
    /// Events of a dead process, until [`Group::resume`].
    stale: Mutex<Option<Vec<Stale>>>,
    /// For so many reasons no event is read now.
    holds: AtomicUsize,
    /// The objects whose files are marked. One shard looks into it, once an event; others only when an image is mounted.
    objects: Mutex<HashMap<Inode, Known>>,
}

/// An object as its events find it.
#[derive(Clone, Debug)]
struct Known {
    object: ObjectId,
    /// In whole pages.
    len_bytes: u64,
    /// What of it is there, if anything.
    map: Option<Arc<PresenceMap>>,
}

impl Group {
    /// A new group.
    ///
    /// # Errors
    /// No memory for its journal; `EPERM` without `CAP_SYS_ADMIN`, `EMFILE` beyond fs.fanotify.max_user_groups, `EINVAL` or `ENOSYS` on a kernel
    /// without fanotify's permission events.
    pub fn new() -> Result<Self, Errno> {
        let flags = InitFlags::FAN_CLASS_PRE_CONTENT
            | InitFlags::FAN_CLOEXEC
            // An answer through a ring does not end on a group that may block.
            | InitFlags::FAN_NONBLOCK
            // When a queue overflows, the kernel lets readers through to what is not there.
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS;
        let fanotify = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_LARGEFILE | EventFFlags::O_CLOEXEC)?;
        let journal = Journal::new().map_err(|error| error.raw_os_error().map_or(Errno::ENOMEM, Errno::from_raw))?;
        Ok(Self::with(fanotify, journal, None))
    }

    /// Goes on with the group and the journal of a process that is dead, with what [`Group::kept`] gave there. No event is read
    /// before [`Group::resume`].
    ///
    /// # Errors
    /// They are not what they should be.
    pub fn restore(group: OwnedFd, journal: OwnedFd) -> io::Result<Self> {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", group.as_raw_fd()))?;
        if kind.as_os_str() != GROUP_LINK {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: it is a group, as has just been seen.
        let fanotify = unsafe { Fanotify::from_owned_fd(group) };
        let journal = Journal::open(journal)?;
        let unanswered = journal.take_stock();
        let stale = unanswered.into_iter().map(|event| Stale::reserve(event, journal.as_fd())).collect();
        Ok(Self::with(fanotify, journal, Some(stale)))
    }

    fn with(fanotify: Fanotify, journal: Journal, stale: Option<Vec<Stale>>) -> Self {
        let holds = stale.as_ref().map_or(0, |stale| 1 + stale.iter().filter(|stale| stale.is_in_the_way()).count());
        let (stale, holds, objects) = (Mutex::new(stale), AtomicUsize::new(holds), Mutex::default());
        Self(Arc::new(Inner { fanotify, journal, stale, holds, objects }))
    }

    /// What has to outlive the process, so that another one can go on: the group and its journal.
    #[must_use]
    pub fn kept(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.0.fanotify.as_fd(), self.0.journal.as_fd())
    }

    /// How many events a dead process has left, for [`Group::resume`].
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.0.stale().as_ref().map_or(0, Vec::len)
    }

    /// When every object that can be served is: has `ask` bring what a dead process was asked for and did not answer. Events are
    /// read from now on.
    pub fn resume(&self, ask: impl Fn(NeedRequest)) {
        let Some(stale) = self.0.stale().take() else { return };
        let wanted = |known: &Known| if known.is_full() { 0 } else { known.len_bytes };
        let objects: Vec<_> = self.0.objects().values().map(|known| (known.object, wanted(known))).collect();
        stale.iter().for_each(|stale| stale::owe(&self.0, stale, &objects, &ask));
        self.0.let_go();
    }

    /// Has the kernel ask before `blob`'s file is read, unless it is complete. Who opened it before that is not asked for. Its
    /// events are answered from now on if the engine knows the object.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: its file system has no such events; `EINVAL`: the kernel has none (before Linux 6.14).
    pub fn watch(&self, blob: &BlobFile) -> Result<(), Errno> {
        self.know(blob.as_fd(), blob.object(), blob.len_bytes(), Some(Arc::clone(blob.map())))
    }

    /// The same for any file, of which everything is asked for.
    ///
    /// # Errors
    /// As [`Group::watch`].
    pub fn mark(&self, file: BorrowedFd<'_>, object: ObjectId, len_bytes: u64) -> Result<(), Errno> {
        self.know(file, object, len_bytes, None)
    }

    fn know(&self, file: BorrowedFd<'_>, object: ObjectId, len_bytes: u64, map: Option<Arc<PresenceMap>>) -> Result<(), Errno> {
        // Also of one that is complete: events that an earlier process has read may be of it.
        let known = Known { object, len_bytes: align_up(len_bytes, PAGE_BYTES), map };
        let is_full = known.is_full();
        self.0.objects().insert(inode(file)?, known);
        let watched = if is_full { Ok(()) } else { self.0.set_mark(MarkFlags::FAN_MARK_ADD, file) };
        watched.inspect_err(|_| self.0.forget(file, object))
    }

    /// Whether the kernel would watch a file in `dir`, by trying with one that has no name.
    ///
    /// # Errors
    /// No file can be made there.
    pub fn can_watch(&self, dir: &Path) -> io::Result<Result<(), Errno>> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(FILE_MODE).open(dir)?;
        let watched = self.0.set_mark(MarkFlags::FAN_MARK_ADD, file.as_fd());
        Ok(watched.and_then(|()| self.0.set_mark(MarkFlags::FAN_MARK_REMOVE, file.as_fd())))
    }

    /// What tickets and sinks hold of it.
    pub(super) fn inner(&self) -> Arc<Inner> {
        Arc::clone(&self.0)
    }
}

impl Inner {
    /// All of `file` is there: the kernel does not ask any more before it is read. Events that are under way are
    /// answered all the same.
    pub(super) fn complete(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        self.set_mark(MarkFlags::FAN_MARK_REMOVE, file)
    }

    /// A file that nobody reads any more is no object, if it is this one still.
    pub(super) fn forget(&self, file: BorrowedFd<'_>, object: ObjectId) {
        let Ok(inode) = inode(file) else { return };
        let mut objects = self.objects();
        if objects.get(&inode).is_some_and(|known| known.object == object) {
            objects.remove(&inode);
            // There is none on a file that is complete.
            let _ = self.set_mark(MarkFlags::FAN_MARK_REMOVE, file);
        }
    }

    /// One reason less not to read events.
    pub(super) fn let_go(&self) {
        self.holds.fetch_sub(1, Ordering::AcqRel);
    }

    fn stale(&self) -> MutexGuard<'_, Option<Vec<Stale>>> {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_mark(&self, flags: MarkFlags, file: BorrowedFd<'_>) -> Result<(), Errno> {
        self.fanotify.mark(flags, MaskFlags::from_bits_retain(wire::PRE_ACCESS), file, None::<&Path>)
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<Inode, Known>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers an event, then closes its descriptor: in this order, so that no other event gets its name before.
    fn respond(&self, event: OwnedFd, result: Result<(), Errno>) -> io::Result<bool> {
        let given = self.give(event.as_raw_fd(), result);
        drop(event);
        given
    }

    /// Answers the event of this number, and notes that. The number must not be free before.
    pub(super) fn give(&self, number: RawFd, result: Result<(), Errno>) -> io::Result<bool> {
        self.noted(number, nix::unistd::write(&self.fanotify, &wire::response(number, result)))
    }

    /// The answer to the event of this number was given, or refused.
    fn noted(&self, number: RawFd, given: Result<usize, Errno>) -> io::Result<bool> {
        self.journal.clear(number);
        match given {
            Ok(_) => Ok(true),
            // Nobody waits for an event of this name.
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Known {
    /// Nothing of it has to be asked for.
    fn is_full(&self) -> bool {
        self.map.as_ref().is_some_and(|map| map.is_full())
    }
}

/// The object that an event is about.
fn find<'a>(objects: &'a HashMap<Inode, Known>, event: BorrowedFd<'_>) -> Option<&'a Known> {
    match objects.len() {
        // Every event is of a file that is marked, and a file is known as long as somebody has it open.
        1 => objects.values().next(),
        _ => objects.get(&inode(event).ok()?),
    }
}

impl FrontEnd for Group {
    fn name(&self) -> &'static str {
        "fanotify"
    }

    fn caps(&self) -> Caps {
        Caps {
            align_bytes: PAGE_BYTES,
            holes_are_absent: false,
            sinks_know: true,
            sinks_block: true,
            sinks_copy: true,
            reopens: false,
            events_per_read: EVENTS_PER_READ,
            needs_hold_fds: true,
            ring_reads_wait: true,
            readers_preempt: true,
        }
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.0.fanotify.as_fd()
    }

    fn message_memory(&self) -> Option<Arc<MmapRaw>> {
        Some(self.0.journal.messages())
    }

    fn settle(&self) -> bool {
        self.0.holds.load(Ordering::Acquire) == 0
    }

    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<Found, FrontError> {
        let bytes = match read {
            Err(Errno::EAGAIN | Errno::EINTR) | Ok([]) => return Ok(Found::Nothing),
            // The kernel has refused the event for which it had no descriptor: its reader got an error.
            Err(errno @ (Errno::EMFILE | Errno::ENFILE)) => return Err(FrontError::OutOfDescriptors(errno)),
            Err(errno) => return Err(FrontError::Broken(errno.into())),
            Ok(bytes) => bytes,
        };
        let (mut events, mut wrong) = (Events::new(bytes), None);
        let objects = self.0.objects();
        for event in events.by_ref() {
            if let Err(why) = self.take(event, &objects, requests) {
                wrong = Some(why);
            }
        }
        if events.left_over() > 0 {
            wrong = Some(format!("{} bytes that are no event", events.left_over()));
        }
        // The kernel gives as many events as fit.
        let found = if bytes.len() + wire::EVENT_BYTES > MESSAGE_MAX_BYTES { Found::Part } else { Found::All };
        wrong.map_or(Ok(found), |why| Err(FrontError::Malformed(why)))
    }
}

impl Group {
    /// Adds what an event asks for to `requests`, or answers it if that cannot be.
    fn take(&self, event: Event, objects: &HashMap<Inode, Known>, requests: &mut Vec<Request>) -> Result<(), String> {
        if event.mask & wire::OVERFLOW != 0 {
            return Err("the kernel has dropped events, and their readers may have got zeros".into());
        }
        let Some(fd) = event.fd.map(take_over) else {
            return Err(format!("an event without a descriptor (mask {:#x})", event.mask));
        };
        let Some(known) = find(objects, fd.as_fd()) else {
            // Its data may be missing, so it may not be read.
            let _ = self.0.respond(fd, Err(Errno::EIO));
            return Err("an event of a file that is not served; its reader gets an error".into());
        };
        // Without a range, all of it.
        let range = event.range.unwrap_or(0..known.len_bytes);
        let range = range.start.min(known.len_bytes)..range.end.min(known.len_bytes);
        if !self.0.journal.note(fd.as_raw_fd(), known.object, &range) {
            let number = fd.as_raw_fd();
            let _ = self.0.respond(fd, Err(Errno::EIO));
            return Err(format!("an event with the descriptor {number}, for which the journal has no room; its reader gets an error"));
        }
        let token = u64::try_from(fd.into_raw_fd()).unwrap_or(u64::MAX);
        let ticket = Ticket::new(Arc::clone(&self.0) as Arc<dyn Answer>, token);
        let is_present = range.is_empty() || known.map.as_ref().is_some_and(|map| map.contains(&range));
        let need = NeedRequest { object: known.object, range, ticket };
        requests.push(if is_present { Request::Present(need) } else { Request::Need(need) });
        Ok(())
    }
}

impl Answer for Inner {
    /// Answers the event whose descriptor is `token`.
    fn answer(&self, token: u64, outcome: Outcome) -> io::Result<bool> {
        self.respond(take_over(number(token)?), result(outcome))
    }

    fn reply(&self, token: u64, outcome: Outcome) -> Option<Reply> {
        Some(Reply { to: self.fanotify.as_fd().as_raw_fd(), bytes: wire::response(number(token).ok()?, result(outcome)) })
    }

    fn replied(&self, token: u64, result: Result<usize, Errno>) -> Replied {
        match number(token) {
            // Closed after its entry was cleared, so that the next event of its number does not lose its own.
            Ok(number) => Replied { delivered: self.noted(number, result), close: Some(take_over(number)) },
            Err(errno) => Replied { delivered: Err(errno.into()), close: None },
        }
    }
}

/// The name of the event that a token stands for.
fn number(token: u64) -> Result<RawFd, Errno> {
    RawFd::try_from(token).map_err(|_| Errno::EBADF)
}

/// What the reader is told. An event opens nothing.
const fn result(outcome: Outcome) -> Result<(), Errno> {
    match outcome {
        Outcome::Done => Ok(()),
        Outcome::Failed(errno) => Err(errno),
        Outcome::Opened { .. } => Err(Errno::EIO),
    }
}

/// Owns an event's descriptor. The number must come from an event that this process has read, or from the token of one, and
/// only once from each.
pub(super) fn take_over(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel installed this number in our table for this event alone; from the event it went into at most one
    // token, and a token is answered once.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn inode(file: BorrowedFd<'_>) -> Result<Inode, Errno> {
    fstat(file).map(|stat| (stat.st_dev, stat.st_ino))
}
