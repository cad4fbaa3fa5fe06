//! The host's side: boots guests and turns what they print into test results.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use infill::lab::disk::{self, CacheFs};
use infill::lab::guest::GuestPlan;
use infill::lab::kernel::Kernel;
use infill::lab::qemu::{Disk, Ending, Machine};
use infill::lab::systemd::{JOB_DIR, SystemdPlan};
use infill::lab::{kernel, packages, qemu};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::density::TEN_THOUSAND;
use crate::fixtures::Fixtures;
use crate::runner::{FAILED, INSIDE, OK, START};
use crate::{Test, guide, systemd, tests_of};

/// Where the guest has this program.
const GUEST_PROGRAM: &str = "/bin/guest-tests";
/// Its name where a guest has it on a disk.
const PROGRAM_NAME: &str = "guest-tests";
/// What comes with infill for systemd.
const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tuning/systemd");
/// The file system under the cache of a guest with systemd.
const SYSTEMD_CACHE_FS: CacheFs = CacheFs::Ext4;
/// How long one boot with all tests may take, emulated on a busy machine.
const TOTAL_LIMIT: Duration = Duration::from_secs(1800);
/// A console line that begins so goes on with a command for the emulator's monitor.
pub(crate) const EMULATOR: &str = "to the emulator: ";
/// With this line a test has the guest's power cut, once: another guest with the same cache disk then begins it anew.
pub(crate) const CUT_POWER: &str = "to the emulator: cut the power";
/// An ext4 disk beside those of every guest, for tests to have it hang; what is on it is gone with the guest.
pub(crate) const HANGING_DISK: &str = "/dev/vdc";
/// The emulator's name of it.
pub(crate) const HANGING_DRIVE: &str = "virtio2";
/// Its size.
const HANGING_DISK_BYTES: u64 = 64 << 20;
/// How many console lines of a failed test are shown.
const TAIL_LINES: usize = 60;

/// What the guest is, beside its kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum World {
    /// Nothing but the tests, with the cache on such a file system.
    Bare(CacheFs),
    /// A root file system with the systemd of this machine's release, or of a Debian suite.
    Systemd(Option<&'static str>),
}

impl World {
    const fn name(self) -> &'static str {
        match self {
            Self::Bare(fs) => fs.name(),
            Self::Systemd(None) => "systemd",
            Self::Systemd(Some(_)) => "newer_systemd",
        }
    }

    fn tests(self, series: &str) -> Vec<Test> {
        match self {
            Self::Bare(_) => tests_of(series),
            Self::Systemd(None) if series == kernel::SERIES[0] => [guide::TESTS, systemd::TESTS].concat(),
            Self::Systemd(Some(_)) if series == kernel::SERIES[0] => systemd::NEWER_TESTS.to_vec(),
            Self::Systemd(None) if series == kernel::FROM_FILES => guide::TESTS.to_vec(),
            Self::Systemd(_) => Vec::new(),
        }
    }
}

const WORLDS: [World; 4] =
    [World::Bare(CacheFs::Ext4), World::Bare(CacheFs::Xfs), World::Systemd(None), World::Systemd(Some(systemd::NEWER_SUITE))];

/// A kernel in a world, and what its guests have said so far.
struct Cell {
    series: &'static str,
    world: World,
    bench: Arc<Bench>,
    state: Mutex<State>,
    changed: Condvar,
}

/// What all cells share.
#[derive(Default)]
struct Bench {
    /// Made by the first guest, removed with the last reference.
    fixtures: OnceLock<Result<Fixtures, String>>,
    /// One guest at a time: it has two busy processors.
    turn: Mutex<()>,
}

#[derive(Default)]
struct State {
    selected: Vec<&'static str>,
    /// The thread that boots the guests, once a test has asked for its result.
    thread: Option<JoinHandle<()>>,
    /// Tests that had the power cut.
    cuts: HashSet<String>,
    results: HashMap<String, Result<(), String>>,
}

/// Runs the selected tests.
pub(crate) fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let skip = std::env::var("INFILL_GUEST").is_ok_and(|value| value == "skip");
    let (mut trials, mut cells) = (Vec::new(), Vec::new());
    let bench = Arc::new(Bench::default());
    for series in kernel::SERIES.into_iter().chain([kernel::FROM_FILES]) {
        for world in WORLDS {
            let cell = Arc::new(Cell { series, world, bench: Arc::clone(&bench), state: Mutex::default(), changed: Condvar::new() });
            let has_time_for_all = (series, world) == (kernel::SERIES[0], World::Bare(CacheFs::Ext4));
            for (test, _) in world.tests(series).into_iter().filter(|(test, _)| has_time_for_all || *test != TEN_THOUSAND) {
                let name = format!("k{}::{}::{test}", series.replace('.', "_"), world.name());
                let its_cell = Arc::clone(&cell);
                let trial = Trial::ignorable_test(name, move || {
                    if skip {
                        return Ok(Completion::ignored_with("INFILL_GUEST=skip is set"));
                    }
                    its_cell.result_of(test).map(|()| Completion::Completed)
                });
                if !arguments.is_filtered_out(&trial) {
                    cell.lock().selected.push(test);
                    trials.push(trial);
                }
            }
            cells.push(cell);
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // The last result comes before its guest is off and its files are removed.
    for cell in cells {
        let thread = cell.lock().thread.take();
        drop(thread.map(JoinHandle::join));
    }
    conclusion.exit_code()
}

impl Cell {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a test's result. The first one to ask starts the guest, which runs all selected ones.
    fn result_of(self: &Arc<Self>, test: &str) -> Result<(), Failed> {
        let mut state = self.lock();
        if state.thread.is_none() {
            let cell = Arc::clone(self);
            state.thread = Some(std::thread::spawn(move || cell.run()));
        }
        loop {
            if let Some(result) = state.results.get(test) {
                return result.clone().map_err(Failed::from);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn record(&self, test: &str, result: Result<(), String>) {
        self.lock().results.insert(test.to_owned(), result);
        self.changed.notify_all();
    }

    fn remaining(&self) -> Vec<&'static str> {
        let state = self.lock();
        let selected = state.selected.iter().copied();
        selected.filter(|t| !state.results.contains_key(*t)).collect()
    }

    /// Boots guests until every selected test has a result. A guest that dies costs the test it was at;
    /// one that dies before any test costs them all.
    fn run(&self) {
        let _turn = self.bench.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut disks = None;
        loop {
            let remaining = self.remaining();
            if remaining.is_empty() {
                return;
            }
            let cuts = self.lock().cuts.len();
            let scratch = disks.take().map_or_else(tempfile::tempdir, Ok).map_err(|e| format!("no scratch directory: {e}"));
            let problem = scratch.as_ref().map_err(String::clone).and_then(|scratch| self.boot(&remaining, scratch.path())).err();
            if self.lock().cuts.len() > cuts {
                disks = scratch.ok();
            } else if self.remaining().len() == remaining.len() {
                let problem = problem.unwrap_or_else(|| "the guest ran none of its tests".into());
                for test in remaining {
                    self.record(test, Err(problem.clone()));
                }
            }
        }
    }

    /// Boots a guest with disks in `scratch`.
    fn boot(&self, names: &[&str], scratch: &Path) -> Result<(), String> {
        let text = |e: infill::lab::LabError| e.to_string();
        let fixtures = self.bench.fixtures()?;
        let kernel = kernel::ensure(self.series).map_err(text)?;
        let accelerator = qemu::accelerator(&kernel.image).map_err(text)?;
        let (mut machine, monitor) = (self.machine(&kernel, fixtures, names, scratch)?, scratch.join("monitor"));
        machine.monitor = Some(monitor.clone());
        eprintln!("infill: booting Linux {} ({}, {}) for {} tests", kernel.version, accelerator.name(), self.world.name(), names.len());
        let mut transcript = Transcript { monitor: Monitor { path: monitor, connection: None }, ..Transcript::default() };
        let ending = machine.run(accelerator, &mut |line| transcript.line(line, self));
        let ending = ending.map_err(text)?;
        transcript.end(&ending, self)
    }

    /// The guest that runs these tests.
    fn machine(&self, kernel: &Kernel, fixtures: &Fixtures, names: &[&str], scratch: &Path) -> Result<Machine, String> {
        let text = |e: infill::lab::LabError| e.to_string();
        let infill = Path::new(env!("CARGO_BIN_EXE_infill"));
        let this_program = std::env::current_exe().map_err(|e| e.to_string())?;
        let cache_fs = match self.world {
            World::Bare(fs) => fs,
            World::Systemd(suite) => {
                let plan = SystemdPlan {
                    kernel,
                    suite,
                    programs: &[(PROGRAM_NAME, &this_program), ("infill", infill)],
                    dirs: &[("units", Path::new(UNITS))],
                    cache_fs: SYSTEMD_CACHE_FS,
                    store_disk: &fixtures.disk,
                    command: format!("{JOB_DIR}/{PROGRAM_NAME} {INSIDE} {}", names.join(" ")),
                    total_limit: TOTAL_LIMIT,
                };
                return plan.build(scratch).map_err(text);
            }
        };
        let mke2fs = packages::find("mke2fs").ok_or("mke2fs is not installed")?;
        let mut argv = vec![GUEST_PROGRAM.to_owned(), INSIDE.to_owned()];
        argv.extend(names.iter().map(|&name| name.to_owned()));
        let plan = GuestPlan {
            kernel,
            programs: &[(GUEST_PROGRAM, &this_program), ("/sbin/mke2fs", &mke2fs)],
            infill,
            files: &[],
            cache_fs,
            store_disk: &fixtures.disk,
            argv,
            total_limit: TOTAL_LIMIT,
        };
        let mut machine = plan.build(scratch).map_err(text)?;
        let hanging = scratch.join("hanging.img");
        disk::ext4(&hanging, HANGING_DISK_BYTES, None).map_err(text)?;
        machine.disks.push(Disk { path: hanging, throw_away: false });
        Ok(machine)
    }
}

impl Bench {
    /// What the tests read, made once for all guests.
    fn fixtures(&self) -> Result<&Fixtures, String> {
        let made = self.fixtures.get_or_init(|| Fixtures::make().map_err(|e| format!("cannot make the test data: {e}")));
        made.as_ref().map_err(Clone::clone)
    }
}

/// Reads a guest's console.
#[derive(Default)]
struct Transcript {
    current: Option<String>,
    lines: Vec<String>,
    reached_tests: bool,
    power_is_cut: bool,
    /// All is well with the current test if the guest switches itself off.
    goes_down: bool,
    monitor: Monitor,
}

/// The emulator's monitor.
#[derive(Default)]
struct Monitor {
    path: PathBuf,
    /// Kept, because a command whose connection is closed may not be read. What comes back is not: the guest sees what a
    /// command does.
    connection: Option<UnixStream>,
}

impl Monitor {
    fn tell(&mut self, command: &str) -> std::io::Result<()> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => UnixStream::connect(&self.path)?,
        };
        self.connection.insert(connection).write_all(format!("{command}\n").as_bytes())
    }
}

impl Transcript {
    /// Takes one line; says whether the guest has reached its tests.
    fn line(&mut self, line: &str, cell: &Cell) -> bool {
        if std::env::var_os("INFILL_CONSOLE").is_some() {
            eprintln!("{line}");
        }
        if let Some(name) = line.strip_prefix(START) {
            self.current = Some(name.to_owned());
            self.lines.clear();
            self.reached_tests = true;
        } else if line.strip_prefix(OK) == Some(systemd::GOES_DOWN) {
            self.goes_down = true;
        } else if let Some(name) = line.strip_prefix(OK) {
            self.current = None;
            cell.record(name, Ok(()));
        } else if let Some((name, reason)) = line.strip_prefix(FAILED).and_then(|rest| rest.split_once(": ")) {
            self.current = None;
            cell.record(name, Err(self.with_tail(&reason.replace(" | ", "\n"))));
        } else if line == CUT_POWER {
            self.power_is_cut = self.monitor.tell("quit").is_ok();
        } else if let Some(command) = line.strip_prefix(EMULATOR) {
            let said = self.monitor.tell(command).map_or_else(|e| format!("not told to the emulator: {e}"), |()| line.to_owned());
            self.lines.push(said);
        } else {
            self.lines.push(line.to_owned());
        }
        self.reached_tests
    }

    fn end(mut self, ending: &Ending, cell: &Cell) -> Result<(), String> {
        let message = self.with_tail(&format!("guest died: {ending}"));
        match self.current.take() {
            Some(test) if self.goes_down && *ending == Ending::PoweredOff => cell.record(&test, Ok(())),
            Some(test) if self.power_is_cut && cell.lock().cuts.insert(test.clone()) => {}
            Some(test) => cell.record(&test, Err(message)),
            None if !self.reached_tests => return Err(message),
            None => {}
        }
        Ok(())
    }

    fn with_tail(&self, reason: &str) -> String {
        // A kernel that complains says the same again and again.
        let mut lines: Vec<&str> = self.lines.iter().map(String::as_str).collect();
        lines.dedup();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        format!("{reason}\n--- the guest's console:\n{}\n---", tail.join("\n"))
    }
}
