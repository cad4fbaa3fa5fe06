//! Front ends: the only code that knows how a kernel asks for data and how it is answered.
//!
//! A front end turns whatever its kernel interface delivers into [`Request`]s. Each request that wants an
//! answer carries a [`Ticket`]; the engine does the work and answers the ticket. Nothing else passes
//! between the two, so a second kernel interface is a second implementation of [`FrontEnd`].

pub mod cachefiles;
pub mod fanotify;
pub mod sim;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;
use nix::errno::Errno;

use crate::key::Key;
use crate::range::ByteRange;

/// Identifies an object (one blob's cache file as the kernel sees it) among the live ones of a front end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectId(pub u32);

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "object {}", self.0)
    }
}

/// What the kernel wants.
#[derive(Debug)]
pub enum Request {
    /// An object comes to life: find its blob, answer with its length.
    Open(OpenRequest),
    /// A reader waits for a range of an object.
    Need(NeedRequest),
    /// The same where the front end knows that every byte is in the sink already: only its answer is due.
    Present(NeedRequest),
    /// The object is gone: drop its work and its descriptors. No answer is expected, and this may come
    /// for an object that was never opened.
    Close(ObjectId),
}

/// The kernel opened an object. Fields are dropped in this order, which matters: a refused open must be
/// answered before its descriptor is closed.
#[derive(Debug)]
pub struct OpenRequest {
    /// The new object.
    pub object: ObjectId,
    /// Which blob it is.
    pub key: Key,
    /// To be answered with [`Outcome::Opened`] or [`Outcome::Failed`].
    pub ticket: Ticket,
    /// Where its data is to be written; closed when the last clone is dropped. An unanswered need holds one.
    pub sink: Arc<dyn Sink>,
}

/// Where the data of an object is written.
pub trait Sink: AsFd + fmt::Debug + Send + Sync {
    /// What it holds already, in whole pages: asked once, when the object is opened, where [`Caps::sinks_know`].
    fn present(&self) -> Vec<ByteRange> {
        Vec::new()
    }

    /// The bytes of `range`, whole pages, are in the file now. Told for the same front ends, before the answers of those who
    /// waited for them.
    fn filled(&self, _range: &ByteRange) {}

    /// Every byte of the object is in the file now: nobody has to ask for it any more. Told once, for the same front ends.
    fn completed(&self) {}
}

impl Sink for std::fs::File {}

impl Sink for std::os::fd::OwnedFd {}

/// A reader waits for `range`. The range is what the kernel said: unchecked, it may lie beyond the blob.
#[derive(Debug)]
pub struct NeedRequest {
    /// The object that is read.
    pub object: ObjectId,
    /// The bytes that are missing.
    pub range: ByteRange,
    /// To be answered with [`Outcome::Done`] or [`Outcome::Failed`].
    pub ticket: Ticket,
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// An open: the blob exists and is this long, the same for ever.
    Opened {
        /// Exact length of the blob.
        len_bytes: u64,
    },
    /// A need: every byte of the range has been written.
    Done,
    /// Either: it cannot be had, with the reason.
    Failed(Errno),
}

/// Takes answers back to the kernel. Implemented by front ends.
pub trait Answer: Send + Sync {
    /// Answers the request that `token` stands for. `Ok(false)`: nobody waited for it any more (a killed
    /// reader, a closed object), which is normal.
    ///
    /// # Errors
    /// Any other refusal by the kernel.
    fn answer(&self, token: u64, outcome: Outcome) -> io::Result<bool>;

    /// The answer as a message, where it is one: whoever writes many of them at once does it instead of
    /// [`Answer::answer`], and then says how that went ([`Answer::replied`]).
    fn reply(&self, _token: u64, _outcome: Outcome) -> Option<Reply> {
        None
    }

    /// What [`Answer::reply`] gave was written, with this result of write(2).
    fn replied(&self, _token: u64, result: Result<usize, Errno>) -> Replied {
        Replied { delivered: result.map(|_| true).map_err(io::Error::from), close: None }
    }
}

/// An answer that is given by one write(2), which never waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// A descriptor that stays open as long as the front end.
    pub to: RawFd,
    /// What is written.
    pub bytes: [u8; REPLY_BYTES],
}

/// Length of a [`Reply`].
pub const REPLY_BYTES: usize = 8;

/// What became of a [`Reply`].
#[derive(Debug)]
pub struct Replied {
    /// As [`Answer::answer`] says it.
    pub delivered: io::Result<bool>,
    /// Not needed any more: to be closed by whoever can close many at once.
    pub close: Option<OwnedFd>,
}

static UNANSWERED: AtomicU64 = AtomicU64::new(0);
static LEFT: AtomicU64 = AtomicU64::new(0);

/// How many tickets were dropped without an answer since the process started; anything but 0 is a bug.
#[must_use]
pub fn unanswered_tickets() -> u64 {
    UNANSWERED.load(Ordering::Relaxed)
}

/// How many tickets were left to the next daemon since the process started ([`Ticket::leave`]).
#[must_use]
pub fn left_tickets() -> u64 {
    LEFT.load(Ordering::Relaxed)
}

/// The right and the duty to answer one request. Dropping it unanswered answers with `EIO`, so that no
/// reader hangs, and counts a bug.
#[must_use = "a request that is not answered makes its reader fail"]
pub struct Ticket {
    to: Option<Arc<dyn Answer>>,
    token: u64,
}

impl Ticket {
    /// A ticket whose answer goes to `to`, which knows the request by `token`.
    pub fn new(to: Arc<dyn Answer>, token: u64) -> Self {
        Self { to: Some(to), token }
    }

    /// Answers the request. `Ok(false)`: nobody waited for it any more.
    ///
    /// # Errors
    /// See [`Answer::answer`].
    pub fn answer(mut self, outcome: Outcome) -> io::Result<bool> {
        self.to.take().map_or(Ok(false), |to| to.answer(self.token, outcome))
    }

    /// See [`Answer::reply`]; [`Ticket::replied`] must follow if there is one.
    #[must_use]
    pub fn reply(&self, outcome: Outcome) -> Option<Reply> {
        self.to.as_ref()?.reply(self.token, outcome)
    }

    /// See [`Answer::replied`].
    pub fn replied(mut self, result: Result<usize, Errno>) -> Replied {
        let nobody = Replied { delivered: Ok(false), close: None };
        self.to.take().map_or(nobody, |to| to.replied(self.token, result))
    }

    /// Leaves the request to the daemon that comes after this one: the kernel hands it out again when that one sends
    /// `restore`. Only for a process that is about to end and whose kernel interface somebody keeps open; a request
    /// that is left by any other waits for ever.
    pub fn leave(mut self) {
        if self.to.take().is_some() {
            LEFT.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The front end's name for the request, for logs.
    #[must_use]
    pub const fn token(&self) -> u64 {
        self.token
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(to) = self.to.take() {
            UNANSWERED.fetch_add(1, Ordering::Relaxed);
            tracing::error!(token = self.token, "bug: a request was dropped unanswered; answering it with EIO");
            // Nothing is left to do about a refusal here: the kernel no longer wants the answer.
            let _ = to.answer(self.token, Outcome::Failed(Errno::EIO));
        }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({})", self.token)
    }
}

/// What a front end's sinks allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caps {
    /// Offset, length and memory of every write to a sink are multiples of this (a power of two).
    pub align_bytes: u64,
    /// A hole in the sink means "not there", so `SEEK_DATA` and `SEEK_HOLE` on it tell what is present.
    pub holes_are_absent: bool,
    /// Its sinks keep what is present, and want to be asked and told: [`Sink::present`], [`Sink::filled`].
    pub sinks_know: bool,
    /// A write to a sink always blocks: it is not even tried without a thread that may.
    pub sinks_block: bool,
    /// A write to a sink copies its memory, page by page. What is not mapped just then costs it most of what it has done.
    pub sinks_copy: bool,
    /// The kernel opens an object again when its sink was closed and data is missing (`restore` exists).
    pub reopens: bool,
    /// Most requests that one read gives.
    pub events_per_read: u32,
    /// Each request for data brings a descriptor, which is open until its answer.
    pub needs_hold_fds: bool,
    /// A read by a ring waits for a message, `O_NONBLOCK` or not: one that can be polled, and knows no `RWF_NOWAIT`.
    pub ring_reads_wait: bool,
    /// An answer wakes readers on the CPU of whoever gives it, and they take that CPU: a shard may go to another one.
    pub readers_preempt: bool,
}

impl Default for Caps {
    /// Those of cachefiles' descriptors where `restore` exists.
    fn default() -> Self {
        Self {
            align_bytes: 4096,
            holes_are_absent: true,
            sinks_know: false,
            sinks_block: true,
            sinks_copy: false,
            reopens: true,
            events_per_read: 1,
            needs_hold_fds: false,
            ring_reads_wait: false,
            readers_preempt: false,
        }
    }
}

/// Room that one message of any front end needs.
pub const MESSAGE_MAX_BYTES: usize = 1024;

/// Messages that are read at a time at most.
pub const MESSAGES_MAX: u32 = 64;

/// What a read of the kernel's messages found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// There was nothing to read.
    Nothing,
    /// What there was, and no more.
    All,
    /// There may be more.
    Part,
}

/// One source of requests of a kernel interface. It delivers messages by read(2) and understands them; who reads, when
/// and how many at a time is the engine's business.
pub trait FrontEnd: Send + Sync {
    /// The name used in settings, logs and statistics.
    fn name(&self) -> &'static str;

    /// What its sinks allow.
    fn caps(&self) -> Caps;

    /// Where messages come from. Each read(2) of it into at least [`MESSAGE_MAX_BYTES`] takes a message, or
    /// [`Caps::events_per_read`] of them at most, or finds none, and never waits (`O_NONBLOCK` is set). It polls readable
    /// when there may be one.
    fn requests(&self) -> BorrowedFd<'_>;

    /// Memory of its own for messages, [`MESSAGES_MAX`] of [`MESSAGE_MAX_BYTES`] at least, if it wants to know what was read
    /// when this process is dead. A message lies at the beginning of its part from the moment it is read until
    /// [`FrontEnd::parse`] has returned; then the part is zeroed, its first word first.
    fn message_memory(&self) -> Option<Arc<MmapRaw>> {
        None
    }

    /// Adds the requests in what one read gave to `requests`, and says whether another read may give more. What was read is this
    /// process's to answer (and an open's descriptor its to close), so every result must come here, in the order of the
    /// reads.
    ///
    /// # Errors
    /// [`FrontError::Malformed`] for a message that made no sense (it was answered as far as that was
    /// possible; go on), [`FrontError::OutOfDescriptors`] for an open that was lost (go on), anything else if the
    /// interface itself failed.
    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<Found, FrontError>;

    /// Called before each read, when no read is under way and every request that was read has been handed on.
    /// `false`: nothing may be read now; it wants to be asked again soon.
    fn settle(&self) -> bool {
        true
    }

    /// Reads a message and parses it, for a caller without an engine whose front end has one request in a message.
    ///
    /// # Errors
    /// As [`FrontEnd::parse`].
    fn next(&self) -> Result<Option<Request>, FrontError> {
        let (mut buffer, mut requests) = ([0; MESSAGE_MAX_BYTES], Vec::new());
        loop {
            match nix::unistd::read(self.requests(), &mut buffer) {
                Err(Errno::EINTR) => {}
                read => return self.parse(read.map(|len| &buffer[..len]), &mut requests).map(|_| requests.pop()),
            }
        }
    }
}

/// Why a front end could not deliver a request.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// The kernel's message could not be understood; the next one may be fine.
    #[error("malformed message from the kernel: {0}")]
    Malformed(String),
    /// No descriptor was free for an open, so the kernel failed that open for good.
    #[error("an open was lost because no file descriptor was free ({0}); raise LimitNOFILE= or fs.file-max, then mount that image again")]
    OutOfDescriptors(Errno),
    /// The interface is gone or refuses to work.
    #[error("cannot read requests from the kernel: {0}")]
    Broken(#[source] io::Error),
}
