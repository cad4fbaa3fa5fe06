//! The simulated daemon around the machines: takes messages, does what the machines say, answers.

use std::sync::Arc;

use nix::errno::Errno;

use super::World;
use super::check::{Checked, Rule, SimTicket, Violation, Waiting, ensure};
use super::sabotage::Sabotage;
use super::shard::{Flight, Kind, Sink};
use crate::engine::machine::{Action, Answered, Handle};
use crate::front::sim::blob::{PAGE_BYTES, SimBlob};
use crate::front::sim::kernel::{Message, ReadFault};
use crate::front::sim::queue::Ask;
use crate::front::{ObjectId, Outcome};
use crate::range::{ByteRange, align_down, align_up};
use crate::store::Blob;

/// How often, in a thousand, a sabotaged world makes its mistake.
const SABOTAGE_PERMILLE: u64 = 300;
/// How often, in a thousand, what is to be read is in memory.
const IN_MEMORY_PERMILLE: u64 = 400;
/// Why a request for an object that the daemon does not know may fail.
const NOT_OPEN: &str = "the object is not open";
/// The ticket of a request that sabotage has answered already.
const VOID: SimTicket = SimTicket(0);

impl World {
    fn slips(&mut self, sabotage: Sabotage) -> bool {
        self.sabotage == Some(sabotage) && self.rng.chance(SABOTAGE_PERMILLE)
    }

    /// One `read(2)` on the device by a shard; what it gives goes to the shard that owns the object.
    /// Returns whether there was a message.
    pub(super) fn read_device(&mut self, shard: usize, fault: ReadFault) -> bool {
        match self.kernel.read(fault) {
            Ok(Some(message)) => {
                self.note(|| format!("shard {shard} reads {message:?}"));
                let (Message::Open { object, .. } | Message::Read { object, .. } | Message::Close { object }) = &message;
                let owner = *object as usize % self.shards.len();
                self.shards[owner].inbox[shard].push_back(message);
                true
            }
            Ok(None) => {
                self.armed = false;
                false
            }
            Err(errno) => {
                self.note(|| format!("shard {shard} loses an OPEN: {errno}"));
                true
            }
        }
    }

    /// Handles the oldest message that `from` has read for `shard`.
    pub(super) fn take_message(&mut self, shard: usize, from: usize) -> Checked {
        let Some(message) = self.shards[shard].inbox[from].pop_front() else {
            return Ok(());
        };
        self.note(|| format!("shard {shard} handles {message:?}"));
        match message {
            Message::Open { msg_id, object, name, fd, .. } => self.handle_open(shard, msg_id, object, &name, fd),
            Message::Read { msg_id, object, offset, len } => self.handle_read(shard, msg_id, object, offset..offset.saturating_add(len)),
            Message::Close { object } => self.close(shard, object),
        }
    }

    fn handle_open(&mut self, shard: usize, msg_id: u32, object: u32, name: &str, fd: u32) -> Checked {
        let Some(blob) = self.find(name) else {
            // A refused open is answered before its descriptor is closed.
            let _ = self.kernel.copen(msg_id, -(Errno::ENOENT as i64));
            self.kernel.close_fd(fd);
            self.armed = true;
            return Ok(());
        };
        let len = blob.len_bytes();
        let handle = self.shards[shard].machine.open(ObjectId(object), blob.clone());
        let clash = self.shards[shard].sinks.insert(handle.0, Sink { fd, object, blob, closed: false });
        ensure(clash.is_none(), Rule::Release, || {
            format!("{handle:?} of object {object} is given away before the release of {clash:?} was taken")
        })?;
        if self.kernel.copen(msg_id, i64::try_from(len).unwrap_or(0)).is_err() {
            // The kernel gave the object up meanwhile; no CLOSE will come for it.
            return self.close(shard, object);
        }
        self.shards[shard].machine.opened(ObjectId(object));
        Ok(())
    }

    fn find(&self, name: &str) -> Option<Arc<SimBlob>> {
        self.blobs.iter().find(|blob| name == format!("blob{}", blob.id())).cloned()
    }

    fn handle_read(&mut self, shard: usize, msg_id: u32, object: u32, range: ByteRange) -> Checked {
        let known = self.shards[shard].open_sink(object).map(|sink| sink.fd);
        let excuse = match known {
            None => Some(NOT_OPEN),
            Some(_) if self.full => Some("the disk is full"),
            Some(_) => None,
        };
        let waiting = Waiting { msg_id, object, range: range.clone(), excuse };
        let mut ticket = self.ledger.issue(waiting);
        if let Some(fd) = known {
            self.look(shard, object, fd, &range);
        }
        if self.slips(Sabotage::DoneTooEarly) {
            let answered = Answered::at_once(ticket, Outcome::Done, None, range.clone(), 0);
            self.answer(shard, answered)?;
            ticket = VOID;
        }
        self.shards[shard].machine.need(ObjectId(object), range, ticket, self.now_ns);
        Ok(())
    }

    /// Tells the machine what the sink holds, as a driver has to before a need.
    fn look(&mut self, shard: usize, object: u32, fd: u32, range: &ByteRange) {
        let id = ObjectId(object);
        let machine = &mut self.shards[shard].machine;
        while let Some(region) = machine.unprobed(id, range) {
            let present = self.kernel.present(fd, &region).unwrap_or_default();
            machine.learn(id, &region, present);
        }
        if machine.believes(id, range) {
            // The whole object at most: a demand may be longer than any.
            let end = self.blobs.iter().map(|blob| blob.padded_len()).max().unwrap_or(0);
            let mut at = range.start;
            for part in self.kernel.present(fd, &(range.start..range.end.min(end))).unwrap_or_default() {
                machine.forget(id, &(at..part.start));
                at = part.end;
            }
            machine.forget(id, &(at..range.end.min(end).max(at)));
        }
    }

    /// Closes an object in its machine.
    pub(super) fn close(&mut self, shard: usize, object: u32) -> Checked {
        self.ledger.excuse(object, "the object was closed");
        let found = self.shards[shard].sinks.iter_mut().find(|(_, sink)| sink.object == object && !sink.closed);
        let handle = found.map(|(handle, sink)| {
            sink.closed = true;
            Handle(*handle)
        });
        self.shards[shard].machine.close(ObjectId(object));
        match handle {
            Some(handle) if self.slips(Sabotage::EarlyRelease) => self.release(shard, handle),
            _ => Ok(()),
        }
    }

    /// Does everything that a machine wants done.
    pub(super) fn drain(&mut self, shard: usize) -> Checked<bool> {
        let mut any = false;
        while let Some(action) = self.shards[shard].machine.pop_action() {
            any = true;
            self.act(shard, action)?;
        }
        Ok(any)
    }

    fn act(&mut self, shard: usize, action: Action<SimTicket>) -> Checked {
        self.note(|| format!("shard {shard}: {action:?}"));
        if let Action::Read { op, object, offset, .. } = action
            && self.is_in_memory(shard, object, offset)?
            && self.shards[shard].machine.use_mapped(op)
        {
            return Ok(());
        }
        match action {
            Action::Read { op, object, file, offset, slot, slot_offset, len, .. } => {
                let slot = if self.sabotage == Some(Sabotage::OneSlotForAll) { 0 } else { slot };
                self.start(shard, Flight { op, object, len, kind: Kind::Read { file, offset, slot, slot_offset } })
            }
            Action::Write { op, object, offset, len, slot, from } => {
                let mut offset = offset;
                if self.slips(Sabotage::MisalignedWrite) {
                    offset += PAGE_BYTES / 2;
                }
                if self.slips(Sabotage::WrongPlace) {
                    offset = offset.checked_sub(PAGE_BYTES).unwrap_or(offset);
                }
                self.start(shard, Flight { op, object, len, kind: Kind::Write { offset, slot, from } })
            }
            Action::Look { object, range } => {
                let fd = self.shards[shard].sink(object)?.fd;
                let present = self.kernel.present(fd, &range).unwrap_or_default();
                self.shards[shard].machine.learn_of(object, &range, present);
                Ok(())
            }
            Action::Filled { object, range, .. } => {
                let sink = self.shards[shard].sink(object)?;
                let (fd, lied_to) = (sink.fd, self.ledger.was_lied_to(sink.object));
                // A cookie that is gone cannot be looked into.
                let present = self.kernel.present(fd, &range).unwrap_or_else(|_| vec![range.clone()]);
                let holds = lied_to || present.iter().any(|part| part.start <= range.start && part.end >= range.end);
                ensure(holds, Rule::DoneMeansThere, || format!("{object:?} is said to hold {range:?}, and holds {present:?}"))
            }
            Action::Answer(answered) => self.answer(shard, answered),
            Action::Release { object } => self.release(shard, object),
        }
    }

    /// Whether the bytes of a read happen to be in memory, in pages that may be written as they are.
    fn is_in_memory(&mut self, shard: usize, object: Handle, offset: u64) -> Checked<bool> {
        let sink = self.shards[shard].sink(object)?;
        let may_be = sink.blob.may_be_mapped() && offset.is_multiple_of(PAGE_BYTES);
        Ok(may_be && self.rng.chance(IN_MEMORY_PERMILLE))
    }

    fn start(&mut self, shard: usize, mut flight: Flight) -> Checked {
        if let Kind::Write { from: crate::engine::fill::From::Slot { valid, .. }, .. } = &mut flight.kind
            && self.sabotage == Some(Sabotage::NoPadding)
        {
            *valid = u64::MAX;
        }
        self.shards[shard].start(flight)?;
        if self.slips(Sabotage::LostOperation) {
            self.shards[shard].flights.pop();
        }
        Ok(())
    }

    fn release(&mut self, shard: usize, object: Handle) -> Checked {
        if self.slips(Sabotage::NoRelease) {
            return Ok(());
        }
        let busy = self.shards[shard].flights.iter().find(|flight| flight.object == object);
        ensure(busy.is_none(), Rule::Release, || format!("{object:?} is released with {busy:?} in flight"))?;
        let sink = self.shards[shard].sinks.remove(&object.0);
        let sink = sink.ok_or_else(|| Violation { rule: Rule::Release, how: format!("{object:?} is released twice") })?;
        ensure(sink.closed, Rule::Release, || format!("{sink:?} is released but was never closed"))?;
        self.kernel.close_fd(sink.fd);
        // Closing wakes nobody; what waited for it must be read now.
        self.armed = true;
        Ok(())
    }

    fn answer(&mut self, shard: usize, answered: Answered<SimTicket>) -> Checked {
        let Answered { ticket, mut outcome, since_ns, .. } = answered;
        if ticket == VOID || self.slips(Sabotage::DropAnswer) {
            return Ok(());
        }
        if self.slips(Sabotage::FailForNothing) {
            outcome = Outcome::Failed(Errno::EIO);
        }
        let waiting = self.ledger.answered(&ticket)?;
        if self.leaving && outcome == Outcome::Failed(Errno::ECANCELED) {
            return Ok(());
        }
        if outcome == Outcome::Failed(Errno::ETIMEDOUT) {
            self.judge_timeout(shard, &waiting, since_ns)?;
        } else {
            self.judge(shard, &waiting, outcome)?;
        }
        if (outcome != Outcome::Done || self.ledger.was_lied_to(waiting.object))
            && let Some(Ask::Read { reader, .. }) = self.kernel.queue().get(waiting.msg_id).map(|pending| pending.ask)
        {
            self.let_down.insert(reader);
        }
        if let Some(sink) = self.shards[shard].sinks.values().find(|sink| sink.object == waiting.object) {
            // EINVAL is normal: the reader was killed, the object closed, or this was the second delivery.
            let _ = self.kernel.read_complete(sink.fd, waiting.msg_id);
        }
        if self.slips(Sabotage::AnswerTwice) {
            self.ledger.answered(&ticket)?;
        }
        Ok(())
    }

    /// Whether it was time for a request to fail.
    fn judge_timeout(&self, shard: usize, waiting: &Waiting, since_ns: u64) -> Checked {
        let age_ns = self.now_ns - since_ns;
        ensure(age_ns >= self.limits.timeout_ns, Rule::Deadline, || format!("{waiting:?} fails after {age_ns} ns"))?;
        // One slot is all there is, and may be the one of what hangs.
        let is_fair = self.limits.slots > 1 && self.calm_since_ns.is_some_and(|calm_ns| since_ns >= calm_ns);
        let device = self.shards[shard].open_sink(waiting.object).map(|sink| sink.blob.device());
        ensure(!is_fair || device.is_none() || device == self.hung, Rule::Isolation, || {
            format!("{waiting:?} on file system {device:?} fails because {:?} hangs", self.hung)
        })
    }

    /// Whether an answer is the right one.
    fn judge(&self, shard: usize, waiting: &Waiting, outcome: Outcome) -> Checked {
        let Some(sink) = self.shards[shard].sinks.values().find(|sink| sink.object == waiting.object) else {
            // It was closed and released before the answer was taken, or never open.
            return ensure(matches!(outcome, Outcome::Failed(_)) || waiting.excuse != Some(NOT_OPEN), Rule::DoneMeansThere, || {
                format!("{waiting:?} is answered {outcome:?}")
            });
        };
        // The kernel gave the object up; the daemon may not know yet.
        let withdrawn = self.kernel.present(sink.fd, &(0..0)).is_err();
        let end = align_up(waiting.range.end, PAGE_BYTES).min(sink.blob.padded_len());
        let start = if waiting.range.is_empty() { end } else { align_down(waiting.range.start, PAGE_BYTES) };
        let clamped = start..end;
        if matches!(outcome, Outcome::Failed(_)) {
            let reason = withdrawn || clamped.is_empty() || waiting.excuse.is_some() || self.sources.is_lost(&sink.blob, &clamped);
            return ensure(reason, Rule::FailureHasReason, || format!("{waiting:?} is answered {outcome:?} for no reason"));
        }
        if clamped.is_empty() {
            return Ok(());
        }
        let missing = || !self.kernel.present(sink.fd, &clamped).is_ok_and(|parts| parts == [clamped.clone()]);
        ensure(withdrawn || self.ledger.was_lied_to(waiting.object) || !missing(), Rule::DoneMeansThere, || {
            format!("{waiting:?} is answered {outcome:?} but not everything is there")
        })
    }
}
