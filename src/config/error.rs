//! What can be wrong with settings.

use std::path::PathBuf;

use super::Origin;
use crate::front::cachefiles::BadLimits;

/// A setting that cannot be used. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file, or the directory of the drop-ins, cannot be read.
    #[error("cannot read the settings in {}: {source}; see its path and its permissions", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file's text is wrong.
    #[error("{}:{line}: {problem}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Where, from 1 on.
        line: usize,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// A value is out of bounds.
    #[error("{}{setting} = {value}: {problem}", place(origin))]
    Value {
        /// Who set it.
        origin: Origin,
        /// The setting's name in a file.
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
    /// Values that are good each, and not together.
    #[error("the settings contradict each other ({0}); please report this as a bug of infill")]
    Unexpected(String),
}

impl ConfigError {
    /// Adds who set the value.
    pub(super) fn set_by(self, origin_of: impl Fn(&str) -> Option<Origin>) -> Self {
        match self {
            Self::Value { setting, value, problem, origin } => {
                Self::Value { origin: origin_of(setting).unwrap_or(origin), setting, value, problem }
            }
            other => other,
        }
    }
}

/// Whoever gives a flag knows where.
fn place(origin: &Origin) -> String {
    match origin {
        Origin::Default | Origin::Flag(_) => String::new(),
        Origin::File { .. } | Origin::Variable(_) => format!("{origin}: "),
    }
}
