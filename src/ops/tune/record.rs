//! What `infill tune --apply` changed, and what was there before. It is written before each change, so that what a crash leaves
//! half done can be changed back.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::TuneError;
use super::profile::Name;
use super::root::Root;

/// Where it is.
pub const RECORD: &str = "/var/lib/infill/tune.json";
/// Version of its form.
const VERSION: u32 = 1;

/// All that is changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// The profile that was applied last.
    pub profile: Name,
    /// Every change, in the order in which they were made.
    pub changes: Vec<Change>,
    /// Directories that were made for that, the outer ones first.
    #[serde(default)]
    pub dirs: Vec<PathBuf>,
}

/// One of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Change {
    /// A file that was not there.
    File {
        /// Where.
        path: PathBuf,
        /// What was written.
        text: String,
        /// What had been written by an earlier change, which a crash may have left there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        older: Option<String>,
    },
    /// A value of the kernel's.
    Value {
        /// Where.
        path: PathBuf,
        /// What it was.
        before: String,
        /// What it was set to.
        after: String,
    },
}

impl Change {
    /// What was changed.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } | Self::Value { path, .. } => path,
        }
    }
}

impl Record {
    /// Nothing is changed yet.
    #[must_use]
    pub const fn new(profile: Name) -> Self {
        Self { version: VERSION, profile, changes: Vec::new(), dirs: Vec::new() }
    }

    /// The change of a path.
    #[must_use]
    pub fn of(&self, path: &Path) -> Option<&Change> {
        self.changes.iter().find(|change| change.path() == path)
    }

    /// Notes a change in the place of what was noted of its path.
    pub fn note(&mut self, change: Change) {
        match self.changes.iter_mut().find(|noted| noted.path() == change.path()) {
            Some(noted) => *noted = change,
            None => self.changes.push(change),
        }
    }

    /// Reads it. `None`: nothing is changed.
    ///
    /// # Errors
    /// It cannot be read, or is no record.
    pub fn load(root: &Root) -> Result<Option<Self>, TuneError> {
        let path = root.at(RECORD.as_ref());
        let Some(text) = root.read(RECORD.as_ref()).map_err(TuneError::io("read", &path))? else {
            return Ok(None);
        };
        let bad = |why: String| TuneError::BadRecord { path: path.clone(), why };
        let record: Self = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        if record.version == VERSION { Ok(Some(record)) } else { Err(bad(format!("version {}", record.version))) }
    }

    /// Writes it; one without changes is removed.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, root: &Root) -> Result<(), TuneError> {
        let path = root.at(RECORD.as_ref());
        let failed = TuneError::io("write", &path);
        if self.changes.is_empty() {
            return root.remove(RECORD.as_ref()).map_err(failed);
        }
        // A record is made of texts only, which always have a JSON form.
        let text = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        root.write(RECORD.as_ref(), &text).map_err(failed)
    }
}
