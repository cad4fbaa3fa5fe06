//! `infill prefetch`: puts blobs into the cache before anybody reads them.

use std::fmt::Write as _;
use std::io::Write;

use clap::Args;
use serde::Serialize;

use super::place::Place;
use super::{Failure, print_json};
use crate::control::{Client, ClientError};
use crate::front::cachefiles::cache_dir;
use crate::key::Key;
use crate::ops::exit;
use crate::ops::mounting::Image;
use crate::ops::seeding::{Fate, Seeding, seed_key};
use crate::store::remembered::Remembered;
use crate::store::{SourceMode, Stores};

/// Put blobs into the cache before anybody reads them
///
/// Has the daemon bring images whole in the background, all of their blobs, while readers come first; infill stat shows how
/// far that is. For images that are mounted from files.
///
/// With --seed the cache shares the blocks of the blobs that are named: nothing is copied, no space is used, and images made
/// of these blobs are read without asking infill. That needs stores and cache on one file system that can share blocks (XFS,
/// btrfs). It works whether the daemon runs or not.
///
/// Exit code: 0 if all images are on their way, with --seed if all blobs are in the cache now; 1 if some are not (they are
/// read on demand), 69 if no daemon serves or it cannot, 77 if this user is not permitted, 78 for a bad store or cache directory.
#[derive(Debug, Args)]
pub struct PrefetchArgs {
    /// Share the blocks of the blobs instead of copying them
    #[arg(long)]
    seed: bool,
    #[command(flatten)]
    place: Place,
    /// The domain_id with which the images are mounted; without it each blob is an image of its own
    #[arg(long)]
    domain: Option<String>,
    /// Names of the blobs with the data of the image, in order [default: those that it has]
    #[arg(long = "device", value_name = "BLOB", conflicts_with = "seed")]
    devices: Vec<String>,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
    /// Names of images; with --seed, of blobs: fsid and device names, as they are given to mount(8)
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Has the images brought, or seeds the blobs that are named.
///
/// # Errors
/// Whatever kept some or all of them out of the cache, with the exit code that says what kind it is.
pub fn run(args: &PrefetchArgs) -> Result<(), Failure> {
    if args.seed { seed(args) } else { bring(args) }
}

fn bring(args: &PrefetchArgs) -> Result<(), Failure> {
    let daemon = Client::connect(&args.place.find()?.control_socket)?;
    let mut begun = Vec::new();
    for name in &args.names {
        let image = Image { name: name.clone(), domain: args.domain.clone(), devices: args.devices.clone() };
        let cannot = |error: ClientError| Failure::new(error.exit_code(), format!("{name} is not brought: {error}"));
        begun.push(daemon.prefetch(&image).map_err(cannot)?);
        if !args.json {
            print(&format!("{name} is brought in the background; infill stat shows how far it is"));
        }
    }
    if args.json { print_json(&serde_json::json!({ "prefetches": begun })) } else { Ok(()) }
}

fn seed(args: &PrefetchArgs) -> Result<(), Failure> {
    let config = args.place.with_stores()?;
    let stores = Stores::from_specs(&config.stores, SourceMode::Buffered).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
    let cache_dir =
        cache_dir::prepare(&config.cache_dir, config.xfs_extent_bytes).map_err(|error| Failure::new(error.exit_code(), error))?;
    let remembered = Remembered::open(&cache_dir);
    let mut seedings = Vec::new();
    for name in &args.names {
        let domain = args.domain.as_ref().unwrap_or(name);
        let seeding = seed_key(&stores, &cache_dir, &remembered, &Key::new(domain.as_bytes(), name.as_bytes()));
        if !args.json {
            print(&line(&seeding));
        }
        seedings.push(seeding);
    }
    let totals = Totals::of(&seedings);
    print(&if args.json { json(&seedings, &totals) } else { totals.line() });
    if totals.not_seeded == 0 {
        return Ok(());
    }
    let count = totals.not_seeded;
    Err(Failure::new(exit::FAILED, format!("{count} of {} blobs were not seeded; they are read on demand", seedings.len())))
}

/// Prints a line. A reader that went away does not change what is done.
fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn line(seeding: &Seeding) -> String {
    let Seeding { key, fate, len_bytes } = seeding;
    match fate {
        Fate::Seeded => format!("seeded         {key} ({len_bytes} bytes shared)"),
        Fate::AlreadyThere => format!("already there  {key}"),
        Fate::Refused(why) | Fate::Failed(why) => format!("not seeded     {key}: {why}"),
    }
}

#[derive(Default, Serialize)]
struct Totals {
    seeded: usize,
    already_there: usize,
    not_seeded: usize,
    shared_bytes: u64,
}

impl Totals {
    fn of(seedings: &[Seeding]) -> Self {
        let mut totals = Self::default();
        for seeding in seedings {
            match seeding.fate {
                Fate::Seeded => {
                    totals.seeded += 1;
                    totals.shared_bytes = totals.shared_bytes.saturating_add(seeding.len_bytes);
                }
                Fate::AlreadyThere => totals.already_there += 1,
                Fate::Refused(_) | Fate::Failed(_) => totals.not_seeded += 1,
            }
        }
        totals
    }

    fn line(&self) -> String {
        let Self { seeded, already_there, not_seeded, shared_bytes } = self;
        let mut line = format!("{seeded} seeded, {already_there} already there, {not_seeded} not seeded");
        if *seeded > 0 {
            let _ = write!(line, "; {shared_bytes} bytes shared, 0 copied");
        }
        line
    }
}

/// A blob in the JSON output.
#[derive(Serialize)]
struct Row {
    blob: String,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    bytes: u64,
}

impl From<&Seeding> for Row {
    fn from(seeding: &Seeding) -> Self {
        let (outcome, reason) = match &seeding.fate {
            Fate::Seeded => ("seeded", None),
            Fate::AlreadyThere => ("already_there", None),
            Fate::Refused(why) => ("refused", Some(why.clone())),
            Fate::Failed(why) => ("failed", Some(why.clone())),
        };
        Self { blob: seeding.key.to_string(), outcome, reason, bytes: seeding.len_bytes }
    }
}

fn json(seedings: &[Seeding], totals: &Totals) -> String {
    #[derive(Serialize)]
    struct Report<'a> {
        blobs: Vec<Row>,
        #[serde(flatten)]
        totals: &'a Totals,
    }
    let blobs = seedings.iter().map(Row::from).collect();
    // Texts and numbers always have a JSON form.
    serde_json::to_string(&Report { blobs, totals }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_json_say_the_same() {
        let seeding = |name: &str, fate| Seeding { key: name.parse().unwrap(), fate, len_bytes: 10 };
        let seedings =
            [seeding("d/a", Fate::Seeded), seeding("d/b", Fate::AlreadyThere), seeding("d/c", Fate::Refused("it is in use".into()))];
        let totals = Totals::of(&seedings);
        let lines: Vec<_> = seedings.iter().map(line).collect();
        assert_eq!(lines, ["seeded         d/a (10 bytes shared)", "already there  d/b", "not seeded     d/c: it is in use"]);
        assert_eq!(totals.line(), "1 seeded, 1 already there, 1 not seeded; 10 bytes shared, 0 copied");
        assert_eq!(
            json(&seedings[1..], &Totals::of(&seedings[1..])),
            r#"{"blobs":[{"blob":"d/b","outcome":"already_there","bytes":10},{"blob":"d/c","outcome":"refused","reason":"it is in use","bytes":10}],"seeded":0,"already_there":1,"not_seeded":1,"shared_bytes":0}"#
        );
    }
}
