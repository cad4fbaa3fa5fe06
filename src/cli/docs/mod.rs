//! `infill docs`: what is made from the definitions of the command line and of the settings, so that it cannot say something
//! else: manual pages, completions for shells, the table in docs/configuration.md.

mod man;
mod table;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use clap_complete::aot;

use super::Failure;
use crate::ops::exit;

/// Write manual pages and shell completions
#[derive(Debug, Subcommand)]
pub enum Docs {
    /// Write the manual pages into a directory, for packages to compress and install
    Man {
        /// Directory; it is made if it does not exist
        dir: PathBuf,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the table of all settings, as Markdown
    Settings,
}

/// Shells for which there are completions.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Shell {
    /// For /usr/share/bash-completion/completions/infill.
    Bash,
    /// For /usr/share/fish/vendor_completions.d/infill.fish.
    Fish,
    /// For /usr/share/zsh/vendor-completions/_infill.
    Zsh,
}

/// Writes what is asked for.
///
/// # Errors
/// A file cannot be written.
pub fn run(what: &Docs) -> Result<(), Failure> {
    match what {
        Docs::Man { dir } => {
            let failed =
                |error: io::Error| Failure::new(exit::FAILED, format!("cannot write manual pages into {}: {error}", dir.display()));
            fs::create_dir_all(dir).map_err(failed)?;
            man::pages().map_err(failed)?.into_iter().try_for_each(|page| fs::write(dir.join(page.file), page.text)).map_err(failed)
        }
        Docs::Completions { shell } => print(&completions(*shell)),
        Docs::Settings => print(table::settings().as_bytes()),
    }
}

/// Manual pages and completions, where they belong below a prefix.
pub(super) fn files() -> io::Result<Vec<(String, Vec<u8>)>> {
    let page = |page: man::Page| {
        let section = page.file.rsplit('.').next().unwrap_or_default().to_owned();
        (format!("share/man/man{section}/{}", page.file), page.text.into())
    };
    let shells = [
        (Shell::Bash, "share/bash-completion/completions/infill"),
        (Shell::Fish, "share/fish/vendor_completions.d/infill.fish"),
        (Shell::Zsh, "share/zsh/site-functions/_infill"),
    ];
    let completions = shells.map(|(shell, path)| (path.to_owned(), completions(shell)));
    Ok(man::pages()?.into_iter().map(page).chain(completions).collect())
}

fn print(bytes: &[u8]) -> Result<(), Failure> {
    let written = io::stdout().lock().write_all(bytes);
    written.map_err(|error| Failure::new(exit::FAILED, format!("cannot write to standard output: {error}")))
}

fn completions(shell: Shell) -> Vec<u8> {
    let shell = match shell {
        Shell::Bash => aot::Shell::Bash,
        Shell::Fish => aot::Shell::Fish,
        Shell::Zsh => aot::Shell::Zsh,
    };
    let (mut command, mut text) = (super::command(), Vec::new());
    aot::generate(shell, &mut command, "infill", &mut text);
    text
}

#[cfg(test)]
mod tests;
