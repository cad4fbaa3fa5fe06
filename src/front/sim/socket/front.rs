//! The daemon's end: a front end like any other.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use super::Answered;
use super::link::Link;
use crate::front::cachefiles::wire::{self, Body, Header, Message};
use crate::front::{Answer, Caps, Found, FrontEnd, FrontError, NeedRequest, ObjectId, OpenRequest, Outcome, Request, Ticket};

/// Alignment that is kept towards the sinks, though files would take anything.
const ALIGN_BYTES: u64 = 4096;

/// A front end whose kernel is at the other end of a socket.
#[derive(Debug)]
pub struct SocketFront {
    link: Arc<Link>,
    /// Where the kernel keeps its sinks.
    dir: PathBuf,
    opens: Arc<dyn Answer>,
    reads: Arc<dyn Answer>,
}

impl std::fmt::Debug for dyn Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answer")
    }
}

impl SocketFront {
    /// Takes the daemon's end of a pair made by [`super::SocketKernel`].
    ///
    /// # Errors
    /// It is no usable descriptor.
    pub fn from_fd(fd: OwnedFd, dir: &Path) -> io::Result<Self> {
        let link = Arc::new(Link::for_daemon(fd)?);
        Ok(Self { dir: dir.to_owned(), opens: Arc::new(Opens(Arc::clone(&link))), reads: Arc::new(Reads(Arc::clone(&link))), link })
    }

    /// Takes the daemon's end that this process was started with, as its standard input.
    ///
    /// # Errors
    /// As [`SocketFront::from_fd`].
    pub fn from_stdin(dir: &Path) -> io::Result<Self> {
        Self::from_fd(io::stdin().as_fd().try_clone_to_owned()?, dir)
    }

    fn open(&self, message: &Message, key: crate::key::Key, sink: RawFd) -> Result<Request, FrontError> {
        let ticket = Ticket::new(Arc::clone(&self.opens), message.msg_id.into());
        match self.sink(sink) {
            Ok(sink) => Ok(Request::Open(OpenRequest { object: ObjectId(message.object_id), key, ticket, sink: Arc::new(sink) })),
            Err(error) => {
                // The ticket cannot be refused by a socket other than by its end, which the next read reports.
                let _ = ticket.answer(Outcome::Failed(Errno::EBADF));
                Err(FrontError::Malformed(format!("the sink {sink} of an OPEN cannot be had: {error}")))
            }
        }
    }

    /// The file that stands for a descriptor.
    fn sink(&self, number: RawFd) -> io::Result<File> {
        File::options().read(true).write(true).open(self.dir.join(number.to_string()))
    }

    /// Answers a message that made no sense, as far as that is possible.
    fn refuse(&self, bytes: &[u8]) {
        let Some(header) = Header::parse(bytes) else { return };
        let answer = if header.is_open() {
            Answered::Open { msg_id: header.msg_id, size: refusal(Errno::EINVAL) }
        } else if header.is_read() {
            Answered::Read { object: header.object_id, msg_id: header.msg_id }
        } else {
            return;
        };
        // As above.
        let _ = send(&self.link, answer);
    }
}

impl FrontEnd for SocketFront {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn caps(&self) -> Caps {
        Caps { align_bytes: ALIGN_BYTES, ..Caps::default() }
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<Found, FrontError> {
        let bytes = match read {
            Ok([]) => {
                let gone = io::Error::new(io::ErrorKind::UnexpectedEof, "the model kernel has closed its end of the socket");
                return Err(FrontError::Broken(gone));
            }
            Ok(bytes) => bytes,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Found::Nothing),
            Err(errno) => return Err(FrontError::Broken(errno.into())),
        };
        let message = wire::parse(bytes).map_err(|error| {
            self.refuse(bytes);
            FrontError::Malformed(error.to_string())
        })?;
        let object = ObjectId(message.object_id);
        requests.push(match &message.body {
            Body::Open { key, fd } => self.open(&message, key.clone(), *fd)?,
            Body::Close => Request::Close(object),
            Body::Read(range) => {
                let token = u64::from(message.object_id) << 32 | u64::from(message.msg_id);
                let ticket = Ticket::new(Arc::clone(&self.reads), token);
                Request::Need(NeedRequest { object, range: range.clone(), ticket })
            }
        });
        Ok(Found::Part)
    }
}

/// Takes answers to OPENs. The token is the message's id.
struct Opens(Arc<Link>);

impl Answer for Opens {
    fn answer(&self, token: u64, outcome: Outcome) -> io::Result<bool> {
        let msg_id = low(token);
        let size = match outcome {
            Outcome::Opened { len_bytes } => i64::try_from(len_bytes).map_err(|_| Errno::EFBIG)?,
            Outcome::Failed(errno) => refusal(errno),
            Outcome::Done => return Err(Errno::EINVAL.into()),
        };
        send(&self.0, Answered::Open { msg_id, size })
    }
}

/// How an OPEN is refused: a negative number, as the kernel takes it.
const fn refusal(errno: Errno) -> i64 {
    -(errno as i64)
}

fn send(link: &Link, answered: Answered) -> io::Result<bool> {
    link.send(answered.to_string().as_bytes()).map(|()| true)
}

/// Takes answers to READs. The token is the object's id above the message's.
struct Reads(Arc<Link>);

impl Answer for Reads {
    fn answer(&self, token: u64, _outcome: Outcome) -> io::Result<bool> {
        send(&self.0, Answered::Read { object: low(token >> 32), msg_id: low(token) })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "takes the halves of a token apart")]
const fn low(token: u64) -> u32 {
    token as u32
}
