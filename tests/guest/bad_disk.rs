//! A disk that fails when it is told to.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::Outcome;
use crate::guest::drop_caches;

/// How long the disk may stay in use after its test.
const FREE_LIMIT: Duration = Duration::from_secs(10);

/// A disk in memory whose sectors can be made to fail: null_blk with `badblocks`
/// (Documentation/block/null_blk.rst).
pub(crate) struct BadDisk {
    config: PathBuf,
    /// Where it is mounted.
    pub(crate) mounted: PathBuf,
    /// Sectors that fail.
    bad: Range<u64>,
}

/// Size of that disk.
const DISK_MIB: &str = "64";
/// The same in bytes.
const DISK_BYTES: u64 = 64 << 20;
/// What mke2fs needs on it for its tables, and more: 16,384 inodes of 256 bytes.
const TABLES_BYTES: u64 = 8 << 20;
/// Unit of `badblocks`.
const SECTOR_BYTES: u64 = 512;
/// Sectors of one entry of `badblocks` (`BB_MAX_LEN`).
const ENTRY_SECTORS: usize = 512;
/// Where the kernel has it.
const DEVICE: &str = "/dev/nullb0";

impl BadDisk {
    /// Makes the disk, a file system on it, and mounts that.
    pub(crate) fn make(mounted: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let config = PathBuf::from("/sys/kernel/config/nullb/nullb0");
        fs::create_dir(&config)?;
        for (name, value) in [("size", DISK_MIB), ("memory_backed", "1"), ("power", "1")] {
            fs::write(config.join(name), value).map_err(|e| format!("null_blk {name}: {e}"))?;
        }
        format()?;
        fs::create_dir_all(mounted)?;
        mount_at(mounted)?;
        Ok(Self { config, mounted: mounted.to_owned(), bad: 0..0 })
    }

    /// Makes the block with this content unreadable.
    pub(crate) fn spoil(&mut self, content: &[u8; 4096]) -> Outcome {
        let device = File::open(DEVICE)?;
        let mut block = [0; 4096];
        let mut at = 0;
        loop {
            device.read_exact_at(&mut block, at).map_err(|_| "the block is not on the disk")?;
            if block == *content {
                break;
            }
            at += 4096;
        }
        self.spoil_range(at / SECTOR_BYTES, 8)
    }

    /// Makes all but the file system's own tables fail.
    pub(crate) fn spoil_data(&mut self) -> Outcome {
        nix::unistd::sync();
        self.spoil_range(TABLES_BYTES / SECTOR_BYTES, (DISK_BYTES - TABLES_BYTES) / SECTOR_BYTES)?;
        drop_caches()?;
        let device = File::open(DEVICE)?;
        let works = |at: &u64| device.read_exact_at(&mut [0; 4096], *at).is_ok();
        match [TABLES_BYTES, DISK_BYTES / 4, DISK_BYTES / 2, DISK_BYTES - 4096].iter().find(|at| works(at)) {
            Some(at) => Err(format!("the disk does not fail at {at}").into()),
            None => Ok(()),
        }
    }

    fn spoil_range(&mut self, first: u64, sectors: u64) -> Outcome {
        self.bad = first..first + sectors;
        self.mark_bad('+')
    }

    /// Adds the range that is bad to the disk's list, or takes it out again. In pieces: `badblocks_set` of Linux 6.1 puts
    /// what is longer than an entry into the list back to front, and then does not find it.
    fn mark_bad(&self, sign: char) -> Outcome {
        for first in self.bad.clone().step_by(ENTRY_SECTORS) {
            let last = self.bad.end.min(first + ENTRY_SECTORS as u64) - 1;
            fs::write(self.config.join("badblocks"), format!("{sign}{first}-{last}"))?;
        }
        Ok(())
    }

    /// Puts a new, empty file system on it.
    pub(crate) fn renew(&self) -> Outcome {
        self.unmount()?;
        format()?;
        mount_at(&self.mounted)
    }

    /// Makes it readable again.
    pub(crate) fn heal(&mut self) -> Outcome {
        self.mark_bad('-')?;
        self.bad = 0..0;
        Ok(())
    }

    /// Takes it away.
    pub(crate) fn remove(self) -> Outcome {
        self.unmount()?;
        fs::remove_dir(&self.config)?;
        Ok(())
    }

    fn unmount(&self) -> Outcome {
        // Linux 6.1 closes the files of an ended process's rings some time later.
        let began = Instant::now();
        while let Err(errno) = umount2(&self.mounted, MntFlags::empty()) {
            if errno != Errno::EBUSY || began.elapsed() > FREE_LIMIT {
                return Err(format!("cannot unmount {}: {errno}", self.mounted.display()).into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// Without a journal, so that a failing disk does not end the file system.
fn format() -> Outcome {
    let status = Command::new("/sbin/mke2fs").args(["-q", "-F", "-b", "4096", "-O", "extent", DEVICE]).status()?;
    if status.success() { Ok(()) } else { Err(format!("mke2fs ended with {status}").into()) }
}

fn mount_at(dir: &Path) -> Outcome {
    Ok(mount(Some(DEVICE), dir, Some("ext4"), MsFlags::empty(), None::<&str>)?)
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.mounted, MntFlags::MNT_DETACH);
    }
}
