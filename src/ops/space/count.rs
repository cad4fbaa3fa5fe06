//! When the cache is counted: often enough to keep to the limits, and no more, for a count reads 257 directories for
//! each volume. Pure.

use std::time::Duration;

/// Longest time for which the statistics tell an old size of the cache.
const AGE_MAX: Duration = Duration::from_secs(60);
/// A count is followed by so many times its duration without one.
const REST: u32 = 20;
/// For how long, at least, a count holds after which nothing could be removed: fills that find no room meanwhile fail
/// at once.
const IN_VAIN_MIN: Duration = Duration::from_secs(1);

/// The last count of the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Count {
    /// How long it took.
    pub(super) took: Duration,
    /// Free space on the file system before it.
    pub(super) free_bytes: u64,
    /// Something had to go, and nothing could.
    pub(super) in_vain: bool,
    /// Something was closed since: it may have got its name, and can go.
    pub(super) closed_since: bool,
}

/// What another count would be for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Need {
    /// Room must be made.
    Room,
    /// A budget is to be kept.
    Budget,
    /// The statistics.
    Statistics,
}

impl Count {
    /// For how long there need not be another one.
    pub(super) fn rest(&self) -> Duration {
        let rest = self.took * REST;
        if self.in_vain { rest.max(IN_VAIN_MIN) } else { rest }
    }

    /// Whether it says too little, being so old, when so much is free. Room that can be made is made without a rest.
    pub(super) fn is_outdated(&self, need: Need, age: Duration, free_bytes: u64) -> bool {
        let rested = age >= self.rest();
        match need {
            Need::Room => rested || self.closed_since || !self.in_vain,
            Need::Budget => rested && (self.closed_since || self.free_bytes != free_bytes || age > AGE_MAX),
            Need::Statistics => rested && age > AGE_MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn room_is_made_at_once_unless_there_is_none_to_make() {
        let count = Count { took: ms(500), free_bytes: 7, in_vain: false, closed_since: false };
        assert!(count.is_outdated(Need::Room, ms(200), 7));
        let in_vain = Count { in_vain: true, ..count };
        assert!(!in_vain.is_outdated(Need::Room, ms(9_999), 7) && in_vain.is_outdated(Need::Room, ms(10_000), 7));
        assert!(Count { closed_since: true, ..in_vain }.is_outdated(Need::Room, ms(200), 7));
        assert_eq!(Count { took: ms(1), ..in_vain }.rest(), IN_VAIN_MIN);
    }

    #[test]
    fn a_large_cache_is_counted_less_often() {
        let count = Count { took: ms(500), free_bytes: 7, in_vain: false, closed_since: false };
        let budget = |count: Count, age_ms, free| count.is_outdated(Need::Budget, ms(age_ms), free);
        assert!(!budget(count, 5_000, 8) && budget(count, 10_000, 8) && !budget(count, 10_000, 7));
        let closed = Count { closed_since: true, ..count };
        assert!(!budget(closed, 5_000, 7) && budget(closed, 10_000, 7));
        assert!(budget(Count { took: ms(10), ..count }, 5_000, 8));
        assert!(!count.is_outdated(Need::Statistics, AGE_MAX, 8) && count.is_outdated(Need::Statistics, AGE_MAX + ms(1), 7));
    }
}
