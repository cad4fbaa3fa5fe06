//! infill as a unit of a real systemd: the units of `tuning/systemd`, installed where an operator puts them, on a Debian root
//! file system.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use infill::lab::systemd::{CACHE_DIR, JOB_DIR};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest::{ASKED_OFTEN, AT_WORK, Guest, INFILL, ReadCount, data, drop_caches, with_blob};
use crate::readers::{How, Readers, expect_equal};
use crate::seed::wait_until_unbound;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("systemd_unit_starts_and_serves", starts_and_serves),
    ("systemd_stop_and_start_under_readers", |g| under_readers(g, &["tree"], "", stop_and_start)),
    ("systemd_restart_under_readers", |g| {
        under_readers(g, &["one", "tree"], "", |unit, _| unit.systemctl(&["restart", SERVICE]).map(drop))
    }),
    ("systemd_kill_nine_under_readers", |g| under_readers(g, &["one", "tree"], "", |unit, _| kill_nine(unit))),
    ("systemd_watchdog_ends_a_daemon_that_hangs_under_readers", |g| under_readers(g, &["tree"], SHORT_WATCHDOG, hang)),
    ("systemd_connection_to_a_socket_starts_the_unit", connection_starts),
    ("systemd_unit_ends_cachefilesd", ends_cachefilesd),
    ("systemd_second_daemon_is_refused_in_one_line", second_daemon),
    ("systemd_reload_and_second_stop", reload_and_second_stop),
    ("systemd_bad_configuration_is_said_once", bad_configuration),
    // The last one: it leaves an image mounted, so that this guest has to switch itself off with it.
    (GOES_DOWN, leaves_mounted),
];

/// Those that show what a systemd does which says that it stores descriptors (254).
pub(crate) const NEWER_TESTS: &[Test] = &[
    ("systemd_unit_starts_and_serves", starts_and_serves),
    ("systemd_stop_and_start_under_readers", |g| under_readers(g, &["tree"], "", stop_and_start)),
    ("systemd_kill_nine_under_readers", |g| under_readers(g, &["tree"], "", |unit, _| kill_nine(unit))),
    ("systemd_keeps_the_device_alone_until_it_is_told", kept_until_told),
];
/// A Debian suite that has one.
pub(crate) const NEWER_SUITE: &str = "trixie";
/// The test whose result is that its guest switches itself off.
pub(crate) const GOES_DOWN: &str = "systemd_machine_goes_down_with_an_image_mounted";
const SERVICE: &str = "infill.service";
const SOCKETS: [&str; 2] = ["infill-control.socket", "infill-metrics.socket"];
/// Refers to the unit, so that systemd does not forget it.
const WANTED: &str = "/etc/systemd/system/default.target.wants/infill.service";
const UNIT_DIR: &str = "/etc/systemd/system";
/// Where units are that are gone after the next boot.
const RUNTIME_UNIT_DIR: &str = "/run/systemd/system";
const CONFIG: &str = "/etc/infill/config.toml";
/// How long the unit may take to get into a state, emulated on a busy machine.
const STATE_LIMIT: Duration = Duration::from_secs(60);
/// Exit codes of infill, from sysexits.h.
const UNAVAILABLE: i32 = 69;
const BAD_CONFIGURATION: &str = "78";
/// How long nothing may happen that would be seen after the unit's RestartSec=1s.
const NO_RESTART: Duration = Duration::from_secs(4);
/// A shorter watchdog than the unit has, and longer than a busy machine needs for a turn.
const SHORT_WATCHDOG: &str = "[Service]\nWatchdogSec=8s\n";
/// The same.
const SHORT_WATCHDOG_LIMIT: Duration = Duration::from_secs(8);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The installed unit; when this is dropped, everything is stopped and given up.
struct Unit<'a> {
    guest: &'a Guest,
    /// Lines of the journal that earlier tests have left.
    earlier: usize,
}

impl<'a> Unit<'a> {
    /// Installs the units, with a store of these files and more settings.
    fn install(guest: &'a mut Guest, names: &[&str], settings: &str) -> Result<Self> {
        guest.cache = PathBuf::from(CACHE_DIR);
        guest.stock(names)?;
        let mut unit = Self { guest, earlier: 0 };
        unit.earlier = unit.journal()?.len();
        if !Path::new(INFILL).exists() {
            run("install", &["-m", "755", &format!("{JOB_DIR}/infill"), INFILL])?;
            let units = [SERVICE].into_iter().chain(SOCKETS).map(|name| format!("{JOB_DIR}/units/{name}"));
            let arguments: Vec<_> = ["-m", "644", "-t", UNIT_DIR].map(str::to_owned).into_iter().chain(units).collect();
            run("install", &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
            unit.systemctl(&["daemon-reload"])?;
        }
        if !Path::new(WANTED).exists() {
            // What `enable` does for the target that other machines have.
            unit.systemctl(&["add-wants", "default.target", SERVICE])?;
        }
        fs::create_dir_all("/etc/infill")?;
        fs::write(CONFIG, format!("version = 1\n[serve]\nstore = [\"dir:{}\"]\n{settings}", guest.store.display()))?;
        Ok(unit)
    }

    /// Adds lines to the unit until this is dropped.
    fn set_drop_in(&self, lines: &str) -> Outcome {
        if !lines.is_empty() {
            fs::create_dir_all(drop_in_dir())?;
            fs::write(drop_in_dir().join("test.conf"), lines)?;
            self.systemctl(&["daemon-reload"])?;
        }
        Ok(())
    }

    fn systemctl(&self, arguments: &[&str]) -> Result<String> {
        run("systemctl", arguments).map_err(|error| format!("{error}; the journal:\n{}", self.new_lines().join("\n")).into())
    }

    fn show(&self, property: &str) -> Result<String> {
        Ok(self.systemctl(&["show", "-P", property, SERVICE])?.trim().to_owned())
    }

    fn number(&self, property: &str) -> Result<u64> {
        let text = self.show(property)?;
        text.parse().map_err(|_| format!("{property} is {text:?}").into())
    }

    fn journal(&self) -> Result<Vec<String>> {
        run("journalctl", &["--sync"])?;
        let text = run("journalctl", &["-u", SERVICE, "-o", "cat", "-q", "--no-pager"])?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// What the unit has logged in this test.
    fn new_lines(&self) -> Vec<String> {
        self.journal().unwrap_or_default().into_iter().skip(self.earlier).collect()
    }

    /// Waits until the unit is as it should be.
    fn wait(&self, what: &str, is_so: impl Fn() -> Result<bool>) -> Outcome {
        let began = Instant::now();
        while !is_so()? {
            if began.elapsed() > STATE_LIMIT {
                return Err(format!("not within {} s: {what}; the journal:\n{}", STATE_LIMIT.as_secs(), self.new_lines().join("\n")).into());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Waits for another daemon, after so many restarts.
    fn await_restart(&self, restarts: u64) -> Outcome {
        self.wait("another daemon", || Ok(self.number("NRestarts")? == restarts && self.show("ActiveState")? == "active"))
    }

    /// Has systemd forget the stopped unit, and what it stores for it. (`systemctl clean` wants D-Bus, which is not here.)
    fn disable(&self) -> Outcome {
        fs::remove_file(WANTED)?;
        self.systemctl(&["daemon-reload"]).map(drop)
    }

    fn expect(&self, property: &str, wanted: &str) -> Outcome {
        match self.show(property)? {
            found if found == wanted => Ok(()),
            found => Err(format!("{property} is {found:?}, not {wanted:?}; the journal:\n{}", self.new_lines().join("\n")).into()),
        }
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        self.guest.end_mounts_and_daemon();
        let _ = self.systemctl(&[&["stop"], &SOCKETS[..], &[SERVICE]].concat());
        let _ = Command::new(INFILL).args(["release", "--force"]).output();
        // Before 254 the store is empty by now.
        if !matches!(self.number("NFileDescriptorStore"), Ok(0)) {
            let _ = self.disable();
        }
        let _ = self.systemctl(&["reset-failed", SERVICE]);
        if fs::remove_dir_all(drop_in_dir()).is_ok() {
            let _ = self.systemctl(&["daemon-reload"]);
        }
        let _ = wait_until_unbound();
        for entry in fs::read_dir(CACHE_DIR).into_iter().flatten().flatten() {
            // Files of the disk itself, such as lost+found, stay.
            let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
        }
    }
}

/// Where lines are added to the unit until the next boot.
fn drop_in_dir() -> PathBuf {
    Path::new(RUNTIME_UNIT_DIR).join(format!("{SERVICE}.d"))
}

/// Runs a program to its end; gives what it printed.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let Output { status, stdout, stderr } = Command::new(program).args(arguments).output().map_err(|e| format!("{program}: {e}"))?;
    if status.success() {
        return Ok(String::from_utf8(stdout)?);
    }
    Err(format!("{program} {} failed ({status}): {}", arguments.join(" "), String::from_utf8_lossy(&stderr).trim()).into())
}

fn signal(pid: &str, signal: Signal) -> Outcome {
    Ok(kill(Pid::from_raw(pid.parse()?), signal)?)
}

fn one_image() -> String {
    with_blob("one.img", "one.blob")
}

/// Active means ready; and the daemon sees and is seen as any other process of the host.
fn starts_and_serves(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["one.img", "one.blob"], "")?;
    unit.systemctl(&["start", SERVICE])?;
    unit.expect("ActiveState", "active")?;
    unit.guest.expect_whole(&one_image(), "one.json", (4, How::Read))?;
    let pid = unit.show("MainPID")?;
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
    if namespace(&pid)? != namespace("1")? {
        return Err("the unit has a mount namespace of its own: images would stay mounted there".into());
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    // The daemon raises what it may raise.
    for (name, least) in [("Max open files", 1_048_576), ("Max locked memory", u64::MAX), ("Max file size", u64::MAX)] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        let soft = line.get(name.len()..).and_then(|rest| rest.split_whitespace().next()).unwrap_or_default();
        if soft != "unlimited" && soft.parse().unwrap_or(0) < least {
            return Err(format!("less than {least}: {line}").into());
        }
    }
    unit.wait("a line on how it does", || Ok(unit.show("StatusText")?.starts_with("cachefiles: ")))?;
    let lines = unit.new_lines();
    if let Some(line) = lines.iter().find(|line| line.contains("WARN") || line.contains("ERROR")) {
        return Err(format!("it complains: {line}").into());
    }
    Ok(())
}

/// For each of some cold images: readers read it while something happens to the daemon; each byte must come, and be right.
/// Something happens to the unit while readers read images; with these lines in a drop-in of the unit, if there are any.
fn under_readers(guest: &mut Guest, images: &[&str], drop_in: &str, happens: fn(&Unit<'_>, &mut Readers) -> Outcome) -> Outcome {
    let settings = ASKED_OFTEN.map(|flag| flag.trim_start_matches("--").replace('=', " = \"") + "\"\n").concat();
    let files: Vec<_> = images.iter().flat_map(|name| [format!("{name}.img"), format!("{name}.blob")]).collect();
    let unit = Unit::install(guest, &files.iter().map(String::as_str).collect::<Vec<_>>(), &settings)?;
    unit.set_drop_in(drop_in)?;
    unit.systemctl(&["start", SERVICE])?;
    let (reads, mut mounts) = (ReadCount::start()?, Vec::new());
    for name in images {
        let (at, manifest) =
            (unit.guest.mount(&with_blob(&format!("{name}.img"), &format!("{name}.blob")))?, data(&format!("{name}.json")));
        let mut readers = Readers::start(&at, &manifest, 4, How::Read)?;
        reads.await_more(AT_WORK)?;
        at_work(&mut readers)?;
        happens(&unit, &mut readers)?;
        readers.expect_equal().map_err(|error| format!("{error}; the journal:\n{}", unit.new_lines().join("\n")))?;
        mounts.push((at, manifest));
    }
    unit.expect("ActiveState", "active")?;
    // What the next daemon has brought into the cache beside what the first one had.
    drop_caches()?;
    for (at, manifest) in &mounts {
        expect_equal(at, manifest, 2, How::Read)?;
        unit.guest.umount(at)?;
    }
    Ok(())
}

fn at_work(readers: &mut Readers) -> Outcome {
    if readers.are_at_work() { Ok(()) } else { Err("the readers are done, and nothing has happened to them".into()) }
}

fn is_mounted(at: &str) -> Result<bool> {
    Ok(fs::read_to_string("/proc/mounts")?.lines().any(|line| line.split(' ').nth(2) == Some("erofs") && line.contains(at)))
}

fn stop_and_start(unit: &Unit<'_>, readers: &mut Readers) -> Outcome {
    unit.systemctl(&["stop", SERVICE])?;
    unit.expect("ActiveState", "inactive")?;
    unit.expect("Result", "success")?;
    if !is_mounted("/mnt/")? {
        return Err("stopping the unit has unmounted an image".into());
    }
    std::thread::sleep(Duration::from_secs(1));
    at_work(readers)?;
    unit.systemctl(&["start", SERVICE]).map(drop)
}

fn kill_nine(unit: &Unit<'_>) -> Outcome {
    let restarts = unit.number("NRestarts")?;
    signal(&unit.show("MainPID")?, Signal::SIGKILL)?;
    unit.await_restart(restarts + 1)
}

/// A process that is stopped does nothing, which is what a shard that hangs does.
fn hang(unit: &Unit<'_>, readers: &mut Readers) -> Outcome {
    at_work(readers)?;
    signal(&unit.show("MainPID")?, Signal::SIGSTOP)?;
    unit.await_restart(1)?;
    // The next one is fed for longer than the watchdog waits.
    let pid = unit.show("MainPID")?;
    std::thread::sleep(SHORT_WATCHDOG_LIMIT + Duration::from_secs(2));
    unit.expect("MainPID", &pid)?;
    match unit.new_lines().iter().any(|line| line.contains("Watchdog timeout")) {
        true => Ok(()),
        false => Err(format!("not the watchdog has ended it:\n{}", unit.new_lines().join("\n")).into()),
    }
}

fn connection_starts(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["tiny.img"], "")?;
    unit.systemctl(&[&["start"], &SOCKETS[..]].concat())?;
    unit.expect("ActiveState", "inactive")?;
    let connection = UnixStream::connect("/run/infill/control.sock")?;
    unit.wait("the unit to start", || Ok(unit.show("ActiveState")? == "active"))?;
    drop(connection);
    unit.guest.expect_whole("fsid=tiny.img", "tiny.json", (1, How::Read))
}

/// Both want the same device, and one of them is meant.
fn ends_cachefilesd(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["tiny.img"], "")?;
    let other = "cachefilesd.service";
    fs::write(Path::new(RUNTIME_UNIT_DIR).join(other), "[Service]\nExecStart=sleep infinity\n")?;
    unit.systemctl(&["daemon-reload"])?;
    unit.systemctl(&["start", other])?;
    unit.systemctl(&["start", SERVICE])?;
    let state = unit.systemctl(&["show", "-P", "ActiveState", other])?;
    if state.trim() != "inactive" {
        return Err(format!("{other} is {}", state.trim()).into());
    }
    unit.expect("ActiveState", "active")
}

fn second_daemon(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["tiny.img"], "")?;
    unit.systemctl(&["start", SERVICE])?;
    let output = Command::new(INFILL).arg("serve").output()?;
    let said = String::from_utf8(output.stderr)?;
    let names_it = said.contains(&format!("pid {}", unit.show("MainPID")?));
    if output.status.code() != Some(UNAVAILABLE) || said.lines().count() != 1 || !names_it {
        return Err(format!("{}; it said:\n{said}", output.status).into());
    }
    unit.expect("ActiveState", "active")?;
    unit.guest.expect_whole("fsid=tiny.img", "tiny.json", (1, How::Read))
}

fn reload_and_second_stop(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["tiny.img"], "")?;
    unit.systemctl(&["start", SERVICE])?;
    let pid = unit.show("MainPID")?;
    let mut settings = fs::read_to_string(CONFIG)?;
    settings.push_str("log_level = \"debug\"\n");
    fs::write(CONFIG, settings)?;
    unit.systemctl(&["reload", SERVICE])?;
    unit.wait("a line on the reload", || Ok(unit.new_lines().iter().any(|line| line.contains("reloaded: log_level = debug"))))?;
    unit.expect("MainPID", &pid)?;
    unit.guest.expect_whole("fsid=tiny.img", "tiny.json", (1, How::Read))?;
    for _ in 0..2 {
        unit.systemctl(&["stop", SERVICE])?;
        unit.expect("Result", "success")?;
    }
    Ok(())
}

fn bad_configuration(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["tiny.img"], "no_such_key = 1\n")?;
    if unit.systemctl(&["start", SERVICE]).is_ok() {
        return Err("it starts with a key that does not exist".into());
    }
    std::thread::sleep(NO_RESTART);
    unit.expect("ActiveState", "failed")?;
    unit.expect("ExecMainStatus", BAD_CONFIGURATION)?;
    unit.expect("NRestarts", "0")?;
    let lines = unit.new_lines();
    let its: Vec<_> = lines.iter().filter(|line| line.starts_with("infill: ")).collect();
    if its.len() != 1 || !its[0].contains(CONFIG) || !lines.iter().any(|line| line.contains("no_such_key")) {
        return Err(format!("not one message with the file and the key:\n{}", lines.join("\n")).into());
    }
    Ok(())
}

/// No keeper is needed; and what a stop leaves in the store is there until the unit is forgotten.
fn kept_until_told(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["tiny.img"], "")?;
    unit.systemctl(&["start", SERVICE])?;
    unit.expect("NFileDescriptorStore", "1")?;
    if run("pgrep", &["-f", "infill keeper"]).is_ok() {
        return Err("there is a keeper beside systemd's store".into());
    }
    unit.systemctl(&["stop", SERVICE])?;
    unit.expect("NFileDescriptorStore", "1")?;
    unit.disable()?;
    wait_until_unbound()
}

/// Services end before file systems are unmounted, and an image that nobody can bring anything of must not hold that up.
fn leaves_mounted(guest: &mut Guest) -> Outcome {
    let unit = Unit::install(guest, &["one.img", "one.blob"], "")?;
    unit.systemctl(&["start", SERVICE])?;
    let at = unit.guest.mount(&one_image())?;
    expect_equal(&at, &data("one.json"), 1, How::Read)?;
    unit.guest.unmounted(&at);
    std::mem::forget(unit);
    Ok(())
}
