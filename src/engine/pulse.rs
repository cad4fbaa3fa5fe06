//! Whether all shards go on, for whoever ends a daemon that does not: a service manager's watchdog.
//!
//! A shard that has nothing to do takes a turn when its bell rings, and counts it. One that hangs, in a system call or in a
//! loop of its own, counts none. So each look rings all the bells, and the next one wants to see what came of it.

use std::time::{Duration, Instant};

use super::stats::ShardStats;
use super::{Engine, Shared};

/// What was seen of the shards so far.
#[derive(Debug, Default)]
pub struct Pulse(Vec<Beat>);

/// What was seen of one.
#[derive(Clone, Copy, Debug)]
struct Beat {
    turns: u64,
    since: Instant,
    is_still: bool,
}

/// A shard that has taken no turn since the last look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Still {
    /// Which one.
    pub shard: usize,
    /// How long ago it was first seen with as many turns.
    pub lasts: Duration,
    /// The last look found it well.
    pub is_new: bool,
}

impl Pulse {
    /// Compares how many turns each shard has taken with what was seen last, and says which have taken none. The first look
    /// finds all of them well.
    fn compare(&mut self, turns: impl Iterator<Item = u64>, now: Instant) -> Vec<Still> {
        let mut still = Vec::new();
        for (shard, turns) in turns.enumerate() {
            match self.0.get_mut(shard) {
                None => self.0.push(Beat { turns, since: now, is_still: false }),
                Some(beat) if beat.turns != turns => *beat = Beat { turns, since: now, is_still: false },
                Some(beat) => {
                    let is_new = !std::mem::replace(&mut beat.is_still, true);
                    still.push(Still { shard, lasts: now - beat.since, is_new });
                }
            }
        }
        still
    }
}

impl Engine {
    /// Says which shards have taken no turn since the last look, and has all of them take one until the next.
    #[must_use]
    pub fn look(&self, pulse: &mut Pulse) -> Vec<Still> {
        self.shared().look(pulse)
    }
}

impl Shared {
    fn look(&self, pulse: &mut Pulse) -> Vec<Still> {
        let still = pulse.compare(self.shards.iter().map(ShardStats::turns), Instant::now());
        self.wake_all();
        still
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_that_hangs_is_named_until_it_goes_on() {
        let (mut pulse, start) = (Pulse::default(), Instant::now());
        let mut look = |turns: [u64; 2], after_s| pulse.compare(turns.into_iter(), start + Duration::from_secs(after_s));
        let hangs = |lasts_s, is_new| vec![Still { shard: 1, lasts: Duration::from_secs(lasts_s), is_new }];
        assert_eq!(look([0, 0], 0), [], "before the first bell");
        assert_eq!(look([1, 7], 5), []);
        assert_eq!(look([2, 7], 10), hangs(5, true));
        assert_eq!(look([3, 7], 15), hangs(10, false));
        assert_eq!(look([4, 8], 20), []);
        assert_eq!(look([5, 8], 25), hangs(5, true));
        // A counter that has gone all the way round has moved.
        assert_eq!(look([6, 0], 30), []);
    }
}
