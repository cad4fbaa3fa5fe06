//! The one place that decides which bytes from a kernel may become a file name.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

/// Longest name in bytes: the kernel stops with a `BUG` above `NAME_MAX - 3` (`cachefiles_cook_key`,
/// fs/cachefiles/key.c), so no honest key is longer.
pub const NAME_MAX_BYTES: usize = 252;

/// Bytes that are safe as one component of a path: it names an entry of a directory, never the directory
/// itself, its parent, or anything further away. (What the entry is, a symbolic link perhaps, is for
/// `beneath` to judge.)
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileName<'a>(&'a [u8]);

impl<'a> FileName<'a> {
    /// Accepts `bytes` as a file name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(bytes: &'a [u8]) -> Result<Self, NameError> {
        match bytes {
            b"" => Err(NameError::Empty),
            b"." | b".." => Err(NameError::Dots),
            _ if bytes.len() > NAME_MAX_BYTES => Err(NameError::TooLong(bytes.len())),
            _ if bytes.contains(&b'/') => Err(NameError::Slash),
            _ if bytes.contains(&0) => Err(NameError::Nul),
            _ => Ok(Self(bytes)),
        }
    }

    /// The name, to build a path from.
    #[must_use]
    pub fn as_os_str(self) -> &'a OsStr {
        OsStr::from_bytes(self.0)
    }
}

impl fmt::Debug for FileName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileName({})", self.0.escape_ascii())
    }
}

/// Why bytes are not acceptable as a file name. Trying again never helps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NameError {
    /// No bytes at all.
    #[error("an empty name cannot be a file; mount with another fsid or device name")]
    Empty,
    /// `.` or `..`.
    #[error("'.' and '..' cannot name a blob; mount with another fsid or device name")]
    Dots,
    /// A path instead of a name.
    #[error("a name with '/' in it could leave the store; mount with another fsid, domain_id or device name")]
    Slash,
    /// A NUL byte.
    #[error("a name with a NUL byte cannot be a file; mount with another fsid or device name")]
    Nul,
    /// Longer than [`NAME_MAX_BYTES`]; holds the length.
    #[error(
        "the name is {0} bytes long and at most {max} are possible; mount with a shorter fsid or device name",
        max = NAME_MAX_BYTES
    )]
    TooLong(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_stays_in_a_directory_and_nothing_else() {
        let longest = [b'a'; NAME_MAX_BYTES];
        for good in [&b"a"[..], b"...", b".hidden", b"\xff\xfe\n", b"a\\b", &longest] {
            assert_eq!(FileName::new(good).map(|n| n.as_os_str().as_bytes()), Ok(good));
        }
        let too_long = [b'a'; NAME_MAX_BYTES + 1];
        for (bad, why) in [
            (&b""[..], NameError::Empty),
            (b".", NameError::Dots),
            (b"..", NameError::Dots),
            (b"/", NameError::Slash),
            (b"../x", NameError::Slash),
            (b"a/b", NameError::Slash),
            (b"a\0", NameError::Nul),
            (&too_long, NameError::TooLong(NAME_MAX_BYTES + 1)),
        ] {
            assert_eq!(FileName::new(bad), Err(why));
        }
    }
}
