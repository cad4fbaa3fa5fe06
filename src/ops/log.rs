//! The log: lines on standard error, for people or as JSON.

use std::io::IsTerminal;
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::config::{LogFormat, LogLevel};

/// What is logged now, and the way to change that.
static NOW: OnceLock<Mutex<(LogLevel, reload::Handle<LevelFilter, Registry>)>> = OnceLock::new();

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
        let _ = NOW.set(Mutex::new((level, handle)));
    }
}

/// The least important messages that are logged.
#[must_use]
pub fn level() -> LogLevel {
    NOW.get().map_or_else(LogLevel::default, |now| now.lock().unwrap_or_else(PoisonError::into_inner).0)
}

/// Logs these from now on.
///
/// # Errors
/// Nothing is logged in this process.
pub fn set_level(level: LogLevel) -> Result<(), String> {
    let now = NOW.get().ok_or("this process has no log; start it as infill serve")?;
    let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
    let before = std::mem::replace(&mut now.0, level);
    now.1.reload(filter(level)).map_err(|error| error.to_string())?;
    drop(now);
    if before != level {
        tracing::info!(before = ?before, now = ?level, "log level");
    }
    Ok(())
}

const fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    }
}
