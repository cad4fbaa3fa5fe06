//! Manual pages: one for each verb, and one for the settings.

use std::io;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use crate::cli::serve::reload::is_applied;
use crate::config::keys::{self, Key};
use crate::config::{DEFAULT_CACHE_DIR, DEFAULT_FILE, DROP_INS};
use crate::ops::exit;
use crate::ops::state::DEFAULT_STATE_DIR;

/// Verbs for any user; the others are for who administers the host.
const FOR_USERS: [&str; 4] = ["bench", "config", "demo", "docs"];
/// The page of the settings.
const SETTINGS: &str = "infill-config";

/// A page.
pub(super) struct Page {
    /// Its file's name.
    pub(super) file: String,
    pub(super) text: String,
}

/// A term and what it means.
type Entry = (String, String);

/// All of them.
pub(super) fn pages() -> io::Result<Vec<Page>> {
    let mut command = crate::cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages = vec![of_settings()];
    add(&command, "1", &mut pages)?;
    Ok(pages)
}

/// The page of a verb, and those of the verbs below it.
fn add(command: &Command, section: &str, pages: &mut Vec<Page>) -> io::Result<()> {
    pages.push(of_verb(command, section)?);
    for verb in shown(command) {
        add(verb, section_of(command, verb, section), pages)?;
    }
    Ok(())
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|verb| !verb.is_hide_set())
}

/// A verb below another one is in the section of that; below none, as it is for.
fn section_of<'a>(parent: &Command, verb: &Command, section: &'a str) -> &'a str {
    let is_top = parent.get_display_name().is_none_or(|name| !name.contains('-'));
    if is_top && !FOR_USERS.contains(&verb.get_name()) { "8" } else { section }
}

fn name_of(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

fn of_verb(command: &Command, section: &str) -> io::Result<Page> {
    let name = name_of(command);
    let man = Man::new(command.clone()).section(section).source(source()).manual("infill");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    let mut roff = Roff::new();
    let verbs: Vec<_> = shown(command).map(|verb| (page_name(verb, section_of(command, verb, section)), about(verb))).collect();
    if !verbs.is_empty() {
        entries(&mut roff, "COMMANDS", &verbs);
    }
    if name == "infill-serve" {
        entries(&mut roff, "SIGNALS", &signals());
    }
    entries(&mut roff, "EXIT STATUS", &exit_codes());
    entries(&mut roff, "ENVIRONMENT", &variables());
    entries(&mut roff, "FILES", &files());
    see_also(&mut roff, name);
    roff.to_writer(&mut text)?;
    Ok(Page { file: format!("{name}.{section}"), text: String::from_utf8_lossy(&text).into_owned() })
}

fn page_name(verb: &Command, section: &str) -> String {
    format!("{}({section})", name_of(verb))
}

fn about(verb: &Command) -> String {
    verb.get_about().map(ToString::to_string).unwrap_or_default()
}

fn source() -> String {
    format!("infill {}", env!("CARGO_PKG_VERSION"))
}

fn entries(roff: &mut Roff, heading: &str, entries: &[Entry]) {
    roff.control("SH", [heading]);
    for (term, meaning) in entries {
        roff.control("TP", []);
        roff.text([bold(term.as_str())]);
        roff.text([roman(meaning.as_str())]);
    }
}

fn own(entries: &[(&str, &str)]) -> Vec<Entry> {
    entries.iter().map(|(term, meaning)| ((*term).to_owned(), (*meaning).to_owned())).collect()
}

fn signals() -> Vec<Entry> {
    own(&[
        (
            "SIGTERM, SIGINT",
            "Finish the reads that have begun, at most for --drain-timeout-ms, and end; mounted images stay mounted. A second one: end now.",
        ),
        (
            "SIGHUP",
            "Read the settings files again, apply what can be applied, and name in the log each changed setting that needs a restart. A file that is wrong changes nothing.",
        ),
        ("SIGUSR1", "Write the statistics to the log, as one JSON object."),
    ])
}

fn exit_codes() -> Vec<Entry> {
    [
        (0, "It worked."),
        (exit::FAILED, "It failed, and no other code says why."),
        (exit::USAGE, "The command line was wrong."),
        (exit::UNAVAILABLE, "The kernel lacks a feature, or its device is in use, or no daemon serves."),
        (exit::TRY_AGAIN, "It cannot be done now, and perhaps soon: the daemon is busy or was started anew."),
        (exit::NO_PERMISSION, "This user is not permitted to do it."),
        (exit::BAD_CONFIGURATION, "The settings cannot work."),
    ]
    .map(|(code, meaning)| (code.to_string(), meaning.to_owned()))
    .into()
}

fn variables() -> Vec<Entry> {
    own(&[
        ("INFILL_CONFIG", "The settings file, as --config."),
        ("INFILL_*", "Each setting has a variable, which counts if its flag is not given: see infill-config(5)."),
        ("NOTIFY_SOCKET, LISTEN_FDS, LISTEN_FDNAMES, FDSTORE", "What systemd tells a service: see sd_notify(3) and sd_listen_fds(3)."),
        ("NO_COLOR", "If it is set, nothing is coloured."),
    ])
}

fn files() -> Vec<Entry> {
    vec![
        (DEFAULT_FILE.to_owned(), "The settings: see infill-config(5).".to_owned()),
        (drop_ins(), "More of them, which win over it; the last one wins.".to_owned()),
        (DEFAULT_STATE_DIR.to_owned(), "The daemon's lock and its sockets (--state-dir).".to_owned()),
        (DEFAULT_CACHE_DIR.to_owned(), "The cache (--cache-dir).".to_owned()),
    ]
}

fn drop_ins() -> String {
    std::path::Path::new(DEFAULT_FILE).with_file_name(DROP_INS).join("*.toml").display().to_string()
}

fn see_also(roff: &mut Roff, name: &str) {
    let others = [("infill", "1"), ("infill-serve", "8"), ("infill-mount", "8"), ("infill-doctor", "8"), (SETTINGS, "5")];
    let others: Vec<_> = others.iter().filter(|(other, section)| *other != name || *section == "5").collect();
    roff.control("SH", ["SEE ALSO"]);
    for (at, (other, section)) in others.iter().enumerate() {
        let end = if at + 1 < others.len() { "," } else { "" };
        roff.text([bold(*other), roman(format!("({section}){end}"))]);
    }
}

/// `infill-config(5)`.
fn of_settings() -> Page {
    let mut roff = Roff::new();
    roff.control("TH", [SETTINGS, "5", "", &source(), "infill"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{SETTINGS} - settings of infill serve"))]);
    roff.control("SH", ["DESCRIPTION"]);
    for paragraph in DESCRIPTION {
        roff.control("PP", []);
        roff.text([roman(paragraph.replace("FILE", DEFAULT_FILE).replace("DROPINS", &drop_ins()))]);
    }
    roff.control("SH", ["SETTINGS"]);
    keys::all().for_each(|key| setting(&mut roff, key));
    entries(&mut roff, "FILES", &files());
    roff.control("SH", ["EXAMPLE"]);
    roff.control("nf", []);
    for line in EXAMPLE.lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    see_also(&mut roff, "");
    Page { file: format!("{SETTINGS}.5"), text: roff.to_roff() }
}

const DESCRIPTION: [&str; 4] = [
    "The settings file is FILE, or the one that --config names. It is TOML: version = 1 at the top, and the settings in the table [serve].",
    "The files DROPINS, or those in a directory of that name beside the file that --config names, are read after it in the order of their names. A flag wins over its environment variable, that over these files, of which the last one wins, those over the settings file, and it over the default. What wins replaces the whole setting, also a list.",
    "A value is written as for its flag; a number needs no quotes, and a list is an array. An unknown key or a wrong value is an error, which names the file and the line. infill serve --check-config looks for errors, infill config show prints what counts and where it is from, and infill config show --default prints a file to begin with.",
    "SIGHUP has a daemon that runs read the files again. It applies the settings that say so below, and names in its log those that need a restart. A daemon that is confined must be able to read the files as the user that it has become.",
];

const EXAMPLE: &str = "\
version = 1

[serve]
store = [\"dir:/srv/blobs\", \"oci:/var/lib/images\"]
cache_bytes = \"200G\"
log_level = \"warn\"
";

fn setting(roff: &mut Roff, key: Key) {
    roff.control("TP", []);
    roff.text([bold(key.name()), roman(if key.is_list() { " (list)" } else { "" })]);
    roff.text([roman(format!("{}.", key.help()))]);
    roff.control("br", []);
    roff.text([roman(format!("Takes {}. Default: {}.", key.allowed(), key.default().unwrap_or_else(|| "none".to_owned())))]);
    roff.control("br", []);
    let reload = if is_applied(key.name()) { "SIGHUP applies it." } else { "It needs a restart." };
    roff.text([roman("Flag "), bold(key.flag()), roman(", variable "), bold(key.variable()), roman(format!(". {reload}"))]);
    for alias in key.names().skip(1) {
        roff.text([roman("Also written "), italic(alias), roman(".")]);
    }
}
