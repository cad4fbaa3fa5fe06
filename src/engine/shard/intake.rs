//! The requests of a shard that receives: read from its sources, handed on, or answered at once.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::errno::Errno;

use super::{Shard, index};
use crate::engine::EngineError;
use crate::engine::buffers::{Memory, Messages};
use crate::engine::io::{FileRef, Io, Kind, Op};
use crate::engine::machine::Answered;
use crate::engine::router::{BATCH_MAX, Router};
use crate::front::{FrontEnd, NeedRequest, Outcome};

/// How often a shard that cannot go on looks for the messages it has asked for: reading them never waits.
const READ_TRIES: u32 = 3;

/// One source of requests of a shard that receives.
pub(in crate::engine) struct Intake {
    pub(in crate::engine) front: Arc<dyn FrontEnd>,
    pub(in crate::engine) router: Router,
    /// Where messages are read into; those of a batch lie one behind the other.
    pub(in crate::engine) messages: Messages,
}

impl<I: Io> Shard<I> {
    /// On a receiving shard: has what the kernel wants read with the next wait.
    pub(super) fn receive(&mut self) {
        if self.shared.stopping.load(Ordering::Acquire) && !self.is_reading() {
            self.stop_receiving();
        }
        let now_ns = self.clock.now_ns();
        self.look_again_soon(now_ns);
        // Looked at before it is changed, so that shards share it.
        let look_again =
            self.index == 0 && self.shared.look_again.load(Ordering::Acquire) && self.shared.look_again.swap(false, Ordering::AcqRel);
        for (source, Intake { front, router, messages }) in (0..).zip(&mut self.intakes) {
            if look_again {
                router.notice();
            }
            let wanted = router.wanted(&**front, now_ns, BATCH_MAX);
            if router.is_idle() {
                self.io.watch(index(source));
            }
            for n in 0..wanted {
                let memory = messages.slot(n);
                let file = FileRef::plain(front.requests());
                self.io.push(Op { key: source, kind: Kind::Receive, file, offset: 0, memory, then: None });
            }
        }
    }

    /// Before it sleeps: looks whether a reader that just had its answer asks again. Whoever else wants the CPU has it first.
    fn look_again_soon(&mut self, now_ns: u64) {
        let looks_at = self.spin.looks_at(now_ns);
        if let Some(Intake { router, .. }) = looks_at.and_then(|source| self.intakes.get_mut(source)) {
            std::thread::yield_now();
            router.notice();
        }
    }

    fn is_reading(&self) -> bool {
        self.intakes.iter().any(|intake| intake.router.is_reading())
    }

    /// On the receiving shard, when it cannot go on: a message that was delivered must not be lost.
    pub(super) fn finish_reading(&mut self) {
        for _ in 0..READ_TRIES {
            if !self.is_reading() {
                return;
            }
            let _ = self.io.wait(Some(Duration::ZERO), &mut self.done);
            // What the front end is broken by was said already.
            let _ = self.complete();
        }
    }

    /// On the receiving shard: lets the others know that nothing more will come.
    pub(super) fn stop_receiving(&mut self) {
        for Intake { mut router, .. } in std::mem::take(&mut self.intakes) {
            router.give_up();
            self.shared.receivers.fetch_sub(1, Ordering::AcqRel);
            self.shared.wake_all();
        }
    }

    pub(super) fn received(&mut self, source: u64, memory: &Memory, result: i32, now_ns: u64) -> Result<(), EngineError> {
        // Nobody but a receiver reads, and it is there as long as it reads.
        let Some(Intake { front, router, .. }) = self.intakes.get_mut(index(source)) else { return Ok(()) };
        let read = usize::try_from(result).map(|len| memory.bytes(len)).map_err(|_| Errno::from_raw(-result));
        let mut present = std::mem::take(&mut self.present);
        let taken = router.take(&**front, read, now_ns, &mut present);
        memory.consume(result);
        present.drain(..).for_each(|need| self.allow(need, now_ns));
        self.present = present;
        taken.map(|count| self.spin.asked(index(source), count)).map_err(EngineError::Front)
    }

    /// Has a request answered whose bytes were there before it came.
    fn allow(&mut self, need: NeedRequest, since_ns: u64) {
        let NeedRequest { object, range, ticket } = need;
        self.stats().present();
        // Another shard's, where sources and objects are not shared out alike.
        let object = self.machine.handle(object);
        if let Some(handle) = object {
            self.machine.has_read(handle, &range);
        }
        if self.answers.is_full() {
            self.answer();
        }
        self.answers.push(Answered::at_once(ticket, Outcome::Done, object, range, since_ns));
    }
}
