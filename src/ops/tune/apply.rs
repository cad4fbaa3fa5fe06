//! Changing what a profile says, all of it or nothing, and changing it back.
//!
//! Every change is in the record before it is made (`record`), so that what a crash leaves can be taken back; and a failing step
//! takes those before it back at once.

use std::path::{Path, PathBuf};

use super::TuneError;
use super::files::{Wanted, wanted};
use super::knob::{Value, values};
use super::profile::{Name, Profile};
use super::record::{Change, RECORD, Record};
use super::root::Root;

/// What was done.
#[derive(Clone, Default, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Done {
    /// Files and values that are something else now.
    pub changed: Vec<PathBuf>,
    /// How many were right already.
    pub unchanged: usize,
}

/// Applies a profile. What another profile has set before, and this one does not, is changed back.
///
/// # Errors
/// A file that is not ours is in the way, and nothing was changed; or a step failed, and all before it were taken back, or the error
/// says which were not.
pub fn apply(root: &Root, name: Name) -> Result<Done, TuneError> {
    let _alone = root.lock()?;
    let profile = Profile::of(name);
    let knobs = profile.fitting(root);
    let (files, values) = (wanted(&knobs), values(&knobs, root));
    let old = Record::load(root)?;
    let mut run = Run::new(root, old.unwrap_or_else(|| Record::new(name)));
    // A value that is more than enough now, by somebody else, is still the profile's.
    let is_value = |path: &Path| profile.knobs.iter().any(|knob| knob.set.path().is_some_and(|of_knob| of_knob == path));
    let is_wanted = |path: &Path| files.iter().any(|file| file.path == path) || is_value(path);
    let obsolete: Vec<Change> = run.record.changes.iter().filter(|change| !is_wanted(change.path())).cloned().collect();
    for path in files.iter().map(|file| &file.path).chain(obsolete.iter().filter_map(file_path)) {
        run.must_be_ours(path)?;
    }
    let done = run.all(name, &obsolete, &files, &values);
    done.map_err(|error| run.back_out(error))
}

/// Changes back what is applied.
///
/// # Errors
/// Nothing is applied; or something could not be changed back, as the error says, and stays in the record.
pub fn revert(root: &Root) -> Result<Done, TuneError> {
    let _alone = root.lock()?;
    let Some(mut record) = Record::load(root)? else {
        return Err(TuneError::NothingApplied(root.at(RECORD.as_ref())));
    };
    let (mut done, mut foreign, mut failed) = (Done::default(), Vec::new(), Vec::new());
    let mut left = Vec::new();
    for change in record.changes.iter().rev() {
        match take_back(root, change) {
            Ok(true) => done.changed.push(change.path().to_owned()),
            Ok(false) => done.unchanged += 1,
            Err(error) => {
                left.push(change.clone());
                match error {
                    TuneError::Changed(paths) => foreign.extend(paths),
                    error => failed.push(error),
                }
            }
        }
    }
    left.reverse();
    record.changes = left;
    record.save(root)?;
    if let Some(first) = failed.first() {
        let left = record.changes.iter().map(|change| change.path().to_owned()).collect();
        return Err(TuneError::Stuck { first: first.to_string(), left });
    }
    if !foreign.is_empty() {
        return Err(TuneError::Changed(foreign));
    }
    remove_dirs(root, &record.dirs);
    Ok(done)
}

/// Takes one change back. Whether that changed anything.
fn take_back(root: &Root, change: &Change) -> Result<bool, TuneError> {
    let at = root.at(change.path());
    match change {
        Change::File { path, text, older } => match root.read(path).map_err(TuneError::io("read", &at))? {
            None => Ok(false),
            Some(found) if found == *text || Some(&found) == older.as_ref() => {
                root.remove(path).map_err(TuneError::io("remove", &at)).map(|()| true)
            }
            Some(_) => Err(TuneError::Changed(vec![at])),
        },
        Change::Value { path, before, .. } => match root.value(path).map_err(TuneError::io("read", &at))? {
            // The module is gone, and its setting with it.
            None => Ok(false),
            Some(found) if found == *before => Ok(false),
            Some(_) => root.set(path, before).map_err(TuneError::io("write to", &at)).map(|()| true),
        },
    }
}

/// Removes directories that were made for a file, unless others have put something there.
fn remove_dirs(root: &Root, dirs: &[PathBuf]) {
    for dir in dirs.iter().rev() {
        let _ = std::fs::remove_dir(root.at(dir));
    }
}

const fn file_path(change: &Change) -> Option<&PathBuf> {
    match change {
        Change::File { path, .. } => Some(path),
        Change::Value { .. } => None,
    }
}

/// What was there before a step of this run.
enum Before {
    File(PathBuf, Option<String>),
    Value(PathBuf, String),
}

impl Before {
    fn path(&self) -> &Path {
        match self {
            Self::File(path, _) | Self::Value(path, _) => path,
        }
    }

    /// What is as it was is left: a step that failed may have changed nothing, and could not be done a second time either.
    fn restore(&self, root: &Root) -> std::io::Result<()> {
        match self {
            Self::File(path, before) if root.read(path)? == *before => Ok(()),
            Self::Value(path, before) if root.value(path)?.as_ref() == Some(before) => Ok(()),
            Self::File(path, Some(text)) => root.write(path, text),
            Self::File(path, None) => root.remove(path),
            Self::Value(path, value) => root.set(path, value),
        }
    }
}

/// One application.
struct Run<'a> {
    root: &'a Root,
    /// What was noted before it.
    old: Record,
    /// What is noted now.
    record: Record,
    /// Its steps so far.
    steps: Vec<Before>,
    done: Done,
}

impl<'a> Run<'a> {
    fn new(root: &'a Root, record: Record) -> Self {
        Self { root, old: record.clone(), record, steps: Vec::new(), done: Done::default() }
    }

    /// A file that is there must be what the record says.
    fn must_be_ours(&self, path: &Path) -> Result<(), TuneError> {
        let at = self.root.at(path);
        let Some(found) = self.root.read(path).map_err(TuneError::io("read", &at))? else { return Ok(()) };
        match self.record.of(path) {
            Some(Change::File { text, older, .. }) if *text == found || older.as_ref() == Some(&found) => Ok(()),
            _ => Err(TuneError::Foreign(at)),
        }
    }

    fn all(&mut self, name: Name, obsolete: &[Change], files: &[Wanted], values: &[Value]) -> Result<Done, TuneError> {
        for change in obsolete {
            self.take_back(change)?;
        }
        for file in files {
            self.write(file)?;
        }
        for value in values {
            self.set(value)?;
        }
        for change in &mut self.record.changes {
            if let Change::File { older, .. } = change {
                *older = None;
            }
        }
        self.record.profile = name;
        self.record.save(self.root)?;
        Ok(self.done.clone())
    }

    /// What this profile does not have.
    fn take_back(&mut self, change: &Change) -> Result<(), TuneError> {
        let path = change.path().to_owned();
        let at = self.root.at(&path);
        let before = match change {
            Change::File { .. } => Some(Before::File(path.clone(), self.root.read(&path).map_err(TuneError::io("read", &at))?)),
            Change::Value { .. } => {
                self.root.value(&path).map_err(TuneError::io("read", &at))?.map(|value| Before::Value(path.clone(), value))
            }
        };
        self.steps.extend(before);
        if take_back(self.root, change)? {
            self.done.changed.push(path.clone());
        }
        self.record.changes.retain(|noted| noted.path() != path);
        self.record.save(self.root)
    }

    fn write(&mut self, Wanted { path, text }: &Wanted) -> Result<(), TuneError> {
        let at = self.root.at(path);
        let found = self.root.read(path).map_err(TuneError::io("read", &at))?;
        if found.as_ref() == Some(text) {
            self.done.unchanged += 1;
            return Ok(());
        }
        for path in [path.as_path(), RECORD.as_ref()] {
            let dirs = self.root.missing_dirs(path);
            self.record.dirs.extend(dirs);
        }
        self.record.dirs.dedup();
        self.record.note(Change::File { path: path.clone(), text: text.clone(), older: found.clone() });
        self.record.save(self.root)?;
        self.steps.push(Before::File(path.clone(), found));
        self.root.write(path, text).map_err(TuneError::io("write", &at))?;
        self.done.changed.push(path.clone());
        Ok(())
    }

    fn set(&mut self, Value { path, value }: &Value) -> Result<(), TuneError> {
        let at = self.root.at(path);
        let Some(found) = self.root.value(path).map_err(TuneError::io("read", &at))? else { return Ok(()) };
        // The first time counts: later this is what we set ourselves.
        let before = match self.record.of(path) {
            Some(Change::Value { before, .. }) => before.clone(),
            _ => found.clone(),
        };
        self.record.note(Change::Value { path: path.clone(), before, after: value.clone() });
        self.record.save(self.root)?;
        if found == *value {
            self.done.unchanged += 1;
            return Ok(());
        }
        self.steps.push(Before::Value(path.clone(), found));
        self.root.set(path, value).map_err(TuneError::io("write to", &at))?;
        self.done.changed.push(path.clone());
        Ok(())
    }

    /// Takes the steps back, and the record with them.
    fn back_out(self, error: TuneError) -> TuneError {
        let Self { root, mut old, record, steps, .. } = self;
        let mut stuck = Vec::new();
        for step in steps.iter().rev() {
            if step.restore(root).is_err() {
                stuck.push(root.at(step.path()));
                // Still to be taken back, by `revert`.
                if let Some(change) = record.of(step.path()) {
                    old.note(change.clone());
                }
            }
        }
        if !stuck.is_empty() {
            old.dirs.clone_from(&record.dirs);
        }
        if old.save(root).is_err() {
            stuck.push(root.at(RECORD.as_ref()));
        } else if stuck.is_empty() {
            remove_dirs(root, &record.dirs[old.dirs.len().min(record.dirs.len())..]);
        }
        if stuck.is_empty() { error } else { TuneError::Stuck { first: error.to_string(), left: stuck } }
    }
}
