//! Layers, and checks of the settings as a whole.

use std::fs;
use std::path::Path;

use clap::{Args, Command, FromArgMatches};

use super::*;
use crate::engine::plan::Complete;

/// What flags say, without the variables of whoever runs the tests.
fn given(flags: &[&str]) -> Given {
    let command = Given::augment_args(Command::new("test")).no_binary_name(true).mut_args(|arg| arg.env(None::<&'static str>));
    Given::from_arg_matches(&command.try_get_matches_from(flags).unwrap()).unwrap()
}

/// A directory with files below it, the first of which is the settings file.
fn files(texts: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(DROP_INS)).unwrap();
    texts.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    dir
}

fn error_of(text: &str) -> String {
    let error = file::parse(Path::new("/etc/x.toml"), text).and_then(Resolved::of).map(|_| "taken".to_owned());
    let message = error.unwrap_or_else(|error| error.to_string());
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

fn config_of(text: &str) -> Config {
    Resolved::of(file::parse(Path::new("x"), &format!("version = 1\n[serve]\n{text}")).unwrap()).unwrap().config
}

#[test]
fn flags_win_over_drop_ins_the_last_of_which_wins_over_the_file() {
    let dir = files(&[
        ("config.toml", "version = 1\n[serve]\nstore = [\"dir:/a\", \"dir:/b\"]\nslots = 1\nworkers = 1\nwindow = \"64K\"\ntag = \"a\"\n"),
        ("config.d/20-late.toml", "version = 1\n\n[serve]\nslots = 3\nstore = [\"dir:/c\"]\n"),
        ("config.d/10-early.toml", "version = 1\n[serve]\nslots = 2\nworkers = 2\n"),
        ("config.d/.hidden.toml", "nonsense"),
        ("config.d/notes.txt", "nonsense"),
    ]);
    let path = dir.path().join("config.toml");
    let settings = given(&["--window=128K", "--store=dir:/d,dir:/e"]).settings(Some(&path)).unwrap();
    let Config { window, slots, workers, ref stores, ref tag, slot_bytes, .. } = settings.config;
    assert_eq!((window, slots, workers, tag.as_str(), slot_bytes), (Window::Fixed(128 << 10), 3, 2, "a", DEFAULT_SLOT_BYTES));
    let stores: Vec<_> = stores.iter().map(ToString::to_string).collect();
    assert_eq!(stores, ["dir:/d", "dir:/e"]);
    let from = |name: &str| settings.origin(keys::find(name).unwrap()).to_string();
    assert_eq!(from("window"), "--window");
    assert_eq!(from("slots"), format!("{}:4", dir.path().join("config.d/20-late.toml").display()));
    assert_eq!(from("workers"), format!("{}:4", dir.path().join("config.d/10-early.toml").display()));
    assert_eq!(from("tag"), format!("{}:7", path.display()));
    assert_eq!(from("slot_size"), "default");
    // A list of a higher layer takes the place of a lower one.
    assert_eq!(given(&[]).resolve(Some(&path)).unwrap().stores.len(), 1);
}

#[test]
fn what_cannot_be_read_is_named() {
    let dir = files(&[("config.toml", "version = 1\n"), ("config.d/a.toml", "version = 1\n[serve]\nslots = 0\n")]);
    let path = dir.path().join("config.toml");
    let look = |path: &Path| given(&[]).look(Some(path)).unwrap_err().to_string();
    let message = look(&path);
    assert!(message.ends_with("config.d/a.toml:3: slots = 0: must be 1 to 1023"), "{message}");
    fs::remove_dir_all(dir.path().join(DROP_INS)).unwrap();
    given(&[]).look(Some(&path)).unwrap();
    fs::write(dir.path().join(DROP_INS), "a file").unwrap();
    let message = look(&path);
    assert!(message.starts_with(&format!("cannot read the settings in {}/config.d: ", dir.path().display())), "{message}");
    assert!(look(Path::new("/no/such/file")).contains("/no/such/file"));
    assert_eq!(directory(None), Path::new("/etc/infill"));
    assert_eq!(directory(Some(Path::new("x.toml"))), Path::new("."));
}

#[test]
fn a_mistake_in_a_file_is_one_line_that_says_where_and_what() {
    for (text, expected) in [
        ("version = 1\n[serve]\nwindwo = 3\n", "/etc/x.toml:3: unknown key `windwo`; did you mean `window`?"),
        ("version = 1\n[server]\n", "/etc/x.toml:2: unknown key `server`; did you mean `serve`?"),
        ("version = 1\nslots = 3\n", "/etc/x.toml:2: `slots` belongs below the line [serve]"),
        ("[serve]\n", "/etc/x.toml:1: version = 1 is missing"),
        ("version = 2\n", "/etc/x.toml:1: version = \"2\" is not known"),
        ("version = 1\nserve = 3\n", "/etc/x.toml:2: `serve` is a table"),
        ("version = 1\n[serve]\nslots = 1\nslots = 2\n", "/etc/x.toml:4: duplicate key"),
        ("version = 1\n[serve]\nslots = \n", "/etc/x.toml:3: "),
        ("version = 1\n[serve]\nslots = \"x\"\n", "/etc/x.toml:3: slots = \"x\": must be a whole number ("),
        ("version = 1\n[serve]\nslots = -3\n", "/etc/x.toml:3: slots = \"-3\": must be a whole number ("),
        ("version = 1\n[serve]\nslots = true\n", "/etc/x.toml:3: slots: must be a whole number, and this is of type boolean"),
        ("version = 1\n[serve]\nslots = [1]\n", "/etc/x.toml:3: slots: must be a whole number, and this is of type array"),
        (
            "version = 1\n[serve]\nwindow = \"1X\"\n",
            "/etc/x.toml:3: window = \"1X\": must be auto, or a size such as 64K (\"1X\" is not a size",
        ),
        ("version = 1\n[serve]\nengine = \"turbo\"\n", "/etc/x.toml:3: engine = \"turbo\": must be auto, uring or blocking"),
        ("version = 1\n[serve]\nbrun = \"110%\"\n", "/etc/x.toml:3: brun = \"110%\": must be a percentage, such as 10 or 10% ("),
        ("version = 1\n[serve]\nmetrics_listen = \"here\"\n", "/etc/x.toml:3: metrics_listen = \"here\": must be an address and a port"),
        (
            "version = 1\n[serve]\nstore = [\n \"dir:/a\",\n 3.5\n]\n",
            "/etc/x.toml:5: store: must be a list of text, and this is of type float",
        ),
        ("version = 1\n[serve]\nstore = [\"ftp:/x\"]\n", "/etc/x.toml:3: store = ftp:/x: "),
        ("version = 1\n[serve]\ndir = \"/a\"\ncache_dir = \"/b\"\n", "/etc/x.toml:3: cache_dir and dir mean the same"),
        ("version = 1\n[serve]\nwindow = \"64K\"\nslots = 5000\n", "/etc/x.toml:4: slots = 5000: must be 1 to 1023"),
    ] {
        let message = error_of(text);
        assert!(message.starts_with(expected), "{text}\n{message}\n{expected}");
    }
}

#[test]
fn values_are_written_as_for_the_flags_and_as_cachefilesd_writes_them() {
    let config = config_of("dir = \"/cache\"\nbrun = \"10%\"\nbcull = 7\nbstop = \"3\"\nslots = 0x10\nuser = 65534\nwindow = 65_536\n");
    assert_eq!((config.cache_dir.to_str(), config.slots, config.window), (Some("/cache"), 16, Window::Fixed(65536)));
    let blocks = config.cull.blocks();
    assert_eq!((blocks.run, blocks.cull, blocks.stop), (10, 7, 3));
    assert!(config.user.is_some());
}

#[test]
fn completion_is_automatic_and_unlimited_until_set() {
    assert_eq!(config_of("").completion, Completion::default());
    let completion = config_of("complete = \"always\"\ncomplete_rate = \"8M\"\n").completion;
    assert_eq!(completion, Completion { when: Complete::Always, bytes_per_s: NonZeroU64::new(8 << 20) });
}

#[test]
fn sizes_are_read_with_suffixes_and_refused_in_words() {
    assert_eq!("128K".parse(), Ok(Bytes(131_072)));
    assert_eq!("4096".parse(), Ok(Bytes(4096)));
    for text in ["", "M", "1T", "1MM", "-1", "99999999999G"] {
        assert!(text.parse::<Bytes>().is_err(), "{text}");
    }
    for (bytes, text) in [(0, "0"), (4096, "4K"), (5000, "5000"), (1 << 20, "1M"), (3 << 30, "3G"), (u64::MAX, "18446744073709551615")] {
        assert_eq!(Bytes(bytes).to_string(), text);
        assert_eq!(text.parse(), Ok(Bytes(bytes)));
    }
}

#[test]
fn flags_out_of_bounds_are_named_with_what_is_allowed() {
    for (flag, expected) in [
        ("--window=5000", "window = 5000: must be a power of two"),
        ("--slots=0", "slots = 0: must be 1 to"),
        ("--slots=5000", "slots = 5000: must be 1 to 1023"),
        ("--workers=0", "workers = 0"),
        ("--drain-timeout-ms=99999999999", "drain_timeout_ms"),
        ("--slot-size=2048", "slot_size = 2048: must be "),
        ("--tag=", "tag = \"\": it is empty"),
        ("--secctx=a\nb", "secctx = \"a\\nb\": it contains"),
        ("--brun=3", "bad culling limits: bstop 1 %, bcull 5 %, brun 3 %"),
        ("--seed=a/b/c", "seed = a/b/c: "),
    ] {
        let message = given(&[flag]).defaults().unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    assert!(matches!(given(&[]).defaults().unwrap().with_store(), Err(ConfigError::NoStore)));
}
