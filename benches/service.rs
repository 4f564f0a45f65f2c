//! A coordinator on loopback with its journal on disk, for benches to ask.
//!
//! Always holds: it ends with the value, and so does its journal.

use coordinator::config::{Config, Sources};
use coordinator::server;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::transport::Endpoint;

/// A coordinator that runs, and how to reach it.
pub(crate) struct Service {
    /// Where it runs; calls are made there, too.
    pub runtime: Runtime,
    /// Where it listens.
    pub endpoint: Endpoint,
    _end: oneshot::Sender<()>,
    _folder: tempfile::TempDir,
}

impl Service {
    /// Starts one on a free port.
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let folder = tempfile::tempdir_in(dtr_benches::machine::scratch_directory()).unwrap();
        let path = folder.path().join("journal.redb");
        let overrides = vec![format!("coordinator.state_path={}", path.display())];
        let config = Config::load(&Sources { file: None, overrides }, |_| None).unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let listener = runtime.block_on(server::listen("address", "127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            let shutdown = async { drop(ended.await) };
            server::run(&config, listener, None, shutdown).await.unwrap();
        });
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        Self { runtime, endpoint: endpoint.tcp_nodelay(true), _end: end, _folder: folder }
    }
}
