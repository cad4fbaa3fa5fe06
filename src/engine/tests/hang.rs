//! A source that hangs: its readers get errors in time, the others do not notice.
//!
//! Only with a ring: threads that block would need a regular file whose reads hang, which only a kernel of one's own has
//! (tests/guest/hang.rs).

use std::cell::RefCell;

use super::*;
use crate::engine::pulse::Pulse;
use crate::store::endless::Endless;

const TIMEOUT: Duration = Duration::from_secs(3);
const LATE: Outcome = Outcome::Failed(Errno::ETIMEDOUT);

/// A blob whose bytes come from the empty end of a pipe, and every other one from a file.
#[derive(Debug)]
struct PipeAndFile {
    pipe: Mutex<Option<OwnedFd>>,
    file: Arc<OneBlob>,
}

impl Store for PipeAndFile {
    fn name(&self) -> &'static str {
        "pipe"
    }

    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if key.name() != b"hangs" {
            return self.file.open(key);
        }
        let fd = self.pipe.lock().unwrap().take().expect("opened once");
        Ok(Some(Arc::new(Endless::new(fd, 1 << 20).unwrap())))
    }
}

#[test]
fn fault_hanging_source_fails_its_readers_in_time_and_no_other() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let store = Arc::new(PipeAndFile { pipe: Mutex::new(Some(reader)), file: OneBlob::new() });
    let kernel = Kernel::new();
    let (front, blobs) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, Arc::clone(&store) as Arc<dyn Store>);
    let settings = Settings { request_timeout: TIMEOUT, window: Window::Fixed(4096), ..settings(EngineKind::Uring, 1) };
    let engine = match Engine::start(&front, &blobs, &settings) {
        Err(EngineError::NoRing(why)) => return eprintln!("not run: {why}"),
        engine => engine.unwrap(),
    };
    let ((_, stuck), (file, fd)) = (sink(), sink());
    kernel.then([kernel.open_named(b"hangs", 1, 9, &stuck), kernel.open(2, 8, &fd), Step::Await(1), Step::Await(2)]);
    kernel.then((0..20).map(|n| kernel.need(100 + n, 9, n * 4096..n * 4096 + 4096)));
    // Until long after the first ones have failed.
    for n in 0..24 {
        let started = Instant::now();
        kernel.then([kernel.need(200 + n, 8, n * 4096..n * 4096 + 4096)]);
        assert_eq!(kernel.answers.of(200 + n), Outcome::Done);
        assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
        std::thread::sleep(TIMEOUT / 20);
    }
    assert!((0..20).all(|n| kernel.answers.of(100 + n) == LATE));
    wait_until(|| engine.snapshot().stuck == 2);
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.needs_timed_out, snapshot.pending, snapshot.oldest_ms), (20, 0, 0));
    let mut got = vec![0; 24 * 4096];
    file.read_exact_at(&mut got, 0).unwrap();
    assert!(got == store.file.data[..24 * 4096], "wrong bytes");

    kernel.then([kernel.need(300, 9, 0..4096)]);
    wait_until(|| engine.snapshot().oldest_ms > 100);
    // It comes back, and its file is empty.
    drop(writer);
    assert_eq!(kernel.answers.of(300), Outcome::Failed(Errno::EIO));
    wait_until(|| engine.snapshot().stuck == 0);
    kernel.then([close(9)]);
    wait_until(|| engine.snapshot().objects == 1 && Arc::strong_count(&stuck) == 1);
    assert_eq!(engine.stop(PATIENCE, || false).unwrap().needs_timed_out, 20);
}

/// Settings of an hour do not hold a reader when they become shorter while it waits.
#[test]
fn a_time_limit_that_is_changed_holds_for_readers_that_wait_already() {
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    let store = Arc::new(PipeAndFile { pipe: Mutex::new(Some(reader)), file: OneBlob::new() });
    let kernel = Kernel::new();
    let (front, blobs) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, store as Arc<dyn Store>);
    let hour = Duration::from_secs(3600);
    let settings = Settings { request_timeout: hour, ..settings(EngineKind::Uring, 2) };
    let engine = match Engine::start(&front, &blobs, &settings) {
        Err(EngineError::NoRing(why)) => return eprintln!("not run: {why}"),
        engine => engine.unwrap(),
    };
    let (_file, fd) = sink();
    kernel.then([kernel.open_named(b"hangs", 1, 8, &fd), Step::Await(1), kernel.need(2, 8, 0..4096)]);
    wait_until(|| engine.snapshot().oldest_ms > 100);
    assert!(engine.entry().tune(Tuning {
        open_timeout: PATIENCE,
        request_timeout: Duration::from_millis(200),
        complete_bytes_per_s: None
    }));
    assert_eq!(kernel.answers.of(2), LATE);
    engine.stop(Duration::ZERO, || true).unwrap();
}

#[test]
fn however_many_requests_wait_when_the_engine_ends_all_of_them_are_left() {
    // More than are answered together, and with an end that takes its time.
    const READERS: u64 = 1000;
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    let store = Arc::new(PipeAndFile { pipe: Mutex::new(Some(reader)), file: OneBlob::new() });
    let kernel = Kernel::new();
    let (front, blobs) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, store as Arc<dyn Store>);
    let engine = match Engine::start(&front, &blobs, &settings(EngineKind::Uring, 1)) {
        Err(EngineError::NoRing(why)) => return eprintln!("not run: {why}"),
        engine => engine.unwrap(),
    };
    engine.leave_rest(true);
    let (_file, fd) = sink();
    kernel.then([kernel.open_named(b"hangs", 1, 8, &fd), Step::Await(1)]);
    kernel.then((2..2 + READERS).map(|token| kernel.need(token, 8, 0..4096)));
    wait_until(|| engine.snapshot().needs == READERS);
    engine.stop(Duration::ZERO, || true).unwrap();
    let given: Vec<_> = kernel.answers.given.lock().unwrap().iter().map(|answer| answer.0).collect();
    assert_eq!(given, [1], "only the open has an answer");
}

#[test]
fn a_shard_that_hangs_itself_is_seen_and_the_others_are_well() {
    with_each_engine(2, |engine, kernel, _| {
        let pulse = RefCell::new(Pulse::default());
        // Longer than a shard that is well needs to hear its bell.
        let look = || {
            std::thread::sleep(TIMEOUT / 20);
            engine.look(&mut pulse.borrow_mut())
        };
        wait_until(|| look().is_empty());
        let mut steps = kernel.steps.lock().unwrap();
        steps.push_back(close(1));
        kernel.readable.write(1).unwrap();
        // The shard that reads requests waits for the lock.
        wait_until(|| look().iter().any(|still| still.shard == 0 && still.lasts > TIMEOUT / 5));
        wait_until(|| look().iter().all(|still| still.shard == 0));
        drop(steps);
        wait_until(|| look().is_empty());
        assert_eq!(engine.snapshot().closes, 1);
        engine.stop(PATIENCE, || false).unwrap();
    });
}
