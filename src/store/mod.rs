//! Stores: where the bytes of blobs come from.
//!
//! | file | its subject |
//! |---|---|
//! | `name` | which bytes of a key may become a file name |
//! | `beneath` | opening files below a directory and never outside of it |
//! | `source` | how a file is read, and the blob that is one file |
//! | `holes` | which parts of a file are zeros that nobody has to read |
//! | `resident` | what of a file is in the page cache |
//! | `dir`, `oci` | the kinds of stores |
//! | `spec`, `list` | settings; several stores in order |
//! | `remembered` | which blobs the objects of a cache were made of |
//! | `endless` | a blob of a pipe or a device, for tests and benches |
//! | `error` | what can go wrong, and whether it may pass |
//!
//! A store maps a [`Key`] to a [`Blob`], and a blob says where the bytes of any of its ranges are. It does
//! no reading of its own on the hot path: the engine reads the files that the blob names.

mod beneath;
pub mod dir;
pub(crate) mod endless;
pub mod error;
pub mod holes;
pub mod list;
pub mod name;
pub mod oci;
pub mod remembered;
pub mod resident;
pub mod source;
pub mod spec;

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

pub use self::error::{Cause, SetupError, StoreError};
pub use self::list::Stores;
pub use self::source::FileBlob;
pub use self::spec::{StoreSpec, open_store};
use crate::key::Key;

/// The file system of a blob without files.
pub const NO_DEVICE: u64 = u64::MAX;

/// Maps keys to blobs. Used by several threads; a call may block on the file system below.
pub trait Store: Send + Sync + fmt::Debug {
    /// The setting this store was made from, such as `dir:/srv/blobs`, for messages.
    fn name(&self) -> &str;

    /// Finds a blob. `Ok(None)`: this store does not have it, ask the next one.
    ///
    /// # Errors
    /// The store has or may have the blob but could not open it.
    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError>;
}

/// Bytes of one blob, addressed from 0 to [`Blob::len_bytes`].
pub trait Blob: Send + Sync + fmt::Debug {
    /// Exact length; never changes while the blob is open.
    fn len_bytes(&self) -> u64;

    /// Where the bytes from `offset` (below the length) on are. The extent starts at `offset`.
    fn extent(&self, offset: u64) -> Extent;

    /// The files that extents refer to by index.
    fn files(&self) -> &[Arc<SourceFile>];

    /// Whether every read of it fails, because what it was opened for is not there any more.
    fn is_lost(&self) -> bool {
        false
    }

    /// Tells it from another blob that has its name later. Two that are equal have the same bytes.
    fn identity(&self) -> Identity {
        Identity { len_bytes: self.len_bytes(), files: self.files().iter().map(|file| file.identity).collect() }
    }

    /// The file system that its bytes are read from: `st_dev` of its files, of which a blob's are on one. Blobs of one
    /// file system share what the engine gives it.
    fn device(&self) -> u64 {
        self.files().first().map_or(NO_DEVICE, |file| file.device)
    }

    /// The file that has exactly the bytes of this blob, in their order, if there is one.
    fn whole_file(&self) -> Option<&SourceFile> {
        None
    }
}

/// A blob that is not there any more: its length is known, and every read of it fails.
#[derive(Debug)]
pub struct LostBlob {
    /// How long it was.
    pub len_bytes: u64,
}

impl Blob for LostBlob {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// In a file that does not exist.
    fn extent(&self, offset: u64) -> Extent {
        Extent { len_bytes: self.len_bytes.saturating_sub(offset), data: Data::Read { file: 0, offset } }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &[]
    }

    fn is_lost(&self) -> bool {
        true
    }
}

/// See [`Blob::identity`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Exact length of the blob.
    pub len_bytes: u64,
    files: Box<[FileIdentity]>,
}

/// A file and what was in it: a blob is never changed, and whoever puts another one in its place makes a new file. That has
/// another number, or if numbers are used again, another time of birth where file systems know that (`statx`). The time of
/// the last change is that of its contents, not of its inode, because links may come and go. The file system's number is
/// no part of it: after a reboot it may be another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileIdentity {
    inode: u64,
    /// In seconds and nanoseconds of the epoch, as is the next.
    born: (i64, i64),
    modified: (i64, i64),
}

impl From<&std::fs::Metadata> for FileIdentity {
    fn from(found: &std::fs::Metadata) -> Self {
        let since = |at: std::time::SystemTime| at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let born = found.created().map(since).unwrap_or_default();
        Self {
            inode: found.ino(),
            born: (i64::try_from(born.as_secs()).unwrap_or(i64::MAX), i64::from(born.subsec_nanos())),
            modified: (found.mtime(), found.mtime_nsec()),
        }
    }
}

/// A run of bytes of a blob that lie together. It ends on a boundary of the machine's pages or at the end of the
/// blob, because whole pages are written and each comes from one extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// How many bytes, at least 1; it may reach the end of the blob but not beyond.
    pub len_bytes: u64,
    /// Where they are.
    pub data: Data,
}

/// Where a run of bytes is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Data {
    /// Nowhere: they are all zero.
    Zero,
    /// In a file, to be read into a buffer; or to be written from its mapped pages, if it has any and they are in
    /// memory when it comes to that ([`SourceFile::is_in_memory`]).
    Read {
        /// Index into [`Blob::files`].
        file: usize,
        /// Where in the file.
        offset: u64,
    },
    /// In a file that is mapped: its pages can be handed to a write as they are.
    Mapped {
        /// Index into [`Blob::files`].
        file: usize,
        /// Where in the file.
        offset: u64,
    },
}

/// How a source is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceMode {
    /// What is in the page cache is written to the cache from there without being copied; the rest is read as in
    /// `direct`.
    #[default]
    Auto,
    /// Past the page cache into registered buffers (`O_DIRECT`); buffered where the file system refuses.
    Direct,
    /// Through the page cache into registered buffers.
    Buffered,
    /// Mapped; the pages are written to the cache without being copied.
    Mmap,
}

/// An open file of a store.
#[derive(Debug)]
pub struct SourceFile {
    /// Open for reading, with `O_DIRECT` if `mode` says so.
    pub fd: OwnedFd,
    /// Length when it was opened.
    pub len_bytes: u64,
    /// Its file system (`st_dev`).
    pub device: u64,
    /// Which file it is.
    pub identity: FileIdentity,
    /// How it is really read, after any fallback: never [`SourceMode::Auto`].
    pub mode: SourceMode,
    /// The whole file, if it is mapped: in [`SourceMode::Mmap`], and where [`SourceMode::Auto`] was wanted and is
    /// possible. Never formed into a slice: the file may shrink under us.
    pub map: Option<memmap2::MmapRaw>,
}

#[cfg(test)]
mod tests;
