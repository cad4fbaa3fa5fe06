//! Landlock: the files that can still be opened, whoever owns them and whatever led to them.
//!
//! A rule belongs to a directory as it is now (its inode), not to its path: a file system mounted below it later
//! is covered, but one mounted on it, or another directory put in its place, is not. Rules look at opening,
//! not at what is open.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};

/// Rights known when this was written; of these, what the kernel knows is taken away. TCP is in it from 4 on.
const KNOWN: ABI = ABI::V5;

/// Read when the engine explains why there is no ring; they tell nothing about others. That is right after the start:
/// a rule for a file of procfs does not last, because its inode does not. What is read later has to be open before.
const LISTS: [&str; 2] = ["/proc/sys/kernel/io_uring_disabled", "/proc/self/status"];

/// Leaves the calling thread the files below `readable`, for reading, and those below `writable`; and no TCP.
/// Gives the version of Landlock.
pub(super) fn restrict(readable: &[&Path], writable: &[&Path]) -> Result<String, String> {
    let status = apply(readable, writable).map_err(|error| format!("the rules could not be made: {error}"))?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("it is in this kernel but switched off; add landlock to the boot parameter lsm=".to_owned())
        }
        (RulesetStatus::NotEnforced, _) => {
            Err("this kernel has no Landlock; it needs Linux 5.13 and CONFIG_SECURITY_LANDLOCK=y".to_owned())
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => Ok(format!("version {}", effective_abi as i32)),
        (_, status) => Ok(format!("{status:?}")),
    }
}

fn apply(readable: &[&Path], writable: &[&Path]) -> Result<RestrictionStatus, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.handle_access(AccessNet::from_all(ABI::V4))?.create()?;
    for path in LISTS {
        // Not there: nothing to allow.
        if let Ok(file) = PathFd::new(path) {
            ruleset = ruleset.add_rule(PathBeneath::new(file, AccessFs::ReadFile))?;
        }
    }
    for (paths, access) in [(readable, read), (writable, read | change())] {
        for path in paths {
            // What cannot be opened now is of no use later; whoever needs it will say so.
            if let Ok(dir) = PathFd::new(path) {
                ruleset = ruleset.add_rule(PathBeneath::new(dir, access))?;
            }
        }
    }
    ruleset.restrict_self()
}

/// What seeding and culling do to files of the cache. Never programs, devices, sockets, pipes or links.
fn change() -> BitFlags<AccessFs> {
    AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::Refer
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
}

/// Tries it, in a thread that ends right after.
///
/// # Errors
/// Why it does not work, and what the operator can do.
pub fn probe() -> Result<String, String> {
    std::thread::spawn(|| restrict(&[], &[])).join().unwrap_or_else(|_| Err("the thread that tried it ended".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::ErrorKind::PermissionDenied;
    use std::net::TcpListener;

    use super::*;

    /// Runs in a thread of its own, which is all that is restricted.
    #[test]
    fn only_what_is_named_can_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["store", "cache", "other"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("file"), name).unwrap();
        }
        let path = |name: &str| dir.path().join(name);
        std::os::unix::fs::symlink(path("other/file"), path("store/link")).unwrap();
        let open_before = File::open(path("other/file")).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                match restrict(&[&path("store")], &[&path("cache"), Path::new("/no/such/directory")]) {
                    Ok(version) => println!("{version}"),
                    Err(why) => return println!("not run: {why}"),
                }
                let denied = |result: std::io::Result<()>| assert_eq!(result.unwrap_err().kind(), PermissionDenied);
                assert_eq!(fs::read(path("store/file")).unwrap(), b"store");
                denied(fs::read(path("store/link")).map(drop));
                denied(fs::read(path("store/../other/file")).map(drop));
                denied(fs::read("/etc/passwd").map(drop));
                denied(fs::write(path("store/new"), "x"));
                denied(fs::remove_file(path("store/file")));
                fs::write(path("cache/new"), "x").unwrap();
                fs::create_dir(path("cache/sub")).unwrap();
                fs::rename(path("cache/new"), path("cache/sub/new")).unwrap();
                fs::remove_file(path("cache/sub/new")).unwrap();
                assert_eq!(std::io::read_to_string(&open_before).unwrap(), "other");
            });
        });
        // This thread is as free as before.
        fs::read("/etc/passwd").unwrap();
        drop(TcpListener::bind("127.0.0.1:0"));
    }
}
