//! Waiting without a ring: an epoll instance that tells each edge of what is watched once.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::io::{Ready, SOURCES_MAX, Watch};

/// Sources of requests count from 0.
const WAKE: u64 = u64::MAX;
const OTHER: u64 = u64::MAX - 1;
/// Events taken at a time.
const EVENTS_MAX: usize = SOURCES_MAX + 2;

/// See the module's description.
#[derive(Debug)]
pub(super) struct Edges(Epoll);

impl Edges {
    /// Watches what the caller of an [`super::io::Io`] wants watched.
    ///
    /// # Errors
    /// No descriptor could be had.
    pub(super) fn new(watch: Watch<'_>) -> io::Result<Self> {
        let edges = Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        edges.add(watch.wake, WAKE)?;
        (0..).zip(watch.requests).try_for_each(|(source, requests)| edges.add(*requests, source))?;
        Ok(edges)
    }

    /// Watches another descriptor, which stays open as long as this.
    ///
    /// # Errors
    /// The kernel has no room for it.
    pub(super) fn watch_also(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.add(fd, OTHER)
    }

    fn add(&self, fd: BorrowedFd<'_>, data: u64) -> io::Result<()> {
        Ok(self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, data))?)
    }

    /// Waits until something happens or `timeout` (`None`: for ever) is over. Whether the other descriptor was among it.
    ///
    /// # Errors
    /// Only what makes further work impossible.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<(Ready, bool)> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let timeout = timeout.map_or(EpollTimeout::NONE, |timeout| {
            // Rounded up, so that a deadline is over when the wait is.
            EpollTimeout::try_from(timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32).unwrap_or(EpollTimeout::MAX)
        });
        let n = match self.0.wait(&mut events, timeout) {
            Ok(n) => n,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let (mut ready, mut other) = (Ready::default(), false);
        for event in &events[..n] {
            match event.data() {
                WAKE => ready.woken = true,
                OTHER => other = true,
                source => ready.requests |= 1 << source,
            }
        }
        Ok((ready, other))
    }
}
