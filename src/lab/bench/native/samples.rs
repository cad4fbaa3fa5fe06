//! What was measured, round by round, and how it is shown.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::Subject;
use crate::lab::bench::report;

/// The values of all rounds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Spread {
    /// The one in the middle; of an even number, the lower one of the two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        Some(Self { median: values[(values.len() - 1) / 2], min, max })
    }

    pub(super) fn shown(&self) -> String {
        let digits = match self.median.abs() {
            ..10.0 => 2,
            10.0..1000.0 => 1,
            _ => 0,
        };
        let Self { median, min, max } = self;
        if min < max { format!("{median:.digits$} ({min:.digits$}-{max:.digits$})") } else { format!("{median:.digits$}") }
    }
}

/// One cell of a subject: who served, and how many read.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Who served.
    pub cell: String,
    /// How many read.
    pub readers: usize,
    /// By name; a name ends with the unit.
    #[serde(flatten)]
    pub figures: BTreeMap<&'static str, Spread>,
}

/// What was found of a subject.
#[derive(Clone, Debug, Serialize)]
pub struct Section {
    /// Which one.
    pub subject: Subject,
    /// What was done, in words.
    pub title: String,
    /// Names of figures, in the order in which they are shown.
    #[serde(skip)]
    columns: Vec<&'static str>,
    /// Its cells.
    pub rows: Vec<Row>,
}

impl Section {
    /// As a table.
    pub(super) fn table(&self) -> String {
        // Writing to a string does not fail.
        let mut text = String::new();
        let _ = writeln!(text, "\n{}: {}\n", self.subject.name(), self.title);
        let head = ["cell", "readers"].iter().chain(&self.columns).map(|&name| name.replace('_', " ")).collect();
        let shown = |row: &Row, name| row.figures.get(name).map_or_else(|| "-".to_owned(), Spread::shown);
        let cells = |row: &Row| {
            let names = [row.cell.clone(), row.readers.to_string()].into_iter();
            names.chain(self.columns.iter().map(|&name| shown(row, name))).collect()
        };
        report::table(&mut text, &(head, self.rows.iter().map(cells).collect()));
        text
    }

    /// A figure of a cell.
    pub(super) fn figure(&self, cell: &str, readers: usize, name: &str) -> Option<Spread> {
        let row = self.rows.iter().find(|row| row.cell == cell && row.readers == readers)?;
        row.figures.get(name).copied()
    }
}

/// Figures of a cell in one round.
pub(super) type Figures = Vec<(&'static str, f64)>;

/// What one round after the other gives.
#[derive(Default)]
pub(super) struct Samples(Vec<Collected>);

/// The values of a cell's figures so far.
struct Collected {
    cell: String,
    readers: usize,
    values: BTreeMap<&'static str, Vec<f64>>,
}

impl Samples {
    /// Adds what a round gave for a cell.
    pub(super) fn add(&mut self, cell: &str, readers: usize, figures: Figures) {
        let is_it = |collected: &Collected| collected.cell == cell && collected.readers == readers;
        let at = self.0.iter().position(is_it).unwrap_or_else(|| {
            self.0.push(Collected { cell: cell.to_owned(), readers, values: BTreeMap::new() });
            self.0.len() - 1
        });
        for (name, value) in figures {
            self.0[at].values.entry(name).or_default().push(value);
        }
    }

    /// All of it.
    pub(super) fn section(self, subject: Subject, title: String, columns: &[&'static str]) -> Section {
        let spreads = |values: BTreeMap<_, Vec<f64>>| values.into_iter().filter_map(|(name, all)| Some((name, Spread::of(all)?))).collect();
        let row = |Collected { cell, readers, values }| Row { cell, readers, figures: spreads(values) };
        Section { subject, title, columns: columns.to_vec(), rows: self.0.into_iter().map(row).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_become_medians_beside_their_spread() {
        let mut samples = Samples::default();
        for value in [3.0, 1.0, 20.0] {
            samples.add("a", 8, vec![("wall_ms", value)]);
            samples.add("b", 8, vec![("wall_ms", 5.0), ("events", 2000.0)]);
        }
        let section = samples.section(Subject::Tree, "a test".into(), &["wall_ms", "events"]);
        assert_eq!(section.figure("a", 8, "wall_ms"), Some(Spread { median: 3.0, min: 1.0, max: 20.0 }));
        assert_eq!(section.figure("a", 1, "wall_ms"), None);
        let text = section.table();
        assert!(text.contains("| 3.00 (1.00-20.00) |      - |") && text.contains("|              5.00 |   2000 |"), "{text}");
    }
}
