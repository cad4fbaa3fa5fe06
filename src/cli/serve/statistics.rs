//! What the daemon has done: for `--json`, `SIGUSR1` and `GET /v1/stat`.

use serde::Serialize;
use serde_json::Value;

use crate::config::LogLevel;
use crate::engine::buffers::Pages;
use crate::engine::stats::Snapshot;
use crate::engine::{Entry, Started};
use crate::ops::{log, space};

/// One JSON object.
#[derive(Serialize)]
struct Statistics<'a> {
    engine: &'a str,
    shards: usize,
    buffers: Pages,
    log_level: LogLevel,
    #[serde(flatten)]
    counts: &'a Snapshot,
    #[serde(flatten)]
    space: Option<space::Statistics>,
}

/// All of it.
pub(super) fn json(started: &Started, counts: &Snapshot, space: Option<space::Statistics>) -> Value {
    let (engine, shards, buffers) = (started.kind, started.shards, started.pages);
    let statistics = Statistics { engine, shards, buffers, log_level: log::level(), counts, space };
    serde_json::to_value(&statistics).unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }))
}

/// Makes it anew each time.
pub(super) fn shown(
    started: Started,
    engine: Entry,
    space: Option<impl Fn() -> space::Statistics + Send + Sync>,
) -> impl Fn() -> Value + Send + Sync {
    move || json(&started, &engine.snapshot(), space.as_ref().map(|space| space()))
}
