//! `infill stat`: what the daemon does, once.

use std::fmt::Write as _;
use std::io::Write as _;

use clap::Args;
use serde_json::Value;

use super::human::{cut, size};
use super::place::Asking;
use super::{Failure, print_json};
use crate::control::wire::{Health, ImageList, Prefetch, Stage};

/// Columns of a terminal that everything fits into.
const COLUMNS: usize = 80;
/// Columns of a line's heading, and of a number in a list.
const HEADING: usize = 12;
/// See [`HEADING`].
const NUMBER: usize = 12;

/// Show what the daemon serves and has done
///
/// Exit code: 0, 69 if no daemon serves, 77 if this user is not permitted, 1 for anything else.
#[derive(Debug, Args)]
pub struct StatArgs {
    #[command(flatten)]
    asking: Asking,
    /// Print one JSON object: health, stat and images, as the control socket gives them
    #[arg(long)]
    json: bool,
}

/// Prints it.
///
/// # Errors
/// The daemon does not answer.
pub fn run(args: &StatArgs) -> Result<(), Failure> {
    let daemon = args.asking.client()?;
    let (stat, images) = (daemon.stat()?, daemon.images()?);
    if args.json {
        return print_json(&serde_json::json!({ "health": daemon.health(), "stat": stat, "images": images }));
    }
    // A reader that went away does not change what is so.
    let _ = std::io::stdout().write_all(table(daemon.health(), &stat, &images).as_bytes());
    Ok(())
}

fn table(health: &Health, stat: &Value, images: &ImageList) -> String {
    let number = |name: &str| stat[name].as_u64().unwrap_or(0);
    let text = |name: &str| stat[name].as_str().unwrap_or("-");
    let bytes = |name: &str| size(number(name));
    let Health { front_end, version, pid, .. } = health;
    let lines = [
        ("infill", format!("{version}, pid {pid}, {front_end}, {} x {}, log {}", number("shards"), text("engine"), text("log_level"))),
        ("requests", format!("{} served, {} failed, {} timed out", number("requests"), number("failed"), number("timed_out"))),
        ("waiting", format!("{}, the oldest for {} ms; stuck operations: {}", number("pending"), number("oldest_ms"), number("stuck"))),
        ("answers", format!("p50 {} us, p99 {} us, p99.9 {} us", number("p50_us"), number("p99_us"), number("p999_us"))),
        ("brought", format!("{} ({} before anybody asked)", bytes("bytes_filled"), bytes("bytes_unasked"))),
        ("objects", format!("{} open, {} of {} descriptors", number("objects"), number("fds"), number("fds_budget"))),
    ];
    let mut out = String::new();
    for (heading, line) in lines {
        let _ = writeln!(out, "{heading:<HEADING$}{line}");
    }
    // Of any front end, those that were closed too.
    let blobs = stat["blobs"].as_array().map_or(&[][..], Vec::as_slice);
    if !blobs.is_empty() {
        let _ = writeln!(out, "\n{:>NUMBER$} {:>NUMBER$}   %  blob", "present", "of");
        blobs.iter().for_each(|blob| out.push_str(&blob_line(blob)));
    }
    if !images.prefetches.is_empty() {
        let _ = writeln!(out, "\nprefetch     image");
        images.prefetches.iter().for_each(|prefetch| out.push_str(&prefetch_line(prefetch)));
    }
    out
}

fn blob_line(blob: &Value) -> String {
    let number = |name: &str| blob[name].as_u64().unwrap_or(0);
    let (len_bytes, present_bytes) = (number("len_bytes"), number("present_bytes"));
    let percent = u128::from(present_bytes) * 100 / u128::from(len_bytes.max(1));
    let name = cut(blob["blob"].as_str().unwrap_or_default(), COLUMNS - 2 * NUMBER - 7);
    format!("{:>NUMBER$} {:>NUMBER$} {percent:>3}  {name}\n", size(present_bytes), size(len_bytes))
}

fn prefetch_line(Prefetch { wanted, stage, error }: &Prefetch) -> String {
    let stage = match stage {
        Stage::Waiting => "waiting",
        Stage::Running => "running",
        Stage::Done => "done",
        Stage::Failed => "failed",
    };
    let why = error.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    let line: String = format!("{stage:<NUMBER$} {}{why}", wanted.image).chars().take(COLUMNS).collect();
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::Wanted;

    #[test]
    fn the_table_fits_a_terminal_whatever_is_in_it() {
        let most = |name: &str| (name.to_owned(), Value::from(999_999_999_u64));
        let mut stat: serde_json::Map<_, _> =
            ["requests", "failed", "timed_out", "pending", "oldest_ms", "stuck", "fds", "fds_budget", "p999_us"]
                .map(most)
                .into_iter()
                .collect();
        let health = Health { status: "ok".into(), front_end: "fanotify".into(), version: "10.10.10".into(), pid: 4_194_304 };
        let blob = serde_json::json!({ "blob": "x".repeat(300), "len_bytes": u64::MAX, "present_bytes": u64::MAX });
        stat.insert("blobs".into(), vec![blob].into());
        let wanted = Wanted { image: "y".repeat(100), domain: None, devices: Vec::new() };
        let failed = Prefetch { wanted, stage: Stage::Failed, error: Some("z".repeat(100)) };
        let text = table(&health, &stat.into(), &ImageList { blobs: Vec::new(), prefetches: vec![failed] });
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        assert!(text.contains("100  ...x") && text.contains("failed") && text.contains("4194304"), "{text}");
    }
}
