//! The commands that `/dev/cachefiles` takes, as text.
//!
//! One command a write(2): the kernel drops what follows a newline without a word
//! (`cachefiles_daemon_write`, fs/cachefiles/daemon.c).

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::unistd;

/// Longest command in bytes: `PAGE_SIZE - 1` where pages are smallest (`cachefiles_daemon_write`).
pub const COMMAND_MAX_BYTES: usize = 4095;

/// Largest errno that fits the kernel's error pointers (`MAX_ERRNO`).
const ERRNO_MAX: i32 = 4095;

/// The command that opens an object: its blob exists and is `len_bytes` long. `None` if the length does not
/// fit the kernel's signed number. Plain decimal: the kernel takes a leading zero for octal.
pub fn copen(msg_id: u32, len_bytes: u64) -> Option<String> {
    i64::try_from(len_bytes).ok()?;
    Some(format!("copen {msg_id},{len_bytes}"))
}

/// The command that refuses to open an object. An errno that the kernel would not take for one becomes `EIO`:
/// 0 would open the object as an empty one.
pub fn refuse(msg_id: u32, errno: Errno) -> String {
    let number = match errno as i32 {
        number @ 1..=ERRNO_MAX => number,
        _ => Errno::EIO as i32,
    };
    format!("copen {msg_id},-{number}")
}

/// Why a value cannot be part of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommandError {
    /// The kernel refuses commands without their value.
    #[error("it is empty")]
    Empty,
    /// The kernel skips blanks before a value, so it would use another one.
    #[error("it begins with a blank")]
    LeadingBlank,
    /// The kernel refuses NUL, and ignores what follows a newline.
    #[error("it contains a NUL or a newline")]
    Forbidden,
    /// The kernel refuses commands of a page and more.
    #[error("the command would be {0} bytes long; the kernel takes {COMMAND_MAX_BYTES}")]
    TooLong(usize),
}

/// A command that sets `verb` to `value`.
///
/// # Errors
/// The kernel would refuse the value or, worse, use only a part of it.
pub fn setup(verb: &str, value: &[u8]) -> Result<Vec<u8>, CommandError> {
    let first = value.first().ok_or(CommandError::Empty)?;
    if value.iter().any(|byte| matches!(byte, 0 | b'\n')) {
        return Err(CommandError::Forbidden);
    }
    // What the kernel's isspace() knows, with the no-break space of Latin-1.
    if matches!(first, b'\t'..=b'\r' | b' ' | 0xa0) {
        return Err(CommandError::LeadingBlank);
    }
    let command = [verb.as_bytes(), b" ", value].concat();
    if command.len() > COMMAND_MAX_BYTES {
        return Err(CommandError::TooLong(command.len()));
    }
    Ok(command)
}

/// Gives the kernel one command; it takes the whole or nothing.
pub(super) fn give(devnode: BorrowedFd<'_>, command: &[u8]) -> Result<(), Errno> {
    loop {
        return match unistd::write(devnode, command) {
            Err(Errno::EINTR) => continue,
            Ok(len) if len < command.len() => Err(Errno::EIO),
            result => result.map(drop),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_plain_decimal_and_never_empty_by_accident() {
        assert_eq!(copen(0, 10).unwrap(), "copen 0,10");
        assert_eq!(copen(u32::MAX, i64::MAX.cast_unsigned()).unwrap(), "copen 4294967295,9223372036854775807");
        assert_eq!(copen(1, 1 << 63), None);
        assert_eq!(refuse(8, Errno::ENOENT), "copen 8,-2");
        assert_eq!(refuse(8, Errno::UnknownErrno), "copen 8,-5");
    }

    #[test]
    fn values_the_kernel_would_misread_are_refused() {
        assert_eq!(setup("dir", b"/c ache").unwrap(), b"dir /c ache");
        assert_eq!(setup("tag", b""), Err(CommandError::Empty));
        assert_eq!(setup("tag", b" x"), Err(CommandError::LeadingBlank));
        assert_eq!(setup("tag", b"\xa0x"), Err(CommandError::LeadingBlank));
        assert_eq!(setup("tag", b"\nx"), Err(CommandError::Forbidden));
        assert_eq!(setup("dir", b"/a\nb"), Err(CommandError::Forbidden));
        assert_eq!(setup("dir", b"/a\0"), Err(CommandError::Forbidden));
        assert!(setup("dir", &[b'/'; 4091]).is_ok());
        assert_eq!(setup("dir", &[b'/'; 4092]), Err(CommandError::TooLong(4096)));
    }
}
