//! The machine alone: requests for one page each, each with a fill of its own, and a driver whose operations end at once.

use std::sync::Arc;

use nix::time::ClockId;

use super::engine::MachineFigures;
use super::memdisk::clock_ns;
use crate::engine::FILLS_PER_NEED;
use crate::engine::machine::{Action, Limits, Machine, OpKey};
use crate::engine::plan::{Completion, Window};
use crate::front::{ObjectId, Outcome};
use crate::lab::{LabError, Result};
use crate::store::{Blob, Data, Extent, SourceFile};

/// What is asked for at a time.
pub const PAGE_BYTES: u64 = 4096;
/// Requests that wait at a time.
const DEPTH: u64 = 32;
/// Pages of the object; a request each.
const PAGES: u64 = 1 << 18;
/// Passes over all pages: the first brings everything to its final size, the fastest of the others counts.
const PASSES: u32 = 6;
/// Odd, so that its multiples visit every page, in no order that helps.
const STRIDE: u64 = 0x9E37_79B9;
const OBJECT: ObjectId = ObjectId(7);

/// A blob that is one file.
#[derive(Debug)]
struct Flat;

impl Blob for Flat {
    fn len_bytes(&self) -> u64 {
        PAGES * PAGE_BYTES
    }

    fn extent(&self, offset: u64) -> Extent {
        Extent { len_bytes: self.len_bytes() - offset, data: Data::Read { file: 0, offset } }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &[]
    }
}

/// A machine with one open object, nothing of which is there.
#[derive(Debug)]
pub struct Bare {
    machine: Machine<u64>,
    ended: Vec<(OpKey, i32)>,
    now_ns: u64,
}

impl Default for Bare {
    fn default() -> Self {
        // More than are used: one file system gets three quarters of them.
        let slots = u32::try_from(2 * DEPTH).unwrap_or(u32::MAX);
        let mut machine = Machine::new(Limits {
            page_bytes: PAGE_BYTES,
            fill_max_bytes: 1 << 20,
            window: Window::Fixed(PAGE_BYTES),
            completion: Completion::default(),
            slots,
            fills_per_need: FILLS_PER_NEED,
            timeout_ns: u64::MAX,
            probe: false,
            sinks_know: false,
        });
        machine.open(OBJECT, Arc::new(Flat));
        Self { machine, ended: Vec::new(), now_ns: 0 }
    }
}

impl Bare {
    /// Asks for `requests` pages, [`DEPTH`] at a time, and drives the machine until each has its answer. Gives the
    /// number of good ones.
    pub fn pass(&mut self, requests: u64) -> u64 {
        self.machine.forget(OBJECT, &(0..PAGES * PAGE_BYTES));
        let (mut asked, mut good) = (0, 0);
        while asked < requests {
            let batch = asked..(asked + DEPTH).min(requests);
            asked = batch.end;
            for ticket in batch {
                let start = page(ticket, PAGES) * PAGE_BYTES;
                self.machine.need(OBJECT, start..start + PAGE_BYTES, ticket, self.now_ns);
            }
            good += self.turns();
        }
        good
    }

    /// Turns until nothing is in flight.
    fn turns(&mut self) -> u64 {
        let mut good = 0;
        loop {
            while let Some(action) = self.machine.pop_action() {
                match action {
                    Action::Read { op, len, .. } | Action::Write { op, len, .. } => {
                        self.ended.push((op, i32::try_from(len).unwrap_or(i32::MAX)));
                    }
                    Action::Answer(answered) => good += u64::from(answered.outcome == Outcome::Done),
                    Action::Look { .. } | Action::Filled { .. } | Action::Release { .. } => {}
                }
            }
            // As a shard does.
            drop(self.machine.grown());
            if self.ended.is_empty() {
                return good;
            }
            self.now_ns += 1000;
            self.machine.tick(self.now_ns);
            for (op, result) in self.ended.drain(..) {
                self.machine.io_done(op, result, self.now_ns);
            }
        }
    }
}

/// The page of so many (a power of two) that a request asks for: each once.
pub(super) const fn page(request: u64, pages: u64) -> u64 {
    request.wrapping_mul(STRIDE) % pages
}

/// Measures the machine. `allocations` tells how often memory was allocated so far, if the program counts that.
///
/// # Errors
/// A request was not answered well, or there is no clock.
pub(super) fn measure(allocations: Option<fn() -> u64>) -> Result<MachineFigures> {
    let mut bare = Bare::default();
    let count = || allocations.map(|count| count());
    let mut best_ns = u64::MAX;
    let mut allocated = None;
    for pass in 0..PASSES {
        let (before, began_ns) = (count(), clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)?);
        let good = bare.pass(PAGES);
        let took_ns = clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)? - began_ns;
        if good != PAGES {
            return Err(LabError::Failed(format!("the machine answered {good} of {PAGES} requests well")));
        }
        if pass > 0 {
            best_ns = best_ns.min(took_ns);
            let here = count().zip(before).map(|(after, before)| after - before);
            allocated = here.map(|here| here + allocated.unwrap_or(0));
        }
    }
    Ok(MachineFigures {
        requests_per_s: PAGES as f64 * 1e9 / best_ns as f64,
        ns_per_request: best_ns as f64 / PAGES as f64,
        allocations_per_request: allocated.map(|n| n as f64 / (PAGES * u64::from(PASSES - 1)) as f64),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_asked_for_once_and_answered() {
        let mut pages: Vec<u64> = (0..PAGES).map(|request| page(request, PAGES)).collect();
        pages.sort_unstable();
        assert!(pages.iter().copied().eq(0..PAGES));
        assert_eq!(Bare::default().pass(1000), 1000);
    }
}
