//! Mounting EROFS from files: with a file for the image and one for each of its devices, however many there are.
//!
//! Each device is a parameter of its own (fsconfig(2)); mount(2) takes all of them in one page of text.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, move_mount, unmount,
};

use super::read_ahead::{Before, ReadAheadError};

/// Longest value of a parameter, with its NUL (`fsconfig`, fs/fsopen.c).
const VALUE_MAX_BYTES: usize = 256;
/// How much of what the kernel has to say about a mount is read.
const MESSAGE_MAX_BYTES: usize = 1024;

/// What is mounted, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// The image.
    pub image: PathBuf,
    /// Its devices, in order.
    pub devices: Vec<PathBuf>,
    /// The kernel reads the files past the page cache (`directio`): what is cached is cached once.
    pub direct: bool,
}

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}{}; dmesg may say more", if said.is_empty() { String::new() } else { format!(" ({said})") })]
pub struct FsMountError {
    what: &'static str,
    /// The kernel's words.
    said: String,
    /// Its answer.
    #[source]
    pub source: io::Error,
}

/// A mount that is nowhere yet. It ends when this is dropped.
#[derive(Debug)]
pub struct Detached(OwnedFd);

/// Mounts `source` on `dir`, for reading.
///
/// # Errors
/// The kernel refuses, with its reason if it gives one.
pub fn mount(source: &Source, dir: &Path) -> Result<(), FsMountError> {
    make(source, None)?.0.put(dir)
}

/// Makes a mount of `source`, for reading, in which the kernel reads so many bytes ahead, or as many as it likes. Also says why
/// it does not.
///
/// # Errors
/// The kernel refuses, with its reason if it gives one.
pub fn make(source: &Source, read_ahead_bytes: Option<u64>) -> Result<(Detached, Result<(), ReadAheadError>), FsMountError> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("this kernel has no EROFS; try modprobe erofs"))?;
    let refused = |what| {
        let context = &context;
        move |errno| FsMountError { said: said(context), ..failed(what)(errno) }
    };
    let devices = source.devices.iter().map(|device| ("device", device));
    for (parameter, path) in std::iter::once(("source", &source.image)).chain(devices) {
        if path.as_os_str().len() >= VALUE_MAX_BYTES {
            return Err(failed("the path of a file is longer than 255 bytes; use a shorter cache_dir")(Errno::NAMETOOLONG));
        }
        fsconfig_set_string(&context, parameter, path.as_path()).map_err(refused("a file was refused"))?;
    }
    fsconfig_set_flag(&context, "ro").map_err(failed("it cannot be read-only"))?;
    if source.direct {
        fsconfig_set_flag(&context, "directio").map_err(failed("no direct I/O (Linux 6.15)"))?;
    }
    // Also if nothing is to be set: another process must not take this mount for its own.
    let before = Before::new();
    fsconfig_create(&context).map_err(refused("the kernel does not take the image"))?;
    let read_ahead = before.and_then(|before| read_ahead_bytes.map_or(Ok(()), |bytes| before.set(bytes)));
    let mounted =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY).map_err(refused("it cannot be mounted"))?;
    Ok((Detached(mounted), read_ahead))
}

impl AsFd for Detached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Detached {
    /// Puts it on `dir`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn put(&self, dir: &Path) -> Result<(), FsMountError> {
        self.attach(dir, MoveMountFlags::empty()).map_err(failed("it cannot be put there"))
    }

    /// Puts it in the place of the mount on `dir`. Who has files of that one keeps them; nobody finds others there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn replace(&self, dir: &Path) -> Result<(), FsMountError> {
        let detach = || unmount(dir, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(failed("the old mount cannot be taken away"));
        // Beneath it, so that nobody ever finds the directory without an image.
        match self.attach(dir, MoveMountFlags::MOVE_MOUNT_BENEATH) {
            Ok(()) => detach(),
            // Not where mounts are shared with another place that would see both.
            Err(Errno::INVAL) => {
                detach()?;
                self.put(dir)
            }
            Err(errno) => Err(failed("it cannot be put beneath the old mount")(errno)),
        }
    }

    fn attach(&self, dir: &Path, how: MoveMountFlags) -> Result<(), Errno> {
        move_mount(&self.0, "", CWD, dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | how)
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> FsMountError {
    move |errno| FsMountError { what, said: String::new(), source: errno.into() }
}

/// What the kernel noted about a mount that it did not make.
fn said(context: &OwnedFd) -> String {
    let mut lines = Vec::new();
    let mut buffer = [0; MESSAGE_MAX_BYTES];
    while let Ok(len @ 1..) = nix::unistd::read(context, &mut buffer) {
        lines.push(String::from_utf8_lossy(&buffer[..len]).trim_end().to_owned());
    }
    lines.join("; ")
}
