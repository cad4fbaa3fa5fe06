//! Mounting an image through the kernel's on-demand mode: the options of the mount, and what its errors mean.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::statfs;
use rustix::fs::{AtFlags, CWD, FileType, StatxAttributes, StatxFlags, statx};

use super::processes::{self, Process};
use super::{erofs, exit};
use crate::key::Key;

/// How long a mount may be busy although /proc shows nobody who uses it: a process between fork and exec has what its parent
/// had open, and a file that was closed is let go of a little later.
const BUSY_MAX: Duration = Duration::from_secs(2);
/// Pause between two tries.
const BUSY_POLL: Duration = Duration::from_millis(10);

/// What is mounted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// Name of the image: EROFS's `fsid`.
    pub name: String,
    /// Images with the same `domain_id` share their blobs; without it the image is by itself.
    pub domain: Option<String>,
    /// Names of its extra devices, in order; none: those that the image itself has.
    pub devices: Vec<String>,
}

/// Why an image was not mounted or unmounted. Each message is one line that says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A name that cannot be given to the kernel.
    #[error("{what} {name:?}: a mount option cannot hold a comma, and cannot be empty; give the blob another name")]
    BadName {
        /// What it names.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// There is no such directory.
    #[error("{dir}: {source}; give an existing directory")]
    BadDir {
        /// Where to.
        dir: String,
        /// Why not.
        source: io::Error,
    },
    /// There is an image already, which would be hidden.
    #[error("{0}: an image is mounted here already; unmount it first (infill umount), or name another directory")]
    InUse(String),
    /// The kernel refused.
    #[error("cannot mount {image} on {dir}: {errno}: {}", advice(*.errno))]
    Refused {
        /// What.
        image: String,
        /// Where to.
        dir: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Something else, or nothing, is mounted there.
    #[error("{0}: no EROFS image is mounted here; see findmnt -t erofs")]
    NotMounted(String),
    /// Somebody uses it.
    #[error("cannot unmount {dir}: it is used by {}", in_words(.users))]
    Busy {
        /// Where.
        dir: String,
        /// Who, as far as /proc shows.
        users: Vec<Process>,
    },
    /// The kernel does not unmount it.
    #[error("cannot unmount {dir}: {errno}: {}", unmount_advice(*.errno))]
    NotUnmounted {
        /// Where.
        dir: String,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl MountError {
    /// The exit code that says what kind of failure it is.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::BadName { .. } | Self::BadDir { .. } => exit::USAGE,
            Self::Refused { errno: Errno::EPERM | Errno::EACCES, .. } | Self::NotUnmounted { errno: Errno::EPERM, .. } => {
                exit::NO_PERMISSION
            }
            Self::Refused { errno: Errno::ENODEV | Errno::ENOTBLK, .. } => exit::UNAVAILABLE,
            Self::Refused { .. } | Self::InUse(_) | Self::NotMounted(_) | Self::Busy { .. } | Self::NotUnmounted { .. } => exit::FAILED,
        }
    }
}

/// What an error of mount(2) means here: `erofs_fc_get_tree` and what it calls (fs/erofs/super.c, fscache.c).
const fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => "only root may mount; run it with CAP_SYS_ADMIN in the initial user namespace",
        Errno::ENODEV => "this kernel has no EROFS; try modprobe erofs",
        Errno::ENOTBLK => "this kernel's EROFS has no on-demand mode; see infill doctor",
        Errno::EBUSY => "the name is in use, by a mount with other options or under another cache; see findmnt -t erofs",
        Errno::EIO | Errno::ENOENT | Errno::ETIMEDOUT => {
            "the daemon could not find or read the image or one of its blobs; its log says why"
        }
        Errno::EINVAL => {
            "it is no image that this kernel understands, its devices are not those of the mount, or the kernel lacks on-demand mode; see dmesg and infill doctor"
        }
        _ => "see dmesg, the daemon's log and infill doctor",
    }
}

fn in_words(users: &[Process]) -> String {
    if users.is_empty() {
        return "no process that /proc shows, so perhaps by a mount on it or an overlay of it; see findmnt".to_owned();
    }
    format!("{}; end them first", processes::describe(users))
}

const fn unmount_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM => "only root may unmount",
        _ => "see dmesg",
    }
}

impl Image {
    /// The keys under which the daemon is asked for its parts; `devices` are the names in the image, in case the mount
    /// has none.
    #[must_use]
    pub fn keys(&self, devices: &[Vec<u8>]) -> Vec<Key> {
        let given = self.devices.iter().map(String::as_bytes);
        let of_image = devices.iter().map(Vec::as_slice).filter(|name| self.devices.is_empty() && !name.is_empty());
        std::iter::once(self.key()).chain(given.chain(of_image).map(|name| self.key_of(name))).collect()
    }

    /// The image's own key, the first of its [`Image::keys`].
    #[must_use]
    pub fn key(&self) -> Key {
        self.key_of(self.name.as_bytes())
    }

    fn key_of(&self, name: &[u8]) -> Key {
        Key::new(self.domain.as_ref().unwrap_or(&self.name).as_bytes(), name)
    }

    /// The options for mount(2).
    fn options(&self) -> Result<String, MountError> {
        let domain = self.domain.iter().map(|name| ("domain_id", "the domain", name));
        let devices = self.devices.iter().map(|name| ("device", "the device", name));
        let parts = std::iter::once(("fsid", "the image", &self.name)).chain(domain).chain(devices);
        let option = |(option, what, name): (&str, &'static str, &String)| match name.is_empty() || name.contains(',') {
            true => Err(MountError::BadName { what, name: name.clone() }),
            false => Ok(format!("{option}={name}")),
        };
        Ok(parts.map(option).collect::<Result<Vec<_>, _>>()?.join(","))
    }

    /// Mounts it, for reading. A daemon must serve: the kernel waits for what it says of the image.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn mount(&self, dir: &Path) -> Result<(), MountError> {
        let shown = dir.display().to_string();
        let options = self.options()?;
        check_dir(dir)?;
        mount(Some(self.name.as_str()), dir, Some("erofs"), MsFlags::MS_RDONLY, Some(options.as_str()))
            .map_err(|errno| MountError::Refused { image: self.name.clone(), dir: shown, errno })
    }
}

/// Whether an image can be mounted on `dir`.
///
/// # Errors
/// It is no directory, or an image is mounted there.
pub fn check_dir(dir: &Path) -> Result<(), MountError> {
    let shown = dir.display().to_string();
    let bad = |source: io::Error| MountError::BadDir { dir: shown.clone(), source };
    let found = statx(CWD, dir, AtFlags::empty(), StatxFlags::TYPE).map_err(|errno| bad(errno.into()))?;
    if FileType::from_raw_mode(found.stx_mode.into()) != FileType::Directory {
        return Err(bad(Errno::ENOTDIR.into()));
    }
    let is_mount = found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    let kind = statfs(dir).map_err(|errno| bad(errno.into()))?.filesystem_type();
    if is_mount && erofs::is_erofs(kind) { Err(MountError::InUse(shown)) } else { Ok(()) }
}

/// Unmounts the image on `dir`.
///
/// # Errors
/// See [`MountError`].
pub fn unmount(dir: &Path) -> Result<(), MountError> {
    let shown = dir.display().to_string();
    match statfs(dir) {
        Ok(stat) if erofs::is_erofs(stat.filesystem_type()) => {}
        Ok(_) => return Err(MountError::NotMounted(shown)),
        Err(errno) => return Err(MountError::BadDir { dir: shown, source: errno.into() }),
    }
    let since = Instant::now();
    loop {
        return match umount2(dir, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => Ok(()),
            Err(Errno::EBUSY) => {
                let users = processes::file_system(dir).map(processes::find_users).unwrap_or_default();
                if users.is_empty() && since.elapsed() < BUSY_MAX {
                    std::thread::sleep(BUSY_POLL);
                    continue;
                }
                Err(MountError::Busy { dir: shown, users })
            }
            // A directory inside of an image.
            Err(Errno::EINVAL) => Err(MountError::NotMounted(shown)),
            Err(errno) => Err(MountError::NotUnmounted { dir: shown, errno }),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(domain: Option<&str>, devices: &[&str]) -> Image {
        Image { name: "a.img".into(), domain: domain.map(Into::into), devices: devices.iter().map(|&d| d.into()).collect() }
    }

    #[test]
    fn options_are_those_of_the_kernel() {
        assert_eq!(image(None, &[]).options().unwrap(), "fsid=a.img");
        assert_eq!(image(Some("d"), &["b0", "b1"]).options().unwrap(), "fsid=a.img,domain_id=d,device=b0,device=b1");
        let error = image(Some("d"), &["b,ro"]).options().unwrap_err();
        assert!(error.to_string().starts_with("the device \"b,ro\": a mount option cannot hold a comma"), "{error}");
        assert!(image(Some(""), &[]).options().is_err());
    }

    #[test]
    fn keys_are_those_that_the_kernel_asks_for() {
        let keys = |image: &Image, found: &[&[u8]]| {
            let found: Vec<_> = found.iter().map(|name| name.to_vec()).collect();
            image.keys(&found).iter().map(Key::to_string).collect::<Vec<_>>()
        };
        assert_eq!(keys(&image(None, &[]), &[b"x", b""]), ["a.img/a.img", "a.img/x"]);
        assert_eq!(keys(&image(Some("d"), &["b0"]), &[b"x"]), ["d/a.img", "d/b0"]);
    }

    #[test]
    fn what_is_no_mount_is_not_unmounted() {
        assert!(matches!(unmount(Path::new("/")), Err(MountError::NotMounted(_))));
        assert!(matches!(unmount(Path::new("/nowhere/at/all")), Err(MountError::BadDir { .. })));
        for dir in ["/nowhere/at/all", "/proc/self/stat"] {
            let error = image(None, &[]).mount(Path::new(dir)).unwrap_err();
            assert!(matches!(error, MountError::BadDir { .. }) && error.exit_code() == exit::USAGE, "{error}");
        }
        assert!(check_dir(Path::new("/proc")).is_ok(), "a mount, but of no image");
    }
}
