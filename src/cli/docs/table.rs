//! All settings as a table in Markdown.

use std::fmt::Write;

use crate::cli::serve::reload::is_applied;
use crate::config::keys;

/// The table.
pub(super) fn settings() -> String {
    let mut text = String::from("| key | takes | default | `SIGHUP` |\n|---|---|---|---|\n");
    for key in keys::all() {
        let list = if key.is_list() { "a list of " } else { "" };
        let default = key.default().unwrap_or_else(|| "none".to_owned());
        let reload = if is_applied(key.name()) { "applies it" } else { "needs a restart" };
        // A text takes whatever is written.
        let _ = writeln!(text, "| `{}` | {list}{} | {default} | {reload} |", key.name(), key.allowed());
    }
    text
}
