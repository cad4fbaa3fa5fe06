//! The brain of a shard, without system calls: requests and completions in, actions out.
//!
//! A *need* (a waiting reader) is linked to the fills that bring its bytes; several needs may wait for one
//! fill, and no byte is fetched by two fills at once. When the last fill of a need has ended the need is
//! looked at again: everything there, it is answered; something missing, the next fills are made. So a need
//! of any length has a bounded number of fills at a time, and "done" is said only when the bytes are there.
//!
//! [`Machine`] is generic over the ticket, so that the model kernel drives the very same code.
//!
//! | file | its subject |
//! |---|---|
//! | `needs` | how a waiting reader is linked to fills, and when it has its answer |
//! | `known` | what sinks hold, as far as it is known |
//! | `jobs` | fills with a place in a queue, a slot and an operation in flight |
//! | `groups` | whose turn it is: file systems of sources, and objects in them |
//! | `background` | what is brought although nobody asked |
//! | `deadlines` | what time brings |
//! | `idle`, `ids` | objects that nobody waits for; finding one |
//! | `action` | what comes out, and what is counted |

mod action;
mod background;
mod deadlines;
mod groups;
mod idle;
mod ids;
mod jobs;
mod known;
mod needs;

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;

use nix::errno::Errno;
use slab::Slab;

use self::background::{Background, Goal};
use self::groups::{Class, Group, Queues};
use self::ids::BuildIdHasher;
use super::fill::Fill;
use super::plan::adaptive::Planner;
use super::plan::{self, Complete, Completion, Window};
use super::presence::PageSet;
use crate::front::{ObjectId, Outcome};
use crate::range::{self, ByteRange, align_up};
use crate::store::Blob;

pub use self::action::{Action, Answered, Counters, Handle, OpKey};
pub use self::deadlines::Delay;

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
    /// What is brought when there is nothing better to do.
    pub completion: Completion,
    /// Buffer slots, and operations in flight.
    pub slots: u32,
    /// Fills that one need may wait for at a time.
    pub fills_per_need: u32,
    /// How long a need may wait for its answer, on the machine's clock.
    pub timeout_ns: u64,
    /// A hole in a sink means "not there": the driver must look for what is there before filling.
    pub probe: bool,
    /// Sinks know what they hold, so they are told ([`Action::Filled`]), and the driver tells of reads that found their bytes
    /// ([`Machine::has_read`]).
    pub sinks_know: bool,
}

#[derive(Debug)]
struct Object {
    blob: Arc<dyn Blob>,
    group: usize,
    queues: Queues,
    present: PageSet,
    /// What was ever asked for.
    asked: PageSet,
    /// What `present` is known to be right about.
    probed: PageSet,
    /// Start and key of every job, by start; they never overlap.
    jobs: Vec<(u64, usize)>,
    /// Jobs with an operation in flight.
    running: u32,
    closed: bool,
    /// It was picked by [`Machine::pick_idle`].
    leaving: bool,
    /// How many requests there had been when it was last asked for.
    last_need: u64,
    id: ObjectId,
    /// Says how much to bring, if the window adapts.
    planner: Option<Planner>,
    /// What is to be completed.
    goal: Goal,
    /// What was brought before it was asked for, and not used since.
    ahead_bytes: u64,
}

#[derive(Debug)]
struct Need<T> {
    object: Handle,
    asked: ByteRange,
    /// The same as whole pages inside the object.
    range: ByteRange,
    /// What is brought for it: at least the range.
    region: ByteRange,
    /// `None`: it has its answer, and is about to go.
    ticket: Option<T>,
    /// No other one has the same.
    serial: u64,
    since_ns: u64,
    /// When the first job that it waited for got its slot, once one has ended.
    begun_ns: Option<u64>,
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
    background: bool,
    /// When its last operation was given to the driver.
    begun_ns: u64,
    /// When it got its slot.
    started_ns: u64,
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
    handles: HashMap<ObjectId, Handle, BuildIdHasher>,
    needs: Slab<Need<T>>,
    jobs: Slab<Job>,
    links: Slab<Link>,
    free_slots: Vec<u32>,
    in_flight: u32,
    generation: u32,
    groups: Slab<Group>,
    /// The group that started something last.
    last_turn: usize,
    background: Background,
    waiting: Vec<(usize, u32)>,
    /// Needs whose last fill ended.
    revisit: VecDeque<usize>,
    /// Needs in the order in which they came, with their serial; the first one waits.
    arrivals: VecDeque<(usize, u64)>,
    /// What objects got since somebody asked, where their sinks are not told.
    grown: Vec<(Handle, u64)>,
    /// Room for those whose time is over.
    expired: Vec<usize>,
    stuck: usize,
    /// When operations that are stuck are counted next.
    look_ns: u64,
    actions: VecDeque<Action<T>>,
    counters: Counters,
    /// The time, as far as the driver has told.
    now_ns: u64,
    /// Whether fills that found no room wait for some.
    waits_for_room: bool,
}

impl<T> Machine<T> {
    /// A machine without objects.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            objects: Slab::new(),
            handles: HashMap::default(),
            needs: Slab::new(),
            jobs: Slab::new(),
            links: Slab::new(),
            free_slots: (0..limits.slots).rev().collect(),
            in_flight: 0,
            generation: 0,
            groups: Slab::new(),
            last_turn: 0,
            background: Background::default(),
            waiting: Vec::new(),
            revisit: VecDeque::new(),
            arrivals: VecDeque::new(),
            grown: Vec::new(),
            expired: Vec::new(),
            stuck: 0,
            look_ns: 0,
            actions: VecDeque::new(),
            counters: Counters::default(),
            now_ns: 0,
            waits_for_room: true,
        }
    }

    /// Whether a fill whose write finds no room is tried again some time later, or fails at once, until this is said
    /// anew.
    pub fn wait_for_room(&mut self, wanted: bool) {
        self.waits_for_room = wanted;
    }

    /// Goes on by other limits: on the time that a need may wait for its answer, also one that waits already, and on bytes a
    /// second that are brought in the background.
    pub const fn tune(&mut self, timeout_ns: u64, bytes_per_s: Option<NonZeroU64>) {
        self.limits.timeout_ns = timeout_ns;
        self.set_background_rate(bytes_per_s);
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
        let (present, asked, goal) = (PageSet::new(len, page), PageSet::new(len, page), Goal::new(len));
        let group = self.join_group(blob.device());
        let object = Object {
            blob,
            group,
            queues: Queues::default(),
            present,
            asked,
            probed,
            jobs: Vec::new(),
            running: 0,
            closed: false,
            leaving: false,
            last_need: self.counters.needs,
            id,
            planner,
            goal,
            ahead_bytes: 0,
        };
        let handle = Handle(self.objects.insert(object));
        self.handles.insert(id, handle);
        handle
    }

    /// A part of an open object that is to be brought whole at the first miss in it, if the window adapts.
    pub fn bring_whole(&mut self, object: Handle, part: &ByteRange) {
        let object = &mut self.objects[object.0];
        let part = plan::clamp(part, object.blob.len_bytes(), self.limits.page_bytes);
        if let (Some(planner), Some(part)) = (&mut object.planner, part) {
            planner.bring_whole(part);
        }
    }

    /// The kernel has been told that an object is open: before, nothing may be written to it.
    pub fn opened(&mut self, id: ObjectId) {
        if self.limits.completion.when == Complete::Always
            && let Some(handle) = self.handle(id)
        {
            let len = self.objects[handle.0].blob.len_bytes();
            self.complete(handle, &(0..len));
        }
    }

    /// Where an open object lives.
    #[must_use]
    pub fn handle(&self, id: ObjectId) -> Option<Handle> {
        self.handles.get(&id).copied()
    }

    /// A reader waits for `asked`.
    pub fn need(&mut self, id: ObjectId, asked: ByteRange, ticket: T, now_ns: u64) {
        self.counters.needs += 1;
        self.now_ns = self.now_ns.max(now_ns);
        let object = self.handle(id);
        let Some(handle) = object else {
            self.counters.unknown_object += 1;
            return self.answer(Answered::at_once(ticket, Outcome::Failed(Errno::ENOENT), object, asked, now_ns));
        };
        if asked.is_empty() {
            return self.answer(Answered::at_once(ticket, Outcome::Done, object, asked, now_ns));
        }
        self.objects[handle.0].last_need = self.counters.needs;
        let len = self.objects[handle.0].blob.len_bytes();
        let Some(range) = plan::clamp(&asked, len, self.limits.page_bytes) else {
            self.counters.beyond_end += 1;
            return self.answer(Answered::at_once(ticket, Outcome::Failed(Errno::ENXIO), object, asked, now_ns));
        };
        self.counters.bytes_asked += range::len(&range);
        let region = self.region(handle, &range);
        let object = &mut self.objects[handle.0];
        self.counters.bytes_ahead_used += object.use_ahead(&range);
        object.asked.insert(&range);
        let need = Need {
            object: handle,
            asked,
            range,
            region,
            ticket: Some(ticket),
            serial: self.counters.needs,
            since_ns: now_ns,
            begun_ns: None,
            outstanding: 0,
            failed: None,
            failures: 0,
            exact: false,
        };
        let key = self.needs.insert(need);
        self.watch(key);
        self.schedule(key);
        if self.needs[key].outstanding == 0 {
            self.counters.already_there += 1;
            self.conclude(key, Outcome::Done);
        }
    }

    /// The object is gone: its requests are answered with failure, its fills dropped. [`Action::Release`]
    /// follows when nothing of it is in flight. Nothing happens if it is not open.
    pub fn close(&mut self, id: ObjectId) {
        let Some(handle) = self.handles.remove(&id) else { return };
        let object = &mut self.objects[handle.0];
        object.closed = true;
        self.counters.bytes_ahead_wasted += std::mem::take(&mut object.ahead_bytes);
        let jobs = std::mem::take(&mut object.jobs);
        self.drop_background(handle);
        self.drop_turns(handle, Class::Demand);
        self.drop_turns(handle, Class::Ahead);
        for (_, key) in jobs {
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

    /// Instead of doing an [`Action::Read`]: its bytes are to be written from the file's mapped pages, because they are
    /// in memory. `false`: not possible, do the read.
    pub fn use_mapped(&mut self, op: OpKey) -> bool {
        let (key, generation) = op.parts();
        let job = self.jobs.get_mut(key).filter(|job| job.generation == generation && job.state == State::Running);
        let mapped = job.is_some_and(|job| job.fill.use_mapped());
        if mapped {
            self.step(key);
        }
        mapped
    }

    /// An operation ended with `result` bytes or a negative errno.
    pub fn io_done(&mut self, op: OpKey, result: i32, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        let (key, generation) = op.parts();
        let Some(job) = self.jobs.get_mut(key).filter(|job| job.generation == generation && job.state == State::Running) else {
            self.counters.stale += 1;
            return;
        };
        job.fill.done(result, now_ns);
        if !self.waits_for_room {
            job.fill.give_up_waiting();
        }
        let (begun_ns, object) = (job.begun_ns, job.object);
        self.unstick(begun_ns);
        if self.objects[object.0].closed {
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

    /// The next thing to do, if any.
    pub fn pop_action(&mut self) -> Option<Action<T>> {
        if self.actions.is_empty() {
            self.start_jobs();
        }
        let action = self.actions.pop_front();
        if let Some(Action::Release { object }) = action {
            // Only now may its handle name another object.
            let group = self.objects.remove(object.0).group;
            self.leave_group(group);
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

#[cfg(test)]
mod background_tests;
#[cfg(test)]
mod fair_tests;
#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests;
