//! `infill mount --foreground`: a daemon for one mount, from files, that ends with it.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Failure;
use super::place::Place;
use crate::config::Config;
use crate::control::Client;
use crate::ops::exit;
use crate::ops::mounting::{MountError, unmount};
use crate::ops::signals::{Event, Signals};

/// Pause between two tries to unmount.
const TRY_EVERY: Duration = Duration::from_millis(200);
/// How often the daemon is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Starts a daemon, has `mount` mount an image on `dir` through it, and unmounts that when a signal comes.
///
/// # Errors
/// There is a daemon already, it does not start, or dies; the image cannot be mounted or unmounted.
pub(super) fn run(place: &Place, config: &Config, dir: &Path, mount: impl FnOnce(Client) -> Result<(), Failure>) -> Result<(), Failure> {
    let failed = |what: &str, error: std::io::Error| Failure::new(exit::FAILED, format!("{what}: {error}"));
    let signals = Signals::block().map_err(|error| failed("cannot receive signals", error.into()))?;
    if Client::find(&config.control_socket).is_ok_and(|client| client.is_some()) {
        let message = format!("a daemon serves already (it listens on {}): mount without --foreground", config.control_socket.display());
        return Err(Failure::new(exit::UNAVAILABLE, message));
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg0("infill").args(["serve", "--front-end=fanotify"]).args(place.arguments());
    // A terminal's interrupt is for us alone: the daemon must serve until the image is unmounted.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut daemon = command.spawn().map_err(|error| failed("cannot start infill serve", error))?;
    let ready = daemon.stdout.take().is_some_and(|out| BufReader::new(out).read_line(&mut String::new()).is_ok_and(|len| len > 0));
    let client = if ready { Client::find(&config.control_socket) } else { Ok(None) };
    let client = match client {
        Ok(Some(client)) => client,
        Ok(None) => return Err(end(daemon).err().unwrap_or_else(|| Failure::new(exit::FAILED, "infill serve has ended; see above"))),
        // It would go on by itself.
        Err(error) => return end(daemon).and(Err(error.into())),
    };
    if let Err(error) = mount(client) {
        let _ = end(daemon);
        return Err(error);
    }
    wait(&signals, &mut daemon)?;
    unmount_when_free(dir, &signals)
        .map_err(|error| Failure::new(error.exit_code(), format!("{error}; it stays mounted, and infill serve goes on")))?;
    if let Ok(Some(client)) = Client::find(&config.control_socket) {
        // Else it finds out when it ends.
        let _ = client.release();
    }
    end(daemon)
}

/// Until a signal says stop.
fn wait(signals: &Signals, daemon: &mut Child) -> Result<(), Failure> {
    loop {
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is looked at like any other.
        let _ = poll(&mut fds, PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::ZERO));
        if signals.next() == Some(Event::Stop) {
            return Ok(());
        }
        if let Ok(Some(status)) = daemon.try_wait() {
            let message = format!("infill serve has ended ({status}): readers wait for another one; start it, or unmount the image");
            return Err(Failure::new(exit::FAILED, message));
        }
    }
}

/// Unmounts as soon as nobody uses it, or says why not when another signal comes.
fn unmount_when_free(dir: &Path, signals: &Signals) -> Result<(), MountError> {
    let mut said = false;
    loop {
        let error = match unmount(dir) {
            Err(error @ MountError::Busy { .. }) => error,
            result => return result,
        };
        if signals.next() == Some(Event::Stop) {
            return Err(error);
        }
        if !std::mem::replace(&mut said, true) {
            eprintln!("infill: {error}; waiting for that, another signal ends the wait");
        }
        std::thread::sleep(TRY_EVERY);
    }
}

fn end(mut daemon: Child) -> Result<(), Failure> {
    let _ = kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM);
    match daemon.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::new(
            status.code().and_then(|code| code.try_into().ok()).unwrap_or(exit::FAILED),
            format!("infill serve has ended: {status}; see above"),
        )),
        Err(error) => Err(Failure::new(exit::FAILED, format!("cannot wait for infill serve: {error}"))),
    }
}
