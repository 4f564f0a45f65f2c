//! The coordinator as a process: [`run`] serves until it is asked to end.
//!
//! Always holds: connections, streams, messages and headers are bounded by named limits; nothing is
//! answered before the journal has counted this start; when asked to end, the health service says
//! so first, every wait is ended so that the caller asks again later, and what was promised is on
//! the disk.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dtr_proto::FILES_BYTES_MAX;
use dtr_proto::v1::admin_server::AdminServer;
use dtr_proto::v1::barriers_server::BarriersServer;
use dtr_proto::v1::checkpoints_server::CheckpointsServer;
use dtr_proto::v1::datasets_server::DatasetsServer;
use dtr_proto::v1::membership_server::MembershipServer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::server::Router;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;
use tracing::{info, warn};

use crate::auth::Auth;
use crate::config::{Config, ConfigError};
use crate::connections::accept;
use crate::driver::{Core, system_clock};
use crate::journal::{Journal, JournalError};
use crate::limits::MESSAGE_BYTES_MAX;
use crate::metrics::Histograms;
use crate::pages::{self, Pages};
use crate::service::Service;
use crate::state::{RecoverError, State};

/// Calls that one connection may have open.
const STREAMS_PER_CONNECTION_MAX: u32 = 256;
/// Bytes of a call's headers.
const HEADERS_BYTES_MAX: u32 = 16 << 10;
/// How often an idle connection is asked whether it is still there, and how long it may think.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// What the health service calls all services together.
const WHOLE_SERVER: &str = "";
/// How long calls in progress may go on once the end was asked for.
const DRAIN: Duration = Duration::from_secs(10);

/// A service with its bounds, and gzip left out: no message here is worth it.
macro_rules! limited {
    ($server:ident, $service:expr, $bytes:expr) => {
        $server::new($service.clone())
            .max_decoding_message_size($bytes)
            .max_encoding_message_size($bytes)
    };
}

/// Why the coordinator does not run, or ended.
#[derive(Debug, thiserror::Error)]
#[error("{}\nhint: {}", self.parts().0, self.parts().1)]
#[expect(missing_docs, reason = "each is explained by its text")]
pub enum ServeError {
    Config(#[from] ConfigError),
    Journal(#[from] JournalError),
    Recover(#[from] RecoverError),
    Listen { address: String, why: String, hint: String },
    Serve(String),
}

impl ServeError {
    /// What the message is made of: what failed and why, and how to go on.
    pub fn parts(&self) -> (String, &str) {
        match self {
            Self::Config(error) => error.parts(),
            Self::Journal(error) => error.parts(),
            Self::Recover(error) => {
                let hint = "restore the journal from a copy, or start with another `state_path`";
                (error.to_string(), hint)
            }
            Self::Listen { address, why, hint } => {
                (format!("listening on `{address}`: {why}"), hint)
            }
            Self::Serve(why) => (format!("serving: {why}"), "see the log above"),
        }
    }
}

/// Opens a socket to listen on; `key` is the setting that names the address.
pub async fn listen(key: &str, address: &str) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|error| ServeError::Listen {
        address: address.to_owned(),
        why: error.to_string(),
        hint: listen_hint(key, address, &error),
    })
}

fn listen_hint(key: &str, address: &str, error: &io::Error) -> String {
    let port = address.rsplit(':').next().unwrap_or_default();
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another process has port {port} (`ss -ltnp 'sport = :{port}'` shows it): end it, or \
             change `{key}`"
        ),
        io::ErrorKind::PermissionDenied => {
            format!("ports below 1024 need privileges: use one above, such as 50051, for `{key}`")
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("this machine has no such address: use 0.0.0.0 for all of them in `{key}`")
        }
        _ => format!("write `{key}` as `host:port`, for example `0.0.0.0:50051`"),
    }
}

/// Serves on `listener` until `shutdown` comes, and on `metrics` if that is set.
pub async fn run(
    config: &Config,
    listener: TcpListener,
    metrics: Option<TcpListener>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let tls = tls_of(config)?;
    let auth = Arc::new(config.auth()?);
    let address = listener.local_addr().map_err(|error| ServeError::Serve(error.to_string()))?;
    warn_if_open(address, tls.is_some(), &auth);
    let histograms = Arc::new(Histograms::default());
    let (failed, failure) = oneshot::channel();
    let core = start_core(config, address, &histograms, failed)?;
    let draining = Arc::new(AtomicBool::new(false));
    if let Some(metrics) = metrics {
        let (core, histograms) = (core.clone(), Arc::clone(&histograms));
        pages::serve(metrics, Pages { core, histograms, draining: Arc::clone(&draining) });
    }
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<MembershipServer<Service>>().await;
    let service = Service::new(core.clone(), auth, histograms);
    let router = router(builder(config, tls)?, health, &service)?;
    info!("listening on {address}");
    let (end, ended) = oneshot::channel();
    let incoming = accept(listener, config.connections_max());
    let served = tokio::spawn(router.serve_with_incoming_shutdown(incoming, async {
        // The owner drops or uses the sender to ask for the end: both mean the same.
        let _either = ended.await;
    }));
    let cause = tokio::select! {
        () = shutdown => None,
        failure = failure => Some(failure.map_or_else(
            // The thread that decides or the one that keeps has ended without a word: it panicked.
            |_| ServeError::Serve("a thread of it panicked, and its log says why".into()),
            ServeError::from,
        )),
    };
    Serving { core, draining, reporter, end, served }.end().await;
    cause.map_or(Ok(()), Err)
}

/// What is notified of the end.
struct Serving {
    core: Core,
    draining: Arc<AtomicBool>,
    reporter: HealthReporter,
    /// Lets no more connections in once it is used.
    end: oneshot::Sender<()>,
    served: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Serving {
    async fn end(self) {
        info!("shutting down");
        self.draining.store(true, Ordering::Release);
        self.reporter.set_not_serving::<MembershipServer<Service>>().await;
        self.reporter.set_service_status(WHOLE_SERVER, ServingStatus::NotServing).await;
        self.core.drain().await;
        let _gone = self.end.send(());
        if tokio::time::timeout(DRAIN, self.served).await.is_err() {
            warn!("some connections did not close within {} s", DRAIN.as_secs());
        }
    }
}

/// Every service, those that say what there is and how it is among them.
fn router(
    mut builder: Server,
    health: HealthServer<impl Health>,
    service: &Service,
) -> Result<Router, ServeError> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(dtr_proto::FILE_DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| ServeError::Serve(error.to_string()))?;
    Ok(builder
        .add_service(health)
        .add_service(reflection)
        .add_service(limited!(MembershipServer, service, MESSAGE_BYTES_MAX))
        .add_service(limited!(BarriersServer, service, MESSAGE_BYTES_MAX))
        .add_service(limited!(CheckpointsServer, service, MESSAGE_BYTES_MAX))
        .add_service(limited!(DatasetsServer, service, FILES_BYTES_MAX))
        .add_service(limited!(AdminServer, service, MESSAGE_BYTES_MAX)))
}

fn builder(config: &Config, tls: Option<ServerTlsConfig>) -> Result<Server, ServeError> {
    let builder = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(64))
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1));
    let Some(tls) = tls else { return Ok(builder) };
    builder.tls_config(tls).map_err(|error| tls_error(config, &error))
}

fn start_core(
    config: &Config,
    address: SocketAddr,
    histograms: &Arc<Histograms>,
    failed: oneshot::Sender<JournalError>,
) -> Result<Core, ServeError> {
    let opened = Journal::open(&config.state_path(address.port()))?;
    let mut clock = system_clock();
    let records = opened.records.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
    let state = State::recover(config.policy(), opened.incarnation, clock().now_ms, records)?;
    info!(
        start = opened.incarnation,
        records = opened.records.len(),
        path = %config.state_path(address.port()).display(),
        "the journal is read"
    );
    Core::start(state, opened.journal, clock, Arc::clone(histograms), failed)
        .map_err(|error| ServeError::Serve(error.to_string()))
}

fn warn_if_open(address: SocketAddr, has_tls: bool, auth: &Auth) {
    if !address.ip().is_loopback() && !has_tls && auth.is_open() {
        warn!(
            "{address} is open to the network without TLS and without a token: anybody who reaches \
             it can join and abort jobs; set `token` or `tls` in coordinator.toml"
        );
    }
}

fn tls_of(config: &Config) -> Result<Option<ServerTlsConfig>, ServeError> {
    let Some(files) = config.tls()? else { return Ok(None) };
    let mut tls = ServerTlsConfig::new().identity(Identity::from_pem(files.cert, files.key));
    if let Some(client_ca) = files.client_ca {
        tls = tls.client_ca_root(tonic::transport::Certificate::from_pem(client_ca));
    }
    Ok(Some(tls))
}

fn tls_error(config: &Config, error: &tonic::transport::Error) -> ServeError {
    let mut why = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        why = format!("{why}: {inner}");
        source = inner.source();
    }
    config.tls_refused(&why).into()
}
