//! How a service bears a large job: ten thousand workers on a thousand connections, on loopback.
//!
//! ```text
//! schedule, one beat a worker and second ──► a call at its time, whatever became of earlier ones
//!                                                └── latency: from the scheduled time to the reply
//! ```
//!
//! Goal: the latency of heartbeats under their full load, and how soon a barrier and a commit reach
//! everybody after the last one has come. Beside the coordinator, on request, the keep-alives of as
//! many leases in etcd. `benches/compare/coordinator.py` starts the services and makes the table.
//!
//! Always holds: the load is open, so a service that falls behind is charged for it; every reply is
//! checked, so that a fast refusal is no result; a warm-up of one period is not counted.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement stops at its first surprise, and is printed"
)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use dtr_proto::v1;
use dtr_proto::v1::barriers_client::BarriersClient;
use dtr_proto::v1::checkpoints_client::CheckpointsClient;
use dtr_proto::v1::membership_client::MembershipClient;
use dtr_proto::v1::shard_outcome::Outcome;
use dtr_proto::v1::wait_barrier_reply::Outcome as Waited;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};

/// As in the coordinator, so that it is the service that is measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Between two beats of a worker.
const PERIOD: Duration = Duration::from_secs(1);
/// How long the last one waits until all others surely have come.
const SETTLE: Duration = Duration::from_secs(2);
/// Calls in flight while everybody registers.
const REGISTERING: usize = 256;

#[derive(Clone, Debug, Parser)]
#[command(about = "Ten thousand workers on a thousand connections")]
struct Options {
    /// Where the service listens, `http://127.0.0.1:50051`.
    url: String,
    /// Whether that is etcd: leases and their keep-alives only.
    #[arg(long)]
    etcd: bool,
    /// Workers that beat, one heartbeat a second each.
    #[arg(long, default_value_t = 10_000)]
    workers: u32,
    /// Connections that they share.
    #[arg(long, default_value_t = 1_000)]
    connections: u32,
    /// Ranks that save together.
    #[arg(long, default_value_t = 1_024)]
    ranks: u32,
    /// How long the heartbeats are counted.
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// How often a barrier and a commit are measured.
    #[arg(long, default_value_t = 10)]
    rounds: u32,
}

fn main() {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channels = connect(&options).await;
        let beats = if options.etcd {
            leases(&options, &channels).await
        } else {
            coordinator(&options, &channels).await
        };
        print("heartbeat", &beats);
    });
}

async fn connect(options: &Options) -> Vec<Channel> {
    let endpoint = Endpoint::from_shared(options.url.clone()).unwrap().tcp_nodelay(true);
    let mut channels = Vec::new();
    for _ in 0..options.connections {
        channels.push(endpoint.connect().await.unwrap());
    }
    channels
}

/// `name`, how many there were, and the median, 99th and worst of them in milliseconds.
fn print(name: &str, latencies: &[Duration]) {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    let at = |part: f64| {
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a rank")]
        #[expect(clippy::cast_sign_loss, reason = "a part is positive")]
        let place = ((sorted.len() - 1) as f64 * part).ceil() as usize;
        sorted[place].as_secs_f64() * 1e3
    };
    println!("{name}\t{}\t{:.2}\t{:.2}\t{:.2}", sorted.len(), at(0.5), at(0.99), at(1.0));
}

/// When each beat of a worker is due: all workers spread over the period.
fn schedule(start: Instant, worker: u32, workers: u32) -> Instant {
    start + PERIOD.mul_f64(f64::from(worker) / f64::from(workers))
}

/// One rank of a job, and its way to the coordinator.
#[derive(Clone)]
struct Member {
    channel: Channel,
    identity: v1::Identity,
    rank: u32,
}

/// A job, all of whose members have registered.
async fn job(channels: &[Channel], name: &str, size: u32) -> Vec<Member> {
    let mut members = all((0..size).collect(), |rank| {
        let channel = channels[rank as usize % channels.len()].clone();
        let request = v1::RegisterRequest {
            job: name.into(),
            worker_id: format!("worker-{rank}"),
            incarnation: u64::from(rank) + 1,
            rank,
            world_size: size,
            ..v1::RegisterRequest::default()
        };
        async move {
            let (job, worker_id) = (request.job.clone(), request.worker_id.clone());
            let incarnation = request.incarnation;
            let reply = MembershipClient::new(channel.clone()).register(request).await.unwrap();
            let epoch = reply.into_inner().epoch;
            Member { channel, identity: v1::Identity { job, worker_id, incarnation, epoch }, rank }
        }
    })
    .await;
    members.sort_unstable_by_key(|member| member.rank);
    members
}

/// Does something with each of many, a few at a time; what it gave, in any order.
async fn all<I, T, F>(items: Vec<I>, act: impl Fn(I) -> F) -> Vec<T>
where
    I: Copy,
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let mut done = Vec::with_capacity(items.len());
    for some in items.chunks(REGISTERING) {
        let acting: JoinSet<T> = some.iter().map(|item| act(*item)).collect();
        done.extend(acting.join_all().await);
    }
    done
}

/// Heartbeats of one job, and beside them the barriers of another and the saves of two more.
async fn coordinator(options: &Options, channels: &[Channel]) -> Vec<Duration> {
    let beating = job(channels, "beating", options.workers).await;
    let meeting = job(channels, "meeting", options.workers).await;
    let pairs = [("saving", options.ranks), ("saving apart", options.ranks)];
    let saving = job(channels, pairs[0].0, pairs[0].1).await;
    let apart = job(channels, pairs[1].0, pairs[1].1).await;
    let few = job(channels, "few", options.ranks).await;
    let beats = beat_for(&beating, options.seconds).await;
    for (name, members) in [("barrier", &meeting), ("barrier of the ranks", &few)] {
        let mut releases = Vec::new();
        for round in 1..=options.rounds {
            releases.push(meet(members, u64::from(round)).await);
        }
        print(name, &releases);
    }
    for (name, members, own_store) in
        [("commit", &saving, false), ("commit in own stores", &apart, true)]
    {
        let mut commits = Vec::new();
        for step in 1..=options.rounds {
            commits.push(save(members, u64::from(step), own_store).await);
        }
        print(name, &commits);
    }
    beats
}

async fn beat_for(members: &[Member], seconds: u32) -> Vec<Duration> {
    let start = Instant::now() + Duration::from_millis(200);
    let workers = u32::try_from(members.len()).unwrap();
    let mut beating = JoinSet::new();
    for member in members.iter().cloned() {
        beating.spawn(async move {
            let first = schedule(start, member.rank, workers);
            let mut calls = JoinSet::new();
            for round in 0..=seconds {
                let due = first + PERIOD * round;
                sleep_until(due).await;
                calls.spawn(beat(member.clone(), round, due));
            }
            // The first one is the warm-up.
            calls.join_all().await.into_iter().filter(|(round, _)| *round > 0).collect::<Vec<_>>()
        });
    }
    let beats = beating.join_all().await;
    beats.into_iter().flatten().map(|(_, latency)| latency).collect()
}

async fn beat(member: Member, round: u32, due: Instant) -> (u32, Duration) {
    let identity = Some(member.identity);
    let request = v1::HeartbeatRequest { identity, progress: u64::from(round) };
    let reply = MembershipClient::new(member.channel).heartbeat(request).await.unwrap();
    assert!(reply.into_inner().abort_reason.is_empty());
    (round, due.elapsed())
}

/// All but one arrive; how long after the last one everybody has been released.
async fn meet(members: &[Member], arrival: u64) -> Duration {
    let mut waits = JoinSet::new();
    let (last, others) = members.split_last().unwrap();
    for member in others.iter().cloned() {
        waits.spawn(arrive(member, arrival));
    }
    sleep(SETTLE).await;
    let start = Instant::now();
    waits.spawn(arrive(last.clone(), arrival));
    waits.join_all().await;
    start.elapsed()
}

async fn arrive(member: Member, arrival: u64) {
    let request = v1::WaitBarrierRequest {
        identity: Some(member.identity),
        name: "b".into(),
        arrival,
        timeout_ms: 60_000,
        alike: String::new(),
    };
    let reply = BarriersClient::new(member.channel).wait_barrier(request).await.unwrap();
    let outcome = reply.into_inner().outcome;
    assert!(matches!(outcome, Some(Waited::Released(_))), "{outcome:?}");
}

/// All but one report; how long after the last one everybody knows of the commit. Manifests are
/// written in no time.
async fn save(members: &[Member], step: u64, own_store: bool) -> Duration {
    let mut begins = JoinSet::new();
    for member in members.iter().cloned() {
        begins.spawn(async move {
            let identity = Some(member.identity);
            let request = v1::BeginCheckpointRequest { identity, step, ..Default::default() };
            let begun = CheckpointsClient::new(member.channel).begin_checkpoint(request).await;
            begun.unwrap().into_inner().attempt
        });
    }
    let attempts = begins.join_all().await;
    assert!(attempts.windows(2).all(|pair| pair[0] == pair[1]), "one attempt");
    let mut waits = JoinSet::new();
    let (last, others) = members.split_last().unwrap();
    for member in others.iter().cloned() {
        waits.spawn(report(member, step, attempts[0].clone(), own_store));
    }
    sleep(SETTLE).await;
    let start = Instant::now();
    waits.spawn(report(last.clone(), step, attempts[0].clone(), own_store));
    waits.join_all().await;
    start.elapsed()
}

/// Reports until the attempt is committed, publishing where it is asked to.
async fn report(member: Member, step: u64, attempt: String, own_store: bool) {
    let mut client = CheckpointsClient::new(member.channel);
    let shard = v1::Shard {
        rank: member.rank,
        file: format!("rank-{:05}.{attempt}.shard", member.rank),
        bytes: 1 << 30,
        raw_bytes: 1 << 30,
        ..v1::Shard::default()
    };
    let mut published_crc32c = None;
    loop {
        let request = v1::ReportShardRequest {
            identity: Some(member.identity.clone()),
            step,
            attempt: attempt.clone(),
            shard: Some(shard.clone()),
            own_store,
            published_crc32c,
            replicated_crc32c: None,
        };
        let mut outcomes = client.report_shard(request).await.unwrap().into_inner();
        let mut is_asked = false;
        while let Some(part) = outcomes.message().await.unwrap() {
            match part.outcome.unwrap() {
                Outcome::Publish(_) => is_asked = true,
                Outcome::Committed(_) => return,
                Outcome::Aborted(aborted) => panic!("{aborted:?}"),
            }
        }
        assert!(is_asked, "an attempt ends");
        if own_store {
            published_crc32c = Some(7);
            continue;
        }
        let request = v1::CommitCheckpointRequest {
            identity: Some(member.identity.clone()),
            step,
            attempt: attempt.clone(),
            manifest_crc32c: 7,
        };
        client.commit_checkpoint(request).await.unwrap();
        return;
    }
}

/// What etcd's `Lease` service is asked and answers, as far as it is needed here.
mod etcd {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct GrantRequest {
        #[prost(int64, tag = "1")]
        pub(super) ttl: i64,
        #[prost(int64, tag = "2")]
        pub(super) id: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct KeepAliveRequest {
        #[prost(int64, tag = "1")]
        pub(super) id: i64,
    }

    /// Of both calls.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Reply {
        #[prost(int64, tag = "2")]
        pub(super) id: i64,
        #[prost(int64, tag = "3")]
        pub(super) ttl: i64,
    }
}

/// Beats whose replies are awaited, by lease: when each was due, and its round.
type Awaited = Arc<Mutex<HashMap<i64, Vec<(u32, Instant)>>>>;

/// A lease for each worker, kept alive once a second; one stream a connection.
async fn leases(options: &Options, channels: &[Channel]) -> Vec<Duration> {
    let workers = options.workers;
    all((1..=workers).collect(), |id| {
        grant(channels[id as usize % channels.len()].clone(), i64::from(id))
    })
    .await;
    let start = Instant::now() + Duration::from_millis(200);
    let mut streams = JoinSet::new();
    for (place, channel) in channels.iter().cloned().enumerate() {
        let stride = channels.len();
        let own: Vec<u32> = (1..=workers).filter(|id| *id as usize % stride == place).collect();
        streams.spawn(keep_alive(channel, own, start, options.clone()));
    }
    streams.join_all().await.into_iter().flatten().collect()
}

async fn grant(channel: Channel, id: i64) {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let request = tonic::Request::new(etcd::GrantRequest { ttl: 600, id });
    let path = "/etcdserverpb.Lease/LeaseGrant".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<_, etcd::Reply>::default();
    let reply = client.unary(request, path, codec).await.unwrap();
    assert_eq!(reply.into_inner().id, id);
}

async fn keep_alive(
    channel: Channel,
    ids: Vec<u32>,
    start: Instant,
    options: Options,
) -> Vec<Duration> {
    let (requests, stream) = mpsc::unbounded_channel();
    let awaited = Awaited::default();
    let beats = ids.len() * (options.seconds as usize + 1);
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let request = tonic::Request::new(UnboundedReceiverStream::new(stream));
    let path = "/etcdserverpb.Lease/LeaseKeepAlive".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<etcd::KeepAliveRequest, etcd::Reply>::default();
    for id in ids {
        let (requests, awaited) = (requests.clone(), Arc::clone(&awaited));
        let first = schedule(start, id, options.workers);
        tokio::spawn(async move {
            for round in 0..=options.seconds {
                let due = first + PERIOD * round;
                sleep_until(due).await;
                awaited.lock().unwrap().entry(i64::from(id)).or_default().push((round, due));
                requests.send(etcd::KeepAliveRequest { id: i64::from(id) }).unwrap();
            }
        });
    }
    let mut replies = client.streaming(request, path, codec).await.unwrap().into_inner();
    let mut latencies = Vec::with_capacity(beats);
    for _ in 0..beats {
        let reply = replies.message().await.unwrap().unwrap();
        assert!(reply.ttl > 0, "the lease is kept");
        let (round, due) = awaited.lock().unwrap().get_mut(&reply.id).unwrap().remove(0);
        if round > 0 {
            latencies.push(due.elapsed());
        }
    }
    latencies
}
