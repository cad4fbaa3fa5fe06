//! What happens next: by chance while the faults last, then everything there is to do until nothing is.

use super::check::{Checked, Rule, ensure};
use super::setup::{Faults, some_reader};
use super::shard::Shard;
use super::{Seen, World};
use crate::front::sim::blob::DEVICES;
use crate::front::sim::kernel::{Message, ReadFault};
use crate::front::sim::objects::Phase;
use crate::front::sim::readers::Doing;
use crate::store::Blob;

/// Most readers in a world.
const READERS_MAX: usize = 16;
/// Steps that a world may take to come to rest.
const REST_STEPS_MAX: u64 = 20_000;
/// Longest time that passes in one step.
const PAUSE_MAX_NS: u64 = 30_000_000;
/// How often, in a thousand, much time passes when something hangs.
const LONG_PAUSE_PERMILLE: u64 = 300;
/// How often, in a thousand steps, a disk that is full gets room again.
const ROOM_AGAIN_PERMILLE: u64 = 30;
/// How often, in a thousand steps, a shard reads the device though nobody woke it.
const TIMER_PERMILLE: u64 = 50;

impl World {
    /// A new daemon process: machines without objects.
    pub(super) fn start_daemon(&mut self, shards: usize) {
        self.shards = (0..shards).map(|_| Shard::new(self.limits, shards)).collect();
        self.armed = true;
    }

    pub(super) fn note_start(&mut self) {
        let text = format!("{:?} {:?} {:?}, {} shards", self.kernel.flavour(), self.limits, self.faults, self.shards.len());
        self.note(|| text);
        for blob in self.blobs.clone() {
            self.note(|| format!("{blob:?}"));
        }
    }

    /// From mount to the last umount.
    pub(super) fn live(&mut self) -> Checked<Seen> {
        for cookie in 0..self.kernel.cookies().len() {
            self.kernel.mount(cookie);
        }
        while self.step < self.wild_steps {
            self.step += 1;
            self.wild_step()?;
            self.check()?;
        }
        self.faults = Faults::default();
        self.full = false;
        self.note(|| "the faults end, but for what hangs".to_owned());
        self.calm_since_ns = Some(self.now_ns);
        self.rest()?;
        self.check_readers()?;
        self.note(|| "what hangs comes back".to_owned());
        self.hung = None;
        self.rest()?;
        let seen = self.seen();
        for cookie in 0..self.kernel.cookies().len() {
            if matches!(self.kernel.cookies()[cookie].phase, Phase::Live | Phase::Failed) {
                self.umount(cookie);
            }
        }
        self.rest()?;
        self.check_nothing_left()?;
        Ok(seen)
    }

    fn wild_step(&mut self) -> Checked {
        let shard = self.rng.index(self.shards.len());
        if self.kernel.take_wakeup() && !self.rng.chance(self.faults.deaf) {
            self.armed = true;
        }
        match self.rng.below(100) {
            0..20 => {
                let reader = self.rng.index(self.kernel.readers().len());
                self.run_reader(reader)?;
            }
            20..30 => {
                let cookie = self.rng.index(self.kernel.cookies().len());
                self.kernel.work(cookie);
            }
            30..45 => {
                if self.armed || self.rng.chance(TIMER_PERMILLE) {
                    let fault = self.read_fault();
                    self.read_device(shard, fault);
                }
            }
            45..65 => {
                let from = self.rng.index(self.shards.len());
                self.take_message(shard, from)?;
            }
            65..92 => {
                let mobile = self.shards[shard].mobile(self.hung);
                if !mobile.is_empty() {
                    let index = self.rng.index(mobile.len());
                    self.end_operation(shard, mobile[index], false)?;
                }
            }
            92..97 => {
                let longest =
                    if self.hung.is_some() && self.rng.chance(LONG_PAUSE_PERMILLE) { self.limits.timeout_ns } else { PAUSE_MAX_NS };
                let pause = self.rng.below(longest);
                self.pass_time(self.now_ns + pause)?;
            }
            _ => self.add_reader(),
        }
        self.mischief(shard)?;
        for shard in 0..self.shards.len() {
            if self.rng.chance(self.prompt) {
                self.drain(shard)?;
            }
        }
        Ok(())
    }

    fn read_fault(&mut self) -> ReadFault {
        if self.rng.chance(self.faults.nothing) {
            ReadFault::Nothing
        } else if self.rng.chance(self.faults.no_descriptor) {
            ReadFault::NoDescriptor
        } else {
            ReadFault::None
        }
    }

    fn run_reader(&mut self, index: usize) -> Checked<bool> {
        let moved = self.kernel.run_reader(index);
        let reader = &self.kernel.readers()[index];
        if moved && let Doing::Failed(errno) = reader.doing {
            let mounted = self.kernel.cookies()[reader.cookie].phase == Phase::Live;
            ensure(!mounted || self.let_down.contains(&index), Rule::FailureHasReason, || {
                format!("reader {index} gets {errno} though no request of it failed: {reader:?}")
            })?;
        }
        Ok(moved)
    }

    fn add_reader(&mut self) {
        if self.kernel.readers().len() < READERS_MAX {
            let reader = some_reader(&self.kernel, &mut self.rng);
            self.note(|| format!("a new reader: {reader:?}"));
            self.kernel.add_reader(reader);
        }
    }

    fn pass_time(&mut self, now_ns: u64) -> Checked {
        self.now_ns = now_ns;
        for shard in &mut self.shards {
            shard.machine.tick(now_ns);
            shard.check_ages(now_ns)?;
        }
        Ok(())
    }

    /// The faults that no operation brings about.
    fn mischief(&mut self, shard: usize) -> Checked {
        let faults = self.faults;
        if self.rng.chance(faults.kill) {
            let reader = self.rng.index(self.kernel.readers().len());
            self.note(|| format!("reader {reader} is killed"));
            self.kernel.kill(reader);
        }
        if self.rng.chance(faults.umount) {
            self.mount_or_umount();
        }
        if self.rng.chance(faults.truncate) {
            self.truncate();
        }
        if !self.full && self.rng.chance(faults.full) {
            self.note(|| "the disk is full".to_owned());
            self.full = true;
            self.ledger.excuse_all("the disk is full");
        }
        if self.full && self.rng.chance(ROOM_AGAIN_PERMILLE) {
            self.full = false;
        }
        if self.rng.chance(faults.hang) && self.hung.is_none() {
            let device = self.rng.below(DEVICES);
            self.note(|| format!("file system {device} hangs"));
            self.hung = Some(device);
        }
        if self.rng.chance(faults.come_back) {
            self.hung = None;
        }
        if self.rng.chance(faults.restore) {
            self.note(|| "restore".to_owned());
            self.kernel.restore();
        }
        if self.rng.chance(faults.forged) {
            let (object, offset) = (self.rng.pick(&[0, 12_345, u32::MAX]), self.rng.next());
            let forged = Message::Read { msg_id: u32::MAX / 2, object, offset, len: self.rng.next() };
            let owner = object as usize % self.shards.len();
            self.shards[owner].inbox[shard].push_back(forged);
        }
        if self.rng.chance(faults.stale) {
            self.drain(shard)?;
            self.shards[shard].report_again(self.now_ns)?;
        }
        if self.rng.chance(faults.evict) {
            self.evict(shard)?;
        }
        if self.rng.chance(faults.crash) {
            self.restart()?;
        }
        Ok(())
    }

    fn mount_or_umount(&mut self) {
        let cookie = self.rng.index(self.kernel.cookies().len());
        match self.kernel.cookies()[cookie].phase {
            Phase::Idle => {
                self.note(|| format!("cookie {cookie} is mounted"));
                self.kernel.mount(cookie);
            }
            Phase::Live | Phase::Failed => self.umount(cookie),
            Phase::LookingUp | Phase::Publishing | Phase::Withdrawing => {}
        }
    }

    fn umount(&mut self, cookie: usize) {
        self.note(|| format!("cookie {cookie} is unmounted"));
        // Its fd means nothing to the kernel from the delivery of the CLOSE on, before the daemon knows.
        let object = self.kernel.cookies()[cookie].object_id;
        self.ledger.excuse(object, "unmounted");
        self.kernel.umount(cookie);
    }

    fn truncate(&mut self) {
        let blob = self.rng.pick(&[0, 1, 2, 3]);
        let blob = self.blobs[blob].clone();
        let file = self.rng.index(blob.files().len());
        let len = self.rng.below(blob.file_len(file) + 1);
        self.note(|| format!("file {file} of blob {} is truncated to {len}", blob.id()));
        self.sources.truncate(&blob, file, len);
    }

    /// Gives the descriptor of an object back for which nothing was asked. The front end must not deliver a
    /// READ of it meanwhile, or nobody could complete that READ.
    fn evict(&mut self, shard: usize) -> Checked {
        let idle = |object: u32| {
            let asked = |message: &Message| matches!(message, Message::Read { object: asked, .. } if *asked == object);
            !self.ledger.has(object) && !self.shards[shard].inbox.iter().flatten().any(asked)
        };
        let Shard { sinks, flights, .. } = &self.shards[shard];
        let busy = |handle: usize| flights.iter().any(|flight| flight.object.0 == handle);
        let found = sinks.iter().find(|(handle, sink)| !sink.closed && idle(sink.object) && !busy(**handle));
        let Some(object) = found.map(|(_, sink)| sink.object) else { return Ok(()) };
        self.drain(shard)?;
        if self.shards[shard].flights.iter().any(|flight| self.shards[shard].sinks[&flight.object.0].object == object) {
            return Ok(());
        }
        self.note(|| format!("shard {shard} gives object {object} back"));
        self.close(shard, object)?;
        self.drain(shard).map(|_| ())
    }

    /// The daemon ends, orderly or not, and a new one takes over with `restore`.
    fn restart(&mut self) -> Checked {
        let orderly = self.rng.chance(500);
        self.restarts += 1;
        self.note(|| format!("the daemon {}", if orderly { "stops" } else { "crashes" }));
        for shard in 0..self.shards.len() {
            if orderly {
                self.stop(shard)?;
            }
            while !self.shards[shard].flights.is_empty() && self.rng.chance(500) {
                self.end_operation(shard, 0, false)?;
            }
        }
        for shard in std::mem::take(&mut self.shards) {
            for message in shard.inbox.into_iter().flatten() {
                if let Message::Open { fd, .. } = message {
                    self.kernel.close_fd(fd);
                }
            }
            for sink in shard.sinks.into_values() {
                self.kernel.close_fd(sink.fd);
            }
        }
        self.ledger.forget_all();
        let shards = self.rng.pick(&[1, 2, 3]);
        self.start_daemon(shards);
        self.kernel.restore();
        Ok(())
    }

    /// Stops a shard while requests wait: what is not finished is left to the next daemon, and no reader notices.
    fn stop(&mut self, shard: usize) -> Checked {
        self.drain(shard)?;
        self.leaving = true;
        for sink in self.shards[shard].sinks.values_mut() {
            sink.closed = true;
        }
        self.shards[shard].machine.close_all();
        self.drain(shard)?;
        while !self.shards[shard].flights.is_empty() {
            self.end_operation(shard, 0, false)?;
            self.drain(shard)?;
        }
        self.leaving = false;
        self.shards[shard].check_empty()
    }

    /// Does all there is to do, without faults, until there is nothing.
    fn rest(&mut self) -> Checked {
        let last = self.step + REST_STEPS_MAX;
        loop {
            let mut busy = false;
            for reader in 0..self.kernel.readers().len() {
                busy |= self.run_reader(reader)?;
            }
            for shard in 0..self.shards.len() {
                while self.read_device(shard, ReadFault::None) {
                    busy = true;
                }
                busy |= self.rest_shard(shard)?;
            }
            for cookie in 0..self.kernel.cookies().len() {
                busy |= self.kernel.work(cookie);
            }
            self.check()?;
            ensure(self.step < last, Rule::Ends, || format!("still busy after {REST_STEPS_MAX} steps without a fault"))?;
            let deadline = self.shards.iter().filter_map(|shard| shard.machine.next_deadline()).min();
            match deadline {
                _ if busy => {}
                Some(deadline) => self.pass_time(deadline.max(self.now_ns))?,
                None => return Ok(()),
            }
            self.step += 1;
        }
    }

    fn rest_shard(&mut self, shard: usize) -> Checked<bool> {
        let mut busy = false;
        for from in 0..self.shards.len() {
            while !self.shards[shard].inbox[from].is_empty() {
                busy = true;
                self.take_message(shard, from)?;
            }
        }
        busy |= self.drain(shard)?;
        while let Some(&index) = self.shards[shard].mobile(self.hung).first() {
            self.step += 1;
            busy = true;
            self.end_operation(shard, index, true)?;
            self.drain(shard)?;
        }
        Ok(busy)
    }

    fn check(&self) -> Checked {
        self.shards.iter().try_for_each(Shard::check)
    }

    fn check_readers(&self) -> Checked {
        for (index, reader) in self.kernel.readers().iter().enumerate() {
            ensure(reader.is_over(), Rule::OneAnswer, || format!("reader {index} waits for ever: {reader:?}"))?;
        }
        ensure(self.ledger.is_empty(), Rule::OneAnswer, || format!("{} requests were never answered", self.ledger.len()))
    }

    fn check_nothing_left(&self) -> Checked {
        self.shards.iter().try_for_each(Shard::check_empty)?;
        let (fds, idle) = (self.kernel.open_fds(), self.kernel.queue().is_empty());
        ensure(fds == 0 && idle, Rule::NothingLeft, || {
            format!("{fds} descriptors left; the kernel still waits for: {:?}", self.kernel.queue().iter().collect::<Vec<_>>())
        })
    }

    fn seen(&self) -> Seen {
        let readers = self.kernel.readers();
        let counters = || self.shards.iter().map(|shard| shard.machine.counters());
        Seen {
            steps: self.step,
            restarts: self.restarts,
            needs: counters().map(|counters| counters.needs).sum(),
            needs_failed: counters().map(|counters| counters.needs_failed).sum(),
            needs_timed_out: counters().map(|counters| counters.needs_timed_out).sum(),
            readers_served: readers.iter().filter(|reader| reader.doing == Doing::Finished).count() as u64,
            readers_failed: readers.iter().filter(|reader| matches!(reader.doing, Doing::Failed(_))).count() as u64,
        }
    }
}
