//! The cache directory: the kernel keeps its cache files there, and asks much of the file system.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statfs::{FsType, Statfs, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::sys::uio::pwrite;

use super::{Check, Probes, Verdict};

/// Space below which the kernel refuses every fill, in percent of the whole file system: the default of
/// `bstop` and `fstop` (`cachefiles_daemon_open`, fs/cachefiles/daemon.c).
const STOP_PERCENT: u64 = 1;
/// Space that the kernel likes to see: the default of `brun` and `frun`.
const RUN_PERCENT: u64 = 7;
/// The block size with which every request is made of whole pages.
const BLOCK_BYTES: u64 = 4096;

/// File systems by their magic numbers (include/uapi/linux/magic.h, fs/xfs/xfs_format.h).
const KNOWN: [(i64, &str, Fitness); 13] = [
    (0x5846_5342, "XFS", Fitness::Best),
    (0xEF53, "ext4", Fitness::Good),
    (0x9123_683E, "btrfs", Fitness::Untested),
    (0xF2F5_2010, "F2FS", Fitness::Untested),
    (0x2FC1_2FC1, "ZFS", Fitness::Untested),
    (0x794C_7630, "overlayfs", Fitness::Untested),
    (0x0102_1994, "tmpfs", Fitness::Unfit),
    (0x8584_58F6, "ramfs", Fitness::Unfit),
    (0x6969, "NFS", Fitness::Unfit),
    (0xFF53_4D42, "CIFS", Fitness::Unfit),
    (0xFE53_4D42, "SMB", Fitness::Unfit),
    (0x6573_5546, "FUSE", Fitness::Unfit),
    (0xE0F5_E1E2, "EROFS", Fitness::Unfit),
];

/// How well a kind of file system serves as a cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fitness {
    Best,
    Good,
    Untested,
    Unfit,
}

/// Looks at the cache directory.
#[must_use]
pub fn checks(dir: &Path, probes: &Probes<'_>) -> Vec<Check> {
    const ID: &str = "cache-dir";
    let shown = dir.display();
    let bad = |found: String, remedy: String| vec![Check::fail(ID, Verdict::BadCacheDir, found, remedy)];
    match fs::metadata(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return vec![Check::warn(
                ID,
                format!("{shown} does not exist yet; infill serve makes it"),
                format!("see that it will lie on ext4 or better XFS, then: mkdir -p -m 0700 {shown}"),
            )];
        }
        Err(error) => {
            let remedy = "run as root, or name another with --cache-dir".to_owned();
            return bad(format!("{shown} cannot be examined: {error}"), remedy);
        }
        Ok(meta) if !meta.is_dir() => {
            let remedy = "name a directory with --cache-dir".to_owned();
            return bad(format!("{shown} is not a directory"), remedy);
        }
        Ok(_) => {}
    }
    let mut checks = vec![Check::ok(ID, format!("{shown} exists"))];
    match (statfs(dir), statvfs(dir)) {
        (Ok(stat), Ok(flags)) => {
            checks.push(kind_check(stat.filesystem_type()));
            checks.push(abilities_check(flags.flags().contains(FsFlags::ST_RDONLY), &try_file(dir, probes)));
            checks.push(block_check(block_bytes(&stat)));
            checks.push(space_check(
                Space { what: "space", free: stat.blocks_available(), total: stat.blocks() },
                Space { what: "inodes", free: stat.files_free(), total: stat.files() },
            ));
        }
        (Err(errno), _) | (_, Err(errno)) => {
            checks.push(Check::unknown("cache-fs", format!("the file system cannot be examined: {errno}"), ""))
        }
    }
    checks
}

#[allow(clippy::unnecessary_cast, reason = "the type differs between C libraries")]
fn block_bytes(stat: &Statfs) -> u64 {
    u64::try_from(stat.block_size() as i64).unwrap_or(0)
}

#[allow(clippy::unnecessary_cast, reason = "the type differs between C libraries")]
fn kind_check(kind: FsType) -> Check {
    const ID: &str = "cache-fs";
    let magic = kind.0 as i64;
    let known = KNOWN.iter().find(|(known, _, _)| *known == magic);
    match known {
        Some((_, name, Fitness::Best)) => Check::ok(ID, *name),
        Some((_, name, Fitness::Good)) => {
            Check::ok(ID, format!("{name}; XFS is better: {name} fills the holes of one file one write at a time"))
        }
        Some((_, name, Fitness::Unfit)) => Check::fail(
            ID,
            Verdict::BadCacheDir,
            format!("{name} cannot hold a cache (it takes tmpfile, user attributes, direct writes and sync)"),
            "use XFS or ext4",
        ),
        Some((_, name, Fitness::Untested)) => Check::warn(ID, format!("{name} has not been tried as a cache"), "use XFS or ext4"),
        None => Check::warn(ID, format!("an unknown kind of file system (magic {magic:#x})"), "use XFS or ext4"),
    }
}

/// What a file without a name can be made to do in the cache directory, as the kernel will want it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Abilities {
    /// `O_TMPFILE`: new cache files have no name at first (`cachefiles_create_tmpfile`).
    tmpfile: Result<(), Errno>,
    /// A `user.` attribute.
    xattr: Result<(), Errno>,
    /// A page written with `O_DIRECT`.
    direct: Result<(), Errno>,
}

fn try_file(dir: &Path, probes: &Probes<'_>) -> Abilities {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let make = |extra| open(dir, flags | extra, Mode::S_IRUSR | Mode::S_IWUSR);
    match make(OFlag::empty()) {
        Ok(file) => Abilities {
            tmpfile: Ok(()),
            xattr: (probes.set_xattr)(file.as_fd()),
            direct: make(OFlag::O_DIRECT).and_then(|file| write_page(&file)),
        },
        Err(errno) => Abilities { tmpfile: Err(errno), xattr: Ok(()), direct: Ok(()) },
    }
}

/// Writes one aligned page.
fn write_page(file: &OwnedFd) -> Result<(), Errno> {
    let page = usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX);
    let memory = vec![0_u8; 2 * page];
    let start = memory.as_ptr().align_offset(page);
    let buffer = memory.get(start..).and_then(|rest| rest.get(..page)).ok_or(Errno::ENOMEM)?;
    match pwrite(file, buffer, 0)? {
        written if written == page => Ok(()),
        _ => Err(Errno::ENOSPC),
    }
}

fn abilities_check(read_only: bool, abilities: &Abilities) -> Check {
    const ID: &str = "cache-abilities";
    let bad = |found: String, remedy: &str| Check::fail(ID, Verdict::BadCacheDir, found, remedy);
    if read_only {
        return bad("mounted read-only".to_owned(), "mount it for writing: mount -o remount,rw");
    }
    match abilities {
        Abilities { tmpfile: Err(errno @ (Errno::EACCES | Errno::EPERM)), .. } => {
            Check::unknown(ID, format!("not permitted to make a file: {errno}"), "run as the daemon's user")
        }
        Abilities { tmpfile: Err(errno), .. } => {
            bad(format!("files without a name (O_TMPFILE) are not possible: {errno}"), "use XFS or ext4, and see that there is space left")
        }
        Abilities { xattr: Err(errno), .. } => {
            bad(format!("user attributes are not possible: {errno}"), "use XFS or ext4 (without the mount option nouser_xattr)")
        }
        Abilities { direct: Err(errno), .. } => bad(
            format!("direct writes are not possible: {errno}"),
            "use XFS or ext4 on a disk with sectors of at most 4096 bytes, and see that there is space left",
        ),
        _ => Check::ok(ID, "nameless files, user attributes and direct writes work"),
    }
}

fn block_check(block_bytes: u64) -> Check {
    const ID: &str = "cache-blocks";
    if block_bytes > BLOCK_BYTES {
        Check::warn(
            ID,
            format!("blocks of {block_bytes} bytes: the kernel refuses them where its pages are smaller"),
            "make the file system with blocks of 4096 bytes (mkfs.xfs -b size=4096, mkfs.ext4 -b 4096)",
        )
    } else if block_bytes < BLOCK_BYTES {
        Check::warn(
            ID,
            format!("blocks of {block_bytes} bytes: the kernel cuts requests into parts of pages"),
            "make the file system with blocks of 4096 bytes (mkfs.xfs -b size=4096, mkfs.ext4 -b 4096)",
        )
    } else {
        Check::ok(ID, "4096 bytes")
    }
}

/// A resource of a file system.
#[derive(Clone, Copy, Debug)]
struct Space {
    what: &'static str,
    free: u64,
    /// 0: without limit.
    total: u64,
}

impl Space {
    /// Free share in percent, rounded down; all of it where there is no limit.
    fn percent(self) -> u64 {
        u64::try_from(u128::from(self.free) * 100 / u128::from(self.total.max(1)))
            .unwrap_or(100)
            .max(if self.total == 0 { 100 } else { 0 })
            .min(100)
    }
}

fn space_check(blocks: Space, inodes: Space) -> Check {
    const ID: &str = "cache-space";
    let short = if inodes.percent() < blocks.percent() { inodes } else { blocks };
    let (what, percent) = (short.what, short.percent());
    let remedy = "free some, or put the cache on a file system of its own: the shares count the whole file system";
    // cachefiles_has_space (fs/cachefiles/cache.c) compares with a threshold that was rounded down.
    if short.free <= short.total * STOP_PERCENT / 100 && short.total > 0 {
        Check::fail(
            ID,
            Verdict::BadCacheDir,
            format!("{percent} % of its {what} free: at {STOP_PERCENT} % (bstop, fstop) the kernel refuses every fill"),
            remedy,
        )
    } else if percent < RUN_PERCENT {
        Check::warn(
            ID,
            format!("{percent} % of its {what} free; below {STOP_PERCENT} % (bstop, fstop) the kernel refuses every fill"),
            remedy,
        )
    } else {
        Check::ok(ID, format!("{} % of space and {} % of inodes free", blocks.percent(), inodes.percent()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    const FINE: Abilities = Abilities { tmpfile: Ok(()), xattr: Ok(()), direct: Ok(()) };

    #[test]
    fn space_is_judged_by_the_scarcer_resource() {
        let space = |free, total| Space { what: "space", free, total };
        let inodes = |free, total| Space { what: "inodes", free, total };
        let plenty = space(500, 1000);
        assert_eq!(space_check(plenty, inodes(0, 0)).status, Status::Ok);
        assert_eq!(space_check(plenty, inodes(60, 1000)).status, Status::Warn);
        assert_eq!(space_check(space(11, 1000), inodes(0, 0)).status, Status::Warn);
        let full = space_check(space(10, 1000), inodes(9, 10));
        assert_eq!(full.verdict, Verdict::BadCacheDir);
        assert!(full.found.starts_with("1 % of its space free"), "{}", full.found);
    }

    #[test]
    fn a_file_system_that_lacks_something_is_refused_with_the_reason() {
        let judge = |abilities: &Abilities| abilities_check(false, abilities);
        assert_eq!(judge(&FINE).status, Status::Ok);
        assert_eq!(abilities_check(true, &FINE).verdict, Verdict::BadCacheDir);
        let no_xattr = judge(&Abilities { xattr: Err(Errno::EOPNOTSUPP), ..FINE });
        assert!(no_xattr.found.starts_with("user attributes"), "{}", no_xattr.found);
        let no_direct = judge(&Abilities { direct: Err(Errno::EINVAL), ..FINE });
        assert_eq!(no_direct.verdict, Verdict::BadCacheDir);
        let denied = judge(&Abilities { tmpfile: Err(Errno::EACCES), ..FINE });
        assert_eq!(denied.status, Status::Unknown);
        assert_eq!(kind_check(FsType(0x5846_5342)).status, Status::Ok);
        assert_eq!(kind_check(FsType(0x0102_1994)).verdict, Verdict::BadCacheDir);
        assert_eq!(kind_check(FsType(1)).status, Status::Warn);
        assert_eq!(block_check(1024).status, Status::Warn);
    }

    #[test]
    fn a_directory_that_is_missing_is_the_only_finding() {
        let probes = Probes { ring: &|| Ok(String::new()), holders: &|_| Vec::new(), set_xattr: &|_| Ok(()) };
        let found = checks(Path::new("/no/such/directory"), &probes);
        assert_eq!(found.len(), 1);
        // Not in the way: serving makes it.
        assert_eq!((found[0].status, found[0].verdict), (Status::Warn, Verdict::Ready));
        let temp = tempfile::tempdir().unwrap();
        assert!(checks(temp.path(), &probes).len() > 3);
    }
}
