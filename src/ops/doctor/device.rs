//! The device node: is it there, may we open it, does someone else have it?

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::features::{Driver, Kernel};
use super::{Check, Id, Verdict, read};
use crate::front::cachefiles::DEFAULT_DEVNODE;
use crate::ops::processes::{Process, describe, find_holders, find_waiting};

/// `CAP_IPC_LOCK` of include/uapi/linux/capability.h.
pub const CAP_IPC_LOCK: u32 = 14;
/// `CAP_SYS_RESOURCE`, with which the daemon raises its own limits.
pub const CAP_SYS_RESOURCE: u32 = 24;
/// `CAP_SYS_ADMIN`, which opening the device takes (`cachefiles_daemon_open`, fs/cachefiles/daemon.c).
pub const CAP_SYS_ADMIN: u32 = 21;

/// What `/proc/self/ns/user` leads to in the first user namespace (`PROC_USER_INIT_INO`,
/// include/linux/proc_ns.h).
const INITIAL_USER_NAMESPACE: &str = "user:[4026531837]";

/// Processes that are named when they wait for data.
const WAITING_SHOWN: usize = 8;

/// The name of our own program, which may hold the device.
const OWN_NAME: &str = "infill";
/// The daemon of the kernel's other mode, which may hold it as well; also the name of its service.
const CACHEFILESD: &str = "cachefilesd";

/// What was found at the device's path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// Nothing; `driver` tells whether that can be changed.
    Missing,
    /// Something that is no character device.
    NotADevice,
    /// The device, and what access(2) says about reading and writing it.
    Device(Result<(), Errno>),
}

/// Looks at the device node and the rights of this process.
#[must_use]
pub fn checks(kernel: &Kernel) -> Vec<Check> {
    let path = Path::new(DEFAULT_DEVNODE);
    let node = match fs::metadata(path) {
        Err(_) => Node::Missing,
        Ok(meta) if !meta.file_type().is_char_device() => Node::NotADevice,
        Ok(_) => Node::Device(access(path, AccessFlags::R_OK | AccessFlags::W_OK)),
    };
    let mut checks = vec![node_check(&node, &kernel.cachefiles.driver)];
    if matches!(node, Node::Device(_)) {
        let holders = find_holders(path);
        checks.push(waiting_check(&find_waiting(), holders.iter().any(|holder| !holder.only_keeps())));
        checks.push(holder_check(&holders));
    }
    let status = read("/proc/self/status").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/user").unwrap_or_default();
    checks.push(rights_check(capabilities(&status), namespace == Path::new(INITIAL_USER_NAMESPACE)));
    checks
}

fn node_check(node: &Node, driver: &Driver) -> Check {
    const ID: Id = Id::Device;
    match (node, driver) {
        (Node::Device(Ok(())), _) => Check::ok(ID, format!("{DEFAULT_DEVNODE} may be opened")),
        (Node::Device(Err(errno)), _) => Check::fail(
            ID,
            Verdict::NotPermitted,
            format!("{DEFAULT_DEVNODE} may not be read and written: {errno}"),
            "run as root, or give this user the device (chown); the capability below is needed as well",
        ),
        (Node::NotADevice, _) => Check::fail(
            ID,
            Verdict::Unavailable,
            format!("{DEFAULT_DEVNODE} is no device"),
            format!("remove it, then load the driver again, which makes {DEFAULT_DEVNODE}"),
        )
        .fixed_by(format!("rm {DEFAULT_DEVNODE} && modprobe -r cachefiles && modprobe cachefiles")),
        (Node::Missing, Driver::Running) => Check::fail(
            ID,
            Verdict::Unavailable,
            format!("{DEFAULT_DEVNODE} is missing although the driver is there"),
            "in a container: pass the device in; elsewhere: mount devtmpfs on /dev, or mknod it with major 10 and the minor number from /proc/misc",
        )
        .fixed_by(format!("mknod -m 600 {DEFAULT_DEVNODE} c 10 \"$(awk '$2 == \"cachefiles\" {{print $1}}' /proc/misc)\"")),
        (Node::Missing, Driver::Loadable(_)) => Check::warn(
            ID,
            format!("{DEFAULT_DEVNODE} is missing because the driver is not loaded"),
            "load it now, and at every boot by a line 'cachefiles' in /etc/modules-load.d/infill.conf",
        )
        .fixed_by("modprobe cachefiles && echo cachefiles > /etc/modules-load.d/infill.conf"),
        (Node::Missing, Driver::Absent) => Check::fail(
            ID,
            Verdict::Unavailable,
            format!("{DEFAULT_DEVNODE} is missing, and so is its driver"),
            "see the line on cachefiles above",
        ),
    }
}

/// Readers and mounts that wait for data. A few at any moment are a host at work.
fn waiting_check(waiting: &[Process], is_served: bool) -> Check {
    const ID: Id = Id::Readers;
    let shown: Vec<_> = waiting.iter().take(WAITING_SHOWN).map(ToString::to_string).collect();
    let found = format!("{} processes wait for data at this moment: {}", waiting.len(), shown.join(", "));
    match (waiting.is_empty(), is_served) {
        (true, _) => Check::ok(ID, "nobody waits for data at this moment"),
        (false, true) => Check::ok(ID, format!("{found}; if they wait for long, see the daemon's log for what hangs")),
        (false, false) => Check::warn(ID, found, "start infill serve: nobody else answers them").fixed_by("systemctl start infill"),
    }
}

fn holder_check(holders: &[Process]) -> Check {
    const ID: Id = Id::DeviceHolder;
    let names = describe(holders);
    if holders.is_empty() {
        Check::ok(ID, "no process that is visible here holds it")
    } else if holders.iter().all(|holder| is_own(&holder.command)) {
        Check::ok(ID, format!("held by infill itself: {names}"))
    } else {
        let check = Check::fail(
            ID,
            Verdict::Unavailable,
            format!("held by {names}; a kernel has one daemon at a time"),
            "stop that process after unmounting its images",
        );
        let foreign: Vec<_> = holders.iter().filter(|holder| !is_own(&holder.command)).collect();
        if foreign.iter().all(|holder| is_program(&holder.command, CACHEFILESD)) {
            return check.fixed_by(format!("systemctl disable --now {CACHEFILESD}"));
        }
        let pids: Vec<_> = foreign.iter().map(|holder| holder.pid.to_string()).collect();
        check.fixed_by(format!("kill {}", pids.join(" ")))
    }
}

/// Whether a command line is one of our own program.
fn is_own(command: &str) -> bool {
    is_program(command, OWN_NAME)
}

fn is_program(command: &str, name: &str) -> bool {
    let program = command.split_ascii_whitespace().next().unwrap_or_default();
    program.rsplit('/').next() == Some(name)
}

fn rights_check(capabilities: Option<u64>, initial_namespace: bool) -> Check {
    const ID: Id = Id::Rights;
    let has_admin = capabilities.is_some_and(|set| has_capability(set, CAP_SYS_ADMIN));
    let fail = |found: &str, remedy: &str| Check::fail(ID, Verdict::NotPermitted, found, remedy);
    if !initial_namespace {
        fail(
            "this process is in a user namespace; the kernel wants CAP_SYS_ADMIN in the first one",
            "run infill on the host, or in a container without a user namespace of its own",
        )
    } else if !has_admin {
        fail("CAP_SYS_ADMIN is missing", "run as root, or with AmbientCapabilities=CAP_SYS_ADMIN in the systemd unit")
    } else {
        Check::ok(ID, "CAP_SYS_ADMIN in the first user namespace")
    }
}

/// The effective capabilities from `/proc/self/status`.
pub(super) fn capabilities(status: &str) -> Option<u64> {
    u64::from_str_radix(field(status, "CapEff")?, 16).ok()
}

/// Whether a set of capabilities has one.
pub(super) const fn has_capability(set: u64, capability: u32) -> bool {
    set >> capability & 1 == 1
}

/// The value of a line `Name:\tvalue`.
pub(super) fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Status;
    use super::*;

    pub(in super::super) fn provoked() -> Vec<Check> {
        let process = |pid, command: &str| Process { pid, command: command.to_owned() };
        vec![
            node_check(&Node::Missing, &Driver::Running),
            node_check(&Node::Missing, &Driver::Loadable(None)),
            node_check(&Node::Missing, &Driver::Absent),
            node_check(&Node::NotADevice, &Driver::Running),
            node_check(&Node::Device(Err(Errno::EACCES)), &Driver::Running),
            waiting_check(&[process(7, "cat /mnt/app")], false),
            holder_check(&[process(8, "/sbin/cachefilesd -n")]),
            holder_check(&[process(9, "nydusd"), process(10, "infill keeper")]),
            rights_check(Some(0), true),
            rights_check(Some(u64::MAX), false),
        ]
    }

    #[test]
    fn a_missing_node_is_judged_by_its_driver() {
        let judge = |driver| node_check(&Node::Missing, &driver).status;
        assert_eq!(judge(Driver::Running), Status::Fail);
        assert_eq!(judge(Driver::Loadable(None)), Status::Warn);
        assert_eq!(judge(Driver::Absent), Status::Fail);
        let denied = node_check(&Node::Device(Err(Errno::EACCES)), &Driver::Running);
        assert_eq!(denied.verdict, Verdict::NotPermitted);
    }

    #[test]
    fn who_waits_is_named_and_a_warning_if_nobody_answers() {
        let waiting: Vec<_> = (0..9).map(|pid| Process { pid, command: "cat /mnt/app".to_owned() }).collect();
        assert_eq!(waiting_check(&[], false).status, Status::Ok);
        let served = waiting_check(&waiting[..1], true);
        assert_eq!(served.status, Status::Ok);
        assert!(served.found.contains("pid 0 (cat /mnt/app)"), "{}", served.found);
        let unserved = waiting_check(&waiting, false);
        assert!(unserved.status == Status::Warn && unserved.found.starts_with("9 processes wait"), "{unserved:?}");
        assert_eq!(find_waiting(), []);
    }

    #[test]
    fn only_a_foreign_holder_is_in_the_way() {
        let own = Process { pid: 7, command: "/usr/bin/infill serve".to_owned() };
        let other = Process { pid: 8, command: "/sbin/cachefilesd -n".to_owned() };
        assert_eq!(holder_check(&[]).status, Status::Ok);
        assert_eq!(holder_check(std::slice::from_ref(&own)).status, Status::Ok);
        let busy = holder_check(&[own, other]);
        assert_eq!(busy.verdict, Verdict::Unavailable);
        assert!(busy.found.contains("pid 8 (/sbin/cachefilesd -n)"), "{}", busy.found);
        assert_eq!(busy.fix.as_deref(), Some("systemctl disable --now cachefilesd"));
        assert!(!is_own("vi infill.toml"));
    }

    #[test]
    fn rights_take_both_capability_and_namespace() {
        let status = "Name:\tx\nCapPrm:\t0\nCapEff:\t0000000000200000\nSeccomp:\t2\n";
        let set = capabilities(status);
        assert_eq!(set, Some(1 << CAP_SYS_ADMIN));
        assert_eq!(field(status, "Seccomp"), Some("2"));
        assert_eq!(rights_check(set, true).status, Status::Ok);
        assert_eq!(rights_check(set, false).verdict, Verdict::NotPermitted);
        assert_eq!(rights_check(Some(1 << CAP_IPC_LOCK), true).verdict, Verdict::NotPermitted);
    }
}
