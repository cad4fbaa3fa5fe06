//! One shard: the event loop that ties the machine to I/O, memory and answers.
//!
//! A turn: take messages, let the machine decide, start what it wants, give the answers of this turn back to back,
//! wait. On the receiving shard the wait also reads the kernel's requests.

mod answers;
mod intake;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SendError, Sender};
use std::time::Duration;

use nix::errno::Errno;

use super::attached::{Attached, Target, is_whole};
use super::buffers::{Buffers, Memory};
use super::clock::Clock;
use super::fds::Offer;
use super::fill::From;
use super::io::{Done, Io, Kind, Op, Ready};
use super::machine::{Action, Handle, Machine, OpKey};
use super::mailbox::{Adopted, Inbox, Message};
use super::room::NoRoom;
use super::router::BATCH_MAX;
use super::spin::Spin;
use super::stats::{Gauges, ShardStats};
use super::trace::Tracer;
use super::{EngineError, Shared, Tuning, as_ns, probe};
use crate::front::{Caps, NeedRequest, ObjectId, Sink, Ticket};
use crate::range::ByteRange;

#[cfg(test)]
pub(super) use self::answers::ANSWER_WAIT_MAX_US;
use self::answers::Batch;
pub(super) use self::intake::Intake;

/// Longest sleep: a wake-up that the kernel lost costs no more than this.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// See the module's description.
pub(super) struct Shard<I> {
    index: usize,
    caps: Caps,
    shared: Arc<Shared>,
    clock: Clock,
    inbox: Inbox,
    /// On a shard that receives: its sources.
    intakes: Vec<Intake>,
    machine: Machine<Ticket>,
    tracer: Option<Tracer>,
    no_room: Option<NoRoom>,
    answers: Batch,
    spin: Spin,
    /// What is unfinished now stays so.
    is_ending: bool,
    done: Vec<Done>,
    /// Where sinks are offered when descriptors are scarce.
    offers: Sender<Offer>,
    /// Room for the objects that are picked for that.
    picked: Vec<Handle>,
    /// Room for requests that ask for nothing but their answer.
    present: Vec<NeedRequest>,
    // Dropped in this order: the operations' owner before the files and the memory that they use.
    io: I,
    /// Objects by the machine's handle.
    attached: Vec<Option<Attached>>,
    buffers: Buffers,
}

/// What a shard is made of.
pub(super) struct Parts<I> {
    pub(super) index: usize,
    pub(super) caps: Caps,
    pub(super) shared: Arc<Shared>,
    pub(super) clock: Clock,
    pub(super) inbox: Inbox,
    pub(super) offers: Sender<Offer>,
    pub(super) intakes: Vec<Intake>,
    pub(super) machine: Machine<Ticket>,
    pub(super) tracer: Option<Tracer>,
    pub(super) no_room: Option<NoRoom>,
    pub(super) io: I,
    pub(super) buffers: Buffers,
}

impl<I: Io> Shard<I> {
    pub(super) fn new(parts: Parts<I>) -> Self {
        let Parts { index, caps, shared, clock, inbox, offers, intakes, machine, tracer, no_room, io, buffers } = parts;
        let (attached, answers, done, picked) = (Vec::new(), Batch::default(), Vec::with_capacity(2 * BATCH_MAX as usize), Vec::new());
        let is_ending = false;
        Self {
            index,
            caps,
            shared,
            clock,
            inbox,
            intakes,
            machine,
            tracer,
            no_room,
            answers,
            spin: Spin::default(),
            is_ending,
            done,
            offers,
            picked,
            present: Vec::new(),
            io,
            attached,
            buffers,
        }
    }

    /// Serves until the engine stops, or until it cannot go on. Either way no request is left without its answer.
    pub(super) fn run(mut self) -> Result<(), EngineError> {
        let result = self.serve();
        if result.is_err() {
            self.finish_reading();
            self.stop_receiving();
            self.take_messages();
            self.fail_rest();
        }
        self.publish();
        result
    }

    fn serve(&mut self) -> Result<(), EngineError> {
        self.stats().is_here();
        while !self.has_ended() {
            self.take_messages();
            self.machine.tick(self.clock.now_ns());
            self.act();
            self.answer();
            self.publish();
            self.receive();
            self.wait()?;
        }
        Ok(())
    }

    fn stats(&self) -> &ShardStats {
        &self.shared.shards[self.index]
    }

    fn publish(&mut self) {
        self.note_growth();
        let machine = &self.machine;
        let (pending, oldest_ns, stuck, objects) = (machine.pending(), machine.oldest(), machine.stuck(), machine.object_count());
        self.stats().publish(machine.counters(), &Gauges { pending, oldest_ns, stuck, objects });
    }

    /// Counts what objects got since this was called last.
    fn note_growth(&mut self) {
        for (object, bytes) in self.machine.grown() {
            if let Some(Some(attached)) = self.attached.get(object.0) {
                attached.stats.grows(bytes);
            }
        }
    }

    fn take_messages(&mut self) {
        while let Some(message) = self.inbox.take() {
            match message {
                Message::Adopt(adopted) => self.adopt(adopted),
                Message::Opened(object) => self.machine.opened(object),
                Message::Need(need, since_ns) => self.need(need, since_ns),
                Message::Close(object) => self.machine.close(object),
                Message::Evict(count) => self.make_room(count),
                Message::Keep(object, sink) => self.keep(object, sink),
                Message::Tune(Tuning { request_timeout, complete_bytes_per_s, .. }) => {
                    self.machine.tune(as_ns(request_timeout), complete_bytes_per_s);
                }
            }
            if self.answers.is_due(self.clock.now_ns()) {
                self.act();
                self.answer();
            }
        }
    }

    fn adopt(&mut self, adopted: Adopted) {
        let handle = self.machine.open(adopted.object, Arc::clone(&adopted.blob));
        if let Some(metadata) = &adopted.metadata {
            self.machine.bring_whole(handle, metadata);
        }
        if self.attached.len() <= handle.0 {
            self.attached.resize_with(handle.0 + 1, || None);
        }
        if self.caps.sinks_know {
            self.machine.learn_of(handle, &(0..0), adopted.sink.present());
            adopted.stats.holds(self.machine.present_bytes(handle));
        }
        self.attached[handle.0] = Some(Attached::new(adopted, &mut self.io));
    }

    fn need(&mut self, need: NeedRequest, since_ns: u64) {
        if let Some(handle) = self.machine.handle(need.object)
            && let Some(Some(attached)) = self.attached.get_mut(handle.0)
        {
            if attached.take_back() {
                self.machine.stays(handle);
            }
            if self.caps.holes_are_absent
                && let Some(sink) = attached.sink()
            {
                probe::refresh(&mut self.machine, need.object, sink.as_fd(), &need.range);
            }
        }
        let NeedRequest { object, range, ticket } = need;
        self.machine.need(object, range, ticket, since_ns);
    }

    /// Offers objects that nobody waits for, to be closed because descriptors are scarce.
    fn make_room(&mut self, count: usize) {
        let mut picked = std::mem::take(&mut self.picked);
        self.machine.pick_idle(count, !self.caps.reopens, &mut picked);
        picked.iter().for_each(|handle| self.offer(*handle));
        self.picked = picked;
        // Nobody there: nobody reads requests any more, or asks.
        let _ = self.offers.send(Offer::End);
        self.shared.look_again();
    }

    /// Offers the sink of an object that the machine has picked.
    fn offer(&mut self, handle: Handle) {
        let Some(object) = self.machine.id(handle) else { return };
        if let Some(sink) = self.attached_mut(handle).and_then(Attached::offer)
            && let Err(SendError(Offer::Sink(_, sink))) = self.offers.send(Offer::Sink(object, sink))
        {
            self.keep(object, sink);
        }
    }

    /// Takes back the sink of an object that was offered, unless a request has brought it back already.
    fn keep(&mut self, object: ObjectId, sink: Arc<dyn Sink>) {
        let Some(handle) = self.machine.handle(object) else { return };
        if self.attached_mut(handle).is_some_and(Attached::take_back) {
            self.machine.stays(handle);
        }
        // It is held by now.
        drop(sink);
    }

    fn attached(&self, object: Handle) -> Option<&Attached> {
        self.attached.get(object.0)?.as_ref()
    }

    fn attached_mut(&mut self, object: Handle) -> Option<&mut Attached> {
        self.attached.get_mut(object.0)?.as_mut()
    }

    /// Does what the machine wants done.
    fn act(&mut self) {
        while let Some(action) = self.machine.pop_action() {
            let is_answer = matches!(action, Action::Answer(_));
            if self.answers.is_full() || !is_answer && !self.answers.is_empty() && self.answers.is_due(self.clock.now_ns()) {
                self.answer();
            }
            match action {
                Action::Answer(answered) if self.leaves(&answered) => answered.ticket.leave(),
                Action::Answer(answered) => self.answers.push(answered),
                Action::Look { object, range } => match self.attached(object).and_then(Attached::sink).cloned() {
                    Some(sink) => probe::look(&mut self.machine, object, sink.as_fd(), &range),
                    None => self.machine.learn_of(object, &range, []),
                },
                Action::Filled { object, range, complete } => self.tell_of(object, &range, complete),
                Action::Release { object } => self.release(object),
                Action::Read { op, object, file, offset, len, .. }
                    if self.is_in_memory(object, file, offset, len) && self.machine.use_mapped(op) => {}
                Action::Read { op, object, file, offset, slot, slot_offset, len, then } => {
                    let memory = self.buffers.slot(slot, index(slot_offset), index(len));
                    self.start(op, object, Kind::Read, Target::Source(file), offset, Some(memory), then);
                }
                Action::Write { op, object, offset, len, slot, from } => {
                    let memory = self.written(object, slot, len, from);
                    self.start(op, object, Kind::Write, Target::Sink, offset, memory, None);
                }
            }
        }
    }

    /// Tells of what a sink holds now: operators, and the sink if it wants to know.
    fn tell_of(&self, object: Handle, filled: &ByteRange, complete: bool) {
        let Some(attached) = self.attached(object) else { return };
        attached.stats.holds(self.machine.present_bytes(object));
        if let Some(sink) = attached.sink() {
            sink.filled(filled);
            if complete {
                sink.completed();
            }
        }
    }

    /// Whether what is to be read can be written as it lies in memory.
    fn is_in_memory(&self, object: Handle, file: usize, offset: u64, len: u64) -> bool {
        let file = self.attached(object).and_then(|attached| attached.blob.files().get(file));
        offset.is_multiple_of(self.caps.align_bytes) && file.is_some_and(|file| file.is_in_memory(offset, len))
    }

    /// The memory that a write takes its bytes from. `None`: they are gone, the source was truncated.
    fn written(&mut self, object: Handle, slot: Option<u32>, len: u64, from: From) -> Option<Memory> {
        match (from, slot) {
            (From::Slot { slot_offset, valid }, Some(slot)) => {
                let end = slot_offset + len;
                let padding = valid.clamp(slot_offset, end);
                self.buffers.clear(slot, index(padding), index(end - padding));
                Some(self.buffers.slot(slot, index(slot_offset), index(len)))
            }
            (From::Slot { .. }, None) => None,
            (From::Zero, _) => Some(self.buffers.zeros(index(len))),
            (From::Mapped { file, offset }, _) => {
                let file = &self.attached(object)?.blob.files()[file];
                is_whole(file).then(|| Memory::mapped(file, offset, len)).flatten()
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of an operation")]
    fn start(&mut self, key: OpKey, object: Handle, kind: Kind, target: Target, offset: u64, memory: Option<Memory>, then: Option<u64>) {
        let attached = self.attached(object);
        let file = attached.and_then(|attached| attached.file(target));
        let then = attached.and_then(|attached| attached.file(Target::Sink)).zip(then);
        match (file, memory) {
            (Some(file), Some(memory)) => self.io.push(Op { key: key.0, kind, file, offset, memory, then }),
            _ => self.machine.io_done(key, -(Errno::EIO as i32), self.clock.now_ns()),
        }
    }

    /// Drops what belongs to a closed object, so that the kernel can let go of it too.
    fn release(&mut self, object: Handle) {
        // Its handle may be another object's in this turn.
        self.note_growth();
        if let Some(attached) = self.attached.get_mut(object.0).and_then(Option::take) {
            for file in &attached.source_files {
                self.io.remove_file(*file);
            }
            drop(attached);
            // The kernel wakes nobody when a descriptor is closed, even if that makes a request deliverable.
            self.shared.look_again();
        }
    }

    fn wait(&mut self) -> Result<(), EngineError> {
        let timeout = if self.inbox.may_sleep() { self.sleep_max() } else { Duration::ZERO };
        let waited = self.io.wait(Some(timeout), &mut self.done).map_err(EngineError::Io);
        self.inbox.awake();
        let in_vain = self.done.is_empty();
        self.complete()?;
        let ready = waited?;
        if ready.woken {
            self.inbox.silence();
        }
        // Also when nothing happened at all: should the kernel lose a wake-up, the next turn finds it.
        let sources = if ready == Ready::default() && in_vain { u64::MAX } else { ready.requests };
        if sources != 0 {
            let noticed = |(source, _): &(usize, &mut Intake)| sources >> source & 1 == 1;
            self.intakes.iter_mut().enumerate().filter(noticed).for_each(|(_, intake)| intake.router.notice());
        }
        Ok(())
    }

    /// Reports ended operations to the machine, and messages to the router.
    ///
    /// # Errors
    /// The front end is broken. Everything has been reported all the same.
    fn complete(&mut self) -> Result<(), EngineError> {
        let mut received = Ok(());
        let mut done = std::mem::take(&mut self.done);
        let now_ns = self.clock.now_ns();
        self.answers.begin(now_ns);
        for Done { op, mut result, copied } in done.drain(..) {
            if op.kind == Kind::Receive {
                received = received.and(self.received(op.key, &op.memory, result, now_ns));
                continue;
            }
            if let Some(file) = op.memory.file()
                && result > 0
                && !is_whole(file)
            {
                if self.shared.may_log_failure() {
                    tracing::error!("a mapped source was truncated while it was copied; unmount its image to drop what was cached of it");
                }
                result = -(Errno::EIO as i32);
            }
            if (op.kind == Kind::Write || copied) && NoRoom::is_meant_by(Errno::from_raw(result.wrapping_neg())) {
                let patient = self.no_room.as_ref().is_none_or(NoRoom::ring);
                self.machine.wait_for_room(patient);
            }
            if copied {
                self.machine.io_copied(OpKey(op.key), result, now_ns);
            } else {
                self.machine.io_done(OpKey(op.key), result, now_ns);
            }
        }
        self.done = done;
        received
    }

    /// How long it may sleep: to the next deadline of a fill, and of the router if it is here.
    fn sleep_max(&self) -> Duration {
        let deadline = self.machine.next_deadline().map(|at| Duration::from_nanos(at.saturating_sub(self.clock.now_ns())));
        let routers = self.intakes.iter().map(|intake| intake.router.next_turn());
        routers.chain([deadline]).flatten().fold(SLEEP_MAX, Duration::min)
    }

    /// Whether there is nothing left to do for ever. When time is up, what is left is failed first.
    fn has_ended(&mut self) -> bool {
        if self.shared.receivers.load(Ordering::Acquire) > 0 {
            return false;
        }
        self.take_messages();
        if self.shared.out_of_time.load(Ordering::Acquire) || self.machine.pending() == 0 {
            self.fail_rest();
        }
        self.machine.object_count() == 0 || self.shared.out_of_time.load(Ordering::Acquire)
    }

    /// Closes every object and answers what waited for it; what fails only by that may be left instead.
    fn fail_rest(&mut self) {
        self.is_ending = true;
        self.machine.close_all();
        self.act();
        self.answer();
    }
}

/// An offset or length within a slot.
#[allow(clippy::cast_possible_truncation, reason = "a slot is far shorter than 4 GiB")]
const fn index(value: u64) -> usize {
    value as usize
}
