//! `dir:PATH`: a directory of blobs, each a file named like its key.

use std::path::Path;
use std::sync::Arc;

use super::beneath::Beneath;
use super::error::{Cause, StoreError, Unusable};
use super::name::FileName;
use super::source::{FileBlob, OPEN_FLAGS};
use super::{Blob, SourceFile, SourceMode, Store};
use crate::key::Key;

/// A directory of blobs: `PATH/domain/name` if that exists, else `PATH/name`. So blobs can be shared by
/// all domains or belong to one, and a domain's own blob comes before the shared one.
#[derive(Debug)]
pub struct DirStore {
    name: String,
    root: Beneath,
    mode: SourceMode,
}

impl DirStore {
    /// Opens the directory at `path`, to be called `name` in messages.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub fn new(name: String, path: &Path, mode: SourceMode) -> Result<Self, Unusable> {
        let root = Beneath::new(path)?;
        Ok(Self { name, root, mode })
    }

    fn find(&self, key: &Key) -> Result<Option<FileBlob>, Cause> {
        let name = FileName::new(key.name())?;
        if !key.domain().is_empty() {
            let domain = FileName::new(key.domain())?;
            if let Some(blob) = open_file(&self.root, &[domain, name], self.mode)? {
                return Ok(Some(blob));
            }
        }
        open_file(&self.root, &[name], self.mode)
    }
}

impl Store for DirStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        answer(&self.name, key, self.find(key))
    }
}

/// Opens the file that `names` lead to below `root` as a blob.
pub(super) fn open_file(root: &Beneath, names: &[FileName<'_>], mode: SourceMode) -> Result<Option<FileBlob>, Cause> {
    let Some(fd) = root.open(names, OPEN_FLAGS)? else {
        return Ok(None);
    };
    Ok(Some(FileBlob::new(SourceFile::new(fd, mode)?)))
}

/// Gives the result of a search the form that [`Store::open`] returns.
pub(super) fn answer(store: &str, key: &Key, found: Result<Option<FileBlob>, Cause>) -> Result<Option<Arc<dyn Blob>>, StoreError> {
    match found {
        Ok(blob) => Ok(blob.map(|blob| Arc::new(blob) as Arc<dyn Blob>)),
        Err(source) => Err(StoreError { store: store.to_owned(), key: key.to_string(), source }),
    }
}

#[cfg(test)]
impl DirStore {
    /// The same store as if `openat2` were blocked.
    pub(super) fn without_links(mut self) -> Self {
        self.root = self.root.without_links();
        self
    }
}
