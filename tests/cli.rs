//! What an operator gets for bad input: one line that says what, where and what to do, and the documented
//! exit code. Nothing here needs a kernel with cachefiles, or root.

use std::os::unix::fs::PermissionsExt;
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
fn a_bad_variable_is_a_bad_configuration_and_is_named() {
    for (variable, value, words) in [
        ("INFILL_SHARDS", "many", ["INFILL_SHARDS: shards = \"many\"", "a whole number"]),
        ("INFILL_LOG_LEVEL", "", ["INFILL_LOG_LEVEL: log_level = \"\"", "error, warn, info or debug"]),
    ] {
        let serve =
            |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_infill")).args(args).env_clear().env(variable, value).output().unwrap();
        let output = serve(&["serve", "--store", "dir:/", "--check-config"]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(78) && text.lines().count() == 1, "{output:?}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        // A flag wins, also over what is no value.
        let output = serve(&["serve", "--store", "dir:/", "--check-config", "--shards", "1", "--log-level", "info"]);
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn a_reader_that_has_gone_is_no_trouble() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    for verb in [&["config", "show"][..], &["config", "show", "--json"]] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_infill")).args(verb).env_clear().stdout(writer.try_clone().unwrap()).output().unwrap();
        assert!(output.status.success(), "{verb:?}: {output:?}");
    }
}

#[test]
fn what_a_check_can_know_of_sockets_it_says() {
    let check = ["serve", "--store", "dir:/", "--check-config"];
    refused(&[&check[..], &["--control-group", "no-such-group"]].concat(), 78, &["no-such-group", "groupadd"]);
    refused(&[&check[..], &["--control-socket", "/x", "--metrics-socket", "/x"]].concat(), 78, &["metrics_socket = /x", "control_socket"]);
}

#[test]
fn a_settings_file_is_checked_before_anything_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let path = settings(dir.path(), "version = 1\n[serve]\nstore = [\"dir:/\"]\nwindwo = 1\n");
    let said = format!("{path}:4: unknown key `windwo`; did you mean `window`?");
    for args in [&["serve", "--config", &path][..], &["serve", "--check-config", "--config", &path], &["config", "show", "--config", &path]]
    {
        refused(args, 78, &[&said]);
    }
    refused(&["serve", "--config", "/no/such/file"], 78, &["/no/such/file"]);
    let path = settings(dir.path(), "version = 1\n[serve]\nstore = [\"dir:/\"]\nwindow = \"64K\"\n");
    let check = ["serve", "--config", &path, "--check-config"];
    let output = infill(&check);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    refused(&[&check[..], &["--store", "dir:/no/such/place"]].concat(), 78, &["dir:/no/such/place", "does not exist"]);
    refused(&[&check[..], &["--user", "no-such-user"]].concat(), 78, &["no-such-user"]);
    refused(&[&check[..], &["--fd-budget", "2000000000"]].concat(), 78, &["fd_budget = 2000000000", "at most"]);
}

#[test]
fn every_setting_is_shown_with_where_it_is_from() {
    let dir = tempfile::tempdir().unwrap();
    let path = settings(dir.path(), "version = 1\n[serve]\nstore = [\"dir:/a\", \"dir:/b\"]\nwindow = \"64K\"\nworkers = 3\n");
    std::fs::create_dir(dir.path().join("config.d")).unwrap();
    std::fs::write(dir.path().join("config.d/50-x.toml"), "version = 1\n[serve]\nworkers = 4\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    let given = ["config", "show", "--json", "--config", &path, "--slots", "7"];
    let output = command.args(given).env_clear().env("INFILL_CACHE_BYTES", "10G").output().unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let is = |key: &str, value: serde_json::Value, from: &str| {
        assert_eq!(shown[key], serde_json::json!({ "value": value, "from": from }), "{key}");
    };
    is("slots", 7.into(), "--slots");
    is("cache_bytes", "10G".into(), "INFILL_CACHE_BYTES");
    is("workers", 4.into(), &format!("{}/config.d/50-x.toml:3", dir.path().display()));
    is("window", "64K".into(), &format!("{path}:4"));
    is("store", serde_json::json!(["dir:/a", "dir:/b"]), &format!("{path}:3"));
    is("brun", 7.into(), "default");
    is("state_dir", "/run/infill".into(), "default");
    is("control_socket", "/run/infill/control.sock".into(), "default");
    for computed in ["shards", "fd_budget"] {
        assert!(shown[computed]["value"].as_u64().is_some_and(|number| number > 0), "{shown}");
    }
    let output = infill(&["config", "show", "--changed", "--config", &path]);
    let lines: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(lines, ["KEY", "store", "window", "workers"]);
}

#[test]
fn a_settings_file_to_begin_with_is_good_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let output = infill(&["config", "show", "--default"]);
    let path = settings(dir.path(), std::str::from_utf8(&output.stdout).unwrap());
    let output = infill(&["serve", "--check-config", "--store", "dir:/", "--config", &path]);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn prefetch_says_what_it_can_do_and_what_it_could_not() {
    let args = ["prefetch", "--cache-dir", "/no/such/cache", "--store", "dir:/no/such/place", "a.img"];
    let no_daemon = ["--control-socket", "/no/such/socket"];
    refused(&[&args[..], &no_daemon].concat(), 69, &["no daemon listens on /no/such/socket", "infill serve"]);
    refused(&[&args[..], &["--seed"]].concat(), 78, &["dir:/no/such/place", "does not exist"]);
    let args = ["prefetch", "--seed", "--cache-dir", "/proc/cache", "--store", "dir:/", "a.img"];
    let output = infill(&args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(78) && text.contains("/proc/cache"), "{output:?}");
}

#[test]
fn verbs_that_ask_a_daemon_say_which_one_is_not_there() {
    for verb in ["stat", "log-level"] {
        refused(&[verb, "--control-socket", "/no/such/socket"], 69, &["/no/such/socket", "--control-socket"]);
        refused(&[verb, "--state-dir", "/no/such/dir"], 69, &["/no/such/dir/control.sock", "infill serve"]);
    }
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

/// Where packages want it, twice; what an operator has changed stays.
#[test]
fn install_writes_all_that_belongs_to_it_and_takes_it_away_again() {
    let root = tempfile::tempdir().expect("a scratch directory");
    let at = |path: &str| root.path().join(path);
    let install = |more: &[&str]| {
        let root = root.path().to_str().expect("a scratch path is text");
        let output = infill(&[&["install", "--root", root, "--prefix", "/usr"], more].concat());
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).expect("paths are text").lines().map(std::path::PathBuf::from).collect::<Vec<_>>()
    };
    let planned = install(&["--dry-run"]);
    assert!(planned.iter().all(|path| !path.exists()), "a dry run has written");
    assert_eq!(install(&[]), planned);
    for path in [
        "usr/bin/infill",
        "usr/lib/systemd/system/infill.service",
        "usr/lib/systemd/system/infill-control.socket",
        "usr/share/man/man8/infill-serve.8",
        "usr/share/man/man5/infill-config.5",
        "usr/share/bash-completion/completions/infill",
        "usr/share/infill/monitoring/alerts.yml",
        "etc/infill/config.toml",
    ] {
        assert!(at(path).exists(), "{path} is missing; there is {planned:?}");
    }
    let version = Command::new(at("usr/bin/infill")).arg("--version").output().expect("what was installed runs");
    assert!(version.status.success(), "{version:?}");
    std::fs::write(at("etc/infill/config.toml"), "# mine\n").expect("a scratch file can be written");
    assert_eq!(install(&[]).len(), planned.len() - 1, "the settings are left alone");
    install(&["--remove"]);
    let left: Vec<_> = planned.iter().filter(|path| path.exists()).collect();
    assert_eq!(left, [&at("etc/infill/config.toml")]);
    assert!(!at("usr/share/infill").exists() && at("usr/bin").exists(), "its own directories go, and no others");
    assert_eq!(std::fs::read_to_string(at("etc/infill/config.toml")).expect("it is there"), "# mine\n");
    // Whatever the umask, others can read what is installed.
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 077; exec \"$0\" install --root \"$1\"", env!("CARGO_BIN_EXE_infill")]).arg(at("strict"));
    assert!(shell.output().expect("sh runs").status.success());
    for path in ["etc/infill", "etc/infill/config.toml", "usr/local/share/man/man8"] {
        let mode = std::fs::metadata(at("strict").join(path)).expect("it was installed").permissions().mode();
        assert_eq!(mode & 0o044, 0o044, "{path}");
    }
    let relative = infill(&["install", "--dry-run", "--prefix", "here"]);
    assert!(relative.status.code() == Some(2) && String::from_utf8_lossy(&relative.stderr).contains("absolute"), "{relative:?}");
    refused(&["install", "--root", "/proc/nowhere"], 1, &["cannot write /proc/nowhere/usr/local/bin/infill", "--root"]);
}

#[test]
fn a_knob_that_is_not_there_is_named_with_those_that_are() {
    refused(&["bench", "tune", "--knob", "turbo"], 2, &["turbo", "halt-poll", "fd-budget"]);
    let output = infill(&["bench", "tune", "--list"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("guest_halt_poll_ns"), "{output:?}");
}
