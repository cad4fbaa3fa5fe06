//! The files that keep a profile over a restart, each in the directory where its program looks.

use std::fmt::Write;
use std::path::PathBuf;

use super::profile::{Knob, Target};

/// Sysctls, for systemd-sysctl or sysctl --system.
const SYSCTL: &str = "/etc/sysctl.d/60-infill.conf";
/// Values below /sys, for systemd-tmpfiles.
const SYSFS: &str = "/etc/tmpfiles.d/60-infill.conf";
/// Rules for devices.
const UDEV: &str = "/etc/udev/rules.d/60-infill.rules";
/// Settings of `infill serve`.
pub(super) const SETTINGS: &str = "/etc/infill/config.d/50-profile.toml";
/// Settings of its service.
const UNIT: &str = "/etc/systemd/system/infill.service.d/50-profile.conf";
/// Stands at the top of each.
const HEAD: &str = "# Written by infill tune --apply; infill tune --revert removes it. See tuning/README.md.\n";

/// A file that is to be there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Where.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

/// The files for these knobs.
#[must_use]
pub fn wanted(knobs: &[&Knob]) -> Vec<Wanted> {
    let texts = [
        (SYSCTL, lines(knobs, |target| sysctl(target).map(|(name, value)| format!("{name} = {value}")))),
        (
            SYSFS,
            lines(knobs, |target| match target {
                Target::Sysfs { path, value } => Some(format!("w {path} - - - - {value}")),
                _ => None,
            }),
        ),
        (
            UDEV,
            lines(knobs, |target| match target {
                Target::Udev { rule, .. } => Some(rule.clone()),
                _ => None,
            }),
        ),
        (SETTINGS, settings(knobs)),
        (UNIT, unit(knobs)),
    ];
    texts.into_iter().filter_map(|(path, text)| Some(Wanted { path: path.into(), text: text? })).collect()
}

/// The settings file.
pub(super) fn settings(knobs: &[&Knob]) -> Option<String> {
    let lines = lines(knobs, |target| match target {
        Target::Setting { name, value, .. } => Some(format!("{name} = {}", value.written())),
        _ => None,
    })?;
    let body = lines.strip_prefix(HEAD)?;
    Some(format!("{HEAD}version = 1\n\n[serve]\n{body}"))
}

fn unit(knobs: &[&Knob]) -> Option<String> {
    let lines = lines(knobs, |target| match target {
        Target::Unit { name, value, .. } => Some(format!("{name}={value}")),
        _ => None,
    })?;
    let body = lines.strip_prefix(HEAD)?;
    Some(format!("{HEAD}[Service]\n{body}"))
}

const fn sysctl(target: &Target) -> Option<(&String, u64)> {
    match target {
        Target::Sysctl { name, value, .. } => Some((name, *value)),
        _ => None,
    }
}

/// A line for each knob that has one, and before it why. `None`: there is none.
fn lines(knobs: &[&Knob], line: impl Fn(&Target) -> Option<String>) -> Option<String> {
    let mut text = HEAD.to_owned();
    for knob in knobs {
        if let Some(line) = line(&knob.set) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "# {}: {}\n{line}", knob.name, knob.why);
        }
    }
    (text.len() > HEAD.len()).then_some(text)
}
