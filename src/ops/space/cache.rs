//! What the steward looks after, whichever front end it belongs to.

use super::policy::Candidate;
use crate::front::cachefiles::cache_dir::CacheDirError;
use crate::front::cachefiles::tree::Dir;

pub use crate::front::cachefiles::cull::Answer;

/// A cache: what is in it, and how some of it is removed. It is made and used by one thread.
pub trait Cache {
    /// A directory on its file system, that is the first one of its paths.
    fn dir(&self) -> &Dir;

    /// Whether anything may be removed at all.
    fn may_cull(&self) -> bool;

    /// Notes what is in use. Says whether something was closed since the last time: then it may be removed now.
    ///
    /// # Errors
    /// It cannot be seen; then nothing counts as being in use.
    fn note_uses(&mut self) -> Result<bool, CacheDirError>;

    /// The last thing that is done with it.
    fn finish(&mut self);

    /// Deletes what was removed and takes room all the same.
    ///
    /// # Errors
    /// Some of it stays.
    fn tidy(&mut self) -> Result<(), CacheDirError>;

    /// Counts what is in it.
    ///
    /// # Errors
    /// It cannot be read.
    fn count(&mut self) -> Result<Counted, CacheDirError>;

    /// Removes an object, by its place in the last count, unless it is in use.
    ///
    /// # Errors
    /// The file system, or the kernel.
    fn cull(&mut self, object: usize) -> Result<Answer, CacheDirError>;

    /// Removes directories in which no object is left, if it has any that can go: how many, and how many inodes they took.
    ///
    /// # Errors
    /// As [`Cache::cull`].
    fn cull_volumes(&mut self) -> Result<(u64, u64), CacheDirError>;
}

/// What is in a cache at about one moment.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Counted {
    /// Its objects.
    pub objects: Vec<Candidate>,
    /// Why something is missing, if anything is.
    pub unread: Option<String>,
}
