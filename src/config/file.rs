//! One settings file. A value is written as for its flag; a number needs no quotes, and a list is an array.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;
use super::keys::{self, Key, one_line, shorten};
use super::layers::{Layer, Origin, Written};

/// Read if no other file is named; it need not be there.
pub const DEFAULT_FILE: &str = "/etc/infill/config.toml";
/// Directory beside the settings file whose files are read after it.
pub const DROP_INS: &str = "config.d";
/// What their names end with; other files there are left alone, and hidden ones too.
const SUFFIX: &str = ".toml";
/// Version of the file format.
const FILE_VERSION: i64 = 1;
/// What is at the top of a file.
const VERSION: &str = "version";
const SERVE: &str = "serve";

/// Reads the settings file, or the default one if it is there, and the drop-ins beside it: the first one counts least.
pub(super) fn read_all(file: Option<&Path>) -> Result<Vec<Layer>, ConfigError> {
    let main = file.unwrap_or(Path::new(DEFAULT_FILE));
    let mut layers = Vec::new();
    match read(main) {
        Err(ConfigError::Unreadable { source, .. }) if file.is_none() && source.kind() == ErrorKind::NotFound => {}
        read => layers.push(read?),
    }
    for drop_in in drop_ins(&main.with_file_name(DROP_INS))? {
        layers.push(read(&drop_in)?);
    }
    Ok(layers)
}

/// The directory that has the settings file, and the one with the drop-ins.
#[must_use]
pub fn directory(file: Option<&Path>) -> &Path {
    let parent = file.unwrap_or(Path::new(DEFAULT_FILE)).parent().unwrap_or(Path::new("/"));
    if parent.as_os_str().is_empty() { Path::new(".") } else { parent }
}

/// The files of a directory of drop-ins, in the order of the bytes of their names; none if it is not there.
///
/// # Errors
/// It cannot be read.
pub fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(unreadable)?,
    };
    let mut names = entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<Vec<_>, _>>().map_err(unreadable)?;
    let is_wanted = |name: &OsString| {
        let name = name.as_encoded_bytes();
        name.ends_with(SUFFIX.as_bytes()) && !name.starts_with(b".")
    };
    names.retain(is_wanted);
    names.sort();
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

fn read(path: &Path) -> Result<Layer, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// The settings in a file's text.
pub(super) fn parse(path: &Path, text: &str) -> Result<Layer, ConfigError> {
    let file = File { path, text };
    let root = DeTable::parse(text).map_err(|error| file.wrong(error.span().unwrap_or(0..0), &one_line(error.message())))?;
    let (mut layer, mut version) = (Layer::new(), None);
    for (key, value) in root.get_ref() {
        match key.get_ref().as_ref() {
            VERSION => version = Some(file.check_version(value)?),
            SERVE => layer = file.serve(value)?,
            other if keys::find(other).is_some() => {
                return Err(file.wrong(key.span(), &format!("`{other}` belongs below the line [{SERVE}]")));
            }
            other => return Err(file.wrong(key.span(), &keys::unknown(other, [VERSION, SERVE].into_iter()))),
        }
    }
    version.map(|()| layer).ok_or_else(|| file.wrong(0..0, &format!("{VERSION} = {FILE_VERSION} is missing; write it at the top")))
}

struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl File<'_> {
    fn line(&self, span: &Range<usize>) -> usize {
        1 + self.text.as_bytes().iter().take(span.start).filter(|byte| **byte == b'\n').count()
    }

    fn wrong(&self, span: Range<usize>, problem: &str) -> ConfigError {
        ConfigError::File { path: self.path.to_owned(), line: self.line(&span), problem: problem.to_owned() }
    }

    fn check_version(&self, value: &Spanned<DeValue<'_>>) -> Result<(), ConfigError> {
        if text_of(value.get_ref()).is_some_and(|text| text == FILE_VERSION.to_string()) {
            return Ok(());
        }
        let found = shorten(&self.text[value.span()]);
        Err(self.wrong(value.span(), &format!("{VERSION} = {found} is not known; this infill reads {VERSION} {FILE_VERSION}")))
    }

    fn serve(&self, table: &Spanned<DeValue<'_>>) -> Result<Layer, ConfigError> {
        let settings =
            table.get_ref().as_table().ok_or_else(|| self.wrong(table.span(), &format!("`{SERVE}` is a table: write [{SERVE}]")))?;
        let mut layer = Layer::new();
        for (name, value) in settings {
            let unknown = || keys::unknown(name.get_ref(), keys::all().flat_map(Key::names));
            let key = keys::find(name.get_ref()).ok_or_else(|| self.wrong(name.span(), &unknown()))?;
            let values = self.values(key, name.get_ref(), value)?;
            key.check(&values).map_err(|problem| self.wrong(value.span(), &format!("{} = {problem}", name.get_ref())))?;
            let origin = Origin::File { path: self.path.to_owned(), line: self.line(&name.span()) };
            if layer.insert(key.name(), Written { values, origin }).is_some() {
                let names: Vec<_> = key.names().collect();
                return Err(self.wrong(name.span(), &format!("{} mean the same, and only one of them can be set", names.join(" and "))));
            }
        }
        Ok(layer)
    }

    fn values(&self, key: Key, name: &str, value: &Spanned<DeValue<'_>>) -> Result<Vec<OsString>, ConfigError> {
        let wrong = |value: &Spanned<DeValue<'_>>| {
            let (kind, allowed) = (value.get_ref().type_str(), key.allowed());
            let list = if key.is_list() { "a list of " } else { "" };
            self.wrong(value.span(), &format!("{name}: must be {list}{allowed}, and this is of type {kind}"))
        };
        let one = |value: &Spanned<DeValue<'_>>| text_of(value.get_ref()).map(OsString::from).ok_or_else(|| wrong(value));
        match value.get_ref() {
            DeValue::Array(values) if key.is_list() => values.iter().map(one).collect(),
            _ => Ok(vec![one(value)?]),
        }
    }
}

/// A text or a whole number as it would be written for a flag; `None`: it is something else.
fn text_of(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix()).ok().map(|number| number.to_string()),
        _ => None,
    }
}
