//! What can be asked, by whom, and what is done for it. No socket here: a request in, and an answer out, or the work that gives
//! one.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::wire::{Health, ImageList, Level, Outlived, Prefetch, Ready, Released, Trouble, Wanted};
use crate::ops::log;
use crate::ops::mounting::Image;
use crate::store::name::NAME_MAX_BYTES;

/// Devices of an image that a client may name. What it asks for is remembered, in more than one place.
const DEVICES_MAX: usize = 8192;
/// The schema itself.
pub const OPENAPI: &str = include_str!("../../docs/openapi.json");
const JSON: &str = "application/json";

/// Images that are mounted from files, as far as a client may ask something of them. Each call may block.
pub trait Images: Send + Sync {
    /// Makes an image ready to be mounted.
    ///
    /// # Errors
    /// It cannot be.
    fn attach(&self, image: &Image) -> Result<Ready, Refusal>;

    /// Makes the image ready again of whose `file` a mount is, though an earlier daemon has left nothing.
    ///
    /// # Errors
    /// It cannot be.
    fn repair(&self, file: &Path) -> Result<Ready, Refusal>;

    /// Ends a lease. `true`: it was valid until now, so that nothing was let go of what it is about.
    fn end_lease(&self, id: &str) -> bool;

    /// Lets go of what nobody has mounted any more. Gives the number of blobs.
    fn release(&self) -> usize;

    /// Has all of an image brought in the background, if it is not on the way already.
    ///
    /// # Errors
    /// There is too much to bring already.
    fn prefetch(&self, image: &Image) -> Result<Prefetch, Refusal>;

    /// What is served.
    fn list(&self) -> ImageList;
}

/// What kind of reason there is not to do something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// There is no such thing.
    NotFound,
    /// What was asked is understood, and cannot be.
    Unusable,
    /// Not as things are.
    Conflict,
    /// Not now.
    Busy,
    /// It took too long.
    TimedOut,
    /// It was tried, and failed.
    Failed,
}

impl Kind {
    const fn status(self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Unusable => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Conflict => StatusCode::CONFLICT,
            Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// Why something is not done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// What kind of reason it is.
    pub kind: Kind,
    /// One line that says what to do.
    pub why: String,
}

impl Refusal {
    /// For such a reason.
    pub fn new(kind: Kind, why: impl ToString) -> Self {
        Self { kind, why: why.to_string() }
    }
}

/// What Prometheus gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Metrics {
    /// In which format it is.
    pub content_type: &'static str,
    /// All of it.
    pub body: String,
}

/// What a daemon shows, made anew each time.
pub type Shown<T> = Box<dyn Fn() -> T + Send + Sync>;

/// A daemon, as far as clients see it.
pub struct Daemon {
    /// Which kernel interface it serves.
    pub front_end: &'static str,
    /// What it has done, as one JSON object.
    pub statistics: Shown<Value>,
    /// The same for Prometheus.
    pub metrics: Shown<Metrics>,
    /// Its settings, as one JSON object.
    pub config: Shown<Value>,
    /// Where images are mounted from files, those.
    pub images: Option<Arc<dyn Images>>,
}

impl fmt::Debug for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemon").field("front_end", &self.front_end).finish_non_exhaustive()
    }
}

/// What a socket is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Site {
    /// Asking and telling the daemon.
    Control,
    /// Scraping it.
    Metrics,
}

/// A request, all of it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What to do.
    pub method: Method,
    /// With what; what comes behind a `?` plays no part.
    pub path: String,
    /// More about it.
    pub body: Bytes,
    /// Whoever asks may do more than look.
    pub may_change: bool,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Told {
    /// What kind of answer it is.
    pub status: StatusCode,
    /// In which format the rest is; `None`: there is none.
    pub content_type: Option<&'static str>,
    /// The rest.
    pub body: Bytes,
    /// What else could be done here, for [`StatusCode::METHOD_NOT_ALLOWED`].
    pub allow: Option<String>,
}

impl Told {
    fn nothing(status: StatusCode) -> Self {
        Self { status, content_type: None, body: Bytes::new(), allow: None }
    }

    fn json(status: StatusCode, what: &impl Serialize) -> Self {
        // Texts and numbers always have a JSON form.
        Self { content_type: Some(JSON), body: serde_json::to_vec(what).unwrap_or_default().into(), ..Self::nothing(status) }
    }

    /// That something cannot be done.
    pub fn trouble(status: StatusCode, why: impl ToString) -> Self {
        // One line, whatever is in it.
        Self::json(status, &Trouble { error: why.to_string().replace(['\n', '\r'], " ") })
    }
}

impl From<Refusal> for Told {
    fn from(refusal: Refusal) -> Self {
        Self::trouble(refusal.kind.status(), refusal.why)
    }
}

/// How long work may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// It looks at what is in memory, or waits for a lock.
    Quick,
    /// It may wait for stores.
    Slow,
}

/// What becomes of a request.
pub enum Step {
    /// It is answered.
    Now(Told),
    /// Work that may block gives the answer.
    Work(Lane, Box<dyn FnOnce() -> Told + Send>),
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(told) => f.debug_tuple("Now").field(told).finish(),
            Self::Work(lane, _) => f.debug_tuple("Work").field(lane).finish_non_exhaustive(),
        }
    }
}

/// Does what one route is for; the text is what its path has in the place of `{id}`.
type Act = fn(&Arc<Daemon>, &Asked, &str) -> Result<Step, Told>;

struct Route {
    site: Site,
    method: &'static str,
    path: &'static str,
    act: Act,
}

const fn control(method: &'static str, path: &'static str, act: Act) -> Route {
    Route { site: Site::Control, method, path, act }
}

const ROUTES: [Route; 14] = [
    control("GET", "/v1/health", health),
    control("GET", "/v1/stat", stat),
    control("GET", "/v1/config", config),
    control("GET", "/v1/openapi.json", openapi),
    control("GET", "/v1/images", images),
    control("GET", "/v1/log-level", level),
    control("PUT", "/v1/log-level", set_level),
    control("POST", "/v1/attach", attach),
    control("POST", "/v1/repair", repair),
    control("POST", "/v1/release", release),
    control("POST", "/v1/prefetch", prefetch),
    control("DELETE", "/v1/leases/{id}", end_lease),
    Route { site: Site::Metrics, method: "GET", path: "/metrics", act: metrics },
    Route { site: Site::Metrics, method: "GET", path: "/health", act: health },
];

/// Every method and path of a site.
pub fn routes(site: Site) -> impl Iterator<Item = (&'static str, &'static str)> {
    ROUTES.iter().filter(move |route| route.site == site).map(|route| (route.method, route.path))
}

/// Takes a request.
#[must_use]
pub fn take(site: Site, daemon: &Arc<Daemon>, asked: &Asked) -> Step {
    find(site, asked).and_then(|(route, id)| (route.act)(daemon, asked, id)).unwrap_or_else(Step::Now)
}

/// The route of a request, if whoever asks may take it.
fn find(site: Site, asked: &Asked) -> Result<(&'static Route, &str), Told> {
    let path = asked.path.split('?').next().unwrap_or_default();
    let mut methods = Vec::new();
    for route in ROUTES.iter().filter(|route| route.site == site) {
        let Some(id) = matches(route.path, path) else { continue };
        if route.method != asked.method.as_str() {
            methods.push(route.method);
            continue;
        }
        if route.method != "GET" && !asked.may_change {
            let why = "only root, the daemon's own user and members of its control_group may do this; others may look (GET)";
            return Err(Told::trouble(StatusCode::FORBIDDEN, why));
        }
        return Ok((route, id));
    }
    Err(if !methods.is_empty() {
        let allow = methods.join(", ");
        let told = Told::trouble(StatusCode::METHOD_NOT_ALLOWED, format!("{} cannot be done here; use {allow}", asked.method));
        Told { allow: Some(allow), ..told }
    } else if site == Site::Metrics {
        Told::trouble(StatusCode::NOT_FOUND, "there is nothing here but /metrics and /health")
    } else {
        Told::trouble(StatusCode::NOT_FOUND, "there is nothing here; GET /v1/openapi.json says what there is")
    })
}

/// Whether a path is the one of a route; gives what it has in the place of `{id}`.
fn matches<'a>(route: &str, path: &'a str) -> Option<&'a str> {
    match route.strip_suffix("{id}") {
        None => (route == path).then_some(""),
        Some(before) => path.strip_prefix(before).filter(|id| !id.is_empty() && !id.contains('/')),
    }
}

/// What the body of a request says.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Told> {
    serde_json::from_slice(body).map_err(|error| {
        Told::trouble(StatusCode::BAD_REQUEST, format!("the body is not what is expected here: {error}; see GET /v1/openapi.json"))
    })
}

/// The image that the body of a request names, if there can be one of such names.
fn wanted(body: &[u8]) -> Result<Image, Told> {
    let image = Image::from(parse::<Wanted>(body)?);
    let longest_bytes = image.devices.iter().chain(&image.domain).chain([&image.name]).map(String::len).max().unwrap_or(0);
    let unusable = |why| Err(Refusal::new(Kind::Unusable, why).into());
    if image.devices.len() > DEVICES_MAX {
        return unusable(format!("{} devices are too many; name {DEVICES_MAX} at most", image.devices.len()));
    }
    if longest_bytes > NAME_MAX_BYTES {
        return unusable(format!("a name of {longest_bytes} bytes is too long; no blob has one of more than {NAME_MAX_BYTES}"));
    }
    Ok(image)
}

const fn now(told: Told) -> Result<Step, Told> {
    Ok(Step::Now(told))
}

/// What is shown may wait for a lock.
fn shown(daemon: &Arc<Daemon>, show: impl FnOnce(&Daemon) -> Told + Send + 'static) -> Result<Step, Told> {
    let daemon = Arc::clone(daemon);
    Ok(Step::Work(Lane::Quick, Box::new(move || show(&daemon))))
}

fn health(daemon: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    now(Told::json(
        StatusCode::OK,
        &Health {
            status: "ok".into(),
            front_end: daemon.front_end.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
        },
    ))
}

fn stat(daemon: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    shown(daemon, |daemon| Told::json(StatusCode::OK, &(daemon.statistics)()))
}

fn config(daemon: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    shown(daemon, |daemon| Told::json(StatusCode::OK, &(daemon.config)()))
}

fn metrics(daemon: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    shown(daemon, |daemon| {
        let Metrics { content_type, body } = (daemon.metrics)();
        Told { content_type: Some(content_type), body: body.into(), ..Told::nothing(StatusCode::OK) }
    })
}

fn openapi(_: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    now(Told { content_type: Some(JSON), body: Bytes::from_static(OPENAPI.as_bytes()), ..Told::nothing(StatusCode::OK) })
}

fn level(_: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    now(Told::json(StatusCode::OK, &Level { level: log::level() }))
}

fn set_level(_: &Arc<Daemon>, asked: &Asked, _: &str) -> Result<Step, Told> {
    let wanted: Level = parse(&asked.body)?;
    let set = move || {
        log::set_level(wanted.level);
        Told::json(StatusCode::OK, &wanted)
    };
    Ok(Step::Work(Lane::Quick, Box::new(set)))
}

/// Work with images, where they are mounted from files.
fn with_images<F>(daemon: &Arc<Daemon>, lane: Lane, work: F) -> Result<Step, Told>
where
    F: FnOnce(&dyn Images) -> Result<Told, Refusal> + Send + 'static,
{
    let Some(images) = daemon.images.clone() else {
        let why = format!(
            "the daemon serves through {}, where the kernel has the cache: nothing has to be made ready for a mount or let go of after one, and blobs get into the cache beforehand with infill prefetch --seed",
            daemon.front_end
        );
        return Err(Refusal::new(Kind::Conflict, why).into());
    };
    Ok(Step::Work(lane, Box::new(move || work(&*images).unwrap_or_else(Told::from))))
}

fn images(daemon: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    shown(daemon, |daemon| {
        let list = daemon.images.as_ref().map(|images| images.list());
        Told::json(StatusCode::OK, &list.unwrap_or_default())
    })
}

fn attach(daemon: &Arc<Daemon>, asked: &Asked, _: &str) -> Result<Step, Told> {
    let image = wanted(&asked.body)?;
    with_images(daemon, Lane::Slow, move |images| images.attach(&image).map(|ready| Told::json(StatusCode::OK, &ready)))
}

fn repair(daemon: &Arc<Daemon>, asked: &Asked, _: &str) -> Result<Step, Told> {
    let Outlived { file } = parse(&asked.body)?;
    with_images(daemon, Lane::Slow, move |images| images.repair(&file).map(|ready| Told::json(StatusCode::OK, &ready)))
}

fn release(daemon: &Arc<Daemon>, _: &Asked, _: &str) -> Result<Step, Told> {
    with_images(daemon, Lane::Quick, |images| Ok(Told::json(StatusCode::OK, &Released { blobs: images.release() })))
}

fn prefetch(daemon: &Arc<Daemon>, asked: &Asked, _: &str) -> Result<Step, Told> {
    let image = wanted(&asked.body)?;
    with_images(daemon, Lane::Quick, move |images| images.prefetch(&image).map(|begun| Told::json(StatusCode::ACCEPTED, &begun)))
}

fn end_lease(daemon: &Arc<Daemon>, _: &Asked, id: &str) -> Result<Step, Told> {
    let id = id.to_owned();
    with_images(daemon, Lane::Quick, move |images| {
        if images.end_lease(&id) {
            return Ok(Told::nothing(StatusCode::NO_CONTENT));
        }
        Err(Refusal::new(Kind::NotFound, "there is no such lease, or it has run out: what was made with it must be made anew"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_to_its_route_and_says_what_else_could_be_done() {
        assert_eq!(matches("/v1/leases/{id}", "/v1/leases/a"), Some("a"));
        assert_eq!(matches("/v1/leases/{id}", "/v1/leases/"), None);
        assert_eq!(matches("/v1/leases/{id}", "/v1/leases/a/b"), None);
        let asked = |method, path: &str, may_change| Asked { method, path: path.into(), body: Bytes::new(), may_change };
        let status =
            |site, asked: Asked| find(site, &asked).map(|(route, _)| route.path).map_err(|told| (told.status.as_u16(), told.allow));
        assert_eq!(status(Site::Control, asked(Method::GET, "/v1/log-level?x=1", false)), Ok("/v1/log-level"));
        assert_eq!(status(Site::Control, asked(Method::PUT, "/v1/log-level", false)), Err((403, None)));
        assert_eq!(status(Site::Control, asked(Method::POST, "/v1/log-level", true)), Err((405, Some("GET, PUT".to_owned()))));
        assert_eq!(status(Site::Control, asked(Method::GET, "/v1/attach", true)), Err((405, Some("POST".to_owned()))));
        assert_eq!(status(Site::Control, asked(Method::GET, "/metrics", true)), Err((404, None)));
        assert_eq!(status(Site::Metrics, asked(Method::GET, "/metrics", false)), Ok("/metrics"));
        assert_eq!(status(Site::Metrics, asked(Method::GET, "/v1/stat", true)), Err((404, None)));
    }
    #[test]
    fn what_a_client_names_is_remembered_only_if_it_can_be_an_image() {
        let why = |what: serde_json::Value| wanted(what.to_string().as_bytes()).map(|_| ()).map_err(|told| told.status.as_u16());
        let longest = "x".repeat(NAME_MAX_BYTES);
        let devices = |count| vec!["d"; count];
        assert_eq!(why(serde_json::json!({"image": longest, "domain": longest, "devices": devices(DEVICES_MAX)})), Ok(()));
        assert_eq!(why(serde_json::json!({"image": "i", "devices": devices(DEVICES_MAX + 1)})), Err(422));
        let long = "x".repeat(NAME_MAX_BYTES + 1);
        for bad in [
            serde_json::json!({"image": long}),
            serde_json::json!({"image": "i", "domain": long}),
            serde_json::json!({"image": "i", "devices": ["d", long]}),
        ] {
            assert_eq!(why(bad), Err(422));
        }
    }
}
