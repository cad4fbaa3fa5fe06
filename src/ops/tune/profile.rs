//! The profiles, as they are written in tuning/profiles.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Kinds of hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Name {
    /// Hundreds of containers: many blobs open at a time
    DenseHost,
    /// A machine of its own, the store on an NVMe disk
    BareMetalNvme,
    /// The store on a disk that turns
    HddStore,
    /// A virtual machine with few processors
    SmallVm,
}

impl Name {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::DenseHost, Self::BareMetalNvme, Self::HddStore, Self::SmallVm];

    /// On the command line, and the name of its file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DenseHost => "dense-host",
            Self::BareMetalNvme => "bare-metal-nvme",
            Self::HddStore => "hdd-store",
            Self::SmallVm => "small-vm",
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::DenseHost => include_str!("../../../tuning/profiles/dense-host.toml"),
            Self::BareMetalNvme => include_str!("../../../tuning/profiles/bare-metal-nvme.toml"),
            Self::HddStore => include_str!("../../../tuning/profiles/hdd-store.toml"),
            Self::SmallVm => include_str!("../../../tuning/profiles/small-vm.toml"),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is to be set on such a host.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Whom it is for, in one line.
    pub summary: String,
    /// What is set.
    #[serde(rename = "knob")]
    pub knobs: Vec<Knob>,
}

/// One thing that is set.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Knob {
    /// Its name in the table.
    pub name: String,
    /// The knob of `infill bench tune` that measures it.
    pub bench: String,
    /// Why, with what was measured, in one line.
    pub why: String,
    /// What is set.
    pub set: Target,
}

/// What is set, and to what.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Target {
    /// A sysctl.
    Sysctl {
        /// Its name, with dots.
        name: String,
        /// The value.
        value: u64,
        /// More will do as well, and is left.
        #[serde(default)]
        at_least: bool,
    },
    /// A file below /sys.
    Sysfs {
        /// Its path.
        path: String,
        /// The value.
        value: String,
    },
    /// A rule for devices that are made from now on.
    Udev {
        /// The rule.
        rule: String,
        /// What it sets, for the table.
        value: String,
        /// What it is without the rule.
        default: String,
    },
    /// A setting of `infill serve`.
    Setting {
        /// Its name in the settings file.
        name: String,
        /// The value.
        value: Scalar,
        /// What it is if nobody sets it.
        default: String,
    },
    /// A setting of the service.
    Unit {
        /// Its name in `[Service]`.
        name: String,
        /// The value.
        value: String,
        /// What it is if nobody sets it.
        default: String,
    },
}

/// A value of a settings file.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    /// A number.
    Number(i64),
    /// A word.
    Word(String),
}

impl Scalar {
    /// As it is written in the file.
    #[must_use]
    pub fn written(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Word(word) => format!("\"{word}\""),
        }
    }

    /// By itself.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Word(word) => word.clone(),
        }
    }
}

impl Profile {
    /// The profile with this name.
    #[must_use]
    pub fn of(name: Name) -> Self {
        // A test reads all of them.
        parse(name.text()).unwrap_or_else(|error| unreachable!("tuning/profiles/{name}.toml: {error}"))
    }
}

fn parse(text: &str) -> Result<Profile, String> {
    toml::from_str(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::lab::bench::native::tune::knobs::Knob as Measured;

    const README: &str = include_str!("../../../tuning/README.md");

    /// A knob is in a profile because of a figure that anybody can have again.
    #[test]
    fn every_knob_is_measured_by_a_command_and_its_figures_are_published() {
        for name in Name::ALL {
            let profile = parse(name.text()).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(!profile.knobs.is_empty() && profile.summary.lines().count() == 1, "{name}");
            let names: BTreeSet<_> = profile.knobs.iter().map(|knob| &knob.name).collect();
            assert_eq!(names.len(), profile.knobs.len(), "{name}: a name twice");
            for Knob { name: knob, bench, why, .. } in &profile.knobs {
                assert!(Measured::find(bench).is_some(), "{name}: {knob}: no knob {bench} in infill bench tune");
                assert!(README.contains(&format!("\n| `{bench}` |")), "{name}: {knob}: tuning/README.md has no row on {bench}");
                assert!(why.contains(|c: char| c.is_ascii_digit()), "{name}: {knob}: {why:?} has no figure");
            }
        }
    }

    #[test]
    fn every_setting_is_one_of_infill_serve() {
        for name in Name::ALL {
            let text = super::super::files::settings(&Profile::of(name).knobs.iter().collect::<Vec<_>>());
            let Some(text) = text else { continue };
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("config.toml");
            std::fs::write(&path, text).unwrap();
            let config = crate::config::Given::default().look(Some(&path));
            assert!(config.is_ok(), "{name}: {}", config.unwrap_err());
        }
    }
}
