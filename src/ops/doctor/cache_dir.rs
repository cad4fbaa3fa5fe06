//! The cache directory: the kernel keeps its cache files there, and asks much of the file system.
//!
//! What cachefiles cannot do without is tried by [`crate::front::cachefiles::cache_dir`], as before every
//! bind; here are the things that make a cache slow or full.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{Statfs, statfs};

use super::{Check, Verdict};
use crate::front::cachefiles::cache_dir::{CacheDirError, EXTENT_BYTES, check, hinted_dirs};
use crate::ops::{exit, extsize};

/// Space below which the kernel refuses every fill, in percent of the whole file system: the default of
/// `bstop` and `fstop` (`cachefiles_daemon_open`, fs/cachefiles/daemon.c).
const STOP_PERCENT: u64 = 1;
/// Space that the kernel likes to see: the default of `brun` and `frun`.
const RUN_PERCENT: u64 = 7;
/// The block size with which every request is made of whole pages.
const BLOCK_BYTES: u64 = 4096;

/// `XFS_SB_MAGIC` (fs/xfs/libxfs/xfs_format.h).
const XFS_MAGIC: u32 = 0x5846_5342;
/// `EXT4_SUPER_MAGIC` (include/uapi/linux/magic.h).
const EXT4_MAGIC: u32 = 0xEF53;

/// Looks at the cache directory, or where it would be made.
#[must_use]
pub fn checks(dir: &Path) -> Vec<Check> {
    const ID: &str = "cache-dir";
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let Some(existing) = dir.ancestors().find(|path| path.exists()) else {
        let found = format!("{} is nowhere to be found", dir.display());
        return vec![Check::fail(ID, Verdict::BadCacheDir, found, "give an absolute path with --cache-dir")];
    };
    if !existing.is_dir() {
        let found = format!("{} is not a directory", existing.display());
        return vec![Check::fail(ID, Verdict::BadCacheDir, found, "name a directory with --cache-dir")];
    }
    if let Err(error) = check(existing) {
        return vec![unfit(ID, &error)];
    }
    let mut checks = vec![if existing == dir {
        Check::ok(ID, format!("{} can be the cache", dir.display()))
    } else {
        Check::ok(ID, format!("{} does not exist yet and can be made in {}", dir.display(), existing.display()))
    }];
    match statfs(existing) {
        Ok(stat) => {
            checks.extend(judge(&stat));
            checks.extend(extents_check(existing, existing == dir, &stat));
        }
        Err(errno) => checks.push(Check::unknown("cache-fs", format!("the file system cannot be examined: {errno}"), "")),
    }
    checks
}

/// A directory that cachefiles cannot use. The advice is the last part of the error's text.
fn unfit(id: &'static str, error: &CacheDirError) -> Check {
    let text = error.to_string();
    let (found, remedy) = text.rsplit_once("; ").or_else(|| text.rsplit_once(": ")).unwrap_or((&text, ""));
    let verdict = match error.exit_code() {
        exit::NO_PERMISSION => Verdict::NotPermitted,
        _ => Verdict::BadCacheDir,
    };
    Check::fail(id, verdict, found, remedy)
}

fn judge(stat: &Statfs) -> [Check; 3] {
    // The types of these fields differ between targets; f_type has 32 bits.
    let magic = stat.filesystem_type().0 as u32;
    let block_bytes = u64::try_from(stat.block_size()).unwrap_or(0);
    [
        kind_check(magic),
        block_check(block_bytes),
        space_check(
            Space { what: "space", free: stat.blocks_available(), total: stat.blocks() },
            Space { what: "inodes", free: stat.files_free(), total: stat.files() },
        ),
    ]
}

fn kind_check(magic: u32) -> Check {
    const ID: &str = "cache-fs";
    match magic {
        XFS_MAGIC => Check::ok(ID, "XFS"),
        EXT4_MAGIC => Check::ok(ID, "ext4; XFS is better: ext4 fills the holes of one file one write at a time"),
        other => Check::warn(ID, format!("neither XFS nor ext4 (magic {other:#x}); not tried as a cache"), "use XFS or ext4"),
    }
}

/// Larger blocks than a page were refused before.
fn block_check(block_bytes: u64) -> Check {
    const ID: &str = "cache-blocks";
    if block_bytes >= BLOCK_BYTES {
        return Check::ok(ID, format!("{block_bytes} bytes"));
    }
    Check::warn(
        ID,
        format!("blocks of {block_bytes} bytes: the kernel cuts requests into parts of pages"),
        "make the file system with blocks of 4096 bytes (mkfs.xfs -b size=4096, mkfs.ext4 -b 4096)",
    )
}

/// On XFS: whether cache files will have few extents.
fn extents_check(dir: &Path, is_cache: bool, stat: &Statfs) -> Option<Check> {
    if stat.filesystem_type().0 as u32 != XFS_MAGIC {
        return None;
    }
    let hint = |dir: &PathBuf| extsize::hinted(File::open(dir).ok()?).ok().flatten();
    let dirs = if is_cache { hinted_dirs(dir).into_iter().filter(|dir| dir.is_dir()).collect() } else { Vec::new() };
    let hints: Vec<_> = dirs.into_iter().map(|dir| (hint(&dir), dir)).collect();
    Some(judge_hints(&hints))
}

fn judge_hints(hints: &[(Option<u32>, PathBuf)]) -> Check {
    const ID: &str = "cache-extents";
    let small: Vec<_> = hints.iter().filter(|(hint, _)| hint.unwrap_or(0) < EXTENT_BYTES).collect();
    let Some((hint, dir)) = small.first() else {
        return Check::ok(ID, format!("cache files take their space in pieces of at least {EXTENT_BYTES} bytes"));
    };
    let state = hint.map_or_else(|| "no extent size hint".to_owned(), |bytes| format!("an extent size hint of {bytes} bytes only"));
    let dirs: Vec<_> = small.iter().map(|(_, dir)| dir.display().to_string()).collect();
    Check::warn(
        ID,
        format!("{} has {state}: cache files may come in many small extents, which makes what is cached slow to read", dir.display()),
        format!("xfs_io -c 'extsize {EXTENT_BYTES}' {} (infill serve does it where there is no hint, if it may)", dirs.join(" ")),
    )
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
    fn each_directory_without_a_good_hint_is_named_in_the_command() {
        let (top, below) = (PathBuf::from("/c"), PathBuf::from("/c/cache"));
        assert_eq!(judge_hints(&[]).status, Status::Ok);
        assert_eq!(judge_hints(&[(Some(EXTENT_BYTES), top.clone()), (Some(EXTENT_BYTES * 4), below.clone())]).status, Status::Ok);
        let found = judge_hints(&[(Some(EXTENT_BYTES), top.clone()), (Some(4096), below.clone())]);
        assert_eq!(found.status, Status::Warn);
        assert!(found.remedy.starts_with("xfs_io -c 'extsize 1048576' /c/cache ("), "{}", found.remedy);
        let found = judge_hints(&[(None, top), (None, below)]);
        assert!(found.found.starts_with("/c has no extent size hint") && found.remedy.contains("/c /c/cache ("), "{found:?}");
    }

    #[test]
    fn a_directory_that_cannot_be_the_cache_is_refused_with_the_way_out() {
        for (dir, word) in [("/dev/null/x", "not a directory"), ("/dev/shm", "tmpfs")] {
            let found = checks(Path::new(dir));
            assert_eq!((found.len(), found[0].verdict), (1, Verdict::BadCacheDir), "{dir}");
            assert!(found[0].found.contains(word) && !found[0].remedy.is_empty(), "{:?}", found[0]);
        }
    }

    #[test]
    fn a_directory_that_is_missing_is_judged_by_its_parent_and_not_made() {
        let program = std::env::current_exe().unwrap();
        let dir = program.parent().unwrap().join("missing/cache");
        let found = checks(&dir);
        assert!(!dir.exists());
        assert!(matches!(found.len(), 4 | 5) || found[0].status == Status::Fail, "{found:?}");
        assert_eq!(kind_check(XFS_MAGIC).status, Status::Ok);
        assert_eq!(kind_check(1).status, Status::Warn);
        assert_eq!(block_check(1024).status, Status::Warn);
    }
}
