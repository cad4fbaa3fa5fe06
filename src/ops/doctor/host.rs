//! io_uring and the limits of this process and host.

use nix::sys::resource::{Resource, getrlimit};

use super::device::{CAP_IPC_LOCK, capabilities, field, has_capability};
use super::{Check, Probes, Verdict, read};

/// Descriptors below which a host with hundreds of containers runs short: each mounted blob takes up to two.
const WANTED_FILES: u64 = 65_536;
/// What the unit file should set: the kernel's default upper bound (`fs.nr_open`).
const NR_OPEN: u64 = 1_048_576;
/// Share of `fs.file-max` in use, in percent, from which on there is a warning.
const FILES_HIGH_PERCENT: u64 = 80;
/// Locked memory in bytes that the engine's buffers may take where `CAP_IPC_LOCK` is missing.
const WANTED_LOCKED_BYTES: u64 = 64 << 20;
/// No limit (`RLIM_INFINITY`).
const UNLIMITED: u64 = libc::RLIM_INFINITY;

/// Looks at io_uring and the limits. They are those of this process: under systemd the daemon may have
/// others.
#[must_use]
pub fn checks(probes: &Probes<'_>) -> Vec<Check> {
    let status = read("/proc/self/status").unwrap_or_default();
    let limit = |resource| getrlimit(resource).unwrap_or((0, 0));
    let number = |path| read(path).and_then(|text| text.parse().ok());
    vec![
        ring_check(&(probes.ring)(), read("/proc/sys/kernel/io_uring_disabled").as_deref(), field(&status, "Seccomp")),
        files_check(limit(Resource::RLIMIT_NOFILE), number("/proc/sys/fs/nr_open").unwrap_or(NR_OPEN)),
        host_files_check(read("/proc/sys/fs/file-nr").as_deref()),
        file_size_check(limit(Resource::RLIMIT_FSIZE).0),
        locked_check(limit(Resource::RLIMIT_MEMLOCK).1, capabilities(&status).is_some_and(|set| has_capability(set, CAP_IPC_LOCK))),
    ]
}

/// `disabled` is the sysctl (6.6 and later), `seccomp` the mode of this process (2: a filter).
fn ring_check(ring: &Result<String, String>, disabled: Option<&str>, seccomp: Option<&str>) -> Check {
    const ID: &str = "io-uring";
    let error = match ring {
        Ok(found) => return Check::ok(ID, found.clone()),
        Err(error) => error,
    };
    let fail = |verdict, why: &str, remedy: &str| Check::fail(ID, verdict, format!("{error}{why}"), remedy);
    match (disabled, seccomp) {
        (Some("2"), _) => fail(Verdict::NotPermitted, " (kernel.io_uring_disabled is 2: nobody may)", "sysctl kernel.io_uring_disabled=1"),
        (Some("1"), _) => fail(
            Verdict::NotPermitted,
            " (kernel.io_uring_disabled is 1)",
            "run as root, or put this user into the group of kernel.io_uring_group",
        ),
        (_, Some("2")) => fail(
            Verdict::NotPermitted,
            " (a seccomp filter is active; the default ones of Docker and containerd block io_uring)",
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile",
        ),
        _ => fail(Verdict::Unavailable, "", "boot a kernel with CONFIG_IO_URING, and see that memory is not short"),
    }
}

fn files_check((soft, hard): (u64, u64), nr_open: u64) -> Check {
    const ID: &str = "open-files";
    let found = format!("limit {soft}, up to {hard} (fs.nr_open {nr_open})");
    if hard.min(nr_open) < WANTED_FILES {
        let remedy = format!(
            "LimitNOFILE={NR_OPEN} in the systemd unit; an open blob needs two descriptors, and one that gets none cannot be mounted"
        );
        return Check::warn(ID, found, remedy);
    }
    Check::ok(ID, found)
}

/// `file_nr` is `used unused max`.
fn host_files_check(file_nr: Option<&str>) -> Check {
    const ID: &str = "host-files";
    let numbers: Vec<u64> = file_nr.unwrap_or_default().split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [used, _, max] = numbers[..] else {
        return Check::unknown(ID, "/proc/sys/fs/file-nr cannot be read", "");
    };
    let found = format!("{used} of {max} in use on this host (fs.file-max)");
    if u128::from(used) * 100 >= u128::from(max) * u128::from(FILES_HIGH_PERCENT) {
        Check::warn(ID, found, "raise the sysctl fs.file-max")
    } else {
        Check::ok(ID, found)
    }
}

/// The kernel writes cache files on behalf of the daemon, whose limit counts.
fn file_size_check(soft: u64) -> Check {
    const ID: &str = "file-size";
    if soft == UNLIMITED {
        Check::ok(ID, "not limited")
    } else {
        Check::fail(
            ID,
            Verdict::Failed,
            format!("limited to {soft} bytes: fills beyond it would fail"),
            "ulimit -f unlimited, or LimitFSIZE=infinity in the systemd unit",
        )
    }
}

fn locked_check(hard: u64, may_lock: bool) -> Check {
    const ID: &str = "locked-memory";
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
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_refused_ring_names_who_refused() {
        let refused = Err("io_uring_setup: EPERM".to_owned());
        let judge = |disabled, seccomp| ring_check(&refused, disabled, seccomp);
        assert_eq!(ring_check(&Ok("fine".into()), Some("2"), Some("2")).status, Status::Ok);
        for (disabled, seccomp, verdict, word) in [
            (Some("2"), Some("0"), Verdict::NotPermitted, "nobody"),
            (Some("1"), Some("2"), Verdict::NotPermitted, "is 1"),
            (Some("0"), Some("2"), Verdict::NotPermitted, "seccomp"),
            (None, Some("0"), Verdict::Unavailable, "EPERM"),
        ] {
            let check = judge(disabled, seccomp);
            assert_eq!(check.verdict, verdict);
            assert!(check.found.contains(word), "{}", check.found);
        }
    }

    #[test]
    fn limits() {
        assert_eq!(files_check((1024, 1 << 20), 1 << 20).status, Status::Ok);
        assert_eq!(files_check((1024, 4096), 1 << 20).status, Status::Warn);
        assert_eq!(files_check((1024, UNLIMITED), 1024).status, Status::Warn);
        assert_eq!(host_files_check(Some("667\t0\t2466177")).status, Status::Ok);
        assert_eq!(host_files_check(Some("80\t0\t100")).status, Status::Warn);
        assert_eq!(host_files_check(Some("80")).status, Status::Unknown);
        assert_eq!(file_size_check(UNLIMITED).status, Status::Ok);
        assert_eq!(file_size_check(1 << 40).verdict, Verdict::Failed);
        assert_eq!(locked_check(8 << 20, false).status, Status::Warn);
        assert_eq!(locked_check(8 << 20, true).status, Status::Ok);
    }
}
