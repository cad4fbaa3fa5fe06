//! Whether images can be mounted from files here: fanotify's pre-content events, and EROFS that mounts files.

use std::io;
use std::path::Path;

use nix::errno::Errno;

use super::features::{Kernel, Setting};
use super::release::{Running, for_files};
use super::{Check, Id, Verdict, read};
use crate::front::fanotify::Group;
use crate::mount::groups_wanted;
use crate::mount::loops::{self, Loop};
use crate::mount::metadata::{MetadataError, is_asked_for};

/// Groups of a user at most.
const MAX_GROUPS: &str = "/proc/sys/fs/fanotify/max_user_groups";
/// What is put into it where it is too few: more than any number of event loops wants, and room for others.
const GROUPS_FIX: &str = "sysctl -w fs.fanotify.max_user_groups=";
/// Groups that other programs may have beside ours.
const GROUPS_OF_OTHERS: usize = 64;

/// Looks at what the fanotify front end needs, with event loops as many as `shards`.
#[must_use]
pub fn checks(running: &Running, kernel: &Kernel, cache_dir: &Path, shards: usize) -> Vec<Check> {
    let groups = read(MAX_GROUPS).and_then(|text| text.parse().ok());
    let existing = cache_dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let backed = kernel.config.as_ref().map(|config| config.setting("EROFS_FS_BACKED_BY_FILE"));
    let watched = Group::new().map(|group| group.can_watch(existing));
    let mut checks = vec![for_files(running), events(watched, existing), files(backed)];
    if checks.iter().all(|check| check.verdict == Verdict::Ready) {
        checks.push(metadata(is_asked_for(existing)));
    }
    checks.extend(loops::find(cache_dir).iter().map(bypassed));
    checks.extend(groups.map(|groups| enough(groups, shards)));
    checks
}

/// What became of a try to watch a file.
fn events(watched: Result<io::Result<Result<(), Errno>>, Errno>, dir: &Path) -> Check {
    const ID: Id = Id::Fanotify;
    let dir = dir.display();
    match watched {
        Ok(Ok(Ok(()))) => Check::ok(ID, format!("the kernel asks before a file in {dir} is read (pre-content events)")),
        Err(Errno::EPERM) => Check::fail(ID, Verdict::NotPermitted, "no group: not permitted", "run as root, with CAP_SYS_ADMIN"),
        Err(Errno::EMFILE) => Check::fail(
            ID,
            Verdict::Failed,
            "no group: there are too many",
            format!("end other programs that use fanotify, or raise {MAX_GROUPS}"),
        )
        .fixed_by(format!("{GROUPS_FIX}$(( $(cat {MAX_GROUPS}) * 2 ))")),
        Ok(Ok(Err(Errno::EINVAL))) | Err(_) => Check::fail(
            ID,
            Verdict::Unavailable,
            "the kernel has no pre-content events",
            "boot Linux 6.14 or later with CONFIG_FANOTIFY_ACCESS_PERMISSIONS",
        ),
        Ok(Ok(Err(Errno::EOPNOTSUPP))) => Check::fail(
            ID,
            Verdict::BadCacheDir,
            format!("the file system of {dir} has no pre-content events"),
            "name a cache directory on ext4, XFS or btrfs with --cache-dir; not on overlayfs or tmpfs",
        ),
        Ok(Ok(Err(errno))) => Check::fail(ID, Verdict::Failed, format!("a file in {dir} cannot be watched: {errno}"), "see dmesg"),
        Ok(Err(error)) => {
            Check::fail(ID, Verdict::BadCacheDir, format!("no file can be made in {dir}: {error}"), "see its rights and its free space")
        }
    }
}

/// Whether EROFS mounts files.
fn files(backed: Option<Setting>) -> Check {
    const ID: Id = Id::ErofsFiles;
    match backed {
        Some(Setting::No) => Check::fail(
            ID,
            Verdict::Unavailable,
            "CONFIG_EROFS_FS_BACKED_BY_FILE is not set: EROFS mounts no files",
            "boot a kernel that has it; a loop device does not do, because the kernel does not ask before one is read",
        ),
        Some(_) => Check::ok(ID, "EROFS mounts files"),
        None => Check::unknown(ID, "whether EROFS mounts files is not known: the kernel shows no configuration", "try infill mount"),
    }
}

/// A device through which the cache is read, and nobody is asked.
fn bypassed(found: &Loop) -> Check {
    let (device, text) = (&found.device, found.to_string());
    let (found, remedy) = text.split_once("; ").unwrap_or((&text, ""));
    Check::fail(Id::CacheLoop, Verdict::Failed, found, remedy).fixed_by(format!("losetup -d /dev/{device}"))
}

/// What became of a try to mount an image.
fn metadata(asked: Result<bool, MetadataError>) -> Check {
    const ID: Id = Id::ErofsMetadata;
    match asked {
        Ok(true) => Check::ok(ID, "the kernel asks before it reads an image's metadata: nothing has to be there before a mount"),
        Ok(false) => Check::ok(
            ID,
            "the kernel does not ask before it reads an image's metadata (Linux 7.1 does): an image is brought whole before it is mounted, its devices on demand",
        ),
        Err(error) => Check::unknown(
            ID,
            format!("whether the kernel asks before it reads an image's metadata is not known: {error}"),
            "nothing, if infill mount works: images are brought whole before they are mounted",
        ),
    }
}

/// Whether there are groups enough. Of marks there always are: ours are not limited (`FAN_UNLIMITED_MARKS`).
fn enough(groups: usize, shards: usize) -> Check {
    const ID: Id = Id::FanotifyGroups;
    let wanted = groups_wanted(shards);
    let found = format!("{shards} event loops want {wanted} groups together, and a user may have {groups}");
    if groups >= wanted {
        return Check::ok(ID, found);
    }
    Check::fail(ID, Verdict::Failed, found, format!("raise {MAX_GROUPS}, or lower --shards"))
        .fixed_by(format!("{GROUPS_FIX}{}", wanted + GROUPS_OF_OTHERS))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn provoked() -> Vec<Check> {
        let dir = Path::new("/cache");
        let watched: [Result<io::Result<Result<(), Errno>>, Errno>; 7] = [
            Err(Errno::EPERM),
            Err(Errno::EMFILE),
            Err(Errno::EINVAL),
            Ok(Ok(Err(Errno::EINVAL))),
            Ok(Ok(Err(Errno::EOPNOTSUPP))),
            Ok(Ok(Err(Errno::ENOSPC))),
            Ok(Err(io::ErrorKind::StorageFull.into())),
        ];
        let mut found: Vec<Check> = watched.into_iter().map(|watched| events(watched, dir)).collect();
        found.extend([files(Some(Setting::No)), files(None), metadata(Err(MetadataError::TimedOut)), enough(1, 8)]);
        found.push(bypassed(&Loop { device: "loop1".into(), file: "/cache/blobs/ab".into() }));
        found.push(for_files(&Running::new("6.12.1", "", None)));
        found
    }

    /// A file system without the events is at hand everywhere.
    #[test]
    fn memory_cannot_be_watched() {
        let Ok(group) = Group::new() else {
            return println!("not run: no group: not root, or a kernel before 6.14");
        };
        let check = events(Ok(group.can_watch(Path::new("/dev/shm"))), Path::new("/dev/shm"));
        assert_eq!(check.verdict, Verdict::BadCacheDir, "{check:?}");
        assert!(check.remedy.contains("not on overlayfs or tmpfs"), "{check:?}");
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        let dir = Path::new("/cache");
        let of = |watched| {
            let check = events(watched, dir);
            (check.verdict, check.remedy)
        };
        assert_eq!(of(Ok(Ok(Ok(())))), (Verdict::Ready, String::new()));
        for (watched, verdict, word) in [
            (Err(Errno::EPERM), Verdict::NotPermitted, "root"),
            (Err(Errno::EINVAL), Verdict::Unavailable, "6.14"),
            (Err(Errno::EMFILE), Verdict::Failed, "max_user_groups"),
            (Ok(Ok(Err(Errno::EINVAL))), Verdict::Unavailable, "6.14"),
            (Ok(Ok(Err(Errno::EOPNOTSUPP))), Verdict::BadCacheDir, "ext4"),
            (Ok(Err(io::ErrorKind::StorageFull.into())), Verdict::BadCacheDir, "space"),
        ] {
            let (found, remedy) = of(watched);
            assert!(found == verdict && remedy.contains(word), "{found:?}: {remedy}");
        }
        assert_eq!(metadata(Ok(false)).verdict, Verdict::Ready);
        assert_eq!(metadata(Err(MetadataError::TimedOut)).verdict, Verdict::Ready);
        assert_eq!(files(Some(Setting::No)).verdict, Verdict::Unavailable);
        for shards in [1, 2, 8, 9, 64, 200] {
            let wanted = groups_wanted(shards);
            assert!(wanted.is_multiple_of(shards) && (shards..=shards.max(64)).contains(&wanted), "{shards}: {wanted}");
            assert_eq!(enough(wanted, shards).verdict, Verdict::Ready, "{shards}");
            let few = enough(wanted - 1, shards);
            assert!(few.remedy.contains("--shards") && few.fix.is_some_and(|fix| fix.contains("max_user_groups=")), "{shards}");
        }
    }
}
