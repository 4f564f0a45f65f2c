//! How long the coordinator takes, by criterion: its state machine alone, and through gRPC on
//! loopback with the journal on disk.
//!
//! Goal: to see what a change does to the time of a heartbeat, a barrier and a commit. Not a goal:
//! the latency under the load of a large job, which depends on the network between machines.
//!
//! Always holds: what a call must bring about is checked, so that a fast refusal is no result.
#![expect(clippy::unwrap_used, reason = "a measurement stops at its first surprise")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::state::{Effects, Event, Moment, Policy, Reply, State};
use criterion::{BenchmarkId, Criterion, Throughput};
use dtr_proto::v1;
use dtr_proto::v1::barriers_client::BarriersClient;
use dtr_proto::v1::membership_client::MembershipClient;
use tonic::transport::{Channel, Endpoint};

mod service;

use service::Service;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let is_measuring = std::env::args().any(|argument| argument == "--bench");
    let scale = if is_measuring { Scale::FULL } else { Scale::TINY };
    measure_machine(&mut criterion, &scale);
    measure_service(&mut criterion, &scale);
    criterion.final_summary();
}

/// How many take part.
struct Scale {
    workers: u32,
    savers: u32,
    connected: u32,
    connections: u32,
}

impl Scale {
    const FULL: Self = Self { workers: 10_000, savers: 1_024, connected: 1_000, connections: 100 };
    const TINY: Self = Self { workers: 8, savers: 4, connected: 4, connections: 2 };
}

/// A job whose members all registered.
struct Job {
    state: State,
    identities: Vec<v1::Identity>,
    now_ms: u64,
    random: u128,
}

impl Job {
    fn new(world_size: u32) -> Self {
        let state = State::new(Policy::default(), 1);
        let mut job = Self { state, identities: Vec::new(), now_ms: 0, random: 0 };
        for rank in 0..world_size {
            let request = register_request(rank, world_size);
            let incarnation = request.incarnation;
            let worker_id = request.worker_id.clone();
            let reply = job.ask(Event::Register(request)).pop();
            let Some(Reply::Register(reply)) = reply else { panic!("{reply:?}") };
            let epoch = reply.epoch;
            job.identities.push(v1::Identity {
                job: "bench".into(),
                worker_id,
                incarnation,
                epoch,
            });
        }
        job
    }

    fn ask(&mut self, event: Event) -> Vec<Reply> {
        self.random += 1;
        let at = Moment { now_ms: self.now_ms, wall_ms: 0, random: self.random };
        let mut effects = Effects::default();
        self.state.apply(at, 1, event, &mut effects);
        effects.replies.into_iter().map(|(_, reply)| reply).collect()
    }

    fn arrive(&mut self, rank: usize, arrival: u64) -> usize {
        let identity = Some(self.identities[rank].clone());
        let name = "b".to_owned();
        let timeout_ms = 60_000;
        let alike = String::new();
        let request = v1::WaitBarrierRequest { identity, name, arrival, timeout_ms, alike };
        self.ask(Event::WaitBarrier(request)).len()
    }
}

fn register_request(rank: u32, world_size: u32) -> v1::RegisterRequest {
    v1::RegisterRequest {
        job: "bench".into(),
        worker_id: format!("worker-{rank}"),
        incarnation: u64::from(rank) + 1,
        rank,
        world_size,
        ip: "10.0.0.1".into(),
        port: 8080,
        ..v1::RegisterRequest::default()
    }
}

fn measure_machine(criterion: &mut Criterion, scale: &Scale) {
    let mut group = criterion.benchmark_group("machine");
    let mut job = Job::new(scale.workers);
    let mut next = 0;
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("heartbeat", scale.workers), |bencher| {
        bencher.iter(|| {
            next = (next + 1) % job.identities.len();
            let identity = Some(job.identities[next].clone());
            let replies = job.ask(Event::Heartbeat(v1::HeartbeatRequest { identity, progress: 1 }));
            assert!(matches!(replies[..], [Reply::Heartbeat(_)]));
        });
    });
    group.bench_function(BenchmarkId::new("tick", scale.workers), |bencher| {
        bencher.iter(|| job.ask(Event::Tick));
    });
    let workers = job.identities.len();
    let mut arrival = 0;
    group.bench_function(BenchmarkId::new("last arrival at a barrier", scale.workers), |bencher| {
        bencher.iter_custom(|rounds| {
            let mut spent = Duration::ZERO;
            for _ in 0..rounds {
                for rank in 0..workers - 1 {
                    arrival += 1;
                    assert_eq!(job.arrive(rank, arrival), 0);
                }
                arrival += 1;
                let started = Instant::now();
                let released = job.arrive(workers - 1, arrival);
                spent += started.elapsed();
                assert_eq!(released, workers);
            }
            spent
        });
    });
    group.bench_function(BenchmarkId::new("checkpoint", scale.savers), |bencher| {
        let mut job = Job::new(scale.savers);
        let mut step = 0;
        bencher.iter(|| {
            step += 1;
            save(&mut job, step);
        });
    });
    group.finish();
}

/// Every rank begins, reports, and the last one commits.
fn save(job: &mut Job, step: u64) {
    let mut attempt = String::new();
    for rank in 0..job.identities.len() {
        let identity = Some(job.identities[rank].clone());
        let begun = job.ask(Event::BeginCheckpoint(v1::BeginCheckpointRequest {
            identity,
            step,
            ..v1::BeginCheckpointRequest::default()
        }));
        let [Reply::BeginCheckpoint(begun)] = &begun[..] else { panic!("{begun:?}") };
        attempt.clone_from(&begun.attempt);
    }
    let mut publishers = 0;
    for rank in 0..job.identities.len() {
        let identity = Some(job.identities[rank].clone());
        let number = u32::try_from(rank).unwrap();
        let shard = v1::Shard { rank: number, bytes: 1 << 30, ..v1::Shard::default() };
        let attempt = attempt.clone();
        let replies = job.ask(Event::ReportShard(v1::ReportShardRequest {
            identity,
            step,
            attempt,
            shard: Some(shard),
            ..v1::ReportShardRequest::default()
        }));
        publishers += replies.len();
    }
    assert_eq!(publishers, 1);
    let identity = Some(job.identities[0].clone());
    let request = v1::CommitCheckpointRequest { identity, step, attempt, manifest_crc32c: 1 };
    let told = job.ask(Event::CommitCheckpoint(request)).len();
    assert_eq!(told, job.identities.len());
}

async fn register_all(endpoint: &Endpoint, scale: &Scale) -> Vec<(Channel, v1::Identity)> {
    let mut channels = Vec::new();
    for _ in 0..scale.connections {
        channels.push(endpoint.connect().await.unwrap());
    }
    let mut joining = Vec::new();
    for rank in 0..scale.connected {
        let index = usize::try_from(rank % scale.connections).unwrap();
        let channel = channels[index].clone();
        let request = register_request(rank, scale.connected);
        joining.push(tokio::spawn(async move {
            let (worker_id, incarnation) = (request.worker_id.clone(), request.incarnation);
            let reply = MembershipClient::new(channel.clone()).register(request).await.unwrap();
            let epoch = reply.into_inner().epoch;
            (channel, v1::Identity { job: "bench".into(), worker_id, incarnation, epoch })
        }));
    }
    let mut workers = Vec::new();
    for worker in joining {
        workers.push(worker.await.unwrap());
    }
    workers
}

fn measure_service(criterion: &mut Criterion, scale: &Scale) {
    let service = Service::start();
    let workers = service.runtime.block_on(register_all(&service.endpoint, scale));
    let mut group = criterion.benchmark_group("service");
    let (channel, identity) = workers[0].clone();
    group.bench_function("heartbeat", |bencher| {
        bencher.iter(|| {
            let mut client = MembershipClient::new(channel.clone());
            let identity = Some(identity.clone());
            let request = v1::HeartbeatRequest { identity, progress: 1 };
            service.runtime.block_on(client.heartbeat(request)).unwrap()
        });
    });
    let workers = Arc::new(workers);
    let mut arrival = 0;
    group.bench_function(BenchmarkId::new("barrier", scale.connected), |bencher| {
        bencher.iter(|| {
            arrival += u64::from(scale.connected);
            service.runtime.block_on(meet(&workers, arrival));
        });
    });
    group.finish();
}

/// Everybody arrives, and everybody is released; the journal is written once.
async fn meet(workers: &[(Channel, v1::Identity)], arrival: u64) {
    let mut waits = Vec::new();
    for ((channel, identity), key) in workers.iter().cloned().zip(arrival..) {
        waits.push(tokio::spawn(async move {
            let request = v1::WaitBarrierRequest {
                identity: Some(identity),
                name: "b".into(),
                arrival: key,
                timeout_ms: 60_000,
                alike: String::new(),
            };
            BarriersClient::new(channel).wait_barrier(request).await.unwrap().into_inner().outcome
        }));
    }
    for wait in waits {
        let outcome = wait.await.unwrap();
        assert!(
            matches!(outcome, Some(v1::wait_barrier_reply::Outcome::Released(_))),
            "{outcome:?}"
        );
    }
}
