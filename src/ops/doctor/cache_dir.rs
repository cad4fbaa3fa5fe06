//! The cache directory: the kernel keeps its cache files there, and asks much of the file system.
//!
//! What cachefiles cannot do without is tried by [`crate::front::cachefiles::cache_dir`], as before every
//! bind; here are the things that make a cache slow or full.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{EXT4_SUPER_MAGIC, FsType, Statfs, XFS_SUPER_MAGIC, statfs};
use rustix::fs::{AtFlags, StatxFlags, statx};

use super::{Check, Id, Subject, Verdict, quoted};
use crate::front::cachefiles::cache_dir::{CacheDirError, EXTENT_BYTES, check, hinted_dirs, nameless};
use crate::front::cachefiles::fsck::{self, FsckReport};
use crate::front::cachefiles::tree::{CACHE, Census, Dir, census};
use crate::front::cachefiles::{CullLimits, DEFAULT_DEVNODE, Percents};
use crate::ops::processes::{describe, find_holders};
use crate::ops::space::policy::{Level, Room};
use crate::ops::{exit, extsize, space};

/// The block size with which every request is made of whole pages.
const BLOCK_BYTES: u64 = 4096;

/// What cachefiles aligns its writes to (`CACHEFILES_DIO_BLOCK_SIZE`, fs/cachefiles/internal.h).
const DIRECT_BYTES: u32 = 4096;

/// Damaged objects that are named; of more only the number is given.
const NAMED_MAX: usize = 3;

/// Looks at the cache directory, or where it would be made, with the settings that `serve` would use.
#[must_use]
pub fn checks(subject: &Subject<'_>) -> Vec<Check> {
    const ID: Id = Id::CacheDir;
    let dir = std::path::absolute(subject.cache_dir).unwrap_or_else(|_| subject.cache_dir.to_owned());
    let Some(existing) = dir.ancestors().find(|path| path.exists()) else {
        let found = format!("{} is nowhere to be found", dir.display());
        return vec![Check::fail(ID, Verdict::BadCacheDir, found, "give an absolute path with --cache-dir")];
    };
    if !existing.is_dir() {
        let found = format!("{} is not a directory", existing.display());
        return vec![Check::fail(ID, Verdict::BadCacheDir, found, "name a directory with --cache-dir")];
    }
    if let Err(error) = check(existing) {
        return vec![unfit(&error)];
    }
    let mut checks = vec![if existing == dir {
        Check::ok(ID, format!("{} can be the cache", dir.display()))
    } else {
        Check::ok(ID, format!("{} does not exist yet and can be made in {}", dir.display(), existing.display()))
    }];
    match statfs(existing) {
        Ok(stat) => {
            checks.extend(judge(&stat));
            checks.extend(extents_check(subject, existing, existing == dir, &stat));
        }
        Err(errno) => checks.push(Check::unknown(Id::CacheFs, format!("the file system cannot be examined: {errno}"), "see dmesg")),
    }
    checks.push(direct_check(alignment(existing)));
    match File::open(existing).and_then(|file| Ok(space::room(&file)?)) {
        Ok(room) => checks.push(space_check(&room, subject.limits)),
        Err(error) => checks.push(Check::unknown(Id::CacheSpace, format!("it cannot be told how full it is: {error}"), "see df")),
    }
    if dir.join(CACHE).exists() {
        checks.push(objects_check(&dir, subject.cache_bytes));
    }
    checks
}

/// A directory that cachefiles cannot use. The advice is the last part of the error's text.
fn unfit(error: &CacheDirError) -> Check {
    let text = error.to_string();
    let (found, remedy) = text.rsplit_once("; ").or_else(|| text.rsplit_once(": ")).unwrap_or((&text, ""));
    let verdict = match error.exit_code() {
        exit::NO_PERMISSION => Verdict::NotPermitted,
        _ => Verdict::BadCacheDir,
    };
    Check::fail(Id::CacheDir, verdict, found, remedy)
}

fn judge(stat: &Statfs) -> [Check; 2] {
    // The type of f_bsize differs between targets.
    let block_bytes = u64::try_from(stat.block_size()).unwrap_or(0);
    [kind_check(stat.filesystem_type()), block_check(block_bytes)]
}

fn kind_check(kind: FsType) -> Check {
    const ID: Id = Id::CacheFs;
    match kind {
        XFS_SUPER_MAGIC => Check::ok(ID, "XFS"),
        EXT4_SUPER_MAGIC => Check::ok(ID, "ext4; XFS is better: ext4 fills the holes of one file one write at a time"),
        FsType(magic) => Check::warn(ID, format!("neither XFS nor ext4 (magic {magic:#x}); not tried as a cache"), "use XFS or ext4"),
    }
}

/// Larger blocks than a page were refused before.
fn block_check(block_bytes: u64) -> Check {
    const ID: Id = Id::CacheBlocks;
    if block_bytes >= BLOCK_BYTES {
        return Check::ok(ID, format!("{block_bytes} bytes"));
    }
    Check::warn(
        ID,
        format!("blocks of {block_bytes} bytes: the kernel cuts requests into parts of pages"),
        "make the file system with blocks of 4096 bytes (mkfs.xfs -b size=4096, mkfs.ext4 -b 4096)",
    )
}

/// What the file system asks of direct writes: alignment of memory and of offsets, in bytes. `None`: it does not tell (before 6.1).
fn alignment(dir: &Path) -> Option<(u32, u32)> {
    let file = nameless(dir).ok()?;
    let found = statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let tells = found.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    tells.then_some((found.stx_dio_mem_align, found.stx_dio_offset_align))
}

/// The kernel writes cache files with direct I/O, in blocks of [`DIRECT_BYTES`].
fn direct_check(alignment: Option<(u32, u32)>) -> Check {
    const ID: Id = Id::CacheDirectIo;
    match alignment {
        None => Check::ok(ID, "works in blocks of 4096 bytes (tried; the kernel does not tell more)"),
        Some((memory, offset)) if offset != 0 && offset.max(memory) <= DIRECT_BYTES => {
            Check::ok(ID, format!("aligned to {offset} bytes, memory to {memory}"))
        }
        Some((0, 0)) => Check::warn(
            ID,
            "the file system says that it has no direct I/O, and takes such writes all the same",
            "use a plain ext4 (not data=journal, not encrypted) or XFS",
        ),
        Some((memory, offset)) => Check::fail(
            ID,
            Verdict::BadCacheDir,
            format!(
                "direct I/O is to be aligned to {offset} bytes, memory to {memory}; the kernel writes cache files in blocks of {DIRECT_BYTES}"
            ),
            "use a file system on a disk with sectors of at most 4096 bytes (lsblk -t shows them)",
        ),
    }
}

/// On XFS: whether cache files will have few extents.
fn extents_check(subject: &Subject<'_>, dir: &Path, is_cache: bool, stat: &Statfs) -> Option<Check> {
    if stat.filesystem_type() != XFS_SUPER_MAGIC {
        return None;
    }
    let hint = |dir: &PathBuf| extsize::hinted(File::open(dir).ok()?).ok().flatten();
    let dirs = if is_cache { hinted_dirs(dir).into_iter().filter(|dir| dir.is_dir()).collect() } else { Vec::new() };
    let hints: Vec<_> = dirs.into_iter().map(|dir| (hint(&dir), dir)).collect();
    Some(judge_hints(&hints, subject.xfs_extent_bytes.unwrap_or(EXTENT_BYTES)))
}

fn judge_hints(hints: &[(Option<u32>, PathBuf)], wanted_bytes: u32) -> Check {
    const ID: Id = Id::CacheExtents;
    let small: Vec<_> = hints.iter().filter(|(hint, _)| hint.unwrap_or(0) < wanted_bytes).collect();
    let Some((hint, dir)) = small.first() else {
        let bytes = hints.iter().filter_map(|(hint, _)| *hint).max().unwrap_or(wanted_bytes);
        return Check::ok(ID, format!("cache files take their space in pieces of {bytes} bytes, the smallest too (--xfs-extent)"));
    };
    let state = hint.map_or_else(|| "no extent size hint".to_owned(), |bytes| format!("an extent size hint of {bytes} bytes only"));
    let dirs: Vec<_> = small.iter().map(|(_, dir)| quoted(dir)).collect();
    Check::warn(
        ID,
        format!("{} has {state}: cache files may come in many small extents, which makes what is cached slow to read", dir.display()),
        "set the hint (infill serve does it where there is none, if it may)",
    )
    .fixed_by(format!("xfs_io -c 'extsize {wanted_bytes}' {}", dirs.join(" ")))
}

/// How full the file system is, by the marks that the kernel will be told.
fn space_check(room: &Room, limits: &CullLimits) -> Check {
    const ID: Id = Id::CacheSpace;
    let (bytes, files) = (room.bytes.percent(), room.files.percent());
    let marks = space::limits(limits, room);
    let scarce_bytes = marks.bytes.level(room.bytes.free) <= marks.files.level(room.files.free);
    let (what, percent, letter, percents) =
        if scarce_bytes { ("space", bytes, 'b', limits.blocks()) } else { ("inodes", files, 'f', limits.files()) };
    let Percents { run, cull, stop } = percents;
    let remedy = "free some, or put the cache on a file system of its own: the shares count the whole file system";
    match marks.level(room) {
        Level::Stop => {
            let found = format!("{percent} % of its {what} free: below {stop} % ({letter}stop) the kernel refuses every fill");
            Check::fail(ID, Verdict::BadCacheDir, found, remedy)
        }
        Level::Cull => {
            let found =
                format!("{percent} % of its {what} free: below {cull} % ({letter}cull) what is not mounted is removed from the cache");
            Check::warn(ID, found, remedy)
        }
        Level::Low => Check::warn(
            ID,
            format!("{percent} % of its {what} free, less than the {run} % ({letter}run) that culling brings it to"),
            remedy,
        ),
        Level::Plenty => Check::ok(ID, format!("{bytes} % of space and {files} % of inodes free")),
    }
}

/// What is in the cache, and what of it `serve` would remove before it begins. A cache that is in use is left alone:
/// what is there changes all the time.
fn objects_check(dir: &Path, budget_bytes: Option<u64>) -> Check {
    const ID: Id = Id::CacheObjects;
    let holders = find_holders(DEFAULT_DEVNODE.as_ref());
    if !holders.is_empty() {
        return Check::ok(ID, format!("not looked at while the device is in use by {}", describe(&holders)));
    }
    let looked = fsck::look(dir).and_then(|report| {
        let found = Dir::open(dir)?.map_or_else(|| Ok(Census::default()), |root| census(&root))?;
        Ok((report, found.objects.iter().map(|object| object.bytes).sum()))
    });
    match looked {
        Ok((report, bytes)) => judge_objects(&report, bytes, budget_bytes),
        Err(error) => Check::unknown(ID, error.to_string(), "run as root"),
    }
}

fn judge_objects(report: &FsckReport, bytes: u64, budget_bytes: Option<u64>) -> Check {
    let (id, checked) = (Id::CacheObjects, report.checked);
    let room = match budget_bytes {
        Some(budget) => format!("{bytes} of {budget} bytes"),
        None => format!("{bytes} bytes"),
    };
    let buried = if report.buried == 0 { String::new() } else { format!(", {} rejects of the kernel", report.buried) };
    let found = format!("{checked} objects, {room}{buried}");
    if report.damaged.is_empty() {
        return Check::ok(id, found);
    }
    let mut names: Vec<_> = report.damaged.iter().take(NAMED_MAX).map(|path| path.display().to_string()).collect();
    if report.damaged.len() > NAMED_MAX {
        names.push("...".to_owned());
    }
    let found = format!("{found}; {} damaged, with which mounts would fail: {}", report.damaged.len(), names.join(" "));
    Check::warn(id, found, "nothing: `infill serve` removes them when it starts, and their data is fetched again")
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Status;
    use super::*;
    use crate::ops::space::policy::Resource;

    fn subject<'a>(cache_dir: &'a Path, limits: &'a CullLimits) -> Subject<'a> {
        Subject {
            front_end: crate::config::FrontEndKind::Cachefiles,
            cache_dir,
            stores: &[],
            limits,
            cache_bytes: None,
            xfs_extent_bytes: None,
            state_dir: Path::new("/nowhere"),
            shards: 1,
        }
    }

    pub(in super::super) fn provoked() -> Vec<Check> {
        let full = Room { bytes: Resource { free: 1, total: 1000 }, files: Resource { free: 500, total: 1000 }, block_bytes: 1 };
        let damaged = FsckReport { checked: 1, damaged: vec!["/c/x".into()], buried: 0 };
        vec![
            unfit(&CacheDirError::io(Path::new("/c"), "create a file in it")(std::io::Error::from(std::io::ErrorKind::PermissionDenied))),
            kind_check(FsType(1)),
            block_check(1024),
            direct_check(Some((512, 8192))),
            direct_check(Some((0, 0))),
            judge_hints(&[(None, "/c".into())], EXTENT_BYTES),
            space_check(&full, &CullLimits::default()),
            judge_objects(&damaged, 0, None),
        ]
    }

    #[test]
    fn direct_writes_must_fit_into_what_the_kernel_writes() {
        for (alignment, status) in [
            (None, Status::Ok),
            (Some((4, 512)), Status::Ok),
            (Some((4096, 4096)), Status::Ok),
            (Some((0, 0)), Status::Warn),
            (Some((512, 8192)), Status::Fail),
        ] {
            assert_eq!(direct_check(alignment).status, status, "{alignment:?}");
        }
    }

    #[test]
    fn space_is_judged_by_the_scarcer_resource_and_the_settings() {
        let resource = |free, total| Resource { free, total };
        let judge = |bytes, files, limits| space_check(&Room { bytes, files, block_bytes: 1 }, &limits);
        let plenty = resource(500, 1000);
        let usual = CullLimits::default();
        assert_eq!(judge(plenty, resource(0, 0), usual).status, Status::Ok);
        let low = judge(plenty, resource(60, 1000), usual);
        assert!(low.status == Status::Warn && low.found.starts_with("6 % of its inodes free, less than the 7 % (frun)"), "{}", low.found);
        assert_eq!(judge(resource(10, 1000), resource(0, 0), usual).status, Status::Warn);
        let full = judge(resource(9, 1000), resource(9, 10), usual);
        assert_eq!(full.verdict, Verdict::BadCacheDir);
        assert!(full.found.starts_with("0 % of its space free: below 1 % (bstop)"), "{}", full.found);
        let small = CullLimits { bstop_percent: Some(0), bcull_percent: Some(1), brun_percent: Some(2), ..usual };
        assert_eq!(judge(resource(20, 1000), plenty, small).status, Status::Ok);
    }

    #[test]
    fn damage_is_told_with_its_place() {
        let report = |n: usize| FsckReport { checked: 9, damaged: (0..n).map(|n| format!("/c/{n}").into()).collect(), buried: 1 };
        let good = judge_objects(&report(0), 10, Some(20));
        assert_eq!((good.status, &*good.found), (Status::Ok, "9 objects, 10 of 20 bytes, 1 rejects of the kernel"));
        let bad = judge_objects(&report(4), 10, None);
        assert_eq!(bad.status, Status::Warn);
        assert!(bad.found.ends_with("4 damaged, with which mounts would fail: /c/0 /c/1 /c/2 ..."), "{}", bad.found);
    }

    #[test]
    fn each_directory_without_a_good_hint_is_named_in_the_command() {
        let (top, below) = (PathBuf::from("/c"), PathBuf::from("/c/cache"));
        assert_eq!(judge_hints(&[], EXTENT_BYTES).status, Status::Ok);
        assert_eq!(
            judge_hints(&[(Some(EXTENT_BYTES), top.clone()), (Some(EXTENT_BYTES * 4), below.clone())], EXTENT_BYTES).status,
            Status::Ok
        );
        let found = judge_hints(&[(Some(EXTENT_BYTES), top.clone()), (Some(4096), below.clone())], EXTENT_BYTES);
        assert_eq!(found.status, Status::Warn);
        assert_eq!(found.fix.as_deref(), Some("xfs_io -c 'extsize 2097152' /c/cache"));
        let found = judge_hints(&[(None, top), (None, below)], EXTENT_BYTES);
        assert!(found.found.starts_with("/c has no extent size hint"), "{found:?}");
        assert!(found.fix.is_some_and(|fix| fix.ends_with("/c /c/cache")));
    }

    #[test]
    fn a_directory_that_cannot_be_the_cache_is_refused_with_the_way_out() {
        for (dir, word) in [("/dev/null/x", "not a directory"), ("/dev/shm", "tmpfs")] {
            let found = checks(&subject(Path::new(dir), &CullLimits::default()));
            assert_eq!((found.len(), found[0].verdict), (1, Verdict::BadCacheDir), "{dir}");
            assert!(found[0].found.contains(word) && !found[0].remedy.is_empty(), "{:?}", found[0]);
        }
    }

    #[test]
    fn a_directory_that_is_missing_is_judged_by_its_parent_and_not_made() {
        let program = std::env::current_exe().unwrap();
        let dir = program.parent().unwrap().join("missing/cache");
        let found = checks(&subject(&dir, &CullLimits::default()));
        assert!(!dir.exists());
        assert!(matches!(found.len(), 5 | 6) || found[0].status == Status::Fail, "{found:?}");
        assert_eq!(kind_check(XFS_SUPER_MAGIC).status, Status::Ok);
        assert_eq!(kind_check(FsType(1)).status, Status::Warn);
        assert_eq!(block_check(1024).status, Status::Warn);
    }

    /// A file system in a file; unmounted when dropped.
    struct Disk(tempfile::TempDir);

    impl Disk {
        /// `None`: this process may not mount, or there is no program that makes one.
        fn make(options: &[&str]) -> Option<Self> {
            let dir = tempfile::tempdir().unwrap();
            let (disk, at) = (dir.path().join("disk"), dir.path().join("at"));
            File::create(&disk).unwrap().set_len(16 << 20).unwrap();
            std::fs::create_dir(&at).unwrap();
            let run = |program: &str, args: &[&std::ffi::OsStr]| {
                let output = std::process::Command::new(program).args(args).output();
                output.is_ok_and(|output| output.status.success())
            };
            let options = ["-q", "-F"].iter().chain(options).map(std::ffi::OsStr::new).chain([disk.as_os_str()]).collect::<Vec<_>>();
            let is_made = run("mkfs.ext4", &options) && run("mount", &["-o".as_ref(), "loop".as_ref(), disk.as_ref(), at.as_ref()]);
            is_made.then_some(Self(dir))
        }

        fn at(&self) -> PathBuf {
            self.0.path().join("at")
        }
    }

    impl Drop for Disk {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.at(), nix::mount::MntFlags::MNT_DETACH);
        }
    }

    /// What can be had here is had really: a file system without nameless files, one with small blocks, and a full one.
    #[test]
    fn real_file_systems_provoke_their_findings() {
        let of = |dir: &Path, id| {
            let found = checks(&subject(dir, &CullLimits::default()));
            found.into_iter().find(|check| check.id == id)
        };
        let sysfs = of(Path::new("/sys"), Id::CacheDir).unwrap();
        let is_denied = sysfs.verdict == Verdict::NotPermitted;
        assert!(
            is_denied || sysfs.verdict == Verdict::BadCacheDir && sysfs.found.contains("lacks nameless files (O_TMPFILE)"),
            "{sysfs:?}"
        );
        let Some(disk) = Disk::make(&["-b", "1024", "-m", "0"]) else {
            return println!("not run on disks of their own: they cannot be made and mounted here");
        };
        let blocks = of(&disk.at(), Id::CacheBlocks).unwrap();
        assert!(blocks.status == Status::Warn && blocks.found.contains("1024 bytes"), "{blocks:?}");
        assert_eq!(of(&disk.at(), Id::CacheSpace).unwrap().status, Status::Ok);
        // All but a little of what is free.
        let stat = nix::sys::statvfs::statvfs(&disk.at()).unwrap();
        let free_bytes = stat.blocks_available() * stat.fragment_size();
        let filler = File::create(disk.at().join("filler")).unwrap();
        nix::fcntl::posix_fallocate(&filler, 0, i64::try_from(free_bytes - (100 << 10)).unwrap()).unwrap();
        let full = of(&disk.at(), Id::CacheSpace).unwrap();
        assert!(full.verdict == Verdict::BadCacheDir && full.found.contains("(bstop)"), "{full:?}");
    }
}
