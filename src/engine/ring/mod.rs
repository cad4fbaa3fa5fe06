//! The only folder that names `io_uring`: reads and writes through a ring of the shard's own.
//!
//! The ring is made in the thread that uses it, with the best flags the kernel takes, and is restricted to
//! the few operations below before it is enabled (`setup`). Writes to cachefiles' anonymous descriptors always go to
//! the kernel's worker threads (the descriptor knows no non-blocking write), so their number is capped.

mod replies;
mod setup;

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;
use slab::Slab;

use super::buffers::Memory;
use super::io::{DRAIN_MAX, Done, FileRef, Io, Kind, Op, REPLIES_MAX, Ready, SOURCES_MAX, Watch};
use crate::front::Reply;

use self::replies::Replies;

pub use self::setup::{explain, probe};

/// `user_data` of the poll on the shard's wake-up descriptor; operations count from 0.
const WAKE: u64 = u64::MAX;
/// `user_data` of what nobody wants to hear of, where the kernel tells of it all the same.
const UNHEARD: u64 = WAKE - 1;
/// `user_data` of the polls on the front end's descriptors: from this on, one for each.
const REQUESTS: u64 = UNHEARD - SOURCES_MAX as u64;
/// `user_data` of replies: from this on, one for each place in their memory.
const REPLIES: u64 = REQUESTS - REPLIES_MAX as u64;
/// In the `user_data` of an operation: it was sent with `RWF_NOWAIT`.
const NOWAIT: u64 = 1 << 32;
/// The same: it is a read with a write linked behind it. Only one of the two is heard of: the read if it did not give
/// everything, else the write.
const LINKED: u64 = 1 << 33;
/// Pause when the kernel has no memory for a request just now.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(1);
/// Completions taken out of the ring at a time.
const REAP_BATCH: usize = 64;
/// Places in the fixed-file table; files beyond it are used by number.
const FILE_SLOTS: u32 = 16_384;

/// How a ring is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// Operations in flight at most.
    pub depth: u32,
    /// Messages read at a time at most, besides those.
    pub receives: u32,
    /// Kernel worker threads that write, at most.
    pub workers: u32,
    /// The CPUs that worker threads may use; none: all.
    pub near: &'a [usize],
    /// Every write goes to such a thread at once.
    pub sinks_block: bool,
    /// Pages of files are mapped before they are written from.
    pub sinks_copy: bool,
    /// Messages are read by read(2), because the ring would wait for them.
    pub receives_aside: bool,
}

/// What came out of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// The flags the kernel took.
    pub mode: &'static str,
    /// The ring does only what it must.
    pub restricted: bool,
    /// Buffers are registered.
    pub fixed_buffers: bool,
    /// There is a table of fixed files.
    pub fixed_files: bool,
    /// A write can follow its read without the shard.
    pub links: bool,
    /// Worker threads run where they were told to.
    pub near: bool,
}

/// See the module's description. `!Send`: the kernel accepts only the thread that made it.
#[derive(Debug)]
pub struct Ring {
    // Declared first, so dropped first: closing the ring ends its use of everything below.
    ring: RingFd,
    ops: Slab<Op>,
    backlog: Vec<squeue::Entry>,
    free_files: Vec<u32>,
    /// The file of the messages has not refused `RWF_NOWAIT`.
    receive_nowait: bool,
    receives_aside: bool,
    /// What the next wait is to tell of: messages that were read so, and what completed while replies were written.
    early: Vec<Done>,
    early_ready: Ready,
    replies: Replies,
    /// Something is in the queue that should not wait for the next call that enters the kernel.
    is_urgent: bool,
    sinks_block: bool,
    sinks_copy: bool,
    /// Each with its place in the table of files, if it has one: replies are written to them.
    requests: Vec<FileRef>,
    /// Those that are polled: a bit for each.
    watched: u64,
    wake: RawFd,
    features: Features,
    cqes: Vec<cqueue::Entry>,
    thread_bound: PhantomData<*const ()>,
}

struct RingFd(IoUring);

impl std::fmt::Debug for RingFd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ring {}", self.0.as_raw_fd())
    }
}

impl Ring {
    /// Makes a ring for the calling thread. `buffers` is registered if the kernel allows it.
    ///
    /// # Errors
    /// The kernel refuses any ring; [`explain`] says why.
    pub fn new(settings: Settings<'_>, buffers: &Memory, watch: Watch<'_>) -> io::Result<Self> {
        let (ring, mode) = setup::build(2 * settings.depth + settings.receives)?;
        let submitter = ring.submitter();
        let vec = [libc::iovec { iov_base: buffers.ptr().cast(), iov_len: buffers.len() as usize }];
        // SAFETY: the memory is alive: `buffers` keeps it so here, and the shard keeps its buffers until
        // after this ring was dropped.
        let fixed_buffers = unsafe { submitter.register_buffers(&vec) }.is_ok();
        let fixed_files = submitter.register_files_sparse(FILE_SLOTS).is_ok();
        let restricted = submitter.register_restrictions(&mut setup::allowed()).is_ok();
        submitter.register_enable_rings()?;
        // Before the number of them, which some kernels forget over it.
        let near = !settings.near.is_empty() && submitter.register_iowq_aff(&setup::cpu_set(settings.near)).is_ok();
        // Operations on regular files have workers of their own, apart from those on what is none, such as the sinks
        // (`io_prep_async_work`, io_uring/io_uring.c). A read that blocks occupies one of the former, so there are as many as
        // operations: a source that hangs can take none away from another one.
        // Older kernels have no such call; then the cap is the kernel's own.
        let _ = submitter.register_iowq_max_workers(&mut [settings.depth, settings.workers]);
        let links = ring.params().is_feature_skip_cqe_on_success();
        let features = Features { mode, restricted, fixed_buffers, fixed_files, links, near };
        let free_files = if fixed_files { (0..FILE_SLOTS).rev().collect() } else { Vec::new() };
        let sources = watch.requests.len();
        let mut ring = Self {
            ring: RingFd(ring),
            replies: Replies::default(),
            ops: Slab::with_capacity((settings.depth + settings.receives) as usize),
            backlog: Vec::new(),
            free_files,
            receive_nowait: true,
            receives_aside: settings.receives_aside,
            early: Vec::with_capacity(settings.receives as usize),
            early_ready: Ready::default(),
            is_urgent: false,
            sinks_block: settings.sinks_block,
            sinks_copy: settings.sinks_copy,
            requests: Vec::with_capacity(sources),
            watched: 0,
            wake: watch.wake.as_raw_fd(),
            features,
            cqes: Vec::with_capacity(REAP_BATCH),
            thread_bound: PhantomData,
        };
        // A place in the table keeps a descriptor open for a while after this, so none is taken for nothing.
        let add = |fd: &BorrowedFd<'_>| if settings.receives_aside { ring.add_file(*fd) } else { FileRef::plain(*fd) };
        ring.requests = watch.requests.iter().map(add).collect();
        ring.arm(WAKE);
        if !settings.receives_aside {
            (0..sources as u64).for_each(|source| ring.arm(REQUESTS + source));
        }
        Ok(ring)
    }

    /// What the kernel gave us.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// (Re-)arms the poll that `user_data` stands for.
    fn arm(&mut self, user_data: u64) {
        let source = user_data.checked_sub(REQUESTS).and_then(|source| self.requests.get(usize::try_from(source).ok()?));
        let fd = source.map_or(self.wake, |source| source.fd);
        // A poll costs whoever asks something, each time: no reader while the shard is awake anyway.
        let is_multishot = source.is_none() || !self.receives_aside;
        self.submit(opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(is_multishot).build().user_data(user_data));
    }

    /// Puts an entry into the submission queue; what does not fit waits for the next turn.
    fn submit(&mut self, entry: squeue::Entry) {
        self.is_urgent = true;
        self.enqueue(entry);
    }

    /// The same for what may wait for the next call that enters the kernel.
    fn enqueue(&mut self, entry: squeue::Entry) {
        // SAFETY: the entry's memory is owned by its record in `ops`, which is removed only at its completion
        // (polls have none; of two that are linked only the last to use it completes); its file stays open until `remove_file`, which the shard calls when nothing of
        // the object is in flight.
        if unsafe { self.ring.0.submission().push(&entry) }.is_err() {
            self.backlog.push(entry);
        }
    }

    /// Puts a read and the write behind it into the queue, side by side, or the read alone.
    fn push_linked(&mut self, mut op: Op, read: squeue::Entry, write: squeue::Entry) {
        if !self.can_link() {
            op.then = None;
            let key = self.ops.insert(op);
            return self.submit(read.user_data(key as u64));
        }
        let key = self.ops.insert(op) as u64;
        self.submit(read.flags(squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS).user_data(key | LINKED));
        self.submit(write.user_data(key));
    }

    /// Puts a write from a file's pages into the queue, behind what maps them. If that fails, the write says why.
    fn push_mapped(&mut self, op: Op, write: squeue::Entry) {
        let map = opcode::Madvise::new(op.memory.ptr().cast(), i64::from(op.memory.len()), libc::MADV_POPULATE_READ).build();
        let quiet = squeue::Flags::IO_HARDLINK | squeue::Flags::SKIP_SUCCESS | squeue::Flags::ASYNC;
        let key = self.ops.insert(op) as u64;
        self.submit(map.flags(quiet).user_data(UNHEARD));
        self.submit(write.user_data(key));
    }

    /// Whether two entries can be put into the queue side by side, and only one of them heard of.
    fn can_link(&mut self) -> bool {
        let queue = self.ring.0.submission();
        self.features.links && self.backlog.is_empty() && queue.capacity() - queue.len() >= 2
    }

    fn flush_backlog(&mut self) {
        let mut backlog = std::mem::take(&mut self.backlog);
        for entry in backlog.drain(..) {
            self.enqueue(entry);
        }
        if self.backlog.is_empty() {
            self.backlog = backlog;
        }
    }

    fn entry(&self, op: &Op) -> squeue::Entry {
        self.entry_for(op, op.kind, op.file, op.offset)
    }

    fn entry_for(&self, op: &Op, kind: Kind, file: FileRef, offset: u64) -> squeue::Entry {
        let (ptr, len) = (op.memory.ptr(), op.memory.len());
        let fixed = self.features.fixed_buffers && op.memory.is_slot();
        macro_rules! build {
            ($file:expr) => {
                match (kind, fixed) {
                    (Kind::Read, true) => opcode::ReadFixed::new($file, ptr, len, 0).offset(offset).build(),
                    // From the front end, without a position, as read(2) does.
                    (Kind::Receive, _) => opcode::Read::new($file, ptr, len)
                        .offset(u64::MAX)
                        .rw_flags(if self.receive_nowait { libc::RWF_NOWAIT } else { 0 })
                        .build(),
                    (Kind::Read, false) => opcode::Read::new($file, ptr, len).offset(offset).build(),
                    (Kind::Write, true) => opcode::WriteFixed::new($file, ptr, len, 0).offset(offset).build(),
                    (Kind::Write, false) => opcode::Write::new($file, ptr, len).offset(offset).build(),
                }
            };
        }
        let entry = match file.slot {
            Some(slot) => build!(types::Fixed(slot)),
            None => build!(types::Fd(file.fd)),
        };
        // Where a sink takes no non-blocking write the first attempt would only be lost time.
        if kind == Kind::Write && self.sinks_block { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }

    /// Enters the kernel once: submits, and waits for `want` completions.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        self.is_urgent = false;
        let submitter = self.ring.0.submitter();
        let entered = match timeout {
            Some(timeout) if want > 0 => {
                let timespec = types::Timespec::from(timeout);
                submitter.submit_with_args(want, &types::SubmitArgs::new().timespec(&timespec))
            }
            _ => submitter.submit_and_wait(want),
        };
        match entered.map_err(|error| (Errno::from_raw(error.raw_os_error().unwrap_or(0)), error)) {
            Ok(_) => Ok(()),
            // Time is up; a signal; completions must be taken first.
            Err((Errno::ETIME | Errno::EINTR | Errno::EBUSY, _)) => Ok(()),
            Err((Errno::EAGAIN, _)) => {
                std::thread::sleep(NO_MEMORY_PAUSE);
                Ok(())
            }
            Err((_, error)) => Err(error),
        }
    }

    /// Takes what has completed; whether anything had.
    fn reap(&mut self, done: &mut Vec<Done>, ready: &mut Ready) -> bool {
        let mut any = false;
        loop {
            let mut cqes = std::mem::take(&mut self.cqes);
            cqes.clear();
            cqes.extend(self.ring.0.completion().take(REAP_BATCH));
            for cqe in &cqes {
                self.complete(cqe, done, ready);
            }
            let more = cqes.len() == REAP_BATCH;
            any |= !cqes.is_empty();
            self.cqes = cqes;
            if !more {
                return any;
            }
        }
    }

    fn complete(&mut self, cqe: &cqueue::Entry, done: &mut Vec<Done>, ready: &mut Ready) {
        let user_data = cqe.user_data();
        if user_data >= REPLIES {
            self.complete_own(user_data, cqe, ready);
        } else if let Some(op) = usize::try_from(user_data & !(NOWAIT | LINKED)).ok().and_then(|key| self.ops.try_remove(key)) {
            let mut result = cqe.result();
            if user_data & NOWAIT != 0 && result == -libc::EOPNOTSUPP {
                self.receive_nowait = false;
                result = -libc::EINTR;
            }
            done.push(Done { copied: op.then.is_some() && user_data & LINKED == 0, op, result });
        }
    }

    /// What is no operation of the caller's.
    fn complete_own(&mut self, user_data: u64, cqe: &cqueue::Entry, ready: &mut Ready) {
        match user_data {
            UNHEARD => return,
            WAKE => ready.woken = true,
            REQUESTS.. => {
                let source = 1 << (user_data - REQUESTS);
                (ready.requests, self.watched) = (ready.requests | source, self.watched & !source);
                if self.receives_aside {
                    return;
                }
            }
            _ => return self.replies.ended(user_data - REPLIES, cqe.result()),
        }
        if !cqueue::more(cqe.flags()) {
            self.arm(user_data);
        }
    }

    fn set_file(&self, slot: u32, fd: RawFd) -> bool {
        self.ring.0.submitter().register_files_update(slot, &[fd]).is_ok()
    }
}

impl Io for Ring {
    fn add_file(&mut self, fd: BorrowedFd<'_>) -> FileRef {
        let mut file = FileRef::plain(fd);
        if let Some(slot) = self.free_files.pop() {
            if self.set_file(slot, fd.as_raw_fd()) {
                file.slot = Some(slot);
            } else {
                self.free_files.push(slot);
            }
        }
        file
    }

    fn remove_file(&mut self, file: FileRef) {
        if let Some(slot) = file.slot
            && self.set_file(slot, -1)
        {
            self.free_files.push(slot);
        }
    }

    fn push(&mut self, op: Op) {
        let entry = self.entry(&op);
        if let Some((file, offset)) = op.then {
            let write = self.entry_for(&op, Kind::Write, file, offset);
            return self.push_linked(op, entry, write);
        }
        if op.kind == Kind::Write && self.sinks_copy && op.memory.file().is_some() && self.can_link() {
            return self.push_mapped(op, entry);
        }
        if op.kind == Kind::Receive && self.receives_aside {
            let result = op.memory.receive(op.file.fd);
            return self.early.push(Done { op, result, copied: false });
        }
        // Without `RWF_NOWAIT` the ring itself would wait for a file that can be polled, `O_NONBLOCK` or not
        // (`io_rw_init_file`). One that refuses the flag, as cachefiles' device, never waits; nothing was read of it.
        let nowait = if op.kind == Kind::Receive && self.receive_nowait { NOWAIT } else { 0 };
        let key = self.ops.insert(op);
        self.submit(entry.user_data(key as u64 | nowait));
    }

    fn reply(&mut self, replies: &[Reply], results: &mut Vec<i32>) -> bool {
        self.write_replies(replies, results);
        true
    }

    fn watch(&mut self, source: usize) {
        if self.receives_aside && self.watched >> source & 1 == 0 {
            self.watched |= 1 << source;
            self.arm(REQUESTS + source as u64);
        }
    }

    fn close(&mut self, fd: OwnedFd) {
        let close = opcode::Close::new(types::Fd(fd.into_raw_fd())).build().user_data(UNHEARD);
        let quiet = if self.features.links { squeue::Flags::SKIP_SUCCESS } else { squeue::Flags::empty() };
        self.enqueue(close.flags(quiet));
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<Ready> {
        let mut ready = std::mem::take(&mut self.early_ready);
        self.flush_backlog();
        let is_idle = self.backlog.is_empty() && self.early.is_empty() && ready == Ready::default() && timeout != Some(Duration::ZERO);
        done.append(&mut self.early);
        let entered = if is_idle || self.must_enter() { self.enter(usize::from(is_idle), timeout) } else { Ok(()) };
        self.reap(done, &mut ready);
        entered?;
        // The kernel runs at most 20 deferred completions beyond those waited for in one call. Its flag may also be stale:
        // another CPU adds work first and sets the flag then, when the work may be done already (`io_req_local_work_add`).
        // So a call that brings nothing is the last; work that is left all the same is done by the next wait.
        while self.ring.0.submission().taskrun() {
            self.enter(0, None)?;
            if !self.reap(done, &mut ready) {
                break;
            }
        }
        Ok(ready)
    }
}

impl Ring {
    /// Whether the kernel has to be entered although nobody waits for anything.
    fn must_enter(&mut self) -> bool {
        let queue = self.ring.0.submission();
        self.is_urgent || queue.taskrun() || queue.cq_overflow() || 2 * queue.len() > queue.capacity()
    }
}

impl Drop for Ring {
    /// Closing a ring does not end operations that have started, so they are waited for. If they do not end
    /// (a dead disk) their memory is given up rather than unmapped under the kernel's hands.
    fn drop(&mut self) {
        let (mut done, deadline) = (Vec::new(), Instant::now() + DRAIN_MAX);
        while !self.ops.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.wait(Some(left), &mut done).is_err() {
                break;
            }
        }
        if !self.ops.is_empty() {
            tracing::error!(operations = self.ops.len(), "operations did not end; their memory is not freed");
            std::mem::forget(std::mem::take(&mut self.ops));
        }
    }
}

#[cfg(test)]
mod tests;
