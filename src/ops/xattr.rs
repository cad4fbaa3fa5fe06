//! Extended attributes of open files, which neither std nor nix offers.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;

/// Length of an attribute's value in bytes; `None` if the file does not have it.
///
/// # Errors
/// `EOPNOTSUPP` if the file system has no such attributes, or what else fgetxattr(2) says.
pub fn len_bytes(file: BorrowedFd<'_>, name: &CStr) -> Result<Option<usize>, Errno> {
    // SAFETY: `file` is open while borrowed, `name` ends with NUL, and with a size of 0 the kernel writes nothing
    // through the null pointer (fgetxattr(2)).
    let len = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), ptr::null_mut(), 0) };
    match Errno::result(len) {
        Ok(len) => Ok(usize::try_from(len).ok()),
        Err(Errno::ENODATA) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Sets an attribute, whether the file has it or not.
///
/// # Errors
/// What fsetxattr(2) says.
pub fn set(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: `file` is open while borrowed, `name` ends with NUL, and the kernel reads exactly `value.len()` bytes
    // of `value`.
    let done = unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(done).map(drop)
}
