//! The same bytes whatever way they take: every way to read a source, with every window, on both engines.

use std::path::PathBuf;

use crate::guest::{Guest, data, with_blob};
use crate::readers::How;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[("every_source_window_and_engine_gives_equal_bytes", every_combination)];

const SOURCES: [&str; 4] = ["auto", "direct", "buffered", "mmap"];
const WINDOWS: [&str; 4] = ["auto", "4K", "64K", "1M"];
const ENGINES: [&str; 2] = ["uring", "blocking"];

/// One daemon after the other, each with a cache of its own, so that each has to bring everything. Ways of reading the
/// mounted files take turns: in the end each source, window and engine has seen both.
fn every_combination(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    let options = with_blob("one.img", "one.blob");
    let len_bytes = data("one.blob").metadata()?.len();
    let home = guest.cache.clone();
    for (n, (source, window, engine)) in combinations().enumerate() {
        guest.cache = home.join(n.to_string());
        std::fs::create_dir_all(&guest.cache)?;
        let flags = [format!("--source={source}"), format!("--window={window}"), format!("--engine={engine}")];
        let flags = flags.each_ref().map(String::as_str);
        let how = if n.count_ones() % 2 == 0 { How::Read } else { How::Mmap };
        let told = |e: Box<dyn std::error::Error>| format!("{}, {how:?}: {e}", flags.join(" "));
        let ended = guest.whole_tree(&flags, &options, "one.json", (2, how)).map_err(told)?;
        let filled = ended.json["bytes_filled"].as_u64().unwrap_or(0);
        if ended.json["engine"] != engine || filled < len_bytes / 2 {
            return Err(format!("{}: it did something else: {}", flags.join(" "), ended.json).into());
        }
        remove(&guest.cache)?;
    }
    guest.cache = home;
    Ok(())
}

fn combinations() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    let pairs = SOURCES.into_iter().flat_map(|source| WINDOWS.map(|window| (source, window)));
    pairs.flat_map(|(source, window)| ENGINES.map(|engine| (source, window, engine)))
}

/// Frees the space of a cache nobody uses any more.
fn remove(cache: &PathBuf) -> Outcome {
    std::fs::remove_dir_all(cache).map_err(|e| format!("cannot remove {}: {e}", cache.display()).into())
}
