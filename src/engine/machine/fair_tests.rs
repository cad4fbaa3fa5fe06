//! What hangs, and what goes on meanwhile.

use super::groups::Class;
use super::tests::{Driver, LIMITS, PAGE};
use super::*;

const TIMEOUT: u64 = LIMITS.timeout_ns;
const SLOTS: Limits = Limits { slots: 16, window: Window::Fixed(PAGE), ..LIMITS };
const LATE: Outcome = Outcome::Failed(Errno::ETIMEDOUT);

/// Objects and file systems have the same numbers; what is not of `device` ends.
fn end_all_but(driver: &mut Driver, device: u64) {
    while let Some(at) = driver.wanted.iter().position(|wanted| driver.device_of(wanted) != device) {
        driver.wanted.swap(0, at);
        driver.end(None);
    }
}

fn needs(driver: &mut Driver, id: u32, pages: std::ops::Range<u64>) {
    for page in pages {
        driver.need(id, page * PAGE..(page + 1) * PAGE, id * 1000 + u32::try_from(page).unwrap());
    }
}

#[test]
fn fault_request_that_waits_too_long_fails_once_and_its_late_fill_is_used() {
    let mut driver = Driver::new(SLOTS);
    driver.open_on(1, 64, 1);
    needs(&mut driver, 1, 0..20);
    needs(&mut driver, 1, 0..20);
    assert_eq!(driver.machine.next_deadline(), Some(TIMEOUT));
    driver.tick(TIMEOUT - 1);
    assert!(driver.answers.is_empty());
    driver.tick(TIMEOUT);
    assert_eq!((driver.answers.len(), driver.machine.pending(), driver.machine.counters().needs_timed_out), (40, 0, 40));
    assert!(driver.answers.iter().all(|answer| answer.1 == LATE));
    // What was not begun is dropped; what was begun is heard of, and nobody is answered twice.
    let begun = driver.machine.in_flight() as usize;
    assert_eq!((driver.machine.fill_count(), begun, driver.machine.next_deadline()), (begun, 12, None));
    driver.tick(TIMEOUT + 2_000_000_000);
    assert_eq!(driver.machine.stuck(), 12);
    driver.end_all(&(0..0));
    assert_eq!((driver.answers.len(), driver.machine.fill_count(), driver.machine.in_flight()), (40, 0, 0));
    assert_eq!(driver.machine.stuck(), 0);
    driver.answers.clear();
    needs(&mut driver, 1, 0..20);
    assert_eq!(driver.answers.iter().filter(|answer| answer.1 == Outcome::Done).count(), 12);
    driver.end_all(&(0..0));
    assert!(driver.answers.len() == 20 && driver.answers.iter().all(|answer| answer.1 == Outcome::Done));
}

#[test]
fn a_request_in_time_keeps_the_fill_that_another_gave_up() {
    let mut driver = Driver::new(SLOTS);
    driver.open_on(1, 64, 1);
    needs(&mut driver, 1, 0..13);
    driver.machine.need(ObjectId(1), 12 * PAGE..13 * PAGE, 7, TIMEOUT / 2);
    driver.tick(TIMEOUT);
    assert_eq!((driver.answers.len(), driver.machine.pending(), driver.machine.fill_count()), (13, 1, 13));
    assert_eq!((driver.machine.oldest(), driver.machine.next_deadline()), (Some(TIMEOUT / 2), Some(TIMEOUT / 2 + TIMEOUT)));
    driver.end_all(&(0..0));
    assert_eq!(driver.answers.last(), Some(&(7, Outcome::Done)));
}

#[test]
fn fault_hanging_source_leaves_the_others_their_slots_again_and_again() {
    let mut driver = Driver::new(SLOTS);
    for id in 1..4 {
        driver.open_on(id, 1 << 12, id.into());
    }
    for round in 0..50 {
        // Readers of the source that hangs try again each time they get their errors.
        needs(&mut driver, 1, round * 40..round * 40 + 40);
        for id in 2..4 {
            let before = driver.answers.len();
            needs(&mut driver, id, round * 40..round * 40 + 40);
            end_all_but(&mut driver, 1);
            let good = driver.answers[before..].iter().filter(|answer| answer.1 == Outcome::Done && answer.0 / 1000 >= id);
            assert_eq!(good.count(), 40, "round {round}");
        }
        driver.tick((round + 1) * TIMEOUT);
        // Of a source that has given nothing yet nobody knows how long it keeps its slots.
        assert_eq!((driver.machine.pending(), driver.machine.fill_count()), (0, 6), "round {round}");
    }
    let queued: usize = driver.machine.objects.iter().flat_map(|(_, object)| object.queues.iter().map(VecDeque::len)).sum();
    assert!(queued < 200, "{queued} entries are left of fills that are gone");
    driver.end_all(&(0..0));
    assert_eq!((driver.machine.in_flight(), driver.machine.fill_count()), (0, 0), "it came back");
    needs(&mut driver, 1, 4000..4040);
    driver.end_all(&(0..0));
    assert!(driver.answers[driver.answers.len() - 40..].iter().all(|answer| answer.1 == Outcome::Done));
    (1..4).for_each(|id| driver.close(id));
    assert!(driver.machine.groups.is_empty() && driver.released.len() == 3);
}

#[test]
fn the_last_slot_is_for_a_group_that_has_none() {
    for slots in 1..=8 {
        let mut driver = Driver::new(Limits { slots, ..SLOTS });
        driver.open_on(1, 64, 1);
        driver.open_on(2, 64, 2);
        needs(&mut driver, 1, 0..20);
        let of_one = driver.machine.in_flight();
        assert!(of_one < slots.max(2), "{of_one} of {slots}");
        needs(&mut driver, 2, 0..1);
        assert_eq!(driver.machine.in_flight(), (of_one + 1).min(slots));
    }
}

#[test]
fn objects_of_a_file_system_take_turns() {
    let mut driver = Driver::new(Limits { slots: 2, ..SLOTS });
    driver.open_on(1, 64, 1);
    driver.open_on(2, 64, 1);
    needs(&mut driver, 1, 0..30);
    needs(&mut driver, 2, 0..3);
    driver.end_all(&(0..0));
    let order: Vec<u32> = driver.answers.iter().map(|answer| answer.0 / 1000).collect();
    assert_eq!(order[..7], [1, 1, 2, 1, 2, 1, 2], "{order:?}");
    assert_eq!(order.len(), 33);
}

#[test]
fn a_hanging_background_holds_up_no_other() {
    let completion = Completion { when: Complete::Always, bytes_per_s: None };
    let mut driver = Driver::new(Limits { completion, ..SLOTS });
    driver.open_on(1, 1000, 1);
    driver.open_on(2, 1000, 2);
    driver.act();
    end_all_but(&mut driver, 1);
    assert_eq!(driver.machine.counters().bytes_filled, 1000 * PAGE);
    assert!(driver.machine.groups.iter().any(|(_, group)| !group.wants(Class::Background)));
}
