//! How operations end: by the state of the disks, and by chance.

use nix::errno::Errno;

use super::World;
use super::check::{Checked, Rule, ensure};
use super::sabotage::Sabotage;
use super::shard::{Flight, Kind, Sink};
use super::sources::land;
use crate::engine::fill::From;
use crate::front::sim::blob::PAGE_BYTES;
use crate::front::sim::content::{Origins, Zeros};
use crate::front::sim::sink::{SECTOR_BYTES, SinkWrite};
use crate::store::{Blob, SourceMode};

/// How often one fill is disturbed without a reason for it to fail. The engine forgives a fill several
/// interruptions and a few writes that found no room; fewer than it forgives must never fail a reader.
const DISTURBANCES_MAX: u32 = 3;

/// What was injected into an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Injected {
    Nothing,
    /// It moves at most this much.
    Short(u64),
    /// It fails.
    Error(Errno),
    /// A short write of this much, reported as whole.
    Lie(u64),
}

impl World {
    /// Ends an operation in flight.
    ///
    /// # Errors
    /// The rule that is broken by what it did.
    pub(super) fn end_operation(&mut self, shard: usize, index: usize, calm: bool) -> Checked {
        let flight = self.shards[shard].flights.swap_remove(index);
        let sink = self.shards[shard].sink(flight.object)?.clone();
        let injected = if calm { Injected::Nothing } else { self.inject(shard, &flight, &sink) };
        let result = match flight.kind {
            Kind::Read { .. } => Ok(self.end_read(shard, &flight, &sink, injected)),
            Kind::Write { .. } => self.end_write(shard, &flight, &sink, injected),
        }?;
        self.note(|| format!("shard {shard}: {flight:?} ends with {result:?} ({injected:?})"));
        let number = match result {
            Ok(n) => i32::try_from(n).unwrap_or(i32::MAX),
            Err(errno) => -(errno as i32),
        };
        self.shards[shard].machine.io_done(flight.op, number, self.now_ns);
        self.shards[shard].ended = Some(flight.op);
        Ok(())
    }

    /// Picks what goes wrong with an operation.
    fn inject(&mut self, shard: usize, flight: &Flight, sink: &Sink) -> Injected {
        let is_write = matches!(flight.kind, Kind::Write { .. });
        if is_write && self.full {
            return Injected::Error(self.rng.pick(&[Errno::ENOSPC, Errno::ENOBUFS, Errno::EDQUOT]));
        }
        let faults = self.faults;
        if self.rng.chance(faults.hard) {
            self.ledger.excuse(sink.object, "an operation failed once");
            return Injected::Error(self.rng.pick(&[Errno::EIO, Errno::ECANCELED, Errno::EINVAL]));
        }
        let rounds = self.kernel.flavour().rounds_result;
        if is_write && rounds && self.rng.chance(faults.lie) {
            return Injected::Lie(self.shorten(flight, sink));
        }
        let times = self.shards[shard].disturbed.entry(flight.op).or_default();
        if *times >= DISTURBANCES_MAX {
            return Injected::Nothing;
        }
        *times += 1;
        if self.rng.chance(faults.soft) {
            return Injected::Error(self.rng.pick(&[Errno::EINTR, Errno::EAGAIN]));
        }
        if is_write && self.rng.chance(faults.no_room) {
            return Injected::Error(self.rng.pick(&[Errno::ENOSPC, Errno::ENOBUFS, Errno::EDQUOT]));
        }
        if self.rng.chance(faults.short) && !(is_write && rounds) {
            return Injected::Short(self.shorten(flight, sink));
        }
        *times -= 1;
        Injected::Nothing
    }

    /// A length at which an operation may stop early: anywhere in buffered reads, else at a sector.
    fn shorten(&mut self, flight: &Flight, sink: &Sink) -> u64 {
        let n = 1 + self.rng.below(flight.len);
        match flight.kind {
            Kind::Read { file, .. } if sink.blob.files()[file].mode != SourceMode::Direct => n,
            _ => (n / SECTOR_BYTES).max(1) * SECTOR_BYTES,
        }
    }

    fn end_read(&mut self, shard: usize, flight: &Flight, sink: &Sink, injected: Injected) -> Result<u64, Errno> {
        let Kind::Read { file, offset, slot, slot_offset } = flight.kind else {
            return Err(Errno::EINVAL);
        };
        let mut offset = offset;
        if self.sabotage == Some(Sabotage::WrongSource) {
            offset += SECTOR_BYTES;
        }
        let result = match injected {
            Injected::Error(errno) => Err(errno),
            Injected::Short(most) => self.sources.read(&sink.blob, file, offset, most),
            Injected::Nothing | Injected::Lie(_) => self.sources.read(&sink.blob, file, offset, flight.len),
        };
        let bytes = self.sources.bytes(&sink.blob, file);
        let memory = &mut self.shards[shard].slots[slot as usize];
        land(memory, slot_offset, &bytes, offset, result.unwrap_or(0), flight.len);
        result
    }

    fn end_write(&mut self, shard: usize, flight: &Flight, sink: &Sink, injected: Injected) -> Checked<Result<u64, Errno>> {
        let Kind::Write { offset, slot, from } = flight.kind else {
            return Ok(Err(Errno::EINVAL));
        };
        let at_most = match injected {
            Injected::Error(errno) => return Ok(Err(errno)),
            Injected::Short(most) | Injected::Lie(most) => most,
            Injected::Nothing => flight.len,
        };
        let file_bytes;
        let (content, position, at_most): (&dyn Origins, u64, u64) = match from {
            From::Zero => (&Zeros, 0, at_most),
            From::Slot { slot_offset, .. } => (&self.shards[shard].slots[slot.unwrap_or(0) as usize], slot_offset, at_most),
            From::Mapped { file, offset } => {
                file_bytes = self.sources.bytes(&sink.blob, file);
                match self.sources.mapped(&sink.blob, file, offset, flight.len) {
                    Ok(reachable) => (&file_bytes, offset, at_most.min(reachable)),
                    Err(errno) => return Ok(Err(errno)),
                }
            }
        };
        let address = if matches!(from, From::Zero) { 0 } else { position % PAGE_BYTES };
        let write = SinkWrite { offset, len: flight.len, position, content, address, at_most: Some(at_most) };
        if at_most < flight.len && self.kernel.flavour().rounds_result {
            self.ledger.lie(sink.object);
        }
        let mut result = self.kernel.write(sink.fd, &write);
        if self.sabotage == Some(Sabotage::ShortIsWhole) && result.is_ok() {
            result = Ok(flight.len);
        }
        let bad: usize = self.kernel.cookies().iter().map(|cookie| cookie.file.bad_blocks()).sum();
        ensure(bad == 0, Rule::RightBytes, || format!("{flight:?} put wrong bytes into object {} ({from:?})", sink.object))?;
        Ok(result)
    }
}
