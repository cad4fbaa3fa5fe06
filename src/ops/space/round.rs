//! One round of culling: least recently used objects go until enough has gone.

use super::cache::{Answer, Cache, Counted};
use super::policy::{Candidate, Excess, choose};
use crate::front::cachefiles::cache_dir::CacheDirError;

/// What a round removed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Removed {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    pub(super) volumes: u64,
    /// Objects that were in use.
    pub(super) refused: u64,
}

impl Removed {
    pub(super) const fn anything(self) -> bool {
        self.objects + self.volumes > 0
    }
}

/// A round.
#[derive(Debug)]
pub(super) struct Round {
    /// What still has to go.
    pub(super) left: Excess,
    /// What has gone.
    pub(super) removed: Removed,
}

impl Round {
    pub(super) fn new(excess: Excess) -> Self {
        Self { left: excess, removed: Removed::default() }
    }

    /// Removes from `cache` volumes that have no objects, then objects that were counted and are not in use, then volumes that have
    /// none left.
    pub(super) fn run(&mut self, cache: &mut dyn Cache, counted: &Counted) -> Result<(), CacheDirError> {
        self.cull_volumes(cache)?;
        let mut candidates = counted.objects.clone();
        // What is in use all the same is made up for by others.
        loop {
            let chosen = choose(&candidates, self.left);
            if chosen.is_empty() {
                break;
            }
            for i in chosen {
                candidates[i].stays = true;
                self.cull(cache, i, &candidates[i])?;
            }
        }
        self.cull_volumes(cache)
    }

    fn cull(&mut self, cache: &mut dyn Cache, object: usize, &Candidate { bytes, files, .. }: &Candidate) -> Result<(), CacheDirError> {
        match cache.cull(object)? {
            Answer::Free => {
                self.removed.objects += 1;
                self.removed.bytes += bytes;
            }
            Answer::Gone => {}
            Answer::Busy => {
                self.removed.refused += 1;
                return Ok(());
            }
        }
        self.left.bytes = self.left.bytes.saturating_sub(bytes);
        self.left.files = self.left.files.saturating_sub(files);
        Ok(())
    }

    fn cull_volumes(&mut self, cache: &mut dyn Cache) -> Result<(), CacheDirError> {
        let (volumes, files) = cache.cull_volumes()?;
        self.removed.volumes += volumes;
        self.left.files = self.left.files.saturating_sub(files);
        Ok(())
    }
}
