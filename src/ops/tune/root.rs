//! The file system in which everything is done: this host's, or one below a directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::TuneError;
use crate::ops::files;

/// Mode of files that are made, whatever the umask: the daemon reads some of them as another user.
const FILE_MODE: u32 = 0o644;
/// Longest value of the kernel's that is of interest, in bytes.
const VALUE_MAX_BYTES: usize = 4096;

/// Such a file system. Paths are those that programs see in it.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// That below `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Whether it is this host's own.
    #[must_use]
    pub fn is_host(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// Whether a kernel shows its settings there, so that they can be set now. Else it is an image, and files are all there is.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.at(Path::new("/proc/sys")).is_dir()
    }

    /// Keeps others from changing anything here meanwhile: two at a time would each lose what the other noted.
    ///
    /// # Errors
    /// Somebody else is at it.
    pub(super) fn lock(&self) -> Result<Flock<File>, TuneError> {
        let dir = File::open(&self.0).map_err(TuneError::io("open", &self.0))?;
        Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => TuneError::Busy(self.0.clone()),
            errno => TuneError::io("lock", &self.0)(errno.into()),
        })
    }

    /// Where a path is.
    #[must_use]
    pub fn at(&self, path: &Path) -> PathBuf {
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The text of a file; `None`: there is none.
    ///
    /// # Errors
    /// It cannot be read, or is not text.
    pub fn read(&self, path: &Path) -> io::Result<Option<String>> {
        match fs::read_to_string(self.at(path)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value of a setting of the kernel's: its text, or of several words the one in brackets. `None`: this kernel has none.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn value(&self, path: &Path) -> io::Result<Option<String>> {
        let text = self.read(path)?;
        Ok(text.filter(|text| text.len() <= VALUE_MAX_BYTES).map(|text| chosen(&text).to_owned()))
    }

    /// Gives a setting of the kernel's a value.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn set(&self, path: &Path, value: &str) -> io::Result<()> {
        // Never made: what is not there cannot be set.
        OpenOptions::new().write(true).truncate(true).open(self.at(path))?.write_all(value.as_bytes())
    }

    /// Writes a file so that there is all of it or what was there before, also after a loss of power.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        files::replace(&self.at(path), text.as_bytes(), FILE_MODE)
    }

    /// The directories that [`Root::write`] would make for a file, the outer ones first.
    #[must_use]
    pub fn missing_dirs(&self, path: &Path) -> Vec<PathBuf> {
        let dirs = path.ancestors().skip(1).take_while(|dir| !self.at(dir).exists());
        let mut dirs: Vec<_> = dirs.map(Path::to_owned).collect();
        dirs.reverse();
        dirs
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(self.at(path)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }
}

/// The value in a text of the kernel's: all of it, or of several words the one in brackets.
#[must_use]
pub fn chosen(text: &str) -> &str {
    let text = text.trim();
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(text, |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_stays_below_the_directory_and_what_is_not_there_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let path = Path::new("/etc/a/b.conf");
        assert_eq!((root.read(path).unwrap(), root.is_live(), root.is_host()), (None, false, false));
        root.write(path, "x\n").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("etc/a/b.conf")).unwrap(), "x\n");
        assert_eq!(fs::read_dir(dir.path().join("etc/a")).unwrap().count(), 1);
        assert!(root.set(Path::new("/proc/sys/vm/none"), "1").is_err());
        root.remove(path).unwrap();
        root.remove(path).unwrap();
        assert_eq!(["always [madvise] never\n", " 200000\n", "10\t20\n"].map(chosen), ["madvise", "200000", "10\t20"]);
    }
}
