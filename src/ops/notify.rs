//! What systemd is told (sd_notify(3)) and what it keeps for us: its store of descriptors, which outlives the daemon
//! (`FileDescriptorStoreMax=`, and FDSTORE in sd_notify(3)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::pipe2;

use super::passing;
use crate::front::cachefiles::take_over;

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START`).
const PASSED_START: RawFd = 3;
/// How long systemd may take to have read what was sent before.
const BARRIER_MAX: Duration = Duration::from_secs(5);

/// The service manager's socket.
#[derive(Debug)]
pub struct Notify(UnixDatagram);

impl Notify {
    /// The service manager that started this process; `None` if none did, or if its socket cannot be reached.
    #[must_use]
    pub fn from_env() -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
        match Self::connect(name.as_bytes()) {
            Ok(notify) => Some(notify),
            Err(error) => {
                tracing::warn!("cannot reach the service manager at NOTIFY_SOCKET={}: {error}", name.display());
                None
            }
        }
    }

    fn connect(name: &[u8]) -> io::Result<Self> {
        let address = match name.split_first() {
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            Some((b'/', _)) => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        Ok(Self(socket))
    }

    /// Requests are being answered.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The settings are being read again; [`Notify::ready`] must follow (`Type=notify-reload`, systemd.service(5)). The time
    /// tells the manager which of its requests that answers.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()));
    }

    /// The daemon ends.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// All is well, so that the watchdog waits once more (`WatchdogSec=`).
    pub fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    /// What `systemctl status` is to show: one line.
    pub fn status(&self, line: &str) {
        self.tell(&format!("STATUS={line}"));
    }

    /// Nothing is done if nobody listens any more: the daemon serves all the same.
    fn tell(&self, state: &str) {
        if let Err(errno) = passing::send(self.0.as_fd(), state.as_bytes(), None) {
            tracing::debug!("cannot tell the service manager {state}: {errno}");
        }
    }

    /// Has a descriptor kept under a name, and passed to this service's next process. Comes back when the manager has
    /// read the message, so that it has the descriptor whatever happens to this process then. `FDPOLL=0`: it must
    /// not wait for errors on the descriptor, which it would take for its end.
    ///
    /// # Errors
    /// The manager cannot be reached or does not read. Whether it kept the descriptor it does not say.
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        passing::send(self.0.as_fd(), format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0").as_bytes(), Some(fd))?;
        self.barrier()
    }

    /// Has the descriptors of a name forgotten.
    ///
    /// # Errors
    /// See [`Notify::store`].
    pub fn forget(&self, name: &str) -> Result<(), Errno> {
        passing::send(self.0.as_fd(), format!("FDSTOREREMOVE=1\nFDNAME={name}").as_bytes(), None)?;
        self.barrier()
    }

    /// Waits until the manager has read everything: it then closes the pipe that it gets (sd_notify_barrier(3)).
    fn barrier(&self) -> Result<(), Errno> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        passing::send(self.0.as_fd(), b"BARRIER=1", Some(theirs.as_fd()))?;
        drop(theirs);
        let timeout = PollTimeout::try_from(BARRIER_MAX).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(ours.as_fd(), PollFlags::empty())], timeout)? {
            0 => Err(Errno::ETIMEDOUT),
            _ => Ok(()),
        }
    }
}

/// How soon after each other the manager wants to hear that all is well, at the latest, before it ends this process
/// (sd_watchdog_enabled(3)); `None`: it does not.
#[must_use]
pub fn watchdog() -> Option<Duration> {
    watchdog_of(|name| std::env::var(name).ok())
}

fn watchdog_of(variable: impl Fn(&str) -> Option<String>) -> Option<Duration> {
    let number = |name| variable(name)?.parse::<u64>().ok();
    // Inherited from a parent that it was meant for.
    let is_for_another = variable("WATCHDOG_PID").is_some() && number("WATCHDOG_PID") != Some(std::process::id().into());
    number("WATCHDOG_USEC").filter(|usec| *usec > 0 && !is_for_another).map(Duration::from_micros)
}

/// Whether the manager said that it keeps descriptors for this service (`$FDSTORE`, systemd 254). `false` says nothing
/// of an older one.
#[must_use]
pub fn says_it_stores() -> bool {
    std::env::var_os("FDSTORE").is_some()
}

/// The descriptors that the service manager passed to this process, each with its name (sd_listen_fds_with_names(3)).
/// To be called once, before the process opens or closes anything by number.
#[must_use]
pub fn passed() -> Vec<(String, OwnedFd)> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok()).unwrap_or(0);
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').chain(std::iter::repeat(""));
    let raws = PASSED_START..PASSED_START.saturating_add(count);
    raws.zip(names).filter_map(|(raw, name)| Some((name.to_owned(), take_over(raw).ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn a_stored_descriptor_arrives_with_its_name_and_the_barrier_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notify = Notify::connect(path.as_os_str().as_bytes()).unwrap();
        notify.ready();
        let read = |bytes: &mut [u8]| passing::receive(manager.as_fd(), bytes).unwrap();
        let mut bytes = [0; 100];
        let (len, fd) = read(&mut bytes);
        assert!(&bytes[..len] == b"READY=1" && fd.is_none());
        notify.reloading();
        let (len, _) = read(&mut bytes);
        let said = str::from_utf8(&bytes[..len]).unwrap();
        assert!(said.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").is_some_and(|us| us.parse::<u64>().unwrap() > 0), "{said}");
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let kept = std::thread::scope(|scope| {
            let sender = scope.spawn(|| notify.store("cachefiles", theirs.as_fd()));
            let (len, kept) = read(&mut bytes);
            assert_eq!(&bytes[..len], b"FDSTORE=1\nFDNAME=cachefiles\nFDPOLL=0");
            let mut more = [0; 100];
            let (len, barrier) = read(&mut more);
            assert!(&more[..len] == b"BARRIER=1" && !sender.is_finished());
            drop(barrier.unwrap());
            sender.join().unwrap().unwrap();
            kept.unwrap()
        });
        // What the manager holds is the same pipe: it ends when both are closed.
        drop(theirs);
        nix::unistd::write(&kept, b"x").unwrap();
        drop(kept);
        let mut text = String::new();
        File::from(ours).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn the_watchdog_is_that_of_this_process() {
        let of = |usec: &str, pid: Option<String>| {
            watchdog_of(|name| if name == "WATCHDOG_USEC" { Some(usec.to_owned()) } else { pid.clone().filter(|_| name == "WATCHDOG_PID") })
        };
        let this = std::process::id();
        assert_eq!(of("30000000", None), Some(Duration::from_secs(30)));
        assert_eq!(of("30000000", Some(this.to_string())), Some(Duration::from_secs(30)));
        assert_eq!(of("30000000", Some((this + 1).to_string())), None);
        assert!(of("0", None).is_none() && of("soon", None).is_none() && watchdog_of(|_| None).is_none());
    }

    #[test]
    fn only_sockets_that_exist_are_managers() {
        assert!(Notify::connect(b"/no/such/socket").is_err());
        assert!(Notify::connect(b"vsock:2:1234").is_err());
    }
}
