//! The guest's side: runs the tests one after the other, each in a process of its own, and prints how
//! each ended.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::density::TEN_THOUSAND;
use crate::guest::Guest;
use crate::tests;

/// First argument of the program in the guest; names of tests follow.
pub(crate) const INSIDE: &str = "--inside";
/// First argument of the process of one test.
pub(crate) const ONE: &str = "--one";
/// Console marks, each followed by a test's name; [`FAILED`] also by a colon and the reason.
pub(crate) const START: &str = "test start: ";
/// See [`START`].
pub(crate) const OK: &str = "test ok: ";
/// See [`START`].
pub(crate) const FAILED: &str = "test failed: ";

/// How long one test may take, emulated on a busy machine.
const TEST_LIMIT: Duration = Duration::from_secs(240);
/// The same for the longest one.
const LONGEST_LIMIT: Duration = Duration::from_secs(900);
/// How long the kernel may hold the device node after a test; it frees a killed daemon's rings late.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// Where the caches of tests are.
const CACHE_DIR: &str = "/cache";
/// Where a test leaves the reason of its failure.
const REASON_FILE: &str = "/tmp/reason";

/// Runs the named tests. Ends early, so that the host boots again for the rest, when a test left
/// something behind that would disturb the next.
pub(crate) fn run_all(names: &[String]) -> ExitCode {
    for name in names {
        println!("{START}{name}");
        let began = Instant::now();
        let result = run_in_process(name);
        println!("{name} took {:.1} s", began.elapsed().as_secs_f32());
        match &result {
            Ok(()) => println!("{OK}{name}"),
            Err(reason) => println!("{FAILED}{name}: {}", reason.trim().replace('\n', " | ")),
        }
        if let Some(left) = leftovers() {
            println!("after {name}: {left}; this guest ends here");
            return ExitCode::FAILURE;
        }
        make_room();
    }
    ExitCode::SUCCESS
}

/// Removes what a test has cached, so that the next finds the disk as it was.
fn make_room() {
    for entry in fs::read_dir(CACHE_DIR).into_iter().flatten().flatten() {
        // Not everything there is a test's, and what cannot be removed is only in the way.
        let _ = fs::remove_dir_all(entry.path());
    }
}

fn run_in_process(name: &str) -> Result<(), String> {
    let _ = fs::remove_file(REASON_FILE);
    let mut command = Command::new("/proc/self/exe");
    command.args([ONE, name]).process_group(0);
    let mut child = command.spawn().map_err(|e| format!("cannot start: {e}"))?;
    let limit = if name == TEN_THOUSAND { LONGEST_LIMIT } else { TEST_LIMIT };
    let status = match wait_limited(&mut child, limit) {
        Some(status) => status,
        None => {
            let stacks = blocked_stacks();
            let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
            return Err(format!("not done after {} s; waiting in the kernel:\n{stacks}", limit.as_secs()));
        }
    };
    if status.success() {
        return Ok(());
    }
    Err(fs::read_to_string(REASON_FILE).unwrap_or_else(|_| format!("it ended with {status}")))
}

/// Runs one test in this process.
pub(crate) fn run_one(name: &str) -> ExitCode {
    let Some((name, test)) = tests().find(|(known, _)| *known == name) else {
        let _ = fs::write(REASON_FILE, "there is no such test");
        return ExitCode::FAILURE;
    };
    let result = Guest::new(name).and_then(|mut guest| {
        let result = test(&mut guest);
        if result.is_err() {
            guest.print_logs();
        }
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = fs::write(REASON_FILE, e.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Waits for a child; `None` if it is still there when the time is up.
pub(crate) fn wait_limited(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let began = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if began.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Kernel stacks of all processes that are not runnable and not kernel threads of no interest.
fn blocked_stacks() -> String {
    let mut text = String::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = entry.path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let stack = fs::read_to_string(path.join("stack")).unwrap_or_default();
        if ["cachefiles", "fscache", "erofs", "fanotify", "fsnotify"].iter().any(|part| stack.contains(part)) {
            text.push_str(&format!("{} {}{stack}", path.display(), name));
        }
    }
    text
}

/// What would disturb the next test, if anything.
fn leftovers() -> Option<String> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    if let Some(line) = mounts.lines().find(|line| line.contains(" erofs ")) {
        return Some(format!("still mounted: {line}"));
    }
    let began = Instant::now();
    loop {
        match fs::OpenOptions::new().read(true).write(true).open("/dev/cachefiles") {
            // A kernel that mounts images from files has none.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            Ok(_) => {
                println!("/dev/cachefiles was free after {} ms", began.elapsed().as_millis());
                return None;
            }
            Err(e) if began.elapsed() > RELEASE_LIMIT => return Some(format!("/dev/cachefiles is not free: {e}")),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}
