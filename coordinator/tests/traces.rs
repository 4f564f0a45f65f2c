//! Traces, as a collector gets them by gRPC.
#![expect(clippy::unwrap_used, dead_code, reason = "a test stops at its first surprise")]

mod support;

use std::sync::{Arc, Mutex};

use dtr_proto::client::{ShardOutcome, ShardReport, Worker};
use dtr_proto::v1;
use opentelemetry::trace::TraceId;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use support::{Program, connect, register, until};
use tempfile::tempdir;
use tokio::runtime::Runtime;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Records what it receives: services' names and spans.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().unwrap();
        for told in request.into_inner().resource_spans {
            let resource = format!("{:?}", told.resource);
            for scope in told.scope_spans {
                kept.extend(scope.spans.into_iter().map(|span| (resource.clone(), span)));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Starts one; its URL.
fn collect(runtime: &Runtime) -> (Collector, String) {
    let collector = Collector::default();
    let service = TraceServiceServer::new(collector.clone());
    let _entered = runtime.enter();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", incoming.local_addr().unwrap());
    let server = tonic::transport::Server::builder().add_service(service);
    runtime.spawn(server.serve_with_incoming(incoming));
    (collector, url)
}

/// The whole of a save by one rank, but for the bytes.
fn save(worker: &Worker, step: u64) -> String {
    let attempt = worker.begin_checkpoint(step, false).join().unwrap().attempt;
    let shard =
        v1::Shard { rank: 0, file: "rank-00000.shard".into(), bytes: 9, ..v1::Shard::default() };
    let report =
        ShardReport { shard, own_store: false, published_crc32c: None, replicated_crc32c: None };
    let reported = worker.report_shard(step, &attempt, report).join().unwrap();
    assert!(matches!(reported, ShardOutcome::Publish(_)));
    worker.commit_checkpoint(step, &attempt, 77).join().unwrap();
    attempt
}

#[test]
fn the_coordinator_tells_a_collector_of_attempts_that_ended() {
    let runtime = Runtime::new().unwrap();
    let (collector, url) = collect(&runtime);
    let folder = tempdir().unwrap();
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ];
    let program = Program::start_in(folder.path(), &[], &environment);
    let worker = register(&connect(&program.url()), 0, 1).unwrap();
    let committed = save(&worker, 5);
    let given_up = worker.begin_checkpoint(6, false).join().unwrap().attempt;
    worker.abort_checkpoint(6, &given_up, "no room", true).join().unwrap();
    until("five spans", || collector.0.lock().unwrap().len() >= 5);
    let spans = collector.0.lock().unwrap().clone();
    let of = |attempt: &str| -> Vec<&Span> {
        let hex = |id: &[u8]| TraceId::from_bytes(id.try_into().unwrap()).to_string();
        spans.iter().map(|(_, span)| span).filter(|span| hex(&span.trace_id) == attempt).collect()
    };
    let names = |spans: &[&Span]| spans.iter().map(|span| span.name.clone()).collect::<Vec<_>>();
    let whole = of(&committed);
    assert_eq!(names(&whole), ["checkpoint", "all ranks write", "one rank publishes"]);
    assert!(whole[1..].iter().all(|span| span.parent_span_id == whole[0].span_id));
    let failed = of(&given_up);
    assert_eq!(names(&failed), ["checkpoint", "all ranks write"]);
    let status = failed[0].status.as_ref().unwrap();
    assert!(status.code == 2 && status.message.contains("no room"), "{status:?}");
    assert!(spans.iter().all(|(resource, _)| resource.contains("coordinator")), "{spans:?}");
}
