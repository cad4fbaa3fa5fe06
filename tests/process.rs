//! The real binary against a kernel on a socket: signals, and a daemon that is killed while readers wait.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use infill::front::sim::rng::Rng;
use infill::front::sim::socket::SocketKernel;
use infill::key::Key;
use nix::sys::signal::{Signal, kill};
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

fn serve(dir: &Path, socket: OwnedFd) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("INFILL_")) {
        command.env_remove(name);
    }
    command.args([
        "serve",
        "--front-end",
        "sim",
        "--sim-socket",
        "0",
        "--shards",
        "2",
        "--window",
        "64K",
        "--log-level",
        "error",
        "--store",
    ]);
    command.arg(format!("dir:{}", dir.display())).stdin(Stdio::from(socket)).stdout(Stdio::null()).spawn().unwrap()
}

fn send(signal: Signal, child: &Child) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// Readers read the whole blob, each in its own order, while the daemon is ended and started again.
fn survives(signal: Signal) {
    let dir = tempfile::tempdir().unwrap();
    let bytes = blob(dir.path());
    let (kernel, socket) = SocketKernel::new().unwrap();
    let mut daemon = serve(dir.path(), socket);
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
            daemon = serve(dir.path(), socket);
            send_again().unwrap();
        }
    });
    send(Signal::SIGTERM, &daemon);
    assert!(daemon.wait().unwrap().success());
    assert_eq!(kernel.violations(), [""; 0]);
}

#[test]
fn a_killed_daemon_costs_no_reader_a_byte() {
    survives(Signal::SIGKILL);
}

#[test]
fn a_stopped_daemon_costs_no_reader_a_byte() {
    survives(Signal::SIGTERM);
}
