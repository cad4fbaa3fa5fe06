//! The control and the metrics socket: what they say, held against its description; who may ask; and that nothing that a client
//! does ends the daemon or keeps it from serving. None of it needs root, apart from two tests that say so.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod hostile;
mod permission;
#[path = "../common/promtool.rs"]
mod promtool;
mod schema;
mod sockets;
mod work;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use infill::front::sim::rng::Rng;
use infill::front::sim::socket::SocketKernel;
use infill::key::Key;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(20);
const BLOB_BYTES: usize = 3_000_001;

fn wait_until(is_so: impl Fn() -> bool, why: &str) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{why}");
        std::thread::sleep(POLL);
    }
}

/// The program, with nothing from outside.
fn infill() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("INFILL_") || name.starts_with("LISTEN_")) {
        command.env_remove(name);
    }
    command
}

/// A store, a model kernel, and what it takes to serve both.
struct Place {
    dir: TempDir,
    kernel: SocketKernel,
    bytes: Vec<u8>,
}

impl Place {
    fn new() -> (Self, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = Rng::new(7);
        let bytes: Vec<u8> = (0..BLOB_BYTES / 8 + 1).flat_map(|_| rng.next().to_ne_bytes()).take(BLOB_BYTES).collect();
        std::fs::create_dir(dir.path().join("store")).unwrap();
        std::fs::write(dir.path().join("store/blob"), &bytes).unwrap();
        let sinks = dir.path().join("sinks");
        std::fs::create_dir(&sinks).unwrap();
        let (kernel, socket) = SocketKernel::new(&sinks).unwrap();
        (Self { dir, kernel, bytes }, socket)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn control(&self) -> PathBuf {
        self.path("control.sock")
    }

    /// The daemon, on its own sockets.
    fn serve(&self) -> Command {
        self.serve_on(&self.control(), &self.path("metrics.sock"))
    }

    /// The daemon, with what all of them need.
    fn serve_on(&self, control: &Path, metrics: &Path) -> Command {
        let mut command = infill();
        command.args(["serve", "--front-end", "sim", "--sim-socket", "0", "--shards", "2", "--log-level", "error"]);
        command.arg("--store").arg(format!("dir:{}", self.path("store").display()));
        command.arg("--cache-dir").arg(self.kernel.dir());
        command.arg("--control-socket").arg(control).arg("--metrics-socket").arg(metrics);
        command
    }

    /// One that answers.
    fn start(&self, socket: OwnedFd, more: &[&str]) -> Daemon {
        let daemon = Daemon(self.serve().args(more).stdin(Stdio::from(socket)).stdout(Stdio::null()).spawn().unwrap());
        self.wait_for_health();
        daemon
    }

    fn wait_for_health(&self) {
        wait_until(|| self.control().exists() && ask(&self.control(), "GET", "/v1/health", "").0 == 200, "it does not answer");
    }

    /// The blob is read, and right.
    fn expect_right(&self, object: u32) {
        let got = self.kernel.read(object, &(0..BLOB_BYTES as u64), 1 << 16).unwrap();
        assert!(got == self.bytes, "wrong bytes");
    }

    fn open(&self) -> u32 {
        self.kernel.open(&Key::new(b"dom", b"blob")).unwrap()
    }

    /// A verb that asks the daemon.
    fn verb(&self, args: &[&str]) -> Output {
        infill().args(args).arg("--control-socket").arg(self.control()).output().unwrap()
    }
}

/// A process that ends with this.
struct Daemon(Child);

impl Daemon {
    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    fn count(&self, what: &str) -> usize {
        std::fs::read_dir(format!("/proc/{}/{what}", self.0.id())).unwrap().count()
    }

    /// How nice a thread of it is.
    fn niceness_of(&self, name: &str) -> Option<i32> {
        let stats = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let stats = stats.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).ok());
        let of_thread = |stat: String| {
            let (before, after) = stat.rsplit_once(')')?;
            // The 19th field (proc_pid_stat(5)), of which the third comes first here.
            before.ends_with(&format!("({name}")).then(|| after.split_whitespace().nth(16)?.parse().ok())?
        };
        stats.into_iter().find_map(of_thread)
    }

    /// As an operator ends it.
    fn end(mut self) {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a server says to these bytes, as far as it says something before it hangs up.
fn raw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may have heard enough before the end.
    let _ = stream.write_all(bytes);
    said(&mut stream)
}

fn said(stream: &mut impl Read) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("no end comes: {error}"),
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// Status, headers and body of an answer.
fn parts(answer: &str) -> (u16, String, String) {
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    (status.unwrap_or(0), head.to_ascii_lowercase(), body.to_owned())
}

fn request(method: &str, path: &str, body: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Asks, and gives status, headers and body.
fn ask(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String, String) {
    match UnixStream::connect(socket) {
        Ok(_) => parts(&raw(socket, request(method, path, body).as_bytes())),
        Err(_) => (0, String::new(), String::new()),
    }
}
