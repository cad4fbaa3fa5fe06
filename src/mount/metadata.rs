//! Whether the kernel asks before EROFS reads *metadata* of a file that is mounted, as it does for data. It does since Linux 7.1
//! ("erofs: verify metadata accesses for file-backed mounts"), which others may have taken over or left out: so a small
//! image is mounted, and seen what is asked.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{Mode, OFlags, openat};

use super::fsmount::{FsMountError, Source, make};
use crate::front::fanotify::Group;
use crate::front::fanotify::map::PAGE_BYTES;
use crate::front::{FrontEnd, MESSAGE_MAX_BYTES, ObjectId, Outcome, Request};
use crate::image::minimal::{FILE, Minimal};
use crate::range::ByteRange;

/// How long the look may take. Then nobody is asked any more, so that whoever waits goes on.
const LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether the image was read, where nothing is asked.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Only ours, as long as it is there at all.
const MODE: u32 = 0o600;

/// Why it could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The kernel gives no group.
    #[error("no fanotify group: {0}")]
    NoGroup(#[source] Errno),
    /// It does not watch the file.
    #[error("a file cannot be watched: {0}")]
    NotWatched(#[source] Errno),
    /// It does not mount the image.
    #[error(transparent)]
    NotMounted(#[from] FsMountError),
    /// The directory, or the image that is mounted.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something hung.
    #[error("it took longer than {} s", LIMIT.as_secs())]
    TimedOut,
}

/// Mounts a small image, from a file in `dir` that has no name, where nobody sees it, and reads it. Whether the kernel asked
/// before each part of the metadata. Nothing is left, not even by a process that is killed meanwhile; and nothing waits, because
/// all of the image is there.
///
/// # Errors
/// See [`MetadataError`].
pub fn is_asked_for(dir: &Path) -> Result<bool, MetadataError> {
    let image = Minimal::new(PAGE_BYTES.max(rustix::param::page_size() as u64));
    let mut file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(MODE).open(dir)?;
    file.write_all(&image.bytes)?;
    let group = Group::new().map_err(MetadataError::NoGroup)?;
    group.mark(file.as_fd(), ObjectId(0), image.bytes.len() as u64).map_err(MetadataError::NotWatched)?;
    let source = Source { image: format!("/proc/self/fd/{}", file.as_raw_fd()).into(), devices: Vec::new(), direct: false };
    let done = AtomicBool::new(false);
    let asked = std::thread::scope(|scope| {
        let answering = scope.spawn(|| answer(group, &done));
        let read = read(&source);
        done.store(true, Ordering::Release);
        let asked = answering.join().unwrap_or(Err(MetadataError::TimedOut));
        read.and(asked)
    })?;
    let covers = |range: &ByteRange, part: &ByteRange| range.start <= part.start && part.end <= range.end;
    Ok(image.metadata.iter().all(|part| asked.iter().any(|range| covers(range, part))))
}

/// Has the kernel read all parts of the image.
fn read(source: &Source) -> Result<(), MetadataError> {
    let (mounted, _) = make(source, None)?;
    let mut file = File::from(openat(&mounted, FILE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from)?);
    file.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Lets readers go on until it is `done`, or at [`LIMIT`] all of them, with the end of the group. Gives what was asked for.
fn answer(group: Group, done: &AtomicBool) -> Result<Vec<ByteRange>, MetadataError> {
    let (began, mut asked, mut buffer) = (Instant::now(), Vec::new(), vec![0; MESSAGE_MAX_BYTES]);
    let mut requests = Vec::new();
    while !done.load(Ordering::Acquire) {
        if began.elapsed() > LIMIT {
            return Err(MetadataError::TimedOut);
        }
        // An interrupted wait is one that was short.
        let _ =
            poll(&mut [PollFd::new(group.requests(), PollFlags::POLLIN)], PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::ZERO));
        if let Ok(len) = nix::unistd::read(group.requests(), &mut buffer) {
            group.parse(Ok(&buffer[..len]), &mut requests).map_err(io::Error::other)?;
        }
        for request in requests.drain(..) {
            if let Request::Need(need) | Request::Present(need) = request {
                asked.push(need.range.clone());
                need.ticket.answer(Outcome::Done)?;
            }
        }
    }
    Ok(asked)
}
