//! seccomp: the system calls that are left, and what they may be asked.
//!
//! The list is what the daemon, the standard library and the C library use after the start, with some room for
//! other versions of the libraries. The kernel's own worker threads of a ring make no system calls, so no filter
//! concerns them. Anything else is answered with `ENOSYS`, as by a kernel that does not have it, because libraries
//! know what to do then: a reader of an image should not hang because a library has learnt a new call.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Is, SeccompCondition as Argument, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, apply_filter_all_threads,
};

use crate::store::resident::SYS_CACHESTAT;

/// Calls that may be asked anything. The kernel keeps for these that they are allowed and does not run the filter
/// (`seccomp_cache_check_allow`, kernel/seccomp.c), so all frequent ones belong here.
const ALLOWED: &[c_long] = &[
    // Rings; `seal` takes the first one away again.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // More filters, and fewer capabilities.
    libc::SYS_seccomp,
    libc::SYS_capget,
    libc::SYS_capset,
    // Reading and writing what is open, and answering with ioctl.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_ioctl,
    // Files that are watched, as far as Landlock lets them be found.
    libc::SYS_fanotify_mark,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_signalfd4,
    libc::SYS_pipe2,
    libc::SYS_flock,
    // Sockets that are open, and those accepted from them; none can be made.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Blobs and the cache's files, as far as Landlock lets them be found.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fchdir,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    SYS_CACHESTAT,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_mkdirat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_utimensat,
    libc::SYS_getxattr,
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_flistxattr,
    // Memory; also such as outlives the process.
    libc::SYS_memfd_create,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_membarrier,
    // Threads, locks, signals, ends.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Time, chance, and who we are.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
];

/// Older forms of some of them, which later architectures never had.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLD: &[c_long] =
    &[libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_readlink, libc::SYS_access, libc::SYS_unlink, libc::SYS_pipe];
/// See above.
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLD: &[c_long] = &[];

/// Leaves the calling thread, and all that it starts, what the daemon needs.
pub(super) fn restrict() -> Result<String, String> {
    let program = program().map_err(|error| format!("the filter could not be made: {error}"))?;
    apply_filter(&program).map_err(|error| refused(&error))?;
    Ok(format!("{} system calls", ALLOWED.len() + ALLOWED_OLD.len() + 6))
}

/// Takes from all threads the right to make rings: the engine has its own, which are restricted, and a ring that is
/// not could do what the filter forbids.
///
/// # Errors
/// Why it is not taken, and what the operator can do.
pub fn seal() -> Result<(), String> {
    let rules = BTreeMap::from([(libc::SYS_io_uring_setup, Vec::new())]);
    let program = compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM.unsigned_abs()));
    let program = program.map_err(|error| format!("the filter could not be made: {error}"))?;
    apply_filter_all_threads(&program).map_err(|error| refused(&error))
}

fn program() -> Result<BpfProgram, seccompiler::Error> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = ALLOWED.iter().chain(ALLOWED_OLD).map(|&call| (call, Vec::new())).collect();
    let flag = |index, flag: libc::c_int, value: libc::c_int| {
        let (flag, value) = (u64::from(flag.unsigned_abs()), u64::from(value.unsigned_abs()));
        SeccompRule::new(vec![Argument::new(index, Width::Dword, Is::MaskedEq(flag), value)?])
    };
    let exactly =
        |index, value: libc::c_int| SeccompRule::new(vec![Argument::new(index, Width::Dword, Is::Eq, u64::from(value.unsigned_abs()))?]);
    // Threads, but no processes. clone3 hides its flags behind a pointer, so it is left out and the C library
    // falls back to this one.
    rules.insert(libc::SYS_clone, vec![flag(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?]);
    // No new code.
    rules.insert(libc::SYS_mmap, vec![flag(2, libc::PROT_EXEC, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![flag(2, libc::PROT_EXEC, 0)?]);
    // A thread's name and a mapping's; and what `seal` needs, which only ever takes away.
    let names = [libc::PR_SET_NAME, libc::PR_SET_VMA, libc::PR_SET_NO_NEW_PRIVS];
    rules.insert(libc::SYS_prctl, names.into_iter().map(|name| exactly(0, name)).collect::<Result<_, _>>()?);
    // A thread may come after others: the calling one, not those that are named.
    let nice = |index| Argument::new(index, Width::Dword, Is::Eq, 0);
    rules.insert(libc::SYS_setpriority, vec![SeccompRule::new(vec![nice(0)?, nice(1)?])?]);
    // A directory of a thread's own, in which `cull` is given.
    rules.insert(libc::SYS_unshare, vec![exactly(0, libc::CLONE_FS)?]);
    compile(rules, SeccompAction::Errno(libc::ENOSYS.unsigned_abs()), SeccompAction::Allow)
}

fn compile(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    then: SeccompAction,
) -> Result<BpfProgram, seccompiler::Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, then, arch)?;
    Ok(BpfProgram::try_from(filter)?)
}

fn refused(error: &seccompiler::Error) -> String {
    format!("the kernel takes no filter ({error}); it needs CONFIG_SECCOMP_FILTER=y")
}

/// Tries it, in a thread that ends right after.
///
/// # Errors
/// Why it does not work, and what the operator can do.
pub fn probe() -> Result<String, String> {
    std::thread::spawn(restrict).join().unwrap_or_else(|_| Err("the thread that tried it ended".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::resident::is_resident;

    #[test]
    fn what_the_daemon_does_not_need_is_gone() {
        let file = tempfile::tempfile().unwrap();
        let seen = is_resident(&file, 0, 1);
        let confined = std::thread::spawn(move || {
            nix::sys::prctl::set_no_new_privs().unwrap();
            restrict().inspect_err(|why| println!("not run: {why}")).ok()?;
            // Still there: threads, files, memory, time, and a look at what is in memory.
            assert_eq!(std::thread::Builder::new().name("named".to_owned()).spawn(|| 7).unwrap().join().unwrap(), 7);
            assert_eq!(std::fs::read_to_string("/proc/self/comm").unwrap().lines().count(), 1);
            drop(std::hint::black_box(vec![1_u8; 64 << 20]));
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert_eq!(is_resident(&file, 0, 1), seen);
            // Gone: programs, sockets, mounts, other processes.
            let program = std::process::Command::new("/bin/true").status().unwrap_err();
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap_err();
            let mount = nix::mount::umount("/no/such/mount").unwrap_err();
            let signal = nix::sys::signal::kill(nix::unistd::getpid(), None).unwrap_err();
            for error in [program, socket, mount.into(), signal.into()] {
                assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{error}");
            }
            Some(())
        });
        confined.join().unwrap();
        // This thread is as free as before.
        nix::sys::signal::kill(nix::unistd::getpid(), None).unwrap();
    }
}
