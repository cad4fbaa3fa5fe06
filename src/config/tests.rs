//! Checks of the settings as a whole.

use super::options::parse_file;
use super::*;
use crate::engine::plan::Complete;

fn with_store() -> Options {
    Options { store: vec!["dir:/srv".into()], ..Options::default() }
}

#[test]
fn a_flag_wins_over_the_file() {
    let file = parse_file("version = 1\n[serve]\nwindow = \"64K\"\nslots = 3\nstore = [\"dir:/a\", \"dir:/b\"]\n").unwrap();
    let flags = Options { window: Some(WindowText::Fixed(Bytes(4096))), ..Options::default() };
    let config = flags.or(file).check().unwrap();
    assert_eq!((config.window, config.slots, config.stores.len()), (Window::Fixed(4096), 3, 2));
    assert_eq!(config.slot_bytes, DEFAULT_SLOT_BYTES);
}

#[test]
fn completion_is_automatic_and_unlimited_until_set() {
    assert_eq!(with_store().check().unwrap().completion, Completion::default());
    let file = parse_file("version = 1\n[serve]\ncomplete = \"always\"\ncomplete_rate = \"8M\"\n").unwrap();
    let completion = with_store().or(file).check().unwrap().completion;
    assert_eq!(completion, Completion { when: Complete::Always, bytes_per_s: NonZeroU64::new(8 << 20) });
}

#[test]
fn an_unknown_key_is_named() {
    let message = parse_file("version = 1\n[serve]\nwindwo = 3\n").unwrap_err();
    assert!(message.contains("windwo"), "{message}");
    assert!(parse_file("version = 2\n").unwrap_err().contains("version"));
    assert!(parse_file("[serve]\n").unwrap_err().contains("version"));
}

#[test]
fn sizes_are_read_with_suffixes_and_refused_in_words() {
    assert_eq!("128K".parse(), Ok(Bytes(131_072)));
    assert_eq!("4096".parse(), Ok(Bytes(4096)));
    for text in ["", "M", "1T", "1MM", "-1", "99999999999G"] {
        assert!(text.parse::<Bytes>().is_err(), "{text}");
    }
}

#[test]
fn values_out_of_bounds_are_named_with_what_is_allowed() {
    let cases: [(Options, &str); 5] = [
        (Options { window: Some(WindowText::Fixed(Bytes(5000))), ..with_store() }, "window = 5000: must be a power of two"),
        (Options { slots: Some(0), ..with_store() }, "slots = 0: must be 1 to"),
        (Options { slots: Some(5000), ..with_store() }, "slots = 5000: must be 1 to 1023"),
        (Options { workers: Some(0), ..with_store() }, "workers = 0"),
        (Options { drain_timeout_ms: Some(u64::MAX), ..with_store() }, "drain_timeout_ms"),
    ];
    for (options, expected) in cases {
        let message = options.check().unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    for (options, expected) in [
        (Options { slot_size: Some(Bytes(2048)), ..with_store() }, "slot_size = 2048: must be "),
        (Options { tag: Some(String::new()), ..with_store() }, "tag = \"\": it is empty"),
        (Options { secctx: Some("a\nb".into()), ..with_store() }, "secctx = \"a\\nb\": it contains"),
        (Options { brun: Some(3), ..with_store() }, "bad culling limits: bstop 1 %, bcull 5 %, brun 3 %"),
    ] {
        let message = options.check().unwrap_err().to_string();
        assert!(message.starts_with(expected), "{message}");
    }
    assert!(matches!(Options::default().check(), Err(ConfigError::NoStore)));
    let message = Options { seed: vec!["a/b/c".into()], ..with_store() }.check().unwrap_err().to_string();
    assert!(message.starts_with("seed = a/b/c: ") && message.contains("DOMAIN/NAME"), "{message}");
    let message = Options { store: vec!["ftp:/x".into()], ..Options::default() }.check().unwrap_err().to_string();
    assert!(message.contains("dir:PATH"), "{message}");
}
