//! The log: lines on standard error, for people or as JSON. Its level can be changed while the daemon runs.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};

use crate::config::{LogFormat, LogLevel};

/// The level of this process's log, once it was started.
static LEVEL: OnceLock<Handle<LevelFilter, Registry>> = OnceLock::new();

/// Starts logging; to be called once.
pub fn start(level: LogLevel, format: LogFormat) {
    let (filter, handle) = reload::Layer::new(filter(level));
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    // A second start, in a test, changes nothing.
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        let _ = LEVEL.set(handle);
    }
}

/// Logs from now on what is at least as important as `level`; before [`start`] it does nothing.
pub fn set_level(level: LogLevel) {
    if let Some(handle) = LEVEL.get() {
        // It fails only without a subscriber, and that one lives as long as the process.
        let _ = handle.reload(filter(level));
    }
}

/// The least important messages that are logged; before [`start`], the default.
#[must_use]
pub fn level() -> LogLevel {
    match LEVEL.get().and_then(Handle::clone_current) {
        Some(LevelFilter::OFF | LevelFilter::ERROR) => LogLevel::Error,
        Some(LevelFilter::WARN) => LogLevel::Warn,
        Some(LevelFilter::INFO) | None => LogLevel::Info,
        Some(LevelFilter::DEBUG | LevelFilter::TRACE) => LogLevel::Debug,
    }
}

const fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For all of this process, so it ends as it began.
    #[test]
    fn the_level_changes_while_it_runs() {
        start(LogLevel::Error, LogFormat::Text);
        for set in [LogLevel::Debug, LogLevel::Warn, LogLevel::Info, LogLevel::Error] {
            set_level(set);
            assert_eq!(level(), set);
            assert_eq!(tracing::enabled!(tracing::Level::DEBUG), set == LogLevel::Debug);
            assert_eq!(tracing::enabled!(tracing::Level::WARN), set != LogLevel::Error);
        }
    }
}
