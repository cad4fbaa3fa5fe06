//! What an operator gets for bad input: one line that says what, where and what to do, and the documented
//! exit code. Nothing here needs a kernel with cachefiles, or root.

use std::path::Path;
use std::process::{Command, Output};

fn infill(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("INFILL_")) {
        command.env_remove(name);
    }
    command.args(args).output().expect("the binary runs")
}

/// Runs and checks the exit code and that standard error is one line with all of `words`.
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let output = infill(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: no {word:?} in: {text}");
    }
    assert_eq!(text.trim_end().lines().count(), 1, "{args:?}: more than one line: {text}");
    assert!(output.stdout.is_empty(), "{args:?} printed something");
}

fn settings(dir: &Path, text: &str) -> String {
    let path = dir.join("config.toml");
    std::fs::write(&path, text).expect("a scratch file can be written");
    path.to_str().expect("a scratch path is text").to_owned()
}

#[test]
fn no_store_is_explained() {
    refused(&["serve"], 78, &["no store", "--store dir:PATH"]);
}

#[test]
fn a_store_that_is_not_there_is_named() {
    refused(&["serve", "--store", "dir:/no/such/place"], 78, &["dir:/no/such/place", "does not exist"]);
    refused(&["serve", "--store", "oci:/no/such/place"], 78, &["oci:/no/such/place"]);
}

#[test]
fn an_unknown_kind_of_store_lists_the_known_ones() {
    refused(&["serve", "--store", "s3:bucket"], 78, &["s3:bucket", "dir:PATH", "oci:PATH"]);
}

#[test]
fn values_out_of_bounds_say_what_is_allowed() {
    refused(&["serve", "--store", "dir:/", "--window", "5000"], 78, &["window = 5000", "power of two"]);
    refused(&["serve", "--store", "dir:/", "--slots", "0"], 78, &["slots = 0", "must be 1 to"]);
}

#[test]
fn a_bad_flag_is_a_usage_error() {
    for args in [&["serve", "--no-such-flag"][..], &["serve", "--engine", "turbo"], &["no-such-verb"], &["serve", "--window", "1X"]] {
        assert_eq!(infill(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_settings_file_is_checked_before_anything_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let path = settings(dir.path(), "version = 1\n[serve]\nstore = [\"dir:/\"]\nwindwo = 1\n");
    let output = infill(&["serve", "--config", &path]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(78) && text.contains("windwo") && text.contains(&path), "{text}");
    refused(&["serve", "--config", "/no/such/file"], 78, &["/no/such/file"]);
    let path = settings(dir.path(), "version = 1\n[serve]\nstore = [\"dir:/\"]\nwindow = \"64K\"\n");
    let output = infill(&["serve", "--config", &path, "--check-config"]);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn prefetch_says_what_it_can_do_and_what_it_could_not() {
    let args = ["prefetch", "--cache-dir", "/no/such/cache", "--store", "dir:/no/such/place", "a.img"];
    refused(&args, 2, &["--seed", "not supported in this version"]);
    refused(&[&args[..], &["--seed"]].concat(), 78, &["dir:/no/such/place", "does not exist"]);
    let args = ["prefetch", "--seed", "--cache-dir", "/proc/cache", "--store", "dir:/", "a.img"];
    let output = infill(&args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(78) && text.contains("/proc/cache"), "{output:?}");
}

#[test]
fn a_kernel_without_cachefiles_is_explained() {
    if Path::new("/dev/cachefiles").exists() {
        return println!("not run: this kernel has /dev/cachefiles");
    }
    let store = tempfile::tempdir().unwrap();
    let spec = format!("dir:{}", store.path().display());
    refused(&["serve", "--front-end", "cachefiles", "--store", &spec], 69, &["/dev/cachefiles", "modprobe cachefiles", "docs/kernels.md"]);
}

#[test]
fn the_doctor_speaks_json() {
    let output = infill(&["doctor", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let report: serde_json::Value = serde_json::from_str(text.trim_end().lines().last().unwrap_or_default()).expect("one JSON object");
    assert!(report["checks"].as_array().is_some_and(|checks| checks.len() > 5), "{report}");
    assert!(report["verdict"].is_string(), "{report}");
}

#[test]
fn there_is_nothing_to_release_and_a_keeper_is_not_started_by_hand() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let state = dir.path().join("state");
    refused(&["release", "--state-dir", state.to_str().expect("text")], 1, &["nothing to release", "/state"]);
    refused(&["keeper"], 1, &["infill serve"]);
}

#[test]
fn a_user_that_does_not_exist_is_named() {
    refused(&["serve", "--store", "dir:/tmp", "--user", "no-such-user"], 78, &["no-such-user", "UID:GID"]);
    refused(&["serve", "--store", "dir:/tmp", "--user", "root:wheel"], 78, &["user = root:wheel", "number of a group"]);
}

#[test]
fn a_knob_that_is_not_there_is_named_with_those_that_are() {
    refused(&["bench", "tune", "--knob", "turbo"], 2, &["turbo", "halt-poll", "fd-budget"]);
    let output = infill(&["bench", "tune", "--list"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("guest_halt_poll_ns"), "{output:?}");
}
