//! The state directory, the daemon that serves there, and whether that one has the limits that it needs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{AccessFlags, access, geteuid};

use super::host::{NR_OPEN, WANTED_FILES};
use super::{Check, Id, Verdict, quoted, read, set_in_unit};
use crate::ops::state::{self, WRITABLE_BY_OTHERS};

/// Looks at the directory, without making it, and at the daemon that has it.
#[must_use]
pub fn checks(dir: &Path) -> Vec<Check> {
    let mut checks = vec![dir_check(dir)];
    let pid = state::holder(dir);
    let is_seen = dir.metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) || access(dir, AccessFlags::R_OK).is_ok();
    checks.push(if is_seen || pid.is_some() { daemon_check(dir, pid) } else { hidden(dir) });
    let limits = pid.and_then(|pid| Some((pid, read(&format!("/proc/{pid}/limits"))?)));
    checks.extend(limits.map(|(pid, limits)| limits_check(pid, &limits)));
    checks
}

fn dir_check(dir: &Path) -> Check {
    const ID: Id = Id::StateDir;
    let fail = |verdict, found: String, remedy: &str| Check::fail(ID, verdict, found, remedy);
    let Some(existing) = dir.ancestors().find(|path| path.exists()) else {
        return fail(Verdict::BadCacheDir, format!("{} is nowhere to be found", dir.display()), "give an absolute path with --state-dir");
    };
    let here = existing.display();
    let found = match fs::metadata(existing) {
        Ok(found) if found.is_dir() => found,
        Ok(_) => return fail(Verdict::BadCacheDir, format!("{here} is not a directory"), "name a directory with --state-dir"),
        Err(error) => return fail(Verdict::NotPermitted, format!("{here} cannot be looked at: {error}"), "run as root"),
    };
    if let Err(errno) = access(existing, AccessFlags::W_OK | AccessFlags::X_OK) {
        let verdict = if errno == nix::errno::Errno::EROFS { Verdict::BadCacheDir } else { Verdict::NotPermitted };
        return fail(verdict, format!("{here} cannot be written: {errno}"), "run as root, or name a directory of yours with --state-dir");
    }
    if existing != dir {
        return Check::ok(ID, format!("{} does not exist yet and can be made in {here}", dir.display()));
    }
    let own = geteuid().as_raw();
    if found.uid() != own || found.mode() & WRITABLE_BY_OTHERS != 0 {
        let text =
            format!("{here} belongs to user {} with mode {:o}: others could put something into it", found.uid(), found.mode() & 0o7777);
        return fail(Verdict::BadCacheDir, text, "give it to the daemon's user alone")
            .fixed_by(format!("chown {own} {0} && chmod go-w {0}", quoted(existing)));
    }
    Check::ok(ID, format!("{here} can be used"))
}

fn daemon_check(dir: &Path, pid: Option<u32>) -> Check {
    Check::ok(
        Id::Daemon,
        match pid {
            Some(pid) => format!("pid {pid} serves, with the state directory {}", dir.display()),
            None => format!("none serves with the state directory {}", dir.display()),
        },
    )
}

fn hidden(dir: &Path) -> Check {
    let found = format!("whether one serves with the state directory {} cannot be seen by this user", dir.display());
    Check::unknown(Id::Daemon, found, "run as root")
}

/// What the running daemon may have, by /proc/PID/limits. It has raised what it was allowed to.
fn limits_check(pid: u32, limits: &str) -> Check {
    const ID: Id = Id::DaemonLimits;
    // Name, soft limit, hard limit, unit, in columns.
    let soft = |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)?.split_ascii_whitespace().next());
    let number = |name: &str| soft(name).map(|text| text.parse().unwrap_or(u64::MAX));
    let (Some(files), Some(bytes)) = (number("Max open files"), number("Max file size")) else {
        return Check::unknown(ID, format!("/proc/{pid}/limits is not understood"), "prlimit shows them");
    };
    let warn = |found: String, remedy: &str, setting: String| Check::warn(ID, found, remedy).fixed_by(set_in_unit(&setting));
    if bytes != u64::MAX {
        return warn(
            format!("pid {pid} may write files of {bytes} bytes at most: fills beyond it fail"),
            "LimitFSIZE=infinity in its unit",
            "LimitFSIZE=infinity".to_owned(),
        );
    }
    if files < WANTED_FILES {
        return warn(
            format!("pid {pid} may have {files} descriptors: about {} blobs are open at a time", files / 2),
            "raise LimitNOFILE= in its unit; an open blob needs two",
            format!("LimitNOFILE={NR_OPEN}"),
        );
    }
    Check::ok(ID, format!("pid {pid} may have {files} descriptors, and files of any size"))
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::super::Status;
    use super::*;
    use crate::ops::state::StateDir;

    const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
                          Max file size             unlimited            unlimited            bytes     \n\
                          Max open files            1024                 524288               files     \n";

    pub(in super::super) fn provoked() -> Vec<Check> {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        vec![
            dir_check(dir.path()),
            dir_check(Path::new("/dev/null/state")),
            // Nobody can write there, root neither.
            dir_check(Path::new("/proc/self/fd")),
            daemon_check(dir.path(), None),
            hidden(dir.path()),
            limits_check(7, LIMITS),
            limits_check(7, &LIMITS.replace("unlimited            unlimited", "4096                 4096     ")),
            limits_check(7, ""),
        ]
    }

    #[test]
    fn a_directory_that_is_missing_is_not_made_and_one_of_others_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/the state's");
        let found = checks(&dir);
        assert!(!dir.exists() && found[0].status == Status::Ok && found[0].found.contains("can be made"), "{found:?}");
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o722)).unwrap();
        let check = dir_check(&dir);
        assert!(check.verdict == Verdict::BadCacheDir && check.found.contains("mode 722"), "{check:?}");
        // The command does what it says.
        let fixed = std::process::Command::new("sh").args(["-c", &check.fix.unwrap()]).status().unwrap();
        assert!(fixed.success());
        assert_eq!(dir_check(&dir).status, Status::Ok);
        assert_eq!(dir_check(Path::new("/dev/null/state")).verdict, Verdict::BadCacheDir);
    }

    #[test]
    fn a_daemon_is_found_by_its_lock_and_is_not_disturbed() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("state");
        let serving = StateDir::claim(&dir).unwrap();
        let found = checks(&dir);
        assert!(found.iter().any(|check| check.id == Id::Daemon && check.found.contains(&format!("pid {} serves", std::process::id()))));
        assert!(found.iter().any(|check| check.id == Id::DaemonLimits), "{found:?}");
        drop(serving);
        let found = checks(&dir);
        assert!(found.len() == 2 && found[1].found.starts_with("none serves"), "{found:?}");
        assert!(StateDir::claim(&dir).is_ok());
    }

    #[test]
    fn the_limits_of_the_running_daemon_count() {
        let few = limits_check(7, LIMITS);
        assert!(few.status == Status::Warn && few.found.contains("1024") && few.fix.is_some_and(|fix| fix.contains("LimitNOFILE=1048576")));
        assert_eq!(limits_check(7, &LIMITS.replace("1024  ", "1048576")).status, Status::Ok);
        assert_eq!(limits_check(7, "").status, Status::Unknown);
    }
}
