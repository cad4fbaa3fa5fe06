//! Readers: processes that read a mounted tree and compare it with its manifest, watched so that one
//! that hangs is a failure with the kernel stack it hangs in.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use infill::lab::checksum;
use infill::lab::tree::{Content, Entry, Manifest, difference};

/// First argument of a reader process; mount point, manifest, way of reading, its number and the number
/// of readers follow.
pub(crate) const READER: &str = "--reader";
/// First argument of a process that opens the device node and keeps it.
pub(crate) const HOLDER: &str = "--hold-devnode";
/// How long readers may take together, emulated on a busy machine.
pub(crate) const READ_LIMIT: Duration = Duration::from_secs(120);

/// A reader that has found so much has seen enough: each failed read may take its time.
const COMPLAINTS_MAX: usize = 50;

/// How long a reader may take to die.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// How a file is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum How {
    /// With read(2).
    Read,
    /// Through a mapping.
    Mmap,
}

/// Reader processes at work; those left are killed when it is dropped.
pub(crate) struct Readers {
    children: Vec<(Child, String)>,
}

impl Readers {
    /// Starts `count` readers. They share the files between them; the largest file is read by all.
    pub(crate) fn start(mount: &Path, manifest: &Path, count: usize, how: How) -> std::io::Result<Self> {
        let mut children = Vec::new();
        for number in 0..count {
            let report = format!("/tmp/reader{number}");
            let mut command = Command::new("/proc/self/exe");
            command.arg(READER).arg(mount).arg(manifest);
            command.args([format!("{how:?}"), number.to_string(), count.to_string()]);
            command.stdout(Stdio::from(File::create(&report)?));
            children.push((command.spawn()?, report));
        }
        Ok(Self { children })
    }

    /// Whether any is still reading.
    pub(crate) fn are_at_work(&mut self) -> bool {
        self.children.iter_mut().any(|(child, _)| matches!(child.try_wait(), Ok(None)))
    }

    /// Waits until all are done; gives their complaints. A hung reader is an error.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<Vec<String>, String> {
        let deadline = Instant::now() + limit;
        let mut complaints = Vec::new();
        for (child, report) in &mut self.children {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(status) = crate::runner::wait_limited(child, left) else {
                let found = fs::read_to_string(&*report).unwrap_or_default().lines().count();
                let stack = fs::read_to_string(format!("/proc/{}/stack", child.id()));
                return Err(format!(
                    "a reader hangs, not done after {} s and {found} complaints; it waits in:\n{}",
                    limit.as_secs(),
                    stack.unwrap_or_else(|e| e.to_string())
                ));
            };
            let text = fs::read_to_string(&*report).map_err(|e| format!("{report}: {e}"))?;
            complaints.extend(text.lines().map(str::to_owned));
            if !status.success() && text.is_empty() {
                complaints.push(format!("a reader ended with {status}"));
            }
        }
        Ok(complaints)
    }

    /// Waits until all are done, and wants them to have found everything as it should be.
    pub(crate) fn expect_equal(self) -> Result<(), String> {
        self.finish(READ_LIMIT)?.into_iter().next().map_or(Ok(()), Err)
    }

    /// Kills them all and waits for their ends, for which no answer from the daemon may be needed.
    pub(crate) fn kill(mut self) -> Result<(), String> {
        for (child, _) in &mut self.children {
            let _ = child.kill();
        }
        let ended = |child: &mut Child| crate::runner::wait_limited(child, KILL_LIMIT).is_some();
        if self.children.iter_mut().all(|(child, _)| ended(child)) { Ok(()) } else { Err("a reader cannot be killed".to_owned()) }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        for (child, _) in &mut self.children {
            // No waiting: a reader that hangs in the kernel may not even die.
            let _ = child.kill();
        }
    }
}

/// Reads everything and wants it all equal.
pub(crate) fn expect_equal(mount: &Path, manifest: &Path, readers: usize, how: How) -> Result<(), Box<dyn std::error::Error>> {
    let odd = Manifest::load(manifest)?.compare_names(mount)?;
    let mut complaints = Readers::start(mount, manifest, readers, how)?.finish(READ_LIMIT)?;
    complaints.extend(odd);
    if complaints.is_empty() {
        return Ok(());
    }
    let shown = complaints.len().min(5);
    Err(format!("{} files are not as they should be:\n{}", complaints.len(), complaints[..shown].join("\n")).into())
}

/// The reader process: prints a line for every file that is not as it should be.
pub(crate) fn reader_main(args: &[String]) -> ExitCode {
    let [mount, manifest, how, number, count] = args else {
        println!("a reader needs five arguments");
        return ExitCode::FAILURE;
    };
    let how = if how == "Mmap" { How::Mmap } else { How::Read };
    let (number, count): (usize, usize) = (number.parse().unwrap_or(0), count.parse().unwrap_or(1));
    let manifest = match Manifest::load(Path::new(manifest)) {
        Ok(manifest) => manifest,
        Err(e) => {
            println!("{e}");
            return ExitCode::FAILURE;
        }
    };
    let largest = manifest.entries.iter().map(len_bytes).max();
    let mut complaints = 0;
    for (n, entry) in manifest.entries.iter().enumerate() {
        if n % count != number && Some(len_bytes(entry)) != largest {
            continue;
        }
        if let Err(complaint) = check(Path::new(mount), entry, how) {
            println!("{complaint}");
            complaints += 1;
        }
        if complaints == COMPLAINTS_MAX {
            break;
        }
    }
    if complaints == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn len_bytes(entry: &Entry) -> u64 {
    match entry.content {
        Content::File { len_bytes, .. } => len_bytes,
        Content::Link(_) => 0,
    }
}

fn check(mount: &Path, entry: &Entry, how: How) -> Result<(), String> {
    let path = mount.join(&entry.path);
    let said = |e: std::io::Error| format!("{}: {e}", entry.path);
    let found = match &entry.content {
        Content::Link(_) => Content::Link(fs::read_link(&path).map_err(said)?.to_string_lossy().into_owned()),
        Content::File { .. } if how == How::Read => file(&fs::read(&path).map_err(said)?),
        Content::File { .. } => file(&mapped(&path).map_err(said)?),
    };
    if found == entry.content {
        return Ok(());
    }
    Err(difference(entry, &found))
}

fn file(bytes: &[u8]) -> Content {
    Content::File { len_bytes: bytes.len() as u64, sum: checksum(bytes) }
}

fn mapped(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the file is on a read-only file system, so nobody changes it under the mapping.
    let map = unsafe { memmap2::Mmap::map(&file) }?;
    Ok(map.to_vec())
}

/// The process that keeps the device node open until it is killed.
pub(crate) fn holder_main() -> ExitCode {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/cachefiles") {
        Ok(_devnode) => {
            println!("held");
            loop {
                std::thread::park();
            }
        }
        Err(e) => {
            println!("cannot open /dev/cachefiles: {e}");
            ExitCode::FAILURE
        }
    }
}
