//! Making a ring: with the best flags the kernel takes, restricted to what a shard does, or saying who refused it.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};
use nix::errno::Errno;

// io_uring register opcodes (include/uapi/linux/io_uring.h) that stay allowed after the ring is enabled.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_IOWQ_AFF: u8 = 17;
const REGISTER_IOWQ_MAX_WORKERS: u8 = 19;

/// The best ring that this kernel makes, disabled so that it can be restricted, and what it is called.
pub(super) fn build(depth: u32) -> io::Result<(IoUring, &'static str)> {
    let entries = (depth + 8).next_power_of_two();
    let base = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(entries * 4).setup_clamp().setup_r_disabled();
        builder
    };
    let mut attempts: [(&str, io_uring::Builder); 5] = [
        ("single issuer, deferred task work, no submission array", base()),
        ("single issuer, deferred task work", base()),
        ("single issuer, cooperative task work", base()),
        ("cooperative task work", base()),
        ("plain", base()),
    ];
    attempts[0].1.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_no_sqarray();
    attempts[1].1.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    attempts[2].1.setup_submit_all().setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
    attempts[3].1.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    let mut last = io::Error::from(Errno::ENOSYS);
    for (mode, builder) in attempts {
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, mode)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// How operations may be modified.
const ALLOWED_FLAGS: squeue::Flags = squeue::Flags::FIXED_FILE
    .union(squeue::Flags::ASYNC)
    .union(squeue::Flags::IO_LINK)
    .union(squeue::Flags::IO_HARDLINK)
    .union(squeue::Flags::SKIP_SUCCESS);

/// All that a ring may do once it is enabled.
pub(super) fn allowed() -> [Restriction; 13] {
    [
        Restriction::sqe_op(opcode::ReadFixed::CODE),
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::WriteFixed::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Close::CODE),
        Restriction::sqe_op(opcode::Madvise::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_op(opcode::PollRemove::CODE),
        Restriction::sqe_op(opcode::AsyncCancel::CODE),
        Restriction::sqe_flags_allowed(ALLOWED_FLAGS.bits()),
        Restriction::register_op(REGISTER_FILES_UPDATE),
        Restriction::register_op(REGISTER_IOWQ_AFF),
        Restriction::register_op(REGISTER_IOWQ_MAX_WORKERS),
    ]
}

/// CPUs in the form of the kernel. Those beyond what it can hold are left out.
pub(super) fn cpu_set(cpus: &[usize]) -> libc::cpu_set_t {
    // SAFETY: the type is an array of integers, for which zero is a value: no CPU.
    let mut set = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        if cpu < 8 * size_of::<libc::cpu_set_t>() {
            // SAFETY: the set is ours, and the bit lies in it.
            unsafe { libc::CPU_SET(cpu, &mut set) };
        }
    }
    set
}

/// Says in one line who refused a ring and what to do: sysctl, seccomp, memory limit or the kernel itself.
#[must_use]
pub fn explain(error: &io::Error) -> String {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let seccomp = status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"));
    reason(error.raw_os_error().unwrap_or(0), disabled.as_deref().map(str::trim), seccomp)
}

pub(super) fn reason(errno: i32, disabled: Option<&str>, seccomp: bool) -> String {
    match (Errno::from_raw(errno), disabled) {
        (Errno::EPERM, Some(mode @ ("1" | "2"))) => {
            format!("io_uring is switched off by the sysctl kernel.io_uring_disabled={mode}; allow it with: sysctl -w kernel.io_uring_disabled=0")
        }
        (Errno::EPERM | Errno::ENOSYS, _) if seccomp => {
            "io_uring is refused by a seccomp filter (container runtimes' default profiles do that); allow io_uring_setup, io_uring_enter and io_uring_register in the profile".into()
        }
        (Errno::ENOSYS, _) => "this kernel has no io_uring; it needs CONFIG_IO_URING=y".into(),
        (Errno::ENOMEM, _) => "no memory may be locked for io_uring; raise LimitMEMLOCK= or grant CAP_IPC_LOCK".into(),
        (errno, _) => format!("io_uring_setup failed: {errno}"),
    }
}

/// Tries to make a ring as a shard would. `Ok` names its flags, `Err` says who refused.
///
/// # Errors
/// The text of [`explain`].
pub fn probe() -> Result<&'static str, String> {
    build(8).map(|(_, mode)| mode).map_err(|error| explain(&error))
}
