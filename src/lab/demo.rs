//! What `infill demo` does once there is a kernel that can: serve an image, read all of it, compare.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;

use super::disk::{self, ErofsLayout};
use super::tree::{Comparison, MACHINE_SOURCES, Manifest, Selection, compare};
use super::{LabError, Result, Trying, last_lines, run};

/// The image in the data directory.
pub const IMAGE: &str = "demo.img";
/// Its blob there.
pub const BLOB: &str = "demo.blob";
/// Its manifest there.
const MANIFEST: &str = "demo.json";
/// Chunks of the image.
const CHUNK_BYTES: u32 = 64 << 10;
/// How many processes' worth of readers.
const READERS: usize = 8;
/// What the image is made of.
const FILES: Selection = Selection { sources: MACHINE_SOURCES, files_max: 4000, bytes_max: 64 << 20, file_bytes_max: 8 << 20 };
/// Requests shown one by one before the summary takes over.
const SHOWN_REQUESTS: u64 = 20;
/// How often the summary is printed.
const SUMMARY_EVERY: Duration = Duration::from_secs(1);
/// How long the daemon may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Differences that are printed.
const SHOWN_DIFFERENCES: usize = 10;

/// The demo's numbers; `--json` prints them as the last line.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// The kernel interface that was used.
    pub front_end: String,
    /// Release of the kernel that asked.
    pub kernel: String,
    /// `kvm` or `tcg` if that was a guest, else `none`.
    pub accelerator: String,
    /// File system under the cache, if that was a guest.
    pub cache_fs: Option<String>,
    /// Files read.
    pub files: usize,
    /// Their length together.
    pub bytes: u64,
    /// READs the kernel sent.
    pub requests: u64,
    /// In the time all files took to be read.
    pub requests_per_s: u64,
    /// That time.
    pub read_ms: u64,
    /// Half of the READs were answered within this time.
    pub p50_us: u64,
    /// 99 of 100 READs were.
    pub p99_us: u64,
    /// Processor time of the daemon, start and end included.
    pub daemon_cpu_ms: u64,
    /// `equal`, `different` or `failed`.
    pub verdict: String,
}

/// Makes image, blob and manifest of real files of this machine in `data`; `scratch` holds the copies.
///
/// # Errors
/// A file cannot be copied, or mkfs.erofs failed.
pub fn prepare(data: &Path, scratch: &Path) -> Result<Manifest> {
    let tree = scratch.join("tree");
    FILES.copy_to(&tree)?;
    fs::create_dir_all(data).trying(|| format!("cannot make {}", data.display()))?;
    let manifest = Manifest::of(&tree)?;
    manifest.save(&data.join(MANIFEST))?;
    let blob = data.join(BLOB);
    let layout = ErofsLayout { chunk_bytes: Some(CHUNK_BYTES), blob: Some(&blob), ..ErofsLayout::default() };
    disk::erofs(&data.join(IMAGE), &tree, layout)?;
    Ok(manifest)
}

/// A kernel interface that the demo can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// cachefiles on-demand mode.
    Cachefiles,
    /// fanotify's pre-content events.
    Fanotify,
}

impl Way {
    /// Who is to keep it over a restart: it would be nobody, if the kernel did not let readers through to holes then.
    const fn keep(self) -> &'static str {
        match self {
            Self::Cachefiles => "off",
            Self::Fanotify => "auto",
        }
    }

    /// As `--front-end` calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::Cachefiles => "cachefiles",
            Self::Fanotify => "fanotify",
        }
    }
}

/// Serves what [`prepare`] made, mounts it with this kernel, and reads it all. Prints what it does.
///
/// # Errors
/// The daemon did not start, or the image not mount. Wrong data is no error but a verdict.
pub fn serve_and_read(way: Way, data: &Path, cache_dir: &Path) -> Result<Report> {
    let manifest = Manifest::load(&data.join(MANIFEST))?;
    fs::create_dir_all(cache_dir).trying(|| format!("cannot make {}", cache_dir.display()))?;
    let mut daemon = Daemon::start(way, data, cache_dir)?;
    let mounted = Mounted::make(way, cache_dir)?;
    let result = compare(&mounted.at, &manifest, READERS);
    drop(mounted);
    let served = daemon.stop()?;
    for line in result.failed.iter().chain(&result.different).take(SHOWN_DIFFERENCES) {
        println!("  ! {line}");
    }
    Ok(report(way, &manifest, &result, &served))
}

fn report(way: Way, manifest: &Manifest, result: &Comparison, served: &Served) -> Report {
    let number = |name: &str| served.json[name].as_u64().unwrap_or(0);
    let read_ms = u64::try_from(result.took.as_millis()).unwrap_or(u64::MAX);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Report {
        front_end: way.name().into(),
        kernel: kernel.trim().into(),
        accelerator: "none".into(),
        cache_fs: None,
        files: manifest.entries.len(),
        bytes: result.bytes,
        requests: served.requests,
        requests_per_s: served.requests * 1000 / read_ms.max(1),
        read_ms,
        p50_us: number("p50_us"),
        p99_us: number("p99_us"),
        daemon_cpu_ms: served.cpu_ms,
        verdict: result.verdict().into(),
    }
}

impl Report {
    /// The numbers as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let rows = [
            ("kernel", format!("{} ({})", self.kernel, self.front_end)),
            ("files", format!("{} ({})", self.files, mib(self.bytes))),
            ("requests", format!("{} ({}/s)", self.requests, self.requests_per_s)),
            ("latency", format!("p50 {} us, p99 {} us", self.p50_us, self.p99_us)),
            ("read in", format!("{} ms by {READERS} readers", self.read_ms)),
            ("daemon CPU", format!("{} ms", self.daemon_cpu_ms)),
            ("verdict", self.verdict.clone()),
        ];
        rows.map(|(name, value)| format!("  {name:<11} {value}\n")).concat()
    }
}

/// A daemon's own, so that it is in nobody's way.
fn state_dir(cache_dir: &Path) -> PathBuf {
    cache_dir.with_extension("state")
}

/// The image at its mount point, until dropped.
struct Mounted {
    at: PathBuf,
}

impl Mounted {
    fn make(way: Way, cache_dir: &Path) -> Result<Self> {
        let at = cache_dir.with_extension("mnt");
        fs::create_dir_all(&at).trying(|| format!("cannot make {}", at.display()))?;
        match way {
            Way::Cachefiles => Self::on_demand(&at)?,
            Way::Fanotify => Self::from_files(&at, &state_dir(cache_dir))?,
        }
        Ok(Self { at })
    }

    fn on_demand(at: &Path) -> Result<()> {
        let options = format!("fsid={IMAGE},domain_id=demo,device={BLOB}");
        println!("  mount -t erofs -o {options} none {}", at.display());
        mount(Some("none"), at, Some("erofs"), MsFlags::MS_RDONLY, Some(&*options)).trying(|| format!("cannot mount the image ({options})"))
    }

    fn from_files(at: &Path, state_dir: &Path) -> Result<()> {
        let infill = std::env::current_exe().trying(|| "cannot find this program")?;
        let mut command = Command::new(infill);
        command.args(["mount", "--domain=demo", "--device", BLOB, IMAGE]).arg(at).arg("--state-dir").arg(state_dir);
        println!("  infill mount --domain demo --device {BLOB} {IMAGE} {}", at.display());
        run(&mut command).map(|output| print!("  {}", String::from_utf8_lossy(&output.stdout)))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.at);
    }
}

/// The daemon as a child of this process; killed when dropped.
struct Daemon {
    child: Child,
    log: PathBuf,
    watcher: Option<JoinHandle<Served>>,
}

/// What a daemon's output said.
#[derive(Default)]
struct Served {
    requests: u64,
    json: serde_json::Value,
    cpu_ms: u64,
}

impl Daemon {
    fn start(way: Way, data: &Path, cache_dir: &Path) -> Result<Self> {
        let infill = std::env::current_exe().trying(|| "cannot find this program")?;
        let log = cache_dir.with_extension("log");
        let log_file = fs::File::create(&log).trying(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(infill);
        command.args(["serve", "--trace-requests", "--json", "--front-end", way.name(), "--keep", way.keep()]);
        command.arg("--cache-dir").arg(cache_dir).arg("--state-dir").arg(state_dir(cache_dir));
        command.arg("--store").arg(format!("dir:{}", data.display()));
        println!("  infill serve --front-end {} --cache-dir {} --store dir:{}", way.name(), cache_dir.display(), data.display());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log_file);
        let mut child = command.spawn().trying(|| "cannot start infill serve")?;
        let output = child.stdout.take();
        let (send, ready) = channel();
        let watcher = std::thread::spawn(move || output.map_or_else(Served::default, |out| watch(out, &send)));
        let daemon = Self { child, log, watcher: Some(watcher) };
        daemon.wait_ready(&ready)?;
        Ok(daemon)
    }

    fn wait_ready(&self, ready: &Receiver<()>) -> Result<()> {
        if ready.recv_timeout(READY_LIMIT).is_ok() {
            return Ok(());
        }
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        Err(LabError::Failed(format!("infill serve did not get ready; it said:\n{}", last_lines(&text, 20))))
    }

    fn stop(&mut self) -> Result<Served> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        // Other children have ended before: under `cargo run`, all that built this program.
        let before_ms = cpu_of_children_ms()?;
        kill(pid, Signal::SIGTERM).trying(|| "cannot stop infill serve")?;
        let status = self.child.wait().trying(|| "cannot wait for infill serve")?;
        if !status.success() {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            return Err(LabError::Failed(format!("infill serve ended with {status}; it said:\n{}", last_lines(&text, 20))));
        }
        let watcher = self.watcher.take().and_then(|w| w.join().ok());
        let mut served = watcher.unwrap_or_default();
        served.cpu_ms = cpu_of_children_ms()?.saturating_sub(before_ms);
        Ok(served)
    }
}

/// CPU time of all children that have ended.
fn cpu_of_children_ms() -> Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).trying(|| "cannot read the daemon's CPU time")?;
    Ok(u64::try_from(usage.user_time().num_milliseconds() + usage.system_time().num_milliseconds()).unwrap_or(0))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Follows the daemon's output: the first requests one by one, then a line now and then.
fn watch(output: ChildStdout, ready: &std::sync::mpsc::Sender<()>) -> Served {
    let mut served = Served::default();
    let mut said = Instant::now();
    for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
        if line.starts_with("infill: ready") {
            // The other side waits, or has given up and reports that.
            let _ = ready.send(());
        } else if line.starts_with("READ ") {
            served.requests += 1;
            if served.requests <= SHOWN_REQUESTS {
                println!("  {line}");
                if served.requests == SHOWN_REQUESTS {
                    println!("  ... (and so on)");
                }
            } else if said.elapsed() > SUMMARY_EVERY {
                said = Instant::now();
                println!("  {} READs answered", served.requests);
            }
        } else if line.starts_with('{') {
            served.json = serde_json::from_str(&line).unwrap_or_default();
        }
    }
    let _ = std::io::stdout().flush();
    served
}
