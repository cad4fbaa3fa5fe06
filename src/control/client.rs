//! Asking a daemon, as a verb does it: one question after the other, each waited for.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::{self, Runtime};
use tokio::time::{sleep, timeout};

use super::wire::{Health, ImageList, Level, Outlived, Prefetch, Ready, Released, Trouble, Wanted};
use crate::config::LogLevel;
use crate::ops::exit;
use crate::ops::mounting::Image;

/// How long a daemon that has its socket may need to answer the first time: it may be starting.
const START_MAX: Duration = Duration::from_secs(300);
/// How long it may need for what takes no time.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long it may need to bring a whole image.
const ATTACH_MAX: Duration = Duration::from_secs(3600);
/// How long it may be too busy.
const BUSY_MAX: Duration = Duration::from_secs(30);
/// Pause between two tries.
const BUSY_POLL: Duration = Duration::from_millis(200);
/// Longest answer: the blobs of ten thousands of images.
const ANSWER_MAX_BYTES: usize = 256 << 20;

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon listens on {}; start infill serve, or name the daemon's --control-socket or --state-dir", .0.display())]
    NoDaemon(PathBuf),
    /// We may not ask.
    #[error(
        "{}: {source}: the daemon there serves its own user, root and its control_group alone; run it as root, or name the daemon's --control-socket",
        socket.display()
    )]
    NotPermitted {
        /// Where.
        socket: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It went away, or is stuck.
    #[error("the daemon on {} does not answer: {why}; see its log", socket.display())]
    NoAnswer {
        /// Where.
        socket: PathBuf,
        /// What happened instead.
        why: String,
    },
    /// It says no.
    #[error("{why}")]
    Refused {
        /// The kind of reason, as HTTP numbers it.
        status: u16,
        /// Its words.
        why: String,
    },
}

impl ClientError {
    /// The exit code of a verb that ends for this reason.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoDaemon(_) | Self::NoAnswer { .. } | Self::Refused { status: 409, .. } => exit::UNAVAILABLE,
            Self::NotPermitted { .. } | Self::Refused { status: 403, .. } => exit::NO_PERMISSION,
            Self::Refused { status: 503, .. } => exit::TRY_AGAIN,
            Self::Refused { .. } => exit::FAILED,
        }
    }

    /// Whether the daemon went away, or another one came, so that it can be asked again.
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        matches!(self, Self::NoDaemon(_) | Self::NoAnswer { .. })
    }
}

/// A daemon that was there.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
    health: Health,
}

/// An answer: what kind it is, and the rest.
type Answer = (StatusCode, Bytes);

impl Client {
    /// The daemon that listens on `socket`; `None`: there is none.
    ///
    /// # Errors
    /// It cannot be reached, or does not answer.
    pub fn find(socket: &Path) -> Result<Option<Self>, ClientError> {
        match Self::connect(socket) {
            Ok(client) => Ok(Some(client)),
            Err(ClientError::NoDaemon(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The daemon that listens on `socket`.
    ///
    /// # Errors
    /// There is none, it cannot be reached, or does not answer.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let no_runtime = |error: io::Error| ClientError::NoAnswer { socket: socket.into(), why: error.to_string() };
        let runtime = runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(no_runtime)?;
        let nobody = Health { status: String::new(), front_end: String::new(), version: String::new(), pid: 0 };
        let mut client = Self { socket: socket.into(), runtime, health: nobody };
        client.health = client.ask(&Method::GET, "/v1/health", None, START_MAX)?;
        Ok(client)
    }

    /// What it said of itself.
    #[must_use]
    pub const fn health(&self) -> &Health {
        &self.health
    }

    /// Whether images are mounted from files that it makes ready.
    #[must_use]
    pub fn mounts_from_files(&self) -> bool {
        self.health.front_end == "fanotify"
    }

    /// What it has done.
    ///
    /// # Errors
    /// See [`ClientError`]; here and below.
    pub fn stat(&self) -> Result<Value, ClientError> {
        self.ask(&Method::GET, "/v1/stat", None, ANSWER_MAX)
    }

    /// What it serves.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn images(&self) -> Result<ImageList, ClientError> {
        self.ask(&Method::GET, "/v1/images", None, ANSWER_MAX)
    }

    /// What it logs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn level(&self) -> Result<LogLevel, ClientError> {
        self.ask(&Method::GET, "/v1/log-level", None, ANSWER_MAX).map(|Level { level }| level)
    }

    /// Has it log so.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn set_level(&self, level: LogLevel) -> Result<(), ClientError> {
        self.ask(&Method::PUT, "/v1/log-level", Some(json(&Level { level })), ANSWER_MAX).map(|Level { .. }| ())
    }

    /// Has an image made ready.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn attach(&self, image: &Image) -> Result<Ready, ClientError> {
        self.ask(&Method::POST, "/v1/attach", Some(json(&Wanted::from(image))), ATTACH_MAX)
    }

    /// Has the image made ready of whose `file` a mount is.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn repair(&self, file: &Path) -> Result<Ready, ClientError> {
        self.ask(&Method::POST, "/v1/repair", Some(json(&Outlived { file: file.into() })), ATTACH_MAX)
    }

    /// Ends a lease. `true`: it was valid until now.
    ///
    /// # Errors
    /// See [`ClientError`]: whether it was valid is not known.
    pub fn end_lease(&self, id: &str) -> Result<bool, ClientError> {
        match self.call(&Method::DELETE, &format!("/v1/leases/{id}"), None, ANSWER_MAX)? {
            (StatusCode::NO_CONTENT, _) => Ok(true),
            (StatusCode::NOT_FOUND, _) => Ok(false),
            (status, body) => Err(refused(status, &body)),
        }
    }

    /// Has it see which images are not mounted any more. Gives the number of blobs that it let go.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn release(&self) -> Result<usize, ClientError> {
        self.ask(&Method::POST, "/v1/release", None, ANSWER_MAX).map(|Released { blobs }| blobs)
    }

    /// Has all of an image brought in the background.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn prefetch(&self, image: &Image) -> Result<Prefetch, ClientError> {
        self.ask(&Method::POST, "/v1/prefetch", Some(json(&Wanted::from(image))), ANSWER_MAX)
    }

    fn ask<T: DeserializeOwned>(&self, method: &Method, path: &str, body: Option<Bytes>, patience: Duration) -> Result<T, ClientError> {
        let (status, body) = self.call(method, path, body, patience)?;
        if !status.is_success() {
            return Err(refused(status, &body));
        }
        let strange = |error| self.no_answer(format!("{path}: what it says is not understood ({error}); is it of another version?"));
        serde_json::from_slice(&body).map_err(strange)
    }

    /// Asks until there is an answer: all that can be asked may be asked twice.
    fn call(&self, method: &Method, path: &str, body: Option<Bytes>, patience: Duration) -> Result<Answer, ClientError> {
        let began = Instant::now();
        loop {
            let request = Request::builder().method(method).uri(path).header(HOST, "infill");
            let request = request.body(Full::new(body.clone().unwrap_or_default())).map_err(|error| self.no_answer(error))?;
            let once = async { timeout(patience, self.once(request)).await.map_err(|_| self.no_answer("it takes too long"))? };
            let is_busy = |answer: &Result<Answer, Missed>| match answer {
                Ok((status, _)) => *status == StatusCode::SERVICE_UNAVAILABLE,
                Err(Missed::Dropped(_)) => true,
                Err(Missed::Not(_)) => false,
            };
            let answer = self.runtime.block_on(once);
            if !is_busy(&answer) || began.elapsed() >= BUSY_MAX {
                return answer.map_err(|(Missed::Dropped(error) | Missed::Not(error))| error);
            }
            std::thread::sleep(BUSY_POLL);
        }
    }

    async fn once(&self, request: Request<Full<Bytes>>) -> Result<Answer, Missed> {
        let stream = self.stream().await?;
        let not = |error: hyper::Error| Missed::Not(self.no_answer(error));
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(not)?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| Missed::Dropped(self.no_answer(error)))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_MAX_BYTES).collect().await;
            Ok((status, body.map_err(|error| Missed::Dropped(self.no_answer(error)))?.to_bytes()))
        };
        join(connection, answer).await
    }

    async fn stream(&self) -> Result<UnixStream, Missed> {
        let began = Instant::now();
        loop {
            match UnixStream::connect(&self.socket).await {
                // Too many wait to be heard.
                Err(error) if error.kind() == ErrorKind::WouldBlock && began.elapsed() < BUSY_MAX => sleep(BUSY_POLL).await,
                Err(error) => return Err(Missed::Not(self.no_connection(error))),
                Ok(stream) => return Ok(stream),
            }
        }
    }

    fn no_connection(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => ClientError::NoDaemon(socket),
            ErrorKind::PermissionDenied => ClientError::NotPermitted { socket, source },
            _ => self.no_answer(source),
        }
    }

    fn no_answer(&self, why: impl ToString) -> ClientError {
        ClientError::NoAnswer { socket: self.socket.clone(), why: why.to_string() }
    }
}

/// Why there is no answer this time.
enum Missed {
    /// It hung up; that is what it does when it is too busy.
    Dropped(ClientError),
    /// Another time will not be better.
    Not(ClientError),
}

impl From<ClientError> for Missed {
    fn from(error: ClientError) -> Self {
        Self::Not(error)
    }
}

/// What `answer` gives, while the connection is driven.
async fn join<T>(connection: impl Future, answer: impl Future<Output = T>) -> T {
    let (mut connection, mut answer) = (std::pin::pin!(connection), std::pin::pin!(answer));
    let mut is_open = true;
    std::future::poll_fn(|context| {
        if is_open {
            is_open = connection.as_mut().poll(context).is_pending();
        }
        answer.as_mut().poll(context)
    })
    .await
}

fn json(what: &impl serde::Serialize) -> Bytes {
    // Texts and numbers always have a JSON form.
    serde_json::to_vec(what).unwrap_or_default().into()
}

fn refused(status: StatusCode, body: &[u8]) -> ClientError {
    let why = serde_json::from_slice(body).map_or_else(|_| format!("the daemon says {status}"), |Trouble { error }| error);
    ClientError::Refused { status: status.as_u16(), why }
}
