//! The real binary against a kernel on a socket: signals, a daemon that is killed while readers wait, and one that has
//! given up all that it does not need.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use infill::front::sim::rng::Rng;
use infill::front::sim::socket::{ReadError, SocketKernel};
use infill::key::Key;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

const PAGE: u64 = 4096;
const BLOB_BYTES: usize = 20_000_001;
const READERS: u64 = 4;
/// Times that the daemon is ended while readers wait.
const ENDS: usize = 3;

fn blob(dir: &Path) -> Vec<u8> {
    let mut rng = Rng::new(3);
    let bytes: Vec<u8> = (0..BLOB_BYTES / 8 + 1).flat_map(|_| rng.next().to_ne_bytes()).take(BLOB_BYTES).collect();
    std::fs::write(dir.join("blob"), &bytes).unwrap();
    bytes
}

/// A kernel that keeps its objects below `dir`, where any user may reach them.
fn kernel(dir: &Path) -> (SocketKernel, OwnedFd) {
    let sinks = tempfile::tempdir_in(dir).unwrap().keep();
    std::fs::set_permissions(&sinks, Permissions::from_mode(0o755)).unwrap();
    SocketKernel::new(&sinks).unwrap()
}

fn serve(dir: &Path, kernel: &SocketKernel, socket: OwnedFd, more: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("INFILL_")) {
        command.env_remove(name);
    }
    command.args(["serve", "--front-end", "sim", "--sim-socket", "0", "--shards", "2", "--window", "64K", "--log-level", "error"]);
    command
        .args(more)
        .arg("--store")
        .arg(format!("dir:{}", dir.display()))
        .arg("--cache-dir")
        .arg(kernel.dir())
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn send(signal: Signal, child: &Child) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// Readers read the whole blob, each in its own order, while the daemon is ended and started again.
fn survives(signal: Signal) {
    let dir = tempfile::tempdir().unwrap();
    let bytes = blob(dir.path());
    let (kernel, socket) = kernel(dir.path());
    let mut daemon = serve(dir.path(), &kernel, socket, &[]);
    let object = kernel.open(&Key::new(b"dom", b"blob")).unwrap();
    thread::scope(|scope| {
        for seed in 0..READERS {
            let (kernel, bytes) = (&kernel, &bytes);
            scope.spawn(move || {
                let mut rng = Rng::new(seed);
                for _ in 0..400 {
                    let start = rng.below(BLOB_BYTES as u64);
                    let end = (start + rng.pick(&[1, PAGE, 16 * PAGE])).min(BLOB_BYTES as u64);
                    let got = kernel.read(object, &(start..end), 8 * PAGE).unwrap();
                    let start = usize::try_from(start).unwrap();
                    assert!(got == bytes[start..start + got.len()], "wrong bytes at {start}");
                }
            });
        }
        for _ in 0..ENDS {
            thread::sleep(Duration::from_millis(30));
            send(signal, &daemon);
            let status = daemon.wait().unwrap();
            assert_eq!(status.success(), signal == Signal::SIGTERM, "{status}");
            let (socket, send_again) = kernel.restart().unwrap();
            daemon = serve(dir.path(), &kernel, socket, &[]);
            send_again().unwrap();
        }
    });
    send(Signal::SIGTERM, &daemon);
    assert!(daemon.wait().unwrap().success());
    assert_eq!(kernel.violations(), [""; 0]);
}

#[test]
fn fault_killed_daemon_costs_no_reader_a_byte() {
    survives(Signal::SIGKILL);
}

#[test]
fn a_stopped_daemon_costs_no_reader_a_byte() {
    survives(Signal::SIGTERM);
}

/// All is given up, and all is served: with each engine and each way to read a source. As root, which may change the
/// user and must then get along without the rights of root; else as who runs the tests.
#[test]
fn a_confined_daemon_serves() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let bytes = blob(dir.path());
    let confined: &[&str] = if nix::unistd::geteuid().is_root() {
        // Not strict: Landlock may be switched off on the machine that builds.
        &["--user=65534:65534"]
    } else {
        println!("not run: a change of user, for which root is needed");
        &[]
    };
    for engine in ["--engine=uring", "--engine=blocking"] {
        for source in ["--source=direct", "--source=buffered", "--source=mmap"] {
            let (kernel, socket) = kernel(dir.path());
            let mut daemon = serve(dir.path(), &kernel, socket, &[confined, &[engine, source]].concat());
            // Opened twice: files are still found after the start.
            for _ in 0..2 {
                let object = kernel.open(&Key::new(b"dom", b"blob")).unwrap();
                let got = kernel.read(object, &(0..BLOB_BYTES as u64), 8 * PAGE).unwrap();
                assert!(got == bytes, "wrong bytes with {engine} {source}");
                kernel.close(object).unwrap();
            }
            let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
            for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Seccomp_filters:\t2"] {
                assert!(status.contains(line), "{line} is not in: {status}");
            }
            send(Signal::SIGTERM, &daemon);
            assert!(daemon.wait().unwrap().success());
            assert_eq!(kernel.violations(), [""; 0]);
        }
    }
}

/// Waits until the log has a text; gives all of it.
fn await_log(path: &Path, text: &str) -> String {
    let began = std::time::Instant::now();
    loop {
        let log = std::fs::read_to_string(path).unwrap_or_default();
        if log.contains(text) {
            return log;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "no {text:?} in: {log}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// A daemon by a settings file, confined and not: what is applied is applied, what is not is named, and a bad file changes nothing.
#[test]
fn a_reload_applies_what_it_can_and_names_the_rest() {
    let root = nix::unistd::geteuid().is_root();
    let confined: &[&str] = if root { &["--user=65534:65534"] } else { &[] };
    for more in [confined, &["--confine=off"]] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        // The settings are in no directory that the daemon may read for another reason.
        for name in ["", "blobs", "etc", "etc/config.d"] {
            let _ = std::fs::create_dir(path(name));
            std::fs::set_permissions(path(name), Permissions::from_mode(0o755)).unwrap();
        }
        let write = |name: &str, text: &str| {
            std::fs::write(path("etc/next"), format!("version = 1\n[serve]\n{text}")).unwrap();
            std::fs::rename(path("etc/next"), path(name)).unwrap();
        };
        let bytes = blob(&path("blobs"));
        let store = format!("store = [\"dir:{}\"]\n", path("blobs").display());
        write("etc/config.toml", &format!("{store}slots = 8\n"));
        let (kernel, socket) = kernel(dir.path());
        let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("INFILL_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--front-end=sim", "--sim-socket=0", "--shards=2"]).args(more).arg("--config").arg(path("etc/config.toml"));
        command.arg("--cache-dir").arg(kernel.dir()).stdin(Stdio::from(socket)).stdout(Stdio::null());
        let log = path("log");
        let mut daemon = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
        await_log(&log, "serving");

        let text = "slots = 9\nwindow = \"64K\"\nrequest_timeout_ms = 20000\ncomplete_rate = \"1M\"\nshards = 7\n";
        write("etc/config.toml", &format!("{store}{text}"));
        write("etc/config.d/10-late.toml", "slots = 10\ndrain_timeout_ms = 5000\n");
        send(Signal::SIGHUP, &daemon);
        let said = await_log(&log, "not reloaded, restart infill for it: slots = 10 (was 8)");
        let reloaded = "reloaded: complete_rate = 1M (was 0), request_timeout_ms = 20000 (was 30000), drain_timeout_ms = 5000 (was 10000)";
        assert!(said.contains(reloaded) && said.contains("restart infill for it: window = 64K (was auto)"), "{said}");
        // The flag still wins.
        assert!(!said.contains("shards = 7"), "{said}");

        write("etc/config.d/20-bad.toml", "log_level = \"error\"\nwindwo = 1\n");
        send(Signal::SIGHUP, &daemon);
        let bad = format!(
            "all settings stay as they are: {}:4: unknown key `windwo`; did you mean `window`?",
            path("etc/config.d/20-bad.toml").display()
        );
        await_log(&log, &bad);
        send(Signal::SIGUSR1, &daemon);
        await_log(&log, "timed_out");

        // From here on nothing is said but errors.
        write("etc/config.d/20-bad.toml", "log_level = \"error\"\n");
        send(Signal::SIGHUP, &daemon);
        let said = await_log(&log, "reloaded: log_level = error (was info)");
        send(Signal::SIGUSR1, &daemon);
        let object = kernel.open(&Key::new(b"dom", b"blob")).unwrap();
        assert!(kernel.read(object, &(0..BLOB_BYTES as u64), 8 * PAGE).unwrap() == bytes);
        write("etc/config.d/20-bad.toml", "log_level = \"debug\"\n");
        send(Signal::SIGHUP, &daemon);
        let again = await_log(&log, "reloaded: log_level = debug (was error)");
        assert_eq!(again.matches("timed_out").count(), said.matches("timed_out").count(), "{again}");
        send(Signal::SIGTERM, &daemon);
        assert!(daemon.wait().unwrap().success());
        assert_eq!(kernel.violations(), [""; 0]);
    }
}

/// An image is built anew under its name, equally long, while no daemon runs: what is mounted reads what is cached of the old
/// one or an error, and what is mounted after that the new one alone. Also for a daemon that cannot look into the cache.
#[test]
fn fault_blob_replaced_while_no_daemon_runs_is_never_mixed_with_the_old_one() {
    let confined: &[&[&str]] = if nix::unistd::geteuid().is_root() { &[&[], &["--user=65534:65534"]] } else { &[&[]] };
    for more in confined {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let old = blob(dir.path());
        let new: Vec<u8> = old.iter().map(|byte| !byte).collect();
        let (kernel, socket) = kernel(dir.path());
        let mut daemon = serve(dir.path(), &kernel, socket, more);
        let next = |daemon: &mut Child, signal| {
            send(signal, daemon);
            daemon.wait().unwrap();
            let (socket, send_again) = kernel.restart().unwrap();
            *daemon = serve(dir.path(), &kernel, socket, more);
            send_again().unwrap();
        };
        let replace_by = |bytes: &[u8]| {
            std::fs::write(dir.path().join("next"), bytes).unwrap();
            std::fs::rename(dir.path().join("next"), dir.path().join("blob")).unwrap();
        };
        let object = kernel.open(&Key::new(b"dom", b"blob")).unwrap();
        assert!(kernel.read(object, &(0..PAGE), PAGE).unwrap() == old[..4096]);

        replace_by(&new);
        next(&mut daemon, Signal::SIGKILL);
        assert!(kernel.read(object, &(0..PAGE), PAGE).unwrap() == old[..4096], "it is cached");
        let far = BLOB_BYTES as u64 / 2 / PAGE * PAGE;
        assert_eq!(kernel.read(object, &(far..far + PAGE), PAGE), Err(ReadError::Errno(Errno::EIO)));
        // Mounted anew, by this daemon or the one after it.
        let object = kernel.remount(object).unwrap();
        assert!(kernel.read(object, &(far..far + PAGE), PAGE).unwrap()[..] == new[BLOB_BYTES / 2 / 4096 * 4096..][..4096]);
        next(&mut daemon, Signal::SIGTERM);
        let object = kernel.remount(object).unwrap();
        assert!(kernel.read(object, &(0..BLOB_BYTES as u64), 8 * PAGE).unwrap() == new);

        // The other way round, unmounted meanwhile.
        replace_by(&old);
        next(&mut daemon, Signal::SIGKILL);
        let object = kernel.remount(object).unwrap();
        assert!(kernel.read(object, &(0..BLOB_BYTES as u64), 8 * PAGE).unwrap() == old);
        send(Signal::SIGTERM, &daemon);
        assert!(daemon.wait().unwrap().success());
        assert_eq!(kernel.violations(), [""; 0]);
    }
}

/// However the daemon treats signals: who stops the unit ends the keeper at once.
#[test]
fn a_keeper_can_be_ended_with_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    // In a thread of its own, for a program inherits what is blocked.
    let start = move || {
        signals.thread_block().unwrap();
        Command::new(env!("CARGO_BIN_EXE_infill")).arg("keeper").stdin(OwnedFd::from(listener)).spawn().unwrap()
    };
    let mut keeper = thread::spawn(start).join().unwrap();
    let connection = UnixStream::connect(&socket).unwrap();
    // It answers, so it is detached.
    (&connection).write_all(b"t").unwrap();
    (&connection).read_exact(&mut [0]).unwrap();
    send(Signal::SIGHUP, &keeper);
    (&connection).write_all(b"t").unwrap();
    (&connection).read_exact(&mut [0]).unwrap();
    send(Signal::SIGTERM, &keeper);
    assert_eq!(keeper.wait().unwrap().signal(), Some(Signal::SIGTERM as i32));
}

#[test]
fn fault_kernel_interface_that_is_gone_ends_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    blob(dir.path());
    let (kernel, socket) = kernel(dir.path());
    let mut daemon = serve(dir.path(), &kernel, socket, &[]);
    kernel.open(&Key::new(b"dom", b"blob")).unwrap();
    drop(kernel);
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
}

#[test]
fn fault_no_memory_for_buffers_is_said_at_start() {
    const ADDRESS_SPACE_KIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (_kernel, socket) = kernel(dir.path());
    let infill = env!("CARGO_BIN_EXE_infill");
    let serve = "serve --front-end sim --sim-socket 0 --shards 4 --slots 1000 --slot-size 1M --log-level error";
    let script = format!("ulimit -v {ADDRESS_SPACE_KIB}; exec '{infill}' {serve} --store 'dir:{}'", dir.path().display());
    let output = Command::new("sh").args(["-c", &script]).stdin(Stdio::from(socket)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("memory"), "{said}");
}
