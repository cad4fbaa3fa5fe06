//! The units of `tuning/systemd`, by systemd's own check. What they do is tested in a guest (tests/guest/systemd.rs).

use std::fs;
use std::path::Path;
use std::process::Command;

const UNITS: [&str; 3] = ["infill.service", "infill-control.socket", "infill-metrics.socket"];
/// Directives that an older systemd passes over, as the unit means it to.
const NEWER: [&str; 1] = ["FileDescriptorStorePreserve"];

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tuning/systemd");
    for name in UNITS {
        let text = fs::read_to_string(source.join(name)).unwrap();
        // Not installed here.
        let text = text.replace("ExecStart=infill ", concat!("ExecStart=", env!("CARGO_BIN_EXE_infill"), " "));
        fs::write(dir.path().join(name), text).unwrap();
    }
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).args(UNITS.map(|name| dir.path().join(name)));
    let output = match verify.output() {
        Ok(output) => output,
        Err(error) => return eprintln!("not run: systemd-analyze: {error}"),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    let wrong: Vec<_> = said.lines().filter(|line| !NEWER.iter().any(|key| line.contains(&format!("'{key}'")))).collect();
    assert!(output.status.success() && wrong.is_empty(), "{}: {wrong:#?}", output.status);
}
