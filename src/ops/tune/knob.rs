//! A knob on a host: what it is there, and what it should be.

use std::path::PathBuf;

use serde::Serialize;

use super::files::wanted;
use super::profile::{Knob, Profile, Scalar, Target};
use super::root::Root;
use crate::config::{self, DEFAULT_FILE, DROP_INS};

/// How a knob is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// As it should be.
    Ok,
    /// It should be changed.
    Change,
    /// This kernel has no such thing.
    NotHere,
}

/// A knob as it is found.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Its name.
    pub knob: String,
    /// What is set: a sysctl, a file, a setting.
    pub what: String,
    /// How it is.
    pub state: State,
    /// Its value.
    pub current: String,
    /// What it should be.
    pub recommended: String,
    /// Why, with what was measured.
    pub why: String,
    /// What measures it.
    pub command: String,
}

/// A value of the kernel's that is to be set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Value {
    /// Where it is.
    pub path: PathBuf,
    /// What it is to be.
    pub value: String,
}

/// What a sysctl is, as a file.
fn sysctl_path(name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/sys/{}", name.replace('.', "/")))
}

impl Target {
    fn what(&self) -> String {
        match self {
            Self::Sysctl { name, .. } => format!("sysctl {name}"),
            Self::Sysfs { path, .. } => path.clone(),
            Self::Udev { rule, .. } => format!("udev {rule}"),
            Self::Setting { name, .. } => format!("infill serve: {name}"),
            Self::Unit { name, .. } => format!("infill.service: {name}"),
        }
    }

    fn recommended(&self) -> String {
        match self {
            Self::Sysctl { value, .. } => value.to_string(),
            Self::Sysfs { value, .. } | Self::Udev { value, .. } | Self::Unit { value, .. } => value.clone(),
            Self::Setting { value, .. } => value.shown(),
        }
    }

    /// The kernel's file that has the value now.
    pub(super) fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Sysctl { name, .. } => Some(sysctl_path(name)),
            Self::Sysfs { path, .. } => Some(path.into()),
            _ => None,
        }
    }

    /// Whether a value will do.
    fn is_met_by(&self, current: &str) -> bool {
        match self {
            Self::Sysctl { value, at_least: true, .. } => current.parse().is_ok_and(|current: u64| current >= *value),
            _ => current == self.recommended(),
        }
    }
}

impl Knob {
    /// Whether this kernel has it. In an image nobody knows, so it counts as if.
    fn is_here(&self, root: &Root) -> bool {
        !root.is_live() || self.set.path().is_none_or(|path| root.at(&path).exists())
    }

    /// What it is now. What is written in a file counts as set: it is read at the next start.
    fn current(&self, root: &Root) -> String {
        if let (true, Some(path)) = (root.is_live(), self.set.path()) {
            return root.value(&path).ok().flatten().unwrap_or_else(|| "unreadable".to_owned());
        }
        let is_written = wanted(&[self]).iter().all(|one| {
            let text = root.read(&one.path).ok().flatten().unwrap_or_default();
            one.text.lines().last().is_some_and(|line| text.lines().any(|found| found == line))
        });
        match &self.set {
            Target::Setting { name, default, .. } => setting(root, name).unwrap_or_else(|| default.clone()),
            target if is_written => target.recommended(),
            Target::Udev { default, .. } | Target::Unit { default, .. } => default.clone(),
            Target::Sysctl { .. } | Target::Sysfs { .. } => "not set".to_owned(),
        }
    }

    /// As it is found.
    #[must_use]
    pub fn look(&self, root: &Root) -> Found {
        let is_here = self.is_here(root);
        let current = if is_here { self.current(root) } else { "none".to_owned() };
        let state = match is_here {
            false => State::NotHere,
            true if self.set.is_met_by(&current) => State::Ok,
            true => State::Change,
        };
        Found {
            knob: self.name.clone(),
            what: self.set.what(),
            state,
            current,
            recommended: self.set.recommended(),
            why: self.why.clone(),
            command: format!("infill bench tune --knob {}", self.bench),
        }
    }
}

/// What the settings files say: the last drop-in that says anything counts.
fn setting(root: &Root, name: &str) -> Option<String> {
    let main = root.at(DEFAULT_FILE.as_ref());
    let drop_ins = config::drop_ins(&main.with_file_name(DROP_INS)).unwrap_or_default();
    let of = |path: &PathBuf| {
        let file: toml::Table = std::fs::read_to_string(path).ok()?.parse().ok()?;
        Some(file.get("serve")?.get(name)?.clone().try_into::<Scalar>().ok()?.shown())
    };
    drop_ins.iter().rev().chain([&main]).find_map(of)
}

impl Profile {
    /// What can be set on this host, less what is more than enough already: a file would lower it at the next start.
    #[must_use]
    pub fn fitting(&self, root: &Root) -> Vec<&Knob> {
        let lowers = |knob: &Knob| {
            let Target::Sysctl { value, at_least: true, .. } = knob.set else { return false };
            let current = knob.set.path().and_then(|path| root.value(&path).ok().flatten());
            current.and_then(|current| current.parse().ok()).is_some_and(|current: u64| current > value)
        };
        self.knobs.iter().filter(|knob| knob.is_here(root) && !lowers(knob)).collect()
    }
}

/// The values that are to be set now: none in an image.
#[must_use]
pub fn values(knobs: &[&Knob], root: &Root) -> Vec<Value> {
    if !root.is_live() {
        return Vec::new();
    }
    let value = |knob: &&Knob| Some(Value { path: knob.set.path()?, value: knob.set.recommended() });
    knobs.iter().filter_map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tune::profile::Name;

    #[test]
    fn the_setting_that_counts_is_the_one_that_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let profile = Profile::of(Name::SmallVm);
        let slots = profile.knobs.iter().find(|knob| knob.name == "slots").unwrap();
        let looks = || {
            let found = slots.look(&root);
            (found.current, found.state)
        };
        assert_eq!(looks(), ("16".to_owned(), State::Change));
        let files = [("config.toml", 5), ("config.d/10-own.toml", 7), ("config.d/50-profile.toml", 4), ("config.d/90-own.toml", 9)];
        for (file, value) in files {
            root.write(&PathBuf::from("/etc/infill").join(file), &format!("version = 1\n[serve]\nslots = {value}\n")).unwrap();
            assert_eq!(looks(), (value.to_string(), if value == 4 { State::Ok } else { State::Change }), "{file}");
        }
    }
}
