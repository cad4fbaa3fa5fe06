//! Files and directories that others are to look into, whatever the umask of who makes them.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Mode of directories.
const DIR_MODE: u32 = 0o755;
/// What the name of a file ends with that is being written.
const NEW: &str = ".infill-new";

/// Makes a directory and those above it. What is there stays as it is.
///
/// # Errors
/// What the system says.
pub fn make_dirs(dir: &Path) -> io::Result<()> {
    // The directory that a relative path begins in has no name.
    if dir.as_os_str().is_empty() || dir.is_dir() {
        return Ok(());
    }
    dir.parent().map_or(Ok(()), make_dirs)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        made => made.and_then(|()| fs::set_permissions(dir, Permissions::from_mode(DIR_MODE))),
    }
}

/// Writes a file, and the directories above it, so that there is all of it or what was there before, also after a loss of power; a
/// program that runs can be replaced so.
///
/// # Errors
/// What the system says; nothing half written is left.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().ok_or(ErrorKind::InvalidInput)?;
    make_dirs(dir)?;
    let mut name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
    name.push(NEW);
    let new = path.with_file_name(name);
    // What a crash has left.
    let _ = fs::remove_file(&new);
    let written = write(&new, bytes, mode).and_then(|()| fs::rename(&new, path)).and_then(|()| File::open(dir)?.sync_all());
    written.inspect_err(|_| drop(fs::remove_file(&new)))
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}
