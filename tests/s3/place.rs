//! A service with an empty bucket, engines on stores in it, and a wait that ends.
//!
//! The service is the tests' own, or one that the environment names:
//!
//! | variable | meaning |
//! |---|---|
//! | `DTR_S3_ENDPOINT` | its URL, `http://address:port` |
//! | `DTR_S3_BUCKET` | a bucket in which the tests may do as they like |
//! | `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION` | as ever |
//!
//! Tests that tell the service what to do are then skipped, and say so.

use std::env;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dtr_engine::config::{S3Credentials, S3Settings};
use dtr_engine::engine::GcOptions;
use dtr_engine::ranks::Ranks;
use dtr_engine::{Config, Engine, Result};
use tempfile::TempDir;

use crate::budget::scratch;
use crate::server::{BUCKET, OWNER, Rules, Server};
use crate::support;

/// The smallest part that the service takes, so that little data makes several.
pub(crate) const PART_BYTES: u64 = 5 << 20;
/// By when all that is waited for has come.
pub(crate) const LONG: Duration = Duration::from_mins(1);

/// A service, and a prefix in it that nobody used before.
pub(crate) struct Place {
    /// The tests' own, with a directory of its own.
    own: Option<(Server, TempDir)>,
    number: u32,
    stores: AtomicU32,
}

impl Place {
    /// The service that the environment names, or the tests' own.
    pub(crate) fn new() -> Self {
        let start = || {
            let directory = scratch();
            (Server::start(directory.path(), 0), directory)
        };
        Self {
            own: given("DTR_S3_ENDPOINT").is_none().then(start),
            number: PLACES.fetch_add(1, Ordering::Relaxed),
            stores: AtomicU32::new(0),
        }
    }

    /// The tests' own, for a test that needs it, as `why` says; else the test is skipped.
    pub(crate) fn own(why: &str) -> Option<Self> {
        let place = Self::new();
        if place.own.is_none() {
            println!("skipped: {why}");
        }
        place.own.is_some().then_some(place)
    }

    /// How the tests' own service behaves.
    pub(crate) fn rules(&self) -> &Rules {
        &self.own.as_ref().expect("the place was asked for as the tests' own").0.rules
    }

    /// Whether it is the tests' own.
    pub(crate) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    pub(crate) fn url(&self) -> String {
        let own = self.own.as_ref().map(|(server, _)| server.url());
        own.unwrap_or_else(|| given("DTR_S3_ENDPOINT").unwrap())
    }

    pub(crate) fn address(&self) -> SocketAddr {
        let url = self.url();
        let address = url.strip_prefix("http://").expect("a proxy is for http").parse();
        address.expect("an address and a port")
    }

    /// The configuration of a store that nobody used before.
    pub(crate) fn config(&self) -> Config {
        let number = self.stores.fetch_add(1, Ordering::Relaxed);
        config_at(&self.url(), &self.store(number))
    }

    fn store(&self, number: u32) -> String {
        let bucket = given("DTR_S3_BUCKET").filter(|_| self.own.is_none());
        match bucket {
            None => format!("s3://{BUCKET}/runs/store-{number}"),
            Some(bucket) => {
                // Places of other tests, and of other runs, are beside it.
                format!("s3://{bucket}/run-{}/place-{}/store-{number}", *STARTED, self.number)
            }
        }
    }

    /// Uploads that were begun and neither completed nor given up; of a service that is not ours,
    /// whatever of its stores no checkpoint needs.
    pub(crate) fn unfinished(&self) -> usize {
        if self.own.is_some() {
            return self.rules().unfinished().len();
        }
        let now = GcOptions { dry_run: true, grace: Some(Duration::ZERO) };
        let stores = 0..self.stores.load(Ordering::Relaxed);
        let uploads = |number| {
            let config = config_at(&self.url(), &self.store(number));
            let report = open(Config { read_only: true, ..config }).gc(now).unwrap();
            report.removed.len()
        };
        stores.map(uploads).sum()
    }

    /// Whether anything takes space in [`Self::unfinished`].
    pub(crate) fn unfinished_take_space(&self) -> bool {
        if self.own.is_some() { self.rules().arrived_parts() > 0 } else { self.unfinished() > 0 }
    }

    /// The directory in which the tests' own service keeps the objects of a store.
    pub(crate) fn objects(&self, store: &Config) -> std::path::PathBuf {
        let (_, directory) = self.own.as_ref().expect("the tests' own service");
        directory.path().join(store.path.to_str().unwrap().strip_prefix("s3://").unwrap())
    }
}

/// Places so far.
static PLACES: AtomicU32 = AtomicU32::new(0);
/// Milliseconds since 1970 when these tests began.
static STARTED: std::sync::LazyLock<u128> = std::sync::LazyLock::new(|| {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis())
});

fn given(variable: &str) -> Option<String> {
    env::var(variable).ok().filter(|value| !value.is_empty())
}

pub(crate) fn config_at(url: &str, store: &str) -> Config {
    let s3 = S3Settings {
        endpoint_url: Some(url.into()),
        region: given("DTR_S3_ENDPOINT").and_then(|_| given("AWS_REGION")),
        part_bytes: PART_BYTES,
        in_flight_bytes: 2 * PART_BYTES,
        request_timeout_ms: 10_000,
        ..S3Settings::default()
    };
    Config { s3, ..support::config(store.as_ref()) }
}

/// Who may do everything: key and secret.
pub(crate) fn owner() -> (String, String) {
    if given("DTR_S3_ENDPOINT").is_none() {
        return (OWNER.0.into(), OWNER.1.into());
    }
    let name = |variable| given(variable).expect("credentials for the service");
    (name("AWS_ACCESS_KEY_ID"), name("AWS_SECRET_ACCESS_KEY"))
}

pub(crate) fn open(config: Config) -> Engine {
    let (key, secret) = owner();
    try_open(config, (&key, &secret)).unwrap()
}

pub(crate) fn try_open(config: Config, user: (&str, &str)) -> Result<Engine> {
    Engine::open_as(config, credentials(user), None)
}

pub(crate) fn open_among(config: Config, ranks: Arc<dyn Ranks>) -> Engine {
    let (key, secret) = owner();
    Engine::open_as(config, credentials((&key, &secret)), Some(ranks)).unwrap()
}

fn credentials(user: (&str, &str)) -> S3Credentials {
    S3Credentials {
        access_key_id: user.0.into(),
        secret_access_key: user.1.into(),
        session_token: None,
    }
}

/// Waits until it holds.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < LONG, "{what} did not come to be");
        std::thread::sleep(Duration::from_millis(5));
    }
}
