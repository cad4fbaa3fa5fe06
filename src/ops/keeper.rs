//! The keeper: a tiny process that holds the bound device while no daemon does, for hosts without systemd.
//!
//! The daemon starts it as `infill keeper`, in a session of its own, with a listening socket for its standard input.
//! A message is one byte, perhaps with a descriptor; so is the answer. This must stay as it is: the keeper of an older
//! version goes on when infill is upgraded. Nothing else is in the keeper that could fail: it reads no files, starts
//! no threads, and gives the device only to its own user and to root.
//!
//! | message | answer |
//! |---|---|
//! | [`KEEP`] with the device | [`DONE`]: it is held |
//! | [`TAKE`] | [`DONE`] with the device, or [`NOTHING`] |
//! | [`RELEASE`] | [`DONE`]; the keeper ends, and with it its hold on the device |

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Uid, close, setsid};

use super::passing;

/// Hold this.
const KEEP: u8 = b'k';
/// Give me what you hold.
const TAKE: u8 = b't';
/// End.
const RELEASE: u8 = b'r';
/// It is done.
const DONE: u8 = b'+';
/// There is nothing, or no sense in it.
const NOTHING: u8 = b'-';

/// The verb that makes a process a keeper.
const VERB: &str = "keeper";
/// How long a keeper may take to answer: so many waits. It may have to be started first, on a host with no CPU to spare, and
/// before it says that it has let go it closes what it held: the kernel then ends all use of the cache, or each group of events
/// after the other. To give up early costs the mounts that it keeps; to ask both in turn takes less than the 90 s that systemd
/// gives a start.
const WAITS_MAX: u32 = 30;
/// One of them. A machine that stood still meanwhile, such as a virtual one that was moved, costs one and not all.
const WAIT: Duration = Duration::from_secs(1);
/// How long a keeper waits for its first message before it ends.
const FIRST_MESSAGE_MS: u16 = 10_000;
/// Connections at a time: the daemon's, and those of verbs. More wait.
const CONNECTIONS_MAX: usize = 8;
/// As unlikely to be killed when memory runs out as a process can be that still may be.
const OOM_SCORE: &str = "-999";
/// Descriptors of a keeper that it did not open itself.
const STANDARD_FDS: RawFd = 3;

/// Why a keeper is of no use.
#[derive(Debug, thiserror::Error)]
#[error("the keeper at {}: {what}: {source}", socket.display())]
pub struct KeeperError {
    socket: PathBuf,
    what: &'static str,
    source: io::Error,
}

/// The daemon's side: a connection to a keeper, which tells by its end when the keeper has died.
#[derive(Debug)]
pub struct Keeper {
    socket: PathBuf,
    connection: UnixStream,
    /// If this process started it.
    child: Option<Child>,
}

impl Keeper {
    /// The keeper that listens at `socket`, if there is one. The socket must be in a directory where nobody else may
    /// write: whoever listens there is believed.
    ///
    /// # Errors
    /// Something listens there, but it cannot be reached.
    pub fn find(socket: &Path) -> Result<Option<Self>, KeeperError> {
        let failed = |what, source: io::Error| KeeperError { socket: socket.to_owned(), what, source };
        let connection = match UnixStream::connect(socket) {
            Ok(connection) => connection,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => return Ok(None),
            Err(error) => return Err(failed("cannot connect to it", error)),
        };
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&connection, Some(WAIT)).map_err(|error| failed("cannot limit the wait for it", error))?;
        }
        Ok(Some(Self { socket: socket.to_owned(), connection, child: None }))
    }

    /// Starts a keeper that listens at `socket` and holds `device`.
    ///
    /// # Errors
    /// No process, no socket, or the new process does not answer.
    pub fn start(socket: &Path, device: BorrowedFd<'_>) -> Result<Self, KeeperError> {
        let failed = |what| {
            let socket = socket.to_owned();
            move |source| KeeperError { socket, what, source }
        };
        // What is there is the socket of a keeper that is dead.
        let _ = fs::remove_file(socket);
        let listener = UnixListener::bind(socket).map_err(failed("cannot make the socket"))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("infill").arg(VERB).env_clear().current_dir("/");
        command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(failed("cannot start it"))?;
        // With our end of the listening socket: a keeper that is dead must not look alive.
        drop(command);
        let mut keeper = Self::find(socket)?.ok_or_else(|| failed("it has ended")(io::ErrorKind::ConnectionRefused.into()))?;
        keeper.child = Some(child);
        match keeper.keep(device) {
            Ok(()) => Ok(keeper),
            // Left alone, it might get the device later, and hold it for nobody.
            Err(error) => {
                keeper.bury();
                Err(error)
            }
        }
    }

    /// Makes it hold `device`, and nothing else.
    ///
    /// # Errors
    /// It does not answer.
    pub fn keep(&self, device: BorrowedFd<'_>) -> Result<(), KeeperError> {
        self.ask(KEEP, Some(device)).map(drop)
    }

    /// What it holds.
    ///
    /// # Errors
    /// It does not answer.
    pub fn take(&self) -> Result<Option<OwnedFd>, KeeperError> {
        self.ask(TAKE, None)
    }

    /// Makes it let go of the device, and end.
    ///
    /// # Errors
    /// It does not answer; if it is dead, that is as good.
    pub fn release(mut self) -> Result<(), KeeperError> {
        self.ask(RELEASE, None)?;
        let _ = fs::remove_file(&self.socket);
        self.reap();
        Ok(())
    }

    /// Whether it has died, or as good as that.
    #[must_use]
    pub fn has_died(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Takes leave of a keeper that has died, or is of no use.
    pub fn bury(mut self) {
        if let Some(child) = &mut self.child {
            // It may only have closed the connection, or be late.
            let _ = child.kill();
        }
        self.reap();
    }

    fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    fn ask(&self, message: u8, fd: Option<BorrowedFd<'_>>) -> Result<Option<OwnedFd>, KeeperError> {
        let failed = |what, errno: Errno| KeeperError { socket: self.socket.clone(), what, source: errno.into() };
        passing::send(self.connection.as_fd(), &[message], fd).map_err(|errno| failed("cannot ask it", errno))?;
        let mut answer = [0];
        match self.wait_for(&mut answer) {
            Err(errno) => Err(failed("it does not answer", errno)),
            Ok((0, _)) => Err(failed("it has ended", Errno::EPIPE)),
            Ok((_, fd)) if answer == [DONE] => Ok(fd),
            Ok(_) if message == TAKE => Ok(None),
            Ok(_) => Err(failed("it refuses", Errno::EPROTO)),
        }
    }

    fn wait_for(&self, answer: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
        for _ in 1..WAITS_MAX {
            match passing::receive(self.connection.as_fd(), answer) {
                Err(Errno::EAGAIN) => {}
                result => return result,
            }
        }
        passing::receive(self.connection.as_fd(), answer)
    }
}

/// Readable when the keeper has died.
impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// Whether the other side is this user or root.
fn is_trusted(connection: BorrowedFd<'_>) -> bool {
    getsockopt(&connection, sockopt::PeerCredentials)
        .is_ok_and(|peer| [Uid::effective(), Uid::from_raw(0)].contains(&Uid::from_raw(peer.uid())))
}

/// `infill keeper`: holds the device until it is told to let go.
///
/// # Errors
/// It was not started by a daemon.
pub fn main() -> io::Result<()> {
    detach();
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Fails if standard input is no listening socket: somebody tried the verb by hand.
    listener.local_addr()?;
    Hold { listener, connections: Vec::new(), device: None }.run(FIRST_MESSAGE_MS.into())
}

/// Leaves the daemon's terminal, signals and descriptors behind. What is not possible is not needed.
fn detach() {
    let _ = setsid();
    // The daemon blocks those that it reads from a descriptor, and a program that is started inherits that: systemd
    // would wait for this one in vain whenever it stops the unit. Only a hangup means nobody but terminals.
    let _ = SigSet::from(Signal::SIGHUP).thread_set_mask();
    let listed = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let fds: Vec<RawFd> = listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // Above all descriptors of objects, which the kernel installs without O_CLOEXEC and which a daemon that starts a
    // keeper may just have got: here they would keep the objects open for ever. (That of the listing is closed.)
    for fd in fds.into_iter().filter(|fd| *fd >= STANDARD_FDS) {
        let _ = close(fd);
    }
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT));
}

/// What a keeper is made of.
struct Hold {
    listener: UnixListener,
    connections: Vec<UnixStream>,
    device: Option<OwnedFd>,
}

impl Hold {
    fn run(mut self, first: PollTimeout) -> io::Result<()> {
        loop {
            let timeout = if self.device.is_none() && self.connections.is_empty() { first } else { PollTimeout::NONE };
            let ready = self.wait(timeout)?;
            if ready.is_empty() {
                return Ok(());
            }
            // From the last on, so that the places of the others stay as they are.
            for place in ready.into_iter().rev() {
                match place.checked_sub(1) {
                    None => self.accept(),
                    Some(at) if !self.serve(at) => return Ok(()),
                    Some(_) => {}
                }
            }
        }
    }

    /// Places that have something: 0 the listener, then the connections.
    fn wait(&self, timeout: PollTimeout) -> io::Result<Vec<usize>> {
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.connections.iter().map(|connection| PollFd::new(connection.as_fd(), PollFlags::POLLIN)));
        if self.connections.len() >= CONNECTIONS_MAX {
            fds[0].set_events(PollFlags::empty());
        }
        while let Err(errno) = poll(&mut fds, timeout) {
            if errno != Errno::EINTR {
                return Err(errno.into());
            }
        }
        let has_something = |(place, fd): (usize, &PollFd<'_>)| fd.any().unwrap_or(true).then_some(place);
        Ok(fds.iter().enumerate().filter_map(has_something).collect())
    }

    fn accept(&mut self) {
        if let Ok((connection, _)) = self.listener.accept()
            && is_trusted(connection.as_fd())
        {
            self.connections.push(connection);
        }
    }

    /// Answers one message; `false` if it was the last.
    fn serve(&mut self, at: usize) -> bool {
        let mut message = [0];
        let (len, fd) = passing::receive(self.connections[at].as_fd(), &mut message).unwrap_or((0, None));
        let answer = match (len, message[0], fd) {
            (0, ..) => {
                self.connections.swap_remove(at);
                return self.device.is_some() || !self.connections.is_empty();
            }
            (_, KEEP, Some(device)) => {
                self.device = Some(device);
                (DONE, None)
            }
            (_, TAKE, None) if self.device.is_some() => (DONE, self.device.as_ref().map(AsFd::as_fd)),
            (_, RELEASE, None) => {
                self.device = None;
                (DONE, None)
            }
            _ => (NOTHING, None),
        };
        // Who does not wait for the answer does not get it.
        let _ = passing::send(self.connections[at].as_fd(), &[answer.0], answer.1);
        message[0] != RELEASE
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;

    /// A keeper that is a thread of the test.
    fn keeper(socket: &Path) -> std::thread::JoinHandle<io::Result<()>> {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || Hold { listener, connections: Vec::new(), device: None }.run(FIRST_MESSAGE_MS.into()))
    }

    #[test]
    fn what_is_kept_outlives_the_one_who_gave_it_until_it_is_released() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        assert!(Keeper::find(&socket).unwrap().is_none());
        let thread = keeper(&socket);
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let first = Keeper::find(&socket).unwrap().unwrap();
        assert!(first.take().unwrap().is_none());
        first.keep(theirs.as_fd()).unwrap();
        assert!(!first.has_died());
        drop((first, theirs));
        for _ in 0..2 * CONNECTIONS_MAX {
            let next = Keeper::find(&socket).unwrap().unwrap();
            nix::unistd::write(next.take().unwrap().unwrap(), b"x").unwrap();
        }
        let last = Keeper::find(&socket).unwrap().unwrap();
        assert_eq!(
            last.ask(b'?', None).unwrap_err().to_string(),
            format!("the keeper at {}: it refuses: Protocol error (os error 71)", socket.display())
        );
        let other = Keeper::find(&socket).unwrap().unwrap();
        last.release().unwrap();
        thread.join().unwrap().unwrap();
        assert!(other.has_died());
        // Nobody holds the pipe's end any more.
        let mut text = Vec::new();
        File::from(ours).read_to_end(&mut text).unwrap();
        assert_eq!(text.len(), 2 * CONNECTIONS_MAX);
        assert!(Keeper::find(&socket).unwrap().is_none());
    }

    #[test]
    fn a_keeper_that_got_nothing_ends_with_its_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let thread = keeper(&socket);
        drop(Keeper::find(&socket).unwrap().unwrap());
        thread.join().unwrap().unwrap();
    }

    /// Any byte, with or without a descriptor: the keeper answers, and does what it says in the table and nothing else.
    #[test]
    fn every_message_is_answered_and_none_loses_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let thread = keeper(&socket);
        let (_reader, device) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let daemon = Keeper::find(&socket).unwrap().unwrap();
        daemon.keep(device.as_fd()).unwrap();
        let other = File::open("/dev/null").unwrap();
        for message in (0..=u8::MAX).filter(|message| *message != RELEASE) {
            for fd in [None, Some(other.as_fd())] {
                passing::send(daemon.as_fd(), &[message], fd).unwrap();
                let mut answer = [0];
                let (len, given) = passing::receive(daemon.as_fd(), &mut answer).unwrap();
                let expected = match (message, fd) {
                    (KEEP, Some(_)) | (TAKE, None) => DONE,
                    _ => NOTHING,
                };
                assert_eq!((len, answer), (1, [expected]), "{message}, {fd:?}");
                assert_eq!(given.is_some(), (message, fd.is_some()) == (TAKE, false));
            }
            // It was the one message that gives it another.
            if message == KEEP {
                daemon.keep(device.as_fd()).unwrap();
            }
        }
        // More descriptors than there can be end the connection, and are all closed.
        let raw = [other.as_raw_fd(), other.as_raw_fd()];
        let control = [nix::sys::socket::ControlMessage::ScmRights(&raw)];
        let parts = [io::IoSlice::new(&[KEEP])];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<nix::sys::socket::UnixAddr>(daemon.as_fd().as_raw_fd(), &parts, &control, flags, None).unwrap();
        assert_eq!(passing::receive(daemon.as_fd(), &mut [0]).unwrap().0, 0);
        let next = Keeper::find(&socket).unwrap().unwrap();
        let kept = nix::sys::stat::fstat(next.take().unwrap().unwrap()).unwrap();
        assert_eq!(kept.st_ino, nix::sys::stat::fstat(&device).unwrap().st_ino);
        next.release().unwrap();
        thread.join().unwrap().unwrap();
    }
}
