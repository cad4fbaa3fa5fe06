//! One end of the socket: packets, and a descriptor beside a packet. The `unsafe` of the simulation is here.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, recvmsg, sendmsg, shutdown, socketpair,
};

/// What one receive gave.
#[derive(Debug)]
pub(super) struct Packet {
    /// How many bytes of the buffer are filled; 0 if the other end is gone.
    pub(super) len: usize,
    /// The descriptor that came with it.
    pub(super) fd: Option<OwnedFd>,
}

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

    /// Takes an end that may have been inherited; sending waits for room from now on.
    ///
    /// # Errors
    /// It is not a descriptor that can be changed.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        Ok(Self(fd))
    }

    /// Sends one packet, with a descriptor beside it if given.
    ///
    /// # Errors
    /// The other end is gone.
    pub(super) fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let raw = fd.map(|fd| [fd.as_raw_fd()]);
        let rights = raw.as_ref().map(|raw| [ControlMessage::ScmRights(raw)]);
        let control = rights.as_ref().map_or(&[][..], |rights| &rights[..]);
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
                Err(Errno::EINTR) => {}
                result => return Ok(result.map(drop)?),
            }
        }
    }

    /// Receives one packet; `None` if there is none and `wait` is false.
    ///
    /// # Errors
    /// The socket failed.
    pub(super) fn receive(&self, buffer: &mut [u8], wait: bool) -> io::Result<Option<Packet>> {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        let mut control = nix::cmsg_space!(RawFd);
        loop {
            let mut parts = [IoSliceMut::new(buffer)];
            match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
                Ok(message) => {
                    let rights = message.cmsgs()?.find_map(|control| match control {
                        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                        _ => None,
                    });
                    // SAFETY: the kernel has just installed this number in our table for this message (there
                    // is room for one only) and tells nobody else, so it is ours to own.
                    let fd = rights.map(|raw| unsafe { OwnedFd::from_raw_fd(raw) });
                    return Ok(Some(Packet { len: message.bytes, fd }));
                }
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
