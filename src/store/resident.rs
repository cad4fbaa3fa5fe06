//! What of a file is in the page cache.
//!
//! Asked with cachestat(2), not with its relatives:
//!
//! * mincore(2) answers "all of it" to whoever neither owns the file nor may write it (`can_do_mincore`,
//!   mm/mincore.c), without a sign that it did; and it takes the process's memory map lock, which every other
//!   shard and opener takes too. cachestat says `EPERM` to the same caller (`can_do_cachestat`, mm/filemap.c; kernels
//!   before that check tell everyone the truth) and walks the file's pages under RCU.
//! * preadv2(2) with `RWF_NOWAIT` needs no permission and starts no read-ahead (it implies `IOCB_NOIO`,
//!   `kiocb_set_rw_flags`), but it sees one page a call, writes access times, and needs a second descriptor
//!   for each source, without `O_DIRECT`.
//!
//! The price is Linux 6.5: before, and where it is not permitted, nothing counts as resident.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use crate::range::page_bytes;

/// Longest part of a range that is looked at; what lies behind it is taken to be like it. The call visits each
/// page that is there, so this bounds its time: 1024 pages of 4 KiB, some tens of microseconds, beside a write
/// of 4 MiB. What is not there costs nothing but the call.
const LOOK_MAX_BYTES: u64 = 4 << 20;

/// cachestat(2): the same number on every architecture that Rust runs on; libc has it for some of them.
pub(crate) const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` (include/uapi/linux/mman.h).
#[repr(C)]
#[derive(Debug)]
struct Range {
    offset: u64,
    /// 0 would mean: to the end of the file.
    len_bytes: u64,
}

/// `struct cachestat` (include/uapi/linux/mman.h), in pages.
#[repr(C)]
#[derive(Default, Debug)]
struct Counts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether all of `len_bytes` from the page at `offset` on is in the page cache, or on its way there. It may be gone
/// a moment later.
///
/// # Errors
/// `ENOSYS` before Linux 6.5, `EPERM` for who neither owns the file nor may write it (or is kept from the call by a
/// seccomp filter), `EOPNOTSUPP` on hugetlbfs.
pub fn is_resident(file: impl AsFd, offset: u64, len_bytes: u64) -> Result<bool, Errno> {
    let range = Range { offset, len_bytes: len_bytes.clamp(1, LOOK_MAX_BYTES) };
    let mut counts = Counts::default();
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: both structures are those that the kernel expects, and live through the call.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut counts, 0) };
    Errno::result(result)?;
    Ok(counts.cached >= range.len_bytes.div_ceil(page_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_just_written_is_resident_and_what_is_not_there_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 100_000]).unwrap();
        match is_resident(&file, 0, 100_000) {
            // The kernel may have dropped it already.
            Ok(resident) => {
                println!("resident: {resident}");
                assert_eq!(is_resident(&file, 0, 1 << 20), Ok(false), "it ends before that");
                assert_eq!(is_resident(&file, 1 << 20, 0), Ok(false), "there is no such page");
            }
            Err(errno) => println!("not run: cachestat: {errno}"),
        }
    }
}
