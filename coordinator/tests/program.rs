//! The program as an operator meets it: messages, pages, tokens, TLS, and that it outlives kills.
#![expect(clippy::unwrap_used, reason = "a test stops at its first surprise")]

#[path = "support/budget.rs"]
mod budget;
mod support;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use budget::{budget, tell};
use dtr_proto::client::{Connection, ErrorKind, Options, ShardOutcome, ShardReport};
use dtr_proto::v1;
use dtr_proto::v1::admin_client::AdminClient;
use dtr_proto::v1::checkpoints_client::CheckpointsClient;
use dtr_proto::v1::membership_client::MembershipClient;
use support::{LONG, Program, connect, page, register, run_to_end, until};
use tempfile::tempdir;
use tonic::transport::Channel;
use tonic::{Code, Request};

#[test]
fn a_port_in_use_is_one_clear_message() {
    let folder = tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let (code, _, error) = run_to_end(folder.path(), &[&address, "--metrics-address=off"]);
    assert_eq!(code, Some(1));
    assert!(error.contains(&format!("error: listening on `{address}`: Address already in use")));
    assert!(error.contains(&format!("hint: another process has port {port}")), "{error}");
    assert!(error.contains("or change `coordinator.address`"), "{error}");
    let metrics = format!("--metrics-address={address}");
    let (_, _, error) = run_to_end(folder.path(), &["127.0.0.1:0", &metrics]);
    assert!(error.contains("or change `coordinator.metrics_address`"), "{error}");
}

#[test]
fn addresses_that_cannot_be_had_are_explained() {
    let folder = tempdir().unwrap();
    let (_, _, error) = run_to_end(folder.path(), &["203.0.113.7:50051"]);
    assert!(error.contains("hint: this machine has no such address: use 0.0.0.0"), "{error}");
    let (code, _, error) = run_to_end(folder.path(), &["50051"]);
    assert_eq!(code, Some(1));
    let expected = "error: `coordinator.address` = \"50051\" in the command line: `host:port` is \
                    expected\nhint: it is where workers connect; the default is \
                    \"127.0.0.1:50051\"\n";
    assert_eq!(error, expected);
}

#[test]
fn the_configuration_is_checked_and_printed() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("coordinator.toml");
    fs::write(&file, "[coordinator]\nheartbeat_timeout_ms = 9000\n").unwrap();
    let (code, out, _) = run_to_end(folder.path(), &["check-config"]);
    assert_eq!((code, out.as_str()), (Some(0), "the configuration is right\n"));
    let (_, printed, _) = run_to_end(folder.path(), &["0.0.0.0:7", "--print-config"]);
    assert!(printed.contains("heartbeat_timeout_ms = 9000  # "), "{printed}");
    assert!(printed.contains("address = \"0.0.0.0:7\"  # "), "{printed}");
    fs::write(&file, printed).unwrap();
    assert_eq!(run_to_end(folder.path(), &["check-config"]).0, Some(0));
    fs::write(&file, "[coordinator]\nheartbeat_tmeout_ms = 9000\n").unwrap();
    let (code, _, error) = run_to_end(folder.path(), &["check-config"]);
    assert_eq!(code, Some(1));
    assert!(error.ends_with("hint: did you mean `heartbeat_timeout_ms`?\n"), "{error}");
}

#[test]
fn wrong_tls_files_are_one_clear_message() {
    let folder = tempdir().unwrap();
    let set = "--set=coordinator.tls={ cert = \"server.pem\", key = \"server.key\" }";
    let arguments = ["127.0.0.1:0", "--metrics-address=off", "--state-path=j.redb", set];
    let (code, _, error) = run_to_end(folder.path(), &arguments);
    assert_eq!(code, Some(1));
    assert!(error.contains("error: `coordinator.tls.cert` = \"server.pem\": No such file"));
    assert!(error.contains("\nhint: name a file that the coordinator's user can read"), "{error}");
    fs::write(folder.path().join("server.pem"), "no PEM").unwrap();
    fs::write(folder.path().join("server.key"), "no PEM").unwrap();
    let (code, _, error) = run_to_end(folder.path(), &arguments);
    assert_eq!(code, Some(1));
    assert!(error.contains("hint: check that the files are PEM"), "{error}");
}

#[test]
fn a_second_coordinator_on_one_journal_is_refused() {
    let folder = tempdir().unwrap();
    let program = Program::start(folder.path(), &[]);
    let path = format!("--state-path={}", folder.path().join("journal.redb").display());
    let (code, _, error) =
        run_to_end(folder.path(), &["127.0.0.1:0", "--metrics-address=off", &path]);
    assert_eq!(code, Some(1));
    assert!(error.contains("hint: another coordinator uses it"), "{error}");
    drop(program);
}

#[test]
fn pages_and_metrics_are_there() {
    let folder = tempdir().unwrap();
    let program = Program::start(folder.path(), &[]);
    let worker = register(&connect(&program.url()), 0, 1).unwrap();
    let port = program.metrics_port;
    assert_eq!(page(port, "/healthz"), ("HTTP/1.1 200 OK".into(), "ok\n".into()));
    assert_eq!(page(port, "/readyz"), ("HTTP/1.1 200 OK".into(), "ready\n".into()));
    until("a heartbeat", || {
        let (_, text) = page(port, "/metrics");
        let line = "coordinator_heartbeats_total{job=\"default\"} ";
        let count = text.lines().find_map(|found| found.strip_prefix(line)).map(str::to_owned);
        count.is_some_and(|count| count != "0")
    });
    let (_, text) = page(port, "/metrics");
    assert!(text.contains("\ncoordinator_workers_active{job=\"default\"} 1\n"), "{text}");
    worker.leave("").unwrap();
    let (_, text) = page(port, "/metrics");
    assert!(text.contains("\ncoordinator_workers_active{job=\"default\"} 0\n"), "{text}");
}

#[test]
fn health_says_whether_it_serves() {
    let folder = tempdir().unwrap();
    let mut program = Program::start(folder.path(), &[]);
    let address = format!("127.0.0.1:{}", program.port);
    let (code, out, error) = run_to_end(folder.path(), &["health", &address]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
    assert_eq!(out, format!("the coordinator at `{address}` serves\n"));
    // Without an address, the one of the configuration, asked on loopback.
    let everywhere = format!("[coordinator]\naddress = \"0.0.0.0:{}\"\n", program.port);
    fs::write(folder.path().join("coordinator.toml"), everywhere).unwrap();
    assert_eq!(run_to_end(folder.path(), &["health"]).1, out);
    program.kill();
    let (code, out, error) = run_to_end(folder.path(), &["health"]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(error.starts_with(&format!("error: the coordinator at `{address}`: ")), "{error}");
    assert!(error.contains("refused"), "{error}");
    assert!(error.contains("\nhint: name where it listens: `coordinator health "), "{error}");
    let usage = run_to_end(folder.path(), &["health", "--timeout=0"]);
    assert_eq!(usage.0, Some(2), "{}", usage.2);
}

#[test]
fn health_does_not_wait_for_ever_nor_take_any_service_for_a_coordinator() {
    let folder = tempdir().unwrap();
    // The kernel takes the connection, and nobody answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let arguments = ["health", &address, "--timeout=0.2"];
    let (code, _, error) = run_to_end(folder.path(), &arguments);
    assert_eq!(code, Some(1));
    assert!(error.contains("no answer within 0.2 s\nhint: it hangs"), "{error}");
    let program = Program::start(folder.path(), &[]);
    let pages = format!("127.0.0.1:{}", program.metrics_port);
    let (code, _, error) = run_to_end(folder.path(), &["health", &pages]);
    assert_eq!(code, Some(1));
    assert!(error.contains("\nhint: "), "{error}");
}

/// While calls in progress are allowed to end, probes have to be answered that no new ones should
/// come, whether they ask for a service or, as those of Kubernetes, for none.
#[test]
fn health_says_that_it_ends() {
    for service in ["dtruntime.v1.Membership", ""] {
        let folder = tempdir().unwrap();
        let program = Program::start(folder.path(), &[]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let question = tonic_health::pb::HealthCheckRequest { service: service.into() };
        runtime.block_on(async {
            let channel = Channel::from_shared(program.url()).unwrap().connect().await.unwrap();
            let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
            let mut watch = client.watch(question).await.unwrap().into_inner();
            let mut said = Vec::new();
            said.push(watch.message().await.unwrap().unwrap().status);
            program.terminate();
            said.push(watch.message().await.unwrap().unwrap().status);
            assert_eq!(said, [1, 2], "serving, then not: {service:?}");
        });
    }
}

/// A connection whose token is `token`.
fn with_token(program: &Program, token: Option<&str>) -> Connection {
    let options = Options {
        url: program.url(),
        token: token.map(str::to_owned),
        patience: LONG,
        ..Options::default()
    };
    Connection::open(&options).unwrap()
}

#[test]
fn a_token_is_asked_for() {
    let folder = tempdir().unwrap();
    fs::write(
        folder.path().join("tokens"),
        "operators-0123456789\ndefault of-one-job-0123456789\n",
    )
    .unwrap();
    let program = Program::start(folder.path(), &["--set=coordinator.token=tokens"]);
    let ask = |token, job: &str| {
        let connection = with_token(&program, token);
        let request = v1::ListWorkersRequest { job: job.into() };
        let asked = connection.ask("listing", request, |channel, request| async move {
            MembershipClient::new(channel).list_workers(request).await
        });
        asked.join().map(drop).map_err(|error| error.kind)
    };
    assert_eq!(ask(None, "default"), Err(ErrorKind::Unauthenticated));
    assert_eq!(ask(Some("wrong-0123456789-0123"), "default"), Err(ErrorKind::Unauthenticated));
    assert_eq!(ask(Some("of-one-job-0123456789"), "default"), Ok(()));
    assert_eq!(ask(Some("of-one-job-0123456789"), "other"), Err(ErrorKind::Unauthenticated));
    assert_eq!(ask(Some("operators-0123456789"), "other"), Ok(()));
    let jobs = |token| {
        let connection = with_token(&program, token);
        let asked = connection.ask("jobs", v1::ListJobsRequest {}, |channel, request| async move {
            AdminClient::new(channel).list_jobs(request).await
        });
        asked.join().map(drop).map_err(|error| error.kind)
    };
    assert_eq!(jobs(Some("of-one-job-0123456789")), Err(ErrorKind::Unauthenticated));
    assert_eq!(jobs(Some("operators-0123456789")), Ok(()));
}

/// Every method, asked without a token: a new one that forgets its door fails here.
#[test]
fn no_method_is_open() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("tokens"), "operators-0123456789\n").unwrap();
    let program = Program::start(folder.path(), &["--set=coordinator.token=tokens"]);
    let url = program.url();
    let described = paths_of(dtr_proto::FILE_DESCRIPTORS);
    assert!(described.len() >= 18, "{described:?}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = Channel::from_shared(url).unwrap().connect().await.unwrap();
        for path in described {
            let mut grpc = tonic::client::Grpc::new(channel.clone());
            grpc.ready().await.unwrap();
            let codec =
                tonic_prost::ProstCodec::<v1::ListJobsRequest, v1::ListJobsReply>::default();
            let path = tonic::codegen::http::uri::PathAndQuery::try_from(path).unwrap();
            let request = Request::new(v1::ListJobsRequest {});
            let status = grpc.unary(request, path.clone(), codec).await.unwrap_err();
            assert_eq!(status.code(), Code::Unauthenticated, "{path}: {status}");
        }
    });
}

/// `/package.Service/Method` of every method.
fn paths_of(descriptors: &[u8]) -> Vec<String> {
    use prost::Message as _;
    let set = prost_types::FileDescriptorSet::decode(descriptors).unwrap();
    let mut paths = Vec::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                paths.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    paths
}

/// PEM files of an authority, and of what it signed.
struct Certificates {
    ca: PathBuf,
    server: (PathBuf, PathBuf),
    client: (PathBuf, PathBuf),
}

fn certificates(folder: &Path) -> Certificates {
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca_params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca_params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = ca_params.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca_params, ca_key);
    let signed = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap();
        (
            write(&format!("{name}.pem"), cert.pem()),
            write(&format!("{name}.key"), key.serialize_pem()),
        )
    };
    Certificates {
        ca: write("ca.pem", ca.pem()),
        server: signed("server"),
        client: signed("client"),
    }
}

#[test]
fn mutual_tls_lets_in_who_has_a_certificate() {
    let folder = tempdir().unwrap();
    let files = certificates(folder.path());
    let tls = format!(
        "--set=coordinator.tls={{ cert = {:?}, key = {:?}, client_ca = {:?} }}",
        files.server.0, files.server.1, files.ca
    );
    let program = Program::start(folder.path(), &[&tls]);
    let open = |identity_files, ca_file| {
        let options = Options {
            url: format!("https://localhost:{}", program.port),
            ca_file,
            identity_files,
            patience: Duration::from_millis(100),
            ..Options::default()
        };
        register(&Arc::new(Connection::open(&options).unwrap()), 0, 1)
    };
    let with = open(Some(files.client.clone()), Some(files.ca.clone())).unwrap();
    with.leave("").unwrap();
    let without = open(None, Some(files.ca.clone())).unwrap_err();
    assert_eq!(without.kind, ErrorKind::Unavailable, "{without}");
    let stranger = open(Some(files.client.clone()), None).unwrap_err();
    assert!(stranger.to_string().contains("certificate"), "{stranger}");
    health_by_tls(&program, &files, folder.path());
}

/// The certificate is for `localhost`: another address needs its name said.
fn health_by_tls(program: &Program, files: &Certificates, folder: &Path) {
    let health = |more: &[&str]| {
        let address = format!("127.0.0.1:{}", program.port);
        run_to_end(folder, &[&["health", &address], more].concat())
    };
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let (ca, cert, key) = (text(&files.ca), text(&files.client.0), text(&files.client.1));
    let mutual = ["--ca", &ca, "--name=localhost", "--cert", &cert, "--key", &key];
    let (code, out, error) = health(&mutual);
    assert_eq!(code, Some(0), "{out}{error}");
    let (code, _, error) = health(&mutual[..2]);
    assert_eq!(code, Some(1));
    assert!(error.contains("certificate") && error.contains("`--name`"), "{error}");
    for (more, wanted) in [(&mutual[..3], "`--cert`"), (&[][..], "hint: ")] {
        let (code, _, error) = health(more);
        assert_eq!(code, Some(1));
        assert!(error.contains(wanted), "{error}");
    }
    let (_, _, error) = health(&["--ca=missing.pem"]);
    assert!(error.contains("reading `missing.pem`: No such file"), "{error}");
    assert_eq!(health(&["--name=localhost"]).0, Some(2));
}

/// SIGKILL, again and again, under workers that meet at barriers: nothing that anybody was told of
/// is lost, and nobody is taken for dead.
#[test]
fn kills_lose_nothing() {
    const WORLD_SIZE: u32 = 64;
    let kills = budget(12);
    let folder = tempdir().unwrap();
    let arguments = ["--set=coordinator.heartbeat_interval_ms=100"];
    let mut program = Program::start(folder.path(), &arguments);
    let connection = connect(&program.url());
    let workers: Vec<_> =
        (0..WORLD_SIZE).map(|rank| register(&connection, rank, WORLD_SIZE).unwrap()).collect();
    let (mut generation, mut epoch) = (0, 0);
    for round in kills.clone() {
        let waits: Vec<_> = workers
            .iter()
            .map(|worker| worker.wait_barrier(&worker.arrival("round", LONG)))
            .collect();
        // Sometimes before, sometimes while, sometimes after the release is written.
        std::thread::sleep(Duration::from_millis(round * 3 % 20));
        let started = Instant::now();
        program.kill();
        program.start_again();
        for wait in waits {
            assert_eq!(wait.join().unwrap(), generation, "round {round}");
        }
        assert!(started.elapsed() < Duration::from_secs(20), "round {round}");
        generation += 1;
        let listed = workers[0].list().join().unwrap();
        assert!(listed.epoch >= epoch);
        epoch = listed.epoch;
        let alive = listed.workers.iter().filter(|w| w.state() == v1::WorkerState::Alive).count();
        assert_eq!(alive, workers.len());
    }
    // Nobody was lost: the membership is what the registrations made it.
    assert_eq!(epoch, u64::from(WORLD_SIZE));
    tell(&kills);
}

/// A commit that was answered still exists after a kill; the attempt id is the same for all ranks.
#[test]
fn a_commit_survives_a_kill() {
    let folder = tempdir().unwrap();
    let mut program = Program::start(folder.path(), &[]);
    let connection = connect(&program.url());
    let worker = register(&connection, 0, 1).unwrap();
    let attempt = worker.begin_checkpoint(5, false).join().unwrap().attempt;
    let shard =
        v1::Shard { rank: 0, file: "rank-00000.shard".into(), bytes: 9, ..v1::Shard::default() };
    let report = ShardReport {
        shard: shard.clone(),
        own_store: false,
        published_crc32c: None,
        replicated_crc32c: None,
    };
    let outcome = worker.report_shard(5, &attempt, report).join().unwrap();
    assert_eq!(outcome, ShardOutcome::Publish(vec![shard]));
    let answer = worker.commit_checkpoint(5, &attempt, 77).join().unwrap();
    program.kill();
    program.start_again();
    let latest = connection
        .ask("latest", v1::LatestCheckpointRequest { job: "default".into() }, {
            |channel, request| async move {
                CheckpointsClient::new(channel).latest_checkpoint(request).await
            }
        })
        .join()
        .unwrap();
    assert_eq!(latest.commit, answer.commit);
    assert_eq!(latest.commit.unwrap().attempt, attempt);
}
