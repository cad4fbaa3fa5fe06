//! Clients that mean harm: silent, slow, huge, senseless, and a thousand at once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use infill::control::Client;
use infill::front::sim::rng::Rng;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{PATIENCE, Place, ask, parts, raw, wait_until};

/// Connections that are open at a time.
const THOUSAND: usize = 1000;
/// Descriptors that this process needs besides.
const SPARE_FDS: u64 = 200;
const MIB: usize = 1 << 20;

/// What a client of a kind begins with; it never ends properly.
fn opening(kind: usize, rng: &mut Rng) -> Vec<u8> {
    match kind % 8 {
        // Says nothing.
        0 => Vec::new(),
        // Half a request line, half a header, half a body.
        1 => b"GET /v1/hea".to_vec(),
        2 => b"GET /v1/health HTTP/1.1\r\nx: y".to_vec(),
        3 => b"POST /v1/attach HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n{".to_vec(),
        // A chunk that does not come.
        4 => b"POST /v1/release HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffff\r\nx".to_vec(),
        // Takes no answer.
        5 => b"GET /v1/openapi.json HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        // Many requests at once.
        6 => b"GET /v1/stat HTTP/1.1\r\nhost: x\r\n\r\n".repeat(50),
        _ => (0..300).map(|_| rng.next().to_ne_bytes()[0]).collect(),
    }
}

#[test]
fn fault_a_thousand_hostile_clients_neither_end_the_daemon_nor_hold_up_readers_or_operators() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if most < THOUSAND as u64 + SPARE_FDS {
        return println!("not run: {THOUSAND} connections, for which LimitNOFILE={most} is too few");
    }
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let (place, socket) = Place::new();
    let mut daemon = place.start(socket, &[]);
    let (fds, threads) = (daemon.count("fd"), daemon.count("task"));
    let (over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        // A reader of what is not there yet, again and again.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let object = place.open();
                place.expect_right(object);
                place.kernel.close(object).unwrap();
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut rng = Rng::new(11);
        let mut crowd = Vec::new();
        for n in 0..THOUSAND {
            let mut stream = UnixStream::connect(place.control()).unwrap();
            // It may have been thrown out already.
            let _ = stream.write_all(&opening(n, &mut rng));
            crowd.push(stream);
            if n % 100 == 0 {
                assert_eq!(ask(&place.control(), "GET", "/v1/health", "").0, 200, "with {n} others");
            }
        }
        // All of them are there, and some go on, byte by byte.
        let read_before = reads.load(Ordering::Relaxed);
        for n in 0..20 {
            for stream in crowd.iter_mut().step_by(7) {
                let _ = stream.write_all(b"z");
            }
            let client = Client::connect(&place.control()).unwrap();
            assert!(client.stat().unwrap()["requests"].as_u64() > Some(0), "{n}");
        }
        wait_until(|| reads.load(Ordering::Relaxed) > read_before + 2, "readers do not get on");
        assert_eq!(daemon.niceness_of("infill-control"), Some(10), "readers come first");
        assert!(daemon.count("fd") < fds + 200 && daemon.count("task") < threads + 100);
        // Those that are left are not waited for for ever, though they do not go away.
        wait_until(|| daemon.count("fd") <= fds + 10, "connections that say nothing are kept");
        assert!(daemon.is_alive());
        over.store(true, Ordering::Relaxed);
    });
    // No thread is left behind; the data path's come and go.
    wait_until(|| daemon.count("task") <= threads + 8, "threads are left behind");
    assert_eq!(ask(&place.control(), "GET", "/v1/health", "").0, 200);
    daemon.end();
    assert_eq!(place.kernel.violations(), [""; 0]);
}

#[test]
fn fault_what_is_too_large_or_no_request_is_refused() {
    let (place, socket) = Place::new();
    let mut daemon = place.start(socket, &[]);
    let control = place.control();
    let status = |bytes: &[u8]| parts(&raw(&control, bytes)).0;
    let header = format!("GET /v1/health HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(MIB));
    assert_eq!(status(header.as_bytes()), 431);
    let headers = format!("GET /v1/health HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(500));
    assert_eq!(status(headers.as_bytes()), 431);
    let line = format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(MIB));
    assert!(matches!(status(line.as_bytes()), 414 | 431));
    let body = format!("POST /v1/attach HTTP/1.1\r\ncontent-length: {}\r\n\r\n{}", 3 * MIB, "y".repeat(3 * MIB));
    // The client may not get to read it: it is not heard out.
    assert!(matches!(status(body.as_bytes()), 413 | 0));
    // What is announced is believed.
    assert_eq!(status(b"POST /v1/attach HTTP/1.1\r\ncontent-length: 1000000000000\r\n\r\n"), 413);
    let announced = format!("POST /v1/attach HTTP/1.1\r\ncontent-length: {}\r\n\r\n", u64::MAX);
    assert!(matches!(status(announced.as_bytes()), 400 | 413 | 431), "{}", status(announced.as_bytes()));
    for senseless in [&b"\0\0\0\0\r\n\r\n"[..], b"hello\r\n\r\n", b"GET /v1/health HTTP/9.9\r\n\r\n", b"GET  \r\n\r\n"] {
        let status = status(senseless);
        assert!(matches!(status, 0 | 400 | 405 | 505), "{status} {}", senseless.escape_ascii());
    }
    for (method, path, body, wanted) in [
        ("POST", "/v1/attach", "{", 400),
        ("POST", "/v1/attach", "", 400),
        ("PUT", "/v1/log-level", r#"{"level":"debug","more":1}"#, 400),
        ("PATCH", "/v1/health", "", 405),
        ("GET", "/v1/../v1/health", "", 404),
        ("GET", "/", "", 404),
        ("DELETE", "/v1/leases/", "", 404),
        ("DELETE", "/v1/leases/a/b", "", 404),
    ] {
        let (status, head, text) = ask(&control, method, path, body);
        let error = serde_json::from_str::<serde_json::Value>(&text).unwrap()["error"].as_str().unwrap().to_owned();
        assert!(status == wanted && error.lines().count() == 1, "{method} {path}: {head} {text}");
    }
    // Deeper than any parser should follow.
    let deep = format!(r#"{{"image":{}"#, "[".repeat(500_000));
    assert_eq!(ask(&control, "POST", "/v1/attach", &deep).0, 400);
    assert!(daemon.is_alive());
    daemon.end();
}

#[test]
fn fault_a_client_that_does_not_end_its_request_is_hung_up_on() {
    let (place, socket) = Place::new();
    let daemon = place.start(socket, &[]);
    let mut stream = UnixStream::connect(place.control()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /v1/health HTTP/1.1\r\n").unwrap();
    let mut slow = stream.try_clone().unwrap();
    thread::scope(|scope| {
        // Always a little more, so that no single wait is long.
        let writer = scope.spawn(move || {
            while slow.write_all(b"x: y\r\n").is_ok() {
                thread::sleep(std::time::Duration::from_millis(300));
            }
        });
        // Nothing, or that it was too slow; and then the end.
        let _ = stream.read_to_end(&mut Vec::new());
        drop(stream);
        writer.join().unwrap();
    });
    daemon.end();
}
