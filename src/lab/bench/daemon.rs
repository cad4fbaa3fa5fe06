//! `infill serve` as a child of a bench.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{LabError, Result, Trying, gist_of_log, last_lines};

/// How long a daemon may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Lines of its log in an error.
const LOG_LINES: usize = 20;
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(2);

/// A daemon as a child of this process; killed when dropped.
pub(super) struct Daemon {
    child: Child,
    out: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts it; what it prints and logs goes to files beside `at`.
    pub(super) fn start(mut command: Command, at: &Path) -> Result<Self> {
        let (out, log) = (at.with_extension("out"), at.with_extension("log"));
        let file = |path: &Path| File::create(path).trying(|| format!("cannot write {}", path.display()));
        command.stdin(Stdio::null()).stdout(file(&out)?).stderr(file(&log)?);
        let child = command.spawn().trying(|| "cannot start infill serve")?;
        Ok(Self { child, out, log })
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it serves.
    pub(super) fn await_ready(&mut self) -> Result<()> {
        let began = Instant::now();
        while !fs::read_to_string(&self.out).is_ok_and(|text| text.contains("infill: ready")) {
            self.must_live()?;
            if began.elapsed() > READY_LIMIT {
                return Err(LabError::Failed(format!("infill serve is not ready; it said:\n{}", self.logged())));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// It has not ended by itself.
    pub(super) fn must_live(&mut self) -> Result<()> {
        match self.child.try_wait().trying(|| "cannot look at infill serve")? {
            None => Ok(()),
            Some(status) => Err(LabError::Failed(format!("infill serve ended by itself ({status}); it said:\n{}", self.logged()))),
        }
    }

    /// Ends it with `SIGTERM` or `SIGKILL`; it must have lived until then.
    pub(super) fn end(&mut self, orderly: bool) -> Result<()> {
        self.must_live()?;
        let signal = if orderly { Signal::SIGTERM } else { Signal::SIGKILL };
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).trying(|| "cannot end infill serve")?;
        let status = self.child.wait().trying(|| "cannot wait for infill serve")?;
        // One that is still starting may not know the signal yet.
        let is_expected = !orderly || status.success() || !fs::read_to_string(&self.out).is_ok_and(|text| text.contains("ready"));
        if is_expected {
            return Ok(());
        }
        Err(LabError::Failed(format!("infill serve ended with {status}; it said:\n{}", self.logged())))
    }

    /// The last line that it printed.
    pub(super) fn last_line(&self) -> String {
        last_lines(&fs::read_to_string(&self.out).unwrap_or_default(), 1)
    }

    /// What tells most of its log.
    pub(super) fn logged(&self) -> String {
        gist_of_log(&fs::read_to_string(&self.log).unwrap_or_default(), LOG_LINES)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
