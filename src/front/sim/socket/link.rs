//! One end of the socket: whole packets.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair};

/// One end.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Two ends.
    ///
    /// # Errors
    /// No descriptors are free.
    pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
    }

    /// The kernel's end.
    pub(super) const fn for_kernel(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The daemon's end, which may have been inherited: reading it never waits.
    ///
    /// # Errors
    /// It is not a descriptor that can be changed.
    pub(super) fn for_daemon(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(fd))
    }

    /// Sends one packet; waits for room.
    ///
    /// # Errors
    /// The other end is gone.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    // A failed wait is tried again with the send.
                    let _ = poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
                }
                result => return Ok(result.map(drop)?),
            }
        }
    }

    /// Receives one packet at the kernel's end, waiting for it. Its length; 0 if the other end is gone.
    ///
    /// # Errors
    /// The socket failed.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.0.as_raw_fd(), buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Ends the connection: whoever waits at either end hears of it.
    pub(super) fn end(&self) {
        // Nothing to do about a failure: it has ended already.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
