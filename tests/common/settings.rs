//! Settings of an engine that several tests start from.

use std::sync::Arc;
use std::time::Duration;

use infill::engine::plan::{Completion, Window};
use infill::engine::{EngineKind, Settings};

/// Few and small buffers, and times that no machine is too slow for: an open that is late is refused, and its object lost.
pub(crate) fn settings(kind: EngineKind, shards: usize) -> Settings {
    Settings {
        shards,
        seats: Vec::new(),
        kind,
        window: Window::Fixed(128 << 10),
        completion: Completion::default(),
        slot_bytes: 64 << 10,
        slots: 4,
        workers: 2,
        fd_budget: 1000,
        open_timeout: Duration::from_secs(20),
        request_timeout: Duration::from_secs(30),
        no_room: None,
        tracer: None,
        remembered: Arc::default(),
        leave_rest: false,
    }
}
