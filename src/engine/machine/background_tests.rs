//! The background driven by hand: that it waits for its turn, keeps its rate, and leaves nothing behind.

use std::num::NonZeroU64;

use super::tests::{Driver, LIMITS, PAGE};
use super::*;

const MIB: u64 = 1 << 20;
const PIECE: u64 = 16 * PAGE;

fn always(bytes_per_s: u64) -> Limits {
    let completion = Completion { when: Complete::Always, bytes_per_s: NonZeroU64::new(bytes_per_s) };
    Limits { window: Window::Fixed(PAGE), completion, ..LIMITS }
}

#[test]
fn the_rest_is_brought_in_order_few_pieces_at_a_time() {
    let mut driver = Driver::new(always(0));
    driver.open(1, 100);
    driver.act();
    assert_eq!(driver.wanted.len(), 2);
    let read = driver.end_all(&(0..0));
    let expected: Vec<_> = (0..7).map(|n| n * PIECE..((n + 1) * PIECE).min(100 * PAGE)).collect();
    assert_eq!(read, expected);
    let counters = driver.machine.counters();
    assert_eq!((counters.background, counters.bytes_unasked, counters.bytes_filled), (7, 100 * PAGE, 100 * PAGE));
    assert_eq!(driver.machine.next_deadline(), None);
}

/// What comes ahead of its readers is in the end either used or wasted; where only misses are seen, a reader that goes on behind
/// what was brought has used it.
#[test]
fn what_is_brought_ahead_is_used_or_wasted() {
    let ahead = |sinks_know| {
        let window = Window::Adaptive { budget_percent: 100 };
        let mut driver = Driver::new(Limits { window, sinks_know, fill_max_bytes: MIB, ..LIMITS });
        let object = driver.open(1, 4096);
        driver.need(1, 0..PAGE, 1);
        driver.end_all(&(0..0));
        (driver, object)
    };
    let told = |driver: &Driver| {
        let counters = driver.machine.counters();
        (counters.bytes_unasked, counters.bytes_ahead_used, counters.bytes_ahead_wasted)
    };
    let (mut driver, object) = ahead(true);
    let unasked = told(&driver).0;
    assert!(unasked > 4 * PAGE, "{:?}", told(&driver));
    for _ in 0..2 {
        // Who reads the same again uses nothing more, and who reads what was asked for nothing at all.
        driver.machine.has_read(object, &(0..3 * PAGE));
        assert_eq!(told(&driver), (unasked, 2 * PAGE, 0));
    }
    driver.close(1);
    assert_eq!(told(&driver), (unasked, 2 * PAGE, unasked - 2 * PAGE));

    let (mut driver, _) = ahead(false);
    let unasked = told(&driver).0;
    driver.need(1, unasked + PAGE..unasked + 2 * PAGE, 2);
    assert_eq!(told(&driver).1, unasked);
    driver.end_all(&(0..0));
    let (brought, used, _) = told(&driver);
    driver.close(1);
    assert_eq!(told(&driver), (brought, used, brought - used));
}

#[test]
fn what_is_asked_overtakes_and_what_is_on_its_way_is_joined() {
    let mut driver = Driver::new(Limits { slots: 3, ..always(0) });
    driver.open(1, 100);
    driver.act();
    driver.need(1, PAGE..2 * PAGE, 1);
    driver.need(1, 80 * PAGE..81 * PAGE, 2);
    assert_eq!(driver.machine.counters().joined, 1);
    let read = driver.end_all(&(0..0));
    let place = read.iter().position(|range| *range == (80 * PAGE..81 * PAGE));
    assert_eq!(place, Some(2), "{read:?}");
    assert_eq!(driver.answers, [(1, Outcome::Done), (2, Outcome::Done)]);
    assert_eq!(driver.machine.counters().bytes_unasked, 98 * PAGE);
}

#[test]
fn the_rate_is_kept() {
    let mut driver = Driver::new(always(PIECE * 1000));
    driver.open(1, 64);
    driver.act();
    for piece in 1..4 {
        assert_eq!(driver.wanted.len(), 1);
        driver.end_all(&(0..0));
        assert_eq!(driver.machine.next_deadline(), Some(piece * 1_000_000));
        driver.machine.tick(piece * 1_000_000 - 1);
        driver.act();
        assert!(driver.wanted.is_empty());
        // What is asked does not wait.
        driver.need(1, (64 - piece) * PAGE..(65 - piece) * PAGE, 0);
        driver.end_all(&(0..0));
        driver.machine.tick(piece * 1_000_000);
        driver.act();
    }
    driver.end_all(&(0..0));
    assert_eq!(driver.machine.counters().bytes_filled, 64 * PAGE);
}

#[test]
fn another_rate_counts_at_once() {
    let mut driver = Driver::new(always(1));
    driver.open(1, 64);
    driver.act();
    driver.end_all(&(0..0));
    // Hours, for what was brought.
    assert!(driver.machine.next_deadline().is_some_and(|due_ns| due_ns > 3_600_000_000_000));
    driver.machine.tune(LIMITS.timeout_ns, None);
    driver.act();
    driver.end_all(&(0..0));
    assert_eq!(driver.machine.counters().bytes_filled, 64 * PAGE);
}

#[test]
fn a_closed_or_broken_object_ends_its_background() {
    let mut driver = Driver::new(always(0));
    let handle = driver.open(1, 1000);
    driver.act();
    driver.close(1);
    driver.end_all(&(0..0));
    assert_eq!((driver.released.as_slice(), driver.machine.fill_count()), ([handle].as_slice(), 0));
    driver.open(2, 1000);
    driver.act();
    let read = driver.end_all(&(3 * PIECE..4 * PIECE));
    assert!((4..=5).contains(&read.len()), "{read:?}");
    assert_eq!((driver.machine.in_flight(), driver.machine.next_deadline()), (0, None));
    // Its readers are served as before.
    driver.need(2, 900 * PAGE..901 * PAGE, 1);
    driver.end_all(&(0..0));
    assert_eq!(driver.answers, [(1, Outcome::Done)]);
}

#[test]
fn what_the_sink_holds_is_not_brought_again() {
    let mut driver = Driver::new(Limits { probe: true, ..always(0) });
    driver.held.push(16 * PAGE..90 * PAGE);
    driver.open(1, 100);
    driver.act();
    assert_eq!(driver.end_all(&(0..0)), [0..PIECE, 90 * PAGE..96 * PAGE, 96 * PAGE..100 * PAGE]);
}

#[test]
fn metadata_comes_whole_behind_the_first_demand_in_it() {
    let window = Window::Adaptive { budget_percent: 0 };
    let mut driver = Driver::new(Limits { window, ..LIMITS });
    let handle = driver.open(1, 8 * MIB / PAGE);
    driver.machine.bring_whole(handle, &(0..2 * MIB));
    driver.need(1, 4 * MIB..4 * MIB + PAGE, 1);
    assert!(driver.end_all(&(0..0)).iter().all(|range| range.start >= 2 * MIB));
    driver.need(1, 0..PAGE, 2);
    let read = driver.end_all(&(0..0));
    assert_eq!(read[0], 0..PAGE);
    assert_eq!(read.iter().map(crate::range::len).sum::<u64>(), 2 * MIB);
}
