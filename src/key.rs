//! The name under which a kernel asks for a blob.

use std::fmt;
use std::str::FromStr;

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

/// Reads `DOMAIN/NAME`, or `NAME` alone for an image that is mounted without a domain and so is its own.
impl FromStr for Key {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        let (domain, name) = text.split_once('/').unwrap_or((text, text));
        if domain.is_empty() || name.is_empty() || name.contains('/') {
            return Err(BadKey(text.to_owned()));
        }
        Ok(Self::new(domain.as_bytes(), name.as_bytes()))
    }
}

/// A text that names no blob.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} does not name a blob; write DOMAIN/NAME, or NAME for an image that is mounted without domain_id")]
pub struct BadKey(String);

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
    fn a_name_alone_is_its_own_domain() {
        assert_eq!("dom/a.img".parse(), Ok(Key::new(b"dom", b"a.img")));
        assert_eq!("a.img".parse(), Ok(Key::new(b"a.img", b"a.img")));
        for text in ["", "/", "dom/", "/a.img", "dom/a/b"] {
            assert!(text.parse::<Key>().unwrap_err().to_string().contains("DOMAIN/NAME"), "{text}");
        }
    }

    #[test]
    fn display_escapes_what_a_terminal_would_obey() {
        assert_eq!(Key::new(b"dom", b"a\x1b[2J\n\xff").to_string(), "dom/a\\x1b[2J\\n\\xff");
    }
}
