//! Groups: objects whose sources lie on one file system, how they share the slots, and whose turn it is.
//!
//! A source that hangs keeps the slots of its operations, for nobody can take back what the kernel holds. So a group
//! gets another slot only while it has fewer than [`ALPHA`] times as many as are free: the dynamic threshold by which
//! network switches share their buffers (Choudhury and Hahne, 1998). One group alone gets three quarters of the slots, and what
//! hangs leaves the others some. A group that keeps its slots for much longer than another one that is at work gets fewer: it would gain
//! little by more, and the other one would lose what they could have done meanwhile. Inside a group objects take turns, fill by fill, so that no long queue starves a short one.

use std::collections::VecDeque;

use super::background::IN_FLIGHT_MAX;
use super::{Handle, Machine, Object, State};

/// How many times as many slots as are free a group may have, in halves: 3.
const ALPHA_HALVES: u32 = 6;
/// The same for a slow one: a half.
const ALPHA_HALVES_SLOW: u32 = 1;
/// A group is slow beside one that keeps its slots for this part of the time.
const SLOW_RATIO: u64 = 8;
/// A group is at work if it gave a slot back so recently.
const AT_WORK_NS: u64 = 1_000_000_000;
/// The newest value's part in an average, one in so many as a power of two.
const AVERAGE_SHIFT: u32 = 3;
/// Entries of a queue whose fills are gone, beyond as many as there are fills: then they are cleared away.
const STALE_MAX: usize = 64;

/// Why a fill is to be started; what comes first is started first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// Somebody waits for it.
    Demand,
    /// It belongs to the window of somebody who waits.
    Ahead,
    /// It completes an object. Such fills are made when their turn comes, and wait in no queue.
    Background,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Group {
    /// The file system's number.
    device: u64,
    /// Objects that are not released.
    objects: u32,
    /// Fills that have a slot.
    in_use: u32,
    /// Of them, in the background.
    background: u32,
    /// How long it keeps a slot on the average; 0: not known.
    held_ns: u64,
    /// When it last gave one back.
    freed_ns: u64,
    /// Objects with something to start, by class; they take turns.
    turns: [VecDeque<Handle>; 3],
}

/// Fills of an object to start, by class, with their generation.
pub(super) type Queues = [VecDeque<(usize, u32)>; 2];

impl Group {
    /// Whether it has something of a class to start and may take one of `free` slots, if any is limited for being slow, or not
    /// known not to be, when the quickest one that is at work keeps its slots for so long. The last one is for a group
    /// that has none.
    fn may_start(&self, class: Class, free: u32, quickest_ns: Option<u64>) -> bool {
        let is_slow = quickest_ns.is_some_and(|quickest_ns| self.held_ns == 0 || self.held_ns / SLOW_RATIO > quickest_ns);
        let alpha_halves = if is_slow { ALPHA_HALVES_SLOW } else { ALPHA_HALVES };
        let fair = free > 0 && (self.in_use == 0 || free > 1 && 2 * self.in_use < alpha_halves.saturating_mul(free));
        fair && self.wants(class)
    }

    pub(super) fn wants(&self, class: Class) -> bool {
        !self.turns[class as usize].is_empty() && (class != Class::Background || self.background < IN_FLIGHT_MAX)
    }

    pub(super) const fn took_slot(&mut self, background: bool) {
        self.in_use += 1;
        self.background += background as u32;
    }

    pub(super) const fn freed_slot(&mut self, background: bool, started_ns: u64, now_ns: u64) {
        self.in_use -= 1;
        self.background -= background as u32;
        let held_ns = now_ns.saturating_sub(started_ns);
        self.held_ns =
            if self.held_ns == 0 { held_ns } else { self.held_ns - (self.held_ns >> AVERAGE_SHIFT) + (held_ns >> AVERAGE_SHIFT) };
        self.freed_ns = now_ns;
    }
}

impl<T> Machine<T> {
    /// Makes an object whose source is on `device` a member of its group.
    pub(super) fn join_group(&mut self, device: u64) -> usize {
        let found = self.groups.iter().find(|(_, group)| group.device == device).map(|(key, _)| key);
        let new = || Group { device, objects: 0, in_use: 0, background: 0, held_ns: 0, freed_ns: 0, turns: Default::default() };
        let key = found.unwrap_or_else(|| self.groups.insert(new()));
        self.groups[key].objects += 1;
        key
    }

    /// An object was released.
    pub(super) fn leave_group(&mut self, key: usize) {
        let group = &mut self.groups[key];
        group.objects -= 1;
        if group.objects == 0 {
            self.groups.remove(key);
        }
    }

    /// Queues a job, or queues it in a better class.
    pub(super) fn enqueue(&mut self, job: usize, class: Class) {
        let (handle, generation) = (self.jobs[job].object, self.jobs[job].generation);
        let Object { group, queues, jobs: live, .. } = &mut self.objects[handle.0];
        let queue = &mut queues[class as usize];
        if queue.is_empty() {
            self.groups[*group].turns[class as usize].push_back(handle);
        }
        queue.push_back((job, generation));
        if queue.len() > 2 * live.len() + STALE_MAX {
            let jobs = &self.jobs;
            queue.retain(|&(key, generation)| jobs.get(key).is_some_and(|job| job.is_queued(generation)));
        }
    }

    /// Has an object take turns in the background.
    pub(super) fn enqueue_background(&mut self, handle: Handle) {
        self.groups[self.objects[handle.0].group].turns[Class::Background as usize].push_back(handle);
    }

    /// Ends the turns of an object in a class.
    pub(super) fn drop_turns(&mut self, handle: Handle, class: Class) {
        let object = &mut self.objects[handle.0];
        if let Some(queue) = object.queues.get_mut(class as usize) {
            if queue.is_empty() {
                return;
            }
            queue.clear();
        }
        self.groups[object.group].turns[class as usize].retain(|queued| *queued != handle);
    }

    /// The group whose turn it is to start something of a class, if one may.
    fn whose_turn(&mut self, class: Class) -> Option<usize> {
        let free = self.limits.slots - self.in_flight;
        let at_work = self.groups.iter().filter(|(_, group)| group.held_ns > 0 && group.freed_ns + AT_WORK_NS > self.now_ns);
        let quickest_ns = (self.groups.len() > 1).then(|| at_work.map(|(_, group)| group.held_ns).min().unwrap_or(u64::MAX));
        let mut ready = self.groups.iter().filter(|(_, group)| group.may_start(class, free, quickest_ns)).map(|(key, _)| key);
        let first = ready.next()?;
        let last = self.last_turn;
        self.last_turn = if first > last { first } else { ready.find(|&key| key > last).unwrap_or(first) };
        Some(self.last_turn)
    }

    /// The object whose turn it is to start something of a class, if one may. Its turn is over.
    pub(super) fn next_object(&mut self, class: Class) -> Option<Handle> {
        let group = self.whose_turn(class)?;
        self.groups[group].turns[class as usize].pop_front()
    }

    /// Takes the oldest entry of an object's queue, whose turn it is. `None`: its fill is gone, or begun.
    pub(super) fn dequeue(&mut self, handle: Handle, class: Class) -> Option<usize> {
        let object = &mut self.objects[handle.0];
        let queue = &mut object.queues[class as usize];
        let (key, generation) = queue.pop_front()?;
        if !queue.is_empty() {
            self.groups[object.group].turns[class as usize].push_back(handle);
        }
        self.jobs.get(key).is_some_and(|job| job.is_queued(generation)).then_some(key)
    }
}

impl super::Job {
    fn is_queued(&self, generation: u32) -> bool {
        self.generation == generation && self.state == State::Queued
    }
}
