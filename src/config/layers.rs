//! Who says what: flags win over the environment, that over the drop-ins (the last one first), those over the settings file, and
//! that over the defaults. What wins replaces the whole setting, also a list.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Command, FromArgMatches};
use serde_json::{Map, Value, json};

use super::keys::{self, Key};
use super::options::Options;
use super::{Config, ConfigError, file};

/// Where a setting is from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A line of a file.
    File {
        /// Which file.
        path: PathBuf,
        /// And which line, from 1 on.
        line: usize,
    },
    /// An environment variable.
    Variable(&'static str),
    /// A flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// A setting that somebody set; the values are good for its key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Written {
    pub(super) values: Vec<OsString>,
    pub(super) origin: Origin,
}

/// What one place says.
pub(super) type Layer = BTreeMap<&'static str, Written>;

/// What the flags and the environment of this process say: a group of arguments for verbs.
#[derive(Clone, Debug, Default)]
pub struct Given(Layer);

impl clap::Args for Given {
    fn group_id() -> Option<clap::Id> {
        Options::group_id()
    }

    fn augment_args(command: Command) -> Command {
        Options::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Options::augment_args_for_update(command)
    }
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let written = |key: Key| {
            let origin = match matches.value_source(key.name())? {
                ValueSource::CommandLine => Origin::Flag(key.flag()),
                ValueSource::EnvVariable => Origin::Variable(key.variable()),
                _ => return None,
            };
            let values = matches.get_raw(key.name()).into_iter().flatten().map(ToOwned::to_owned).collect();
            Some((key.name(), Written { values, origin }))
        };
        Ok(Self(keys::all().filter_map(written).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.extend(Self::from_arg_matches(matches)?.0);
        Ok(())
    }
}

impl Given {
    /// What says where the cache is and where blobs come from, and nothing else.
    #[must_use]
    pub fn of_place(cache_dir: Option<PathBuf>, state_dir: Option<PathBuf>, control_socket: Option<PathBuf>, store: Vec<String>) -> Self {
        let paths = [("cache_dir", cache_dir), ("state_dir", state_dir), ("control_socket", control_socket)];
        let paths = paths.into_iter().filter_map(|(name, path)| Some((name, vec![path?.into_os_string()])));
        let stores = (!store.is_empty()).then(|| ("store", store.into_iter().map(OsString::from).collect()));
        let written = |(name, values): (&str, Vec<OsString>)| {
            let key = keys::find(name)?;
            Some((key.name(), Written { values, origin: Origin::Flag(key.flag()) }))
        };
        Self(paths.chain(stores).filter_map(written).collect())
    }

    /// Adds what the settings file and its drop-ins say, and checks the result. Without `file` the default one is read, if it
    /// exists.
    ///
    /// # Errors
    /// A file that cannot be read or understood, or a value that cannot be used; the message names it. No store.
    pub fn resolve(&self, file: Option<&Path>) -> Result<Config, ConfigError> {
        self.settings(file).and_then(Resolved::with_store).map(|settings| settings.config)
    }

    /// The same for a look at the settings: there need not be a store.
    ///
    /// # Errors
    /// As [`Given::resolve`].
    pub fn look(&self, file: Option<&Path>) -> Result<Config, ConfigError> {
        self.settings(file).map(|settings| settings.config)
    }

    /// The same without any file.
    ///
    /// # Errors
    /// As [`Given::look`].
    pub fn defaults(&self) -> Result<Resolved, ConfigError> {
        Resolved::of(self.0.clone())
    }

    /// The settings with the origin of each.
    ///
    /// # Errors
    /// As [`Given::look`].
    pub fn settings(&self, file: Option<&Path>) -> Result<Resolved, ConfigError> {
        let layers = file::read_all(file)?.into_iter().chain([self.0.clone()]);
        Resolved::of(layers.flatten().collect())
    }
}

/// Settings that were checked, and where they are from.
#[derive(Clone, Debug)]
pub struct Resolved {
    written: Layer,
    values: Map<String, Value>,
    /// What they make of this daemon.
    pub config: Config,
}

impl Resolved {
    /// Those that `written` makes of the defaults.
    pub(super) fn of(written: Layer) -> Result<Self, ConfigError> {
        let known = written.iter().filter_map(|(name, written)| Some((keys::find(name)?, &written.values)));
        let arguments = known.flat_map(|(key, values)| values.iter().map(move |value| keys::argument(key, value)));
        let options = keys::parse(arguments).map_err(|error| ConfigError::Unexpected(error.kind().to_string()))?;
        let origin = |setting: &str| written.get(setting).map(|written| written.origin.clone());
        let config = options.clone().values().map_err(|error| error.set_by(origin))?;
        let mut values = as_map(&config.to_options());
        // As it was written, also what has no effect beside the others.
        values.extend(as_map(&options).into_iter().filter(|(name, _)| written.contains_key(&**name)));
        Ok(Self { written, values, config })
    }

    /// The same, if at least one store is named.
    ///
    /// # Errors
    /// None is.
    pub fn with_store(self) -> Result<Self, ConfigError> {
        if self.config.stores.is_empty() { Err(ConfigError::NoStore) } else { Ok(self) }
    }

    /// Where a setting is from.
    #[must_use]
    pub fn origin(&self, key: Key) -> Origin {
        self.written.get(key.name()).map_or(Origin::Default, |written| written.origin.clone())
    }

    /// The same for people.
    #[must_use]
    pub fn text(&self, key: Key) -> String {
        match self.value(key) {
            Value::Null => "none".to_owned(),
            Value::String(text) => text.clone(),
            Value::Array(list) if list.is_empty() => "none".to_owned(),
            Value::Array(list) => list.iter().map(|value| value.as_str().unwrap_or_default()).collect::<Vec<_>>().join(", "),
            value => value.to_string(),
        }
    }

    /// A setting as it counts now; null: it has no value unless somebody sets it.
    #[must_use]
    pub fn value(&self, key: Key) -> &Value {
        self.values.get(key.name()).unwrap_or(&Value::Null)
    }

    /// All settings, each with its value and where it is from.
    #[must_use]
    pub fn described(&self) -> Map<String, Value> {
        let described = |key| json!({ "value": self.value(key), "from": self.origin(key).to_string() });
        keys::all().map(|key| (key.name().to_owned(), described(key))).collect()
    }
}

fn as_map(options: &Options) -> Map<String, Value> {
    match serde_json::to_value(options) {
        Ok(Value::Object(map)) => map,
        // All of them have a text.
        _ => Map::new(),
    }
}
