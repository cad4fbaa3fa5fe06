//! The state directory: who serves, and where the keepers are. One daemon at a time works with it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use super::exit;
use crate::front::cachefiles::CullLimits;

/// Where it is unless somebody says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/run/infill";
/// Locked by the daemon as long as it lives; holds its process id.
const LOCK_FILE: &str = "lock";
/// Keepers that hold the device, so that it survives the death of one.
pub const KEEPERS: usize = 2;
/// Their sockets.
const KEEPER_SOCKETS: [&str; KEEPERS] = ["keeper.sock", "keeper-2.sock"];
/// Which directory the kept device is bound to, for messages.
const CACHE_NOTE: &str = "cache-dir";
/// With which culling limits it was bound.
const LIMITS_NOTE: &str = "cull-limits";
/// Mode of the directory and of its files.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Permissions that nobody else may have on the directory.
pub(super) const WRITABLE_BY_OTHERS: u32 = 0o022;
/// How long a daemon that was killed may take to end: its I/O that is in flight comes first.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// Pause between two tries.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another daemon has it.
    #[error("another infill serves: pid {pid} has locked the state directory {}: only one daemon can serve a kernel; stop it first", dir.display())]
    Busy {
        /// The directory.
        dir: PathBuf,
        /// The process that has it, as far as it said.
        pid: String,
    },
    /// Somebody else could put something into it.
    #[error("the state directory {} belongs to user {uid} with mode {mode:o}: only this user may be able to write there; chown and chmod it, or name another with --state-dir", dir.display())]
    Insecure {
        /// The directory.
        dir: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its permissions.
        mode: u32,
    },
    /// The operating system refused.
    #[error("cannot {what} {}: {source}; run as root, or name a directory that can be written with --state-dir", path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

impl StateError {
    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Busy { .. } => exit::UNAVAILABLE,
            Self::Insecure { .. } => exit::BAD_CONFIGURATION,
            Self::Os { source, .. } => match source.kind() {
                ErrorKind::PermissionDenied => exit::NO_PERMISSION,
                // Another directory has to be named, or this one mended: time does not cure it.
                ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::AlreadyExists | ErrorKind::ReadOnlyFilesystem => {
                    exit::BAD_CONFIGURATION
                }
                _ => exit::FAILED,
            },
        }
    }
}

/// A state directory that is this process's.
#[derive(Debug)]
pub struct StateDir {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Makes the directory if it does not exist, and locks it. Waits a moment for a daemon that is about to end.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn claim(dir: &Path) -> Result<Self, StateError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Os { what, path, source }
        };
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir).map_err(failed("make the state directory", dir))?;
        let found = fs::metadata(dir).map_err(failed("look at the state directory", dir))?;
        if found.uid() != geteuid().as_raw() || found.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(StateError::Insecure { dir: dir.into(), uid: found.uid(), mode: found.mode() & 0o7777 });
        }
        let path = dir.join(LOCK_FILE);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(FILE_MODE);
        let file = options.open(&path).map_err(failed("open the lock", &path))?;
        let mut lock = lock(file, dir)?;
        let pid = format!("{}\n", std::process::id());
        lock.set_len(0).and_then(|()| lock.write_all(pid.as_bytes())).map_err(failed("write the lock", &path))?;
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// Where the keepers listen.
    #[must_use]
    pub fn keeper_sockets(&self) -> [PathBuf; KEEPERS] {
        KEEPER_SOCKETS.map(|name| self.dir.join(name))
    }

    /// Notes which directory the device is bound to: the kernel does not tell.
    pub fn note_cache(&self, cache_dir: &Path) {
        let noted = fs::canonicalize(cache_dir).and_then(|dir| self.note(CACHE_NOTE, dir.as_os_str().as_bytes()));
        if let Err(error) = noted {
            tracing::warn!("cannot write {}: {error}: only messages would say more with it", self.dir.join(CACHE_NOTE).display());
        }
    }

    /// Notes with which limits the device was bound: the kernel does not tell either.
    pub fn note_limits(&self, limits: &CullLimits) {
        if let Err(error) = self.note(LIMITS_NOTE, limits.note().as_bytes()) {
            tracing::warn!(
                "cannot write {}: {error}: do not change the culling limits while the device is kept",
                self.dir.join(LIMITS_NOTE).display()
            );
        }
    }

    /// The limits that were noted last.
    #[must_use]
    pub fn noted_limits(&self) -> Option<CullLimits> {
        CullLimits::from_note(&fs::read_to_string(self.dir.join(LIMITS_NOTE)).ok()?)
    }

    /// Replaces a note. One that cannot be written is none: an old one would be wrong.
    fn note(&self, name: &str, text: &[u8]) -> io::Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).inspect_err(|_| drop(fs::remove_file(&path)))
    }

    /// What was noted last.
    #[must_use]
    pub fn noted_cache(&self) -> Option<PathBuf> {
        noted_cache(&self.dir)
    }
}

/// What the last daemon with this state directory noted as its cache directory; anybody may look who may read there.
#[must_use]
pub fn noted_cache(dir: &Path) -> Option<PathBuf> {
    fs::read(dir.join(CACHE_NOTE)).ok().map(|bytes| std::ffi::OsString::from_vec(bytes).into())
}

/// The process that serves with this state directory, if one does; anybody may look who may read there.
#[must_use]
pub fn holder(dir: &Path) -> Option<u32> {
    let file = File::open(dir.join(LOCK_FILE)).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => fs::read_to_string(dir.join(LOCK_FILE)).ok()?.trim().parse().ok(),
        // A daemon that starts at this very moment tries again.
        _ => None,
    }
}

fn lock(mut file: File, dir: &Path) -> Result<Flock<File>, StateError> {
    let started = Instant::now();
    loop {
        let errno = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, errno)) => {
                file = again;
                errno
            }
        };
        if errno != Errno::EWOULDBLOCK {
            return Err(StateError::Os { what: "lock", path: dir.join(LOCK_FILE), source: errno.into() });
        }
        if started.elapsed() > LOCK_WAIT {
            let pid = fs::read_to_string(dir.join(LOCK_FILE)).unwrap_or_default();
            return Err(StateError::Busy { dir: dir.to_owned(), pid: pid.trim().to_owned() });
        }
        std::thread::sleep(LOCK_POLL);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn one_process_has_it_and_nobody_else_may_write_there() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        let state = StateDir::claim(&dir).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        let error = StateDir::claim(&dir).unwrap_err();
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        assert_eq!(error.exit_code(), 69);
        state.note_cache(parent.path());
        assert_eq!(state.noted_limits(), None);
        let limits = CullLimits { bstop_percent: Some(3), frun_percent: Some(40), ..CullLimits::default() };
        state.note_limits(&limits);
        let noted = state.noted_limits().unwrap();
        assert_eq!((noted.blocks(), noted.files()), (limits.blocks(), limits.files()));
        fs::write(dir.join(LIMITS_NOTE), "1 2").unwrap();
        assert_eq!(state.noted_limits(), None);
        drop(state);
        assert_eq!(StateDir::claim(&dir).unwrap().noted_cache(), Some(fs::canonicalize(parent.path()).unwrap()));
        fs::set_permissions(&dir, Permissions::from_mode(0o770)).unwrap();
        let error = StateDir::claim(&dir).unwrap_err();
        assert!(error.to_string().contains("mode 770"), "{error}");
        assert_eq!(error.exit_code(), 78);
        // A file in its place, or in that of a directory above it.
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        for dir in [file.clone(), file.join("state")] {
            let error = StateDir::claim(&dir).unwrap_err();
            assert_eq!(error.exit_code(), 78, "{error}");
            assert!(error.to_string().contains("--state-dir"), "{error}");
        }
    }
}
