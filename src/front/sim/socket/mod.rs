//! The model kernel on a socket: the whole daemon, with real descriptors and real I/O, without root.
//!
//! A `SOCK_SEQPACKET` pair keeps the borders of messages like the device does. The kernel's end sends the
//! messages of cachefiles byte for byte, an OPEN with its sink (a memfd) beside it. The daemon's end answers
//! with text: `copen` as it would write to the device, and [`complete`] in place of the ioctl.
//!
//! Other than a real sink a memfd takes unaligned writes, and takes them without blocking.

mod front;
mod kernel;
mod link;

pub use front::SocketFront;
pub use kernel::{ReadError, SocketKernel};

/// The packet that stands for the ioctl `READ_COMPLETE` on a descriptor of `object`.
#[must_use]
pub fn complete(object: u32, msg_id: u32) -> String {
    format!("complete {object},{msg_id}")
}

/// What the daemon's end sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answered {
    /// An OPEN has its answer: a size, or a negative errno.
    Open {
        /// Which OPEN.
        msg_id: u32,
        /// Size in bytes, or a negative errno.
        size: i64,
    },
    /// A READ is complete.
    Read {
        /// Whose descriptor was used.
        object: u32,
        /// Which READ.
        msg_id: u32,
    },
}

impl Answered {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (verb, rest) = str::from_utf8(bytes).ok()?.split_once(' ')?;
        let (first, second) = rest.split_once(',')?;
        match verb {
            "copen" => Some(Self::Open { msg_id: first.parse().ok()?, size: second.parse().ok()? }),
            "complete" => Some(Self::Read { object: first.parse().ok()?, msg_id: second.parse().ok()? }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::front::cachefiles::command;

    #[test]
    fn the_kernel_understands_what_the_daemon_sends() {
        let opened = command::copen(7, 4096).unwrap();
        assert_eq!(Answered::parse(opened.as_bytes()), Some(Answered::Open { msg_id: 7, size: 4096 }));
        let refused = command::refuse(u32::MAX, Errno::ENOENT);
        assert_eq!(Answered::parse(refused.as_bytes()), Some(Answered::Open { msg_id: u32::MAX, size: -2 }));
        assert_eq!(Answered::parse(complete(3, 0).as_bytes()), Some(Answered::Read { object: 3, msg_id: 0 }));
        for noise in [&b""[..], b"copen 1", b"copen ,", b"complete 1,-1", b"\xff 1,1"] {
            assert_eq!(Answered::parse(noise), None);
        }
    }
}
