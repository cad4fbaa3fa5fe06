//! What the figures must be: the project's targets for a stock kernel, as `infill bench native` measures them.

use serde::Serialize;

use super::{Section, Subject};
use crate::lab::bench::report;

/// Which side of a limit is right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    AtLeast,
    AtMost,
}

/// A limit of one figure.
struct Target {
    subject: Subject,
    cell: &'static str,
    readers: usize,
    figure: &'static str,
    side: Side,
    limit: f64,
}

const fn target(subject: Subject, cell: &'static str, readers: usize, figure: &'static str, side: Side, limit: f64) -> Target {
    Target { subject, cell, readers, figure, side, limit }
}

/// Where two are to cost the same: how much dearer one may be measured, which is noise.
const NOISE: f64 = 1.05;

/// All of them.
const TARGETS: &[Target] = &[
    target(Subject::Events, "infill", 16, "events_per_s", Side::AtLeast, 200_000.0),
    target(Subject::Events, "infill", 16, "daemon_cpu_us", Side::AtMost, 1.8),
    target(Subject::Tree, "copied", 1, "of_present", Side::AtMost, 1.5),
    target(Subject::Tree, "copied", 8, "of_present", Side::AtMost, 1.6),
    target(Subject::Tree, "reflinked", 1, "of_reflink", Side::AtMost, 1.25),
    target(Subject::Tree, "reflinked", 8, "of_reflink", Side::AtMost, 1.25),
    target(Subject::Hot, "infill, beside", 1, "p99_of_alone", Side::AtMost, 2.0),
    target(Subject::Complete, "complete", 1, "p50_of_never", Side::AtMost, NOISE),
    target(Subject::Complete, "complete", 1, "cpu_of_never", Side::AtMost, NOISE),
    target(Subject::Complete, "complete, EROFS", 1, "p50_of_never", Side::AtMost, NOISE),
    target(Subject::Complete, "complete, EROFS", 1, "cpu_of_never", Side::AtMost, NOISE),
];

/// A target beside what was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Of what.
    pub subject: Subject,
    /// Who served.
    pub cell: &'static str,
    /// How many read.
    pub readers: usize,
    /// Name of the figure.
    pub figure: &'static str,
    /// The median of the rounds.
    pub measured: f64,
    /// In words.
    pub target: String,
    /// Whether it is met.
    pub met: bool,
}

impl Verdict {
    /// One line.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { subject, cell, readers, figure, measured, target, .. } = self;
        format!("{} {cell}, {readers} readers: {figure}: {measured:.2}, {target}", subject.name())
    }
}

/// Every target whose figure was measured.
pub(super) fn verdicts(sections: &[Section]) -> Vec<Verdict> {
    TARGETS.iter().filter_map(|target| verdict(target, sections)).collect()
}

fn verdict(target: &Target, sections: &[Section]) -> Option<Verdict> {
    let Target { subject, cell, readers, figure, side, limit } = *target;
    let section = sections.iter().find(|section| section.subject == subject)?;
    let measured = section.figure(cell, readers, figure)?.median;
    let (words, met) = match side {
        Side::AtLeast => ("at least", measured >= limit),
        Side::AtMost => ("at most", measured <= limit),
    };
    Some(Verdict { subject, cell, readers, figure, measured, target: format!("{words} {limit}"), met })
}

/// As a table.
pub(super) fn table(verdicts: &[Verdict]) -> String {
    let mut text = String::from("\ntargets\n\n");
    let head = ["subject", "cell", "readers", "figure", "measured", "target", "met"].map(str::to_owned).to_vec();
    let row = |v: &Verdict| {
        let met = if v.met { "yes" } else { "NO" };
        let [measured, readers] = [format!("{:.2}", v.measured), v.readers.to_string()];
        vec![v.subject.name().into(), v.cell.into(), readers, v.figure.into(), measured, v.target.clone(), met.into()]
    };
    report::table(&mut text, &(head, verdicts.iter().map(row).collect()));
    text
}
