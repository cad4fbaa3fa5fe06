//! Keeping the bound device while no daemon serves, so that images stay mounted over a restart: who keeps it, how the
//! next daemon gets it, and how it is given up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::exit;
use super::keeper::{Keeper, KeeperError};
use super::notify::{self, Notify};
use super::state::{KEEPERS, StateDir, StateError};
use crate::front::cachefiles::CullLimits;

/// The device's name in systemd's store.
const FD_NAME: &str = "cachefiles";
/// A keeper that dies sooner is not replaced at once.
const KEEPER_LIFE_MIN: Duration = Duration::from_secs(1);

/// What systemd sets for every process of a unit (systemd.exec(5)).
const IN_UNIT: &str = "INVOCATION_ID";

/// Who keeps the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KeepMode {
    /// systemd if it started this process and says that it stores; else a keeper, and systemd too if it listens.
    #[default]
    Auto,
    /// systemd's store of descriptors: FileDescriptorStoreMax= in the unit.
    Systemd,
    /// A small process of infill's own.
    Keeper,
    /// Nobody: when the daemon ends, mounted images fail.
    Off,
}

/// Why the device could not be kept or given up.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The state directory is of no use.
    #[error(transparent)]
    State(#[from] StateError),
    /// The keeper is of no use.
    #[error("{0}; end it and start infill again: images that are mounted must then be mounted anew")]
    Keeper(#[from] KeeperError),
    /// Not started by systemd.
    #[error("--keep systemd: systemd did not start this process with Type=notify (no NOTIFY_SOCKET); use --keep keeper without it")]
    NoSystemd,
    /// systemd does not listen.
    #[error(
        "systemd does not take the device to keep it ({0}); set NotifyAccess=main and FileDescriptorStoreMax=1 in the unit, or use --keep keeper"
    )]
    Systemd(#[source] io::Error),
}

impl KeepError {
    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::State(error) => error.exit_code(),
            Self::NoSystemd => exit::BAD_CONFIGURATION,
            Self::Keeper(_) | Self::Systemd(_) => exit::FAILED,
        }
    }
}

/// What systemd's store has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stored {
    /// Not the device.
    No,
    /// It was given the device, and did not say that it has a store for this unit: before systemd 254 it never does, since
    /// then that means it has none.
    Perhaps,
    /// The device: it said so, or passed it to this process.
    Surely,
}

/// The hold on the device, beside the daemon's own.
#[derive(Debug)]
pub struct Keep {
    state: StateDir,
    notify: Option<Notify>,
    stored: Stored,
    /// Those that live, each at its place among the sockets.
    keepers: [Option<Keeper>; KEEPERS],
    keepers_since: Instant,
}

impl Keep {
    /// Makes this process the one that serves.
    ///
    /// # Errors
    /// There is another, or something of the state directory cannot be used.
    pub fn claim(state_dir: &Path) -> Result<Self, KeepError> {
        let state = StateDir::claim(state_dir)?;
        let mut keepers = [const { None }; KEEPERS];
        for (keeper, socket) in keepers.iter_mut().zip(state.keeper_sockets()) {
            *keeper = Keeper::find(&socket)?;
        }
        Ok(Self { state, notify: Notify::from_env(), stored: Stored::No, keepers, keepers_since: Instant::now() })
    }

    /// The device that was kept, if one was: among what systemd `passed` ([`notify::passed`]), or by a keeper.
    ///
    /// # Errors
    /// There are only keepers that do not answer.
    pub fn find(&mut self, passed: Vec<(String, OwnedFd)>) -> Result<Option<OwnedFd>, KeepError> {
        let stored = passed.into_iter().find(|(name, _)| name == FD_NAME);
        if let Some((_, device)) = stored {
            self.stored = Stored::Surely;
            return Ok(Some(device));
        }
        let mut found = Ok(None);
        for keeper in self.keepers.iter().flatten() {
            match keeper.take() {
                Ok(Some(device)) => return Ok(Some(device)),
                Ok(None) => {}
                Err(error) => found = Err(error.into()),
            }
        }
        found
    }

    /// The directory that a kept device was bound to, as far as it is known.
    #[must_use]
    pub fn noted_cache(&self) -> String {
        self.state.noted_cache().map_or_else(|| "another directory".to_owned(), |dir| dir.display().to_string())
    }

    /// Notes with which culling limits the device was bound.
    pub fn note_limits(&self, limits: &CullLimits) {
        self.state.note_limits(limits);
    }

    /// The culling limits of a kept device: those that were noted, or if none were, the settings.
    #[must_use]
    pub fn limits_of_kept(&self, settings: CullLimits) -> CullLimits {
        let noted = self.state.noted_limits().unwrap_or(settings);
        if (noted.blocks(), noted.files()) != (settings.blocks(), settings.files()) {
            tracing::warn!(
                "the device was bound with other culling limits than the settings ask for (brun bcull bstop frun fcull fstop: {} then, {} now), and they count until it is given up: unmount the images, stop infill, `infill release`",
                noted.note().trim_end(),
                settings.note().trim_end()
            );
        }
        noted
    }

    /// Has the device kept as the mode says, and by nobody else; only that a keeper which has it already is not let go for
    /// a store that may not exist, unless the mode says so.
    ///
    /// # Errors
    /// It is not kept. `Auto` takes whatever works.
    pub fn hold(&mut self, mode: KeepMode, device: BorrowedFd<'_>, cache_dir: &Path) -> Result<(), KeepError> {
        self.state.note_cache(cache_dir);
        match mode {
            KeepMode::Off => {
                self.leave_systemd();
                self.leave_keepers()
            }
            KeepMode::Auto if self.notify.is_some() && notify::says_it_stores() => {
                self.hold_by_systemd(device)?;
                self.leave_keepers()
            }
            // Before 254, systemd does not say whether it stores, and what it stores goes when the unit is stopped.
            KeepMode::Auto if self.notify.is_some() => {
                self.hold_by_systemd(device)?;
                self.hold_by_keepers(device)
            }
            KeepMode::Systemd => {
                self.hold_by_systemd(device)?;
                if self.stored == Stored::Perhaps {
                    tracing::warn!(
                        "systemd (before 254, or without FileDescriptorStoreMax=1 in the unit) does not say whether it keeps the device: without that, a restart breaks mounted images"
                    );
                }
                self.leave_keepers()
            }
            KeepMode::Auto | KeepMode::Keeper => {
                self.hold_by_keepers(device)?;
                self.leave_systemd();
                Ok(())
            }
        }
    }

    fn hold_by_systemd(&mut self, device: BorrowedFd<'_>) -> Result<(), KeepError> {
        let notify = self.notify.as_ref().ok_or(KeepError::NoSystemd)?;
        if self.stored == Stored::No {
            notify.store(FD_NAME, device).map_err(|errno| KeepError::Systemd(errno.into()))?;
            self.stored = if notify::says_it_stores() { Stored::Surely } else { Stored::Perhaps };
        }
        Ok(())
    }

    /// More than one, because a confined daemon cannot start another in the place of one that dies.
    fn hold_by_keepers(&mut self, device: BorrowedFd<'_>) -> Result<(), KeepError> {
        if self.notify.is_none() && std::env::var_os(IN_UNIT).is_some() {
            tracing::warn!(
                "a unit of systemd keeps the device by keepers, which systemd ends with the daemon unless the unit says KillMode=process; better are Type=notify, NotifyAccess=main and FileDescriptorStoreMax=1"
            );
        }
        let answers = |keeper: &Keeper| {
            let kept = keeper.keep(device);
            kept.inspect_err(|error| tracing::warn!("{error}; starting another one")).is_ok()
        };
        let mut failed = None;
        for (keeper, socket) in self.keepers.iter_mut().zip(self.state.keeper_sockets()) {
            if !keeper.as_ref().is_some_and(answers) {
                keeper.take().into_iter().for_each(Keeper::bury);
                *keeper = Keeper::start(&socket, device).map_err(|error| failed = Some(error)).ok();
                self.keepers_since = Instant::now();
            }
        }
        match (failed, self.keepers.iter().flatten().count()) {
            (Some(error), 0) => Err(error.into()),
            (Some(error), held) => {
                tracing::warn!("only {held} of {KEEPERS} keepers has the device: {error}");
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    fn leave_systemd(&mut self) {
        if std::mem::replace(&mut self.stored, Stored::No) != Stored::No
            && let Some(Err(errno)) = self.notify.as_ref().map(|notify| notify.forget(FD_NAME))
        {
            tracing::warn!("systemd still keeps the device ({errno}); it lets go when the unit is stopped");
        }
    }

    /// All of them, also if one does not answer.
    fn leave_keepers(&mut self) -> Result<(), KeepError> {
        let left = self.keepers.iter_mut().filter_map(Option::take).map(Keeper::release);
        left.fold(Ok(()), Result::and).map_err(KeepError::Keeper)
    }

    /// Who keeps the device; `None`: nobody.
    #[must_use]
    pub fn by(&self) -> Option<&'static str> {
        match (self.stored, self.keepers.iter().any(Option::is_some)) {
            (Stored::Surely, false) => Some("systemd"),
            (Stored::Surely, true) => Some("systemd and a keeper"),
            (_, true) => Some("a keeper"),
            (Stored::Perhaps, false) => Some("systemd, if it has a store for this unit,"),
            (Stored::No, false) => None,
        }
    }

    /// One becomes readable when its keeper has died.
    pub fn watch(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.keepers.iter().flatten().map(AsFd::as_fd)
    }

    /// Starts others in the place of keepers that have died; gives the number of those that live.
    ///
    /// # Errors
    /// None lives, and none could be started: no keeper has the device now.
    pub fn renew(&mut self, device: BorrowedFd<'_>) -> Result<usize, KeepError> {
        for keeper in &mut self.keepers {
            keeper.take_if(|keeper| keeper.has_died()).into_iter().for_each(Keeper::bury);
        }
        std::thread::sleep(KEEPER_LIFE_MIN.saturating_sub(self.keepers_since.elapsed()));
        self.hold_by_keepers(device)?;
        Ok(self.keepers.iter().flatten().count())
    }

    /// Tells the service manager, if there is one, that requests are being answered.
    pub fn ready(&self) {
        self.notify.iter().for_each(Notify::ready);
    }

    /// Tells it that the settings are being read again; [`Keep::ready`] must follow.
    pub fn reloading(&self) {
        self.notify.iter().for_each(Notify::reloading);
    }

    /// Tells it that the daemon ends.
    pub fn stopping(&self) {
        self.notify.iter().for_each(Notify::stopping);
    }

    /// Gives a kept device up, when no daemon serves.
    ///
    /// # Errors
    /// The keeper does not answer.
    pub fn give_up(mut self) -> Result<(), KeepError> {
        self.leave_systemd();
        self.leave_keepers()
    }
}
