//! How a verb talks to the daemon: a stream socket in the state directory, on which each line is one JSON object, a question
//! or its answer. What a question has made ready stays so as long as its connection.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::service::{Prepared, Service};

/// Its name in the state directory.
const SOCKET: &str = "control.sock";
/// Only the daemon's own user, and root.
const SOCKET_MODE: u32 = 0o600;
/// Longest question or answer: an image with thousands of devices.
const LINE_MAX_BYTES: u64 = 1 << 20;
/// Connections at a time; more are closed at once.
const CONNECTIONS_MAX: usize = 64;
/// How long a question may take to come, and its answer to be taken: so a client that is stuck keeps nothing.
const CLIENT_MAX: Duration = Duration::from_secs(600);
/// How long a client waits for an answer: longer than a daemon needs to bring a whole image.
const ANSWER_MAX: Duration = Duration::from_secs(3600);

/// What can be asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase", deny_unknown_fields)]
pub enum Question {
    /// Make an image ready to be mounted.
    Attach {
        /// Its name.
        image: String,
        /// Those with the same one share blobs.
        domain: Option<String>,
        /// Names of its devices; none: those in the image.
        #[serde(default)]
        devices: Vec<String>,
    },
    /// Make the image ready again that is mounted of this file, though an earlier daemon has left nothing.
    Repair {
        /// The image's file.
        file: PathBuf,
    },
    /// See which images are not mounted any more.
    Release,
}

/// What is answered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// To [`Question::Attach`] and [`Question::Repair`].
    Attached(Prepared),
    /// To [`Question::Release`]: so many blobs.
    Released(usize),
    /// It cannot be done, in one line.
    Error(String),
}

/// A client's connection.
#[derive(Debug)]
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// The daemon that listens in `state_dir`; `None`: there is none.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn find(state_dir: &Path) -> io::Result<Option<Self>> {
        match UnixStream::connect(state_dir.join(SOCKET)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(ANSWER_MAX))?;
                stream.set_write_timeout(Some(CLIENT_MAX))?;
                Ok(Some(Self(BufReader::new(stream))))
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks.
    ///
    /// # Errors
    /// The daemon went away, or what it said makes no sense.
    pub fn ask(&mut self, question: &Question) -> io::Result<Reply> {
        write_line(self.0.get_mut(), question)?;
        read_line(&mut self.0)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// The socket on which questions come.
#[derive(Debug)]
pub struct Listener(UnixListener);

/// Makes the socket in `state_dir`: a daemon's own, so that what is there was left by one that is dead.
///
/// # Errors
/// It cannot be made.
pub fn listen(state_dir: &Path) -> io::Result<Listener> {
    let path = state_dir.join(SOCKET);
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok(Listener(listener))
}

impl Listener {
    /// Has questions answered by `service` until the process ends.
    ///
    /// # Errors
    /// No thread.
    pub fn serve(self, service: Arc<Service>) -> io::Result<()> {
        Builder::new().name("infill-control".into()).spawn(move || accept(&self.0, &service)).map(drop)
    }
}

fn accept(listener: &UnixListener, service: &Arc<Service>) {
    let connections = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming().flatten() {
        if connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            connections.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (service, count) = (Arc::clone(service), Arc::clone(&connections));
        let serve = move || {
            // A client that goes away, or says what is no question, is not heard any longer.
            let _ = converse(stream, &service);
            count.fetch_sub(1, Ordering::Relaxed);
        };
        if Builder::new().name("infill-client".into()).spawn(serve).is_err() {
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn converse(stream: UnixStream, service: &Service) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_MAX))?;
    stream.set_write_timeout(Some(CLIENT_MAX))?;
    let mut stream = BufReader::new(stream);
    let mut pins = Vec::new();
    loop {
        let reply = match read_line(&mut stream) {
            Ok(None) => return Ok(()),
            Ok(Some(question)) => service.answer(&question, &mut pins),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Reply::Error(format!("no question: {error}")),
            Err(error) => return Err(error),
        };
        write_line(stream.get_mut(), &reply)?;
    }
}

fn write_line(stream: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// The next question, or answer. `None`: the other side has ended.
///
/// # Errors
/// `InvalidData`: a line that is none; what follows may be one. Else what reading says.
pub fn read_line<T: for<'a> Deserialize<'a>>(stream: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    stream.take(LINE_MAX_BYTES).read_until(b'\n', &mut line)?;
    match line.strip_suffix(b"\n") {
        None if line.is_empty() => Ok(None),
        // Cut off, or too long: what follows would be taken for the beginning of another one.
        None => Err(io::ErrorKind::UnexpectedEof.into()),
        Some(line) => serde_json::from_slice(line).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}
