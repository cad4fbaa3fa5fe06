//! A shard of the simulated daemon: a real machine, with simulated slots, sinks and operations.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::check::{Checked, Rule, SimTicket, ensure};
use crate::engine::fill::From;
use crate::engine::machine::{Handle, Limits, Machine, OpKey};
use crate::front::sim::blob::{PAGE_BYTES, SimBlob};
use crate::front::sim::content::{Memory, Origin};
use crate::front::sim::kernel::Message;
use crate::range::{ByteRange, intersect};
use crate::store::{Blob, SourceMode};

/// Most fills of an object that a machine makes which nobody waits for (`AHEAD_MAX` of the engine, plus one need's cuts).
const FILLS_AHEAD_MAX: usize = 256 + 64;

/// Where an object's data goes.
#[derive(Clone, Debug)]
pub(super) struct Sink {
    /// The anonymous fd.
    pub(super) fd: u32,
    /// The kernel's id of the object.
    pub(super) object: u32,
    /// Where the data comes from.
    pub(super) blob: Arc<SimBlob>,
    /// [`Machine::close`] was called.
    pub(super) closed: bool,
}

/// What an operation in flight does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Reads from a file into a slot.
    Read {
        /// Index into the blob's files.
        file: usize,
        /// Where in the file.
        offset: u64,
        /// Into which slot.
        slot: u32,
        /// Where in the slot.
        slot_offset: u64,
    },
    /// Writes to the sink.
    Write {
        /// Where in the sink.
        offset: u64,
        /// The slot, if written from one.
        slot: Option<u32>,
        /// What.
        from: From,
    },
}

/// An operation in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Flight {
    /// The machine's name for it.
    pub(super) op: OpKey,
    /// Whose.
    pub(super) object: Handle,
    /// How many bytes.
    pub(super) len: u64,
    /// What.
    pub(super) kind: Kind,
}

impl Flight {
    const fn slot(&self) -> Option<u32> {
        match self.kind {
            Kind::Read { slot, .. } => Some(slot),
            Kind::Write { slot, .. } => slot,
        }
    }

    const fn written(&self) -> Option<ByteRange> {
        match self.kind {
            Kind::Read { .. } => None,
            Kind::Write { offset, .. } => Some(offset..offset + self.len),
        }
    }
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Shard {
    /// The code under test.
    pub(super) machine: Machine<SimTicket>,
    /// Sinks of objects that the machine has not released.
    pub(super) sinks: BTreeMap<usize, Sink>,
    /// What is in the slots.
    pub(super) slots: Vec<Memory>,
    /// Operations in flight.
    pub(super) flights: Vec<Flight>,
    /// Messages that the shards have read for this one, by who read them.
    pub(super) inbox: Vec<VecDeque<Message>>,
    /// How many times each fill was disturbed; the engine forgives a few.
    pub(super) disturbed: HashMap<OpKey, u32>,
    /// The operation that ended last.
    pub(super) ended: Option<OpKey>,
    limits: Limits,
}

impl Shard {
    /// A shard without objects, one of `shards`.
    #[must_use]
    pub(super) fn new(limits: Limits, shards: usize) -> Self {
        Self {
            machine: Machine::new(limits),
            sinks: BTreeMap::new(),
            slots: vec![Memory::default(); limits.slots as usize],
            flights: Vec::new(),
            inbox: vec![VecDeque::new(); shards],
            disturbed: HashMap::new(),
            ended: None,
            limits,
        }
    }

    /// The sink of an object that was not released.
    ///
    /// # Errors
    /// It was released.
    pub(super) fn sink(&self, object: Handle) -> Checked<&Sink> {
        let sink = self.sinks.get(&object.0);
        sink.ok_or_else(|| super::check::Violation { rule: Rule::Release, how: format!("{object:?} is used after its release") })
    }

    /// The sink of an open object, by the kernel's id.
    #[must_use]
    pub(super) fn open_sink(&self, object: u32) -> Option<&Sink> {
        self.sinks.values().find(|sink| sink.object == object && !sink.closed)
    }

    /// Reports an operation done once more if its fill is over: its name must mean nothing to the machine, even
    /// if a new fill lies where the old one lay. All actions must have been taken.
    ///
    /// # Errors
    /// The machine took it for another operation.
    pub(super) fn report_again(&mut self, now_ns: u64) -> Checked {
        let Some(op) = self.ended.take() else { return Ok(()) };
        // A fill that waits for room is not over, and has no operation.
        let waits = self.machine.in_flight() as usize > self.flights.len();
        if waits || self.flights.iter().any(|flight| flight.op == op) {
            return Ok(());
        }
        let stale = self.machine.counters().stale;
        self.machine.io_done(op, 1, now_ns);
        ensure(self.machine.counters().stale > stale, Rule::SlotOwner, || format!("{op:?} ended long ago and was taken for another"))
    }

    /// Starts an operation, if the rules allow it.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub(super) fn start(&mut self, flight: Flight) -> Checked {
        let sink = self.sink(flight.object)?.clone();
        ensure(self.flights.len() < self.limits.slots as usize, Rule::Limits, || format!("{flight:?} is one operation too many"))?;
        ensure(self.flights.iter().all(|other| other.op != flight.op), Rule::Limits, || {
            format!("{flight:?} is the second operation of its fill in flight")
        })?;
        ensure(flight.len > 0 && flight.len <= self.limits.fill_max_bytes, Rule::Limits, || format!("{flight:?} has a bad length"))?;
        self.check_slot(&flight)?;
        self.check_alignment(&flight, &sink)?;
        self.check_overlap(&flight)?;
        self.pad(&flight);
        self.flights.push(flight);
        Ok(())
    }

    fn check_slot(&self, flight: &Flight) -> Checked {
        let from_slot = !matches!(flight.kind, Kind::Write { from: From::Mapped { .. } | From::Zero, .. });
        let Some(slot) = flight.slot() else {
            return ensure(!from_slot, Rule::SlotOwner, || format!("{flight:?} has no slot"));
        };
        let taken = self.flights.iter().find(|other| other.slot() == Some(slot));
        ensure(taken.is_none(), Rule::SlotOwner, || format!("{flight:?} uses the slot of {taken:?}"))?;
        let slot_offset = match flight.kind {
            Kind::Read { slot_offset, .. } | Kind::Write { from: From::Slot { slot_offset, .. }, .. } => slot_offset,
            Kind::Write { .. } => 0,
        };
        let fits = slot < self.limits.slots && slot_offset + flight.len <= self.limits.fill_max_bytes;
        ensure(fits, Rule::SlotOwner, || format!("{flight:?} is outside its slot"))
    }

    fn check_alignment(&self, flight: &Flight, sink: &Sink) -> Checked {
        let aligned = |value: u64| value.is_multiple_of(PAGE_BYTES);
        let good = match flight.kind {
            Kind::Read { file, offset, slot_offset, .. } => {
                let direct = sink.blob.files()[file].mode == SourceMode::Direct;
                !direct || aligned(offset) && aligned(slot_offset) && aligned(flight.len)
            }
            Kind::Write { offset, from, .. } => {
                let memory = match from {
                    From::Slot { slot_offset, .. } => slot_offset,
                    From::Mapped { offset, .. } => offset,
                    From::Zero => 0,
                };
                let inside = offset + flight.len <= sink.blob.padded_len();
                aligned(offset) && aligned(flight.len) && aligned(memory) && inside
            }
        };
        ensure(good, Rule::Aligned, || format!("{flight:?} to object {} of {} bytes", sink.object, sink.blob.len_bytes()))
    }

    fn check_overlap(&self, flight: &Flight) -> Checked {
        let Some(range) = flight.written() else { return Ok(()) };
        let others = self.flights.iter().filter(|other| other.object == flight.object);
        let other = others.filter_map(Flight::written).find(|other| intersect(other, &range).is_some());
        ensure(other.is_none(), Rule::NoOverlap, || format!("{flight:?} while {other:?} is being written"))
    }

    /// Zeroes what a write takes from a slot but no read brought, as the driver has to.
    fn pad(&mut self, flight: &Flight) {
        if let Kind::Write { slot: Some(slot), from: From::Slot { slot_offset, valid }, .. } = flight.kind {
            let end = slot_offset + flight.len;
            let from = valid.max(slot_offset);
            self.slots[slot as usize].fill(from, end.saturating_sub(from), Origin::Zero);
        }
    }

    /// Whether an operation reads from a file system, by a read or by a write of mapped pages.
    #[must_use]
    pub(super) fn reads_from(&self, flight: &Flight, device: u64) -> bool {
        let reads = matches!(flight.kind, Kind::Read { .. } | Kind::Write { from: From::Mapped { .. }, .. });
        reads && self.sinks.get(&flight.object.0).is_some_and(|sink| sink.blob.device() == device)
    }

    /// Operations that can end while `hung` hangs, by their places.
    #[must_use]
    pub(super) fn mobile(&self, hung: Option<u64>) -> Vec<usize> {
        let can_end = |flight: &Flight| hung.is_none_or(|device| !self.reads_from(flight, device));
        (0..self.flights.len()).filter(|&index| can_end(&self.flights[index])).collect()
    }

    /// Checks that no request is older than it may become.
    ///
    /// # Errors
    /// One is.
    pub(super) fn check_ages(&self, now_ns: u64) -> Checked {
        let oldest_ns = self.machine.oldest().unwrap_or(now_ns);
        let age_ns = now_ns.saturating_sub(oldest_ns);
        ensure(age_ns < self.limits.timeout_ns, Rule::Deadline, || format!("a request has waited for {age_ns} ns"))
    }

    /// Checks what must hold between any two steps.
    ///
    /// # Errors
    /// The rule that is broken.
    pub(super) fn check(&self) -> Checked {
        let slots = self.limits.slots;
        let (in_flight, fills, pending) = (self.machine.in_flight(), self.machine.fill_count(), self.machine.pending());
        ensure(in_flight <= slots, Rule::Limits, || format!("{in_flight} operations in flight with {slots} slots"))?;
        let most = FILLS_AHEAD_MAX * self.machine.object_count().max(1) + slots as usize + pending * self.limits.fills_per_need as usize;
        ensure(fills <= most, Rule::Limits, || format!("{fills} fills for {pending} requests"))
    }

    /// Checks that nothing is left of any object.
    ///
    /// # Errors
    /// What is left.
    pub(super) fn check_empty(&self) -> Checked {
        let Self { machine, sinks, flights, .. } = self;
        let left = (machine.object_count(), machine.pending(), machine.fill_count(), machine.in_flight(), sinks.len(), flights.len());
        ensure(left == (0, 0, 0, 0, 0, 0), Rule::NothingLeft, || {
            format!("(objects, requests, fills, operations, sinks, flights) left: {left:?}")
        })
    }
}
