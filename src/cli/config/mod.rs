//! `infill config`: the settings of a daemon that would start here and now.

mod template;

pub(super) use self::template::template;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::Failure;
use crate::config::{Given, Origin, Resolved, keys};
use crate::ops::{exit, limits};

/// Look at the settings
#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Show every setting as it counts, and where it is from
    ///
    /// It takes the flags, the variables and the files that infill serve would take, so it says what a daemon that starts now would
    /// do. A daemon that runs already may have read other files.
    ///
    /// Exit code: 0 if the settings can be used, 78 if not.
    Show(Box<ShowArgs>),
}

/// Flags of `infill config show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// Settings file [default: /etc/infill/config.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "INFILL_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    given: Given,
    /// Print one JSON object: for each key its value, and where it is from
    #[arg(long)]
    json: bool,
    /// Show only what somebody has set
    #[arg(long)]
    changed: bool,
    /// Print a settings file instead, with every key, its help and its default
    #[arg(long = "default", conflicts_with_all = ["json", "changed"])]
    template: bool,
}

/// Prints what is asked for.
///
/// # Errors
/// The settings cannot be used.
pub fn run(verb: &ConfigVerb) -> Result<(), Failure> {
    let ConfigVerb::Show(args) = verb;
    if args.template {
        return print(&template());
    }
    let settings = args.given.settings(args.config.as_deref()).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
    let rows: Vec<_> = rows(&settings).into_iter().filter(|row| !args.changed || row.origin != Origin::Default).collect();
    if args.json { super::print_json(&as_json(&rows)) } else { print(&table(&rows)) }
}

/// A reader that went away (a pager, head) has seen what it wanted.
fn print(text: &str) -> Result<(), Failure> {
    let _ = io::stdout().lock().write_all(text.as_bytes());
    Ok(())
}

/// One setting.
struct Row {
    key: &'static str,
    value: Value,
    text: String,
    origin: Origin,
}

fn rows(settings: &Resolved) -> Vec<Row> {
    let row = |key: keys::Key| {
        let row = Row { key: key.name(), value: settings.value(key).clone(), text: settings.text(key), origin: settings.origin(key) };
        if row.key == "fd_budget" && row.value.is_null() { with_budget(row, settings.config.shards) } else { row }
    };
    keys::all().map(row).collect()
}

/// What a daemon would make of the limits of this process and this host.
fn with_budget(row: Row, shards: usize) -> Row {
    match limits::raise() {
        Ok(raised) => {
            let (fds, _) = limits::default_budget(raised, shards);
            Row { value: fds.into(), text: fds.to_string(), ..row }
        }
        Err(_) => row,
    }
}

fn as_json(rows: &[Row]) -> Map<String, Value> {
    rows.iter().map(|row| (row.key.to_owned(), json!({ "value": row.value, "from": row.origin.to_string() }))).collect()
}

fn table(rows: &[Row]) -> String {
    let head = ("KEY", "VALUE", "FROM".to_owned());
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(|row| (row.key, &*row.text, row.origin.to_string()))).collect();
    let width = |of: fn(&(&str, &str, String)) -> usize| lines.iter().map(of).max().unwrap_or(0);
    let (keys, values) = (width(|line| line.0.chars().count()), width(|line| line.1.chars().count()));
    lines.iter().map(|(key, value, from)| format!("{key:<keys$}  {value:<values$}  {from}\n")).collect()
}
