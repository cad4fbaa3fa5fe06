//! The setting of a store, and its opening.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::dir::DirStore;
use super::error::SetupError;
use super::oci::OciStore;
use super::{SourceMode, Store};

/// A store as named on the command line and in the configuration: `dir:PATH` or `oci:PATH`.
#[derive(Clone, PartialEq, Eq, Debug, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum StoreSpec {
    /// A directory of blobs.
    Dir(PathBuf),
    /// An OCI image layout or containerd's content store.
    Oci(PathBuf),
}

impl StoreSpec {
    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Dir(path) | Self::Oci(path) => path,
        }
    }
}

impl fmt::Display for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Dir(_) => "dir",
            Self::Oci(_) => "oci",
        };
        write!(f, "{kind}:{}", self.path().display())
    }
}

/// Why a text does not name a store.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpecError {
    /// No kind that is known.
    #[error(
        "'{0}' is not a store; write dir:PATH for a directory of blobs, or oci:PATH for an OCI image \
         layout or containerd's content store"
    )]
    Form(String),
    /// A kind that is to come.
    #[error("'{0}': chunk stores are not yet supported in this version; use dir:PATH or oci:PATH")]
    Chunk(String),
    /// Nothing after the colon.
    #[error("'{0}' names no directory; write its path after the colon")]
    NoPath(String),
}

impl FromStr for StoreSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let Some((kind, path)) = text.split_once(':') else {
            return Err(SpecError::Form(text.to_owned()));
        };
        let make = match kind {
            "dir" => Self::Dir,
            "oci" => Self::Oci,
            "chunk" => return Err(SpecError::Chunk(text.to_owned())),
            _ => return Err(SpecError::Form(text.to_owned())),
        };
        if path.is_empty() {
            return Err(SpecError::NoPath(text.to_owned()));
        }
        Ok(make(PathBuf::from(path)))
    }
}

impl TryFrom<String> for StoreSpec {
    type Error = SpecError;

    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<StoreSpec> for String {
    fn from(spec: StoreSpec) -> Self {
        spec.to_string()
    }
}

/// Opens the store that `spec` names; its files are read in `mode` as far as the file system allows.
///
/// # Errors
/// The directory is missing, is not one, cannot be read, lies on EROFS, or has no blobs where they are
/// expected.
pub fn open_store(spec: &StoreSpec, mode: SourceMode) -> Result<Arc<dyn Store>, SetupError> {
    let name = spec.to_string();
    let store: Result<Arc<dyn Store>, _> = match spec {
        StoreSpec::Dir(path) => DirStore::new(name, path, mode).map(|store| Arc::new(store) as Arc<dyn Store>),
        StoreSpec::Oci(path) => OciStore::new(name, path, mode).map(|store| Arc::new(store) as Arc<dyn Store>),
    };
    store.map_err(|source| SetupError { store: spec.to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_says_what_it_is_and_what_it_could_have_been() {
        assert_eq!("dir:/a:b".parse(), Ok(StoreSpec::Dir("/a:b".into())));
        assert_eq!("oci:x".parse(), Ok(StoreSpec::Oci("x".into())));
        for text in ["dir:/srv/blobs", "oci:relative path"] {
            assert_eq!(text.parse::<StoreSpec>().map(|s| s.to_string()), Ok(text.into()));
        }
        let error = |text: &str| text.parse::<StoreSpec>().unwrap_err().to_string();
        assert!(error("chunk:/x").contains("not yet supported in this version"));
        assert!(error("dir:").contains("path after the colon"));
        for text in ["", "/srv/blobs", "DIR:/x", "nfs:/x"] {
            let message = error(text);
            assert!(message.contains("dir:PATH") && message.contains("oci:PATH"), "{message}");
        }
    }
}
