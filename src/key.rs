//! The name under which a kernel asks for a blob.

use std::fmt;

/// Names one blob: a domain that images share, and the blob's name within it. Both are bytes from the
/// kernel, not text: they may hold anything, also `/`, NUL and invalid UTF-8. [`crate::store`] decides
/// what is acceptable as a file name.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Key {
    domain: Box<[u8]>,
    name: Box<[u8]>,
}

impl Key {
    /// A key made of its two parts.
    #[must_use]
    pub fn new(domain: &[u8], name: &[u8]) -> Self {
        Self { domain: domain.into(), name: name.into() }
    }

    /// The EROFS `domain_id`, or the image's own `fsid` where it was mounted without a domain.
    #[must_use]
    pub fn domain(&self) -> &[u8] {
        &self.domain
    }

    /// The EROFS `fsid` or device name.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        &self.name
    }
}

/// `domain/name` with every unprintable byte escaped, so that a hostile key cannot forge a log line.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain.escape_ascii(), self.name.escape_ascii())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_escapes_what_a_terminal_would_obey() {
        assert_eq!(Key::new(b"dom", b"a\x1b[2J\n\xff").to_string(), "dom/a\\x1b[2J\\n\\xff");
    }
}
