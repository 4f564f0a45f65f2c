//! The coordinator in numbers, in Prometheus's text format.
//!
//! Always holds: every family has its HELP and TYPE once; a label is a job's name or a fixed word,
//! never a worker's, so that the number of series stays bounded.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::state::{JobSummary, Summary};

/// Durations that are collected as they happen.
#[derive(Debug)]
pub struct Histograms {
    /// From the begin of a checkpoint to its commit.
    pub checkpoint_write: Histogram,
    /// Dealing out one rank's files.
    pub shard_assignment: Histogram,
}

impl Default for Histograms {
    fn default() -> Self {
        Self {
            checkpoint_write: Histogram::new(&[
                0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
            ]),
            shard_assignment: Histogram::new(&[
                0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0,
            ]),
        }
    }
}

/// Counts of durations by upper bound.
#[derive(Debug)]
pub struct Histogram {
    bounds_seconds: &'static [f64],
    counts: Vec<AtomicU64>,
    sum_micros: AtomicU64,
}

impl Histogram {
    fn new(bounds_seconds: &'static [f64]) -> Self {
        let counts = (0..=bounds_seconds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds_seconds, counts, sum_micros: AtomicU64::new(0) }
    }

    /// Counts one duration.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds_seconds.iter().position(|bound| seconds <= *bound);
        self.counts[bucket.unwrap_or(self.bounds_seconds.len())].fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    fn write(&self, text: &mut Text, name: &str, help: &str) {
        text.family(name, "histogram", help);
        let mut count = 0;
        for (index, own) in self.counts.iter().enumerate() {
            count += own.load(Ordering::Relaxed);
            let bound = self.bounds_seconds.get(index);
            let bound = bound.map_or_else(|| "+Inf".to_owned(), f64::to_string);
            text.line(&format!("{name}_bucket"), &[("le", &bound)], &count.to_string());
        }
        let sum = Duration::from_micros(self.sum_micros.load(Ordering::Relaxed)).as_secs_f64();
        text.line(&format!("{name}_sum"), &[], &sum.to_string());
        text.line(&format!("{name}_count"), &[], &count.to_string());
    }
}

/// Everything that `/metrics` says.
pub fn render(summary: &Summary, histograms: &Histograms, wall_ms: u64) -> String {
    let mut text = Text::default();
    text.family("coordinator_starts_total", "counter", "Starts of this coordinator.");
    text.line("coordinator_starts_total", &[], &summary.incarnation.to_string());
    for (name, kind, help, value) in JOB_FAMILIES {
        text.family(name, kind, help);
        for job in &summary.jobs {
            if let Some(value) = value(job, wall_ms) {
                text.line(name, &[("job", &job.job)], &value.to_string());
            }
        }
    }
    let name = "coordinator_workers";
    text.family(name, "gauge", "Workers by state.");
    for job in &summary.jobs {
        for (state, count) in &job.workers {
            text.line(name, &[("job", &job.job), ("state", state)], &count.to_string());
        }
    }
    let help = "Seconds from the begin of a checkpoint to its commit.";
    histograms.checkpoint_write.write(&mut text, "checkpoint_write_duration_seconds", help);
    let help = "Seconds to deal out one rank's files.";
    histograms.shard_assignment.write(&mut text, "shard_assignment_duration_seconds", help);
    text.0
}

/// One number of a job, if it has it.
type Reading = fn(&JobSummary, u64) -> Option<f64>;

/// Families with one series a job.
const JOB_FAMILIES: &[(&str, &str, &str, Reading)] = &[
    ("coordinator_workers_active", "gauge", "Workers that live.", |job, _| {
        Some(number(job.workers_active))
    }),
    ("coordinator_world_size", "gauge", "Ranks of the job.", |job, _| {
        Some(f64::from(job.world_size))
    }),
    ("coordinator_heartbeats_total", "counter", "Heartbeats received.", |job, _| {
        Some(number_of(job.heartbeats))
    }),
    ("coordinator_checkpoints_total", "counter", "Checkpoints committed.", |job, _| {
        Some(number_of(job.checkpoints))
    }),
    ("coordinator_checkpoints_in_flight", "gauge", "Checkpoints begun, not ended.", |job, _| {
        Some(number(job.attempts))
    }),
    ("coordinator_barriers_waiting", "gauge", "Workers that wait at barriers.", |job, _| {
        Some(number(job.barriers_waiting))
    }),
    ("coordinator_epoch", "gauge", "The membership number.", |job, _| Some(number_of(job.epoch))),
    ("coordinator_worker_failures", "gauge", "Failures since the last commit.", |job, _| {
        Some(f64::from(job.failures))
    }),
    ("coordinator_worker_failures_left", "gauge", "Failures until the job aborts.", |job, _| {
        Some(f64::from(job.failures_left))
    }),
    ("coordinator_job_aborted", "gauge", "1 if the job is aborted.", |job, _| {
        Some(f64::from(u8::from(!job.abort_reason.is_empty())))
    }),
    ("coordinator_last_checkpoint_step", "gauge", "The newest committed step.", |job, _| {
        job.latest.map(|(step, _)| number_of(step))
    }),
    (
        "coordinator_last_checkpoint_age_seconds",
        "gauge",
        "Age of the newest commit.",
        |job, now| job.latest.map(|(_, at_ms)| number_of(now.saturating_sub(at_ms)) / 1_000.0),
    ),
];

fn number(count: usize) -> f64 {
    number_of(u64::try_from(count).unwrap_or(u64::MAX))
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus's numbers are floats")]
fn number_of(count: u64) -> f64 {
    count as f64
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}").expect("strings grow");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: &str) {
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels =
            if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        writeln!(self.0, "{name}{labels} {value}").expect("strings grow");
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_by_upper_bound() {
        let histogram = Histogram::new(&[0.1, 1.0]);
        for millis in [50, 100, 500, 5_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = Text::default();
        histogram.write(&mut text, "h", "Help.");
        let expected = "# HELP h Help.\n# TYPE h histogram\nh_bucket{le=\"0.1\"} 2\n\
                        h_bucket{le=\"1\"} 3\nh_bucket{le=\"+Inf\"} 4\nh_sum 5.65\nh_count 4\n";
        assert_eq!(text.0, expected);
    }

    #[test]
    fn the_names_that_dashboards_use_are_there() {
        let job =
            JobSummary { job: "a\"b".into(), latest: Some((7, 1_000)), ..JobSummary::default() };
        let summary = Summary { incarnation: 2, jobs: vec![job] };
        let text = render(&summary, &Histograms::default(), 3_500);
        for line in [
            "coordinator_workers_active{job=\"a\\\"b\"} 0",
            "coordinator_heartbeats_total{job=\"a\\\"b\"} 0",
            "coordinator_checkpoints_total{job=\"a\\\"b\"} 0",
            "coordinator_barriers_waiting{job=\"a\\\"b\"} 0",
            "coordinator_last_checkpoint_age_seconds{job=\"a\\\"b\"} 2.5",
            "checkpoint_write_duration_seconds_count 0",
            "shard_assignment_duration_seconds_count 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
