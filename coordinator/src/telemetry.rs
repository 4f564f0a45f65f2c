//! Where logs and traces go, of the coordinator and of the processes that train.
//!
//! ```text
//! events ──┬─ RUST_LOG ───────────────► standard error, as text or JSON
//!          └─ target `dtruntime::span` ► spans ─► OTLP collector
//! ```
//!
//! Traces are sent where `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` say,
//! by the protocol in `OTEL_EXPORTER_OTLP_PROTOCOL` (`http/protobuf` unless it says `grpc`); the
//! other `OTEL_` variables mean what they mean everywhere. `JAEGER_AGENT_HOST`, of agents that are
//! gone, names the host of a Jaeger that takes OTLP.
//!
//! Always holds: a trace's id is the attempt's, so what every process reports of one attempt is one
//! trace; a collector that is away costs spans, never a save.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use dtr_proto::span::TARGET;
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};
use tokio::runtime::Runtime;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, Layer, Registry};

/// Any of them switches traces on.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
const PROTOCOLS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
/// Where Jaeger takes OTLP by HTTP.
const JAEGER_PORT: u16 = 4318;
/// How long the end of a process waits for its last spans to be taken.
const FAREWELL: Duration = Duration::from_secs(5);

/// What sends the spans of this process, once [`start`] has found a collector.
static SENDER: OnceLock<Sender> = OnceLock::new();

/// Starts logging, at `default_level` unless `RUST_LOG` says otherwise, and tracing, if a collector
/// is named; `service` is what the collector calls this process unless `OTEL_SERVICE_NAME` does.
/// Does nothing where the process has set up its own.
pub fn start(service: &'static str, default_level: &str) {
    let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_level));
    let is_json = environment("LOG_FORMAT").is_some_and(|format| format == "json");
    let text = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let text: Box<dyn Layer<Registry> + Send + Sync> =
        if is_json { text.json().boxed() } else { text.boxed() };
    let only_spans = Targets::new().with_target(TARGET, LevelFilter::TRACE);
    let collector = Collector::named_by(environment);
    let spans = collector.as_ref().map(|_| Spans.with_filter(only_spans));
    let subscriber = Registry::default().with(text.with_filter(filter)).with(spans);
    if tracing::subscriber::set_global_default(subscriber).is_err() {
        return; // somebody else's gets the events
    }
    let Some(collector) = collector else { return };
    if collector.is_legacy {
        tracing::warn!(
            "JAEGER_AGENT_HOST names an agent, which Jaeger has given up: traces go by OTLP to \
             port {JAEGER_PORT} of that host\nhint: publish port {JAEGER_PORT} there, and set \
             OTEL_EXPORTER_OTLP_ENDPOINT instead"
        );
    }
    match Sender::open(&collector, service) {
        Ok(sender) => drop(SENDER.set(sender)),
        Err(error) => tracing::warn!(
            "traces are not sent: {error}\nhint: write OTEL_EXPORTER_OTLP_ENDPOINT as \
             `http://collector:4318`"
        ),
    }
}

/// Waits, for a few seconds at most, until what was recorded so far has reached the collector.
pub fn flush() {
    if let Some(sender) = SENDER.get()
        && let Err(error) = sender.processor.force_flush()
    {
        tracing::debug!(%error, "spans were not taken");
    }
}

/// Sends what is left, and ends sending.
pub fn stop() {
    if let Some(sender) = SENDER.get()
        && let Err(error) = sender.processor.shutdown_with_timeout(FAREWELL)
    {
        tracing::debug!(%error, "the last spans were not taken");
    }
}

/// A collector of traces, as the environment names it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Collector {
    /// Where it is, if the `OTEL_` variables do not say it.
    url: Option<String>,
    /// Named by a variable of Jaeger's agents.
    is_legacy: bool,
    /// By gRPC instead of HTTP.
    is_grpc: bool,
}

impl Collector {
    fn named_by(environment: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let is_grpc =
            PROTOCOLS.iter().find_map(|name| environment(name)).as_deref() == Some("grpc");
        if ENDPOINTS.iter().any(|name| environment(name).is_some()) {
            return Some(Self { url: None, is_legacy: false, is_grpc });
        }
        let host = environment("JAEGER_AGENT_HOST")?;
        // An agent's port takes no OTLP.
        let url = format!("http://{host}:{JAEGER_PORT}/v1/traces");
        Some(Self { url: Some(url), is_legacy: true, is_grpc: false })
    }

    fn exporter(&self) -> Result<SpanExporter, ExporterBuildError> {
        let builder = SpanExporter::builder();
        match (&self.url, self.is_grpc) {
            (_, true) => builder.with_tonic().build(),
            (Some(url), false) => builder.with_http().with_endpoint(url).build(),
            (None, false) => builder.with_http().build(),
        }
    }
}

/// The way to a collector.
#[derive(Debug)]
struct Sender {
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
    /// What gRPC runs on.
    _runtime: Option<Runtime>,
}

impl Sender {
    fn open(
        collector: &Collector,
        service: &'static str,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let runtime = if collector.is_grpc {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            Some(builder.worker_threads(1).thread_name("dtr-traces").enable_all().build()?)
        } else {
            None
        };
        let exporter = {
            let _entered = runtime.as_ref().map(Runtime::enter);
            collector.exporter()?
        };
        let mut processor = BatchSpanProcessor::builder(exporter).build();
        let resource = Resource::builder();
        let resource = match std::env::var("OTEL_SERVICE_NAME") {
            Ok(_) => resource,
            Err(_) => resource.with_service_name(service),
        };
        processor.set_resource(&resource.build());
        let scope = InstrumentationScope::builder("dtruntime")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Ok(Self { processor, scope, _runtime: runtime })
    }
}

/// Makes spans of the events that describe them.
struct Spans;

impl<S: Subscriber> Layer<S> for Spans {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let Some(sender) = SENDER.get() else { return };
        let mut told = Told::default();
        event.record(&mut told);
        if let Some(span) = told.span(SystemTime::now(), &sender.scope) {
            sender.processor.on_end(span);
        }
    }
}

/// The fields of an event, as [`dtr_proto::span`] describes them.
#[derive(Debug, Default)]
struct Told {
    trace: String,
    name: String,
    id: String,
    parent: String,
    ago: Duration,
    took: Duration,
    error: String,
    attributes: Vec<KeyValue>,
}

impl Told {
    fn span(self, now: SystemTime, scope: &InstrumentationScope) -> Option<SpanData> {
        let trace = TraceId::from_hex(&self.trace).ok()?;
        let id = |name: &str| SpanId::from_bytes(id_of(&self.trace, name).to_le_bytes());
        let start_time = now.checked_sub(self.ago)?;
        let flags = TraceFlags::SAMPLED;
        Some(SpanData {
            span_context: SpanContext::new(trace, id(&self.id), flags, false, TraceState::NONE),
            parent_span_id: if self.parent.is_empty() { SpanId::INVALID } else { id(&self.parent) },
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            start_time,
            end_time: start_time + self.took,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: if self.error.is_empty() { Status::Ok } else { Status::error(self.error) },
            instrumentation_scope: scope.clone(),
            name: self.name.into(),
            attributes: self.attributes,
        })
    }

    fn set_text(&mut self, field: &Field, value: String) {
        match field.name() {
            "trace" => self.trace = value,
            "span" => self.name = value,
            "id" => self.id = value,
            "parent" => self.parent = value,
            "error" => self.error = value,
            name => self.attributes.push(KeyValue::new(name, value)),
        }
    }
}

impl Visit for Told {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set_text(field, value.to_owned());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "ago_us" => self.ago = Duration::from_micros(value),
            "took_us" => self.took = Duration::from_micros(value),
            name => {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                self.attributes.push(KeyValue::new(name, value));
            }
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.set_text(field, format!("{value:?}"));
    }
}

/// The same number in every process that reports this span; never 0, which means none.
fn id_of(trace: &str, name: &str) -> u64 {
    // Its keys are fixed.
    let mut hasher = DefaultHasher::new();
    (trace, name).hash(&mut hasher);
    hasher.finish().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(variables: &[(&str, &str)]) -> Option<Collector> {
        let variables: Vec<(String, String)> =
            variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        Collector::named_by(|name| {
            variables.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
        })
    }

    #[test]
    fn a_collector_is_named_by_the_environment_or_there_is_none() {
        assert_eq!(named(&[("OTEL_SERVICE_NAME", "x")]), None);
        let here = named(&[(ENDPOINTS[0], "http://c:4318")]).unwrap();
        assert_eq!(here, Collector { url: None, is_legacy: false, is_grpc: false });
        let grpc = named(&[(ENDPOINTS[1], "http://c:4317"), (PROTOCOLS[1], "grpc")]).unwrap();
        assert!(grpc.is_grpc);
        let agent = [("JAEGER_AGENT_HOST", "jaeger"), ("JAEGER_AGENT_PORT", "6831")];
        let legacy = named(&agent).unwrap();
        assert_eq!(legacy.url.as_deref(), Some("http://jaeger:4318/v1/traces"));
        assert!(legacy.is_legacy && !named(&[agent[0], (ENDPOINTS[0], "x")]).unwrap().is_legacy);
    }

    #[test]
    fn what_is_told_becomes_a_span_of_its_attempt() {
        let trace = "00112233445566778899aabbccddeeff";
        let told = |id: &str, parent: &str, error: &str| Told {
            trace: trace.into(),
            name: "capture".into(),
            id: id.into(),
            parent: parent.into(),
            ago: Duration::from_secs(3),
            took: Duration::from_secs(2),
            error: error.into(),
            attributes: vec![KeyValue::new("step", 7)],
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let scope = InstrumentationScope::builder("test").build();
        let whole = told("save/0", "", "").span(now, &scope).unwrap();
        let part = told("capture/0", "save/0", "no room").span(now, &scope).unwrap();
        assert_eq!(part.span_context.trace_id().to_string(), trace);
        assert_eq!(part.parent_span_id, whole.span_context.span_id());
        assert_eq!(whole.parent_span_id, SpanId::INVALID);
        assert_eq!(part.start_time, now - Duration::from_secs(3));
        assert_eq!(part.end_time, now - Duration::from_secs(1));
        assert_eq!((whole.status, part.status), (Status::Ok, Status::error("no room")));
        assert!(Told { trace: "no id".into(), ..told("x", "", "") }.span(now, &scope).is_none());
    }
}
