//! What can be wrong with settings.

use std::path::PathBuf;

use crate::front::cachefiles::BadLimits;

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the settings file {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file's text is wrong.
    #[error("settings file {}: {message}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A value is out of bounds.
    #[error("{setting} = {value}: {problem}")]
    Value {
        /// The setting's name in the file.
        setting: &'static str,
        /// What was given.
        value: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// Limits that contradict each other.
    #[error("bad culling limits: {0}")]
    Cull(#[from] BadLimits),
    /// No store was named.
    #[error(
        "no store: name at least one place that holds blobs, with --store dir:PATH or --store oci:PATH, or store = [...] in the settings file"
    )]
    NoStore,
}
