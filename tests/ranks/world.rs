//! A coordinator, a directory, and ranks that share both.
//!
//! Always holds: every rank is an engine and a worker of its own, as in a process of its own; ranks
//! save and load at the same time, each on a thread.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coordinator::embedded::Embedded;
use dtr_engine::ranks::{Agreed, Attempt, Begun, Coordinated, Hindrance, Outcome, Ranks, Report};
use dtr_engine::save::SaveInfo;
use dtr_engine::{Config, Engine, EngineError, Result};
use dtr_proto::client::{Connection, Options, Registration, Worker};
use tempfile::TempDir;

use crate::support::{State, config, scratch};

/// After how long without a heartbeat a worker is dead here.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(600);

/// What all ranks share.
pub(crate) struct World {
    pub(crate) coordinator: Embedded,
    pub(crate) directory: TempDir,
    pub(crate) size: u32,
}

/// One rank.
pub(crate) struct Rank {
    pub(crate) number: u32,
    pub(crate) worker: Arc<Worker>,
    pub(crate) engine: Engine,
}

/// What a rank asks of the others, and may be kept from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Call<'a> {
    Begin,
    Report(Attempt, Report<'a>),
    Commit,
}

/// What comes between a rank and the others.
pub(crate) trait Between: Debug + Send + Sync {
    /// What `call` returns to the rank, which `go` makes.
    fn pass<T>(&self, call: Call<'_>, go: impl FnOnce() -> Result<T>) -> Result<T>;
}

/// Ranks whose calls go through what comes between, but for those that nothing is done to here.
#[derive(Debug)]
pub(crate) struct Beyond<B> {
    pub(crate) between: B,
    pub(crate) ranks: Arc<dyn Ranks>,
}

impl<B: Between> Ranks for Beyond<B> {
    fn begin(&self, step: u64) -> Result<Begun> {
        self.between.pass(Call::Begin, || self.ranks.begin(step))
    }

    fn report(
        &self,
        attempt: Attempt,
        report: Report<'_>,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Outcome> {
        let go = || self.ranks.report(attempt, report, is_cancelled);
        self.between.pass(Call::Report(attempt, report), go)
    }

    fn commit(&self, attempt: Attempt, manifest_crc32c: u32) -> Result<bool> {
        self.between.pass(Call::Commit, || self.ranks.commit(attempt, manifest_crc32c))
    }

    fn abort(&self, attempt: Attempt, reason: &str, is_unpublished: bool) -> Result<()> {
        self.ranks.abort(attempt, reason, is_unpublished)
    }

    fn agree(
        &self,
        offered: &[Attempt],
        hindrance: Hindrance<'_>,
        timeout: Duration,
    ) -> Result<Agreed> {
        self.ranks.agree(offered, hindrance, timeout)
    }
}

impl World {
    pub(crate) fn new(size: u32) -> Self {
        let settings = [
            "coordinator.heartbeat_interval_ms=100".to_owned(),
            format!("coordinator.heartbeat_timeout_ms={}", TIMEOUT.as_millis()),
            "coordinator.failure_backoff_ms=0".to_owned(),
            "coordinator.checkpoint_timeout_ms=3000".to_owned(),
            "coordinator.max_worker_failures=1000000".to_owned(),
        ];
        let coordinator = Embedded::start_with("127.0.0.1", &settings).unwrap();
        Self { coordinator, directory: scratch(), size }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn config(&self, rank: u32) -> Config {
        Config { rank, world_size: self.size, ..config(self.path()) }
    }

    pub(crate) fn register(&self, rank: u32) -> Arc<Worker> {
        let options = Options {
            url: format!("http://{}", self.coordinator.address()),
            token: Some(self.coordinator.token().to_owned()),
            patience: Duration::from_secs(20),
            ..Options::default()
        };
        let connection = Arc::new(Connection::open(&options).unwrap());
        let registration = Registration {
            job: "default".into(),
            worker_id: format!("worker-{rank}"),
            rank,
            world_size: self.size,
            ip: String::new(),
            port: 0,
            advertise_address: String::new(),
        };
        Arc::new(Worker::register(&connection, registration).join().unwrap())
    }

    /// A rank whose way to the others goes through `wrap`.
    pub(crate) fn rank_through(
        &self,
        number: u32,
        config: Config,
        wrap: impl FnOnce(Arc<dyn Ranks>) -> Arc<dyn Ranks>,
    ) -> Rank {
        self.rank_opened(number, |ranks| Engine::open_among(config, wrap(ranks)).unwrap())
    }

    /// A rank whose engine `open` makes.
    pub(crate) fn rank_opened(
        &self,
        number: u32,
        open: impl FnOnce(Arc<dyn Ranks>) -> Engine,
    ) -> Rank {
        let worker = self.register(number);
        let engine = open(Arc::new(Coordinated::new(Arc::clone(&worker), self.size)));
        Rank { number, worker, engine }
    }

    pub(crate) fn rank(&self, number: u32) -> Rank {
        self.rank_through(number, self.config(number), |ranks| ranks)
    }

    pub(crate) fn ranks(&self) -> Vec<Rank> {
        (0..self.size).map(|number| self.rank(number)).collect()
    }

    /// What is in the store, to somebody who only reads.
    pub(crate) fn reader(&self, rank: u32) -> Engine {
        Engine::open(Config { read_only: true, ..self.config(rank) }).unwrap()
    }
}

/// What a rank saves at a step: all different.
pub(crate) fn state_of(rank: u32, step: u64) -> State {
    State::training(step * 1000 + u64::from(rank), 1)
}

impl Rank {
    pub(crate) fn save(&self, step: u64) -> Result<SaveInfo> {
        state_of(self.number, step).save(&self.engine, step)
    }

    /// Its process ends without a word.
    pub(crate) fn die(self) {
        // The heartbeats stop with the worker.
        let Self { worker, engine, .. } = self;
        drop(engine);
        drop(worker);
    }
}

/// Lets all of them act at the same time; the outcomes by rank.
pub(crate) fn together<T: Send>(
    ranks: &[Rank],
    act: impl Fn(&Rank) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    std::thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || act(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// All of them save `step`, and succeed.
pub(crate) fn save_all(ranks: &[Rank], step: u64) -> Vec<SaveInfo> {
    together(ranks, |rank| rank.save(step)).into_iter().collect::<Result<_>>().unwrap()
}

/// The text of an error that every rank got.
pub(crate) fn refusals<T: Debug>(outcomes: Vec<Result<T>>) -> Vec<String> {
    outcomes.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect()
}

/// Whether the error says that another rank failed.
pub(crate) fn is_aborted(error: &EngineError) -> bool {
    matches!(error, EngineError::Coordination { .. })
}
