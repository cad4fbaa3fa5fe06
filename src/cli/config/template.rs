//! `infill config show --default`: a settings file to begin with. All that is in it is the default, and is commented out.

use serde_json::Value;

use crate::cli::doctor::wrap;
use crate::config::keys::{self, Key};
use crate::config::{DROP_INS, Given, Resolved};

/// Width of a comment, in columns.
const COLUMNS: usize = 98;

const HEAD: &str = "\
# Settings of infill serve; infill-config(5) has the details.
# A flag wins over its environment variable, that over the files in DROP_INS beside this one (the last one first),
# those over this file, and it over the default. Check with: infill serve --check-config; see: infill config show

version = 1

[serve]
";

/// The file's text.
pub(in crate::cli) fn template() -> String {
    let head = HEAD.replace("DROP_INS", DROP_INS);
    keys::all().fold(head, |text, key| text + "\n" + &entry(key))
}

fn entry(key: Key) -> String {
    let help = match key.default() {
        Some(default) => format!("{}. Takes {}. Default: {default}.", key.help(), key.allowed()),
        None => format!("{}. Takes {}.", key.help(), key.allowed()),
    };
    let comment: String = wrap(&help, COLUMNS).iter().map(|line| format!("# {line}\n")).collect();
    match default_value(key) {
        Some(value) => format!("{comment}#{} = {value}\n", key.name()),
        None => format!("{comment}#{} =\n", key.name()),
    }
}

/// The default as it would be written in a file; `None`: it follows from something else.
pub(in crate::cli) fn default_value(key: Key) -> Option<String> {
    let default = key.default();
    if key.is_list() {
        return Some("[]".to_owned());
    }
    let settings = nothing_set()?;
    let is_it = default.is_some_and(|default| default == settings.text(key));
    // JSON's numbers and texts are TOML's too.
    Some(settings.value(key)).filter(|value| is_it && !value.is_null()).map(Value::to_string)
}

/// What there is without any file.
fn nothing_set() -> Option<Resolved> {
    Given::default().defaults().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text as it is, and with every key in it set, mean the same as no file.
    #[test]
    fn the_template_is_what_counts_without_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let text = template();
        let set: String = text.lines().map(|line| uncomment(line).unwrap_or(line).to_owned() + "\n").collect();
        for (text, least) in [(&text, 0), (&set, 25)] {
            std::fs::write(&path, text).unwrap();
            let (read, none) = (Given::default().settings(Some(&path)).unwrap(), nothing_set().unwrap());
            for key in keys::all() {
                assert_eq!(read.value(key), none.value(key), "{}", key.name());
                assert!(text.contains(&format!("\n{}{} =", if least > 0 && default_value(key).is_some() { "" } else { "#" }, key.name())));
            }
            assert!(keys::all().filter(|key| read.origin(*key) != crate::config::Origin::Default).count() >= least);
        }
    }

    fn uncomment(line: &str) -> Option<&str> {
        let setting = line.strip_prefix('#')?;
        let (name, value) = setting.split_once(" = ")?;
        (keys::find(name).is_some() && !value.is_empty()).then_some(setting)
    }

    /// What the help says is the default is the default, unless it depends on the host or on other settings.
    #[test]
    fn the_help_says_what_the_default_is() {
        let depends: Vec<_> = keys::all().filter(|key| default_value(*key).is_none()).map(Key::name).collect();
        assert_eq!(
            depends,
            [
                "secctx",
                "cache_bytes",
                "xfs_extent",
                "shards",
                "fd_budget",
                "control_socket",
                "control_group",
                "metrics_socket",
                "metrics_listen",
                "user"
            ]
        );
    }
}
