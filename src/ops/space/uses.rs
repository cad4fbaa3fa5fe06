//! When objects were last used: a note in their access times, where the kernel keeps it too.
//!
//! The kernel notes when it opens an object (`touch_atime` in `cachefiles_open_file`, fs/cachefiles/namei.c), unless
//! the file system is mounted with `noatime`; with `relatime` it does so if a day has passed, or if the object was
//! changed since. It does not note when it closes one. That is done here, so that an image which was mounted for a week
//! until a moment ago does not count as a week old; and a note made here is a change, so that `relatime` lets the kernel
//! make its next one.

use std::collections::{HashMap, HashSet};
use std::time::SystemTime;

use crate::front::cachefiles::cache_dir::CacheDirError;
use crate::front::cachefiles::cookies::Lists;
use crate::front::cachefiles::layout::{Place, fanout_name};
use crate::front::cachefiles::tree::Dir;

/// How often it is tried to note the use of an object that has no name: the kernel gives it one some time after it has
/// closed it for the first time.
const TRIES_MAX: u8 = 3;

/// What is in use, and what has just been.
#[derive(Debug)]
pub(super) struct Uses {
    /// Where the kernel tells what it has open; `None`: nowhere.
    lists: Option<Lists>,
    live: HashSet<Place>,
    /// When that was looked up.
    looked: SystemTime,
    /// Closed objects whose use is still to be noted: when they were last seen open, and how often it was tried.
    closed: HashMap<Place, (SystemTime, u8)>,
}

impl Default for Uses {
    fn default() -> Self {
        Self { lists: None, live: HashSet::new(), looked: SystemTime::now(), closed: HashMap::new() }
    }
}

impl Uses {
    /// Nothing is known yet.
    pub(super) fn new(lists: Option<Lists>) -> Self {
        Self { lists, ..Self::default() }
    }

    /// What the kernel had open at the last update.
    pub(super) const fn live(&self) -> &HashSet<Place> {
        &self.live
    }

    /// Looks what is open now, and notes the use of what no longer is. `cache` is the directory of the volumes. Says
    /// whether something was closed: then objects may have got their names.
    ///
    /// # Errors
    /// The kernel's lists cannot be read; then nothing counts as open.
    pub(super) fn update(&mut self, cache: &Dir) -> Result<bool, CacheDirError> {
        let live = self.lists.as_ref().map_or_else(|| Ok(HashSet::new()), Lists::live);
        // What was open long ago may be closed: not to know is better than to be wrong.
        let live = live.inspect_err(|_| self.live.clear())?;
        // As of the last look, when they were open for certain: others may have been used since, which only the kernel
        // and the fills have noted.
        let closed = self.live.difference(&live).cloned();
        self.closed.extend(closed.map(|place| (place, (self.looked, 0))));
        (self.live, self.looked) = (live, SystemTime::now());
        let any = !self.closed.is_empty();
        self.note(cache);
        Ok(any)
    }

    /// Notes that all that is open was used until now.
    pub(super) fn finish(&mut self, cache: &Dir) {
        self.closed.extend(self.live.drain().map(|place| (place, (SystemTime::now(), 0))));
        self.note(cache);
    }

    /// A note that cannot be made costs nothing but a better choice, so it is no error.
    fn note(&mut self, cache: &Dir) {
        self.closed.retain(|place, (at, tries)| {
            *tries += 1;
            !touch(cache, place, *at).unwrap_or(true) && *tries < TRIES_MAX
        });
    }
}

/// `false`: there is no such object.
fn touch(cache: &Dir, place: &Place, at: SystemTime) -> Result<bool, CacheDirError> {
    let Some(volume) = cache.sub(&place.volume)? else { return Ok(false) };
    let Some(fanout) = volume.sub(fanout_name(place.fanout))? else { return Ok(false) };
    fanout.touch(&place.object, at)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, FileTimes};
    use std::os::unix::fs::MetadataExt;
    use std::time::SystemTime;

    use super::*;
    use crate::key::Key;

    #[test]
    fn a_closed_object_counts_as_used_when_it_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &[u8]| Place::of(&Key::new(b"dom", name)).unwrap();
        let (named, nameless) = (place(b"named"), place(b"nameless"));
        let path = |place: &Place| dir.path().join(&place.volume).join(fanout_name(place.fanout)).join(&place.object);
        let make = |place: &Place| {
            fs::create_dir_all(path(place).parent().unwrap()).unwrap();
            let file = File::create(path(place)).unwrap();
            let old = SystemTime::UNIX_EPOCH;
            file.set_times(FileTimes::new().set_accessed(old).set_modified(old)).unwrap();
        };
        make(&named);
        let cache = Dir::open(dir.path()).unwrap().unwrap();
        let mut uses = Uses { live: HashSet::from([named.clone(), nameless.clone()]), ..Uses::default() };
        uses.finish(&cache);
        assert!(path(&named).metadata().unwrap().atime() > 0);
        assert_eq!(path(&named).metadata().unwrap().mtime(), 0);
        make(&nameless);
        uses.note(&cache);
        assert!(path(&nameless).metadata().unwrap().atime() > 0 && uses.closed.is_empty());
    }
}
