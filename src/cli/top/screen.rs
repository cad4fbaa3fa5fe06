//! What `infill top` shows: lines that fit a terminal of 80 columns and 24 rows.

use std::fs;

use nix::sys::stat::{major, minor};

use super::sample::{Change, Classes, Interval, Sample, Times};
use crate::cli::human::{cut, size, time};

/// Columns and rows where no terminal tells how many it has.
pub(super) const COLUMNS: usize = 80;
/// See [`COLUMNS`].
pub(super) const ROWS: usize = 24;
/// Columns of a line's heading.
const HEADING: usize = 9;
/// Shards and sources in a line.
const IN_A_LINE: usize = 4;
/// A source is called slow from so long an average wait on, in microseconds.
const SLOW_US: f64 = 100_000.0;

/// The lines, `rows` of them at most, none longer than `columns`.
pub(super) fn lines(interval: &Interval<'_>, columns: usize, rows: usize) -> Vec<String> {
    let now = interval.now;
    let mut lines = vec![title(now)];
    let mut add = |heading: &str, text: String| lines.push(format!("{heading:<HEADING$}{text}"));
    add("reads", requests(interval));
    add("p50/p99", latency(interval));
    add("filled", filled(interval));
    add("ahead", ahead(interval));
    add("blobs", descriptors(interval));
    if now.cache_free_bytes > 0 {
        let Sample { cache_bytes, cache_objects, cache_free_bytes, culled_objects, .. } = now;
        let (cache, free) = (size(*cache_bytes), size(*cache_free_bytes));
        add("cache", format!("{cache} in {cache_objects} blobs, {free} free, {culled_objects} removed for want of room"));
    }
    let busy = interval.busy();
    let shard = |(index, share, pending): &(usize, f64, u64)| format!("{index}: {:.0} % {pending} wait", share * 100.0);
    add("shards", some(busy.iter().map(shard), busy.len()));
    let sources = interval.sources();
    if !sources.is_empty() {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let source = |(device, misses, wait_us): &(u64, u64, f64)| {
            let slow = if *wait_us >= SLOW_US { " SLOW" } else { "" };
            format!("{} {misses} misses of {}{slow}", place(&mounts, *device), time(*wait_us))
        };
        add("sources", some(sources.iter().map(source), sources.len()));
    }
    lines.push(String::new());
    lines.push(format!("{:>9} {:>9} {:>8} {:>6} {:>10} {:>5}  BLOB", "READS/S", "MISSES/S", "WAIT", "FAILED", "SIZE", "IN"));
    let room = rows.saturating_sub(lines.len());
    lines.extend(interval.blobs().iter().take(room).map(|change| blob(change, interval.seconds, columns)));
    lines.into_iter().take(rows).map(|line| line.chars().take(columns).collect()).collect()
}

fn title(now: &Sample) -> String {
    let Sample { version, front_end, engine, shards, kernel, uptime_s, .. } = now;
    let (days, hours, minutes) = (uptime_s / 86_400, uptime_s / 3600 % 24, uptime_s / 60 % 60);
    format!("infill {version}  {front_end}, {shards} x {engine}  up {days}d {hours:02}:{minutes:02}  Linux {kernel}")
}

fn requests(interval: &Interval<'_>) -> String {
    let now = interval.now;
    let failed = now.answers_failed + now.answers_timed_out;
    format!(
        "{:.0}/s, {:.0}/s of them there already; {failed} failed; {} wait, the oldest {}{}",
        interval.rate(|sample| sample.answers_ok + sample.answers_failed + sample.answers_timed_out),
        interval.rate(|sample| sample.present + sample.already_there),
        now.pending,
        time(now.oldest_ms as f64 * 1000.0),
        if now.stuck > 0 { format!("; {} STUCK", now.stuck) } else { String::new() },
    )
}

fn latency(interval: &Interval<'_>) -> String {
    let of = |which: fn(&Times) -> &Classes, share| interval.percentile_us(which, share).map_or("-".to_owned(), time);
    let pair = |which| format!("{} / {}", of(which, 0.5), of(which, 0.99));
    let (all, queued, served) = (pair(|times| &times.request), pair(|times| &times.queued), pair(|times| &times.served));
    format!("{all}; queued {queued}, served {served}")
}

fn filled(interval: &Interval<'_>) -> String {
    let all = interval.rate(Sample::bytes_filled);
    let share = |of: fn(&Sample) -> u64| if all > 0.0 { interval.rate(of) * 100.0 / all } else { 0.0 };
    format!(
        "{}/s: mapped {:.0} %, direct {:.0} %, copied {:.0} %, zeros {:.0} %",
        size(whole(all)),
        share(|sample| sample.bytes_mapped),
        share(|sample| sample.bytes_direct),
        share(|sample| sample.bytes_buffered),
        share(|sample| sample.bytes_zero),
    )
}

fn ahead(interval: &Interval<'_>) -> String {
    let used = percent(interval.now.bytes_ahead_used, interval.now.bytes_unasked);
    format!("{}/s; of all that was brought ahead {used} % was read", size(whole(interval.rate(|sample| sample.bytes_unasked))))
}

fn descriptors(interval: &Interval<'_>) -> String {
    let Sample { objects, fds, fds_budget, .. } = interval.now;
    let (opens, evictions, reopens) =
        (interval.rate(|sample| sample.opens), interval.rate(|sample| sample.evictions), interval.rate(|sample| sample.reopens));
    format!("{objects} open, {fds} of {fds_budget} fds; {opens:.0} opened/s, {reopens:.0} again, {evictions:.0} closed for room")
}

fn blob(change: &Change<'_>, seconds: f64, columns: usize) -> String {
    let Change { blob, requests, misses, waited_us, .. } = change;
    #[allow(clippy::cast_precision_loss, reason = "what is shown has few digits")]
    let rate = |count: u64| count as f64 / seconds.max(1e-3);
    #[allow(clippy::cast_precision_loss, reason = "what is shown has few digits")]
    let wait = if *misses > 0 { time(*waited_us as f64 / *misses as f64) } else { "-".to_owned() };
    let head = format!(
        "{:>9.0} {:>9.0} {wait:>8} {:>6} {:>10} {:>3} %  ",
        rate(*requests),
        rate(*misses),
        blob.failed,
        size(blob.len_bytes),
        percent(blob.present_bytes, blob.len_bytes)
    );
    let name = cut(&blob.blob, columns.saturating_sub(head.chars().count()));
    head + &name
}

/// The first of many, and how many more there are.
fn some(texts: impl Iterator<Item = String>, count: usize) -> String {
    let shown: Vec<_> = texts.take(IN_A_LINE).collect();
    let more = count.saturating_sub(IN_A_LINE);
    shown.join(", ") + &if more > 0 { format!(", and {more} more") } else { String::new() }
}

/// Where a file system is mounted, or its number.
fn place(mountinfo: &str, device: u64) -> String {
    let number = format!("{}:{}", major(device), minor(device));
    let found = mountinfo.lines().find_map(|line| {
        let mut words = line.split(' ').skip(2);
        (words.next()? == number).then(|| words.nth(1).map(str::to_owned)).flatten()
    });
    found.unwrap_or(number)
}

fn percent(part: u64, of: u64) -> u64 {
    u64::try_from(u128::from(part) * 100 / u128::from(of.max(1))).unwrap_or(u64::MAX)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate that is not negative; too large ones become the largest"
)]
const fn whole(rate: f64) -> u64 {
    rate as u64
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Blob, Shard};
    use super::*;

    fn largest() -> Sample {
        let most = u64::MAX / 4;
        let blob = |n: u64| Blob {
            blob: format!("domain/{}{n}", "x".repeat(100)),
            len_bytes: most,
            present_bytes: most,
            requests: most,
            misses: most,
            waited_us: most,
            device: n,
            ..Blob::default()
        };
        let text = || "a-very-long-kernel-release-1.2.3-that-nobody-has".to_owned();
        Sample {
            version: "10.20.30".into(),
            kernel: text(),
            front_end: "cachefiles".into(),
            engine: "blocking".into(),
            uptime_s: most,
            pending: most,
            oldest_ms: most,
            stuck: most,
            answers_ok: most,
            bytes_direct: most,
            fds_budget: most,
            cache_free_bytes: most,
            per_shard: (0..100).map(|index| Shard { index, pending: most, cpu_us: most }).collect(),
            blobs: (0..50).map(blob).collect(),
            ..Sample::default()
        }
    }

    #[test]
    fn whatever_there_is_fits_the_terminal() {
        let (before, now) = (Sample::default(), largest());
        for (columns, rows) in [(80, 24), (200, 60), (40, 10), (1, 1)] {
            let lines = lines(&Interval { before: &before, now: &now, seconds: 1.0 }, columns, rows);
            assert!(lines.len() <= rows && lines.iter().all(|line| line.chars().count() <= columns), "{}", lines.join("\n"));
            let shown = lines.iter().filter(|line| line.contains("SLOW") || line.contains("100 %")).count();
            assert!(shown > 5 || columns < 80, "{}", lines.join("\n"));
        }
        // And nothing at all.
        let lines = lines(&Interval { before: &before, now: &before, seconds: 0.0 }, 80, 24);
        assert!(lines.iter().any(|line| line.starts_with("p50/p99  - / -;")), "{}", lines.join("\n"));
    }

    #[test]
    fn a_source_is_named_by_its_mount() {
        let mountinfo = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n40 22 0:35 / /srv/blobs rw shared:3 - nfs4 host:/x rw\n";
        assert_eq!(place(mountinfo, nix::sys::stat::makedev(0, 35)), "/srv/blobs");
        assert_eq!(place(mountinfo, nix::sys::stat::makedev(9, 9)), "9:9");
    }
}
