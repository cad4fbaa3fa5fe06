//! `oci:PATH`: the blobs of an OCI image layout, or of containerd's content store, named by their digest.

use std::path::Path;
use std::sync::Arc;

use nix::fcntl::OFlag;

use super::beneath::Beneath;
use super::dir::{answer, open_file};
use super::error::{Cause, StoreError, Unusable};
use super::name::FileName;
use super::source::FileBlob;
use super::{Blob, SourceMode, Store};
use crate::key::Key;

/// Where containerd keeps its content store below its root directory.
const CONTAINERD_CONTENT: &str = "io.containerd.content.v1.content";

/// Hexadecimal digits of a SHA-256 digest.
const DIGEST_DIGITS: usize = 64;

/// Blobs at `PATH/blobs/sha256/HEX`. The domain of a key does not matter here: content is named by what
/// it is.
#[derive(Debug)]
pub struct OciStore {
    name: String,
    root: Beneath,
    mode: SourceMode,
}

impl OciStore {
    /// Opens the layout at `path` (containerd's root directory will do as well), to be called `name` in
    /// messages.
    ///
    /// # Errors
    /// The directory cannot be used, or has no `blobs/sha256`.
    pub fn new(name: String, path: &Path, mode: SourceMode) -> Result<Self, Unusable> {
        let mut root = Beneath::new(path)?;
        if !has_blobs(&root) {
            root = match Beneath::new(&path.join(CONTAINERD_CONTENT)) {
                Ok(content) if has_blobs(&content) => content,
                Ok(_) | Err(Unusable::Missing(_)) => {
                    return Err(Unusable::NoBlobs(path.to_owned()));
                }
                Err(other) => return Err(other),
            };
        }
        Ok(Self { name, root, mode })
    }

    fn find(&self, key: &Key) -> Result<Option<FileBlob>, Cause> {
        match digest(key.name()) {
            Some(hex) => {
                let [blobs, sha256] = blobs_dir()?;
                open_file(&self.root, &[blobs, sha256, FileName::new(hex)?], self.mode)
            }
            None => Ok(None),
        }
    }
}

impl Store for OciStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        answer(&self.name, key, self.find(key))
    }
}

fn blobs_dir() -> Result<[FileName<'static>; 2], Cause> {
    Ok([FileName::new(b"blobs")?, FileName::new(b"sha256")?])
}

fn has_blobs(root: &Beneath) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    blobs_dir().is_ok_and(|names| matches!(root.open(&names, flags), Ok(Some(_))))
}

/// The digits of a SHA-256 digest, with or without `sha256:` before them; `None` for any other name.
/// Upper-case digits are not a digest (OCI image specification, descriptor.md).
fn digest(name: &[u8]) -> Option<&[u8]> {
    let hex = name.strip_prefix(b"sha256:").unwrap_or(name);
    let is_hex = hex.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (hex.len() == DIGEST_DIGITS && is_hex).then_some(hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_lower_case_digest_is_one() {
        let hex = [b'a'; DIGEST_DIGITS];
        assert_eq!(digest(&hex), Some(&hex[..]));
        assert_eq!(digest(&[b"sha256:", &hex[..]].concat()), Some(&hex[..]));
        for bad in [
            &hex[1..],
            &[&hex[..], b"0"].concat(),
            &[b'A'; DIGEST_DIGITS],
            &[b'g'; DIGEST_DIGITS],
            &[b"sha512:", &hex[..]].concat(),
            &[b"sha256:sha256:", &hex[..]].concat(),
            b"sha256:",
            b"",
        ] {
            assert_eq!(digest(bad), None, "{}", bad.escape_ascii());
        }
    }
}
