//! A daemon ends, by whatever means, and the next one goes on: images stay mounted, and whoever waits gets the right
//! bytes. The names of the kernel author's own tests of this (lostjeffle/demand-read-cachefilesd) are given where one
//! is answered.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use infill::lab::bench::restart::Storm;
use infill::lab::tree::{Content, Entry, Manifest};
use infill::ops::passing;
use infill::ops::state::KEEPERS;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest::{Guest, INFILL, data, with_blob};
use crate::readers::{How, READ_LIMIT, Readers, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("restart_kill_nine_under_readers", |g| storm(g, false, &[INFILL])),
    ("restart_sigterm_and_restart_under_readers", |g| storm(g, true, &[INFILL])),
    ("restart_upgrade_to_another_binary_under_readers", |g| storm(g, false, &[INFILL, UPGRADED])),
    ("restart_kill_while_an_open_is_unanswered", |g| open_is_unanswered(g, Signal::SIGKILL)),
    ("restart_sigterm_while_an_open_is_unanswered", |g| open_is_unanswered(g, Signal::SIGTERM)),
    ("restart_a_dead_keeper_is_replaced", dead_keeper_is_replaced),
    ("restart_the_death_of_one_keeper_is_survived", one_keeper_is_enough),
    ("restart_keeper_and_daemon_killed_gives_errors", keeper_and_daemon_killed),
    ("restart_kill_without_keeping_hangs_nobody", kill_without_keeping),
    ("restart_second_daemon_is_refused_by_the_state_directory", second_daemon_is_refused),
    ("restart_kept_device_of_another_cache_is_refused", kept_for_another_cache),
    ("restart_wrong_kept_descriptor_is_refused", wrong_kept_descriptor),
    ("restart_systemd_keeps_the_device", systemd_keeps_the_device),
    ("restart_blob_gone_gives_errors", blob_gone),
    ("restart_release_gives_the_device_up", release_gives_up),
];

/// Ends of the daemon in one test.
const KILLS: usize = 10;
/// Says when they come.
const SEED: u64 = 7;
/// The program under another name.
const UPGRADED: &str = "/tmp/infill-upgraded";
/// First argument of a process that becomes infill with a descriptor, as systemd would start it; the descriptor's
/// path follows, or `-` for what is at [`PASSED`] already.
pub(crate) const AS_SERVICE: &str = "--as-service";
/// Where systemd puts the first descriptor.
const PASSED: i32 = 3;
/// Exit codes of infill, from sysexits.h.
const UNAVAILABLE: i32 = 69;
const CONFIG: i32 = 78;
/// How long something that must happen may take.
const PATIENCE: Duration = Duration::from_secs(30);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Whoever keeps the device, it is given up when a test ends.
struct Released<'a>(&'a Guest);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.end_mounts_and_daemon();
        let _ = Command::new(INFILL).args(["release", "--force"]).output();
    }
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) -> Outcome {
    let began = Instant::now();
    while !is_so() {
        if began.elapsed() > PATIENCE {
            return Err(format!("it did not happen within {} s: {what}", PATIENCE.as_secs()).into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// 18: the daemon is killed again and again. With two programs each start is an upgrade.
fn storm(guest: &mut Guest, orderly: bool, programs: &[&str]) -> Outcome {
    let _released = Released(guest);
    if programs.contains(&UPGRADED) {
        fs::copy(INFILL, UPGRADED)?;
    }
    guest.stock(&["tree.img", "tree.blob", "tree.json"])?;
    let storm = Storm {
        infill: programs.iter().map(PathBuf::from).collect(),
        store: guest.store.clone(),
        names: ["tree.img", "tree.blob", "tree.json"].map(str::to_owned),
        cache: guest.cache.clone(),
        state: "/run/infill".into(),
        at: "/tmp/storm".into(),
        kills: KILLS,
        orderly,
        seed: SEED,
    };
    let figures = storm.run(|number| println!("ended the daemon {number} times"))?;
    println!("{}", serde_json::to_string(&figures)?);
    let _ = fs::remove_file(UPGRADED);
    if !figures.is_good() || figures.kills_with_readers == 0 || figures.rounds == 0 {
        return Err(figures.table().into());
    }
    Ok(())
}

fn keeping(guest: &Guest) -> Vec<String> {
    guest.serve_arguments(&["--keep=keeper"])
}

/// The store is away, so the daemon tries again and the mount waits; then it ends, and the next one has the store.
fn open_is_unanswered(guest: &mut Guest, signal: Signal) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["tiny.img"])?;
    guest.serve_with(&keeping(guest))?;
    let away = guest.store.with_extension("away");
    fs::rename(&guest.store, &away)?;
    std::thread::scope(|scope| -> Outcome {
        let mounting = scope.spawn(|| mount_erofs("fsid=tiny.img", Path::new("/tmp/tiny")));
        let result = wait_for("a try to open the image", || guest.log().contains("trying again")).and_then(|()| {
            match signal {
                Signal::SIGTERM => {
                    let ended = guest.terminate()?;
                    if ended.status.code() != Some(0) || ended.json["unanswered"] != 0 {
                        return Err(format!("it ended with {}: {}", ended.status, ended.json).into());
                    }
                }
                _ => guest.kill()?,
            }
            if mounting.is_finished() {
                return Err("the mount did not wait".into());
            }
            Ok(())
        });
        fs::rename(&away, &guest.store)?;
        guest.serve_with(&keeping(guest))?;
        let mounted = mounting.join().map_err(|_| "the mounting thread died")?;
        result?;
        mounted.map_err(|errno| format!("the mount that waited failed: {errno}"))?;
        let equal = expect_equal(Path::new("/tmp/tiny"), &data("tiny.json"), 1, How::Read);
        nix::mount::umount("/tmp/tiny")?;
        equal
    })
}

fn mount_erofs(options: &str, at: &Path) -> nix::Result<()> {
    let _ = fs::create_dir_all(at);
    nix::mount::mount(Some("none"), at, Some("erofs"), nix::mount::MsFlags::MS_RDONLY, Some(options))
}

/// Process ids of all keepers that are no zombies.
fn keepers() -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|process| fs::read(process.path().join("cmdline")).is_ok_and(|line| line == b"infill\0keeper\0"))
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}

fn both_keepers() -> Result<[i32; KEEPERS]> {
    keepers().try_into().map_err(|others| format!("not {KEEPERS} keepers but {others:?}").into())
}

/// A confined daemon cannot replace a keeper that dies; when it dies too, the other one has the device.
fn one_keeper_is_enough(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["one.img", "one.blob"])?;
    guest.serve_with(&keeping(guest))?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    let [first, _] = both_keepers()?;
    kill(Pid::from_raw(first), Signal::SIGKILL)?;
    wait_for("the daemon to notice", || guest.log().contains("a keeper has died"))?;
    guest.kill()?;
    let readers = Readers::start(&at, &data("one.json"), 4, How::Read)?;
    guest.serve_with(&keeping(guest))?;
    if let Some(line) = readers.finish(READ_LIMIT)?.first() {
        return Err(line.clone().into());
    }
    // The next daemon has started the missing one.
    both_keepers()?;
    guest.umount(&at)
}

/// A keeper dies alone; then the daemon does.
fn dead_keeper_is_replaced(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["one.img", "one.blob"])?;
    // A confined daemon cannot start processes.
    guest.serve_with(&guest.serve_arguments(&["--keep=keeper", "--confine=off"]))?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    let [first, second] = both_keepers()?;
    kill(Pid::from_raw(first), Signal::SIGKILL)?;
    let is_replaced = || both_keepers().is_ok_and(|pids| !pids.contains(&first)) && guest.log().contains("a keeper has died");
    wait_for("another keeper", is_replaced)?;
    // What remains is the new one.
    kill(Pid::from_raw(second), Signal::SIGKILL)?;
    guest.kill()?;
    guest.serve_with(&keeping(guest))?;
    expect_equal(&at, &data("one.json"), 4, How::Read)?;
    guest.umount(&at)
}

/// Nobody is left who has the device: reads end with an error, and all is well after a new mount.
fn keeper_and_daemon_killed(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["one.img", "one.blob"])?;
    guest.serve_with(&keeping(guest))?;
    let options = with_blob("one.img", "one.blob");
    let at = guest.mount(&options)?;
    // So that it does not see the keeper die.
    kill(Pid::from_raw(guest.daemon_pid()?.cast_signed()), Signal::SIGSTOP)?;
    let readers = Readers::start(&at, &data("one.json"), 4, How::Read)?;
    for pid in both_keepers()? {
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    guest.kill()?;
    only_io_errors(readers)?;
    guest.umount(&at)?;
    guest.serve_with(&keeping(guest))?;
    let at = guest.mount(&options)?;
    expect_equal(&at, &data("one.json"), 4, How::Read)?;
    guest.umount(&at)
}

/// The blob is taken away between two daemons: the second has never seen it, and its readers get errors all the same.
fn blob_gone(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["one.img", "one.blob"])?;
    let arguments = guest.serve_arguments(&["--keep=keeper", "--window=4K"]);
    guest.serve_with(&arguments)?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    // So that its open has been answered, and nearly all of it is still to be read.
    let manifest = Manifest::load(&data("one.json"))?;
    let has_data = |entry: &&Entry| matches!(entry.content, Content::File { len_bytes: 1.., .. });
    fs::read(at.join(&manifest.entries.iter().find(has_data).ok_or("no file with data")?.path))?;
    guest.kill()?;
    fs::remove_file(guest.store.join("one.blob"))?;
    guest.serve_with(&arguments)?;
    only_io_errors(Readers::start(&at, &data("one.json"), 4, How::Read)?)?;
    guest.umount(&at)
}

/// 12: the daemon is killed with requests that nobody will answer, and nobody keeps the device.
fn kill_without_keeping(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    guest.serve(&[])?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    kill(Pid::from_raw(guest.daemon_pid()?.cast_signed()), Signal::SIGSTOP)?;
    let readers = Readers::start(&at, &data("one.json"), 4, How::Read)?;
    std::thread::sleep(Duration::from_millis(200));
    guest.kill()?;
    only_io_errors(readers)?;
    guest.umount(&at)
}

/// Some reads fail, with an I/O error (ENOBUFS once the cache is withdrawn), and none hangs.
fn only_io_errors(readers: Readers) -> Outcome {
    let complaints = readers.finish(READ_LIMIT)?;
    let known = |line: &&String| !line.contains("os error 5)") && !line.contains("os error 105)");
    match complaints.iter().find(known) {
        Some(line) => Err(format!("not an I/O error: {line}").into()),
        None if complaints.is_empty() => Err("everything could be read, with nobody there to bring it".into()),
        None => Ok(()),
    }
}

fn second_daemon_is_refused(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.serve_with(&keeping(guest))?;
    let pid = guest.daemon_pid()?.to_string();
    let second = Guest::new("second-of-restart")?;
    let (code, log) = second.refused(&keeping(&second))?;
    if code != UNAVAILABLE || !log.contains(&format!("pid {pid}")) || !log.contains("/run/infill") {
        return Err(format!("exit code {code}, the first is {pid}; it said:\n{log}").into());
    }
    Ok(())
}

fn kept_for_another_cache(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["tiny.img"])?;
    guest.serve_with(&keeping(guest))?;
    let at = guest.mount("fsid=tiny.img")?;
    guest.kill()?;
    let other = Guest::new("another-cache")?;
    for cache in [&other.cache, &other.cache.join("none")] {
        let mut arguments = keeping(&other);
        arguments.retain(|argument| !argument.starts_with("--cache-dir"));
        arguments.push(format!("--cache-dir={}", cache.display()));
        let (code, log) = other.refused(&arguments)?;
        if code != CONFIG || [cache, &guest.cache].iter().any(|dir| !log.contains(&*dir.to_string_lossy())) {
            return Err(format!("exit code {code}; it said:\n{log}").into());
        }
    }
    // Nothing was lost by the tries.
    guest.serve_with(&keeping(guest))?;
    expect_equal(&at, &data("tiny.json"), 1, How::Read)?;
    guest.umount(&at)
}

/// Descriptors that are something else, or the device before it was bound.
fn wrong_kept_descriptor(guest: &mut Guest) -> Outcome {
    for (path, says) in [("/dev/null", "something else"), ("/dev/cachefiles", "not bound")] {
        let mut command = Command::new("/proc/self/exe");
        command.arg(AS_SERVICE).arg(path).args(guest.serve_arguments(&[]));
        let output = command.output()?;
        let log = String::from_utf8_lossy(&output.stderr);
        if output.status.code() != Some(CONFIG) || !log.contains(says) {
            return Err(format!("{path}: {}; it said:\n{log}", output.status).into());
        }
    }
    Ok(())
}

/// This test in the place of systemd.
fn systemd_keeps_the_device(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["one.img", "one.blob"])?;
    let socket = PathBuf::from("/tmp/notify");
    let _ = fs::remove_file(&socket);
    let manager = UnixDatagram::bind(&socket)?;
    manager.set_read_timeout(Some(PATIENCE))?;
    let mut arguments = vec![AS_SERVICE.to_owned(), "-".to_owned()];
    arguments.extend(guest.serve_arguments(&["--keep=auto"]));
    let start = |device: Option<&OwnedFd>| -> Result<()> {
        let mut command = Command::new("/proc/self/exe");
        command.env("NOTIFY_SOCKET", &socket).env("FDSTORE", "1");
        guest.start(&mut command, &arguments, device.map(AsFd::as_fd))
    };
    start(None)?;
    let kept = manage(&manager)?.ok_or("the device was not stored")?;
    guest.await_ready()?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    guest.kill()?;
    let readers = Readers::start(&at, &data("one.json"), 4, How::Read)?;
    start(Some(&kept))?;
    if manage(&manager)?.is_some() {
        return Err("the device was stored although it is".into());
    }
    guest.await_ready()?;
    let complaints = readers.finish(READ_LIMIT)?;
    if let Some(line) = complaints.first() {
        return Err(line.clone().into());
    }
    if !keepers().is_empty() {
        return Err("there is a keeper".into());
    }
    guest.umount(&at)
}

/// Plays systemd until the service is ready; gives what it had stored.
fn manage(manager: &UnixDatagram) -> Result<Option<OwnedFd>> {
    let mut kept = None;
    loop {
        let mut bytes = [0; 200];
        let (len, fd) = passing::receive(manager.as_fd(), &mut bytes)?;
        match std::str::from_utf8(&bytes[..len])? {
            "READY=1" => return Ok(kept),
            "BARRIER=1" => drop(fd),
            text if text.starts_with("FDSTORE=1\nFDNAME=cachefiles\n") => kept = fd,
            other => return Err(format!("a message that makes no sense: {other:?}").into()),
        }
    }
}

/// Becomes infill as systemd would start it.
pub(crate) fn as_service_main(args: &[String]) -> ExitCode {
    let [path, arguments @ ..] = args else { return ExitCode::FAILURE };
    let mut command = Command::new(INFILL);
    command.args(arguments).env("LISTEN_PID", std::process::id().to_string());
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "cachefiles");
    let opened = if path == "-" {
        // Standard input is the descriptor, if it is not the null device.
        let stdin = std::io::stdin();
        let is_null = fs::read_link("/proc/self/fd/0").is_ok_and(|link| link == Path::new("/dev/null"));
        if is_null {
            command.env_remove("LISTEN_FDS");
        }
        stdin.as_fd().try_clone_to_owned()
    } else {
        File::options().read(true).write(true).open(path).map(OwnedFd::from)
    };
    let Ok(opened) = opened else { return ExitCode::FAILURE };
    // Not closed on exec, whatever number it had.
    if opened.as_raw_fd() == PASSED {
        let flags = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty());
        let _ = nix::fcntl::fcntl(&opened, flags);
    } else {
        let mut place = std::mem::ManuallyDrop::new(match File::open("/dev/null").map(OwnedFd::from) {
            Ok(place) => place,
            Err(_) => return ExitCode::FAILURE,
        });
        if nix::unistd::dup2(&opened, &mut place).is_err() || place.as_raw_fd() != PASSED {
            return ExitCode::FAILURE;
        }
    }
    eprintln!("cannot start: {}", command.exec());
    ExitCode::FAILURE
}

/// Refused while a daemon serves and while images are mounted; then the device is free, with nothing to wait for.
fn release_gives_up(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.stock(&["tiny.img"])?;
    let release = |more: &[&str]| -> Result<(Option<i32>, String)> {
        let output = Command::new(INFILL).arg("release").args(more).output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    guest.serve_with(&keeping(guest))?;
    let at = guest.mount("fsid=tiny.img")?;
    for says in ["another infill serves", "images are mounted"] {
        let (code, log) = release(&[])?;
        if code != Some(UNAVAILABLE) || !log.contains(says) {
            return Err(format!("{says}: exit code {code:?}, {log}").into());
        }
        if says == "another infill serves" {
            guest.stop()?;
        }
    }
    guest.umount(&at)?;
    wait_for("the kernel to let go of the image", || release(&[]).is_ok_and(|(code, _)| code == Some(0)))?;
    let (code, log) = release(&["--force"])?;
    if code != Some(1) || !log.contains("nothing to release") || !keepers().is_empty() {
        return Err(format!("exit code {code:?}, {log}; keepers {:?}", keepers()).into());
    }
    wait_for("the device to be free", || File::options().read(true).write(true).open("/dev/cachefiles").is_ok())
}
