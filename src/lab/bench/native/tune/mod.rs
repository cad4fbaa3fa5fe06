//! `infill bench tune`: what a knob does, in one command each: the cell that it is for, with the knob off and on in turn, on this
//! machine's own kernel.
//!
//! ```text
//!  knobs  what can be turned, and by what it is judged
//!  lever  how it is turned, and turned back
//!  cells  what is read meanwhile
//! ```
//! Off and on take turns as to who is first, and a ratio is one of two cells of the same round, so that what else the machine does
//! meets both alike. tuning/README.md has the figures; a profile of `infill tune` has only what has an effect there.

mod cells;
pub mod knobs;
mod lever;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use self::cells::{Cells, Figure};
use self::knobs::Knob;
use super::ground::Ground;
use super::samples::Spread;
use super::{Plan, Subject, failed, read_file};
use crate::engine::placement::usable_cpus;
use crate::lab::bench::report;
use crate::lab::progress::Progress;
use crate::lab::{Result, Trying, packages};
use crate::ops::signals::{Event, Signals};

/// What to measure.
#[derive(Clone, Debug)]
pub struct TunePlan {
    /// This program.
    pub infill: PathBuf,
    /// Knobs.
    pub knobs: Vec<&'static Knob>,
    /// How often each cell is measured off and on.
    pub rounds: usize,
    /// How long readers read, where they do not read everything once.
    pub time: Duration,
    /// Length of the tree.
    pub tree_bytes: u64,
}

/// One figure of one cell of a knob.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The knob.
    pub knob: &'static str,
    /// The cell.
    pub cell: String,
    /// Name of the figure; ends with the unit.
    pub figure: &'static str,
    /// Without the knob.
    pub off: Spread,
    /// With it.
    pub on: Spread,
    /// On of off, of the two cells of each round.
    pub on_of_off: Spread,
}

/// All of it; `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct TuneReport {
    /// `uname -r`.
    pub kernel: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// How often everything was measured.
    pub rounds: usize,
    /// What was found.
    pub rows: Vec<Row>,
    /// Knobs that this machine does not have, and why.
    pub not_here: BTreeMap<&'static str, String>,
}

impl TuneReport {
    /// As a table.
    #[must_use]
    pub fn table(&self) -> String {
        // Writing to a string does not fail.
        let mut text = String::new();
        let Self { kernel, cpus, rounds, .. } = self;
        let _ = writeln!(text, "\nLinux {kernel}, {cpus} CPUs; medians of {rounds} rounds, in brackets the least and the greatest\n");
        let head = ["knob", "cell", "figure", "off", "on", "on/off"].map(str::to_owned).to_vec();
        let cells = |row: &Row| {
            let Row { knob, cell, figure, off, on, on_of_off } = row;
            vec![(*knob).to_owned(), cell.clone(), figure.replace('_', " "), off.shown(), on.shown(), on_of_off.shown()]
        };
        report::table(&mut text, &(head, self.rows.iter().map(cells).collect()));
        for (knob, why) in &self.not_here {
            let _ = writeln!(text, "{knob}: not measured: {why}");
        }
        text
    }
}

/// Measures.
///
/// # Errors
/// Something that is needed could not be had, a daemon ended, or something was read wrong.
pub fn measure(plan: &TunePlan) -> Result<TuneReport> {
    packages::ensure(packages::IMAGE_TOOLS)?;
    // Who stops it does not keep it from turning everything back.
    let signals = Signals::block().trying(|| "cannot receive signals")?;
    let native = Plan {
        infill: plan.infill.clone(),
        only: vec![Subject::Tree],
        rounds: plan.rounds,
        readers: vec![1],
        time: plan.time,
        tree_bytes: plan.tree_bytes,
        serve_flags: Vec::new(),
    };
    let ground = Ground::make(&native)?;
    let mut cells = Cells::new(&native, &ground);
    let (mut rows, mut not_here) = (Vec::new(), BTreeMap::new());
    for knob in &plan.knobs {
        match knob.unfit() {
            Some(why) => drop(not_here.insert(knob.name, why)),
            None => rows.extend(measure_knob(knob, &mut cells, plan.rounds, &signals)?),
        }
    }
    Ok(TuneReport {
        kernel: read_file("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpus: usable_cpus().len(),
        rounds: plan.rounds,
        rows,
        not_here,
    })
}

/// All cells of a knob.
fn measure_knob(knob: &Knob, cells: &mut Cells<'_>, rounds: usize, signals: &Signals) -> Result<Vec<Row>> {
    let mut progress = Progress::begin(format!("{}: {}", knob.name, knob.what));
    let mut rows = Vec::new();
    for cell in knob.cells {
        let mut measured: BTreeMap<Figure, Vec<[f64; 2]>> = BTreeMap::new();
        for round in 0..rounds {
            let mut found: [Vec<(Figure, f64)>; 2] = Default::default();
            // Who is first changes: what the first one leaves behind does not always meet the same one.
            for on in [round % 2 == 1, round % 2 == 0] {
                progress.update(|| format!("{}, round {}: {}", cell.name(), round + 1, if on { "on" } else { "off" }));
                if signals.next() == Some(Event::Stop) {
                    return Err(failed("stopped by a signal; everything is as it was before"));
                }
                let turned = knob.lever.turn(on)?;
                found[usize::from(on)] = cells.run(cell, &turned)?;
            }
            let [off, on] = found;
            for ((figure, off), (of_on, on)) in off.into_iter().zip(on) {
                if figure != of_on {
                    return Err(failed(format!("{}: {figure} and {of_on} cannot be compared", cell.name())));
                }
                measured.entry(figure).or_default().push([off, on]);
            }
        }
        rows.extend(measured.into_iter().filter_map(|(figure, pairs)| {
            let of = |value: fn(&[f64; 2]) -> f64| Spread::of(pairs.iter().map(value).collect());
            let (off, on, on_of_off) = (of(|pair| pair[0])?, of(|pair| pair[1])?, of(|pair| pair[1] / pair[0])?);
            Some(Row { knob: knob.name, cell: cell.name(), figure, off, on, on_of_off })
        }));
    }
    progress.finish("done");
    Ok(rows)
}
