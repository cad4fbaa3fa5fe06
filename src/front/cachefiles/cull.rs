//! Culling: asking the kernel to remove what it does not use.
//!
//! The kernel knows which objects are in use and removes no such one; it is the only one that can do that without a
//! race. Its commands `cull NAME` and `inuse NAME` look the name up in the working directory of the thread that writes
//! them (`cachefiles_daemon_cull`, fs/cachefiles/daemon.c). So they are given by one thread whose working directory is
//! its own, and that of the others stays where it is.
//!
//! A file is unlinked at once; a directory is moved to the graveyard, which is ours to empty
//! (`cachefiles_bury_object`, fs/cachefiles/namei.c; the same in Linux 6.1 and 6.12, in either mode).

use std::ffi::OsStr;
use std::io;
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::fchdir;

use super::cache_dir::CacheDirError;
use super::command;
use super::device::Device;
use super::tree::{Dir, Entry, GRAVEYARD, Kind};

/// Length of the names that the kernel gives what it buries: two hexadecimal words.
const GRAVE_NAME_BYTES: usize = 16;

/// What the kernel said about a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It is not in use; if it was to be culled, it is gone now.
    Free,
    /// It belongs to an image that is mounted, or being mounted or unmounted (`EBUSY`).
    Busy,
    /// There is nothing of this name (`ENOENT`, `ESTALE`).
    Gone,
}

/// The right to cull, bound to the thread it was made on.
pub struct Culler {
    device: Arc<Device>,
    /// The working directory is this thread's, so another one must not use it.
    _this_thread: PhantomData<*const ()>,
}

impl std::fmt::Debug for Culler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Culler").finish_non_exhaustive()
    }
}

impl Culler {
    /// Gives this thread a working directory of its own, for as long as it lives.
    ///
    /// # Errors
    /// unshare(2) is refused: by a seccomp filter, perhaps.
    pub fn on_this_thread(device: Arc<Device>) -> io::Result<Self> {
        unshare(CloneFlags::CLONE_FS)?;
        Ok(Self { device, _this_thread: PhantomData })
    }

    /// Removes an object from its directory, or a volume from `cache`, unless it is in use.
    ///
    /// # Errors
    /// `EIO`: the cache is dead or its file system failed (`dmesg` has more); `EINVAL`: a name that no command can hold.
    pub fn cull(&self, dir: &Dir, name: &OsStr) -> Result<Answer, Errno> {
        // While somebody holds the file, unlinking it is quick: its blocks are freed when we let go of it, after the
        // kernel has answered and can answer others again (it takes one command at a time).
        let _held = dir.open_file(name, OFlag::O_PATH);
        self.ask(dir, "cull", name)
    }

    /// Asks whether an object or a volume is in use.
    ///
    /// # Errors
    /// As [`Culler::cull`].
    pub fn in_use(&self, dir: &Dir, name: &OsStr) -> Result<Answer, Errno> {
        self.ask(dir, "inuse", name)
    }

    fn ask(&self, dir: &Dir, verb: &str, name: &OsStr) -> Result<Answer, Errno> {
        let command = command::setup(verb, name.as_bytes()).map_err(|_| Errno::EINVAL)?;
        fchdir(dir)?;
        match self.device.command(&command) {
            Ok(()) => Ok(Answer::Free),
            Err(Errno::EBUSY) => Ok(Answer::Busy),
            Err(Errno::ENOENT | Errno::ESTALE) => Ok(Answer::Gone),
            Err(errno) => Err(errno),
        }
    }
}

/// Deletes what the kernel has buried in the cache directory `root`, and nothing else that may be there; gives the
/// number of entries. May be done at any time.
///
/// # Errors
/// Something could not be read or removed.
pub fn empty_graveyard(root: &Dir) -> Result<u64, CacheDirError> {
    let Some(graveyard) = root.sub(GRAVEYARD)? else { return Ok(0) };
    let mut buried = 0;
    for entry in graveyard.entries()?.iter().filter(|entry| is_grave(entry)) {
        graveyard.remove(entry)?;
        buried += 1;
    }
    Ok(buried)
}

fn is_grave(entry: &Entry) -> bool {
    let name = entry.name.as_bytes();
    entry.kind == Kind::Dir && name.len() == GRAVE_NAME_BYTES && name.iter().all(u8::is_ascii_hexdigit)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::device::tests::device;
    use super::*;

    #[test]
    fn commands_are_given_in_the_object_s_directory_and_other_threads_stay_where_they_are() {
        let scratch = tempfile::tempdir().unwrap();
        let here = std::env::current_dir().unwrap();
        let (device, kernel) = device();
        let there = fs::canonicalize(scratch.path()).unwrap();
        let thread = std::thread::spawn(move || {
            let Ok(culler) = Culler::on_this_thread(device) else {
                eprintln!("skipped: unshare(CLONE_FS) is refused here");
                return;
            };
            let dir = Dir::open(&there).unwrap().unwrap();
            assert_eq!(culler.cull(&dir, "Dimg1".as_ref()), Ok(Answer::Free));
            assert_eq!(culler.in_use(&dir, "Dimg 2".as_ref()), Ok(Answer::Free));
            assert_eq!(culler.cull(&dir, "Ierofs,a\nb".as_ref()), Err(Errno::EINVAL));
            // What the kernel sees as this thread's directory.
            assert_eq!(fs::read_link("/proc/thread-self/cwd").unwrap(), there);
            assert_eq!((kernel.command(), kernel.command()), ("cull Dimg1".to_owned(), "inuse Dimg 2".to_owned()));
        });
        thread.join().unwrap();
        assert_eq!(std::env::current_dir().unwrap(), here);
    }

    #[test]
    fn only_the_kernel_s_graves_are_emptied() {
        let scratch = tempfile::tempdir().unwrap();
        let graveyard = scratch.path().join(GRAVEYARD);
        fs::create_dir_all(graveyard.join("656f0a1200000001/@00")).unwrap();
        fs::create_dir_all(graveyard.join("seed-1-0")).unwrap();
        std::os::unix::fs::symlink(scratch.path(), graveyard.join("656f0a1200000002")).unwrap();
        let root = Dir::open(scratch.path()).unwrap().unwrap();
        assert_eq!(empty_graveyard(&root).unwrap(), 1);
        assert!(graveyard.join("seed-1-0").exists() && !graveyard.join("656f0a1200000001").exists());
    }
}
