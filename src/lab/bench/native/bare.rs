//! The limit: a ring that reads events and answers them, and does nothing else. An answer is linked to the closing of its
//! event's descriptor, and all of a batch, with the next read, goes to the kernel by the io_uring_enter that waits for events.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, cqueue, opcode};

use crate::front::fanotify::wire::{EVENT_BYTES, Events, response};

/// Operations that wait to be given to the kernel at most.
const ENTRIES: u32 = 2048;
/// Events that one read gives at most: their operations, and a few more, are no more than [`ENTRIES`].
const EVENTS_PER_READ: usize = 256;
/// Reads that may have given events which are not all answered.
const BUFFERS: u16 = 4;
/// Answers that may be on their way.
const ANSWERS: usize = 4096;
/// The only file in the ring's table.
const GROUP: Fixed = Fixed(0);
/// The buffers' name, where the kernel picks one.
const BUFFER_GROUP: u16 = 0;
/// What completions carry: this, or the number of an answer whose event's descriptor was closed.
const READ: u64 = u64::MAX;
/// See [`READ`]: operations that say nothing when all is well.
const QUIET: u64 = u64::MAX - 1;

/// The memory of all operations. It is never given back, so that it outlives whatever the kernel does with it.
struct Memory {
    buffers: &'static mut [[u8; EVENTS_PER_READ * EVENT_BYTES]],
    answers: &'static mut [[u8; 8]],
}

/// See the module's description.
pub(super) struct Bare<'a> {
    ring: IoUring,
    memory: Memory,
    /// Answers that are not on their way.
    free: Vec<usize>,
    /// One read gives all there will ever be.
    multishot: bool,
    /// Counts events.
    answered: &'a AtomicU64,
}

impl<'a> Bare<'a> {
    /// A ring for the events of `group`, which must not block.
    ///
    /// # Errors
    /// There is none to be had.
    pub(super) fn new(group: impl AsFd, multishot: bool, answered: &'a AtomicU64) -> io::Result<Self> {
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(ENTRIES)?;
        ring.submitter().register_files(&[group.as_fd().as_raw_fd()])?;
        let memory =
            Memory { buffers: vec![[0; EVENTS_PER_READ * EVENT_BYTES]; BUFFERS.into()].leak(), answers: vec![[0; 8]; ANSWERS].leak() };
        Ok(Self { ring, memory, free: (0..ANSWERS).collect(), multishot, answered })
    }

    /// Answers events until the process ends.
    ///
    /// # Errors
    /// An operation failed.
    pub(super) fn serve(mut self) -> io::Result<Infallible> {
        if self.multishot {
            (0..BUFFERS).try_for_each(|buffer| self.provide(buffer))?;
        }
        self.read()?;
        let mut done = Vec::new();
        loop {
            self.ring.submit_and_wait(1)?;
            done.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result(), entry.flags())));
            for (of, result, flags) in done.drain(..) {
                let len = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))?;
                match of {
                    READ => self.take(len, flags)?,
                    QUIET => {}
                    answer => self.free.push(usize::try_from(answer).map_err(|_| io::ErrorKind::InvalidData)?),
                }
            }
        }
    }

    /// Answers the events that a read gave, and has the next one begin.
    fn take(&mut self, len: usize, flags: u32) -> io::Result<()> {
        let buffer = if self.multishot { cqueue::buffer_select(flags).unwrap_or(0) } else { 0 };
        let bytes = self.memory.buffers[usize::from(buffer)];
        let mut count = 0;
        for fd in Events::new(&bytes[..len]).filter_map(|event| event.fd) {
            self.answer(fd)?;
            count += 1;
        }
        self.answered.fetch_add(count, Ordering::Relaxed);
        if self.multishot {
            self.provide(buffer)?;
        }
        if self.multishot && cqueue::more(flags) { Ok(()) } else { self.read() }
    }

    fn read(&mut self) -> io::Result<()> {
        let len = u32::try_from(EVENTS_PER_READ * EVENT_BYTES).unwrap_or(0);
        let entry = if self.multishot {
            // The crate (0.7.15) forgets here that the file is one of the table.
            opcode::ReadMulti::new(GROUP, 0, BUFFER_GROUP).build().flags(Flags::FIXED_FILE)
        } else {
            opcode::Read::new(GROUP, self.memory.buffers[0].as_mut_ptr(), len).build()
        };
        self.push(entry.user_data(READ))
    }

    /// Gives the kernel a buffer to put events into.
    fn provide(&mut self, buffer: u16) -> io::Result<()> {
        let memory = &mut self.memory.buffers[usize::from(buffer)];
        let len = i32::try_from(memory.len()).unwrap_or(0);
        let entry = opcode::ProvideBuffers::new(memory.as_mut_ptr(), len, 1, BUFFER_GROUP, buffer).build();
        self.push(entry.flags(Flags::SKIP_SUCCESS).user_data(QUIET))
    }

    fn answer(&mut self, event: RawFd) -> io::Result<()> {
        let number = self.free.pop().ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = &mut self.memory.answers[number];
        *memory = response(event, Ok(()));
        let write = opcode::Write::new(GROUP, memory.as_ptr(), 8).build();
        self.push(write.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS).user_data(QUIET))?;
        self.push(opcode::Close::new(Fd(event)).build().user_data(number as u64))
    }

    fn push(&mut self, entry: Entry) -> io::Result<()> {
        // SAFETY: whatever memory an entry names is part of `Memory`, which is never given back. A buffer is looked at between the
        // completion of its read and the next entry that names it; an answer is changed only while it is free, which it is from
        // the completion of an operation that begins after its write has ended.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::OutOfMemory.into())
    }
}
