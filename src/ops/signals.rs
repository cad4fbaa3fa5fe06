//! Signals as events: blocked in every thread and read from a descriptor by the main one.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What the operator wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// `SIGTERM` or `SIGINT`: finish what has begun and end. A second one: end now.
    Stop,
    /// `SIGUSR1`: tell the state.
    Report,
    /// `SIGHUP`: read the settings again.
    Reload,
}

/// The signals of this process.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals; to be called before any thread is started, so that all inherit it.
    ///
    /// # Errors
    /// No descriptor could be had.
    pub fn block() -> Result<Self, Errno> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()?;
        SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map(Self)
    }

    /// The next signal that came, if any; does not wait.
    #[must_use]
    pub fn next(&self) -> Option<Event> {
        let info = self.0.read_signal().ok().flatten()?;
        match i32::try_from(info.ssi_signo).map(Signal::try_from) {
            Ok(Ok(Signal::SIGUSR1)) => Some(Event::Report),
            Ok(Ok(Signal::SIGHUP)) => Some(Event::Reload),
            _ => Some(Event::Stop),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
