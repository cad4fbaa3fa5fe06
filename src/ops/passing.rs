//! Passing a descriptor to another process, over a Unix socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use crate::front::cachefiles::take_over;

/// Descriptors that are looked for in one message. Whoever sends more gets none of them taken.
const FDS_MAX: usize = 4;

/// Sends bytes over a connected socket and, if there is one, a descriptor; the other side gets a duplicate.
///
/// # Errors
/// Those of sendmsg(2).
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let raw: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    send_all(socket, bytes, &raw, MsgFlags::empty())
}

/// The same with any number of descriptors, which must be open.
pub(super) fn send_all(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd], flags: MsgFlags) -> Result<(), Errno> {
    let control = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &control[..] };
    loop {
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags | MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}

/// Receives what one [`send`] sent; with 0 bytes, the other side is gone. The descriptor is closed on exec.
///
/// # Errors
/// Those of recvmsg(2), `EAGAIN` if the socket has a timeout and that is over; `EPROTO` for more descriptors than one.
pub fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut control = cmsg_space!([RawFd; FDS_MAX]);
    let mut parts = [IoSliceMut::new(bytes)];
    let message = loop {
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    };
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // The kernel has just installed them for this message: nobody else owns them.
            fds.extend(raw.into_iter().filter_map(|raw| take_over(raw).ok()));
        }
    }
    if fds.len() > 1 {
        return Err(Errno::EPROTO);
    }
    Ok((message.bytes, fds.pop()))
}
