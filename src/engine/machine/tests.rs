//! The machine driven by hand: what it asks of the driver, in which order, and what becomes of the requests.

use super::*;
use crate::engine::plan::Window;
use crate::range::{self, intersect};
use crate::store::{Data, Extent, SourceFile};

pub(super) const PAGE: u64 = 4096;
const EIO: i32 = -(Errno::EIO as i32);
pub(super) const LIMITS: Limits = Limits {
    page_bytes: PAGE,
    fill_max_bytes: 16 * PAGE,
    window: Window::Fixed(16 * PAGE),
    completion: Completion { when: Complete::Off, bytes_per_s: None },
    slots: 4,
    fills_per_need: 4,
    timeout_ns: 30_000_000_000,
    probe: false,
    sinks_know: true,
};

/// A blob that is one file: its length and its file system.
#[derive(Debug)]
struct Plain(u64, u64);

impl Blob for Plain {
    fn len_bytes(&self) -> u64 {
        self.0
    }

    fn extent(&self, offset: u64) -> Extent {
        Extent { len_bytes: self.0 - offset, data: Data::Read { file: 0, offset } }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &[]
    }

    fn device(&self) -> u64 {
        self.1
    }
}

/// An operation that the machine wants: a read of the source or a write of the sink.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Wanted {
    op: OpKey,
    object: Handle,
    is_write: bool,
    pub(super) range: ByteRange,
}

/// Does what the machine wants, when a test says so.
pub(super) struct Driver {
    pub(super) machine: Machine<u32>,
    now_ns: u64,
    pub(super) wanted: VecDeque<Wanted>,
    pub(super) answers: Vec<(u32, Outcome)>,
    pub(super) released: Vec<Handle>,
    pub(super) filled: Vec<(Handle, ByteRange)>,
    /// What every sink holds from the beginning.
    pub(super) held: Vec<ByteRange>,
}

impl Driver {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            machine: Machine::new(limits),
            now_ns: 0,
            wanted: VecDeque::new(),
            answers: Vec::new(),
            released: Vec::new(),
            filled: Vec::new(),
            held: Vec::new(),
        }
    }

    pub(super) fn open(&mut self, id: u32, pages: u64) -> Handle {
        self.open_on(id, pages, 0)
    }

    pub(super) fn open_on(&mut self, id: u32, pages: u64, device: u64) -> Handle {
        let handle = self.machine.open(ObjectId(id), Arc::new(Plain(pages * PAGE, device)));
        self.machine.opened(ObjectId(id));
        handle
    }

    pub(super) fn device_of(&self, wanted: &Wanted) -> u64 {
        self.machine.objects[wanted.object.0].blob.device()
    }

    pub(super) fn tick(&mut self, now_ns: u64) {
        self.machine.tick(now_ns);
        self.now_ns = now_ns;
        self.act();
    }

    pub(super) fn need(&mut self, id: u32, range: ByteRange, ticket: u32) {
        self.machine.need(ObjectId(id), range, ticket, self.now_ns);
        self.act();
    }

    pub(super) fn close(&mut self, id: u32) {
        self.machine.close(ObjectId(id));
        self.act();
    }

    pub(super) fn act(&mut self) {
        while let Some(action) = self.machine.pop_action() {
            match action {
                Action::Read { op, object, offset, len, .. } => {
                    self.wanted.push_back(Wanted { op, object, is_write: false, range: offset..offset + len });
                }
                Action::Write { op, object, offset, len, .. } => {
                    self.wanted.push_back(Wanted { op, object, is_write: true, range: offset..offset + len });
                }
                Action::Look { object, range } => {
                    let held = self.held.iter().filter_map(|held| intersect(held, &range));
                    self.machine.learn_of(object, &range, held);
                }
                Action::Filled { object, range, .. } => self.filled.push((object, range)),
                Action::Answer(answered) => self.answers.push((answered.ticket, answered.outcome)),
                Action::Release { object } => self.released.push(object),
            }
        }
    }

    /// Ends the oldest operation with `result`, or with all of its bytes.
    pub(super) fn end(&mut self, result: Option<i32>) -> Wanted {
        let wanted = self.wanted.pop_front().expect("an operation in flight");
        let all = i32::try_from(range::len(&wanted.range)).unwrap();
        self.machine.io_done(wanted.op, result.unwrap_or(all), 0);
        self.act();
        wanted
    }

    /// Ends operations until there are none; reads that touch `bad` fail. Returns what was read.
    pub(super) fn end_all(&mut self, bad: &ByteRange) -> Vec<ByteRange> {
        let mut read = Vec::new();
        while let Some(next) = self.wanted.front().cloned() {
            let fails = !next.is_write && intersect(&next.range, bad).is_some();
            self.end(fails.then_some(EIO));
            if !next.is_write {
                read.push(next.range);
            }
        }
        read
    }
}

#[test]
fn readers_of_the_same_bytes_share_a_fill_and_all_get_an_answer() {
    let mut driver = Driver::new(LIMITS);
    driver.open(1, 64);
    driver.need(1, 0..PAGE, 1);
    driver.need(1, PAGE..2 * PAGE, 2);
    driver.need(1, 0..PAGE, 3);
    assert_eq!(driver.end_all(&(0..0)), [0..16 * PAGE]);
    driver.answers.sort_unstable_by_key(|answer| answer.0);
    assert_eq!(driver.answers, [1, 2, 3].map(|ticket| (ticket, Outcome::Done)));
    assert_eq!(driver.machine.counters().joined, 2);
    driver.need(1, 8 * PAGE..9 * PAGE, 4);
    assert_eq!(driver.answers.last(), Some(&(4, Outcome::Done)));
    assert_eq!(driver.machine.counters().already_there, 1);
}

#[test]
fn fault_bad_page_fails_only_those_who_read_it() {
    let mut driver = Driver::new(LIMITS);
    driver.open(1, 64);
    driver.need(1, 0..PAGE, 1);
    driver.need(1, 9 * PAGE..10 * PAGE, 2);
    let read = driver.end_all(&(9 * PAGE..10 * PAGE));
    driver.answers.sort_unstable_by_key(|answer| answer.0);
    assert_eq!(driver.answers, [(1, Outcome::Done), (2, Outcome::Failed(Errno::EIO))]);
    assert_eq!(read[0], 0..16 * PAGE);
    assert!(read[1..].iter().all(|range| range::len(range) == PAGE), "{read:?}");
    assert_eq!(read.iter().filter(|range| **range == (9 * PAGE..10 * PAGE)).count(), usize::from(FAILURES_MAX));
    assert_eq!((driver.machine.pending(), driver.machine.fill_count(), driver.machine.in_flight()), (0, 0, 0));
}

#[test]
fn a_closed_object_is_released_when_nothing_of_it_is_in_flight() {
    let mut driver = Driver::new(LIMITS);
    let handle = driver.open(1, 64);
    driver.need(1, 0..PAGE, 1);
    driver.close(1);
    assert_eq!(driver.answers, [(1, Outcome::Failed(Errno::ECANCELED))]);
    assert_eq!((driver.released.len(), driver.machine.object_count()), (0, 1));
    let read = driver.end(None);
    assert_eq!(driver.released, [handle]);
    assert!(driver.wanted.is_empty(), "nothing is written to it any more");
    assert_eq!((driver.machine.object_count(), driver.machine.in_flight()), (0, 0));
    driver.machine.io_done(read.op, 4096, 0);
    assert_eq!(driver.machine.counters().stale, 1);
    driver.need(1, 0..PAGE, 2);
    assert_eq!(driver.answers[1], (2, Outcome::Failed(Errno::ENOENT)));
}

#[test]
fn a_handle_is_not_given_away_before_its_release_was_seen() {
    let mut driver = Driver::new(LIMITS);
    let first = driver.open(1, 64);
    // The driver acts at the end of a turn: until then its things are filed under the first handle.
    driver.machine.close(ObjectId(1));
    let second = driver.open(2, 64);
    let third = driver.open(2, 64);
    assert!(first != second && second != third && first != third);
    driver.act();
    assert_eq!(driver.released, [first, second]);
    assert_eq!(driver.machine.object_count(), 1);
    assert!([first, second].contains(&driver.open(3, 1)), "places are used again");
}

#[test]
fn a_huge_demand_has_few_fills_at_a_time_and_is_done_in_the_end() {
    let mut driver = Driver::new(Limits { window: Window::Fixed(PAGE), ..LIMITS });
    driver.open(1, 1 << 12);
    driver.need(1, 0..u64::MAX, 1);
    let mut most = 0;
    while !driver.wanted.is_empty() {
        most = most.max(driver.machine.fill_count());
        driver.end(None);
    }
    assert!(most <= LIMITS.fills_per_need as usize + needs::AHEAD_MAX, "{most}");
    assert_eq!(driver.answers, [(1, Outcome::Done)]);
    assert_eq!(driver.machine.counters().bytes_filled, PAGE << 12);
}

#[test]
fn a_demand_inside_a_page_brings_the_page() {
    let mut driver = Driver::new(Limits { window: Window::Fixed(PAGE), ..LIMITS });
    driver.machine.open(ObjectId(1), Arc::new(Plain(PAGE + 1, 0)));
    driver.need(1, PAGE + 512..PAGE + 1024, 1);
    assert_eq!(driver.end(Some(1)).range, PAGE..2 * PAGE);
    assert_eq!(driver.end(None).range, PAGE..2 * PAGE);
    assert_eq!(driver.answers, [(1, Outcome::Done)]);
    driver.need(1, 2 * PAGE..3 * PAGE, 2);
    driver.need(1, 0..0, 3);
    assert_eq!(driver.answers[1..], [(2, Outcome::Failed(Errno::ENXIO)), (3, Outcome::Done)]);
}

#[test]
fn a_fill_that_somebody_waits_for_overtakes_those_nobody_waits_for() {
    let mut driver = Driver::new(Limits { window: Window::Fixed(64 * PAGE), slots: 1, ..LIMITS });
    driver.open(1, 64);
    driver.need(1, 0..PAGE, 1);
    driver.need(1, 63 * PAGE..64 * PAGE, 2);
    assert_eq!(driver.end_all(&(0..0)), [0..16 * PAGE, 48 * PAGE..64 * PAGE, 16 * PAGE..32 * PAGE, 32 * PAGE..48 * PAGE]);
    assert_eq!(driver.answers, [(1, Outcome::Done), (2, Outcome::Done)]);
    assert_eq!(driver.machine.counters().fills, 4);
}

#[test]
fn what_the_sink_lost_is_brought_again() {
    let mut driver = Driver::new(Limits { window: Window::Fixed(PAGE), probe: true, ..LIMITS });
    driver.open(1, 8);
    let id = ObjectId(1);
    assert_eq!(driver.machine.unprobed(id, &(0..2 * PAGE)), Some(0..2 * PAGE));
    driver.machine.learn(id, &(0..8 * PAGE), [0..2 * PAGE]);
    assert_eq!(driver.machine.unprobed(id, &(0..8 * PAGE)), None);
    assert!(driver.machine.believes(id, &(0..2 * PAGE)) && !driver.machine.believes(id, &(0..3 * PAGE)));
    driver.machine.forget(id, &(PAGE..2 * PAGE));
    driver.need(1, 0..2 * PAGE, 1);
    assert_eq!(driver.end_all(&(0..0)), [PAGE..2 * PAGE]);
    assert_eq!(driver.answers, [(1, Outcome::Done)]);
}

#[test]
fn a_fill_that_waits_for_room_keeps_nothing_open() {
    let mut driver = Driver::new(LIMITS);
    let handle = driver.open(1, 16);
    for (id, closes) in [(1, false), (1, true)] {
        driver.need(id, 0..PAGE, 7);
        driver.end(None);
        driver.end(Some(-(Errno::ENOBUFS as i32)));
        let due = driver.machine.next_deadline().expect("a pause");
        if closes {
            driver.close(id);
            assert_eq!(driver.released, [handle], "nothing is in flight during the pause");
            driver.machine.tick(due);
            driver.act();
        } else {
            driver.machine.tick(due - 1);
            driver.act();
            assert!(driver.wanted.is_empty());
            driver.machine.tick(due);
            driver.act();
            driver.end(None);
            assert_eq!(driver.answers, [(7, Outcome::Done)]);
            driver.machine.forget(ObjectId(id), &(0..16 * PAGE));
        }
    }
    assert!(driver.wanted.is_empty());
    assert_eq!((driver.machine.next_deadline(), driver.machine.in_flight(), driver.machine.fill_count()), (None, 0, 0));
}
