//! What a test in the guest works with: a cache directory and a store of its own, the daemon, mounts.

use std::cell::RefCell;
use std::error::Error;
use std::fs::{self, File};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use infill::lab::gist_of_log;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fixtures::DATA;
use crate::readers::{How, READ_LIMIT, expect_equal};
use crate::runner::wait_limited;

/// The daemon under test.
pub(crate) const INFILL: &str = "/bin/infill";
/// How long the daemon may take until it is ready, and until it is gone after SIGTERM.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(30);
/// See [`START_LIMIT`].
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(30);
/// The line with which the daemon says that it is bound.
const READY: &str = "infill: ready";
/// The domain the tests share blobs in.
pub(crate) const DOMAIN: &str = "lab";
/// Settings with which readers ask for each piece, so that something can happen while they are at it: as set else, a
/// dozen requests may bring a whole tree.
pub(crate) const ASKED_OFTEN: [&str; 2] = ["--window=4K", "--complete=off"];
/// READs after which several readers are surely at work.
pub(crate) const AT_WORK: u64 = 20;
/// Lines of the daemon's log that are shown for a failed test.
const LOG_LINES: usize = 40;
/// How much is shown of where a thread of the daemon waits.
const STACK_DEPTH: usize = 4;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// One test's world.
pub(crate) struct Guest {
    /// The daemon's cache directory.
    pub(crate) cache: PathBuf,
    /// The daemon's blob directory.
    pub(crate) store: PathBuf,
    daemon: RefCell<Option<Daemon>>,
    mounts: RefCell<Vec<PathBuf>>,
    name: String,
}

/// A running (or ended) daemon.
pub(crate) struct Daemon {
    child: Child,
    out: PathBuf,
    log: PathBuf,
}

/// How a daemon's life ended.
pub(crate) struct Ended {
    /// Its exit status.
    pub(crate) status: ExitStatus,
    /// Its last line, if that was JSON.
    pub(crate) json: serde_json::Value,
}

impl Guest {
    /// Makes the directories of a test.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let guest = Self {
            cache: PathBuf::from("/cache").join(name),
            store: PathBuf::from("/store").join(name),
            daemon: RefCell::new(None),
            mounts: RefCell::new(Vec::new()),
            name: name.to_owned(),
        };
        fs::create_dir_all(&guest.cache)?;
        fs::create_dir_all(&guest.store)?;
        Ok(guest)
    }

    /// Puts files of the test data into the store under their names, without copying them.
    pub(crate) fn stock(&self, names: &[&str]) -> Result<()> {
        for name in names {
            self.stock_as(name, name)?;
        }
        Ok(())
    }

    /// Puts one file of the test data into the store under another name.
    pub(crate) fn stock_as(&self, name: &str, known_as: &str) -> Result<()> {
        let to = self.store.join(known_as);
        fs::hard_link(data(name), &to).map_err(|e| format!("{}: {e}", to.display()))?;
        Ok(())
    }

    /// Starts the daemon on this test's directories and waits until it is ready.
    pub(crate) fn serve(&self, more: &[&str]) -> Result<()> {
        self.serve_with(&self.serve_arguments(more))
    }

    /// The same with arguments of the caller's own.
    pub(crate) fn serve_with(&self, arguments: &[String]) -> Result<()> {
        *self.daemon.borrow_mut() = Some(self.launch(arguments)?);
        self.await_ready()
    }

    /// Starts a daemon by a command of the caller's own, with a descriptor as its standard input.
    pub(crate) fn start(&self, command: &mut Command, arguments: &[String], stdin: Option<BorrowedFd<'_>>) -> Result<()> {
        let stdin = stdin.map(|fd| fd.try_clone_to_owned()).transpose()?.map_or_else(Stdio::null, Stdio::from);
        *self.daemon.borrow_mut() = Some(self.launch_by(command.args(arguments).stdin(stdin))?);
        Ok(())
    }

    /// Waits until the daemon is ready.
    pub(crate) fn await_ready(&self) -> Result<()> {
        let mut daemon = self.daemon.borrow_mut();
        let running = daemon.as_mut().ok_or("no daemon runs")?;
        let began = Instant::now();
        while !running.output().contains(READY) {
            let said = match running.child.try_wait()? {
                Some(status) => format!("the daemon ended ({status}):\n{}", running.logged()),
                None if began.elapsed() > START_LIMIT => format!("the daemon is not ready:\n{}", running.logged()),
                None => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
            };
            let _ = running.child.kill();
            let _ = running.child.wait();
            *daemon = None;
            return Err(said.into());
        }
        Ok(())
    }

    /// `serve` with this test's directories.
    pub(crate) fn serve_arguments(&self, more: &[&str]) -> Vec<String> {
        let mut arguments = vec!["serve".to_owned(), "--front-end=cachefiles".to_owned()];
        arguments.push(format!("--cache-dir={}", self.cache.display()));
        arguments.push(format!("--store=dir:{}", self.store.display()));
        arguments.push("--json".to_owned());
        if !more.iter().any(|argument| argument.starts_with("--keep")) {
            // A test that ends leaves nothing behind.
            arguments.push("--keep=off".to_owned());
        }
        arguments.extend(more.iter().map(|&s| s.to_owned()));
        arguments
    }

    /// Starts infill with any arguments.
    pub(crate) fn launch(&self, arguments: &[String]) -> Result<Daemon> {
        self.launch_by(Command::new(INFILL).args(arguments).stdin(Stdio::null()))
    }

    fn launch_by(&self, command: &mut Command) -> Result<Daemon> {
        let log = PathBuf::from(format!("/tmp/{}.log", self.name));
        let out = PathBuf::from(format!("/tmp/{}.out", self.name));
        command.stdout(File::create(&out)?).stderr(File::options().create(true).append(true).open(&log)?);
        let child = command.spawn()?;
        Ok(Daemon { child, out, log })
    }

    /// Runs infill with arguments it is expected to refuse; gives its exit code and what it logged.
    pub(crate) fn refused(&self, arguments: &[String]) -> Result<(i32, String)> {
        let mut daemon = self.launch(arguments)?;
        let Some(status) = wait_limited(&mut daemon.child, START_LIMIT) else {
            let _ = daemon.child.kill();
            return Err("infill runs although it should have refused".into());
        };
        let code = status.code().ok_or_else(|| format!("it ended with {status}"))?;
        Ok((code, daemon.logged()))
    }

    /// The daemon's process id.
    pub(crate) fn daemon_pid(&self) -> Result<u32> {
        let daemon = self.daemon.borrow();
        Ok(daemon.as_ref().ok_or("no daemon runs")?.child.id())
    }

    /// What the daemon has logged so far.
    pub(crate) fn log(&self) -> String {
        self.daemon.borrow().as_ref().map(Daemon::logged).unwrap_or_default()
    }

    /// Asks the daemon to stop, waits for its end, and wants exit code 0 and no unanswered request.
    pub(crate) fn stop(&self) -> Result<Ended> {
        let ended = self.terminate()?;
        if ended.status.code() != Some(0) {
            return Err(format!("the daemon ended with {}", ended.status).into());
        }
        if ended.json["unanswered"] != 0 {
            return Err(format!("requests were left unanswered: {}", ended.json).into());
        }
        Ok(ended)
    }

    /// Asks the daemon to stop and waits for its end.
    pub(crate) fn terminate(&self) -> Result<Ended> {
        let mut daemon = self.daemon.borrow_mut().take().ok_or("no daemon runs")?;
        kill(Pid::from_raw(daemon.child.id().cast_signed()), Signal::SIGTERM)?;
        let Some(status) = wait_limited(&mut daemon.child, STOP_LIMIT) else {
            let _ = daemon.child.kill();
            return Err(format!("the daemon did not stop:\n{}", daemon.logged()).into());
        };
        let output = daemon.output();
        let last = output.lines().last().unwrap_or_default();
        Ok(Ended { status, json: serde_json::from_str(last).unwrap_or(serde_json::Value::Null) })
    }

    /// Kills the daemon and waits for its end.
    pub(crate) fn kill(&self) -> Result<()> {
        let mut daemon = self.daemon.borrow_mut().take().ok_or("no daemon runs")?;
        daemon.child.kill()?;
        wait_limited(&mut daemon.child, STOP_LIMIT).map(drop).ok_or_else(|| "the daemon does not die".into())
    }

    /// Mounts an image; gives the mount point.
    pub(crate) fn mount(&self, options: &str) -> Result<PathBuf> {
        let at = PathBuf::from(format!("/mnt/{}", options.replace(['/', ','], "_")));
        fs::create_dir_all(&at)?;
        mount(Some("none"), &at, Some("erofs"), MsFlags::MS_RDONLY, Some(options)).map_err(|e| format!("cannot mount {options}: {e}"))?;
        self.mounts.borrow_mut().push(at.clone());
        Ok(at)
    }

    /// Has the daemon make an image ready, with more arguments for that, and mounts it from files. Gives the mount point and what
    /// `infill mount` said of it.
    pub(crate) fn mount_files(&self, image: &str, more: &[&str]) -> Result<(PathBuf, serde_json::Value)> {
        let at = PathBuf::from(format!("/mnt/{image}"));
        fs::create_dir_all(&at)?;
        let output = Command::new(INFILL).args(["mount", "--json"]).args(more).arg(image).arg(&at).output()?;
        if !output.status.success() {
            return Err(format!("{image} is not mounted: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        self.mounts.borrow_mut().push(at.clone());
        Ok((at, serde_json::from_slice(&output.stdout)?))
    }

    /// Somebody has unmounted an image.
    pub(crate) fn unmounted(&self, at: &Path) {
        self.mounts.borrow_mut().retain(|m| m != at);
    }

    /// Unmounts an image.
    pub(crate) fn umount(&self, at: &Path) -> Result<()> {
        umount2(at, MntFlags::empty()).map_err(|e| format!("cannot unmount {}: {e}", at.display()))?;
        self.unmounted(at);
        Ok(())
    }

    /// Starts the daemon, mounts an image, reads it all and wants it equal, stops the daemon.
    pub(crate) fn whole_tree(&self, serve: &[&str], options: &str, manifest: &str, how: (usize, How)) -> Result<Ended> {
        self.serve(serve)?;
        self.expect_whole(options, manifest, how)?;
        self.stop()
    }

    /// Mounts an image, reads it all by so many readers and wants it equal, unmounts it.
    pub(crate) fn expect_whole(&self, options: &str, manifest: &str, (readers, how): (usize, How)) -> Result<()> {
        let at = self.mount(options)?;
        expect_equal(&at, &data(manifest), readers, how)?;
        self.umount(&at)
    }

    /// What `infill doctor` prints, as one line.
    pub(crate) fn doctor(&self) -> Result<String> {
        let output = Command::new(INFILL).args(["doctor", "--json"]).arg(format!("--cache-dir={}", self.cache.display())).output()?;
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Mounts go first, while there may still be a daemon.
    pub(crate) fn end_mounts_and_daemon(&self) {
        for at in self.mounts.borrow_mut().drain(..).rev() {
            let _ = umount2(&at, MntFlags::MNT_DETACH);
        }
        if let Some(mut daemon) = self.daemon.borrow_mut().take() {
            let _ = daemon.child.kill();
            let _ = wait_limited(&mut daemon.child, STOP_LIMIT);
        }
    }

    /// Prints what the daemon logged, and where it is if it still runs, for a failed test.
    pub(crate) fn print_logs(&self) {
        let threads = self.daemon_pid().and_then(|pid| Ok(fs::read_dir(format!("/proc/{pid}/task"))?));
        for task in threads.into_iter().flatten().flatten() {
            let text = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let stack: Vec<_> =
                text("stack").lines().filter_map(|line| line.split_whitespace().nth(1)).take(STACK_DEPTH).map(str::to_owned).collect();
            println!("thread {}: {}", text("comm").trim_end(), stack.join(" "));
        }
        for kind in ["out", "log"] {
            let text = fs::read_to_string(format!("/tmp/{}.{kind}", self.name));
            for line in gist_of_log(&text.unwrap_or_default(), LOG_LINES).lines() {
                println!("{kind}: {line}");
            }
        }
    }
}

/// Whatever happened, nothing of a test stays.
impl Drop for Guest {
    fn drop(&mut self) {
        self.end_mounts_and_daemon();
    }
}

impl Daemon {
    fn output(&self) -> String {
        fs::read_to_string(&self.out).unwrap_or_default()
    }

    fn logged(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// A file of the test data.
pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(DATA).join(name)
}

/// Mount options for an image whose data is in one blob.
pub(crate) fn with_blob(image: &str, blob: &str) -> String {
    format!("fsid={image},domain_id={DOMAIN},device={blob}")
}

/// Writes back and forgets everything that is cached in memory.
pub(crate) fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").map_err(|e| format!("drop_caches: {e}").into())
}

/// The kernel's own count of READs it sent to the daemon, from its tracepoint.
pub(crate) struct ReadCount;

const TRACING: &str = "/sys/kernel/tracing";

impl ReadCount {
    /// Begins counting at 0.
    pub(crate) fn start() -> Result<Self> {
        let event = "events/cachefiles/cachefiles_ondemand_read/enable";
        fs::write(Path::new(TRACING).join(event), "1").map_err(|e| format!("{event}: {e}"))?;
        fs::write(Path::new(TRACING).join("trace"), "")?;
        Ok(Self)
    }

    /// Waits until readers have asked so many times more.
    pub(crate) fn await_more(&self, reads: u64) -> Result<()> {
        let (began, wanted) = (Instant::now(), self.reads()? + reads);
        while self.reads()? < wanted {
            if began.elapsed() > READ_LIMIT {
                return Err(format!("readers asked {} times, not {wanted} times", self.reads()?).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// READs since the start.
    pub(crate) fn reads(&self) -> Result<u64> {
        let mut total = 0;
        for cpu in fs::read_dir(Path::new(TRACING).join("per_cpu"))? {
            let text = fs::read_to_string(cpu?.path().join("stats"))?;
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name));
                line.and_then(|number| number.trim().parse::<u64>().ok())
            };
            total += field("entries:").ok_or("no count of events")?;
            total += field("overrun:").unwrap_or(0);
        }
        Ok(total)
    }
}
