//! A model kernel whose operations take time: how long readers of a fast blob wait, alone and beside a slow source.
//!
//! Deterministic: the clock goes from one end of an operation to the next, and how long each takes is by a seed. What the
//! processor does takes no time here.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::blob::{FileBytes, PAGE_BYTES, SimBlob};
use super::kernel::{Kernel, Message, ReadFault};
use super::objects::Cookie;
use super::readers::{Doing, Reader};
use super::rng::Rng;
use super::sink::{FLAVOURS, SinkWrite};
use crate::engine::machine::{Action, Handle, Limits, Machine, OpKey};
use crate::engine::plan::{Complete, Completion, Window};
use crate::front::ObjectId;
use crate::store::{Blob, SourceMode};

/// What a read of the fast source takes, least and most, in nanoseconds: a flash disk.
const FAST_NS: (u64, u64) = (80_000, 120_000);
/// The same of the slow one: a network, or a disk that is about to die.
const SLOW_NS: (u64, u64) = (50_000_000, 200_000_000);
/// A write of either to the cache.
const WRITE_NS: (u64, u64) = (40_000, 60_000);
/// Pages of each blob.
const PAGES: u64 = 1 << 15;

/// Who reads, and with what.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    /// The machine's slots.
    pub slots: u32,
    /// Readers of the fast blob.
    pub fast: u64,
    /// Readers of the slow one.
    pub slow: u64,
    /// Pages that each reader of the fast blob reads, one after the other. With its readers no more than the blob has.
    pub pages_each: u64,
    /// Says how long each operation takes.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Waited {
    /// How long each request for the fast blob waited, in nanoseconds, ascending.
    pub fast_ns: Vec<u64>,
    /// Requests for the slow one that were answered meanwhile.
    pub slow: usize,
}

impl Waited {
    /// The longest wait of 99 of 100 requests for the fast blob.
    #[must_use]
    pub fn p99_ns(&self) -> u64 {
        self.fast_ns.get(self.fast_ns.len() * 99 / 100).copied().unwrap_or(0)
    }
}

/// An operation in flight.
struct Flight {
    op: OpKey,
    len: u64,
    /// Of a write: the object, and where in it.
    write: Option<(Handle, u64)>,
}

/// An open object.
struct Open {
    fd: u32,
    blob: Arc<SimBlob>,
    is_slow: bool,
}

struct Timed {
    rng: Rng,
    now_ns: u64,
    kernel: Kernel,
    machine: Machine<u32>,
    opens: HashMap<usize, Open>,
    /// By the time at which they end, and in their order.
    flights: BTreeMap<(u64, u64), Flight>,
    started: u64,
    /// When requests that wait were sent, by their number.
    asked_ns: HashMap<u32, u64>,
    waited: Waited,
}

/// Plays a scene until the readers of the fast blob have read what they want.
///
/// # Panics
/// The machine breaks a rule of the kernel.
#[must_use]
pub fn play(scene: &Scene) -> Waited {
    let mut timed = Timed::new(scene);
    let readers = usize::try_from(scene.fast + scene.slow).unwrap_or(usize::MAX);
    let fast = &(0..usize::try_from(scene.fast).unwrap_or(usize::MAX));
    loop {
        (0..readers).for_each(|reader| timed.run_reader(reader));
        timed.take_messages();
        if timed.act() {
            continue;
        }
        if timed.kernel.readers()[fast.clone()].iter().all(Reader::is_over) {
            break;
        }
        timed.end_next();
    }
    let good = timed.kernel.readers()[fast.clone()].iter().all(|reader| reader.doing == Doing::Finished);
    assert!(good && timed.kernel.cookies().iter().all(|cookie| cookie.file.bad_blocks() == 0), "a reader failed");
    timed.waited.fast_ns.sort_unstable();
    timed.waited
}

impl Timed {
    fn new(scene: &Scene) -> Self {
        let limits = Limits {
            page_bytes: PAGE_BYTES,
            fill_max_bytes: 1 << 20,
            window: Window::Fixed(PAGE_BYTES),
            completion: Completion { when: Complete::Off, bytes_per_s: None },
            slots: scene.slots,
            fills_per_need: 16,
            timeout_ns: 30_000_000_000,
            probe: false,
            sinks_know: false,
        };
        let mut timed = Self {
            rng: Rng::new(scene.seed),
            now_ns: 0,
            kernel: Kernel::new(FLAVOURS[2], 1),
            machine: Machine::new(limits),
            opens: HashMap::new(),
            flights: BTreeMap::new(),
            started: 0,
            asked_ns: HashMap::new(),
            waited: Waited { fast_ns: Vec::new(), slow: 0 },
        };
        for (is_slow, readers, pages_each) in [(false, scene.fast, scene.pages_each), (true, scene.slow, PAGES / scene.slow.max(1))] {
            let cookie = timed.mount(is_slow);
            for reader in 0..readers {
                let pages = (0..pages_each).map(|n| (n * readers + reader) * PAGE_BYTES);
                timed.kernel.add_reader(Reader::new(cookie, pages.map(|start| start..start + PAGE_BYTES), PAGE_BYTES));
            }
        }
        timed
    }

    /// Mounts a blob on a file system of its own.
    fn mount(&mut self, is_slow: bool) -> usize {
        let blob = Arc::new(SimBlob::whole_file(is_slow.into(), PAGES * PAGE_BYTES, SourceMode::Direct));
        let cookie = self.kernel.add_cookie(Cookie::new(0, format!("blob{}", blob.id()), Some(Arc::clone(&blob)), PAGE_BYTES));
        self.kernel.mount(cookie);
        let Ok(Some(Message::Open { msg_id, object, fd, .. })) = self.kernel.read(ReadFault::None) else {
            panic!("a mount sends an OPEN");
        };
        let handle = self.machine.open(ObjectId(object), Arc::clone(&blob) as Arc<dyn Blob>);
        let copen = self.kernel.copen(msg_id, (PAGES * PAGE_BYTES).cast_signed());
        assert!(copen.is_ok() && self.kernel.work(cookie), "the kernel takes the answer and publishes the file");
        self.machine.opened(ObjectId(object));
        self.opens.insert(handle.0, Open { fd, blob, is_slow });
        cookie
    }

    fn run_reader(&mut self, reader: usize) {
        while self.kernel.run_reader(reader) {}
        if let Doing::Asleep { msg_id } = self.kernel.readers()[reader].doing {
            self.asked_ns.entry(msg_id).or_insert(self.now_ns);
        }
    }

    fn take_messages(&mut self) {
        while let Ok(Some(message)) = self.kernel.read(ReadFault::None) {
            let Message::Read { msg_id, object, offset, len } = message else { panic!("{message:?} was not to come") };
            self.machine.need(ObjectId(object), offset..offset + len, msg_id, self.now_ns);
        }
    }

    /// Does what the machine wants; whether a reader was answered.
    fn act(&mut self) -> bool {
        let mut answered = false;
        while let Some(action) = self.machine.pop_action() {
            match action {
                Action::Read { op, object, len, .. } => {
                    let takes_ns = if self.opens[&object.0].is_slow { SLOW_NS } else { FAST_NS };
                    self.start(Flight { op, len, write: None }, takes_ns);
                }
                Action::Write { op, object, offset, len, .. } => self.start(Flight { op, len, write: Some((object, offset)) }, WRITE_NS),
                Action::Answer(answer) => {
                    let open = &self.opens[&answer.object.map_or(usize::MAX, |object| object.0)];
                    self.kernel.read_complete(open.fd, answer.ticket).expect("its reader waits");
                    let waited_ns = self.asked_ns.remove(&answer.ticket).map_or(0, |asked_ns| self.now_ns - asked_ns);
                    if open.is_slow {
                        self.waited.slow += 1
                    } else {
                        self.waited.fast_ns.push(waited_ns)
                    }
                    answered = true;
                }
                Action::Look { .. } | Action::Filled { .. } | Action::Release { .. } => {}
            }
        }
        answered
    }

    fn start(&mut self, flight: Flight, (least_ns, most_ns): (u64, u64)) {
        self.started += 1;
        let ends_ns = self.now_ns + self.rng.between(least_ns, most_ns);
        self.flights.insert((ends_ns, self.started), flight);
    }

    /// Goes on to when the next operation ends.
    fn end_next(&mut self) {
        let ((ends_ns, _), Flight { op, len, write }) = self.flights.pop_first().expect("a reader waits for an operation");
        self.now_ns = ends_ns;
        if let Some((object, offset)) = write {
            let Open { fd, blob, .. } = &self.opens[&object.0];
            let content = FileBytes { blob, file: 0, len: blob.len_bytes() };
            let write = SinkWrite { offset, len, position: offset, content: &content, address: 0, at_most: None };
            assert_eq!(self.kernel.write(*fd, &write), Ok(len));
        }
        self.machine.tick(self.now_ns);
        self.machine.io_done(op, i32::try_from(len).unwrap_or(i32::MAX), self.now_ns);
    }
}
