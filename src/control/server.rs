//! The thread `infill-control`: whoever connects is answered by it, and nothing that a client does can hold it up or end it.
//!
//! A connection is good for one request, so that it has three parts with a limit each: the request is read, something is done
//! for it (which threads in [`super::jobs`] do, if it may block), the answer is written. Where there are as many connections as
//! there may be, a new one takes the place of the one that has kept us waiting for longest: so those that say nothing, or read
//! nothing, are in nobody's way, however many they are.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::thread::Builder;
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::process::setpriority_process;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::{self, Runtime};
use tokio::task::{AbortHandle, LocalSet, spawn_local, yield_now};
use tokio::time::{Instant, sleep, sleep_until};

use super::jobs::Jobs;
use super::peer::{Access, Peer};
use super::routes::{Asked, Daemon, Lane, Site, Step, Told, take};
use super::socket::Listener;

/// Connections at a time. More than all work that may be under way, so that some place can always be had.
const CONNECTIONS_MAX: usize = 128;
/// Descriptors for them, the sockets, and what the thread waits by.
pub const CLIENTS_FDS: u64 = CONNECTIONS_MAX as u64 + 12;
/// Work at a time that may wait for stores, and that may not. A stop of a store must keep nobody from looking at it.
const SLOW_JOBS_MAX: usize = 64;
/// See [`SLOW_JOBS_MAX`].
const QUICK_JOBS_MAX: usize = 32;
/// Longest request line with headers.
const HEAD_MAX_BYTES: usize = 16 << 10;
/// Headers of a request.
const HEADERS_MAX: usize = 64;
/// Longest body: an image with thousands of devices.
const BODY_MAX_BYTES: usize = 1 << 20;
/// How long a whole request may take to come.
const READ_MAX: Duration = Duration::from_secs(10);
/// How long an answer may take to be taken.
const WRITE_MAX: Duration = Duration::from_secs(10);
/// Pause when no connection can be accepted: descriptors are short, and will be there again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// When somebody who comes at a bad time may come again, in seconds.
const RETRY_AFTER_S: &str = "1";
/// How nice it and the threads that it starts are (sched(7)): where CPU time is short, readers come first.
const NICE: i32 = 10;
/// Its name.
const THREAD: &str = "infill-control";

/// A socket, and what it is for.
#[derive(Debug)]
pub struct Listening {
    /// The socket.
    pub listener: Listener,
    /// What for.
    pub site: Site,
}

/// Answers on these sockets for `daemon` until the process ends.
///
/// # Errors
/// No thread or descriptor is free.
pub fn start(sockets: Vec<Listening>, daemon: Arc<Daemon>, access: Access) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let sockets = sockets.into_iter().map(|socket| Ok((Socket::new(&runtime, socket.listener)?, socket.site)));
    let sockets = sockets.collect::<io::Result<Vec<_>>>()?;
    Builder::new().name(THREAD.into()).spawn(move || run(&runtime, sockets, daemon, access)).map(drop)
}

fn run(runtime: &Runtime, sockets: Vec<(Socket, Site)>, daemon: Arc<Daemon>, access: Access) {
    // Refused where there is a filter of somebody else's: then it is like others.
    let _ = setpriority_process(None, NICE);
    let server = Rc::new(Server {
        daemon,
        access,
        quick: Jobs::new("infill-look", QUICK_JOBS_MAX),
        slow: Jobs::new("infill-attach", SLOW_JOBS_MAX),
        crowd: Crowd::default(),
    });
    let local = LocalSet::new();
    for (socket, site) in sockets {
        local.spawn_local(accept(socket, site, Rc::clone(&server)));
    }
    local.block_on(runtime, std::future::pending::<()>());
}

/// What all connections share.
struct Server {
    daemon: Arc<Daemon>,
    access: Access,
    quick: Jobs,
    slow: Jobs,
    crowd: Crowd,
}

/// A socket of the runtime.
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Socket {
    fn new(runtime: &Runtime, listener: Listener) -> io::Result<Self> {
        let _inside = runtime.enter();
        match listener {
            Listener::Unix(unix) => unix.set_nonblocking(true).and_then(|()| UnixListener::from_std(unix)).map(Self::Unix),
            Listener::Tcp(tcp) => tcp.set_nonblocking(true).and_then(|()| TcpListener::from_std(tcp)).map(Self::Tcp),
        }
    }
}

/// Connections, by their age.
#[derive(Default)]
struct Crowd {
    next: Cell<u64>,
    all: RefCell<BTreeMap<u64, Member>>,
}

struct Member {
    life: Rc<Life>,
    task: AbortHandle,
}

/// Where a connection is.
struct Life {
    /// What we wait for must have happened by then; `None`: the client waits for us.
    until: Cell<Option<Instant>>,
}

impl Life {
    fn new() -> Self {
        Self { until: Cell::new(Some(Instant::now() + READ_MAX)) }
    }

    fn working(&self) {
        self.until.set(None);
    }

    fn writing(&self) {
        self.until.set(Some(Instant::now() + WRITE_MAX));
    }
}

impl Crowd {
    /// Makes room for one more.
    fn make_room(&self) {
        let mut all = self.all.borrow_mut();
        if all.len() >= CONNECTIONS_MAX {
            let oldest = all.iter().find(|(_, member)| member.life.until.get().is_some()).map(|(id, _)| *id);
            oldest.and_then(|id| all.remove(&id)).inspect(|member| member.task.abort());
        }
    }
}

/// A place in the crowd; it is left when this is dropped.
struct Place(Rc<Server>, u64);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.crowd.all.borrow_mut().remove(&self.1);
    }
}

async fn accept(socket: Socket, site: Site, server: Rc<Server>) {
    loop {
        let accepted = match &socket {
            Socket::Unix(unix) => unix.accept().await.map(|(stream, _)| {
                // Who cannot be told may look, as everybody.
                let may_change = Peer::of(&stream).is_ok_and(|peer| server.access.may_change(&peer));
                welcome(&server, site, may_change, stream);
            }),
            Socket::Tcp(tcp) => tcp.accept().await.map(|(stream, _)| welcome(&server, site, false, stream)),
        };
        if accepted.is_err() {
            sleep(ACCEPT_PAUSE).await;
        }
        // One that has sent its request with the connection is read before others can take its place.
        yield_now().await;
    }
}

fn welcome<S: AsyncRead + AsyncWrite + Unpin + 'static>(server: &Rc<Server>, site: Site, may_change: bool, stream: S) {
    server.crowd.make_room();
    let id = server.crowd.next.replace(server.crowd.next.get() + 1);
    let life = Rc::new(Life::new());
    let place = Place(Rc::clone(server), id);
    let task = spawn_local(attend(stream, site, may_change, Rc::clone(&life), place));
    server.crowd.all.borrow_mut().insert(id, Member { life, task: task.abort_handle() });
}

/// Reads one request and answers it, or gives up.
async fn attend<S: AsyncRead + AsyncWrite + Unpin + 'static>(stream: S, site: Site, may_change: bool, life: Rc<Life>, place: Place) {
    let server = &place.0;
    let service = service_fn(|request| answer(request, site, may_change, &life, server));
    let mut http = http1::Builder::new();
    // Its time is `life`'s.
    http.keep_alive(false).header_read_timeout(None).max_buf_size(HEAD_MAX_BYTES).max_headers(HEADERS_MAX);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let mut timer = pin!(sleep(READ_MAX));
    poll_fn(|context| {
        // A client that goes away, or says what is no request, is not heard any longer.
        if connection.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        let Some(until) = life.until.get() else { return Poll::Pending };
        if timer.deadline() != until {
            timer.set(sleep_until(until));
        }
        timer.as_mut().poll(context)
    })
    .await;
}

async fn answer(
    request: Request<Incoming>,
    site: Site,
    may_change: bool,
    life: &Life,
    server: &Server,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let told = match read(request, may_change).await {
        Err(told) => told,
        Ok(asked) => match take(site, &server.daemon, &asked) {
            Step::Now(told) => told,
            Step::Work(lane, work) => {
                life.working();
                let jobs = if lane == Lane::Slow { &server.slow } else { &server.quick };
                let busy = || Told::trouble(StatusCode::SERVICE_UNAVAILABLE, "too much is being done already; try again soon");
                jobs.run(work).await.unwrap_or_else(busy)
            }
        },
    };
    life.writing();
    Ok(response(told))
}

/// All of a request.
async fn read(request: Request<Incoming>, may_change: bool) -> Result<Asked, Told> {
    let (head, body) = request.into_parts();
    let too_long = || {
        let why = format!("the body is longer than {BODY_MAX_BYTES} bytes; ask for less at a time");
        Told::trouble(StatusCode::PAYLOAD_TOO_LARGE, why)
    };
    if body.size_hint().lower() > BODY_MAX_BYTES as u64 {
        return Err(too_long());
    }
    // Whoever may only look has nothing to say: it is not waited for, nor kept.
    if !may_change {
        return Ok(Asked { method: head.method, path: head.uri.path().to_owned(), body: Bytes::new(), may_change });
    }
    let body = Limited::new(body, BODY_MAX_BYTES).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            too_long()
        } else {
            Told::trouble(StatusCode::BAD_REQUEST, format!("the body cannot be read: {error}"))
        }
    })?;
    Ok(Asked { method: head.method, path: head.uri.path().to_owned(), body: body.to_bytes(), may_change })
}

fn response(Told { status, content_type, body, allow }: Told) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(content_type) = content_type {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_S));
    }
    if let Some(allow) = allow.and_then(|methods| HeaderValue::try_from(methods).ok()) {
        headers.insert(ALLOW, allow);
    }
    response
}
