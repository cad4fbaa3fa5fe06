//! Telling EROFS from other file systems: the daemon must never wait for a mount that waits for it.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::statfs::{FsType, fstatfs};

/// `EROFS_SUPER_MAGIC_V1` (include/uapi/linux/magic.h), which libc does not know.
pub const MAGIC: u32 = 0xe0f5_e1e2;

/// Whether a file system is EROFS. Its number has 32 bits, in a field that is wider on most targets.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the low 32 bits are the number")]
pub fn is_erofs(kind: FsType) -> bool {
    kind.0 as u32 == MAGIC
}

/// Whether an open file lies on EROFS.
///
/// # Errors
/// Its file system cannot be asked.
pub fn on_erofs(fd: impl AsFd) -> Result<bool, Errno> {
    fstatfs(fd).map(|stat| is_erofs(stat.filesystem_type()))
}

/// Whether this program itself lies on EROFS: a page of it that must be read again could then be a request to
/// itself. `false` if that cannot be found out.
#[must_use]
pub fn runs_from_erofs() -> bool {
    File::open("/proc/self/exe").is_ok_and(|exe| on_erofs(exe).unwrap_or(false))
}
