//! Serving again what was restored. A store that hangs keeps nobody waiting but readers of its own blobs, and of those that
//! share their groups, and these for a bounded time: blobs are looked up by several threads for each group, and a group goes
//! on as soon as its blobs are open.

use std::collections::HashMap;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::blobs::{Blobs, name_of};
use super::error::AttachError;
use super::opening::Opening;
use crate::engine::Entry;
use crate::key::Key;
use crate::store::Store;

/// Threads that look up blobs of one group.
const LOOKUPS_MAX: usize = 8;

/// Blobs that are not open, by the names of their files.
type Closed = HashMap<String, Key>;

/// What became of a blob of this name, of a group.
type Ended = (usize, String, Result<(), AttachError>);

/// Opens blobs of a group.
#[derive(Clone)]
struct Lookup {
    blobs: Arc<Blobs>,
    engine: Entry,
    store: Arc<dyn Store>,
    group: usize,
    /// Those that nobody looks up yet.
    queue: Arc<Mutex<Vec<(String, Key)>>>,
    deadline: Instant,
    ended: Sender<Ended>,
}

impl Blobs {
    /// Has `engine` serve again what was restored, from `store`, and answers what was left unanswered. From then on readers are
    /// served, and of what could not be served within `patience`, which it gives, they get errors. That is tried again by
    /// the next call, or when it is attached. `patience` should be longer than the engine's `open_timeout`.
    pub fn resume(self: &Arc<Self>, engine: &Entry, store: &Arc<dyn Store>, patience: Duration) -> Vec<AttachError> {
        let deadline = Instant::now() + patience;
        let (ended, ends) = channel();
        let mut waiting: Vec<_> = (0..self.groups.len()).map(|group| self.closed(group)).collect();
        for (group, closed) in waiting.iter().enumerate() {
            let (blobs, engine, store) = (Arc::clone(self), engine.clone(), Arc::clone(store));
            let queue = Arc::new(Mutex::new(Vec::from_iter(closed.clone())));
            Lookup { blobs, engine, store, group, queue, deadline, ended: ended.clone() }.start(closed.len());
        }
        drop(ended);
        let go_on = |group: usize| self.groups[group].resume(|need| engine.need(need));
        (0..waiting.len()).filter(|group| waiting[*group].is_empty()).for_each(go_on);
        let mut failed = Vec::new();
        while let Ok((group, name, result)) = ends.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            failed.extend(result.err());
            waiting[group].remove(&name);
            if waiting[group].is_empty() {
                go_on(group);
            }
        }
        (0..waiting.len()).filter(|group| !waiting[*group].is_empty()).for_each(go_on);
        failed.extend(waiting.into_iter().flat_map(HashMap::into_values).map(AttachError::TimedOut));
        failed
    }

    /// What the engine does not know of a group.
    fn closed(&self, group: usize) -> Closed {
        let all = self.served();
        let closed = all.iter().filter(|(_, served)| served.place.group == group && !served.opened);
        closed.map(|(name, served)| (name.clone(), served.key.clone())).collect()
    }

    /// Opens a blob that is served, if the store still has it, and is in time.
    fn reopen(&self, engine: &Entry, store: &dyn Store, name: &str, key: &Key, deadline: Instant) -> Result<(), AttachError> {
        let blob = store.open(key)?.ok_or_else(|| AttachError::NotFound(key.clone()))?;
        if name_of(key, &*blob) != name {
            return Err(AttachError::Refused { key: key.clone(), errno: Errno::ESTALE });
        }
        let left = || deadline.saturating_duration_since(Instant::now());
        let in_time = Some(left()).filter(|left| !left.is_zero());
        let late = || AttachError::TimedOut(key.clone());
        // Nobody else opens it before this has an end.
        let _claim = in_time.and_then(|left| self.claims.take(name, left)).ok_or_else(late)?;
        let opening = self.served().get(name).map(|served| Opening::begin(engine, served));
        opening.ok_or_else(late)?.end(left())?;
        self.served().entry(name.to_owned()).and_modify(|served| served.opened = true);
        Ok(())
    }
}

impl Lookup {
    /// In as many threads as `blobs` need. One whose store hangs stays until the store answers.
    fn start(self, blobs: usize) {
        for _ in 0..blobs.min(LOOKUPS_MAX) {
            let lookup = self.clone();
            if let Err(error) = Builder::new().name("infill-resume".into()).spawn(move || lookup.run()) {
                tracing::error!("cannot start a thread that opens blobs again: {error}; raise TasksMax=");
            }
        }
    }

    fn run(self) {
        while let Some((name, key)) = self.next() {
            let result = self.blobs.reopen(&self.engine, &*self.store, &name, &key, self.deadline);
            // Nobody may wait any more.
            let _ = self.ended.send((self.group, name, result));
        }
    }

    /// Whose turn it is; none when the time is over.
    fn next(&self) -> Option<(String, Key)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if Instant::now() < self.deadline { queue.pop() } else { None }
    }
}
