//! Seeding the cache from the stores, for whoever names blobs: `infill prefetch --seed` and `infill serve --seed`.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use crate::front::cachefiles::seed::{Outcome, seed};
use crate::key::Key;
use crate::store::Store;
use crate::store::remembered::{Made, Remembered};

/// What became of one blob.
#[derive(Clone, Debug)]
pub struct Seeding {
    /// The blob.
    pub key: Key,
    /// How it ended.
    pub fate: Fate,
    /// The blob's length; 0 if that was not found out.
    pub len_bytes: u64,
}

/// How seeding a blob ended. Whatever is not in the cache is read on demand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It is in the cache now.
    Seeded,
    /// It has an object in the cache already, complete or not, which was left alone.
    AlreadyThere,
    /// It cannot be seeded, for this reason.
    Refused(String),
    /// It should have been possible; this went wrong.
    Failed(String),
}

/// Seeds one blob in `cache_dir` from the first store that has it, and notes in `remembered` which that was.
pub fn seed_key(store: &dyn Store, cache_dir: &Path, remembered: &Remembered, key: &Key) -> Seeding {
    let end = |fate, len_bytes| Seeding { key: key.clone(), fate, len_bytes };
    let blob = match store.open(key) {
        Ok(Some(blob)) => blob,
        Ok(None) => return end(Fate::Failed(format!("no blob of this name in {}", store.name())), 0),
        Err(error) => return end(Fate::Failed(error.to_string()), 0),
    };
    let len_bytes = blob.len_bytes();
    let Some(file) = blob.whole_file() else {
        return end(Fate::Refused("its bytes are not one file of their own in the store".to_owned()), len_bytes);
    };
    let fate = match seed(cache_dir, key, file.fd.as_fd(), len_bytes) {
        Ok(Outcome::Seeded) => {
            remembered.note(key, &Made::anew(blob.identity(), None));
            remembered.sync(Duration::ZERO);
            Fate::Seeded
        }
        Ok(Outcome::AlreadyThere) => Fate::AlreadyThere,
        Ok(Outcome::Refused(refusal)) => Fate::Refused(refusal.to_string()),
        Err(error) => Fate::Failed(error.to_string()),
    };
    end(fate, len_bytes)
}
