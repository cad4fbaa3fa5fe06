//! What the log tells an operator to do about a request that failed.

use std::fmt;

use nix::errno::Errno;
use nix::sys::stat::{major, minor};

use super::machine::Delay;
use super::room::NoRoom;

/// A file system, by its number.
pub(super) struct Device(pub(super) u64);

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the file system {}:{} of /proc/self/mountinfo", major(self.0), minor(self.0))
    }
}

/// What is to be done about a request whose time was over.
pub(super) const fn patience(delay: Delay) -> &'static str {
    match delay {
        Delay::Source => {
            "a read of its source has not ended; look at that disk or file server, and at the kernel's log. Nothing has to be restarted when it is back"
        }
        Delay::Sink => "a write to the cache has not ended; look at the disk of the cache directory, and at the kernel's log",
        Delay::Room => "the cache file system has no room; unmount images or free some, and read again",
        Delay::Turn => {
            "its turn did not come, because others are slow or hang; look at that disk or file server, at the disk of the cache directory, and at --slots"
        }
    }
}

/// What is to be done about a request that failed.
pub(super) fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EIO => "its source cannot be read or was truncated; put the whole blob back and read again",
        _ if NoRoom::is_meant_by(errno) => {
            "the cache file system has no room, and nothing in the cache is unused (see bstop, df and quota); unmount images or free some, and read again"
        }
        Errno::ENXIO => "the image asks beyond the end of its blob; the blob in the store is not the image's",
        Errno::ENOENT => "the kernel asked for an object that is not open",
        Errno::EFAULT => "its mapped source was truncated; put the whole blob back and read again",
        _ => "see the error number",
    }
}
