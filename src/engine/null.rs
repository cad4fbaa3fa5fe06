//! No I/O at all, for measuring the engine itself: every operation has ended well when it was pushed, and touched nothing.
//!
//! The rest of the shard is the real one. A message is asked for without read(2): its front end is told that it came, with
//! no bytes, and knows by itself whether there is one.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::edges::Edges;
use super::io::{Done, FileRef, Io, Kind, Op, Ready, Watch};

/// See the module's description.
#[derive(Debug)]
pub(super) struct Null {
    ended: Vec<Done>,
    edges: Edges,
}

impl Null {
    /// # Errors
    /// No descriptor could be had.
    pub(super) fn new(watch: Watch<'_>) -> io::Result<Self> {
        Ok(Self { ended: Vec::new(), edges: Edges::new(watch)? })
    }
}

impl Io for Null {
    fn add_file(&mut self, fd: BorrowedFd<'_>) -> FileRef {
        FileRef::plain(fd)
    }

    fn remove_file(&mut self, _: FileRef) {}

    fn push(&mut self, op: Op) {
        let len = if op.kind == Kind::Receive { 0 } else { op.memory.len() };
        self.ended.push(Done { copied: op.then.is_some(), result: i32::try_from(len).unwrap_or(i32::MAX), op });
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<Ready> {
        if self.ended.is_empty() {
            return Ok(self.edges.wait(timeout)?.0);
        }
        done.append(&mut self.ended);
        Ok(Ready::default())
    }
}
