//! `infill tune`: what could be set differently on this host, why, and setting it, and back.
//!
//! | file | its subject |
//! |---|---|
//! | `host` | what kind of machine this is, and the profile for it |
//! | `profile` | the profiles in tuning/profiles, as they are written |
//! | `knob` | a knob on this host: what it is and what it should be |
//! | `files` | the files that keep a profile over a restart |
//! | `record` | what was changed, with what was there before |
//! | `apply` | changing it, all or nothing, and changing it back |
//! | `root` | the file system that all of that is done in |
//!
//! A knob is in a profile because its effect was measured (tuning/README.md), each by one command (`infill bench tune`).

pub mod apply;
pub mod files;
pub mod host;
pub mod knob;
pub mod profile;
pub mod record;
pub mod root;

use std::io;
use std::path::{Path, PathBuf};

use super::exit;

/// Why nothing was changed, or not all of it. Each message is one line that says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    /// Only root may.
    #[error("changing this host's settings is for root: run infill tune as root, or name a directory of yours with --root")]
    NotRoot,
    /// Another one is at work.
    #[error("{}: another infill tune is changing things here; try again when it has ended", .0.display())]
    Busy(PathBuf),
    /// A file is there that is not ours.
    #[error("{}: infill tune did not write this file, or somebody changed it since: it is left as it is, and nothing was changed; move it away and try again", .0.display())]
    Foreign(PathBuf),
    /// A file that was ours is not what was written.
    #[error("everything else is as it was before; somebody changed {} since infill tune wrote it, so it is left as it is: remove it, then run infill tune --revert again", list(.0))]
    Changed(Vec<PathBuf>),
    /// There is nothing to take back.
    #[error("{}: there is no such record, so nothing is applied that could be reverted", .0.display())]
    NothingApplied(PathBuf),
    /// The record is not one.
    #[error("{}: this is no record of infill tune ({why}); if nothing of it is needed any more, remove it", path.display())]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A step failed, and those before it were taken back.
    #[error("cannot {what} {}: {source}; what had been changed before that was changed back", path.display())]
    Failed {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The same, and some of those could not be taken back.
    #[error("{first}; but still changed, because they could not be changed back: {}; infill tune --revert tries it again", list(left))]
    Stuck {
        /// The first failure.
        first: String,
        /// What is left.
        left: Vec<PathBuf>,
    },
}

impl TuneError {
    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotRoot => exit::NO_PERMISSION,
            Self::Busy(_) => exit::TRY_AGAIN,
            Self::Failed { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => exit::NO_PERMISSION,
            Self::Foreign(_) | Self::BadRecord { .. } => exit::BAD_CONFIGURATION,
            _ => exit::FAILED,
        }
    }

    /// For `map_err`: what was tried on a path.
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Failed { what, path, source }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
