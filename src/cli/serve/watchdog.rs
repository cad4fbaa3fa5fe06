//! What the service manager is told while the daemon serves: that its shards go on, and in one line how it does.

use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::engine::pulse::{Pulse, Still};
use crate::ops::notify::{self, Notify};

/// How often it is told where it keeps no watchdog.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// Looks at the engine from time to time.
pub(super) struct Watchdog {
    notify: Notify,
    /// The manager ends this process if it hears nothing for so long.
    limit: Option<Duration>,
    last: Instant,
    pulse: Pulse,
    requests: u64,
}

impl Watchdog {
    /// `None`: nobody listens. To be called before the process gives up making sockets.
    pub(super) fn from_env() -> Option<Self> {
        let notify = Notify::from_env()?;
        Some(Self { notify, limit: notify::watchdog(), last: Instant::now(), pulse: Pulse::default(), requests: 0 })
    }

    /// Twice as often as it must be.
    fn every(&self) -> Duration {
        self.limit.map_or(STATUS_EVERY, |limit| limit / 2)
    }

    /// How long it is until the next look.
    pub(super) fn due_in(&self) -> Duration {
        self.every().saturating_sub(self.last.elapsed())
    }

    /// Looks if it is time. The manager hears that all is well only if every shard has taken a turn since the last look:
    /// else it ends the daemon, and starts another that goes on with all that waits.
    pub(super) fn look(&mut self, front_end: &str, engine: &Engine) {
        if !self.due_in().is_zero() {
            return;
        }
        let passed = self.last.elapsed();
        self.last = Instant::now();
        let still = engine.look(&mut self.pulse);
        still.iter().filter(|still| still.is_new).for_each(|still| self.complain(still));
        self.notify.status(&self.status(front_end, engine, passed, &still));
        self.requests = engine.snapshot().needs;
        if still.is_empty() && self.limit.is_some() {
            self.notify.alive();
        }
    }

    fn complain(&self, still: &Still) {
        tracing::error!(
            shard = still.shard,
            since_ms = still.lasts.as_millis(),
            "a shard hangs{}; see /proc/PID/task/*/stack and the disks",
            if self.limit.is_some() { ", so the service manager's watchdog is not fed and will restart infill" } else { "" }
        );
    }

    fn status(&self, front_end: &str, engine: &Engine, passed: Duration, still: &[Still]) -> String {
        let counts = engine.snapshot();
        if let Some(still) = still.first() {
            return format!("{front_end}: shard {} hangs, {} requests wait", still.shard, counts.pending);
        }
        let per_s = u128::from(counts.needs.saturating_sub(self.requests)) * 1000 / passed.as_millis().max(1);
        format!("{front_end}: {} objects open, {per_s} requests/s, {} wait, {} failed", counts.objects, counts.pending, counts.needs_failed)
    }
}
