//! Jobs: fills with a place in a queue, a slot and an operation in flight.

use nix::errno::Errno;

use super::groups::Class;
use super::{Action, Handle, Job, Machine, NONE, Object, OpKey, State};
use crate::engine::fill::{Fill, Next};
use crate::range::{self, ByteRange, align_up};
use crate::store::{Data, SourceMode};

impl<T> Machine<T> {
    /// Makes a queued job for a piece, cut at the end of the extent it starts in. Returns its key and end.
    pub(super) fn make_job(&mut self, handle: Handle, piece: ByteRange) -> (usize, u64) {
        let object = &mut self.objects[handle.0];
        let len = object.blob.len_bytes();
        let extent = object.blob.extent(piece.start);
        let extent_end = piece.start.saturating_add(extent.len_bytes);
        let border = align_up(extent_end, self.limits.page_bytes);
        debug_assert!(border == extent_end || extent_end >= len, "an extent of {:?} ends inside a page", object.blob);
        let range = piece.start..piece.end.min(border);
        let end = range.end;
        self.generation = self.generation.wrapping_add(1);
        let fill = Fill::new(range.clone(), len, extent.data, self.limits.page_bytes);
        let job = Job {
            object: handle,
            fill,
            generation: self.generation,
            slot: None,
            state: State::Queued,
            links: NONE,
            background: false,
            begun_ns: self.now_ns,
            started_ns: self.now_ns,
        };
        let key = self.jobs.insert(job);
        let at = object.jobs.partition_point(|&(start, _)| start < range.start);
        object.jobs.insert(at, (range.start, key));
        (key, end)
    }

    /// Starts queued jobs, those that somebody waits for first, as far as slots and fairness allow.
    pub(super) fn start_jobs(&mut self) {
        let classes = [Class::Demand, Class::Ahead];
        while let Some((handle, class)) = classes.into_iter().find_map(|class| Some((self.next_object(class)?, class))) {
            if let Some(key) = self.dequeue(handle, class) {
                self.begin(key);
            }
        }
        self.start_background();
    }

    /// Gives a queued job a slot and its first operation.
    pub(super) fn begin(&mut self, key: usize) {
        let job = &mut self.jobs[key];
        if job.fill.needs_slot() {
            job.slot = self.free_slots.pop();
        }
        job.started_ns = self.now_ns;
        self.in_flight += 1;
        self.groups[self.objects[job.object.0].group].took_slot(job.background);
        self.run(key);
    }

    /// Marks a job as running and gives its next operation to the driver.
    pub(super) fn run(&mut self, key: usize) {
        let job = &mut self.jobs[key];
        job.state = State::Running;
        self.objects[job.object.0].running += 1;
        self.step(key);
    }

    /// Turns what a running fill wants next into an action.
    pub(super) fn step(&mut self, key: usize) {
        let job = &mut self.jobs[key];
        let (op, object) = (OpKey::new(key, job.generation), job.object);
        match (job.fill.next(), job.slot) {
            (Next::Read { file, offset, slot_offset, len, then }, Some(slot)) => {
                self.operate(key, Action::Read { op, object, file, offset, slot, slot_offset, len, then });
            }
            (Next::Write { offset, len, from }, slot) => self.operate(key, Action::Write { op, object, offset, len, slot, from }),
            (Next::Wait { .. }, _) => {
                job.state = State::Waiting;
                self.waiting.push((key, job.generation));
                self.objects[object.0].running -= 1;
            }
            (Next::Finished(result), _) => self.retire(key, result),
            (Next::Read { .. }, None) => self.retire(key, Err(Errno::ENOBUFS)),
        }
    }

    /// A running job is over.
    pub(super) fn retire(&mut self, key: usize, result: Result<(), Errno>) {
        let job = &self.jobs[key];
        let (handle, range, background) = (job.object, job.fill.range().clone(), job.background);
        let object = &mut self.objects[handle.0];
        object.running -= 1;
        if result.is_ok() {
            object.present.insert(&range);
            if self.limits.sinks_know {
                let complete = object.present.is_full();
                self.actions.push_back(Action::Filled { object: handle, range: range.clone(), complete });
            } else {
                self.grown.push((handle, range::len(&range)));
            }
        }
        if let Ok(at) = object.jobs.binary_search_by_key(&range.start, |&(start, _)| start) {
            object.jobs.remove(at);
        }
        self.count(key, result.is_ok());
        if background && result.is_err() {
            self.give_up_background(handle);
        }
        self.unlink(key, result);
        self.remove_job(key);
        self.settle();
        self.release_if_idle(handle);
    }

    /// Counts a fill that ended: if well, by the way its bytes went.
    fn count(&mut self, key: usize, well: bool) {
        if !well {
            self.counters.fills_failed += 1;
            return;
        }
        let Job { object, fill, .. } = &self.jobs[key];
        let Object { blob, asked, ahead_bytes, .. } = &mut self.objects[object.0];
        let is_direct = |file: usize| blob.files().get(file).is_some_and(|file| file.mode == SourceMode::Direct);
        let counters = &mut self.counters;
        let (fills, bytes) = match fill.data() {
            Data::Zero => (&mut counters.fills_zero, &mut counters.bytes_zero),
            Data::Mapped { .. } => (&mut counters.fills_mapped, &mut counters.bytes_mapped),
            Data::Read { file, .. } if is_direct(file) => (&mut counters.fills_direct, &mut counters.bytes_direct),
            Data::Read { .. } => (&mut counters.fills_buffered, &mut counters.bytes_buffered),
        };
        let len = range::len(fill.range());
        *fills += 1;
        *bytes += len;
        counters.fills += 1;
        counters.bytes_filled += len;
        let unasked = len - asked.count_bytes(fill.range());
        counters.bytes_unasked += unasked;
        *ahead_bytes += unasked;
    }

    /// Forgets a job and frees its slot. Its operation, if it had one, has ended.
    pub(super) fn remove_job(&mut self, key: usize) {
        let job = self.jobs.remove(key);
        if job.state != State::Queued {
            self.in_flight -= 1;
            self.groups[self.objects[job.object.0].group].freed_slot(job.background, job.started_ns, self.now_ns);
        }
        self.free_slots.extend(job.slot);
    }

    pub(super) fn release_if_idle(&mut self, handle: Handle) {
        // It leaves its place when the driver takes the action: until then the driver's things are still there,
        // and must not be mistaken for those of an object that is opened meanwhile.
        if self.objects.get(handle.0).is_some_and(|object| object.closed && object.running == 0) {
            self.actions.push_back(Action::Release { object: handle });
        }
    }
}
