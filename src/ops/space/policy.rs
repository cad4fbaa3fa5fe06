//! What must go, and which objects are to go for it. Pure.

use std::cmp::Reverse;

/// A limited resource of a file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resource {
    /// How much of it is free.
    pub free: u64,
    /// How much there is; 0: without limit.
    pub total: u64,
}

impl Resource {
    /// Free share in percent, rounded down; all of it where there is no limit.
    #[must_use]
    pub fn percent(self) -> u64 {
        if self.total == 0 {
            return 100;
        }
        u64::try_from(u128::from(self.free) * 100 / u128::from(self.total)).unwrap_or(100).min(100)
    }
}

/// How much room a file system has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Space in bytes, as far as anybody may use it (`f_bavail`).
    pub bytes: Resource,
    /// Inodes (`f_ffree`).
    pub files: Resource,
    /// Size of a block, in which the kernel counts space.
    pub block_bytes: u64,
}

/// Marks on the free part of one resource, in its unit; the kernel's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marks {
    /// Culling ends when this much is free.
    pub run: u64,
    /// Culling begins when less is free.
    pub cull: u64,
    /// Nothing is written or created when less is free.
    pub stop: u64,
}

/// How much is to go.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Excess {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub files: u64,
}

impl Excess {
    /// Whether nothing has to go.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.bytes == 0 && self.files == 0
    }

    /// What satisfies both.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { bytes: self.bytes.max(other.bytes), files: self.files.max(other.files) }
    }
}

/// How the free part of a resource stands to its marks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Below the stop mark: the kernel refuses to write.
    Stop,
    /// Below the cull mark.
    Cull,
    /// Below the run mark: culling goes on if it has begun.
    Low,
    /// Enough.
    Plenty,
}

impl Marks {
    /// How much `free` is. As the kernel compares (`cachefiles_has_space`, fs/cachefiles/cache.c).
    #[must_use]
    pub const fn level(self, free: u64) -> Level {
        if free < self.stop {
            Level::Stop
        } else if free < self.cull {
            Level::Cull
        } else if free < self.run {
            Level::Low
        } else {
            Level::Plenty
        }
    }
}

/// The marks on both resources.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// On free bytes.
    pub bytes: Marks,
    /// On free inodes.
    pub files: Marks,
}

impl Limits {
    /// How the scarcer resource stands to its marks.
    #[must_use]
    pub fn level(&self, room: &Room) -> Level {
        self.bytes.level(room.bytes.free).min(self.files.level(room.files.free))
    }

    /// What is missing to the run marks.
    #[must_use]
    pub const fn excess(&self, room: &Room) -> Excess {
        Excess { bytes: self.bytes.run.saturating_sub(room.bytes.free), files: self.files.run.saturating_sub(room.files.free) }
    }
}

/// An object that may go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Space that it takes.
    pub bytes: u64,
    /// Inodes that it takes, one at least.
    pub files: u64,
    /// When it was last used, in seconds and nanoseconds.
    pub last_use: (i64, i64),
    /// Whether it cannot go: it belongs to a mounted image.
    pub stays: bool,
}

/// Which objects go for `excess`, least recently used first, and not one more than needed; of those used at the same
/// time, large ones first. One that does not help (an empty object where space is short) stays. If all together are
/// not enough, all that help go.
#[must_use]
pub fn choose(candidates: &[Candidate], excess: Excess) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).filter(|&i| !candidates[i].stays).collect();
    order.sort_by_key(|&i| (candidates[i].last_use, Reverse(candidates[i].bytes)));
    let mut left = excess;
    order.retain(|&i| {
        let helps = left.files > 0 || left.bytes > 0 && candidates[i].bytes > 0;
        if helps {
            left.files = left.files.saturating_sub(candidates[i].files);
            left.bytes = left.bytes.saturating_sub(candidates[i].bytes);
        }
        helps
    });
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate() -> impl Strategy<Value = Candidate> {
        let bytes = prop_oneof![Just(0), 1u64..1000];
        (bytes, 1u64..3, 0i64..20, prop::bool::weighted(0.3)).prop_map(|(bytes, files, at, stays)| Candidate {
            bytes,
            files,
            last_use: (at, 0),
            stays,
        })
    }

    fn gives(candidates: &[Candidate], chosen: &[usize], excess: Excess) -> bool {
        let sum = |of: fn(&Candidate) -> u64| chosen.iter().map(|&i| of(&candidates[i])).sum::<u64>();
        sum(|one| one.bytes) >= excess.bytes && sum(|one| one.files) >= excess.files
    }

    proptest! {
        #[test]
        fn the_oldest_unused_go_and_no_more_than_needed(
            candidates in prop::collection::vec(candidate(), 0..40), bytes in 0u64..8000, files in 0u64..20,
        ) {
            let excess = Excess { bytes, files };
            let chosen = choose(&candidates, excess);
            prop_assert!(chosen.iter().all(|&i| !candidates[i].stays), "one that stays was chosen");
            let helping = |i: &usize| !candidates[*i].stays && (excess.files > 0 || candidates[*i].bytes > 0);
            let all: Vec<usize> = (0..candidates.len()).filter(helping).collect();
            // Enough, if there is enough at all.
            let enough = gives(&candidates, &chosen, excess);
            prop_assert!(enough || !gives(&candidates, &all, excess), "{chosen:?} is not enough");
            // None too many: without the last one it would not be enough.
            if let Some((_, others)) = chosen.split_last() {
                prop_assert!(!gives(&candidates, others, excess), "{chosen:?} is more than needed");
            }
            // In order, and nobody older who would have helped with space stays.
            prop_assert!(chosen.is_sorted_by_key(|&i| candidates[i].last_use));
            if let Some(&last) = chosen.last() {
                let passed_over = all.iter().find(|&&i| {
                    !chosen.contains(&i) && candidates[i].bytes > 0 && candidates[i].last_use < candidates[last].last_use
                });
                prop_assert_eq!(passed_over, None);
            }
        }

        #[test]
        fn levels_are_those_of_the_kernel(stop in 0u64..50, more in 1u64..50, even_more in 1u64..50, free in 0u64..200) {
            let marks = Marks { run: stop + more + even_more, cull: stop + more, stop };
            let level = marks.level(free);
            prop_assert_eq!(level == Level::Stop, free < marks.stop);
            prop_assert_eq!(level <= Level::Cull, free < marks.cull);
            prop_assert_eq!(level == Level::Plenty, free >= marks.run);
        }
    }

    #[test]
    fn shares_are_rounded_down_and_no_limit_means_plenty() {
        let percent = |free, total| Resource { free, total }.percent();
        assert_eq!((percent(19, 1000), percent(0, 0), percent(u64::MAX, u64::MAX), percent(2, 1)), (1, 100, 100, 100));
        let none = Marks { run: 0, cull: 0, stop: 0 };
        assert_eq!(none.level(0), Level::Plenty);
    }
}
