//! The cache of cachefiles: objects in volumes' directories, which the kernel removes if it does not use them.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use nix::errno::Errno;

use super::cache::{Answer, Cache, Counted};
use super::policy::Candidate;
use super::uses::Uses;
use crate::front::cachefiles::Device;
use crate::front::cachefiles::cache_dir::CacheDirError;
use crate::front::cachefiles::cookies::Lists;
use crate::front::cachefiles::cull::{Culler, empty_graveyard};
use crate::front::cachefiles::layout::fanout_name;
use crate::front::cachefiles::tree::{CACHE, Census, Dir, Object, census};

/// Inodes of a volume: its directory and 256 in it (fs/cachefiles/volume.c).
const VOLUME_FILES: u64 = 257;
/// Age in seconds from which on a volume without objects is removed: a young one may be about to get some.
const VOLUME_AGE_MIN_S: i64 = 60;

/// See the module's description.
#[derive(Debug)]
pub struct Volumes {
    root: Dir,
    cache: Dir,
    /// `None`: the kernel must not or cannot be asked to remove anything.
    culler: Option<Culler>,
    uses: Uses,
    /// The last count.
    found: Census,
    /// How many objects each volume has.
    inhabitants: HashMap<OsString, usize>,
}

impl Volumes {
    /// The cache in `cache_dir`, which `device` has bound. The kernel `may_cull`, and tells in `lists` what it has open; `None`:
    /// nowhere, so it is asked about each object that is to go. The thread gets a working directory of its own.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn new(cache_dir: &Path, device: Arc<Device>, may_cull: bool, lists: Option<Lists>) -> Result<Self, CacheDirError> {
        let missing = || CacheDirError::io(cache_dir, "look after its space")(Errno::ENOENT);
        let root = Dir::open(cache_dir)?.ok_or_else(missing)?;
        let cache = root.sub(CACHE)?.ok_or_else(missing)?;
        let (uses, found, inhabitants) = (Uses::new(lists), Census::default(), HashMap::new());
        Ok(Self { root, cache, culler: culler(may_cull, device), uses, found, inhabitants })
    }

    /// A name that no command can hold (a volume's may be anything) stays.
    fn ask(&self, dir: &Dir, name: &OsStr) -> Result<Answer, CacheDirError> {
        match self.culler.as_ref().map(|culler| culler.cull(dir, name)) {
            None | Some(Err(Errno::EINVAL)) => Ok(Answer::Busy),
            Some(answer) => answer.map_err(CacheDirError::io(&dir.path_of(name), "cull it")),
        }
    }
}

impl Cache for Volumes {
    fn dir(&self) -> &Dir {
        &self.root
    }

    fn may_cull(&self) -> bool {
        self.culler.is_some()
    }

    fn note_uses(&mut self) -> Result<bool, CacheDirError> {
        self.uses.update(&self.cache)
    }

    fn finish(&mut self) {
        self.uses.finish(&self.cache);
    }

    fn tidy(&mut self) -> Result<(), CacheDirError> {
        empty_graveyard(&self.root).map(drop)
    }

    fn count(&mut self) -> Result<Counted, CacheDirError> {
        self.found = census(&self.root)?;
        self.inhabitants = self.found.volumes.iter().map(|(volume, _)| (volume.clone(), 0)).collect();
        for object in &self.found.objects {
            *self.inhabitants.entry(object.place.volume.clone()).or_default() += 1;
        }
        let live = self.uses.live();
        let candidate = |object: &Object| {
            let Object { place, bytes, last_use } = object;
            Candidate { bytes: *bytes, files: 1, last_use: *last_use, stays: live.contains(place) }
        };
        Ok(Counted { objects: self.found.objects.iter().map(candidate).collect(), unread: self.found.unread.clone() })
    }

    fn cull(&mut self, object: usize) -> Result<Answer, CacheDirError> {
        let place = &self.found.objects[object].place;
        let fanout = match self.cache.sub(&place.volume)? {
            Some(volume) => volume.sub(fanout_name(place.fanout))?,
            None => None,
        };
        let answer = fanout.map_or(Ok(Answer::Gone), |fanout| self.ask(&fanout, &place.object))?;
        if answer != Answer::Busy {
            self.inhabitants.entry(place.volume.clone()).and_modify(|count| *count -= 1);
        }
        Ok(answer)
    }

    /// Nothing is lost with them, and they take many inodes. The kernel knows which are in use, also by objects that have no
    /// name yet.
    fn cull_volumes(&mut self) -> Result<(u64, u64), CacheDirError> {
        let now_s = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
        let mut gone = 0;
        for (volume, made_s) in &self.found.volumes {
            let old = now_s.saturating_sub(*made_s) >= VOLUME_AGE_MIN_S;
            if old && self.inhabitants.get(volume) == Some(&0) && self.ask(&self.cache, volume)? == Answer::Free {
                gone += 1;
            }
        }
        Ok((gone, gone * VOLUME_FILES))
    }
}

/// The right to cull, where the kernel does that well.
fn culler(may_cull: bool, device: Arc<Device>) -> Option<Culler> {
    if !may_cull {
        tracing::warn!("nothing is removed from the cache: culling can corrupt this kernel's memory (CVE-2026-43106); update it");
        return None;
    }
    let culler = Culler::on_this_thread(device);
    culler.inspect_err(|error| tracing::warn!("nothing is removed from the cache: unshare(CLONE_FS) is refused: {error}")).ok()
}
