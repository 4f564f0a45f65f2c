//! A server with an empty bucket, and engines on stores in it.

use std::sync::atomic::{AtomicU32, Ordering};

use dtr_engine::config::{S3Credentials, S3Settings};
use dtr_engine::{Config, Engine, Result};
use tempfile::TempDir;

use crate::server::{BUCKET, OWNER, Server};
use crate::support;

/// The smallest part that the service takes, so that little data makes several.
pub(crate) const PART_BYTES: u64 = 5 << 20;

/// A server with a directory of its own.
pub(crate) struct Place {
    pub(crate) server: Server,
    directory: TempDir,
    stores: AtomicU32,
}

impl Place {
    pub(crate) fn new() -> Self {
        let directory = scratch();
        let server = Server::start(directory.path(), 0);
        Self { server, directory, stores: AtomicU32::new(0) }
    }

    /// The configuration of a store that nobody used before.
    pub(crate) fn config(&self) -> Config {
        let number = self.stores.fetch_add(1, Ordering::Relaxed);
        config_at(&self.server.url(), &format!("s3://{BUCKET}/runs/store-{number}"))
    }

    /// The directory in which the server keeps the objects below a prefix.
    pub(crate) fn objects(&self, prefix: &str) -> std::path::PathBuf {
        self.directory.path().join(BUCKET).join(prefix)
    }
}

pub(crate) fn config_at(url: &str, store: &str) -> Config {
    let s3 = S3Settings {
        endpoint_url: Some(url.into()),
        part_bytes: PART_BYTES,
        in_flight_bytes: 2 * PART_BYTES,
        request_timeout_ms: 10_000,
        ..S3Settings::default()
    };
    Config { s3, ..support::config(store.as_ref()) }
}

pub(crate) fn open(config: Config) -> Engine {
    try_open(config, OWNER).unwrap()
}

pub(crate) fn try_open(config: Config, user: (&str, &str)) -> Result<Engine> {
    Engine::open_as(
        config,
        S3Credentials {
            access_key_id: user.0.into(),
            secret_access_key: user.1.into(),
            session_token: None,
        },
    )
}

/// In memory where there is such a place: what is tested is no device.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")))
        .unwrap()
}
