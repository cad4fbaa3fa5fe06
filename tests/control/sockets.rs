//! Where the daemon listens, and what becomes of it when something is in the way.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use super::promtool::promtool;
use super::{Daemon, Place, ask, infill, parts, request, said, wait_until};

/// One that cannot start: its exit code, and its one line.
fn refused(serve: &mut Command, socket: OwnedFd, code: i32, words: &[&str]) {
    let output = serve.stdin(Stdio::from(socket)).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(code) && text.trim_end().lines().count() == 1, "{:?}: {text}", output.status);
    words.iter().for_each(|word| assert!(text.contains(word), "no {word:?} in {text}"));
    assert!(output.stdout.is_empty(), "it said that it is ready");
}

#[test]
fn fault_sockets_in_use_keep_a_second_daemon_from_starting_and_the_first_one_serves_on() {
    let (place, socket) = Place::new();
    let mut daemon = place.start(socket, &[]);
    let (control, metrics) = (place.control(), place.path("metrics.sock"));
    // Another kernel, the same sockets.
    let (other, end) = Place::new();
    let words = ["another process answers", control.to_str().unwrap(), "control_socket"];
    refused(&mut other.serve_on(&control, &other.path("metrics.sock")), end, 69, &words);
    let (other, end) = Place::new();
    refused(&mut other.serve_on(&other.control(), &metrics), end, 69, &[metrics.to_str().unwrap(), "metrics_socket"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (other, end) = Place::new();
    refused(other.serve().args(["--metrics-listen", &address]), end, 69, &["metrics_listen", &address, "in use"]);
    let (other, end) = Place::new();
    std::fs::write(other.control(), "x").unwrap();
    refused(&mut other.serve(), end, 78, &["control_socket", "no socket"]);
    let (other, end) = Place::new();
    refused(other.serve().args(["--control-group", "no-such-group"]), end, 78, &["no-such-group", "groupadd"]);
    let (other, end) = Place::new();
    refused(&mut other.serve_on(&other.path("no/such/dir"), &metrics), end, 78, &["no/such/dir", "control_socket"]);
    assert!(daemon.is_alive());
    place.expect_right(place.open());
    // What a dead one has left is in nobody's way.
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    assert!(control.exists());
    let (end, send_again) = place.kernel.restart().unwrap();
    let daemon = place.start(end, &[]);
    send_again().unwrap();
    place.expect_right(place.open());
    daemon.end();
}

#[test]
fn systemd_may_have_made_the_sockets() {
    let (place, socket) = Place::new();
    let listener = UnixListener::bind(place.path("passed.sock")).unwrap();
    let serve = place.serve();
    let args: Vec<_> = serve.get_args().map(|arg| format!("'{}'", arg.to_str().unwrap())).collect();
    let program = serve.get_program().to_str().unwrap().to_owned();
    // The third descriptor, of a process that knows its own number.
    let script =
        format!("exec 3>&1 1>/dev/null; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=control; exec '{program}' {}", args.join(" "));
    let mut command = Command::new("sh");
    command.args(["-c", &script]).stdin(Stdio::from(socket)).stdout(Stdio::from(OwnedFd::from(listener)));
    let daemon = Daemon(command.spawn().unwrap());
    // It is heard although it may not be up yet.
    let (status, _, body) = ask(&place.path("passed.sock"), "GET", "/v1/health", "");
    assert!(status == 200 && body.contains(&daemon.0.id().to_string()), "{body}");
    assert!(!place.control().exists(), "it made one of its own");
    place.expect_right(place.open());
    daemon.end();
}

#[test]
fn metrics_are_scraped_on_a_socket_and_on_a_port_and_nothing_else_is_there() {
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (place, socket) = Place::new();
    let daemon = place.start(socket, &["--metrics-listen", &address]);
    let by_port = |method: &str, path: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(request(method, path, "").as_bytes()).unwrap();
        parts(&said(&mut stream))
    };
    place.expect_right(place.open());
    let metrics = place.path("metrics.sock");
    for scrape in [&by_port as &dyn Fn(&str, &str) -> _, &|method: &str, path: &str| ask(&metrics, method, path, "")] {
        let (status, head, body) = scrape("GET", "/metrics");
        assert!(status == 200 && head.contains("content-type: text/plain; version=0.0.4"), "{status} {head}");
        assert!(body.contains("\ninfill_build_info{") && body.ends_with('\n'), "{body}");
        for line in ["infill_requests_total{op=\"open\",result=\"ok\"} 1", "infill_blob_bytes{blob=\"dom/blob\"} 3000001"] {
            assert!(body.lines().any(|found| found == line), "no {line} in {body}");
        }
        if let Some(checked) = promtool(&["check", "metrics"], Path::new("/"), &body) {
            assert!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}\n{body}");
        }
        assert_eq!(scrape("GET", "/v1/stat").0, 404);
        let (status, head, _) = scrape("POST", "/metrics");
        assert!(status == 405 && head.contains("allow: get"), "{head}");
    }
    // What nobody asked for is not waited for.
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n").unwrap();
    assert_eq!(parts(&said(&mut stream)).0, 200);
    assert_eq!(ask(&place.control(), "GET", "/metrics", "").0, 404);
    daemon.end();
}

#[test]
fn the_verbs_ask_the_daemon() {
    let (place, socket) = Place::new();
    let daemon = place.start(socket, &[]);
    place.expect_right(place.open());
    let printed = |args: &[&str]| {
        let output = place.verb(args);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(printed(&["log-level"]), "error\n");
    assert_eq!(printed(&["log-level", "debug"]), "debug\n");
    assert_eq!(printed(&["log-level"]), "debug\n");
    let table = printed(&["stat"]);
    assert!(table.contains("log debug") && table.lines().all(|line| line.len() <= 80), "{table}");
    // Whoever looks at pictures may go away at any time: a pager, head.
    let mut top = infill();
    top.args(["top", "--interval", "0.1", "--control-socket"]).arg(place.control()).stdout(Stdio::piped());
    let mut top = top.spawn().unwrap();
    let mut first = [0; 6];
    top.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"infill");
    assert!(top.wait().unwrap().success());
    let report: serde_json::Value = serde_json::from_str(&printed(&["stat", "--json"])).unwrap();
    assert!(report["stat"]["requests"].as_u64() > Some(0) && report["health"]["front_end"] == "sim", "{report}");
    let prefetch = place.verb(&["prefetch", "a.img"]);
    let said = String::from_utf8_lossy(&prefetch.stderr);
    assert!(prefetch.status.code() == Some(69) && said.contains("--seed") && said.lines().count() == 1, "{prefetch:?}");
    daemon.end();
    wait_until(|| place.verb(&["stat"]).status.code() == Some(69), "a dead daemon has an answer");
}
