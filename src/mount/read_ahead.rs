//! How much the kernel reads ahead in a mount: what it asks for at a time, and so how often a stream waits for an answer.
//!
//! A mount from files has settings of its own (`super_setup_bdi`, fs/super.c) under a name that tells nothing of the mount. So
//! it is the one that was not there before, and infill makes one such mount at a time on a host.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// All such settings.
const SETTINGS: &str = "/sys/class/bdi";
/// What those of EROFS begin with.
const PREFIX: &[u8] = b"erofs-";
/// The one that is meant, in KiB.
const READ_AHEAD: &str = "read_ahead_kb";
/// Bytes of one.
const KIB: u64 = 1024;
/// How long another mount is waited for: one whose image is on its way may take long.
const TURN_MAX: Duration = Duration::from_secs(5);
/// Pause between two looks at whether it is there.
const TURN_POLL: Duration = Duration::from_millis(5);

/// Why it stays what it is.
#[derive(Debug, thiserror::Error)]
#[error("the kernel reads ahead as it likes, which makes streams slow: cannot {what} {}: {source}", path.display())]
pub struct ReadAheadError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// What there was before a mount was made, which nobody else of infill makes meanwhile.
pub(super) struct Before {
    names: BTreeSet<OsString>,
    _lock: Flock<File>,
}

impl Before {
    /// Waits until it is our turn.
    pub(super) fn new() -> Result<Self, ReadAheadError> {
        let failed = |source| ReadAheadError { what: "look into", path: SETTINGS.into(), source };
        let lock = take_turn(File::open(SETTINGS).map_err(failed)?).map_err(|errno| failed(errno.into()))?;
        Ok(Self { names: names(Path::new(SETTINGS)).map_err(failed)?, _lock: lock })
    }

    /// Sets it for the mount that was made since.
    pub(super) fn set(self, bytes: u64) -> Result<(), ReadAheadError> {
        set(Path::new(SETTINGS), &self.names, bytes)
    }
}

fn take_turn(mut dir: File) -> Result<Flock<File>, Errno> {
    let began = Instant::now();
    loop {
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EWOULDBLOCK)) if began.elapsed() < TURN_MAX => dir = again,
            Err((_, errno)) => return Err(errno),
        }
        std::thread::sleep(TURN_POLL);
    }
}

fn set(settings: &Path, before: &BTreeSet<OsString>, bytes: u64) -> Result<(), ReadAheadError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| ReadAheadError { what, path, source }
    };
    let after = names(settings).map_err(failed("look into", settings))?;
    let mut made = after.difference(before);
    let (Some(name), None) = (made.next(), made.next()) else {
        let why = io::Error::other("several EROFS mounts were made at a time, or none");
        return Err(failed("find the mount in", settings)(why));
    };
    let path = settings.join(name).join(READ_AHEAD);
    fs::write(&path, (bytes / KIB).to_string()).map_err(failed("write", &path))
}

fn names(settings: &Path) -> io::Result<BTreeSet<OsString>> {
    let names = fs::read_dir(settings)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<BTreeSet<_>>>()?;
    Ok(names.into_iter().filter(|name| name.as_encoded_bytes().starts_with(PREFIX)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_set_for_the_one_mount_that_is_new_and_for_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join(READ_AHEAD), "128\n").unwrap();
        };
        let read = |name: &str| fs::read_to_string(dir.path().join(name).join(READ_AHEAD)).unwrap();
        make("erofs-1");
        let before = names(dir.path()).unwrap();
        make("erofs-2");
        make("7:0");
        set(dir.path(), &before, 1 << 20).unwrap();
        assert_eq!((read("erofs-1").as_str(), read("erofs-2").as_str(), read("7:0").as_str()), ("128\n", "1024", "128\n"));
        make("erofs-3");
        let error = set(dir.path(), &before, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("several") && read("erofs-3") == "128\n", "{error}");
        fs::remove_file(dir.path().join("erofs-3").join(READ_AHEAD)).unwrap();
        fs::create_dir(dir.path().join("erofs-3").join(READ_AHEAD)).unwrap();
        let error = set(dir.path(), &["erofs-1".into(), "erofs-2".into()].into(), 1 << 20).unwrap_err().to_string();
        assert!(error.contains("erofs-3/read_ahead_kb"), "{error}");
    }
}
