//! A disk that is slow for one process, or as good as stopped: the block layer's own throttling, through a control group. A read waits in the
//! kernel as for a slow disk, and nobody has to wait in the system call by which it was begun. (An event of a group of the bench's own
//! would hold a ring up: the kernel waits for the answer inside of `rw_verify_area`.)

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use crate::lab::{Result, Trying};

/// Where control groups of the first kind have the controller, and those of the second have everything.
const FIRST: &str = "/sys/fs/cgroup/blkio";
const SECOND: &str = "/sys/fs/cgroup";

/// What the disk does when it is throttled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Limit {
    /// As good as nothing.
    Stopped,
    /// So many reads, and so many bytes, a second at most: a disk that has to move its head for each.
    Slow { reads_per_s: u64, bytes_per_s: u64 },
}

/// A group of one process. It is given back when dropped.
pub(super) struct Throttle {
    group: PathBuf,
    settings: Vec<Setting>,
}

/// One file of the group, and its values.
struct Setting {
    path: PathBuf,
    throttled: String,
    free: String,
}

impl Throttle {
    /// For what the process `pid` reads from the disk under `dir`. `None`: this machine has no such controller, as is said.
    ///
    /// # Errors
    /// The process cannot be moved.
    pub(super) fn of(pid: u32, dir: &Path, limit: Limit) -> Result<Option<Self>> {
        let device = fs::metadata(dir).trying(|| format!("cannot look at {}", dir.display()))?.dev();
        let device = format!("{}:{}", major(device), minor(device));
        let has_second =
            || fs::read_to_string(Path::new(SECOND).join("cgroup.controllers")).is_ok_and(|all| all.split_whitespace().any(|c| c == "io"));
        // Names in groups of the first kind and of the second, and values.
        let limits = match limit {
            Limit::Stopped => vec![("read_bps", "rbps", 1)],
            Limit::Slow { reads_per_s, bytes_per_s } => vec![("read_iops", "riops", reads_per_s), ("read_bps", "rbps", bytes_per_s)],
        };
        let is_first = Path::new(FIRST).join("cgroup.procs").exists();
        if !is_first && !has_second() {
            eprintln!("infill: not measured beside a slow disk: no control group can throttle one here");
            return Ok(None);
        }
        let root = if is_first { FIRST } else { SECOND };
        if !is_first {
            // It may be there already.
            let _ = fs::write(Path::new(SECOND).join("cgroup.subtree_control"), "+io");
        }
        let group = Path::new(root).join(format!("infill-bench-{pid}"));
        fs::create_dir_all(&group).trying(|| format!("cannot make {}", group.display()))?;
        let setting = |(of_first, of_second, value): (&str, &str, u64)| {
            let (name, throttled, free) = if is_first {
                (format!("blkio.throttle.{of_first}_device"), format!("{device} {value}"), format!("{device} 0"))
            } else {
                ("io.max".to_owned(), format!("{device} {of_second}={value}"), format!("{device} {of_second}=max"))
            };
            Setting { path: group.join(name), throttled, free }
        };
        let throttle = Self { settings: limits.into_iter().map(setting).collect(), group };
        let members = throttle.group.join("cgroup.procs");
        fs::write(&members, pid.to_string()).trying(|| format!("cannot write to {}", members.display()))?;
        Ok(Some(throttle))
    }

    /// Whether reads are held up.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(super) fn set(&self, holds_up: bool) -> Result<()> {
        self.settings.iter().try_for_each(|Setting { path, throttled, free }| {
            let value = if holds_up { throttled } else { free };
            fs::write(path, value).trying(|| format!("cannot write {value} to {}", path.display()))
        })
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let _ = self.set(false);
        // If the process is there still, the empty group stays.
        let _ = fs::remove_dir(&self.group);
    }
}
