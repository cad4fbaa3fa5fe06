//! What is known of each setting, taken from the definition in `options`: names, help, what is allowed.

use std::any::TypeId;
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Args, Command, FromArgMatches};

use super::options::Options;
use super::text::{Bytes, Percent, ReadAhead, WindowText};

/// A key that is less like a known one is not taken for a slip of the pen (`strsim::jaro_winkler`, 1 is equal).
const LIKENESS_MIN: f64 = 0.75;

/// The definition, as clap has it.
static DEFINED: LazyLock<Command> =
    LazyLock::new(|| Options::augment_args(Command::new("settings")).no_binary_name(true).disable_help_flag(true));

/// The same for values that were cut apart already, wherever they are from.
static PARSER: LazyLock<Command> =
    LazyLock::new(|| DEFINED.clone().mut_args(|arg| arg.env(None::<&'static str>).value_delimiter(None::<char>)));

/// A setting.
#[derive(Clone, Copy, Debug)]
pub struct Key(&'static Arg);

/// All settings, in the order of their definition.
pub fn all() -> impl Iterator<Item = Key> {
    DEFINED.get_arguments().map(Key)
}

/// The setting that a file calls `name`.
#[must_use]
pub fn find(name: &str) -> Option<Key> {
    all().find(|key| key.names().any(|known| known == name))
}

/// Says what is wrong with a name that none of `known` equals: what was probably meant, if one is near.
pub(super) fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let likeness = |known: &&str| strsim::jaro_winkler(name, known);
    let nearest = known.max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    let shown = name.escape_debug();
    match nearest.filter(|known| likeness(known) >= LIKENESS_MIN) {
        Some(nearest) => format!("unknown key `{shown}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{shown}`; `infill config show` lists the known ones"),
    }
}

impl Key {
    /// Its key in a file.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.get_id().as_str()
    }

    /// All keys that mean it in a file.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name()).chain(self.0.get_all_aliases().unwrap_or_default())
    }

    /// Its flag, with the dashes.
    #[must_use]
    pub fn flag(self) -> String {
        format!("--{}", self.0.get_long().unwrap_or_default())
    }

    /// Its environment variable.
    #[must_use]
    pub fn variable(self) -> &'static str {
        self.0.get_env().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// Whether it has several values.
    #[must_use]
    pub fn is_list(self) -> bool {
        matches!(self.0.get_action(), ArgAction::Append)
    }

    /// What it does, without its default.
    #[must_use]
    pub fn help(self) -> String {
        let (help, _) = self.help_and_default();
        help
    }

    /// What it is if nothing is set: a value, or words that say what it follows from.
    #[must_use]
    pub fn default(self) -> Option<String> {
        self.help_and_default().1
    }

    fn help_and_default(self) -> (String, Option<String>) {
        let text = self.0.get_help().map(ToString::to_string).unwrap_or_default();
        match text.split_once("[default: ") {
            Some((help, default)) => (help.trim_end().to_owned(), default.strip_suffix(']').map(ToOwned::to_owned)),
            None => (text, None),
        }
    }

    /// What values it takes, in words.
    #[must_use]
    pub fn allowed(self) -> String {
        let shown: Vec<_> =
            self.0.get_possible_values().iter().filter(|value| !value.is_hide_set()).map(|v| v.get_name().to_owned()).collect();
        if !shown.is_empty() {
            return one_of(&shown);
        }
        let kind = self.0.get_value_parser().type_id();
        let kinds: [(TypeId, &str); 9] = [
            (TypeId::of::<u32>(), "a whole number"),
            (TypeId::of::<u64>(), "a whole number"),
            (TypeId::of::<NonZeroUsize>(), "a whole number from 1 on"),
            (TypeId::of::<Percent>(), "a percentage, such as 10 or 10%"),
            (TypeId::of::<Bytes>(), "a size, such as 4096, 128K or 1M"),
            (TypeId::of::<WindowText>(), "auto, or a size such as 64K"),
            (TypeId::of::<ReadAhead>(), "auto, kernel, or a size such as 1M"),
            (TypeId::of::<PathBuf>(), "a path"),
            (TypeId::of::<SocketAddr>(), "an address and a port, such as 127.0.0.1:9100"),
        ];
        kinds.iter().find(|(known, _)| kind == *known).map_or("text", |(_, words)| words).to_owned()
    }

    /// Whether the values can be its own.
    ///
    /// # Errors
    /// What is wrong, and what is allowed.
    pub fn check(self, values: &[OsString]) -> Result<(), String> {
        parse(values.iter().map(|value| argument(self, value))).map(drop).map_err(|error| self.problem(&error))
    }

    fn problem(self, error: &clap::Error) -> String {
        let why = error.source().map(|why| format!(" ({})", one_line(&why.to_string()))).unwrap_or_default();
        let value = match error.get(ContextKind::InvalidValue) {
            Some(ContextValue::String(value)) => shorten(value),
            _ => "it".to_owned(),
        };
        format!("{value}: must be {}{why}", self.allowed())
    }
}

/// One value of a setting, as an argument.
pub(super) fn argument(key: Key, value: &OsStr) -> OsString {
    let mut argument = OsString::from(key.flag());
    argument.push("=");
    argument.push(value);
    argument
}

/// The settings that the arguments are.
pub(super) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    Options::from_arg_matches(&PARSER.clone().try_get_matches_from(arguments)?)
}

/// `a`, `a or b`, `a, b or c`.
fn one_of(words: &[String]) -> String {
    match words {
        [most @ .., last] if !most.is_empty() => format!("{} or {last}", most.join(", ")),
        _ => words.concat(),
    }
}

/// A text for a message, whatever is in it.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A value for a message: one line, and not a long one.
pub(super) fn shorten(value: &str) -> String {
    const CHARS_MAX: usize = 60;
    let start: String = value.chars().take(CHARS_MAX).collect();
    if start.len() < value.len() { format!("{start:?}...") } else { format!("{value:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_flag_a_variable_and_help_by_the_same_rule() {
        for key in all() {
            let name = key.name();
            assert_eq!(key.flag(), format!("--{}", name.replace('_', "-")));
            assert_eq!(key.variable(), format!("INFILL_{}", name.to_uppercase()));
            assert!(!key.help().is_empty() && !key.help().contains('['), "{name}: {}", key.help());
            assert!(key.is_list() || key.default().is_some(), "{name} does not say its default");
            let text = key.0.get_value_parser().type_id() == TypeId::of::<String>();
            assert_eq!(key.allowed() == "text", text, "{name}: say in `allowed` what it takes");
        }
        assert_eq!(find("dir").unwrap().name(), "cache_dir");
        assert!(find("slots-").is_none());
    }

    #[test]
    fn a_slip_of_the_pen_is_told_from_nonsense() {
        let names = || all().map(Key::name);
        for (wrong, right) in
            [("windwo", "window"), ("cache-dir", "cache_dir"), ("stores", "store"), ("loglevel", "log_level"), ("bcul", "bcull")]
        {
            assert_eq!(unknown(wrong, names()), format!("unknown key `{wrong}`; did you mean `{right}`?"));
        }
        let message = unknown("xyzzy\nplugh", names());
        assert!(message.starts_with("unknown key `xyzzy\\nplugh`; `infill config show`"), "{message}");
    }
}
