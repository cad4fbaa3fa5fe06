//! A server in this process, with images that behave as their names say, and what it does when they hang.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use infill::control::routes::Site;
use infill::control::wire::{BlobState, ImageList, Prefetch, Prepared, Ready, Stage};
use infill::control::{self, Access, Client, Daemon, Images, Kind, Listening, Metrics, Refusal, Users};
use infill::ops::mounting::Image;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use super::{ask, parts, raw, request, said, wait_until};

/// So many that the answer does not fit into a socket's buffer.
const MANY_BLOBS: usize = 30_000;
/// More attaches than the server does at a time.
const MANY: usize = 80;
pub(crate) const GROUP: u32 = 54_321;

#[derive(Default)]
pub(crate) struct Fake {
    leases: Mutex<Vec<String>>,
    /// Attaches that hang, and whether they may go on.
    hanging: Mutex<(usize, bool)>,
    go_on: Condvar,
    /// How many blobs it serves, beside one.
    more_blobs: usize,
}

impl Fake {
    fn ready(&self) -> Ready {
        let mut leases = self.leases.lock().unwrap();
        let lease = format!("lease-{}", leases.len());
        leases.push(lease.clone());
        let (image, devices) = (PathBuf::from("/cache/blobs/i"), vec![PathBuf::from("/cache/blobs/d")]);
        let prepared = Prepared { image, devices, len_bytes: 2, present_bytes: 1, read_ahead_bytes: None };
        Ready { prepared, lease, lease_ms: 60_000 }
    }
}

impl Images for Fake {
    fn attach(&self, image: &Image) -> Result<Ready, Refusal> {
        match image.name.as_str() {
            "missing" => Err(Refusal::new(Kind::NotFound, "no store has it;\nlook there")),
            "nameless" => Err(Refusal::new(Kind::Unusable, "say which devices")),
            "busy" => Err(Refusal::new(Kind::Busy, "try again")),
            "slow" => Err(Refusal::new(Kind::TimedOut, "see the store")),
            "hangs" => {
                let mut hanging = self.hanging.lock().unwrap();
                hanging.0 += 1;
                drop(self.go_on.wait_while(hanging, |(_, go_on)| !*go_on).unwrap());
                Ok(self.ready())
            }
            _ => Ok(self.ready()),
        }
    }

    fn repair(&self, file: &Path) -> Result<Ready, Refusal> {
        if file.starts_with("/cache") { Ok(self.ready()) } else { Err(Refusal::new(Kind::Conflict, "mount it anew")) }
    }

    fn end_lease(&self, id: &str) -> bool {
        let mut leases = self.leases.lock().unwrap();
        let found = leases.iter_mut().find(|lease| *lease == id);
        found.is_some_and(|lease| !std::mem::take(lease).is_empty())
    }

    fn release(&self) -> usize {
        3
    }

    fn prefetch(&self, image: &Image) -> Result<Prefetch, Refusal> {
        Ok(Prefetch { wanted: image.into(), stage: Stage::Failed, error: Some("why".into()) })
    }

    fn list(&self) -> ImageList {
        let blob = BlobState { blob: "d/b".into(), file: "/cache/blobs/d".into(), len_bytes: 2, present_bytes: 1 };
        ImageList {
            blobs: vec![blob; 1 + self.more_blobs],
            prefetches: vec![self.prefetch(&Image { name: "a".into(), domain: None, devices: vec![] }).unwrap()],
        }
    }
}

/// It answers until the process ends.
pub(crate) struct Server {
    dir: TempDir,
    fake: Arc<Fake>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with(Fake::default())
    }

    fn with(fake: Fake) -> Self {
        let server = Self { dir: tempfile::tempdir().unwrap(), fake: Arc::new(fake) };
        std::fs::set_permissions(server.dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        // Whoever wants to may connect, and is told what is open to him.
        let listener = control::bind("control_socket", &server.socket(), Users::All).unwrap();
        let metrics = || Metrics { content_type: "text/plain", body: "up 1\n".into() };
        let daemon = Daemon {
            front_end: "fanotify",
            statistics: Box::new(|| serde_json::json!({})),
            metrics: Box::new(metrics),
            config: Box::new(|| serde_json::json!({})),
            images: Some(Arc::clone(&server.fake) as Arc<dyn Images>),
        };
        control::start(vec![Listening { listener, site: Site::Control }], Arc::new(daemon), Access::new(Some(GROUP))).unwrap();
        server
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

#[test]
fn fault_attaches_that_hang_keep_nobody_from_anything_else() {
    let server = Server::start();
    let (socket, fake) = (server.socket(), &server.fake);
    let hangs = request("POST", "/v1/attach", r#"{"image":"hangs"}"#);
    thread::scope(|scope| {
        let all: Vec<_> = (0..MANY).map(|_| scope.spawn(|| parts(&raw(&socket, hangs.as_bytes())))).collect();
        // Those that are too many are told so at once.
        let refused = || all.iter().filter(|one| one.is_finished()).count();
        wait_until(|| fake.hanging.lock().unwrap().0 + refused() == MANY, "neither refused nor begun");
        let begun = fake.hanging.lock().unwrap().0;
        assert!((2..MANY).contains(&begun), "{begun}");
        for _ in 0..10 {
            for (method, path, status) in
                [("GET", "/v1/health", 200), ("GET", "/v1/stat", 200), ("GET", "/v1/images", 200), ("DELETE", "/v1/leases/x", 404)]
            {
                assert_eq!(ask(&socket, method, path, "").0, status, "{method} {path}");
            }
            let (status, head, body) = ask(&socket, "POST", "/v1/attach", r#"{"image":"a"}"#);
            assert!(status == 503 && head.contains("retry-after: 1") && body.contains("try again"), "{head} {body}");
        }
        // A client that comes at a bad time waits.
        let patient = scope.spawn(|| Client::connect(&socket).unwrap().attach(&Image { name: "a".into(), domain: None, devices: vec![] }));
        fake.hanging.lock().unwrap().1 = true;
        fake.go_on.notify_all();
        patient.join().unwrap().unwrap();
        let answers: Vec<_> = all.into_iter().map(|one| one.join().unwrap().0).collect();
        assert_eq!(answers.iter().filter(|status| **status == 200).count(), begun, "{answers:?}");
        assert_eq!(answers.iter().filter(|status| **status == 503).count(), MANY - begun, "{answers:?}");
    });
}

#[test]
fn fault_a_client_that_does_not_take_its_answer_is_hung_up_on() {
    let server = Server::with(Fake { more_blobs: MANY_BLOBS, ..Fake::default() });
    assert_eq!(Client::connect(&server.socket()).unwrap().images().unwrap().blobs.len(), 1 + MANY_BLOBS);
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.write_all(request("GET", "/v1/images", "").as_bytes()).unwrap();
    let has_hung_up = || {
        let mut socket = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        poll(&mut socket, PollTimeout::ZERO).unwrap() == 1
    };
    wait_until(has_hung_up, "the server waits for ever");
    let (status, head, body) = parts(&said(&mut stream));
    let len: usize = head.split("content-length: ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!(status == 200 && body.len() < len, "{head}");
}

#[test]
fn the_client_says_what_the_server_says() {
    let server = Server::start();
    let client = Client::find(&server.socket()).unwrap().unwrap();
    assert!(client.mounts_from_files() && client.health().pid == std::process::id());
    let image = |name: &str| Image { name: name.into(), domain: Some("d".into()), devices: vec!["b".into()] };
    let ready = client.attach(&image("a.img")).unwrap();
    assert!(client.end_lease(&ready.lease).unwrap() && !client.end_lease(&ready.lease).unwrap());
    let error = client.attach(&image("missing")).unwrap_err();
    assert_eq!(error.to_string(), "no store has it; look there");
    assert_eq!((client.release().unwrap(), client.images().unwrap().blobs.len()), (3, 1));
    assert_eq!(client.prefetch(&image("a")).unwrap().wanted.devices, ["b"]);
    assert!(Client::find(Path::new("/no/such/socket")).unwrap().is_none());
}
