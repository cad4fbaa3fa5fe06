//! Dashboard, alerts and the page on metrics speak of what the daemon exports, and of nothing else.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[path = "common/promtool.rs"]
mod promtool;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::promtool::promtool;
use infill::ops::metrics::{names, render};
use infill::ops::space;
use infill::ops::status::{Statistics, Status};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

fn page(name: &str) -> String {
    std::fs::read_to_string(docs().join(name)).expect("a page of this checkout")
}

/// All that a daemon with a cache on a disk exports.
fn exported() -> String {
    let statistics = Statistics { space: Some(space::Statistics::default()), ..Statistics::default() };
    render(Status { statistics, ..Status::default() })
}

/// The words of a text that are names of metrics.
fn spoken_of(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("infill_"))
}

fn expect_known(of: &str, text: &str, known: &BTreeMap<String, String>) {
    let unknown: Vec<_> = spoken_of(text).filter(|word| !known.contains_key(*word)).collect();
    assert!(unknown.is_empty(), "{of} speaks of what is not exported: {unknown:?}");
}

#[test]
fn dashboard_and_alerts_use_what_is_exported() {
    let known = names(&exported());
    for file in ["monitoring/dashboard.json", "monitoring/alerts.yml", "monitoring/alerts_test.yml"] {
        let text = page(file);
        expect_known(file, &text, &known);
        assert!(spoken_of(&text).count() > 1, "{file}");
    }
    let dashboard: serde_json::Value = serde_json::from_str(&page("monitoring/dashboard.json")).unwrap();
    let expressions = dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    assert!(expressions.map(|target| target["expr"].as_str().unwrap()).all(|text| spoken_of(text).next().is_some()));
}

#[test]
fn the_page_explains_each_metric() {
    let text = exported();
    let family = |line: &str| {
        line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')).map(|(name, help)| (name.to_owned(), help.to_owned()))
    };
    let families: Vec<_> = text.lines().filter_map(family).collect();
    let kinds: BTreeMap<_, _> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let table: String = families.iter().map(|(name, help)| format!("| `{name}` | {} | {help} |\n", kinds[name.as_str()])).collect();
    assert!(page("metrics.md").contains(&table), "docs/metrics.md wants this table:\n{table}");
}

#[test]
fn promtool_takes_the_alerts_and_what_is_exported() {
    let dir = docs().join("monitoring");
    for (arguments, text) in [
        (&["check", "rules", "alerts.yml"][..], String::new()),
        (&["test", "rules", "alerts_test.yml"], String::new()),
        (&["check", "metrics"], exported()),
    ] {
        let Some(output) = promtool(arguments, &dir, &text) else { return };
        assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}
