//! Metrics for Prometheus, in its text format (version 0.0.4), made of a [`Status`] when somebody asks.
//!
//! Names follow Prometheus' conventions: base units, `_total` for what only grows. docs/metrics.md explains them, and the
//! dashboard and alerts beside it use no others, as a test sees to.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::status::{CLASSES_NS, Facts, Statistics, Status};
use crate::engine::stats::{Durations, ObjectReport};

/// What the text is, for HTTP.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Blobs with metrics of their own; of more, those with the most misses.
pub const BLOBS_MAX: usize = 2000;
const NS_PER_S: f64 = 1e9;

/// The text that is scraped.
#[must_use]
pub fn render(status: Status) -> String {
    let mut registry = Registry::with_prefix("infill");
    registry.register_collector(Box::new(Exposition(status)));
    let mut text = String::new();
    // A string takes everything.
    let _ = encode_registry(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Exposition(Status);

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Status { statistics, per_shard, blobs, .. } = &self.0;
        let mut out = Families(&mut encoder);
        daemon(&mut out, &statistics.facts)?;
        requests(&mut out, statistics)?;
        fills(&mut out, statistics)?;
        descriptors(&mut out, statistics)?;
        cache(&mut out, statistics)?;
        let shards = || per_shard.iter().map(|shard| (label("shard", shard.index.to_string()), shard));
        out.counters("shard_cpu_seconds", "CPU time of a shard's thread; its rate is the shard's utilisation", shards(), |shard| {
            Value::seconds(shard.cpu_us, 1e6)
        })?;
        out.counters("shard_requests", "Requests for data that a shard got", shards(), |shard| shard.requests.into())?;
        out.counters("shard_turns", "Turns of a shard's event loop", shards(), |shard| shard.turns.into())?;
        out.gauges("shard_inflight_requests", "Requests of a shard that wait for their answer", shards(), |shard| shard.pending.into())?;
        of_blobs(&mut out, blobs)
    }
}

fn daemon(out: &mut Families<'_, '_>, facts: &Facts) -> fmt::Result {
    let texts = [("version", facts.version), ("kernel", &facts.kernel), ("front_end", facts.front_end), ("engine", facts.engine)];
    let labels = texts.map(|(name, text)| (name, escaped(text))).to_vec();
    out.gauges("build_info", "What runs; always 1", [(labels, ())], |()| 1.into())?;
    out.gauge("start_time_seconds", "When the daemon started, in seconds of the epoch", facts.started_unix_s)?;
    out.gauge("shards", "Event loops", facts.shards as u64)?;
    out.counter("restores", "1 if this daemon went on where an earlier one had ended", facts.restores)
}

fn requests(out: &mut Families<'_, '_>, statistics: &Statistics) -> fmt::Result {
    let counts = &statistics.counts;
    let by_result = [
        ("read", "ok", counts.answers_ok),
        ("read", "failed", counts.answers_failed),
        ("read", "timed_out", counts.answers_timed_out),
        ("read", "left", counts.left),
        ("open", "ok", counts.opens_ok),
        ("open", "failed", counts.opens_failed),
        ("close", "ok", counts.closes),
    ];
    let by_result = by_result.map(|(op, result, count)| (vec![("op", op.to_owned()), ("result", result.to_owned())], count));
    out.counters("requests", "The kernel's requests, by how they ended", by_result, Value::from)?;
    out.counter("reads_present", "Reads whose bytes were there already", counts.present + counts.already_there)?;
    out.counter("reads_joined", "Times a read waited for a fill that another had begun", counts.joined)?;
    out.counter("asked_bytes", "Bytes that reads had to wait for, in whole pages", counts.bytes_asked)?;
    out.durations("request_duration_seconds", "From a read's arrival to its answer", &counts.latency)?;
    out.durations("request_queued_seconds", "Of reads that waited for a fill: until it began", &counts.queued)?;
    out.durations("request_served_seconds", "Of reads that waited for a fill: from its beginning to the answer", &counts.served)?;
    out.gauge("inflight_requests", "Reads that wait for their answer", counts.pending)?;
    out.gauge("oldest_request_seconds", "How long the oldest of them has waited", Value::seconds(counts.oldest_ms, 1e3))?;
    out.gauge("stuck_operations", "Reads and writes in flight for longer than any request may wait: a disk hangs", counts.stuck)?;
    out.counter("malformed_messages", "Messages of the kernel that could not be understood", counts.malformed)?;
    out.counter("late_answers", "Answers that nobody waited for any more", counts.answers_late)?;
    out.counter("refused_answers", "Answers that the kernel did not take", counts.answers_refused)?;
    out.counter("unanswered_requests", "Requests that were dropped: a bug of infill", counts.unanswered)
}

fn fills(out: &mut Families<'_, '_>, statistics: &Statistics) -> fmt::Result {
    let counts = &statistics.counts;
    let by_path = [
        ("mapped", counts.bytes_mapped),
        ("direct", counts.bytes_direct),
        ("copied", counts.bytes_buffered),
        ("zero", counts.bytes_zero),
        ("reflinked", statistics.bytes_reflinked),
    ];
    let by_path = by_path.map(|(path, bytes)| (label("path", path.to_owned()), bytes));
    out.counters("filled_bytes", "Bytes put into the cache, by the way they took", by_path, Value::from)?;
    out.counter("fills", "Fills that ended well", counts.fills)?;
    out.counter("failed_fills", "Fills that failed", counts.fills_failed)?;
    out.counter("background_fills", "Fills begun because there was nothing better to do", counts.background)?;
    out.counter("ahead_bytes", "Bytes brought before anybody asked for them", counts.bytes_unasked)?;
    out.counter("ahead_used_bytes", "Of those, read later as far as that is seen", counts.bytes_ahead_used)?;
    out.counter("ahead_wasted_bytes", "Of those, not seen to be read when their blob was closed", counts.bytes_ahead_wasted)
}

fn descriptors(out: &mut Families<'_, '_>, statistics: &Statistics) -> fmt::Result {
    let counts = &statistics.counts;
    out.gauge("objects", "Blobs that are open", counts.objects)?;
    out.gauge("anon_fds", "Descriptors of open blobs: the kernel's and those of their sources", counts.fds)?;
    out.gauge("anon_fds_peak", "Most that there were", counts.fds_peak)?;
    out.gauge("anon_fds_limit", "Most that there may be (fd_budget)", counts.fds_budget)?;
    out.counter("evictions", "Blobs closed to make room for other descriptors", counts.evictions)?;
    out.counter("reopens", "Opens of blobs that had been open before", counts.reopens)
}

fn cache(out: &mut Families<'_, '_>, statistics: &Statistics) -> fmt::Result {
    let Some(space) = &statistics.space else { return Ok(()) };
    out.gauge("cache_bytes", "Space that blobs in the cache take", space.cache_bytes)?;
    out.gauge("cache_objects", "Blobs in the cache", space.cache_objects)?;
    out.gauge("cache_free_bytes", "Free space on the cache's file system", space.cache_free_bytes)?;
    out.counter("culled_objects", "Blobs removed for want of room", space.culled_objects)?;
    out.counter("culled_bytes", "Space that they took", space.culled_bytes)?;
    out.counter("culls_refused", "Blobs chosen to be removed that had come into use", space.cull_refused)
}

fn of_blobs(out: &mut Families<'_, '_>, blobs: &[ObjectReport]) -> fmt::Result {
    let mut shown: Vec<_> = blobs.iter().collect();
    shown.sort_by_key(|blob| std::cmp::Reverse(blob.misses));
    shown.truncate(BLOBS_MAX);
    let each = || shown.iter().map(|&blob| (label("blob", escaped(&blob.blob)), blob));
    out.gauge("blobs_hidden", "Blobs that have no metrics of their own because there are too many", (blobs.len() - shown.len()) as u64)?;
    out.gauges("blob_bytes", "Length of a blob", each(), |blob| blob.len_bytes.into())?;
    out.gauges("blob_resident_bytes", "How much of it is in the cache", each(), |blob| blob.present_bytes.into())?;
    out.counters("blob_requests", "Reads of a blob", each(), |blob| blob.requests.into())?;
    out.counters("blob_misses", "Of those, the ones that waited for bytes to be brought", each(), |blob| blob.misses.into())?;
    out.counters("blob_failed", "Of its reads, those that failed", each(), |blob| blob.failed.into())?;
    out.counters("blob_wait_seconds", "How long its misses waited together", each(), |blob| Value::seconds(blob.waited_us, 1e6))
}

type Labels = Vec<(&'static str, String)>;

fn label(name: &'static str, value: String) -> Labels {
    vec![(name, value)]
}

/// A label's value as the format wants it, which the encoder does not see to.
fn escaped(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

/// What a metric is worth.
#[derive(Clone, Copy, Debug)]
enum Value {
    Whole(u64),
    Real(f64),
}

impl Value {
    #[allow(clippy::cast_precision_loss, reason = "what is shown needs no more digits")]
    const fn seconds(count: u64, per_s: f64) -> Self {
        Self::Real(count as f64 / per_s)
    }

    fn encode(self, metric: &mut MetricEncoder<'_>) -> fmt::Result {
        match self {
            Self::Whole(value) => metric.encode_gauge(&value),
            Self::Real(value) => metric.encode_gauge(&value),
        }
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

/// Writes families of metrics.
struct Families<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl Families<'_, '_> {
    fn counter(&mut self, name: &str, help: &str, value: impl Into<Value>) -> fmt::Result {
        self.counters(name, help, [(Labels::new(), value.into())], |value| value)
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Into<Value>) -> fmt::Result {
        self.gauges(name, help, [(Labels::new(), value.into())], |value| value)
    }

    /// The encoder is told of gauges that end in `_total` and are of the kind counter: so it writes what every scraper reads. What
    /// it makes of counters, only those understand that know OpenMetrics.
    fn counters<T>(
        &mut self,
        name: &str,
        help: &str,
        each: impl IntoIterator<Item = (Labels, T)>,
        value: impl Fn(T) -> Value,
    ) -> fmt::Result {
        self.family(&format!("{name}_total"), help, MetricType::Counter, each, |metric, it| value(it).encode(metric))
    }

    fn gauges<T>(
        &mut self,
        name: &str,
        help: &str,
        each: impl IntoIterator<Item = (Labels, T)>,
        value: impl Fn(T) -> Value,
    ) -> fmt::Result {
        self.family(name, help, MetricType::Gauge, each, |metric, it| value(it).encode(metric))
    }

    fn durations(&mut self, name: &str, help: &str, durations: &Durations) -> fmt::Result {
        self.family(name, help, MetricType::Histogram, [(Labels::new(), durations)], classes)
    }

    fn family<T>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        each: impl IntoIterator<Item = (Labels, T)>,
        encode: impl Fn(&mut MetricEncoder<'_>, T) -> fmt::Result,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, it) in each {
            if labels.is_empty() { encode(&mut metric, it)? } else { encode(&mut metric.encode_family(&labels)?, it)? }
        }
        Ok(())
    }
}

/// Durations as the encoder wants them: each class by itself, it adds them up.
#[allow(clippy::cast_precision_loss, reason = "limits have few digits, and a sum needs no more")]
fn classes(metric: &mut MetricEncoder<'_>, durations: &Durations) -> fmt::Result {
    let all = durations.count();
    // It takes the largest number for infinity.
    let ends = CLASSES_NS.iter().map(|&limit_ns| limit_ns as f64 / NS_PER_S).chain([f64::MAX]);
    let mut before = 0;
    let up_to = durations.up_to(&CLASSES_NS).into_iter().chain([all]);
    let each = ends.zip(up_to).map(|(end, up_to)| (end, up_to - std::mem::replace(&mut before, up_to)));
    metric.encode_histogram::<NoLabelSet>(durations.sum_ns() as f64 / NS_PER_S, all, &Vec::from_iter(each), None)
}

/// The names that a text has, each with its kind: for checks that others use no names that do not exist.
#[must_use]
pub fn names(text: &str) -> BTreeMap<String, String> {
    let typed = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let all = typed.flat_map(|(name, kind)| {
        let endings: &[&str] = match kind {
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        endings.iter().map(move |ending| (format!("{name}{ending}"), kind.to_owned()))
    });
    all.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::stats::{Histogram, ShardReport, Snapshot};
    use crate::ops::space;
    use crate::ops::status::Times;

    fn some() -> Status {
        let histogram = Histogram::default();
        [3_000, 40_000, 40_000, 2_000_000_000, 40_000_000_000].into_iter().for_each(|ns| histogram.record(ns));
        let mut latency = Durations::default();
        latency.add(&histogram);
        let counts = Snapshot { answers_ok: 5, pending: 2, oldest_ms: 1500, latency, ..Snapshot::default() };
        let facts = Facts { version: "1.2.3", kernel: "6.12 \"odd\"".into(), front_end: "cachefiles", ..Facts::default() };
        let space = Some(space::Statistics { cache_bytes: 1 << 40, ..space::Statistics::default() });
        let blob = |n: u64| ObjectReport { blob: format!(r"dom/b\x00{n}"), misses: n, waited_us: 1_500_000, ..ObjectReport::default() };
        Status {
            statistics: Statistics { facts, counts, bytes_reflinked: 7, space, ..Statistics::default() },
            times: Times::default(),
            per_shard: vec![ShardReport { cpu_us: 2_500_000, ..ShardReport::default() }],
            blobs: (0..BLOBS_MAX as u64 + 3).map(blob).collect(),
        }
    }

    #[test]
    fn the_text_says_what_is_known() {
        let text = render(some());
        for line in [
            r#"infill_build_info{version="1.2.3",kernel="6.12 \"odd\"",front_end="cachefiles",engine=""} 1"#,
            r#"infill_requests_total{op="read",result="ok"} 5"#,
            r#"infill_request_duration_seconds_bucket{le="0.00001"} 1"#,
            r#"infill_request_duration_seconds_bucket{le="0.00005"} 3"#,
            r#"infill_request_duration_seconds_bucket{le="30.0"} 4"#,
            r#"infill_request_duration_seconds_bucket{le="+Inf"} 5"#,
            "infill_request_duration_seconds_count 5",
            "infill_request_duration_seconds_sum 42.000083",
            "infill_oldest_request_seconds 1.5",
            r#"infill_filled_bytes_total{path="reflinked"} 7"#,
            r#"infill_shard_cpu_seconds_total{shard="0"} 2.5"#,
            "infill_cache_bytes 1099511627776",
            "infill_blobs_hidden 3",
            r#"infill_blob_misses_total{blob="dom/b\\x002002"} 2002"#,
            r#"infill_blob_wait_seconds_total{blob="dom/b\\x002002"} 1.5"#,
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line} in\n{}", &text[..text.len().min(12_000)]);
        }
        assert!(!text.contains(r#"blob="dom/b\\x002""#), "those with few misses are hidden");
        assert_eq!(names(&text)["infill_request_queued_seconds_bucket"], "histogram");
    }
}
