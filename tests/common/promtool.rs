//! The checker that comes with Prometheus: this machine's, or that of its package, unpacked into the cache directory and not
//! installed, for the package would start a server.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use infill::lab::apt::Apt;
use infill::lab::{Result, Trying, cache_dir, packages, run};

/// The program; or why there is none here, as the test then says.
fn find() -> Result<PathBuf> {
    if let Some(program) = packages::find("promtool") {
        return Ok(program);
    }
    let home = cache_dir()?.join("promtool");
    let program = home.join("usr/bin/promtool");
    if !program.exists() {
        let part = tempfile::tempdir_in(cache_dir()?).trying(|| "cannot make a directory")?;
        Apt::of_machine().download("prometheus", part.path())?;
        let entries = std::fs::read_dir(part.path()).trying(|| "cannot list what was downloaded")?;
        for deb in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "deb")) {
            run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&home))?;
        }
    }
    Ok(program)
}

/// Runs it in `dir` on a text; `None`: there is none.
pub(crate) fn promtool(arguments: &[&str], dir: &Path, text: &str) -> Option<Output> {
    let program = find().inspect_err(|why| println!("not run: no promtool: {why}")).ok()?;
    let (input, output) = (Stdio::piped(), Stdio::piped());
    let mut child =
        Command::new(program).args(arguments).current_dir(dir).stdin(input).stdout(output).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}
