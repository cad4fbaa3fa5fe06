//! One round of culling: least recently used objects go until enough has gone.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::time::SystemTime;

use nix::errno::Errno;

use super::policy::{Candidate, Excess, choose};
use crate::front::cachefiles::cache_dir::CacheDirError;
use crate::front::cachefiles::cull::{Answer, Culler};
use crate::front::cachefiles::layout::{Place, fanout_name};
use crate::front::cachefiles::tree::{Census, Dir, Object};

/// Inodes of a volume: its directory and 256 in it (fs/cachefiles/volume.c).
const VOLUME_FILES: u64 = 257;
/// Age in seconds from which on a volume without objects is removed: a young one may be about to get some.
const VOLUME_AGE_MIN_S: i64 = 60;

/// What a round removed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Removed {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    pub(super) volumes: u64,
    /// Objects that the kernel did not let go.
    pub(super) refused: u64,
}

impl Removed {
    pub(super) const fn anything(self) -> bool {
        self.objects + self.volumes > 0
    }
}

/// A round.
#[derive(Debug)]
pub(super) struct Round<'a> {
    /// The directory of the volumes.
    cache: &'a Dir,
    culler: &'a Culler,
    /// What still has to go.
    pub(super) left: Excess,
    /// What has gone.
    pub(super) removed: Removed,
}

impl<'a> Round<'a> {
    pub(super) fn new(cache: &'a Dir, culler: &'a Culler, excess: Excess) -> Self {
        Self { cache, culler, left: excess, removed: Removed::default() }
    }

    /// Removes volumes that have no objects, then objects that are not in `live`, then volumes that have none left.
    pub(super) fn run(&mut self, found: &Census, live: &HashSet<Place>) -> Result<(), CacheDirError> {
        let mut inhabitants: HashMap<&OsStr, usize> = found.volumes.iter().map(|(volume, _)| (&**volume, 0)).collect();
        for object in &found.objects {
            *inhabitants.entry(&object.place.volume).or_default() += 1;
        }
        self.cull_volumes(found, &inhabitants)?;
        let candidate = |object: &Object| Candidate { bytes: object.bytes, last_use: object.last_use, stays: live.contains(&object.place) };
        let mut candidates: Vec<_> = found.objects.iter().map(candidate).collect();
        // What the kernel does not let go is made up for by others.
        loop {
            let chosen = choose(&candidates, self.left);
            if chosen.is_empty() {
                break;
            }
            for i in chosen {
                candidates[i].stays = true;
                let object = &found.objects[i];
                if self.cull_object(object)? {
                    inhabitants.entry(&object.place.volume).and_modify(|count| *count -= 1);
                }
            }
        }
        self.cull_volumes(found, &inhabitants)
    }

    /// Removes an object; `false` if it stays.
    fn cull_object(&mut self, object: &Object) -> Result<bool, CacheDirError> {
        let place = &object.place;
        let Some(volume) = self.cache.sub(&place.volume)? else { return Ok(true) };
        let Some(fanout) = volume.sub(fanout_name(place.fanout))? else { return Ok(true) };
        match self.ask(&fanout, &place.object)? {
            Answer::Free => {
                self.removed.objects += 1;
                self.removed.bytes += object.bytes;
            }
            Answer::Gone => {}
            Answer::Busy => {
                self.removed.refused += 1;
                return Ok(false);
            }
        }
        self.left.bytes = self.left.bytes.saturating_sub(object.bytes);
        self.left.files = self.left.files.saturating_sub(1);
        Ok(true)
    }

    /// Removes volumes in which nothing is left. Nothing is lost with them, and they take many inodes. The kernel knows
    /// which are in use, also by objects that have no name yet.
    fn cull_volumes(&mut self, found: &Census, inhabitants: &HashMap<&OsStr, usize>) -> Result<(), CacheDirError> {
        let now_s = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
        for (volume, made_s) in &found.volumes {
            let old = now_s.saturating_sub(*made_s) >= VOLUME_AGE_MIN_S;
            if old && inhabitants.get(&**volume) == Some(&0) && self.ask(self.cache, volume)? == Answer::Free {
                self.removed.volumes += 1;
                self.left.files = self.left.files.saturating_sub(VOLUME_FILES);
            }
        }
        Ok(())
    }

    /// A name that no command can hold (a volume's may be anything) stays.
    fn ask(&self, dir: &Dir, name: &OsStr) -> Result<Answer, CacheDirError> {
        match self.culler.cull(dir, name) {
            Err(Errno::EINVAL) => Ok(Answer::Busy),
            answer => answer.map_err(CacheDirError::io(&dir.path_of(name), "cull it")),
        }
    }
}
