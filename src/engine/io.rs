//! How a shard gets its reads and writes done: a trait with two implementations, [`super::ring`] and
//! [`super::blocking`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use super::buffers::Memory;
use crate::front::Reply;

/// Sources of requests that one shard reads, at most.
pub const SOURCES_MAX: usize = 64;
/// Replies that are written at a time at most.
pub const REPLIES_MAX: usize = 64;

/// How long an [`Io`] that is dropped waits for operations that have started.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(1);

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// From a source into memory.
    Read,
    /// From memory to a sink.
    Write,
    /// One message of the front end into memory, by read(2): it never waits. Those pushed together end together,
    /// in their order, before the next [`Io::wait`] does.
    Receive,
}

/// A file that operations name. The descriptor must stay open until [`Io::remove_file`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileRef {
    /// The descriptor.
    pub fd: RawFd,
    /// Its place in the ring's table, if it has one.
    pub slot: Option<u32>,
}

impl FileRef {
    /// A file without a place in a table.
    #[must_use]
    pub fn plain(fd: BorrowedFd<'_>) -> Self {
        Self { fd: fd.as_raw_fd(), slot: None }
    }
}

/// One operation.
#[derive(Debug)]
pub struct Op {
    /// The caller's name for it.
    pub key: u64,
    /// What to do.
    pub kind: Kind,
    /// With which file.
    pub file: FileRef,
    /// Where in the file.
    pub offset: u64,
    /// From or to where.
    pub memory: Memory,
    /// Of a read: where its bytes are written next, if it gives as many as the memory holds.
    pub then: Option<(FileRef, u64)>,
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Done {
    /// The operation, given back.
    pub op: Op,
    /// Bytes, or a negative errno.
    pub result: i32,
    /// It is the result of the write behind a read that gave everything.
    pub copied: bool,
}

/// What else happened while waiting.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Ready {
    /// The sources that may have requests: a bit for each, the lowest for the first one.
    pub requests: u64,
    /// Somebody woke the shard.
    pub woken: bool,
}

/// Descriptors to watch besides the operations, edge-triggered. They stay open as long as the [`Io`] lives.
#[derive(Clone, Copy, Debug)]
pub struct Watch<'a> {
    /// The front end's, on a shard that receives: [`SOURCES_MAX`] at most.
    pub requests: &'a [BorrowedFd<'a>],
    /// The shard's own.
    pub wake: BorrowedFd<'a>,
}

/// Runs operations. One thread uses it; the caller keeps at most as many operations in flight as it said
/// when it was made. Once it was dropped no operation starts, so files may be closed then; what hangs in the
/// kernel keeps its memory and its file by itself.
pub trait Io {
    /// Announces a file that will be used often.
    fn add_file(&mut self, fd: BorrowedFd<'_>) -> FileRef;

    /// Forgets a file, so that nothing here keeps it open any more.
    fn remove_file(&mut self, file: FileRef);

    /// Takes an operation. It may start at once or with the next [`Io::wait`].
    fn push(&mut self, op: Op);

    /// Writes `replies`, [`REPLIES_MAX`] at most, in this order, and fills `results` with what write(2) would have given for each, or a
    /// negative errno. `false`: it cannot, and nothing was written.
    fn reply(&mut self, _replies: &[Reply], _results: &mut Vec<i32>) -> bool {
        false
    }

    /// The source of this place was read until there was nothing: what comes now is to be told of, once at least. Only where it is
    /// not watched all the time.
    fn watch(&mut self, _source: usize) {}

    /// Closes a descriptor, with the next call that enters the kernel at the latest.
    fn close(&mut self, fd: OwnedFd) {
        drop(fd);
    }

    /// Starts what was pushed and waits until something happens or `timeout` (`None`: for ever) is over.
    /// Operations that ended are appended to `done`, also when this fails.
    ///
    /// # Errors
    /// Only what makes further work impossible.
    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<Ready>;
}
