//! Many objects under a small descriptor budget, against a kernel that opens an object again when it is read.

use std::collections::HashMap;
use std::fs::File;

use nix::errno::Errno;

use super::*;

/// Far more than fit.
const OBJECTS: usize = 300;
const BUDGET: u64 = 64;
const READERS: usize = 8;
const READS: usize = 150;

/// The descriptor of an object, which also takes the answers to its reads.
#[derive(Debug)]
struct Anonymous {
    file: File,
    name: usize,
    state: Arc<Mutex<State>>,
    readable: Arc<EventFd>,
}

impl crate::front::Sink for Anonymous {}

#[derive(Default, Debug)]
struct State {
    /// What the daemon has not read.
    queue: VecDeque<Event>,
    objects: Vec<Object>,
    next_id: u32,
    /// Reads that wait until their object is open.
    waiting: Vec<(usize, u64)>,
    /// Opens without an answer, by token.
    opens: HashMap<u64, usize>,
    done: HashMap<u64, Outcome>,
    live: usize,
    most: usize,
    opened: usize,
}

#[derive(Debug)]
enum Event {
    Open(usize),
    Read(usize, u64),
}

/// What the kernel knows of an object. Its data outlives its descriptor.
#[derive(Debug)]
struct Object {
    data: File,
    id: u32,
    open: std::sync::Weak<Anonymous>,
    opening: bool,
}

impl AsFd for Anonymous {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        self.state.lock().unwrap().live -= 1;
    }
}

impl Answer for Anonymous {
    fn answer(&self, token: u64, outcome: Outcome) -> std::io::Result<bool> {
        let mut state = self.state.lock().unwrap();
        if let Some(name) = state.opens.remove(&token) {
            assert_eq!(name, self.name);
            assert!(matches!(outcome, Outcome::Opened { .. }), "{outcome:?}");
            state.objects[name].opening = false;
            // Its reads are deliverable now.
            let ready: Vec<_> = state.waiting.extract_if(.., |(waits, _)| *waits == name).collect();
            self.readable.write(ready.len() as u64).unwrap();
            ready.into_iter().for_each(|(name, token)| state.queue.push_front(Event::Read(name, token)));
        } else {
            assert!(state.done.insert(token, outcome).is_none(), "answered twice");
        }
        Ok(true)
    }
}

struct Reopening {
    state: Arc<Mutex<State>>,
    readable: Arc<EventFd>,
    reopens: bool,
}

impl Reopening {
    fn new(reopens: bool) -> Arc<Self> {
        let readable = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE).unwrap();
        let objects = (0..OBJECTS).map(|_| Object { data: tempfile::tempfile().unwrap(), id: 0, open: Default::default(), opening: false });
        let state = State { objects: objects.collect(), ..State::default() };
        Arc::new(Self { state: Arc::new(Mutex::new(state)), readable: Arc::new(readable), reopens })
    }

    fn push(&self, event: Event) {
        self.state.lock().unwrap().queue.push_back(event);
        self.readable.write(1).unwrap();
    }

    fn open(&self, state: &mut State, name: usize) -> Request {
        state.next_id += 1;
        state.opened += 1;
        state.live += 1;
        state.most = state.most.max(state.live);
        let (id, token) = (state.next_id, u64::from(state.next_id) << 32);
        let object = &mut state.objects[name];
        let (shared, readable) = (Arc::clone(&self.state), Arc::clone(&self.readable));
        let sink = Arc::new(Anonymous { file: object.data.try_clone().unwrap(), name, state: shared, readable });
        (object.id, object.open, object.opening) = (id, Arc::downgrade(&sink), true);
        state.opens.insert(token, name);
        let ticket = Ticket::new(Arc::clone(&sink) as Arc<dyn Answer>, token);
        Request::Open(OpenRequest { object: ObjectId(id), key: Key::new(b"dom", name.to_string().as_bytes()), ticket, sink })
    }

    /// The answer to a read, when it is there.
    fn answer(&self, token: u64) -> Outcome {
        wait_until(|| self.state.lock().unwrap().done.contains_key(&token));
        self.state.lock().unwrap().done[&token]
    }
}

impl FrontEnd for Reopening {
    fn name(&self) -> &'static str {
        "reopening"
    }

    fn caps(&self) -> Caps {
        Caps { holes_are_absent: false, reopens: self.reopens, ..Caps::default() }
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }

    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<Found, FrontError> {
        if read == Err(Errno::EAGAIN) {
            return Ok(Found::Nothing);
        }
        let mut state = self.state.lock().unwrap();
        match state.queue.pop_front().unwrap() {
            Event::Open(name) => requests.push(self.open(&mut state, name)),
            Event::Read(name, token) => {
                let object = &state.objects[name];
                if let (false, Some(sink)) = (object.opening, object.open.upgrade()) {
                    let (object, ticket) = (ObjectId(object.id), Ticket::new(sink, token));
                    requests.push(Request::Need(NeedRequest { object, range: 0..8192, ticket }));
                    return Ok(Found::Part);
                }
                let opening = object.opening;
                state.waiting.push((name, token));
                if !opening {
                    assert!(self.reopens, "the object {name} was closed although it misses data");
                    requests.push(self.open(&mut state, name));
                }
            }
        }
        Ok(Found::Part)
    }
}

/// Reads objects in an order of its own, each time what its file must have then.
fn read_all(kernel: &Reopening, store: &OneBlob, reader: usize) {
    for n in 0..READS {
        let (name, token) = ((reader * 37 + n * 101) % OBJECTS, (reader * READS + n) as u64);
        kernel.push(Event::Read(name, token));
        assert_eq!(kernel.answer(token), Outcome::Done);
        let mut got = vec![0; 8192];
        kernel.state.lock().unwrap().objects[name].data.read_exact_at(&mut got, 0).unwrap();
        assert!(got == store.data[..8192], "wrong bytes");
    }
}

#[test]
fn many_more_objects_than_descriptors_are_all_readable() {
    for kind in [EngineKind::Uring, EngineKind::Blocking] {
        let (kernel, store) = (Reopening::new(true), OneBlob::new());
        let (front, blobs) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, Arc::clone(&store) as Arc<dyn Store>);
        let settings = Settings { fd_budget: BUDGET, window: Window::Fixed(4096), ..settings(kind, 2) };
        let engine = match Engine::start(&front, &blobs, &settings) {
            Err(EngineError::NoRing(why)) => {
                eprintln!("not run: {why}");
                continue;
            }
            engine => engine.unwrap(),
        };
        (0..OBJECTS).for_each(|name| kernel.push(Event::Open(name)));
        std::thread::scope(|scope| {
            (0..READERS).for_each(|reader| {
                drop(scope.spawn({
                    let (kernel, store) = (&kernel, &store);
                    move || read_all(kernel, store, reader)
                }))
            });
        });
        let snapshot = engine.stop(PATIENCE, || false).unwrap();
        let state = kernel.state.lock().unwrap();
        assert!(snapshot.fds_peak <= BUDGET, "{snapshot:?}");
        assert!(state.most as u64 <= BUDGET / 2, "{} sinks at a time, each with a source, and a budget of {BUDGET}", state.most);
        assert!(state.opened > OBJECTS && snapshot.evictions as usize >= state.opened - state.most, "{snapshot:?}");
        assert_eq!((snapshot.needs_failed, snapshot.unanswered), (0, 0));
    }
}

#[test]
fn without_reopening_only_complete_objects_are_closed_and_opens_wait() {
    let (kernel, store) = (Reopening::new(false), OneBlob::new());
    let (front, blobs) = (Arc::clone(&kernel) as Arc<dyn FrontEnd>, Arc::clone(&store) as Arc<dyn Store>);
    // Whatever is read brings the whole blob.
    let settings = Settings { fd_budget: BUDGET, window: Window::Fixed(1 << 20), slot_bytes: 1 << 20, ..settings(EngineKind::Blocking, 2) };
    let engine = Engine::start(&front, &blobs, &settings).unwrap();
    for name in 0..OBJECTS {
        kernel.push(Event::Open(name));
        kernel.push(Event::Read(name, name as u64));
    }
    (0..OBJECTS).for_each(|name| assert_eq!(kernel.answer(name as u64), Outcome::Done));
    let snapshot = engine.stop(PATIENCE, || false).unwrap();
    assert!(snapshot.fds_peak <= BUDGET + fds::EMERGENCY_FDS && snapshot.evictions > 0, "{snapshot:?}");
    assert_eq!(kernel.state.lock().unwrap().opened, OBJECTS, "none was needed again");
}
