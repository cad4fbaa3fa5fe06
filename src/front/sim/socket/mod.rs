//! The model kernel on a socket: the whole daemon, with real descriptors and real I/O, without root.
//!
//! A `SOCK_SEQPACKET` pair keeps the borders of messages like the device does. The kernel's end sends the
//! messages of cachefiles byte for byte; the number of the descriptor in an OPEN is the name of a file in a
//! directory that both know. The daemon's end answers with text: `copen` as it would write to the device, and
//! `complete` in place of the ioctl `READ_COMPLETE`.
//!
//! Other than a real sink a file takes unaligned writes, and takes them without blocking.

mod front;
mod kernel;
mod link;

use std::fmt;

pub use front::SocketFront;
pub use kernel::{ReadError, SocketKernel};

/// Size of the buffer for one answer.
const ANSWER_MAX_BYTES: usize = 64;

/// An answer, as the daemon's end sends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answered {
    /// `copen ID,SIZE`: an OPEN has its answer.
    Open {
        /// Which OPEN.
        msg_id: u32,
        /// Size in bytes, or a negative errno.
        size: i64,
    },
    /// `complete OBJECT,ID`: a READ is complete.
    Read {
        /// Whose descriptor would have been used.
        object: u32,
        /// Which READ.
        msg_id: u32,
    },
}

impl fmt::Display for Answered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { msg_id, size } => write!(f, "copen {msg_id},{size}"),
            Self::Read { object, msg_id } => write!(f, "complete {object},{msg_id}"),
        }
    }
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
    use super::*;

    #[test]
    fn the_kernel_understands_what_the_daemon_sends() {
        let opened = Answered::Open { msg_id: u32::MAX, size: i64::MIN };
        for answered in [opened, Answered::Open { msg_id: 0, size: 1 << 40 }, Answered::Read { object: 3, msg_id: 0 }] {
            let text = answered.to_string();
            assert!(text.len() <= ANSWER_MAX_BYTES);
            assert_eq!(Answered::parse(text.as_bytes()), Some(answered));
        }
        for noise in [&b""[..], b"copen 1", b"copen ,", b"complete 1,-1", b"\xff 1,1"] {
            assert_eq!(Answered::parse(noise), None);
        }
    }
}
