//! What a person sees while something takes long: a moving line on a terminal, now and then a plain
//! line elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a plain line is printed where there is no terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(30);

/// One long step. Prints to the standard error, so that results on the standard output stay clean.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    step: String,
    began: Instant,
    said: Instant,
}

impl Progress {
    /// Begins a step and says so.
    #[must_use]
    pub fn begin(step: impl Into<String>) -> Self {
        let step = step.into();
        let now = Instant::now();
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {msg} [{elapsed}]") {
                bar.set_style(style);
            }
            bar.set_prefix(step.clone());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if bar.is_none() {
            eprintln!("infill: {step} ...");
        }
        Self { bar, step, began: now, said: now }
    }

    /// Shows how far the step is.
    pub fn update(&mut self, message: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message());
        } else if self.said.elapsed() >= PLAIN_EVERY {
            self.said = Instant::now();
            let elapsed_s = self.began.elapsed().as_secs();
            eprintln!("infill: {} ... {} ({elapsed_s} s)", self.step, message());
        }
    }

    /// Ends the step well.
    pub fn finish(self, message: &str) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        let elapsed_s = self.began.elapsed().as_secs_f32();
        eprintln!("infill: {}: {message} ({elapsed_s:.1} s)", self.step);
    }
}
