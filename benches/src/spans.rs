//! A recorder of spans: who was in which span, from when to when, and what it cost that thread.
//!
//! ```text
//! thread   |  save ................................  |
//!          |     capture ..............              |     self CPU of `capture`: its own CPU time
//!          |        copy ...   copy ...              |     less that of the two `copy` in it
//! ```
//!
//! Always holds: each time a span is entered and left is one record; CPU time is that of the thread
//! between the two, kernel included; where spans are left in the reverse order in which they were
//! entered, the self CPU times of a thread add up to the time in its outermost spans, so none is
//! counted twice. The recorder knows no span's name.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// One stay of one thread in a span.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanRecord {
    /// The span's name.
    pub name: &'static str,
    /// The thread, as the kernel numbers it.
    pub thread: i32,
    /// When it was entered, from the recorder's start.
    pub start: Duration,
    /// How long the stay was.
    pub wall: Duration,
    /// CPU time of the thread in it.
    pub cpu: Duration,
    /// The same without what was spent in spans within it.
    pub self_cpu: Duration,
    /// The span's fields.
    pub fields: Map<String, Value>,
}

/// What was recorded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recording {
    /// In the order in which spans were left.
    pub spans: Vec<SpanRecord>,
    /// Names of the threads, by the kernel's numbers.
    pub threads: BTreeMap<i32, String>,
}

/// A layer that records spans while it is told to. Clones are one recorder.
#[derive(Clone, Debug)]
pub struct Recorder {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    epoch: Instant,
    is_on: AtomicBool,
    recording: Mutex<Recording>,
}

impl Default for Recorder {
    fn default() -> Self {
        let shared = Shared {
            epoch: Instant::now(),
            is_on: AtomicBool::new(false),
            recording: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }
}

impl Recorder {
    /// Forgets what was recorded, and records spans that are entered from now on.
    pub fn start(&self) {
        *self.recording() = Recording::default();
        self.shared.is_on.store(true, Ordering::SeqCst);
    }

    /// Stops, and gives what was recorded: spans that were entered and left since the start.
    pub fn stop(&self) -> Recording {
        self.shared.is_on.store(false, Ordering::SeqCst);
        std::mem::take(&mut *self.recording())
    }

    /// Time since the recorder's start, as [`SpanRecord::start`] counts it.
    pub fn now(&self) -> Duration {
        self.shared.epoch.elapsed()
    }

    fn recording(&self) -> MutexGuard<'_, Recording> {
        self.shared.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A span that the current thread is in.
struct Open {
    id: Id,
    start: Duration,
    cpu_at_start: Duration,
    /// CPU time of spans within it that have been left.
    cpu_within: Duration,
}

thread_local! {
    /// Outermost first.
    static OPEN: RefCell<Vec<Open>> = const { RefCell::new(Vec::new()) };
}

impl<S> Layer<S> for Recorder
where
    S: tracing::Subscriber + for<'lookup> LookupSpan<'lookup>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_enter(&self, id: &Id, _context: Context<'_, S>) {
        if self.shared.is_on.load(Ordering::Relaxed) {
            let start = self.now();
            let open = Open {
                id: id.clone(),
                start,
                cpu_at_start: cpu_of(ClockId::ThreadCPUTime),
                cpu_within: Duration::ZERO,
            };
            OPEN.with_borrow_mut(|spans| spans.push(open));
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        // Entered before the recording began: no record.
        let Some(left) = OPEN.with_borrow_mut(|spans| leave(spans, id)) else { return };
        let Some(span) = context.span(id).filter(|_| self.shared.is_on.load(Ordering::SeqCst))
        else {
            return;
        };
        let fields = span.extensions().get::<Fields>().map(|fields| fields.0.clone());
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let record = SpanRecord {
            name: span.name(),
            thread,
            start: left.open.start,
            wall: self.now().saturating_sub(left.open.start),
            cpu: left.cpu,
            self_cpu: left.cpu.saturating_sub(left.open.cpu_within),
            fields: fields.unwrap_or_default(),
        };
        let mut recording = self.recording();
        recording.threads.entry(thread).or_insert_with(thread_name);
        recording.spans.push(record);
    }
}

struct Left {
    open: Open,
    cpu: Duration,
}

/// Takes a span off the open ones, and counts its CPU time as spent within the one around it.
fn leave(spans: &mut Vec<Open>, id: &Id) -> Option<Left> {
    // Nearly always the last; a guard may outlive the one around it.
    let position = spans.iter().rposition(|open| open.id == *id)?;
    let open = spans.remove(position);
    let cpu = cpu_of(ClockId::ThreadCPUTime).saturating_sub(open.cpu_at_start);
    if let Some(around) = position.checked_sub(1) {
        spans[around].cpu_within += cpu;
    }
    Some(Left { open, cpu })
}

/// CPU time of this process and of all its threads, kernel included.
pub fn process_cpu() -> Duration {
    cpu_of(ClockId::ProcessCPUTime)
}

fn cpu_of(clock: ClockId) -> Duration {
    // CPU clocks start at zero and never go back.
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}

fn thread_name() -> String {
    std::thread::current().name().unwrap_or("unnamed").to_owned()
}

/// A span's fields, as JSON.
#[derive(Debug, Default)]
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").into());
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use tracing::{trace_span, warn_span};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// What a recorder sees while `work` runs on this thread.
    fn recorded(work: impl FnOnce()) -> Recording {
        let recorder = Recorder::default();
        let subscriber = tracing_subscriber::registry().with(recorder.clone());
        tracing::subscriber::with_default(subscriber, || {
            recorder.start();
            work();
            recorder.stop()
        })
    }

    fn burn(time: Duration) {
        let end = cpu_of(ClockId::ThreadCPUTime) + time;
        while cpu_of(ClockId::ThreadCPUTime) < end {
            black_box(());
        }
    }

    const TICK: Duration = Duration::from_millis(5);

    #[test]
    fn self_times_add_up_to_the_outermost_span() {
        let recording = recorded(|| {
            let _outer = trace_span!("outer").entered();
            burn(TICK);
            for _ in 0..2 {
                let _middle = trace_span!("middle").entered();
                trace_span!("inner").in_scope(|| burn(TICK));
            }
        });
        let names: Vec<_> = recording.spans.iter().map(|span| span.name).collect();
        assert_eq!(names, ["inner", "middle", "inner", "middle", "outer"]);
        let outer = &recording.spans[4];
        let total: Duration = recording.spans.iter().map(|span| span.self_cpu).sum();
        assert_eq!(total, outer.cpu);
        assert!(outer.self_cpu >= TICK && outer.cpu >= 3 * TICK && outer.wall >= outer.cpu);
        assert!(recording.spans[0].self_cpu >= TICK && recording.spans[1].self_cpu < TICK);
        assert!(outer.start <= recording.spans[0].start);
    }

    #[test]
    fn waiting_takes_no_cpu_time() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let recording = recorded(|| {
            let _wait = trace_span!("wait").entered();
            let _nothing = receiver.recv_timeout(4 * TICK);
        });
        drop(sender);
        let wait = &recording.spans[0];
        assert!(wait.wall >= 4 * TICK && wait.cpu < wait.wall / 2, "{wait:?}");
    }

    #[test]
    fn a_span_entered_twice_is_two_records_with_its_fields() {
        let recording = recorded(|| {
            let span = warn_span!("write", bytes = 42_u64, name = "x", ok = true, late = 0_i64);
            span.record("late", -7);
            span.in_scope(|| ());
            span.in_scope(|| ());
        });
        assert_eq!(recording.spans.len(), 2);
        for span in &recording.spans {
            let fields = Value::Object(span.fields.clone());
            let expected = serde_json::json!({"bytes": 42, "name": "x", "ok": true, "late": -7});
            assert_eq!((span.name, fields), ("write", expected));
        }
    }

    #[test]
    fn each_thread_has_its_own_stack_and_name() {
        let recorder = Recorder::default();
        let subscriber = Arc::new(tracing_subscriber::registry().with(recorder.clone()));
        recorder.start();
        std::thread::scope(|scope| {
            for name in ["one", "two"] {
                let subscriber = Arc::clone(&subscriber);
                let work = move || {
                    tracing::subscriber::with_default(subscriber, || {
                        let _work = trace_span!("work").entered();
                        burn(TICK);
                    });
                };
                std::thread::Builder::new().name(name.into()).spawn_scoped(scope, work).unwrap();
            }
        });
        let recording = recorder.stop();
        assert!(recording.spans.iter().all(|span| span.self_cpu == span.cpu && span.cpu >= TICK));
        let named: Vec<_> =
            recording.spans.iter().map(|span| recording.threads[&span.thread].as_str()).collect();
        assert!(named == ["one", "two"] || named == ["two", "one"], "{named:?}");
    }

    #[test]
    fn guards_may_be_dropped_in_any_order() {
        let recording = recorded(|| {
            let first = trace_span!("first").entered();
            let second = trace_span!("second").entered();
            burn(TICK);
            drop(first);
            drop(second);
            OPEN.with_borrow(|spans| assert!(spans.is_empty()));
        });
        assert_eq!(recording.spans.len(), 2);
    }

    #[test]
    fn nothing_is_recorded_before_the_start_or_after_the_stop() {
        let recorder = Recorder::default();
        let subscriber = tracing_subscriber::registry().with(recorder.clone());
        tracing::subscriber::with_default(subscriber, || {
            let early = trace_span!("early").entered();
            recorder.start();
            drop(early);
            let late = trace_span!("late").entered();
            assert_eq!(recorder.stop(), Recording::default());
            drop(late);
            recorder.start();
            trace_span!("seen").in_scope(|| ());
            let names: Vec<_> = recorder.stop().spans.iter().map(|span| span.name).collect();
            assert_eq!(names, ["seen"]);
        });
    }
}
