//! Mounting EROFS from files: with a file for the image and one for each of its devices, however many there are.
//!
//! Each device is a parameter of its own (fsconfig(2)); mount(2) takes all of them in one page of text.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    move_mount,
};

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

/// Mounts `source` on `dir`, for reading.
///
/// # Errors
/// The kernel refuses, with its reason if it gives one.
pub fn mount(source: &Source, dir: &Path) -> Result<(), FsMountError> {
    let mounted = detached(source)?;
    let placed = move_mount(&mounted, "", CWD, dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    placed.map_err(|errno| FsMountError { what: "it cannot be put there", said: String::new(), source: errno.into() })
}

/// Mounts `source` nowhere: what is in it can be opened relative to the descriptor, as long as that is open.
///
/// # Errors
/// The kernel refuses, with its reason if it gives one.
pub(super) fn detached(source: &Source) -> Result<OwnedFd, FsMountError> {
    let failed = |what, said: String| move |errno: Errno| FsMountError { what, said, source: errno.into() };
    let context =
        fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("this kernel has no EROFS; try modprobe erofs", String::new()))?;
    let devices = source.devices.iter().map(|device| ("device", device));
    for (parameter, path) in std::iter::once(("source", &source.image)).chain(devices) {
        if path.as_os_str().len() >= VALUE_MAX_BYTES {
            return Err(failed("the path of a file is longer than 255 bytes; use a shorter cache_dir", String::new())(Errno::NAMETOOLONG));
        }
        fsconfig_set_string(&context, parameter, path.as_path()).map_err(|errno| failed("a file was refused", said(&context))(errno))?;
    }
    fsconfig_set_flag(&context, "ro").map_err(failed("it cannot be read-only", String::new()))?;
    if source.direct {
        fsconfig_set_flag(&context, "directio").map_err(failed("no direct I/O (Linux 6.15)", String::new()))?;
    }
    fsconfig_create(&context).map_err(|errno| failed("the kernel does not take the image", said(&context))(errno))?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
        .map_err(|errno| failed("it cannot be mounted", said(&context))(errno))
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
