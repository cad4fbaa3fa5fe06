//! What the documentation tells an operator to type, typed: each block of shell commands, in the order of the pages, on a machine with
//! systemd that has nothing of infill yet.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use infill::lab::systemd::{CACHE_DIR, JOB_DIR};
use nix::mount::{MntFlags, umount2};

use crate::guest::Guest;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[("systemd_guide_is_followed_word_for_word", follow)];

const STARTED: &str = include_str!("../../docs/getting-started.md");
const TROUBLE: &str = include_str!("../../docs/troubleshooting.md");
const OPERATING: &str = include_str!("../../docs/operating.md");
/// Where the clone would be.
const CLONE: &str = "/tmp/infill";

/// A block of commands.
struct Block<'a> {
    page: &'a str,
    line: usize,
    text: String,
}

/// The blocks of a page that begin with ```` ```sh ````.
fn blocks<'a>(page: &'a str, text: &str) -> Vec<Block<'a>> {
    let (mut found, mut open) = (Vec::new(), None::<Block<'a>>);
    for (number, line) in text.lines().enumerate() {
        match &mut open {
            Some(block) if line != "```" => block.text.extend([line, "\n"]),
            Some(_) => found.extend(open.take()),
            None if line.starts_with("```sh") => open = Some(Block { page, line: number + 2, text: String::new() }),
            None => {}
        }
    }
    found
}

/// What the pages leave on the machine goes with this.
struct Machine;

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = umount2("/mnt/app", MntFlags::MNT_DETACH);
        let _ = Command::new("systemctl").args(["stop", "infill.service"]).output();
        let _ = Command::new(format!("{JOB_DIR}/infill")).args(["release", "--force"]).output();
        let _ = Command::new(format!("{JOB_DIR}/infill")).args(["install", "--remove"]).output();
        let _ = Command::new("systemctl").arg("daemon-reload").output();
        for path in ["/etc/infill", "/srv/blobs", CLONE] {
            let _ = fs::remove_dir_all(path);
        }
        for entry in fs::read_dir(CACHE_DIR).into_iter().flatten().flatten() {
            // Files of the disk itself, such as lost+found, stay.
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
}

/// The last step takes everything away again, so the other pages come before it.
fn follow(_: &mut Guest) -> Outcome {
    let _machine = Machine;
    fs::create_dir_all(format!("{CLONE}/target/release"))?;
    symlink(format!("{JOB_DIR}/infill"), format!("{CLONE}/target/release/infill"))?;
    let mut first = blocks("getting-started.md", STARTED);
    let last = first.pop().ok_or("docs/getting-started.md has no commands")?;
    let more = [("operating.md", OPERATING), ("troubleshooting.md", TROUBLE)];
    let others: Vec<_> = more.into_iter().flat_map(|(page, text)| blocks(page, text)).collect();
    if first.len() < 7 || others.len() < 6 {
        return Err(format!("only {} and {} blocks of commands were found", first.len(), others.len()).into());
    }
    for block in first.iter().chain(&others).chain([&last]) {
        run(block)?;
    }
    if Path::new("/mnt/app/systemd").exists() {
        return Err("the image is still mounted".into());
    }
    Ok(())
}

fn run(block: &Block<'_>) -> Outcome {
    let Block { page, line, text } = block;
    let mut shell = Command::new("/bin/sh");
    shell.args(["-euc", text]).current_dir(CLONE).env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let output = shell.stdin(Stdio::null()).output()?;
    if output.status.success() {
        println!("docs/{page}:{line}: done");
        return Ok(());
    }
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("docs/{page}:{line}: {}:\n{text}\n{said}\n{complained}", output.status).into())
}
