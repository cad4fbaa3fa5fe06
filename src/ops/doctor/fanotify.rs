//! Whether images can be mounted from files here: fanotify's pre-content events, and EROFS that mounts files.

use std::io;
use std::path::Path;

use nix::errno::Errno;

use super::features::{Kernel, Setting};
use super::{Check, Verdict, read};
use crate::front::fanotify::Group;
use crate::mount::groups_wanted;
use crate::mount::loops::{self, Loop};
use crate::mount::metadata::{MetadataError, is_asked_for};

/// Groups of a user at most.
const MAX_GROUPS: &str = "/proc/sys/fs/fanotify/max_user_groups";

/// Looks at what the fanotify front end needs, with event loops as many as `shards`.
#[must_use]
pub fn checks(kernel: &Kernel, cache_dir: &Path, shards: usize) -> Vec<Check> {
    let groups = read(MAX_GROUPS).and_then(|text| text.parse().ok());
    let existing = cache_dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let backed = kernel.config.as_ref().map(|config| config.setting("EROFS_FS_BACKED_BY_FILE"));
    let watched = Group::new().map(|group| group.can_watch(existing));
    let mut checks = vec![events(watched, existing), files(backed)];
    if checks.iter().all(|check| check.verdict == Verdict::Ready) {
        checks.push(metadata(is_asked_for(existing)));
    }
    checks.extend(loops::find(cache_dir).iter().map(bypassed));
    checks.extend(groups.and_then(|groups| enough(groups, shards)));
    checks
}

/// What became of a try to watch a file.
fn events(watched: Result<io::Result<Result<(), Errno>>, Errno>, dir: &Path) -> Check {
    const ID: &str = "fanotify";
    let dir = dir.display();
    match watched {
        Ok(Ok(Ok(()))) => Check::ok(ID, format!("the kernel asks before a file in {dir} is read (pre-content events)")),
        Err(Errno::EPERM) => Check::fail(ID, Verdict::NotPermitted, "no group: not permitted", "run as root, with CAP_SYS_ADMIN"),
        Err(Errno::EMFILE) => Check::fail(
            ID,
            Verdict::Failed,
            "no group: there are too many",
            format!("end other programs that use fanotify, or raise {MAX_GROUPS}"),
        ),
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
    const ID: &str = "erofs-files";
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
    let text = found.to_string();
    let (found, remedy) = text.split_once("; ").unwrap_or((&text, ""));
    Check::fail("cache-loop", Verdict::Failed, found, remedy)
}

/// What became of a try to mount an image.
fn metadata(asked: Result<bool, MetadataError>) -> Check {
    const ID: &str = "erofs-metadata";
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

/// Whether there are groups enough.
fn enough(groups: usize, shards: usize) -> Option<Check> {
    let wanted = groups_wanted(shards);
    let found = format!("{shards} event loops want {wanted} groups together, and a user may have {groups}");
    (groups < wanted).then(|| Check::fail("fanotify-groups", Verdict::Failed, found, format!("raise {MAX_GROUPS}, or lower --shards")))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert!(enough(wanted, shards).is_none(), "{shards}");
            assert!(enough(wanted - 1, shards).is_some_and(|check| check.remedy.contains("--shards")), "{shards}");
        }
    }
}
