//! What is generated is complete, and well formed where there is a program that knows.

use std::process::Command;

use super::*;
use crate::config::keys;

/// All verbs, also those below others.
fn verbs(command: &clap::Command) -> Vec<clap::Command> {
    let below = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    below.flat_map(|verb| [vec![verb.clone()], verbs(verb)].concat()).collect()
}

/// As roff writes it, in which a hyphen is not a minus.
fn in_roff(text: &str) -> String {
    text.replace('-', "\\-")
}

#[test]
fn every_verb_flag_and_key_is_in_the_manual() {
    let pages = man::pages().unwrap();
    let page =
        |name: &str| pages.iter().find(|page| page.file.rsplit_once('.').is_some_and(|(of, _)| of == name) && !page.file.ends_with(".5"));
    let mut command = crate::cli::command().disable_help_subcommand(true);
    command.build();
    for verb in verbs(&command) {
        let name = verb.get_display_name().unwrap();
        let page = page(name).unwrap_or_else(|| panic!("no page of {name}"));
        for flag in verb.get_arguments().filter(|flag| !flag.is_hide_set()).filter_map(clap::Arg::get_long) {
            assert!(page.text.contains(&in_roff(&format!("--{flag}"))), "{} lacks --{flag}", page.file);
        }
        for section in ["EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"] {
            assert!(
                page.text.contains(&format!(".SH \"{section}\"")) || page.text.contains(&format!(".SH {section}")),
                "{}: {section}",
                page.file
            );
        }
    }
    assert!(page("infill-serve").unwrap().file == "infill-serve.8" && page("infill").unwrap().text.contains("infill\\-serve(8)"));
    let settings = pages.iter().find(|page| page.file == "infill-config.5").unwrap();
    for key in keys::all() {
        for word in [key.name(), &*in_roff(&key.flag()), key.variable()] {
            assert!(settings.text.contains(word), "infill-config.5 lacks {word}");
        }
    }
}

#[test]
fn groff_has_nothing_to_complain_of() {
    let dir = tempfile::tempdir().unwrap();
    run(&Docs::Man { dir: dir.path().join("man") }).unwrap();
    let lint: [&[&str]; 2] = [&["mandoc", "-Tlint", "-Werror"], &["groff", "-man", "-Tutf8", "-ww", "-z"]];
    let is_there = |program: &&&[&str]| Command::new(program[0]).arg("--version").output().is_ok();
    let Some(program) = lint.iter().find(is_there) else {
        return println!("not run: neither mandoc nor groff is installed");
    };
    for page in fs::read_dir(dir.path().join("man")).unwrap() {
        let page = page.unwrap().path();
        let output = Command::new(program[0]).args(&program[1..]).arg(&page).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{} {}: {said}", program[0], page.display());
    }
}

#[test]
fn shells_take_their_completions() {
    let dir = tempfile::tempdir().unwrap();
    for (shell, program) in [(Shell::Bash, "bash"), (Shell::Fish, "fish"), (Shell::Zsh, "zsh")] {
        let text = completions(shell);
        let shown = String::from_utf8_lossy(&text);
        assert!(shown.contains("check-config") && shown.contains("cache-bytes"), "{shell:?}");
        let path = dir.path().join(program);
        fs::write(&path, &text).unwrap();
        match Command::new(program).arg("-n").arg(&path).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => println!("not checked by {program}: {error}"),
        }
    }
}

#[test]
fn the_page_on_configuration_has_the_table_of_all_settings() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    let text = fs::read_to_string(page).unwrap();
    assert!(text.contains(&table::settings()), "put the output of `infill docs settings` into docs/configuration.md");
}
