//! A mount of what a daemon has made ready, from the question to the mount: see `mount::leases` for why it is done so.

use std::thread::sleep;
use std::time::Duration;

use super::Failure;
use crate::control::wire::{Prepared, Ready};
use crate::control::{Client, ClientError};
use crate::mount::{self, Detached, FsMountError, ReadAheadError, Source};
use crate::ops::exit;

/// Tries, if the daemon goes away or is slow: it may be starting anew.
const TRIES: u32 = 5;
/// Pause between two of them.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// A mount that is nowhere yet, of which nothing was let go.
pub(super) struct Made {
    /// What is mounted.
    pub(super) prepared: Prepared,
    /// The mount.
    pub(super) mount: Detached,
    /// Whether it reads ahead as it should.
    pub(super) read_ahead: Result<(), ReadAheadError>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotMade {
    /// The daemon does not make it ready.
    #[error(transparent)]
    Daemon(#[from] ClientError),
    /// The kernel does not mount it.
    #[error(transparent)]
    Kernel(#[from] FsMountError),
    /// Again and again the daemon let go of it before it was mounted.
    #[error("the daemon was started anew or was too slow, {TRIES} times in a row; see its log, and try again")]
    Lost,
}

impl NotMade {
    /// As a verb's end, behind what it says of itself.
    pub(super) fn failure(&self, before: &str) -> Failure {
        let code = match self {
            Self::Daemon(error) => error.exit_code(),
            Self::Kernel(error) if error.source.kind() == std::io::ErrorKind::PermissionDenied => exit::NO_PERMISSION,
            Self::Kernel(_) => exit::FAILED,
            Self::Lost => exit::TRY_AGAIN,
        };
        Failure::new(code, format!("{before}: {self}"))
    }
}

/// Has an image made ready by what `ask` asks of the daemon, and makes a mount of it.
pub(super) fn make(
    daemon: &Client,
    ask: impl Fn(&Client) -> Result<Ready, ClientError>,
    read_ahead: impl Fn(Option<u64>) -> Option<u64>,
) -> Result<Made, NotMade> {
    let mut last = NotMade::Lost;
    for tried in 0..TRIES {
        if tried > 0 {
            sleep(TRY_AGAIN);
        }
        let Ready { prepared, lease, .. } = match ask(daemon) {
            Ok(ready) => ready,
            Err(error) if error.is_lost() => {
                last = error.into();
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let source = Source { image: prepared.image.clone(), devices: prepared.devices.clone(), direct: false };
        let (mount, read_ahead) = match mount::make(&source, read_ahead(prepared.read_ahead_bytes)) {
            Ok(made) => made,
            Err(error) => {
                // It would run out by itself.
                let _ = daemon.end_lease(&lease);
                return Err(error.into());
            }
        };
        match daemon.end_lease(&lease) {
            Ok(true) => return Ok(Made { prepared, mount, read_ahead }),
            // What was read of this mount may be wrong: it goes.
            Ok(false) => last = NotMade::Lost,
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}
