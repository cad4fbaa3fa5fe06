//! The fanotify front end: pre-content events (Linux 6.14) of the files behind file-backed EROFS mounts.
//!
//! A blob's file in the cache directory is sparse and marked; before it is read, the kernel asks. What is there is known to
//! us alone, and it must not be forgotten who asks: when the last descriptor of a group is closed, the kernel lets every
//! reader through to the holes.
//!
//! | file | subject |
//! |---|---|
//! | `wire` | events and answers, as bytes |
//! | `group` | a source of requests, for one shard |
//! | `journal` | what has no answer yet, over the end of the process |
//! | `stale` | events of a process that is dead |
//! | `map` | what a file holds, over crashes and losses of power |
//! | `blob` | a blob's file, as the engine's sink |

mod blob;
mod group;
mod journal;
pub mod map;
mod stale;
pub mod wire;

pub use self::blob::{BlobFile, MAP_SUFFIX};
pub use self::group::Group;

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use self::journal::Journal;
use crate::range::ByteRange;

/// A journal without entries, as [`Group::kept`] gives it.
///
/// # Errors
/// No memory, or no descriptor for it.
pub fn empty_journal() -> io::Result<OwnedFd> {
    Journal::new()?.as_fd().try_clone_to_owned()
}

/// The events in a journal that have no answer: their names, and what they want. It must be that of a process that is dead.
///
/// # Errors
/// It is none, or one of another version.
pub fn unanswered(journal: OwnedFd) -> io::Result<Vec<(RawFd, ByteRange)>> {
    let found = Journal::open(journal)?.take_stock();
    Ok(found.into_iter().map(|event| (event.number, event.range)).collect())
}
