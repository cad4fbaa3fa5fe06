//! `SIGHUP`: the settings files are read again, and what can be applied while the daemon serves is applied. Flags and variables
//! stay what they were at the start, and win as they did then.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::config::{Config, Given, Resolved, keys};
use crate::engine::{Entry, Tuning};
use crate::mount::Service;
use crate::ops::log;
use crate::ops::space::Steward;

/// What settings are applied to.
pub(super) struct Live<'a> {
    pub(super) engine: Entry,
    pub(super) steward: Option<&'a Steward>,
    pub(super) mounts: Option<&'a Service>,
}

/// Settings with their origins.
pub(super) type Shown = Arc<Mutex<Map<String, Value>>>;

/// Applies a setting; `false`: not now.
type Apply = fn(&Live<'_>, &Config) -> bool;

/// The settings that can be applied while the daemon serves, and how.
const APPLIED: [(&str, Apply); 7] = [
    ("cache_bytes", |live, config| {
        live.steward.inspect(|steward| steward.set_budget(config.cache_bytes));
        true
    }),
    ("complete_rate", tune),
    ("drain_timeout_ms", |_, _| true), // It is looked at when the daemon stops.
    ("log_level", |_, config| {
        log::set_level(config.log_level);
        true
    }),
    ("open_timeout_ms", tune),
    ("read_ahead", tune),
    ("request_timeout_ms", tune),
];

/// Whether `SIGHUP` applies a setting; the others need a restart.
#[must_use]
pub(in crate::cli) fn is_applied(name: &str) -> bool {
    apply(name).is_some()
}

fn apply(name: &str) -> Option<Apply> {
    APPLIED.iter().find(|(known, _)| *known == name).map(|(_, apply)| *apply)
}

fn tune(live: &Live<'_>, config: &Config) -> bool {
    let Config { open_timeout, request_timeout, completion, .. } = *config;
    if let Some(mounts) = live.mounts {
        mounts.set(open_timeout + request_timeout, config.read_ahead.bytes());
    }
    live.engine.tune(Tuning { open_timeout, request_timeout, complete_bytes_per_s: completion.bytes_per_s })
}

/// See the module's description.
pub(super) struct Reload {
    file: Option<PathBuf>,
    given: Given,
    /// The settings by which the daemon runs now, as they are shown.
    running: BTreeMap<&'static str, String>,
    /// The same for the control socket: with the origin of each.
    shown: Shown,
    /// How long a stop waits.
    pub(super) drain_timeout: Duration,
}

impl Reload {
    /// Of a daemon that starts with `settings`, which `file` and `given` made.
    pub(super) fn new(file: Option<PathBuf>, given: Given, settings: &Resolved) -> Self {
        let running = keys::all().map(|key| (key.name(), settings.text(key))).collect();
        let shown = Arc::new(Mutex::new(settings.described()));
        Self { file, given, running, shown, drain_timeout: settings.config.drain_timeout }
    }

    /// The settings by which the daemon runs, for others.
    pub(super) fn shown(&self) -> Shown {
        Arc::clone(&self.shown)
    }

    /// Reads the files again, applies what can be, and says the rest.
    pub(super) fn reload(&mut self, live: &Live<'_>) {
        match self.given.settings(self.file.as_deref()).and_then(Resolved::with_store) {
            Ok(settings) => self.take_over(&settings, live),
            Err(error) => tracing::error!("not reloaded, all settings stay as they are: {error}"),
        }
    }

    fn take_over(&mut self, settings: &Resolved, live: &Live<'_>) {
        let texts = keys::all().map(|key| (key.name(), settings.text(key)));
        let changed: Vec<_> = texts.filter(|(name, text)| self.running.get(name) != Some(text)).collect();
        let (now, later): (Vec<_>, Vec<_>) = changed.into_iter().partition(|(name, _)| is_applied(name));
        // So that it is said, whether the log becomes shorter or longer.
        if now.iter().any(|(name, _)| *name == "log_level") {
            log::set_level(log::level().max(settings.config.log_level));
        }
        if !now.is_empty() || later.is_empty() {
            let said: Vec<_> = now.iter().map(|change| self.describe(change)).collect();
            tracing::info!("reloaded: {}", if said.is_empty() { "nothing has changed".to_owned() } else { said.join(", ") });
        }
        for change in &later {
            tracing::warn!("not reloaded, restart infill for it: {}", self.describe(change));
        }
        let mut described = settings.described();
        for (name, text) in now {
            if apply(name).is_some_and(|apply| apply(live, &settings.config)) {
                self.running.insert(name, text);
                if let Some(described) = described.remove(name) {
                    self.shown.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), described);
                }
            } else {
                tracing::error!("{name} is not applied: a shard is too busy or hangs; send SIGHUP again");
            }
        }
        self.drain_timeout = settings.config.drain_timeout;
    }

    fn describe(&self, (name, text): &(&'static str, String)) -> String {
        format!("{name} = {text} (was {})", self.running.get(name).map_or("none", String::as_str))
    }
}
