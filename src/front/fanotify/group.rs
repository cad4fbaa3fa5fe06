//! One fanotify group: a source of requests, for one shard and the objects that it owns.
//!
//! Every reader that waits for an event of a group is woken by every answer to one of them, so there is a group for each
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

use super::journal::Journal;
use super::map::PAGE_BYTES;
use super::stale::{self, Stale};
use super::wire::{self, Event, Events};
use crate::front::{Answer, Caps, FrontEnd, FrontError, MESSAGE_MAX_BYTES, NeedRequest, ObjectId, Outcome, Request, Ticket};
use crate::range::{ByteRange, align_up};

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
#[derive(Clone, Copy, Debug)]
struct Known {
    object: ObjectId,
    /// In whole pages.
    len_bytes: u64,
    /// All of it is there: its last events need nobody.
    complete: bool,
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

    /// `file` is `object`, of which a dead process was asked already. It is asked for again, unless it is complete.
    ///
    /// # Errors
    /// As [`Group::mark`].
    pub fn adopt(&self, file: BorrowedFd<'_>, object: ObjectId, len_bytes: u64, complete: bool) -> Result<(), Errno> {
        self.mark(file, object, len_bytes)?;
        if complete { self.0.complete(file) } else { Ok(()) }
    }

    /// When every object that can be served is: has `ask` bring what a dead process was asked for and did not answer. Events are
    /// read from now on.
    pub fn resume(&self, ask: impl Fn(NeedRequest)) {
        let Some(stale) = self.0.stale().take() else { return };
        let present = |known: &Known| if known.complete { 0 } else { known.len_bytes };
        let objects: Vec<_> = self.0.objects().values().map(|known| (known.object, present(known))).collect();
        stale.iter().for_each(|stale| stale::owe(&self.0, stale, &objects, &ask));
        self.0.let_go();
    }

    /// Has the kernel ask before `file`, which is `object`, is read. Who opened it before that is not asked for. Its
    /// events are answered from now on if the engine knows the object.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: its file system has no such events; `EINVAL`: the kernel has none (before Linux 6.14).
    pub fn mark(&self, file: BorrowedFd<'_>, object: ObjectId, len_bytes: u64) -> Result<(), Errno> {
        self.0.objects().insert(inode(file)?, Known { object, len_bytes: align_up(len_bytes, PAGE_BYTES), complete: false });
        self.0.set_mark(MarkFlags::FAN_MARK_ADD, file).inspect_err(|_| self.0.forget(file, object))
    }

    /// Whether the kernel would watch a file in `dir`, by trying with one that has no name.
    ///
    /// # Errors
    /// No file can be made there.
    pub fn can_watch(&self, dir: &Path) -> io::Result<Result<(), Errno>> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(FILE_MODE).open(dir)?;
        let watched = self.mark(file.as_fd(), ObjectId(0), 0);
        self.0.forget(file.as_fd(), ObjectId(0));
        Ok(watched)
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
        if let Some(known) = self.objects().get_mut(&inode(file)?) {
            known.complete = true;
        }
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
        let given = nix::unistd::write(&self.fanotify, &wire::response(number, result));
        self.journal.clear(number);
        match given {
            Ok(_) => Ok(true),
            // Nobody waits for an event of this name.
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The object that an event is about, and which part of it is to be brought: an empty one if all of it is there.
    fn find(&self, event: &OwnedFd, range: Option<ByteRange>) -> Option<(ObjectId, ByteRange)> {
        let Known { object, len_bytes, complete } = *self.objects().get(&inode(event.as_fd()).ok()?)?;
        if complete {
            return Some((object, 0..0));
        }
        // Without a range, all of it.
        let range = range.unwrap_or(0..len_bytes);
        Some((object, range.start.min(len_bytes)..range.end.min(len_bytes)))
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
            reopens: false,
            events_per_read: EVENTS_PER_READ,
            needs_hold_fds: true,
            ring_reads_wait: true,
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

    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<bool, FrontError> {
        let bytes = match read {
            Err(Errno::EAGAIN | Errno::EINTR) | Ok([]) => return Ok(false),
            // The kernel has refused the event for which it had no descriptor: its reader got an error.
            Err(errno @ (Errno::EMFILE | Errno::ENFILE)) => return Err(FrontError::OutOfDescriptors(errno)),
            Err(errno) => return Err(FrontError::Broken(errno.into())),
            Ok(bytes) => bytes,
        };
        let (mut events, mut wrong) = (Events::new(bytes), None);
        for event in events.by_ref() {
            if let Err(why) = self.take(event, requests) {
                wrong = Some(why);
            }
        }
        if events.left_over() > 0 {
            wrong = Some(format!("{} bytes that are no event", events.left_over()));
        }
        wrong.map_or(Ok(true), |why| Err(FrontError::Malformed(why)))
    }
}

impl Group {
    /// Adds what an event asks for to `requests`, or answers it if it asks for nothing.
    fn take(&self, event: Event, requests: &mut Vec<Request>) -> Result<(), String> {
        if event.mask & wire::OVERFLOW != 0 {
            return Err("the kernel has dropped events, and their readers may have got zeros".into());
        }
        let Some(fd) = event.fd.map(take_over) else {
            return Err(format!("an event without a descriptor (mask {:#x})", event.mask));
        };
        let Some((object, range)) = self.0.find(&fd, event.range) else {
            // Its data may be missing, so it may not be read.
            let _ = self.0.respond(fd, Err(Errno::EIO));
            return Err("an event of a file that is not served; its reader gets an error".into());
        };
        if range.is_empty() {
            return self.0.respond(fd, Ok(())).map(drop).map_err(|error| format!("an answer was refused: {error}"));
        }
        if !self.0.journal.note(fd.as_raw_fd(), object, &range) {
            let number = fd.as_raw_fd();
            let _ = self.0.respond(fd, Err(Errno::EIO));
            return Err(format!("an event with the descriptor {number}, for which the journal has no room; its reader gets an error"));
        }
        let token = u64::try_from(fd.into_raw_fd()).unwrap_or(u64::MAX);
        let ticket = Ticket::new(Arc::clone(&self.0) as Arc<dyn Answer>, token);
        requests.push(Request::Need(NeedRequest { object, range, ticket }));
        Ok(())
    }
}

impl Answer for Inner {
    /// Answers the event whose descriptor is `token`.
    fn answer(&self, token: u64, outcome: Outcome) -> io::Result<bool> {
        let event = take_over(RawFd::try_from(token).map_err(|_| Errno::EBADF)?);
        match outcome {
            Outcome::Done => self.respond(event, Ok(())),
            Outcome::Failed(errno) => self.respond(event, Err(errno)),
            Outcome::Opened { .. } => {
                let _ = self.respond(event, Err(Errno::EIO));
                Err(Errno::EINVAL.into())
            }
        }
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
