//! `infill doctor`: prints what `ops::doctor` finds.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use super::Failure;
use crate::config::Given;
use crate::ops::doctor::{Check, Report, Status, Subject, Verdict, examine};
use crate::ops::exit;

/// Width of a line, in columns.
const LINE_COLUMNS: usize = 110;

/// Find out whether this host can serve images, and what to do if not.
///
/// It takes the settings of `infill serve`, also from its file, and judges by them; no store needs to be named.
///
/// Exit code: 0 if serving is possible, 69 if the kernel lacks the feature or the device is busy, 77 if
/// this user is not permitted, 78 for a bad cache directory or settings, 1 for anything else that is in the way.
#[derive(Clone, Debug, clap::Args)]
pub struct DoctorArgs {
    /// Settings file [default: /etc/infill/config.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "INFILL_CONFIG")]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub(super) options: Given,

    /// Print one JSON object instead of the table.
    #[arg(long)]
    pub json: bool,
}

/// Examines the host and prints the findings.
///
/// # Errors
/// Settings that cannot be used.
pub fn run(args: DoctorArgs) -> Result<ExitCode, Failure> {
    let config = args.options.look(args.config.as_deref()).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
    let subject = Subject {
        front_end: config.front_end,
        cache_dir: &config.cache_dir,
        stores: &config.stores,
        limits: &config.cull,
        cache_bytes: config.cache_bytes,
        xfs_extent_bytes: config.xfs_extent_bytes,
        state_dir: &config.state_dir,
        shards: config.shards,
    };
    let report = examine(&subject);
    let stdout = io::stdout();
    let text = if args.json {
        // A report is made of texts only, which always have a JSON form.
        serde_json::to_string(&report).unwrap_or_default() + "\n"
    } else {
        let colour = stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none();
        table(&report, colour)
    };
    // A reader that went away (a pager, head) does not change the verdict.
    let _ = stdout.lock().write_all(text.as_bytes());
    Ok(ExitCode::from(report.verdict.exit_code()))
}

/// The report as aligned lines: mark, name, finding, and what to do below.
fn table(report: &Report, colour: bool) -> String {
    let width = report.checks.iter().map(|check| check.id.name().len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let (mark, paint) = mark(check);
        let (on, off) = if colour { (paint, "\x1b[0m") } else { ("", "") };
        let indent = 6 + width + 2;
        let mut lines = wrap(&check.found, LINE_COLUMNS - indent).into_iter();
        let first = lines.next().unwrap_or_default();
        let _ = writeln!(text, "{on}{mark:<4}{off}  {:<width$}  {first}", check.id);
        for line in lines {
            let _ = writeln!(text, "{:indent$}{line}", "");
        }
        if !check.remedy.is_empty() {
            for (i, line) in wrap(&check.remedy, LINE_COLUMNS - indent - 4).iter().enumerate() {
                let lead = if i == 0 { "do: " } else { "    " };
                let _ = writeln!(text, "{:indent$}{lead}{line}", "");
            }
        }
        // Never broken: it is there to be copied.
        if let Some(command) = &check.fix {
            let _ = writeln!(text, "{:indent$}run: {command}", "");
        }
    }
    let lead = if report.verdict == Verdict::Ready { "ready" } else { "NOT READY" };
    let _ = writeln!(text, "\n{lead}: {}", report.verdict);
    text
}

/// The mark of a line and its colour.
const fn mark(check: &Check) -> (&'static str, &'static str) {
    match check.status {
        Status::Ok => ("ok", "\x1b[32m"),
        Status::Warn => ("warn", "\x1b[33m"),
        Status::Fail => ("FAIL", "\x1b[1;31m"),
        Status::Unknown => ("?", "\x1b[36m"),
    }
}

/// Breaks text between words; a word that is longer than a line gets one of its own.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::doctor::Id;

    fn check(id: Id, status: Status, found: &str, remedy: &str, verdict: Verdict) -> Check {
        Check { id, status, found: found.into(), remedy: remedy.into(), fix: None, verdict }
    }

    #[test]
    fn the_table_is_aligned_and_says_what_to_do() {
        let report = Report::new(vec![
            check(Id::Kernel, Status::Ok, "Linux 6.12.117", "", Verdict::Ready),
            Check { fix: Some("mkdir -p /c".into()), ..check(Id::CacheDir, Status::Fail, "no", "make it", Verdict::BadCacheDir) },
        ]);
        assert_eq!(
            table(&report, false),
            "ok    kernel     Linux 6.12.117\n\
             FAIL  cache-dir  no\n\
             \x20                do: make it\n\
             \x20                run: mkdir -p /c\n\
             \n\
             NOT READY: not possible: the cache directory cannot be used\n"
        );
        assert!(table(&report, true).contains("\x1b[1;31mFAIL\x1b[0m  cache-dir"));
    }

    #[test]
    fn json_has_the_documented_keys() {
        let report = Report::new(vec![check(Id::Store, Status::Warn, "a", "b", Verdict::Ready)]);
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"checks":[{"id":"store","status":"warn","found":"a","do":"b","fix":null}],"verdict":"ready"}"#
        );
    }

    #[test]
    fn long_text_is_broken_between_words() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("/a/very/long/path x", 5), ["/a/very/long/path", "x"]);
        assert_eq!(wrap("", 5), [""]);
    }
}
