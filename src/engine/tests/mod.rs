//! The whole engine, with its threads and real files, against a kernel made of a queue.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU32;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

mod budget;
mod hang;
mod pace;

use super::plan::{Completion, Window};
use super::*;
use crate::front::{Answer, Caps, Found, FrontEnd, NeedRequest, ObjectId, OpenRequest, Outcome, Request, Ticket};
use crate::key::Key;
use crate::range::ByteRange;
use crate::store::{Blob, FileBlob, SourceFile, SourceMode, Store, StoreError};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(20);
const BLOB_BYTES: usize = 100_000;

/// What the kernel does next.
enum Step {
    Ask(Request),
    /// Nothing, before this request has its answer.
    Await(u64),
    /// Give a message that leads to no request, and want to be settled.
    Lose,
    /// Break.
    Break,
}

#[derive(Default)]
struct Answers {
    given: Mutex<Vec<(u64, Outcome)>>,
    news: Condvar,
}

impl Answer for Answers {
    fn answer(&self, token: u64, outcome: Outcome) -> std::io::Result<bool> {
        self.given.lock().unwrap().push((token, outcome));
        self.news.notify_all();
        Ok(true)
    }
}

impl Answers {
    /// The answer of a request; there must be one, and no second.
    fn of(&self, token: u64) -> Outcome {
        let given = self.given.lock().unwrap();
        let has = |given: &[(u64, Outcome)]| given.iter().any(|answer| answer.0 == token);
        let (given, _) = self.news.wait_timeout_while(given, PATIENCE, |given| !has(given)).unwrap();
        let mine: Vec<_> = given.iter().filter(|answer| answer.0 == token).collect();
        assert_eq!(mine.len(), 1, "answers of request {token}: {mine:?}");
        mine[0].1
    }
}

/// A kernel.
struct Kernel {
    steps: Mutex<VecDeque<Step>>,
    readable: EventFd,
    answers: Arc<Answers>,
    /// How often it will say that it is not settled.
    unsettled: AtomicU32,
    /// [`Step::Lose`] was done.
    lost: AtomicBool,
}

impl FrontEnd for Kernel {
    fn name(&self) -> &'static str {
        "queue"
    }

    fn caps(&self) -> Caps {
        Caps { holes_are_absent: false, ..Caps::default() }
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }

    fn settle(&self) -> bool {
        self.unsettled.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |times| times.checked_sub(1)).is_err()
    }

    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<Found, FrontError> {
        // Each read takes one from what the counter counts: a request.
        if read == Err(Errno::EAGAIN) {
            return Ok(Found::Nothing);
        }
        assert_eq!(read.unwrap().len(), size_of::<u64>());
        loop {
            let step = self.steps.lock().unwrap().pop_front();
            match step {
                Some(Step::Ask(request)) => {
                    requests.push(request);
                    return Ok(Found::Part);
                }
                Some(Step::Await(token)) => drop(self.answers.of(token)),
                Some(Step::Lose) => {
                    self.unsettled.store(3, Ordering::Relaxed);
                    self.lost.store(true, Ordering::Release);
                    return Ok(Found::Part);
                }
                Some(Step::Break) => return Err(FrontError::Broken(std::io::ErrorKind::BrokenPipe.into())),
                None => panic!("nothing was counted that is not there"),
            }
        }
    }
}

impl Kernel {
    fn new() -> Arc<Self> {
        let readable = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE).unwrap();
        Arc::new(Self {
            steps: Mutex::default(),
            readable,
            answers: Arc::default(),
            unsettled: AtomicU32::new(0),
            lost: AtomicBool::new(false),
        })
    }

    fn then(&self, steps: impl IntoIterator<Item = Step>) {
        let mut queue = self.steps.lock().unwrap();
        let before = queue.len();
        queue.extend(steps);
        let requests = queue.iter().skip(before).filter(|step| !matches!(step, Step::Await(_))).count();
        self.readable.write(requests as u64).unwrap();
    }

    fn open(&self, token: u64, object: u32, sink: &Arc<OwnedFd>) -> Step {
        self.open_named(b"blob", token, object, sink)
    }

    fn open_named(&self, name: &[u8], token: u64, object: u32, sink: &Arc<OwnedFd>) -> Step {
        let ticket = Ticket::new(Arc::clone(&self.answers) as Arc<dyn Answer>, token);
        let (key, sink) = (Key::new(b"dom", name), Arc::clone(sink));
        Step::Ask(Request::Open(OpenRequest { object: ObjectId(object), key, ticket, sink }))
    }

    fn need(&self, token: u64, object: u32, range: ByteRange) -> Step {
        let ticket = Ticket::new(Arc::clone(&self.answers) as Arc<dyn Answer>, token);
        Step::Ask(Request::Need(NeedRequest { object: ObjectId(object), range, ticket }))
    }
}

fn close(object: u32) -> Step {
    Step::Ask(Request::Close(ObjectId(object)))
}

/// A store of one blob under any name. It can be kept shut, for all or for one name, or be taken away.
#[derive(Debug)]
struct OneBlob {
    data: Vec<u8>,
    file: Mutex<std::fs::File>,
    shut: AtomicBool,
    stuck: AtomicBool,
    gone: AtomicBool,
}

impl OneBlob {
    fn new() -> Arc<Self> {
        let data: Vec<u8> = (0..BLOB_BYTES).map(|i| (i % 251) as u8).collect();
        let file = Mutex::new(Self::file(&data));
        Arc::new(Self { data, file, shut: AtomicBool::new(false), stuck: AtomicBool::new(true), gone: AtomicBool::new(false) })
    }

    fn file(data: &[u8]) -> std::fs::File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(data, 0).unwrap();
        file
    }

    /// Puts other bytes in the place of the blob.
    fn replace(&self) {
        *self.file.lock().unwrap() = Self::file(&vec![0xee; BLOB_BYTES]);
    }
}

impl Store for OneBlob {
    fn name(&self) -> &'static str {
        "one"
    }

    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        wait_until(|| !self.shut.load(Ordering::Relaxed));
        wait_until(|| key.name() != b"stuck" || !self.stuck.load(Ordering::Relaxed));
        if self.gone.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let file = self.file.lock().unwrap().try_clone().unwrap();
        let source = SourceFile::new(file.into(), SourceMode::Buffered).unwrap();
        Ok(Some(Arc::new(FileBlob::new(source))))
    }
}

fn wait_until(is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "it never happened");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn sink() -> (std::fs::File, Arc<OwnedFd>) {
    let file = tempfile::tempfile().unwrap();
    (file.try_clone().unwrap(), Arc::new(file.into()))
}

/// Runs a test with each kind of engine that this machine has.
fn with_each_engine(shards: usize, test: impl Fn(Engine, &Kernel, &OneBlob)) {
    with_open_timeout(PATIENCE, shards, test);
}

fn settings(kind: EngineKind, shards: usize) -> Settings {
    Settings {
        shards,
        seats: placement::seats(),
        kind,
        window: Window::Fixed(65536),
        completion: Completion::default(),
        slot_bytes: 65536,
        slots: 4,
        workers: 2,
        fd_budget: 10_000,
        open_timeout: PATIENCE,
        request_timeout: PATIENCE,
        no_room: None,
        tracer: None,
        remembered: Arc::default(),
        leave_rest: false,
    }
}

fn with_open_timeout(open_timeout: Duration, shards: usize, test: impl Fn(Engine, &Kernel, &OneBlob)) {
    for kind in [EngineKind::Uring, EngineKind::Blocking] {
        let (kernel, store) = (Kernel::new(), OneBlob::new());
        let settings = Settings { open_timeout, ..settings(kind, shards) };
        let (front, blobs) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, Arc::clone(&store) as Arc<dyn Store>);
        match Engine::start(&front, &blobs, &settings) {
            Ok(engine) => test(engine, &kernel, &store),
            Err(EngineError::NoRing(why)) => eprintln!("not run: {why}"),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_request_that_follows_the_answer_to_its_open_at_once_finds_the_object() {
    with_each_engine(1, |engine, kernel, store| {
        let (file, fd) = sink();
        kernel.then([kernel.open(1, 8, &fd), Step::Await(1), kernel.need(2, 8, 0..4096)]);
        assert_eq!(kernel.answers.of(2), Outcome::Done);
        assert_eq!(kernel.answers.of(1), Outcome::Opened { len_bytes: BLOB_BYTES as u64 });
        let mut got = vec![0; 4096];
        file.read_exact_at(&mut got, 0).unwrap();
        assert!(got == store.data[..4096]);
        kernel.then([kernel.open(3, 9, &fd), Step::Await(3), close(9), close(8)]);
        wait_until(|| engine.snapshot().closes == 2 && Arc::strong_count(&fd) == 1);
        assert_eq!(engine.snapshot().objects, 0);
        engine.stop(PATIENCE, || false).unwrap();
    });
}

/// Turns of all shards together during a time.
fn turns(engine: &Engine, time: Duration) -> u64 {
    let before = engine.snapshot().turns;
    std::thread::sleep(time);
    engine.snapshot().turns - before
}

#[test]
fn an_idle_engine_sleeps() {
    with_each_engine(2, |engine, kernel, _| {
        let (_, fd) = sink();
        kernel.then([kernel.open(1, 8, &fd), kernel.open(2, 9, &fd), Step::Await(1), Step::Await(2), kernel.need(3, 9, 0..4096)]);
        assert_eq!(kernel.answers.of(3), Outcome::Done);
        std::thread::sleep(Duration::from_millis(100));
        let turns = turns(&engine, Duration::from_millis(1500));
        assert!(turns <= 8, "{turns} turns of two idle shards in 1.5 s");
        let stopping = Instant::now();
        engine.stop(PATIENCE, || false).unwrap();
        assert!(stopping.elapsed() < PATIENCE / 2, "{:?}", stopping.elapsed());
    });
}

/// With cachefiles, that is a reader who waits.
#[test]
fn a_front_end_is_settled_soon_also_where_nothing_comes_behind_what_was_lost() {
    with_each_engine(1, |engine, kernel, _| {
        let (_, fd) = sink();
        // Behind a full batch a larger one is read, whose end is that there is nothing more.
        kernel.then([kernel.open(1, 8, &fd), Step::Lose]);
        wait_until(|| kernel.lost.load(Ordering::Acquire));
        let lost = Instant::now();
        wait_until(|| kernel.unsettled.load(Ordering::Relaxed) == 0);
        // An idle shard would look a second later.
        assert!(lost.elapsed() < Duration::from_millis(800), "{:?}", lost.elapsed());
        engine.stop(PATIENCE, || false).unwrap();
    });
}

#[test]
fn a_full_queue_is_not_waited_for_by_spinning() {
    with_each_engine(1, |engine, kernel, store| {
        let (_, fd) = sink();
        store.shut.store(true, Ordering::Relaxed);
        let opens = (opens::OPENS_MAX + 100) as u64;
        kernel.then((0..opens).map(|token| kernel.open(token, 7, &fd)));
        wait_until(|| engine.snapshot().opens > (opens::OPENS_MAX) as u64);
        let turns = turns(&engine, Duration::from_millis(300));
        assert!(turns <= 600, "{turns} turns in 0.3 s with nothing to do");
        store.gone.store(true, Ordering::Relaxed);
        store.shut.store(false, Ordering::Relaxed);
        for token in 0..opens {
            assert_eq!(kernel.answers.of(token), Outcome::Failed(Errno::ENOENT));
        }
        engine.stop(PATIENCE, || false).unwrap();
    });
}

#[test]
fn a_lookup_that_hangs_is_refused_in_time_and_holds_up_no_other() {
    with_open_timeout(Duration::from_secs(1), 1, |engine, kernel, store| {
        let (_, fd) = sink();
        let stuck = (0..20).map(|token| kernel.open_named(b"stuck", token, 7, &fd)).collect::<Vec<_>>();
        kernel.then(stuck);
        kernel.then([kernel.open(100, 8, &fd)]);
        assert_eq!(kernel.answers.of(100), Outcome::Opened { len_bytes: BLOB_BYTES as u64 });
        assert!(!kernel.answers.given.lock().unwrap().iter().any(|answer| answer.0 < 20), "the others are not waited for");
        (0..20).for_each(|token| assert_eq!(kernel.answers.of(token), Outcome::Failed(Errno::ETIMEDOUT)));
        // What hung comes back, and finds that nobody wants it any more.
        store.stuck.store(false, Ordering::Relaxed);
        kernel.then([kernel.open_named(b"stuck", 101, 9, &fd)]);
        assert_eq!(kernel.answers.of(101), Outcome::Opened { len_bytes: BLOB_BYTES as u64 });
        assert!((0..20).all(|token| kernel.answers.of(token) != Outcome::Done));
        engine.stop(PATIENCE, || false).unwrap();
    });
}

#[test]
fn fault_blob_gone_or_replaced_before_its_object_is_opened_again_fails_readers_at_once() {
    with_each_engine(1, |engine, kernel, store| {
        let ((file, fd), (_, new)) = (sink(), sink());
        kernel.then([kernel.open(1, 8, &fd), Step::Await(1), close(8)]);
        assert_eq!(kernel.answers.of(1), Outcome::Opened { len_bytes: BLOB_BYTES as u64 });
        // A cache file that has its length is one that was open before.
        file.set_len(BLOB_BYTES as u64).unwrap();
        store.gone.store(true, Ordering::Relaxed);
        kernel.then([kernel.open(2, 9, &fd), Step::Await(2), kernel.need(3, 9, 0..4096), kernel.open_named(b"other", 4, 10, &new)]);
        assert_eq!(kernel.answers.of(2), Outcome::Opened { len_bytes: BLOB_BYTES as u64 });
        assert_eq!(kernel.answers.of(3), Outcome::Failed(Errno::EIO));
        assert_eq!(kernel.answers.of(4), Outcome::Failed(Errno::ENOENT), "one that never was there");
        // It is back, so the same object goes on.
        store.gone.store(false, Ordering::Relaxed);
        kernel.then([kernel.open(5, 11, &fd), Step::Await(5), kernel.need(6, 11, 0..4096)]);
        assert_eq!(kernel.answers.of(6), Outcome::Done);
        // Other bytes have its name: none of them may come beside what is cached, but a new object has them.
        store.replace();
        kernel.then([kernel.open(7, 12, &fd), Step::Await(7), kernel.need(8, 12, 65536..69632)]);
        assert_eq!(kernel.answers.of(8), Outcome::Failed(Errno::EIO));
        kernel.then([kernel.open(9, 13, &new), Step::Await(9), kernel.need(10, 13, 0..4096)]);
        assert_eq!(kernel.answers.of(10), Outcome::Done);
        engine.stop(PATIENCE, || false).unwrap();
    });
}

#[test]
fn fault_broken_kernel_interface_ends_the_engine_without_delay() {
    with_each_engine(2, |engine, kernel, _| {
        let (_, fd) = sink();
        kernel.then([kernel.open(1, 9, &fd), Step::Await(1), kernel.need(2, 9, 0..4096), kernel.need(3, 8, 0..4096), Step::Break]);
        wait_until(|| engine.has_failed());
        let stopping = Instant::now();
        assert!(matches!(engine.stop(PATIENCE, || false), Err(EngineError::Front(FrontError::Broken(_)))));
        assert!(stopping.elapsed() < PATIENCE / 2, "{:?}", stopping.elapsed());
        assert_eq!(kernel.answers.of(2), Outcome::Done, "what had been read from the kernel is finished");
        assert!(matches!(kernel.answers.of(3), Outcome::Failed(_)));
    });
}

#[test]
fn fault_hanging_operation_delays_no_answer_of_a_stop() {
    with_each_engine(1, |engine, kernel, _| {
        // Nobody empties this pipe, so there is room for one of two windows. (The blocking engine fails both.)
        let (_reader, writer) = nix::unistd::pipe().unwrap();
        let fd = Arc::new(writer);
        kernel.then([kernel.open(1, 8, &fd), Step::Await(1), kernel.need(2, 8, 65536..69632), kernel.need(3, 8, 0..4096)]);
        wait_until(|| engine.snapshot().needs == 2);
        let stopping = Instant::now();
        let snapshot = engine.stop(PATIENCE, || stopping.elapsed() > Duration::from_millis(100)).unwrap();
        assert!(stopping.elapsed() < PATIENCE / 2, "{:?}", stopping.elapsed());
        let answers = [2, 3].map(|token| kernel.answers.of(token));
        assert!(answers.iter().any(|answer| matches!(answer, Outcome::Failed(_))), "{answers:?}");
        assert_eq!(snapshot.pending, 0);
    });
}

#[test]
fn objects_that_come_and_go_quickly_get_their_bytes_and_leave_nothing_open() {
    const ROUNDS: u64 = 60;
    with_each_engine(2, |engine, kernel, store| {
        let (mut sinks, mut ended) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            // The kernel does not wait between the rounds: an object is opened while the one before it is closed.
            let (file, fd) = sink();
            let (id, token) = (round as u32 % 3, round * 10);
            let mut steps = vec![kernel.open(token, id, &fd), Step::Await(token)];
            steps.extend((1..4).map(|n| kernel.need(token + n, id, n * 24_576..n * 24_576 + 4096)));
            steps.extend((round % 4 != 0).then(|| close(id)));
            kernel.then(steps);
            ended.push(Arc::downgrade(&fd));
            sinks.push(file);
        }
        for (file, token) in sinks.iter().zip((0..).step_by(10)) {
            for n in 1..4 {
                let mut got = vec![0; 4096];
                match kernel.answers.of(token + n) {
                    Outcome::Done => {
                        let from = n * 24_576;
                        file.read_exact_at(&mut got, from).unwrap();
                        assert!(got == store.data[from as usize..][..4096], "wrong bytes");
                    }
                    // Closed while it waited.
                    outcome => assert_eq!(outcome, Outcome::Failed(Errno::ECANCELED)),
                }
            }
        }
        kernel.then((0..3).map(close));
        wait_until(|| engine.snapshot().objects == 0 && ended.iter().all(|sink| sink.strong_count() == 0));
        assert_eq!(engine.stop(PATIENCE, || false).unwrap().pending, 0);
    });
}

#[test]
fn the_descriptor_of_a_closed_object_is_closed_everywhere() {
    with_each_engine(1, |engine, kernel, _| {
        // Its other end hangs up when nobody has it any more, not even a ring's table of files.
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let has_hung_up = || {
            let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, 0u8).unwrap() == 1 && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
        };
        kernel.then([kernel.open(1, 8, &Arc::new(writer)), Step::Await(1)]);
        assert_eq!(kernel.answers.of(1), Outcome::Opened { len_bytes: BLOB_BYTES as u64 });
        assert!(!has_hung_up());
        kernel.then([close(8)]);
        wait_until(has_hung_up);
        engine.stop(PATIENCE, || false).unwrap();
    });
}

/// The kernel's interface breaks before anybody had time to say anything to the engine.
#[test]
fn an_engine_that_fails_right_after_its_start_leaves_what_it_has_read() {
    for kind in [EngineKind::Uring, EngineKind::Blocking] {
        let (kernel, store, (_file, fd)) = (Kernel::new(), OneBlob::new(), sink());
        store.shut.store(true, Ordering::Relaxed);
        kernel.then([kernel.open(1, 8, &fd), Step::Break]);
        let (front, blobs) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, Arc::clone(&store) as Arc<dyn Store>);
        let settings = Settings { leave_rest: true, ..settings(kind, 2) };
        let engine = match Engine::start(&front, &blobs, &settings) {
            Err(EngineError::NoRing(why)) => {
                println!("not run: {why}");
                continue;
            }
            engine => engine.unwrap(),
        };
        wait_until(|| engine.has_failed());
        assert!(engine.stop(PATIENCE, || false).is_err());
        store.shut.store(false, Ordering::Relaxed);
        wait_until(|| Arc::strong_count(&fd) == 1);
        assert_eq!(*kernel.answers.given.lock().unwrap(), []);
    }
}

#[test]
fn what_is_unfinished_is_left_to_the_next_daemon_and_what_is_finished_is_answered() {
    with_each_engine(2, |engine, kernel, store| {
        engine.leave_rest(true);
        let (_file, fd) = sink();
        kernel.then([kernel.open(1, 8, &fd), Step::Await(1), kernel.need(2, 8, 0..4096)]);
        assert_eq!(kernel.answers.of(2), Outcome::Done);
        store.shut.store(true, Ordering::Relaxed);
        kernel.then([kernel.open(3, 9, &fd)]);
        wait_until(|| engine.snapshot().opens == 2);
        engine.stop(PATIENCE, || false).unwrap();
        // The lookup ends after the shards have: nobody could adopt the object.
        store.shut.store(false, Ordering::Relaxed);
        wait_until(|| Arc::strong_count(&fd) == 1);
        let given = kernel.answers.given.lock().unwrap();
        assert_eq!(given.iter().map(|answer| answer.0).collect::<Vec<_>>(), [1, 2]);
    });
}
