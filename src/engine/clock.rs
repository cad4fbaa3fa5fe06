//! The engine's clock: monotonic nanoseconds since it started.

use std::time::Instant;

/// Cheap to copy; all copies agree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    /// Now. It reaches 2^64 after 584 years.
    #[allow(clippy::cast_possible_truncation, reason = "see above")]
    pub(super) fn now_ns(self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}
