//! `infill install`: the program, its units, manual pages, completions and a settings file, where a Debian machine looks for
//! them.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use super::{Failure, config, docs};
use crate::ops::{exit, files};

/// Files of the checkout that go along: where to, below the prefix, and what they hold.
const FILES: &[(&str, &[u8])] = &[
    ("lib/systemd/system/infill.service", include_bytes!("../../tuning/systemd/infill.service")),
    ("lib/systemd/system/infill-control.socket", include_bytes!("../../tuning/systemd/infill-control.socket")),
    ("lib/systemd/system/infill-metrics.socket", include_bytes!("../../tuning/systemd/infill-metrics.socket")),
    ("lib/sysusers.d/infill.conf", include_bytes!("../../tuning/systemd/infill.sysusers")),
    ("share/infill/monitoring/alerts.yml", include_bytes!("../../docs/monitoring/alerts.yml")),
    ("share/infill/monitoring/dashboard.json", include_bytes!("../../docs/monitoring/dashboard.json")),
    ("share/infill/openapi.json", include_bytes!("../../docs/openapi.json")),
];
/// Directories, below the prefix, that nobody else has anything in, the inner ones first.
const OWN_DIRS: [&str; 2] = ["share/infill/monitoring", "share/infill"];
/// Where the settings are, whatever the prefix.
const SETTINGS: &str = "etc/infill/config.toml";
/// Modes of programs and of other files.
const PROGRAM_MODE: u32 = 0o755;
/// See [`PROGRAM_MODE`].
const FILE_MODE: u32 = 0o644;

/// Install this program with its systemd units, manual pages, completions and a commented settings file
///
/// A settings file that exists is left alone, everything else is replaced; a daemon that runs goes on with the old program until it is
/// restarted. Packages give --prefix /usr and --root.
///
/// Exit code: 0, 77 if this user may not write there, 1 for anything else.
#[derive(Debug, Args)]
pub struct InstallArgs {
    /// Below which directory of the root
    #[arg(long, value_name = "DIR", default_value = "/usr/local", value_parser = absolute)]
    prefix: PathBuf,
    /// Another root, such as that of an image or of a package
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Only say what would be written
    #[arg(long)]
    dry_run: bool,
    /// Remove what was installed, but for settings; disable the units before
    #[arg(long)]
    remove: bool,
}

/// A prefix that is not absolute would mean another place with each root.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("must be absolute; it is taken below --root".to_owned()) }
}

/// A file to be installed.
struct Item {
    path: PathBuf,
    mode: u32,
    bytes: Vec<u8>,
}

/// Installs, or removes.
///
/// # Errors
/// A file cannot be written or removed; those before it are.
pub fn run(args: &InstallArgs) -> Result<(), Failure> {
    let prefix = args.root.join(args.prefix.strip_prefix("/").unwrap_or(&args.prefix));
    let items = items(&prefix).map_err(|error| Failure::new(exit::FAILED, format!("cannot make what is to be installed: {error}")))?;
    let (verb, act): (_, fn(&Item) -> io::Result<()>) = if args.remove {
        ("remove", |item| remove(&item.path))
    } else {
        ("write", |item| files::replace(&item.path, &item.bytes, item.mode))
    };
    for item in &items {
        if !args.dry_run {
            act(item).map_err(|error| failed(verb, &item.path, &error))?;
        }
        say(&item.path);
    }
    if args.remove && !args.dry_run {
        // One with something of somebody else's in it stays.
        OWN_DIRS.iter().for_each(|dir| drop(fs::remove_dir(prefix.join(dir))));
    }
    if !args.remove {
        settings(&args.root.join(SETTINGS), args.dry_run)?;
    }
    if !args.dry_run && args.root == Path::new("/") {
        eprintln!("infill: now systemctl daemon-reload{}", if args.remove { "" } else { ", and see infill doctor" });
    }
    Ok(())
}

fn items(prefix: &Path) -> io::Result<Vec<Item>> {
    let item = |path: &str, mode, bytes| Item { path: prefix.join(path), mode, bytes };
    let mut items = vec![item("bin/infill", PROGRAM_MODE, fs::read(std::env::current_exe()?)?)];
    items.extend(FILES.iter().map(|(path, bytes)| item(path, FILE_MODE, bytes.to_vec())));
    items.extend(docs::files()?.into_iter().map(|(path, bytes)| item(&path, FILE_MODE, bytes)));
    Ok(items)
}

/// The file that an operator may have changed.
fn settings(path: &Path, dry_run: bool) -> Result<(), Failure> {
    if path.exists() {
        return Ok(());
    }
    if !dry_run {
        files::replace(path, config::template().as_bytes(), FILE_MODE).map_err(|error| failed("write", path, &error))?;
    }
    say(path);
    Ok(())
}

fn say(path: &Path) {
    // A reader that went away does not change what is done.
    let _ = writeln!(io::stdout(), "{}", path.display());
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> Failure {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let code = if denied { exit::NO_PERMISSION } else { exit::FAILED };
    Failure::new(code, format!("cannot {verb} {}: {error}; run as root, or name places of yours with --root and --prefix", path.display()))
}
