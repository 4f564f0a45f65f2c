//! What a recording means: a table that adds up, and a timeline for a trace viewer.
//!
//! Always holds: the rows of a table, with the one for CPU time outside every span, add up to the
//! CPU time of the process over the phase.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use serde_json::{Value, json};

use crate::spans::{Recorder, Recording, process_cpu};

/// What a process did from one moment to another.
#[derive(Clone, Debug)]
pub struct Phase {
    /// What it was, for people.
    pub name: String,
    /// When it began, from the recorder's start.
    pub start: Duration,
    /// How long it took.
    pub wall: Duration,
    /// CPU time of the whole process meanwhile, kernel included.
    pub cpu: Duration,
    /// The spans of that time.
    pub recording: Recording,
}

impl Phase {
    /// Records `work`.
    pub fn record<T>(recorder: &Recorder, name: String, work: impl FnOnce() -> T) -> (Self, T) {
        recorder.start();
        let (start, cpu_at_start) = (recorder.now(), process_cpu());
        let done = work();
        let cpu = process_cpu().saturating_sub(cpu_at_start);
        let wall = recorder.now().saturating_sub(start);
        (Self { name, start, wall, cpu, recording: recorder.stop() }, done)
    }

    /// A row for each span's name, the costliest first.
    pub fn rows(&self) -> Vec<Row> {
        let mut rows: BTreeMap<&'static str, Row> = BTreeMap::new();
        for span in &self.recording.spans {
            let row = rows.entry(span.name).or_insert_with(|| Row::new(span.name));
            row.count += 1;
            row.wall += span.wall;
            row.cpu_seconds += span.self_cpu.as_secs_f64();
        }
        let mut rows: Vec<Row> = rows.into_values().collect();
        rows.sort_by(|a, b| b.cpu_seconds.total_cmp(&a.cpu_seconds));
        rows
    }

    /// CPU seconds of the process in no span.
    pub fn outside_seconds(&self) -> f64 {
        let inside: f64 = self.rows().iter().map(|row| row.cpu_seconds).sum();
        self.cpu.as_secs_f64() - inside
    }

    /// Part of the process's CPU time that went into spans of this name, or `None` without any.
    pub fn share_of(&self, span: &str) -> Option<f64> {
        let row = self.rows().into_iter().find(|row| row.span == span)?;
        Some(row.cpu_seconds / self.cpu.as_secs_f64())
    }

    /// The table, for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}: {:.3} s, {:.3} CPU seconds\n  {:<16} {:>8} {:>10} {:>10} {:>8}\n",
            self.name,
            self.wall.as_secs_f64(),
            self.cpu.as_secs_f64(),
            "span",
            "count",
            "wall s",
            "CPU s",
            "of CPU"
        );
        let mut line = |name: &str, count: &str, wall: &str, cpu_seconds: f64| {
            let percent = 100.0 * cpu_seconds / self.cpu.as_secs_f64();
            writeln!(
                text,
                "  {name:<16} {count:>8} {wall:>10} {cpu_seconds:>10.3} {percent:>6.1} %"
            )
            .expect("strings grow");
        };
        for row in self.rows() {
            let wall = format!("{:.3}", row.wall.as_secs_f64());
            line(row.span, &row.count.to_string(), &wall, row.cpu_seconds);
        }
        line("not in a span", "", "", self.outside_seconds());
        text
    }
}

/// All spans of one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Their name.
    pub span: &'static str,
    /// How often such a span was entered and left.
    pub count: u64,
    /// Time between, added up over threads, with the spans within.
    pub wall: Duration,
    /// CPU seconds without those of the spans within.
    pub cpu_seconds: f64,
}

impl Row {
    fn new(span: &'static str) -> Self {
        Self { span, count: 0, wall: Duration::ZERO, cpu_seconds: 0.0 }
    }
}

/// Writes a trace-event file, which ui.perfetto.dev and chrome://tracing open: each phase is a
/// process there, beginning at 0, so that phases can be compared one above the other.
pub fn write_timeline(out: &mut dyn Write, phases: &[Phase]) -> io::Result<()> {
    let events: Vec<Value> =
        (1..).zip(phases).flat_map(|(process, phase)| events(process, phase)).collect();
    serde_json::to_writer(&mut *out, &json!({ "displayTimeUnit": "ms", "traceEvents": events }))?;
    out.flush()
}

fn events(process: i32, phase: &Phase) -> Vec<Value> {
    let named = |what: &str, thread: i32, name: &str| {
        let arguments = json!({ "name": name });
        json!({"ph": "M", "name": what, "pid": process, "tid": thread, "args": arguments})
    };
    let mut events = vec![named("process_name", 0, &phase.name)];
    let threads = phase.recording.threads.iter();
    events.extend(threads.map(|(thread, name)| named("thread_name", *thread, name)));
    for span in &phase.recording.spans {
        let mut arguments = span.fields.clone();
        arguments.insert("cpu_us".into(), microseconds(span.cpu));
        events.push(json!({
            "ph": "X",
            "cat": "engine",
            "name": span.name,
            "pid": process,
            "tid": span.thread,
            "ts": microseconds(span.start.saturating_sub(phase.start)),
            "dur": microseconds(span.wall),
            "args": arguments,
        }));
    }
    events
}

/// The unit of the format, to the nanosecond.
fn microseconds(time: Duration) -> Value {
    json!(time.as_secs_f64() * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spans::SpanRecord;

    fn span(name: &'static str, thread: i32, [start, wall, cpu, self_cpu]: [u64; 4]) -> SpanRecord {
        let fields = serde_json::Map::from_iter([("chunk".to_owned(), 3.into())]);
        let [start, wall, cpu, self_cpu] = [start, wall, cpu, self_cpu].map(Duration::from_millis);
        SpanRecord { name, thread, start, wall, cpu, self_cpu, fields }
    }

    fn phase() -> Phase {
        Phase {
            name: "save, float".into(),
            start: Duration::from_millis(100),
            wall: Duration::from_millis(400),
            cpu: Duration::from_millis(500),
            recording: Recording {
                spans: vec![
                    span("checksum", 7, [110, 30, 20, 20]),
                    span("encode", 7, [110, 250, 220, 200]),
                    span("checksum", 8, [120, 30, 30, 30]),
                    span("save", 1, [100, 50, 100, 100]),
                ],
                threads: BTreeMap::from([(1, "main".into()), (7, "worker".into())]),
            },
        }
    }

    #[test]
    fn rows_and_the_rest_add_up_to_the_process() {
        let phase = phase();
        let rows = phase.rows();
        let names: Vec<_> = rows.iter().map(|row| (row.span, row.count)).collect();
        assert_eq!(names, [("encode", 1), ("save", 1), ("checksum", 2)]);
        assert_eq!(rows[2].wall, Duration::from_millis(60));
        let inside: f64 = rows.iter().map(|row| row.cpu_seconds).sum();
        assert!((inside + phase.outside_seconds() - 0.5).abs() < 1e-9);
        assert!((phase.share_of("checksum").unwrap() - 0.1).abs() < 1e-9);
        assert_eq!(phase.share_of("decode"), None);
    }

    #[test]
    fn the_table_reads_well() {
        let expected = "save, float: 0.400 s, 0.500 CPU seconds
  span                count     wall s      CPU s   of CPU
  encode                  1      0.250      0.200   40.0 %
  save                    1      0.050      0.100   20.0 %
  checksum                2      0.060      0.050   10.0 %
  not in a span                             0.150   30.0 %
";
        assert_eq!(phase().table(), expected);
    }

    #[test]
    fn the_timeline_is_a_trace_event_file() {
        let mut out = Vec::new();
        write_timeline(&mut out, &[phase(), phase()]).unwrap();
        let file: Value = serde_json::from_slice(&out).unwrap();
        let events = file["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 * (1 + 2 + 4));
        assert_eq!(events[0]["args"]["name"], "save, float");
        let encode = events.iter().find(|event| event["name"] == "encode").unwrap();
        assert_eq!(
            (&encode["ph"], &encode["pid"], &encode["tid"]),
            (&json!("X"), &json!(1), &json!(7))
        );
        assert_eq!(
            (encode["ts"].as_f64(), encode["dur"].as_f64()),
            (Some(10_000.0), Some(250_000.0))
        );
        assert_eq!(encode["args"], json!({"chunk": 3, "cpu_us": 220_000.0}));
        assert_eq!(events[7]["pid"], 2);
    }

    #[test]
    fn a_phase_holds_what_its_work_spent() {
        let recorder = Recorder::default();
        let (phase, sum) = Phase::record(&recorder, "sum".into(), || {
            (0..2_000_000_u64).map(std::hint::black_box).sum::<u64>()
        });
        assert_eq!(sum, 1_999_999_000_000);
        assert!(phase.cpu > Duration::ZERO && phase.wall > Duration::ZERO);
        assert!((phase.outside_seconds() - phase.cpu.as_secs_f64()).abs() < 1e-9);
    }
}
