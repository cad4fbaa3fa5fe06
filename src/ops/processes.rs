//! Which processes hold a device that only one may open, which wait for data, and which use a mount.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

/// Where processes are found.
const PROC: &str = "/proc";

/// What `/proc/<pid>/fd` shows for an object's descriptor; each keeps the device busy, even when the device
/// itself was closed (`cachefiles_get_unbind_pincount`).
const OBJECT_LINK: &[u8] = b"anon_inode:[cachefiles]";

/// The function in which a reader or a mount waits for the daemon (fs/cachefiles/ondemand.c), as `/proc/<pid>/wchan`
/// tells it.
const WAITS_IN: &[u8] = b"cachefiles_ondemand_send_req";

/// Links of a process to files that it uses without having them open.
const OTHER_LINKS: [&str; 3] = ["cwd", "root", "exe"];
/// Column of `/proc/<pid>/maps` with the device of the mapped file.
const MAPS_DEVICE_COLUMN: usize = 3;

/// Longest part of a command line that is shown, in bytes.
const COMMAND_MAX_BYTES: usize = 80;

/// A process of this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    /// Its id in our PID namespace.
    pub pid: i32,
    /// Its command line, or its name in brackets if it has none; escaped for printing, and cut.
    pub command: String,
}

impl Process {
    /// Whether it is one of ours that holds the device and answers nobody.
    #[must_use]
    pub fn only_keeps(&self) -> bool {
        self.command.ends_with(" keeper")
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)
    }
}

/// Those that hold the device in words, for a message.
#[must_use]
pub fn describe(holders: &[Process]) -> String {
    if holders.is_empty() {
        return "a process that /proc does not show here (another PID namespace, or an io_uring)".to_owned();
    }
    let texts: Vec<_> = holders.iter().map(Process::to_string).collect();
    texts.join(", ")
}

/// The processes that hold the character device `path` open, by whatever name and in whatever mount namespace, or
/// an object of it. Only processes that we may look into are found; none if there is no such device.
#[must_use]
pub fn find_holders(path: &Path) -> Vec<Process> {
    let Some(device) = device_number(path) else {
        return Vec::new();
    };
    found(|pid| holds(pid, device))
}

/// The processes that wait in the kernel for an answer of the daemon, with any of their threads. Only processes that we
/// may look into are found.
#[must_use]
pub fn find_waiting() -> Vec<Process> {
    found(|pid| {
        let threads = fs::read_dir(format!("{PROC}/{pid}/task")).into_iter().flatten().flatten();
        threads.map(|thread| fs::read(thread.path().join("wchan"))).any(|place| place.is_ok_and(|place| place == WAITS_IN))
    })
}

/// The number of the file system that `path` is on (`st_dev`), without asking a server for it.
///
/// # Errors
/// There is no such file.
pub fn file_system(path: &Path) -> std::io::Result<u64> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?;
    Ok(rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor))
}

/// The processes that use a file of this file system: open, mapped, as their program, or as a directory of theirs. Of any
/// mount of it, also in other namespaces, and of one that was taken away. Only processes that we may look into are found.
#[must_use]
pub fn find_users(file_system: u64) -> Vec<Process> {
    found(|pid| uses(pid, file_system))
}

fn uses(pid: i32, wanted: u64) -> bool {
    let own = format!("{PROC}/{pid}");
    let is_there = |path: &Path| file_system(path).is_ok_and(|found| found == wanted);
    let is_open = || fs::read_dir(format!("{own}/fd")).into_iter().flatten().flatten().any(|fd| is_there(&fd.path()));
    let (major, minor) = (rustix::fs::major(wanted), rustix::fs::minor(wanted));
    let device = format!("{major:02x}:{minor:02x}");
    let is_mapped = || {
        let maps = fs::read(format!("{own}/maps")).unwrap_or_default();
        let device_of = |line: &[u8]| line.split(|&byte| byte == b' ').nth(MAPS_DEVICE_COLUMN).map(<[u8]>::to_vec);
        maps.split(|&byte| byte == b'\n').any(|line| device_of(line).is_some_and(|found| found == device.as_bytes()))
    };
    OTHER_LINKS.iter().any(|link| is_there(&Path::new(&own).join(link))) || is_open() || is_mapped()
}

/// The processes that are meant.
fn found(is_meant: impl Fn(i32) -> bool) -> Vec<Process> {
    let entries = fs::read_dir(PROC).into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| is_meant(*pid)).map(|pid| Process { pid, command: command(pid) }).collect()
}

fn device_number(path: &Path) -> Option<u64> {
    let found = fs::metadata(path).ok()?;
    found.file_type().is_char_device().then_some(found.rdev())
}

fn holds(pid: i32, device: u64) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("{PROC}/{pid}/fd")) else {
        // It ended, or is not ours to look into.
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        let path = descriptor.path();
        let Ok(target) = fs::read_link(&path) else {
            return false;
        };
        let target = target.as_os_str();
        // Sockets, pipes and the like have no path; the rest is asked what it is, as the text of a link means
        // nothing in another mount namespace.
        is_object(target) || target.as_bytes().starts_with(b"/") && device_number(&path) == Some(device)
    })
}

fn is_object(link: &OsStr) -> bool {
    link.as_bytes() == OBJECT_LINK
}

fn command(pid: i32) -> String {
    let read = |name| fs::read(format!("{PROC}/{pid}/{name}")).unwrap_or_default();
    let mut line = read("cmdline");
    if line.is_empty() {
        line = [b"[", read("comm").trim_ascii_end(), b"]"].concat();
    }
    line.truncate(COMMAND_MAX_BYTES);
    // Each word ends with NUL.
    let words: Vec<_> = line.split(|byte| *byte == 0).filter(|word| !word.is_empty()).collect();
    words.join(&b' ').escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_holder_is_found_under_any_name_of_the_device() {
        // Another name for the same device, as in another mount namespace.
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("other-name");
        std::os::unix::fs::symlink("/dev/full", &link).unwrap();
        let held = File::open("/dev/full").unwrap();
        let holders = find_holders(&link);
        let own = i32::try_from(std::process::id()).unwrap();
        let me = holders.iter().find(|holder| holder.pid == own).unwrap();
        assert!(!me.command.is_empty());
        drop(held);
    }

    #[test]
    fn what_is_no_device_has_no_holders() {
        assert_eq!(find_holders(Path::new("/proc/self/stat")), []);
        assert_eq!(find_holders(Path::new("/no/such/path")), []);
    }

    #[test]
    fn who_uses_a_file_is_found_whether_it_is_open_or_mapped() {
        let of_me = |users: Vec<Process>| users.iter().any(|user| user.pid == i32::try_from(std::process::id()).unwrap());
        // procfs is used by nobody who does not read it just now; other tests do.
        assert!(of_me(find_users(file_system(&std::env::current_exe().unwrap()).unwrap())));
        assert!(!of_me(find_users(u64::MAX)));
        let mapped = format!("{PROC}/{}/maps", std::process::id());
        let column =
            fs::read_to_string(mapped).unwrap().lines().next().and_then(|line| line.split(' ').nth(MAPS_DEVICE_COLUMN).map(str::len));
        assert!(column >= Some("00:00".len()), "{column:?}");
    }

    #[test]
    fn objects_of_the_device_count_as_holding_it() {
        assert!(is_object(OsStr::new("anon_inode:[cachefiles]")));
        assert!(!is_object(OsStr::new("anon_inode:[eventpoll]")));
    }
}
