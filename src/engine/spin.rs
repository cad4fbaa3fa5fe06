//! Looking for the next question for a moment before a shard sleeps, where that pays.
//!
//! A reader that is alone asks again right after its answer. A shard that sleeps then has to be woken for each question, which
//! takes several microseconds, and tens of them in a virtual machine. Whether looking pays is seen by trying.

/// How long is looked.
const SPIN_NS: u64 = 40_000;
/// From so many answers given together on their readers keep a shard awake by themselves.
const READERS_MAX: usize = 3;
/// A question that came while it was looked for adds one, one that did not takes two away; below 0 nothing is looked for.
const SCORE_MAX: i32 = 8;
/// How much there is to make up for before it is tried again.
const REST: i32 = -64;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Spin {
    /// Where the last question came from.
    source: usize,
    until_ns: Option<u64>,
    score: i32,
}

impl Spin {
    /// So many questions came from a source.
    pub(super) fn asked(&mut self, source: usize, questions: usize) {
        if questions > 0 {
            self.source = source;
            if self.until_ns.take().is_some() {
                self.score = (self.score + 1).min(SCORE_MAX);
            }
        }
    }

    /// So many answers were given together.
    pub(super) fn answered(&mut self, readers: usize, now_ns: u64) {
        if readers == 0 || readers > READERS_MAX {
            return;
        }
        // What rests comes back by being passed over.
        self.score += i32::from(self.score < 0);
        if self.score >= 0 {
            self.until_ns = Some(now_ns + SPIN_NS);
        }
    }

    /// The source to look at, if it is time to.
    pub(super) fn looks_at(&mut self, now_ns: u64) -> Option<usize> {
        let until_ns = self.until_ns?;
        if now_ns < until_ns {
            return Some(self.source);
        }
        self.until_ns = None;
        self.score = if self.score < 2 { REST } else { self.score - 2 };
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that thinks for so long after each answer, for so many questions. Gives how often it found the shard awake, and
    /// for how long that looked in vain.
    fn read(spin: &mut Spin, think_ns: u64, questions: usize) -> (usize, u64) {
        let (mut now_ns, mut awake, mut vain_ns) = (0, 0, 0);
        for _ in 0..questions {
            spin.answered(1, now_ns);
            let asks_ns = now_ns + think_ns;
            let began_ns = now_ns;
            while spin.looks_at(now_ns) == Some(0) && now_ns < asks_ns {
                now_ns += 1000;
            }
            if now_ns >= asks_ns {
                awake += 1
            } else {
                vain_ns += now_ns - began_ns
            }
            now_ns = asks_ns;
            spin.asked(0, 1);
        }
        (awake, vain_ns)
    }

    #[test]
    fn quick_readers_find_it_awake_and_slow_ones_cost_little() {
        let mut spin = Spin::default();
        assert_eq!(read(&mut spin, 10_000, 1000), (1000, 0));
        let (awake, vain_ns) = read(&mut spin, 200_000, 1000);
        assert!(awake == 0 && vain_ns < 30 * SPIN_NS, "{awake} {vain_ns}");
        let (awake, _) = read(&mut spin, 10_000, 1000);
        assert!(awake > 900, "it comes back: {awake}");
        spin.answered(READERS_MAX + 1, 0);
        assert_eq!(spin.looks_at(0), None, "a crowd");
    }
}
