//! Directories that others are to look into, whatever the umask of who makes them.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Their mode.
const MODE: u32 = 0o755;

/// Makes a directory and those above it. What is there stays as it is.
///
/// # Errors
/// What the system says.
pub fn make(dir: &Path) -> io::Result<()> {
    // The directory that a relative path begins in has no name.
    if dir.as_os_str().is_empty() || dir.is_dir() {
        return Ok(());
    }
    dir.parent().map_or(Ok(()), make)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        made => made.and_then(|()| fs::set_permissions(dir, Permissions::from_mode(MODE))),
    }
}
