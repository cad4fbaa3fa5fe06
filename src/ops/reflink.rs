//! Sharing a file's blocks with another file, which neither std nor nix offers.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

mod sys {
    #![allow(missing_docs, reason = "made by a macro")]
    // FICLONE, _IOW(0x94, 9, int): 0x40049409 (include/uapi/linux/fs.h). The argument is a descriptor.
    nix::ioctl_write_int!(ficlone, 0x94, 9);
}

/// Makes `to` a copy of the whole of `from`, which must be open for reading, by sharing its blocks: ioctl_ficlone(2).
/// What is dirty in memory is written first, so the copy is what a reader sees; holes stay holes.
///
/// # Errors
/// `EXDEV`: they are on two file systems. `EOPNOTSUPP`, `ENOTTY` or `EINVAL`: the file system cannot do it, or not with
/// these files. Else what ioctl_ficlone(2) says.
pub fn clone_whole(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> Result<(), Errno> {
    let source = u64::try_from(from.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    // SAFETY: both descriptors are open while borrowed, and the argument is a plain number: the kernel follows no
    // pointer.
    unsafe { sys::ficlone(to.as_raw_fd(), source) }.map(drop)
}
