//! The only file that names `io_uring`: reads and writes through a ring of the shard's own.
//!
//! The ring is made in the thread that uses it, with the best flags the kernel takes, and is restricted to
//! the few operations below before it is enabled. Writes to cachefiles' anonymous descriptors always go to
//! the kernel's worker threads (the descriptor knows no non-blocking write), so their number is capped.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;
use slab::Slab;

use super::buffers::Memory;
use super::io::{DRAIN_MAX, Done, FileRef, Io, Kind, Op, Ready, Watch};

/// `user_data` of the poll on the front end's descriptor; operations count from 0.
const REQUESTS: u64 = u64::MAX;
/// `user_data` of the poll on the shard's wake-up descriptor.
const WAKE: u64 = u64::MAX - 1;
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

// io_uring register opcodes (include/uapi/linux/io_uring.h) that stay allowed after the ring is enabled.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_IOWQ_AFF: u8 = 17;
const REGISTER_IOWQ_MAX_WORKERS: u8 = 19;

/// How a ring is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Operations in flight at most.
    pub depth: u32,
    /// Messages read at a time at most, besides those.
    pub receives: u32,
    /// Kernel worker threads that write, at most.
    pub workers: u32,
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
    requests: Option<RawFd>,
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
    pub fn new(settings: Settings, buffers: &Memory, watch: Watch<'_>) -> io::Result<Self> {
        let (ring, mode) = build(2 * settings.depth + settings.receives)?;
        let submitter = ring.submitter();
        let vec = [libc::iovec { iov_base: buffers.ptr().cast(), iov_len: buffers.len() as usize }];
        // SAFETY: the memory is alive: `buffers` keeps it so here, and the shard keeps its buffers until
        // after this ring was dropped.
        let fixed_buffers = unsafe { submitter.register_buffers(&vec) }.is_ok();
        let fixed_files = submitter.register_files_sparse(FILE_SLOTS).is_ok();
        let restricted = submitter.register_restrictions(&mut allowed()).is_ok();
        submitter.register_enable_rings()?;
        // Operations on regular files have workers of their own, apart from those on what is none, such as the sinks
        // (`io_prep_async_work`, io_uring/io_uring.c). A read that blocks occupies one of the former, so there are as many as
        // operations: a source that hangs can take none away from another one.
        // Older kernels have no such call; then the cap is the kernel's own.
        let _ = submitter.register_iowq_max_workers(&mut [settings.depth, settings.workers]);
        let links = ring.params().is_feature_skip_cqe_on_success();
        let features = Features { mode, restricted, fixed_buffers, fixed_files, links };
        let free_files = if fixed_files { (0..FILE_SLOTS).rev().collect() } else { Vec::new() };
        let mut ring = Self {
            ring: RingFd(ring),
            ops: Slab::with_capacity((settings.depth + settings.receives) as usize),
            backlog: Vec::new(),
            free_files,
            receive_nowait: true,
            requests: watch.requests.map(|fd| fd.as_raw_fd()),
            wake: watch.wake.as_raw_fd(),
            features,
            cqes: Vec::with_capacity(REAP_BATCH),
            thread_bound: PhantomData,
        };
        ring.arm(WAKE);
        ring.arm(REQUESTS);
        Ok(ring)
    }

    /// What the kernel gave us.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// (Re-)arms the multishot poll that `user_data` stands for.
    fn arm(&mut self, user_data: u64) {
        let fd = if user_data == WAKE { Some(self.wake) } else { self.requests };
        if let Some(fd) = fd {
            let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build().user_data(user_data);
            self.submit(poll);
        }
    }

    /// Puts an entry into the submission queue; what does not fit waits for the next turn.
    fn submit(&mut self, entry: squeue::Entry) {
        // SAFETY: the entry's memory is owned by its record in `ops`, which is removed only at its completion
        // (polls have none; of two that are linked only the last to use it completes); its file stays open until `remove_file`, which the shard calls when nothing of
        // the object is in flight.
        if unsafe { self.ring.0.submission().push(&entry) }.is_err() {
            self.backlog.push(entry);
        }
    }

    /// Puts a read and the write behind it into the queue, side by side, or the read alone.
    fn push_linked(&mut self, mut op: Op, read: squeue::Entry, write: squeue::Entry) {
        let queue = self.ring.0.submission();
        let room = queue.capacity() - queue.len() >= 2;
        drop(queue);
        if !(self.features.links && room && self.backlog.is_empty()) {
            op.then = None;
            let key = self.ops.insert(op);
            return self.submit(read.user_data(key as u64));
        }
        let key = self.ops.insert(op) as u64;
        self.submit(read.flags(squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS).user_data(key | LINKED));
        self.submit(write.user_data(key));
    }

    fn flush_backlog(&mut self) {
        let mut backlog = std::mem::take(&mut self.backlog);
        for entry in backlog.drain(..) {
            self.submit(entry);
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
        // A sink takes no non-blocking write, so the first attempt would only be lost time.
        if kind == Kind::Write { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }

    /// Enters the kernel once: submits, and waits for `want` completions.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
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

    /// Takes what has completed.
    fn reap(&mut self, done: &mut Vec<Done>, ready: &mut Ready) {
        loop {
            let mut cqes = std::mem::take(&mut self.cqes);
            cqes.clear();
            cqes.extend(self.ring.0.completion().take(REAP_BATCH));
            for cqe in &cqes {
                self.complete(cqe, done, ready);
            }
            let more = cqes.len() == REAP_BATCH;
            self.cqes = cqes;
            if !more {
                return;
            }
        }
    }

    fn complete(&mut self, cqe: &cqueue::Entry, done: &mut Vec<Done>, ready: &mut Ready) {
        let user_data = cqe.user_data();
        if user_data == REQUESTS || user_data == WAKE {
            ready.requests |= user_data == REQUESTS;
            ready.woken |= user_data == WAKE;
            if !cqueue::more(cqe.flags()) {
                self.arm(user_data);
            }
        } else if let Some(op) = usize::try_from(user_data & !(NOWAIT | LINKED)).ok().and_then(|key| self.ops.try_remove(key)) {
            let mut result = cqe.result();
            if user_data & NOWAIT != 0 && result == -libc::EOPNOTSUPP {
                self.receive_nowait = false;
                result = -libc::EINTR;
            }
            done.push(Done { copied: op.then.is_some() && user_data & LINKED == 0, op, result });
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
        // Without `RWF_NOWAIT` the ring itself would wait for a file that can be polled, `O_NONBLOCK` or not
        // (`io_rw_init_file`). One that refuses the flag, as cachefiles' device, never waits; nothing was read of it.
        let nowait = if op.kind == Kind::Receive && self.receive_nowait { NOWAIT } else { 0 };
        let key = self.ops.insert(op);
        self.submit(entry.user_data(key as u64 | nowait));
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<Ready> {
        let mut ready = Ready::default();
        self.flush_backlog();
        let idle = self.backlog.is_empty() && timeout != Some(Duration::ZERO);
        let entered = self.enter(usize::from(idle), timeout);
        self.reap(done, &mut ready);
        entered?;
        // The kernel runs at most 20 deferred completions beyond those waited for in one call.
        while self.ring.0.submission().taskrun() {
            self.enter(0, None)?;
            self.reap(done, &mut ready);
        }
        Ok(ready)
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

/// The best ring that this kernel makes, disabled so that it can be restricted, and what it is called.
fn build(depth: u32) -> io::Result<(IoUring, &'static str)> {
    let entries = (depth + 8).next_power_of_two();
    let base = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(entries * 4).setup_clamp().setup_r_disabled();
        builder
    };
    let mut attempts: [(&str, io_uring::Builder); 5] = [
        ("single issuer, deferred task work, no submission array", base()),
        ("single issuer, deferred task work", base()),
        ("single issuer, cooperative task work", base()),
        ("cooperative task work", base()),
        ("plain", base()),
    ];
    attempts[0].1.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_no_sqarray();
    attempts[1].1.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    attempts[2].1.setup_submit_all().setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
    attempts[3].1.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    let mut last = io::Error::from(Errno::ENOSYS);
    for (mode, builder) in attempts {
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, mode)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// How operations may be modified.
const ALLOWED_FLAGS: squeue::Flags =
    squeue::Flags::FIXED_FILE.union(squeue::Flags::ASYNC).union(squeue::Flags::IO_LINK).union(squeue::Flags::SKIP_SUCCESS);

/// All that a ring may do once it is enabled.
fn allowed() -> [Restriction; 11] {
    [
        Restriction::sqe_op(opcode::ReadFixed::CODE),
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::WriteFixed::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_op(opcode::PollRemove::CODE),
        Restriction::sqe_op(opcode::AsyncCancel::CODE),
        Restriction::sqe_flags_allowed(ALLOWED_FLAGS.bits()),
        Restriction::register_op(REGISTER_FILES_UPDATE),
        Restriction::register_op(REGISTER_IOWQ_AFF),
        Restriction::register_op(REGISTER_IOWQ_MAX_WORKERS),
    ]
}

/// Says in one line who refused a ring and what to do: sysctl, seccomp, memory limit or the kernel itself.
#[must_use]
pub fn explain(error: &io::Error) -> String {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let seccomp = status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"));
    reason(error.raw_os_error().unwrap_or(0), disabled.as_deref().map(str::trim), seccomp)
}

fn reason(errno: i32, disabled: Option<&str>, seccomp: bool) -> String {
    match (Errno::from_raw(errno), disabled) {
        (Errno::EPERM, Some(mode @ ("1" | "2"))) => {
            format!("io_uring is switched off by the sysctl kernel.io_uring_disabled={mode}; allow it with: sysctl -w kernel.io_uring_disabled=0")
        }
        (Errno::EPERM | Errno::ENOSYS, _) if seccomp => {
            "io_uring is refused by a seccomp filter (container runtimes' default profiles do that); allow io_uring_setup, io_uring_enter and io_uring_register in the profile".into()
        }
        (Errno::ENOSYS, _) => "this kernel has no io_uring; it needs CONFIG_IO_URING=y".into(),
        (Errno::ENOMEM, _) => "no memory may be locked for io_uring; raise LimitMEMLOCK= or grant CAP_IPC_LOCK".into(),
        (errno, _) => format!("io_uring_setup failed: {errno}"),
    }
}

/// Tries to make a ring as a shard would. `Ok` names its flags, `Err` says who refused.
///
/// # Errors
/// The text of [`explain`].
pub fn probe() -> Result<&'static str, String> {
    build(8).map(|(_, mode)| mode).map_err(|error| explain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::buffers::Buffers;
    use nix::sys::eventfd::EventFd;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    fn ring(buffers: &Buffers, wake: &EventFd) -> Option<Ring> {
        let watch = Watch { requests: None, wake: wake.as_fd() };
        match Ring::new(Settings { depth: 4, receives: 4, workers: 2 }, &buffers.whole(), watch) {
            Ok(ring) => Some(ring),
            Err(error) => {
                eprintln!("not run: {}", explain(&error));
                None
            }
        }
    }

    fn wait_for(ring: &mut Ring, n: usize) -> Vec<(u64, i32)> {
        let mut done = Vec::new();
        for _ in 0..100 {
            if done.len() >= n {
                break;
            }
            ring.wait(Some(Duration::from_millis(100)), &mut done).unwrap();
        }
        done.iter().map(|done| (done.op.key, done.result)).collect()
    }

    #[test]
    fn copies_a_file_through_fixed_files_and_buffers() {
        let (buffers, wake) = (Buffers::new(4, 65536).unwrap(), EventFd::new().unwrap());
        let Some(mut ring) = ring(&buffers, &wake) else { return };
        let data: Vec<u8> = (0..65536u32).map(|i| (i % 251) as u8).collect();
        let (source, sink) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&data, 0).unwrap();
        let (from, to) = (ring.add_file(source.as_fd()), ring.add_file(sink.as_fd()));
        ring.push(Op { key: 7, kind: Kind::Read, file: from, offset: 0, memory: buffers.slot(1, 0, 65536), then: None });
        assert_eq!(wait_for(&mut ring, 1), [(7, 65536)]);
        ring.push(Op { key: 8, kind: Kind::Write, file: to, offset: 4096, memory: buffers.slot(1, 0, 65536), then: None });
        assert_eq!(wait_for(&mut ring, 1), [(8, 65536)]);
        let mut got = vec![0; 65536];
        sink.read_exact_at(&mut got, 4096).unwrap();
        assert!(got == data);
        ring.remove_file(from);
        ring.remove_file(to);
    }

    #[test]
    fn a_write_follows_its_read_by_itself_if_that_gave_everything() {
        let (buffers, wake) = (Buffers::new(4, 65536).unwrap(), EventFd::new().unwrap());
        let Some(mut ring) = ring(&buffers, &wake) else { return };
        let (source, sink) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&[7; 8192], 0).unwrap();
        let (file, to) = (FileRef::plain(source.as_fd()), FileRef::plain(sink.as_fd()));
        for (slot, offset) in [(0, 0), (1, 4096)] {
            let memory = buffers.slot(slot, 0, 8192);
            ring.push(Op { key: slot.into(), kind: Kind::Read, file, offset, memory, then: Some((to, 4096)) });
        }
        let mut done = Vec::new();
        while done.len() < 2 {
            ring.wait(Some(Duration::from_millis(100)), &mut done).unwrap();
        }
        let mut ended: Vec<_> = done.iter().map(|done| (done.op.key, done.result, done.copied)).collect();
        ended.sort_unstable();
        let copied = ring.features().links;
        assert_eq!(ended, [(0, 8192, copied), (1, 4096, false)]);
        assert!(ring.ops.is_empty() && ring.wait(Some(Duration::from_millis(20)), &mut done).is_ok() && done.len() == 2);
        assert_eq!(sink.metadata().unwrap().len(), if copied { 12288 } else { 0 });
    }

    #[test]
    fn messages_come_in_order_and_an_empty_device_is_not_waited_for() {
        let (buffers, wake) = (Buffers::new(5, 4096).unwrap(), EventFd::new().unwrap());
        let Some(mut ring) = ring(&buffers, &wake) else { return };
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        // A file that cannot say that it is empty, as cachefiles' device.
        let plain = std::fs::File::open("/proc/version").unwrap();
        for len in 1..=3 {
            theirs.send(&[0; 3][..len]).unwrap();
        }
        let mut receive = |fd: BorrowedFd<'_>, n: u32| {
            for key in 0..n {
                let memory = buffers.slot(key, 0, 1024);
                ring.push(Op { key: key.into(), kind: Kind::Receive, file: FileRef::plain(fd), offset: 0, memory, then: None });
            }
            let mut done = Vec::new();
            ring.wait(Some(Duration::ZERO), &mut done).unwrap();
            done.iter().map(|done| (done.op.key, done.result)).collect::<Vec<_>>()
        };
        let empty = -libc::EAGAIN;
        assert_eq!(receive(ours.as_fd(), 5), [(0, 1), (1, 2), (2, 3), (3, empty), (4, empty)]);
        assert_eq!(receive(plain.as_fd(), 2), [(0, -libc::EINTR), (1, -libc::EINTR)]);
        assert!(receive(plain.as_fd(), 1)[0].1 > 0);
    }

    #[test]
    fn a_wake_up_ends_the_wait_and_can_be_repeated() {
        let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
        let Some(mut ring) = ring(&buffers, &wake) else { return };
        for _ in 0..3 {
            wake.write(1).unwrap();
            let mut woken = false;
            for _ in 0..100 {
                woken |= ring.wait(Some(Duration::from_millis(100)), &mut Vec::new()).unwrap().woken;
                if woken {
                    break;
                }
            }
            assert!(woken);
            wake.read().unwrap();
        }
    }

    #[test]
    fn an_operation_that_is_not_needed_is_forbidden() {
        let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
        let Some(mut ring) = ring(&buffers, &wake) else { return };
        if !ring.features().restricted {
            return eprintln!("not run: this kernel does not restrict rings");
        }
        ring.submit(opcode::Nop::new().build().user_data(3));
        ring.enter(1, Some(Duration::from_secs(5))).unwrap();
        let results: Vec<_> = ring.ring.0.completion().filter(|cqe| cqe.user_data() == 3).map(|cqe| cqe.result()).collect();
        assert_eq!(results, [-libc::EACCES]);
    }

    #[test]
    fn more_operations_than_the_queue_holds_are_all_done() {
        let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
        let Some(mut ring) = ring(&buffers, &wake) else { return };
        let file = tempfile::tempfile().unwrap();
        let to = ring.add_file(file.as_fd());
        for key in 0..100 {
            ring.push(Op { key, kind: Kind::Write, file: to, offset: key * 4096, memory: buffers.zeros(4096), then: None });
        }
        let mut keys: Vec<_> = wait_for(&mut ring, 100).iter().map(|done| done.0).collect();
        keys.sort_unstable();
        assert_eq!(keys, (0..100).collect::<Vec<_>>());
    }

    /// The kernel keeps completions that the queue has no room for (`IORING_FEAT_NODROP`).
    #[test]
    fn fault_completions_that_overflow_the_queue_are_not_lost() {
        let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
        let Some(mut ring) = ring(&buffers, &wake) else { return };
        let capacity = ring.ring.0.params().cq_entries() as u64;
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let from = ring.add_file(file.as_fd());
        let count = 4 * capacity;
        for key in 0..count {
            ring.push(Op { key, kind: Kind::Read, file: from, offset: 0, memory: buffers.slot(0, 0, 4096), then: None });
        }
        // Nothing is taken out meanwhile.
        for _ in 0..count {
            ring.flush_backlog();
            ring.enter(0, None).unwrap();
        }
        assert!(ring.ring.0.submission().cq_overflow(), "{count} completions fit into {capacity}");
        let mut done = wait_for(&mut ring, usize::try_from(count).unwrap());
        done.sort_unstable();
        assert_eq!(done, (0..count).map(|key| (key, 4096)).collect::<Vec<_>>());
    }

    #[test]
    fn a_refusal_names_who_refused() {
        assert!(reason(libc::EPERM, Some("2"), false).contains("kernel.io_uring_disabled=2"));
        assert!(reason(libc::EPERM, Some("0"), true).contains("seccomp"));
        assert!(reason(libc::ENOSYS, None, true).contains("seccomp"));
        assert!(reason(libc::ENOSYS, None, false).contains("CONFIG_IO_URING"));
        assert!(reason(libc::ENOMEM, Some("0"), false).contains("MEMLOCK"));
    }
}
