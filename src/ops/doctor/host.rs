//! io_uring and the limits of this process and host.

use nix::sys::resource::{Resource, getrlimit};

use super::device::{CAP_IPC_LOCK, CAP_SYS_RESOURCE, capabilities, has_capability};
use super::{Check, Id, Verdict, read, set_in_unit};
use crate::engine::buffers::{self, Pages};
use crate::engine::ring;
use crate::ops::limits::{self, Bound, Raised};

/// Descriptors below which a host with hundreds of containers runs short: each mounted blob takes up to two.
pub(super) const WANTED_FILES: u64 = 65_536;
/// A default budget below this keeps few blobs open.
const FEW_FDS: u64 = 2048;
/// What the unit file should set: the kernel's default upper bound (`fs.nr_open`).
pub(super) const NR_OPEN: u64 = 1_048_576;
/// Share of `fs.file-max` in use, in percent, from which on there is a warning.
const FILES_HIGH_PERCENT: u64 = 80;
/// Locked memory in bytes that the engine's buffers may take where `CAP_IPC_LOCK` is missing.
pub(super) const WANTED_LOCKED_BYTES: u64 = 64 << 20;
/// Sysctls that are named in commands.
const FILE_MAX: &str = "fs.file-max";
const NR_OPEN_NAME: &str = "fs.nr_open";
/// No limit (`RLIM_INFINITY`).
const UNLIMITED: u64 = libc::RLIM_INFINITY;

/// Looks at io_uring and the limits. They are those of this process: under systemd the daemon may have
/// others.
#[must_use]
pub fn checks(shards: usize) -> Vec<Check> {
    let status = read("/proc/self/status").unwrap_or_default();
    let may = |capability| capabilities(&status).is_some_and(|set| has_capability(set, capability));
    let limit = |resource| getrlimit(resource).unwrap_or((0, 0));
    let nr_open = read("/proc/sys/fs/nr_open").and_then(|text| text.parse().ok()).unwrap_or(NR_OPEN);
    let raises = may(CAP_SYS_RESOURCE);
    vec![
        ring_check(ring::probe()),
        pages_check(buffers::probe()),
        files_check(limit(Resource::RLIMIT_NOFILE).1, nr_open, raises),
        budget_check(
            Raised { fds: most_fds(limit(Resource::RLIMIT_NOFILE).1, nr_open, raises), free_in_system: limits::free_in_system() },
            raises,
            shards,
        ),
        host_files_check(read("/proc/sys/fs/file-nr").as_deref()),
        file_size_check(limit(Resource::RLIMIT_FSIZE), raises),
        locked_check(limit(Resource::RLIMIT_MEMLOCK).1, may(CAP_IPC_LOCK)),
    ]
}

/// Without io_uring the engine falls back to threads that block.
fn ring_check(ring: Result<&str, String>) -> Check {
    const ID: Id = Id::IoUring;
    match ring {
        Ok(mode) => Check::ok(ID, format!("works ({mode})")),
        Err(error) => {
            let (found, remedy) = error.split_once("; ").unwrap_or((&error, ""));
            let check = Check::warn(ID, format!("{found}; infill serves with threads that block instead"), remedy);
            match remedy.split_once(": ") {
                Some((_, command)) if command.starts_with("sysctl -w ") => check.fixed_by(command),
                _ if remedy.is_empty() => Check { remedy: "boot a kernel with CONFIG_IO_URING=y; see dmesg".into(), ..check },
                _ => check,
            }
        }
    }
}

/// What the buffers would lie in.
fn pages_check(pages: std::io::Result<Pages>) -> Check {
    const ID: Id = Id::BufferPages;
    match pages {
        Ok(pages @ (Pages::ReservedHuge | Pages::TransparentHuge)) => Check::ok(ID, pages.to_string()),
        Ok(pages @ Pages::Small) => Check::warn(
            ID,
            format!("{pages}; it works, and each operation costs a little more"),
            "let the kernel give huge pages to who asks (CONFIG_TRANSPARENT_HUGEPAGE=y), or reserve some (vm.nr_hugepages)",
        )
        .fixed_by("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        Err(error) => {
            Check::warn(ID, format!("no memory for a buffer of 2 MiB ({error})"), "give this host, or this control group, more memory")
        }
    }
}

/// What the process will be able to have. `raises`: the daemon will raise the limit itself, see [`limits`].
fn most_fds(hard: u64, nr_open: u64, raises: bool) -> u64 {
    if raises { nr_open } else { hard.min(nr_open) }
}

/// What `--fd-budget` is if it is not set, and why.
fn budget_check(raised: Raised, raises: bool, shards: usize) -> Check {
    const ID: Id = Id::FdBudget;
    let (budget, bound) = limits::default_budget(raised, shards);
    let (why, remedy, fix) = match bound {
        Bound::Table => ("more has to be asked for", "set fd_budget", String::new()),
        Bound::System => ("half of what fs.file-max and fs.file-nr leave", "raise the sysctl fs.file-max", raise(FILE_MAX, NR_OPEN)),
        Bound::Process if raises => ("what fs.nr_open leaves", "raise the sysctl fs.nr_open", raise(NR_OPEN_NAME, NR_OPEN)),
        Bound::Process => ("what the limit of this process leaves", "raise LimitNOFILE= in the systemd unit, or ulimit -Hn", more_files()),
    };
    let found = format!("blobs may take {budget} descriptors by default ({why}): about {} are open at a time", budget.div_ceil(2));
    if budget < FEW_FDS {
        let remedy =
            format!("{remedy}; beyond that, blobs are closed, and opened again when they are read, if the kernel can (line kernel-reopen)");
        return Check::warn(ID, found, remedy).fixed_by(fix);
    }
    Check::ok(ID, found)
}

/// The command that gives a sysctl a value.
fn raise(name: &str, value: u64) -> String {
    format!("sysctl -w {name}={value}")
}

/// The command that gives the service more descriptors.
fn more_files() -> String {
    set_in_unit(&format!("LimitNOFILE={NR_OPEN}"))
}

fn files_check(hard: u64, nr_open: u64, raises: bool) -> Check {
    const ID: Id = Id::OpenFiles;
    let limit = most_fds(hard, nr_open, raises);
    let found = format!("up to {limit} descriptors (limit {hard}, fs.nr_open {nr_open})");
    if limit < WANTED_FILES {
        let (what, fix) = if nr_open < WANTED_FILES {
            ("raise the sysctl fs.nr_open", raise(NR_OPEN_NAME, NR_OPEN))
        } else {
            ("raise LimitNOFILE= in the systemd unit", more_files())
        };
        return Check::warn(ID, found, format!("{what}; an open blob needs two descriptors")).fixed_by(fix);
    }
    Check::ok(ID, found)
}

/// `file_nr` is `used unused max`.
fn host_files_check(file_nr: Option<&str>) -> Check {
    const ID: Id = Id::HostFiles;
    let numbers: Vec<u64> = file_nr.unwrap_or_default().split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [used, _, max] = numbers[..] else {
        return Check::unknown(ID, "/proc/sys/fs/file-nr cannot be read", "mount proc on /proc");
    };
    let found = format!("{used} of {max} in use on this host (fs.file-max)");
    if u128::from(used) * 100 >= u128::from(max) * u128::from(FILES_HIGH_PERCENT) {
        Check::warn(ID, found, "raise the sysctl fs.file-max").fixed_by(raise(FILE_MAX, max.saturating_mul(2)))
    } else {
        Check::ok(ID, found)
    }
}

/// The kernel writes cache files on behalf of the daemon, whose limit counts. The daemon lifts it where it may.
fn file_size_check((soft, hard): (u64, u64), raises: bool) -> Check {
    const ID: Id = Id::FileSize;
    if soft == UNLIMITED {
        Check::ok(ID, "not limited")
    } else if hard == UNLIMITED || raises {
        Check::ok(ID, format!("limited to {soft} bytes, which infill lifts"))
    } else {
        Check::fail(
            ID,
            Verdict::Failed,
            format!("limited to {hard} bytes: fills beyond it would fail"),
            "ulimit -f unlimited, or LimitFSIZE=infinity in the systemd unit",
        )
        .fixed_by(set_in_unit("LimitFSIZE=infinity"))
    }
}

fn locked_check(hard: u64, may_lock: bool) -> Check {
    const ID: Id = Id::LockedMemory;
    if may_lock {
        Check::ok(ID, "not limited (CAP_IPC_LOCK)")
    } else if hard == UNLIMITED {
        Check::ok(ID, "not limited")
    } else if hard >= WANTED_LOCKED_BYTES {
        Check::ok(ID, format!("up to {hard} bytes"))
    } else {
        Check::warn(
            ID,
            format!("limited to {hard} bytes; the buffers of io_uring count"),
            "LimitMEMLOCK=infinity in the systemd unit, or the capability CAP_IPC_LOCK",
        )
        .fixed_by(set_in_unit("LimitMEMLOCK=infinity"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Status;
    use super::*;

    pub(in super::super) fn provoked() -> Vec<Check> {
        let none = Raised { fds: 1024, free_in_system: None };
        vec![
            ring_check(Err(
                "io_uring is switched off by the sysctl kernel.io_uring_disabled=2; allow it with: sysctl -w kernel.io_uring_disabled=0"
                    .into(),
            )),
            ring_check(Err("io_uring_setup failed: EIO".into())),
            pages_check(Ok(Pages::Small)),
            pages_check(Err(std::io::ErrorKind::OutOfMemory.into())),
            files_check(4096, NR_OPEN, false),
            files_check(UNLIMITED, 1024, true),
            budget_check(none, false, 4),
            budget_check(none, true, 4),
            budget_check(Raised { fds: NR_OPEN, free_in_system: Some(3000) }, true, 4),
            host_files_check(Some("80\t0\t100")),
            host_files_check(None),
            file_size_check((1, 1), false),
            locked_check(8 << 20, false),
        ]
    }

    /// Here the limit is real: that of a process which has one file and no rights to raise it.
    #[test]
    fn a_lowered_limit_is_seen() {
        let program = std::env::current_exe().unwrap();
        let name = concat!(module_path!(), "::says_its_limit").split_once("::").unwrap().1;
        let output = std::process::Command::new("sh")
            .args(["-c", "ulimit -n 3000; exec \"$0\" --exact --ignored --nocapture \"$1\""])
            .args([program.as_os_str(), name.as_ref()])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("up to 3000 descriptors (limit 3000, "), "{text}");
    }

    #[test]
    #[ignore = "it is run by the one above, with a limit"]
    fn says_its_limit() {
        let check = files_check(getrlimit(Resource::RLIMIT_NOFILE).unwrap().1, NR_OPEN, false);
        assert_eq!(check.status, Status::Warn);
        println!("{}", check.found);
    }

    #[test]
    fn without_io_uring_the_way_out_is_named() {
        assert_eq!(ring_check(Ok("fine")).status, Status::Ok);
        let refused = ring_check(Err("io_uring is switched off; allow it with: sysctl".into()));
        assert_eq!((refused.status, refused.verdict), (Status::Warn, Verdict::Ready));
        assert_eq!(refused.remedy, "allow it with: sysctl");
        let fix = |text: &str| ring_check(Err(text.to_owned())).fix;
        assert_eq!(fix("off; allow it with: sysctl -w a=0").as_deref(), Some("sysctl -w a=0"));
        assert_eq!(fix("refused by a filter; allow it in the profile"), None);
    }

    #[test]
    fn any_pages_do() {
        assert_eq!(pages_check(Ok(Pages::TransparentHuge)).status, Status::Ok);
        let small = pages_check(Ok(Pages::Small));
        assert_eq!((small.status, small.verdict), (Status::Warn, Verdict::Ready));
    }

    #[test]
    fn limits() {
        assert_eq!(files_check(1 << 20, 1 << 20, false).status, Status::Ok);
        assert_eq!(files_check(4096, 1 << 20, false).status, Status::Warn);
        assert_eq!(files_check(4096, 1 << 20, true).status, Status::Ok);
        assert_eq!(files_check(UNLIMITED, 1024, true).status, Status::Warn);
        let budget = |fds, free_in_system, raises| budget_check(Raised { fds, free_in_system }, raises, 4);
        assert_eq!(budget(1 << 20, None, true).status, Status::Ok);
        assert!(budget(1024, None, false).remedy.contains("LimitNOFILE="));
        assert!(budget(1024, None, true).remedy.contains("fs.nr_open"));
        assert!(budget(1 << 20, Some(3000), true).remedy.contains("fs.file-max"));
        assert_eq!(host_files_check(Some("667\t0\t2466177")).status, Status::Ok);
        assert_eq!(host_files_check(Some("80\t0\t100")).status, Status::Warn);
        assert_eq!(host_files_check(Some("80")).status, Status::Unknown);
        assert_eq!(file_size_check((UNLIMITED, UNLIMITED), false).status, Status::Ok);
        assert_eq!(file_size_check((1, UNLIMITED), false).status, Status::Ok);
        assert_eq!(file_size_check((1, 1), true).status, Status::Ok);
        assert_eq!(file_size_check((1, 1 << 40), false).verdict, Verdict::Failed);
        assert_eq!(locked_check(8 << 20, false).status, Status::Warn);
        assert_eq!(locked_check(8 << 20, true).status, Status::Ok);
    }
}
