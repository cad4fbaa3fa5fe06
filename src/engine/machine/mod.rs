//! The brain of a shard, without system calls: requests and completions in, actions out.
//!
//! A *need* (a waiting reader) is linked to the fills that bring its bytes; several needs may wait for one
//! fill, and no byte is fetched by two fills at once. When the last fill of a need has ended the need is
//! looked at again: everything there, it is answered; something missing, the next fills are made. So a need
//! of any length has a bounded number of fills at a time, and "done" is said only when the bytes are there.
//!
//! [`Machine`] is generic over the ticket, so that the model kernel drives the very same code.

mod jobs;
mod needs;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use nix::errno::Errno;
use slab::Slab;

use super::fill::{self, Fill, Next};
use super::plan::adaptive::Planner;
use super::plan::{self, Window};
use super::presence::PageSet;
use crate::front::{ObjectId, Outcome};
use crate::range::{self, ByteRange, align_up, intersect};
use crate::store::Blob;

/// How many fills of its own a need may see fail before it is answered with failure. The first may have
/// brought more than the reader asked for; the second asks for exactly that.
const FAILURES_MAX: u8 = 2;
/// End of a chain of links.
const NONE: usize = usize::MAX;

/// The machine's limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Alignment of everything written to a sink; a power of two.
    pub page_bytes: u64,
    /// Size of a slot and longest fill; a power of two, at least a page.
    pub fill_max_bytes: u64,
    /// How much is brought for a demand.
    pub window: Window,
    /// Buffer slots, and operations in flight.
    pub slots: u32,
    /// Fills that one need may wait for at a time.
    pub fills_per_need: u32,
    /// A hole in a sink means "not there": the driver must look for what is there before filling.
    pub probe: bool,
}

/// Where an object lives in the machine; valid from [`Machine::open`] to [`Action::Release`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Handle(pub usize);

/// Names an operation in flight, with a generation, so that a late completion cannot hit another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct OpKey(pub u64);

/// What the driver has to do.
#[derive(Debug)]
pub enum Action<T> {
    /// Read from a file of the object's blob into a slot, then report [`Machine::io_done`].
    Read {
        /// Names the operation.
        op: OpKey,
        /// Whose blob.
        object: Handle,
        /// Index into the blob's files.
        file: usize,
        /// Where in the file.
        offset: u64,
        /// The slot, owned by this operation until it is reported done.
        slot: u32,
        /// Where in the slot.
        slot_offset: u64,
        /// How much.
        len: u64,
        /// Where in the object's sink all of it goes next, if the read gives all of it. The driver may have that
        /// done at once, and then reports [`Machine::io_copied`].
        then: Option<u64>,
    },
    /// Write to the object's sink, then report [`Machine::io_done`].
    Write {
        /// Names the operation.
        op: OpKey,
        /// Whose sink.
        object: Handle,
        /// Where in the sink.
        offset: u64,
        /// How much.
        len: u64,
        /// The slot, if `from` is [`fill::From::Slot`].
        slot: Option<u32>,
        /// What.
        from: fill::From,
    },
    /// Answer a request.
    Answer(Answered<T>),
    /// The object was closed and nothing of it is in flight any more: drop its sink and its blob.
    Release {
        /// Which.
        object: Handle,
    },
}

/// A request that has its answer.
#[derive(Debug)]
pub struct Answered<T> {
    /// To be answered.
    pub ticket: T,
    /// With this.
    pub outcome: Outcome,
    /// Whose it was; `None` if no such object was open.
    pub object: Option<Handle>,
    /// What was asked, as the kernel said it.
    pub range: ByteRange,
    /// When the request came, on the machine's clock.
    pub since_ns: u64,
}

/// What a machine has done; each only grows.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counters {
    /// Requests for data.
    pub needs: u64,
    /// Of them, answered with failure.
    pub needs_failed: u64,
    /// Of them, for an object that was not open.
    pub unknown_object: u64,
    /// Of them, wholly beyond the end of the blob.
    pub beyond_end: u64,
    /// Of them, answered at once because the bytes were already there.
    pub already_there: u64,
    /// Times a need waited for a fill that another had started.
    pub joined: u64,
    /// Fills finished well.
    pub fills: u64,
    /// Fills that failed.
    pub fills_failed: u64,
    /// Bytes that were asked for, as whole pages; what several readers asked for counts for each.
    pub bytes_asked: u64,
    /// Bytes put into sinks.
    pub bytes_filled: u64,
    /// Operations given to the driver.
    pub operations: u64,
    /// Completions of operations that were not in flight.
    pub stale: u64,
}

#[derive(Debug)]
struct Object {
    blob: Arc<dyn Blob>,
    present: PageSet,
    /// What `present` is known to be right about.
    probed: PageSet,
    /// Start and key of every job, by start; they never overlap.
    jobs: Vec<(u64, usize)>,
    /// Jobs with an operation in flight.
    running: u32,
    closed: bool,
    id: ObjectId,
    /// Says how much to bring, if the window adapts.
    planner: Option<Planner>,
}

#[derive(Debug)]
struct Need<T> {
    object: Handle,
    asked: ByteRange,
    /// The same as whole pages inside the object.
    range: ByteRange,
    /// What is brought for it: at least the range.
    region: ByteRange,
    ticket: T,
    since_ns: u64,
    /// Links to jobs.
    outstanding: u32,
    failed: Option<Errno>,
    failures: u8,
    /// A wider fill failed: from now on only what was asked.
    exact: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Queued,
    Running,
    Waiting,
}

#[derive(Debug)]
struct Job {
    object: Handle,
    fill: Fill,
    generation: u32,
    slot: Option<u32>,
    state: State,
    links: usize,
}

#[derive(Debug)]
struct Link {
    need: usize,
    next: usize,
}

/// See the module's description.
#[derive(Debug)]
pub struct Machine<T> {
    limits: Limits,
    objects: Slab<Object>,
    handles: HashMap<ObjectId, Handle>,
    needs: Slab<Need<T>>,
    jobs: Slab<Job>,
    links: Slab<Link>,
    free_slots: Vec<u32>,
    in_flight: u32,
    generation: u32,
    /// Jobs to start, with their generation: what somebody waits for, and what nobody waits for yet.
    demand: VecDeque<(usize, u32)>,
    ahead: VecDeque<(usize, u32)>,
    waiting: Vec<(usize, u32)>,
    /// Needs whose last fill ended.
    revisit: VecDeque<usize>,
    actions: VecDeque<Action<T>>,
    counters: Counters,
}

impl<T> Machine<T> {
    /// A machine without objects.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            objects: Slab::new(),
            handles: HashMap::new(),
            needs: Slab::new(),
            jobs: Slab::new(),
            links: Slab::new(),
            free_slots: (0..limits.slots).rev().collect(),
            in_flight: 0,
            generation: 0,
            demand: VecDeque::new(),
            ahead: VecDeque::new(),
            waiting: Vec::new(),
            revisit: VecDeque::new(),
            actions: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// An object comes to life. An object of the same id that is still open is closed first.
    pub fn open(&mut self, id: ObjectId, blob: Arc<dyn Blob>) -> Handle {
        self.close(id);
        let len = blob.len_bytes();
        let page = self.limits.page_bytes;
        let mut probed = PageSet::new(len, page);
        if !self.limits.probe {
            probed.insert(&(0..align_up(len, page)));
        }
        let planner = match self.limits.window {
            Window::Fixed(_) => None,
            Window::Adaptive { budget_percent } => Some(Planner::new(len, budget_percent)),
        };
        let present = PageSet::new(len, page);
        let object = Object { blob, present, probed, jobs: Vec::new(), running: 0, closed: false, id, planner };
        let handle = Handle(self.objects.insert(object));
        self.handles.insert(id, handle);
        handle
    }

    /// Where an open object lives.
    #[must_use]
    pub fn handle(&self, id: ObjectId) -> Option<Handle> {
        self.handles.get(&id).copied()
    }

    /// The first part around a demand of which it is not known what the sink already holds. The driver
    /// finds out and calls [`Machine::learn`], until this gives `None`; then it calls [`Machine::need`].
    #[must_use]
    pub fn unprobed(&self, id: ObjectId, demand: &ByteRange) -> Option<ByteRange> {
        let object = &self.objects[self.handle(id)?.0];
        let len = object.blob.len_bytes();
        let range = plan::clamp(demand, len, self.limits.page_bytes)?;
        let region = match self.limits.window {
            Window::Fixed(bytes) => plan::window(&range, bytes, len, self.limits.page_bytes),
            Window::Adaptive { .. } => intersect(&Planner::reach(&range), &(0..align_up(len, self.limits.page_bytes)))?,
        };
        intersect(&object.probed.first_absent(&region)?, &region)
    }

    /// The sink was asked about `probed` and holds `present` of it. Nothing is said of an unknown object.
    pub fn learn(&mut self, id: ObjectId, probed: &ByteRange, present: impl IntoIterator<Item = ByteRange>) {
        let Some(handle) = self.handle(id) else { return };
        let object = &mut self.objects[handle.0];
        object.probed.insert(probed);
        for range in present {
            object.present.insert(&range);
        }
    }

    /// Whether every byte of a demand is believed to be there. The kernel asks only for what is missing, so
    /// either the bytes came while the request was on its way, or the belief is wrong: the driver looks at
    /// the sink and calls [`Machine::forget`] for what is not there after all.
    #[must_use]
    pub fn believes(&self, id: ObjectId, demand: &ByteRange) -> bool {
        let Some(object) = self.handle(id).map(|handle| &self.objects[handle.0]) else { return false };
        plan::clamp(demand, object.blob.len_bytes(), self.limits.page_bytes).is_some_and(|range| object.present.contains(&range))
    }

    /// Bytes that were believed to be there are not.
    pub fn forget(&mut self, id: ObjectId, missing: &ByteRange) {
        if let Some(handle) = self.handle(id) {
            self.objects[handle.0].present.remove(missing);
        }
    }

    /// A reader waits for `asked`.
    pub fn need(&mut self, id: ObjectId, asked: ByteRange, ticket: T, now_ns: u64) {
        self.counters.needs += 1;
        let object = self.handle(id);
        let Some(handle) = object else {
            self.counters.unknown_object += 1;
            return self.answer(Answered { ticket, outcome: Outcome::Failed(Errno::ENOENT), object, range: asked, since_ns: now_ns });
        };
        if asked.is_empty() {
            return self.answer(Answered { ticket, outcome: Outcome::Done, object, range: asked, since_ns: now_ns });
        }
        let len = self.objects[handle.0].blob.len_bytes();
        let Some(range) = plan::clamp(&asked, len, self.limits.page_bytes) else {
            self.counters.beyond_end += 1;
            return self.answer(Answered { ticket, outcome: Outcome::Failed(Errno::ENXIO), object, range: asked, since_ns: now_ns });
        };
        self.counters.bytes_asked += range::len(&range);
        let region = self.region(handle, &range);
        let need = Need {
            object: handle,
            asked,
            range,
            region,
            ticket,
            since_ns: now_ns,
            outstanding: 0,
            failed: None,
            failures: 0,
            exact: false,
        };
        if self.objects[handle.0].present.contains(&need.range) {
            self.counters.already_there += 1;
        }
        let key = self.needs.insert(need);
        self.revisit.push_back(key);
        self.settle();
    }

    /// The object is gone: its requests are answered with failure, its fills dropped. [`Action::Release`]
    /// follows when nothing of it is in flight. Nothing happens if it is not open.
    pub fn close(&mut self, id: ObjectId) {
        let Some(handle) = self.handles.remove(&id) else { return };
        let object = &mut self.objects[handle.0];
        object.closed = true;
        for (_, key) in std::mem::take(&mut object.jobs) {
            self.unlink(key, Err(Errno::ECANCELED));
            if self.jobs[key].state != State::Running {
                self.remove_job(key);
            }
        }
        self.settle();
        self.release_if_idle(handle);
    }

    /// Closes every object.
    pub fn close_all(&mut self) {
        let mut ids: Vec<_> = self.handles.keys().copied().collect();
        // In an order that is the same in every run.
        ids.sort_unstable();
        for id in ids {
            self.close(id);
        }
    }

    /// An operation ended with `result` bytes or a negative errno.
    pub fn io_done(&mut self, op: OpKey, result: i32, now_ns: u64) {
        let (key, generation) = op.parts();
        let Some(job) = self.jobs.get_mut(key).filter(|job| job.generation == generation && job.state == State::Running) else {
            self.counters.stale += 1;
            return;
        };
        job.fill.done(result, now_ns);
        if self.objects[job.object.0].closed {
            return self.retire(key, Err(Errno::ECANCELED));
        }
        self.step(key);
    }

    /// An [`Action::Read`] with `then` gave all its bytes, and their write has ended with `result`.
    pub fn io_copied(&mut self, op: OpKey, result: i32, now_ns: u64) {
        let (key, generation) = op.parts();
        if let Some(job) = self.jobs.get_mut(key).filter(|job| job.generation == generation && job.state == State::Running) {
            job.fill.read_whole();
        }
        self.io_done(op, result, now_ns);
    }

    /// Time has passed: fills that waited may go on.
    pub fn tick(&mut self, now_ns: u64) {
        let mut i = 0;
        while i < self.waiting.len() {
            let (key, generation) = self.waiting[i];
            match self.jobs.get_mut(key).filter(|job| job.generation == generation) {
                None => drop(self.waiting.swap_remove(i)),
                Some(job) => {
                    job.fill.wake(now_ns);
                    if matches!(job.fill.next(), Next::Wait { .. }) {
                        i += 1;
                    } else {
                        self.waiting.swap_remove(i);
                        self.run(key);
                    }
                }
            }
        }
    }

    /// When [`Machine::tick`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        let due = |&(key, generation): &(usize, u32)| match self.jobs.get(key) {
            Some(job) if job.generation == generation => match job.fill.next() {
                Next::Wait { until_ns } => Some(until_ns),
                _ => None,
            },
            _ => None,
        };
        self.waiting.iter().filter_map(due).min()
    }

    /// The next thing to do, if any.
    pub fn pop_action(&mut self) -> Option<Action<T>> {
        if self.actions.is_empty() {
            self.start_jobs();
        }
        let action = self.actions.pop_front();
        if let Some(Action::Release { object }) = action {
            // Only now may its handle name another object.
            self.objects.remove(object.0);
        }
        action
    }

    /// Requests that wait for their answer.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.needs.len()
    }

    /// Objects that are open or not yet released.
    #[must_use]
    pub fn object_count(&self) -> usize {
        self.objects.len()
    }

    /// Fills that exist, started or not.
    #[must_use]
    pub fn fill_count(&self) -> usize {
        self.jobs.len()
    }

    /// Operations in flight.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// What it has done so far.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The id under which the kernel knows an object.
    #[must_use]
    pub fn id(&self, object: Handle) -> Option<ObjectId> {
        self.objects.get(object.0).map(|object| object.id)
    }
}

impl OpKey {
    #[allow(clippy::cast_possible_truncation, reason = "a slab of jobs is bounded far below 2^32 entries")]
    fn new(key: usize, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(key as u32))
    }

    #[allow(clippy::cast_possible_truncation, reason = "takes the two halves apart again")]
    const fn parts(self) -> (usize, u32) {
        (self.0 as u32 as usize, (self.0 >> 32) as u32)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests;
