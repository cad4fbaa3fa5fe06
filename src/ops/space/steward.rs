//! The thread `infill-space`: looks how full the cache is, and has what was not used for the longest time removed when it is
//! too full.
//!
//! No kernel says that space is short (in cachefiles' on-demand mode its read(2) gives requests, not the state that
//! cachefilesd reads), so the thread looks itself, every [`POLL`] and whenever a fill found no room.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;

use super::cache::{Cache, Counted};
use super::count::{Count, Need};
use super::policy::{Excess, Level, Limits, Room};
use super::round::{Removed, Round};
use super::{limits, room};
use crate::engine::room::NoRoom;
use crate::front::cachefiles::CullLimits;
use crate::front::cachefiles::cache_dir::CacheDirError;
use crate::ops::confine::take_cache_powers;

/// How often the cache's room is looked at when nobody complains.
pub const POLL: Duration = Duration::from_secs(5);
/// Shortest time from one look to the next, however many fills find no room: the file system may free the blocks of
/// what was removed some time later (XFS does so in the background), and they must not be missed twice.
const SETTLE: Duration = Duration::from_millis(200);
/// How long the thread may take to end; longer, and it hangs in the kernel.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Pause between two looks at whether it has ended.
const STOP_POLL: Duration = Duration::from_millis(5);
/// So many looks in a row, each after a fill found no room, must have seen plenty of it before the kernel is taken to keep
/// to other marks, or the file system to a quota; and so much time at most may lie between two of them. A fill is tried
/// again for more than a second.
const REFUSED_MIN: u32 = 3;
const REFUSED_GAP_MAX: Duration = Duration::from_secs(1);
/// Share of the file system, in percent, that is made free then at a time.
const REFUSED_SHARE_PERCENT: u64 = 1;
/// Share of the byte budget, in percent, that is made free when the budget is exceeded.
const BUDGET_SLACK_PERCENT: u64 = 5;

/// What to keep to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cache, for messages.
    pub cache_dir: PathBuf,
    /// Marks on free space and inodes, as the kernel was told if it wants to know.
    pub limits: CullLimits,
    /// How much the objects may take together; `None`: as much as the marks allow.
    pub budget_bytes: Option<u64>,
}

/// What the steward knows and has done.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize)]
pub struct Statistics {
    /// Space that the objects in the cache take. Those that cachefiles makes for images which are mounted for the first time have
    /// no name yet and are missing; blocks that are shared with a store do not count.
    pub cache_bytes: u64,
    /// Objects that were counted.
    pub cache_objects: u64,
    /// Free space on the cache's file system.
    pub cache_free_bytes: u64,
    /// Objects removed for want of room.
    pub culled_objects: u64,
    /// Space that they took.
    pub culled_bytes: u64,
    /// Volumes removed because no object was left in them.
    pub culled_volumes: u64,
    /// Objects that were chosen but stayed, because they had just come into use.
    pub cull_refused: u64,
    /// When something was last removed, in seconds of the epoch; 0: never.
    pub last_cull_unix_s: u64,
}

impl Statistics {
    fn count(&mut self, bytes: u64, objects: usize) {
        (self.cache_bytes, self.cache_objects) = (bytes, objects as u64);
    }

    fn add(&mut self, removed: Removed) {
        self.culled_objects += removed.objects;
        self.culled_bytes += removed.bytes;
        self.culled_volumes += removed.volumes;
        self.cull_refused += removed.refused;
        self.cache_bytes = self.cache_bytes.saturating_sub(removed.bytes);
        self.cache_objects = self.cache_objects.saturating_sub(removed.objects);
        if removed.anything() {
            self.last_cull_unix_s = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        }
    }
}

/// The running thread.
#[derive(Debug)]
pub struct Steward {
    thread: JoinHandle<()>,
    stop: Arc<EventFd>,
    statistics: Arc<Mutex<Statistics>>,
    budget_bytes: Arc<Mutex<Option<u64>>>,
}

impl Steward {
    /// Starts the thread, which looks after what `open` gives it.
    ///
    /// # Errors
    /// No thread or descriptor is free.
    pub fn start<C: Cache>(
        settings: Settings,
        open: impl FnOnce() -> Result<C, CacheDirError> + Send + 'static,
        no_room: NoRoom,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let statistics = Arc::<Mutex<Statistics>>::default();
        let budget_bytes = Arc::new(Mutex::new(settings.budget_bytes));
        let (asked, shared, wanted) = (Arc::clone(&stop), Arc::clone(&statistics), Arc::clone(&budget_bytes));
        let thread = Builder::new().name("infill-space".to_owned()).spawn(move || {
            let path = settings.cache_dir.display().to_string();
            if let Err(why) = take_cache_powers() {
                tracing::warn!("{path}: cannot use the capabilities that looking after the cache takes: {why}");
            }
            match open().and_then(|cache| Worker::new(cache, &settings, no_room, shared, wanted)) {
                Ok(mut worker) => worker.work(&asked),
                Err(error) => tracing::error!("{path}: no space will be made in the cache: {error}"),
            }
        })?;
        Ok(Self { thread, stop, statistics, budget_bytes })
    }

    /// For those who want to know what it knows, also when it has ended.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.statistics))
    }

    /// Has it keep to another budget, from its next look on ([`POLL`]).
    pub fn set_budget(&self, budget_bytes: Option<u64>) {
        *lock(&self.budget_bytes) = budget_bytes;
    }

    /// Ends the thread, which lets go of the device.
    pub fn stop(self) {
        // It is read once, so this cannot overflow.
        let _ = self.stop.write(1);
        let began = Instant::now();
        while !self.thread.is_finished() {
            if began.elapsed() > STOP_MAX {
                tracing::error!("left the thread infill-space behind, which hangs in the kernel; see `dmesg` and the cache's disk");
                break;
            }
            std::thread::sleep(STOP_POLL);
        }
    }
}

/// What a steward knows, for others.
#[derive(Clone, Debug)]
pub struct Watch(Arc<Mutex<Statistics>>);

impl Watch {
    /// What it knows and has done.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        *lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the thread works with.
struct Worker<C> {
    cache: C,
    limits: Limits,
    budget_bytes: Option<u64>,
    /// What the budget is to be from the next look on.
    wanted: Arc<Mutex<Option<u64>>>,
    no_room: NoRoom,
    statistics: Arc<Mutex<Statistics>>,
    /// The cull mark was passed, and the run mark is not reached yet.
    culling: bool,
    /// Looks in a row that saw plenty of room where fills found none.
    refused: u32,
    /// The last count, and when it had ended.
    counted: Option<(Count, Instant)>,
    /// When it last looked.
    looked: Instant,
    /// Troubles that were told and are not over yet.
    told: HashSet<Trouble>,
}

/// What can go wrong; each is told once until it is over.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Trouble {
    /// The cache, or its file system, cannot be looked at.
    Look,
    /// It is not known what is in use.
    Uses,
    /// What was removed stays all the same.
    Graves,
    /// Parts of the cache could not be counted.
    Count,
    /// There is room, and the kernel does not use it.
    Refused,
    /// There is no room, and none can be made.
    TooFull,
}

impl<C: Cache> Worker<C> {
    fn new(
        cache: C,
        settings: &Settings,
        no_room: NoRoom,
        statistics: Arc<Mutex<Statistics>>,
        wanted: Arc<Mutex<Option<u64>>>,
    ) -> Result<Self, CacheDirError> {
        let size = room(cache.dir()).map_err(CacheDirError::io(cache.dir().path(), "query its file system"))?;
        Ok(Self {
            cache,
            limits: limits(&settings.limits, &size),
            budget_bytes: settings.budget_bytes,
            wanted,
            no_room,
            statistics,
            culling: false,
            refused: 0,
            counted: None,
            looked: Instant::now(),
            told: HashSet::new(),
        })
    }

    /// Works until it is told to stop.
    fn work(&mut self, stop: &EventFd) {
        loop {
            let starved = self.no_room.was_rung();
            let turn = self.turn(starved);
            self.looked = Instant::now();
            self.tell(Trouble::Look, turn.err().map(|error| format!("cannot look after the cache's space: {error}")));
            if self.wait(stop) {
                self.cache.finish();
                return;
            }
        }
    }

    /// Waits until there is something to do; says whether that is to stop.
    fn wait(&self, stop: &EventFd) -> bool {
        std::thread::sleep(SETTLE.saturating_sub(self.looked.elapsed()));
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(self.no_room.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is a look that comes early.
        let _ = poll(&mut fds, PollTimeout::try_from(POLL).unwrap_or(PollTimeout::NONE));
        fds[0].any().unwrap_or(false)
    }

    /// One look at the cache, after a fill found no room if it is `starved`.
    fn turn(&mut self, starved: bool) -> Result<(), CacheDirError> {
        let closed = self.note_uses();
        let now = room(self.cache.dir()).map_err(CacheDirError::io(self.cache.dir().path(), "query its file system"))?;
        lock(&self.statistics).cache_free_bytes = now.bytes.free;
        let level = self.limits.level(&now);
        let is_refused = self.is_refused(starved && level == Level::Plenty, &now);
        self.culling = match level {
            Level::Stop | Level::Cull => true,
            Level::Low => self.culling || starved,
            Level::Plenty => is_refused,
        };
        self.tidy();
        self.counted.iter_mut().for_each(|(count, _)| count.closed_since |= closed);
        self.take_budget();
        let need = match self.budget_bytes {
            _ if self.culling => Need::Room,
            Some(_) => Need::Budget,
            None => Need::Statistics,
        };
        if self.counted.is_none_or(|(count, at)| count.is_outdated(need, at.elapsed(), now.bytes.free)) {
            self.count_and_keep(&now, starved)?;
        } else if need == Need::Statistics {
            self.tell(Trouble::TooFull, None);
        }
        Ok(())
    }

    /// Takes over the budget that is wanted now; what was counted says nothing about another one.
    fn take_budget(&mut self) {
        let wanted = *lock(&self.wanted);
        if wanted != self.budget_bytes {
            (self.budget_bytes, self.counted) = (wanted, None);
        }
    }

    /// Whether the kernel goes on to find no room where there is plenty by all that is known here.
    fn is_refused(&mut self, now_too: bool, room: &Room) -> bool {
        let in_a_row = if self.looked.elapsed() <= REFUSED_GAP_MAX { self.refused } else { 0 };
        self.refused = if now_too { in_a_row.saturating_add(1) } else { 0 };
        let is_refused = self.refused >= REFUSED_MIN;
        if is_refused || !now_too {
            let why = || {
                format!(
                    "the cache takes no data although {} % of its space and {} % of its inodes are free, so what is unused goes: a quota, or the kernel keeps to other marks (`bstop`, `fstop`) than these settings say; raise the quota, or unmount the images, stop infill and give the device up with `infill release`",
                    room.bytes.percent(),
                    room.files.percent()
                )
            };
            self.tell(Trouble::Refused, is_refused.then(why));
        }
        is_refused
    }

    fn count_and_keep(&mut self, now: &Room, starved: bool) -> Result<(), CacheDirError> {
        let began = Instant::now();
        let found = self.cache.count()?;
        // Until it is known better: a round that fails is in vain.
        let mut count = Count { took: began.elapsed(), free_bytes: now.bytes.free, in_vain: true, closed_since: false };
        let at = Instant::now();
        self.counted = Some((count, at));
        let unread = |path| format!("cannot count all of the cache, so not all of it can go: {path}");
        self.tell(Trouble::Count, found.unread.as_ref().map(unread));
        count.in_vain = self.keep(&found, now)?;
        self.counted = Some((count, at));
        if !count.in_vain {
            self.no_room.in_vain_for(Duration::ZERO);
        } else if starved {
            self.no_room.in_vain_for(count.rest());
        }
        Ok(())
    }

    /// Notes what is in use, and says whether something was closed. Without it culling goes on, in a worse order: nothing can go
    /// that is in use.
    fn note_uses(&mut self) -> bool {
        let closed = self.cache.note_uses();
        let why = |error| format!("cannot see which blobs are in use, so some may go that were used not long ago: {error}");
        self.tell(Trouble::Uses, closed.as_ref().err().map(why));
        closed.unwrap_or(false)
    }

    /// What cannot be deleted takes room, and that is all.
    fn tidy(&mut self) {
        let tidied = self.cache.tidy();
        self.tell(Trouble::Graves, tidied.err().map(|error| format!("cannot delete what was removed from the cache: {error}")));
    }

    /// Removes what is too much of what was found; `true`: something is too much, and nothing of it could go.
    fn keep(&mut self, found: &Counted, now: &Room) -> Result<bool, CacheDirError> {
        let used_bytes = found.objects.iter().map(|object| object.bytes).sum();
        lock(&self.statistics).count(used_bytes, found.objects.len());
        let excess = self.excess(used_bytes, now);
        if excess.is_none() {
            self.tell(Trouble::TooFull, None);
            return Ok(false);
        }
        let mut left = excess;
        let mut removed = Removed::default();
        if self.cache.may_cull() {
            let mut round = Round::new(excess);
            let ended = round.run(&mut self.cache, found);
            (left, removed) = (round.left, round.removed);
            lock(&self.statistics).add(removed);
            self.tidy();
            ended?;
        }
        if removed.anything() {
            let Removed { objects, bytes, volumes, .. } = removed;
            tracing::info!(objects, bytes, volumes, free_bytes = now.bytes.free, cache_bytes = used_bytes, "made room in the cache");
        }
        let too_full = || format!("the cache is too full, and nothing in it is unused: {}", advice(left, now));
        self.tell(Trouble::TooFull, (!left.is_none()).then(too_full));
        Ok(!removed.anything())
    }

    /// What must go, by the marks or the budget.
    fn excess(&self, used_bytes: u64, now: &Room) -> Excess {
        let refused_bytes = if self.refused >= REFUSED_MIN { now.bytes.total / 100 * REFUSED_SHARE_PERCENT } else { 0 };
        let of_marks = if self.culling { self.limits.excess(now) } else { Excess::default() };
        let of_marks = of_marks.or(Excess { bytes: refused_bytes, files: 0 });
        let over = |budget: u64| used_bytes - (budget - budget / 100 * BUDGET_SLACK_PERCENT);
        let bytes = self.budget_bytes.filter(|budget| used_bytes > *budget).map_or(0, over);
        of_marks.or(Excess { bytes, files: 0 })
    }

    /// Warns of a trouble once, until it is over: `None`.
    fn tell(&mut self, trouble: Trouble, what: Option<String>) {
        match what {
            None => drop(self.told.remove(&trouble)),
            Some(what) if self.told.insert(trouble) => tracing::warn!("{what}"),
            Some(_) => {}
        }
    }
}

/// What an operator can do when nothing more can be removed.
fn advice(left: Excess, now: &Room) -> String {
    format!(
        "{} bytes and {} inodes too few ({} and {} are free); unmount images, enlarge the cache's file system, or change brun and frun or --cache-bytes",
        left.bytes, left.files, now.bytes.free, now.files.free
    )
}
