//! Checkpoints that several ranks saved: which rank's part is meant is said, never guessed.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use dtr_engine::config::Compression;
use dtr_engine::format::manifest::ShardEntry;
use dtr_engine::format::names::AttemptId;
use dtr_engine::ranks::{Agreed, Attempt, Begun, Hindrance, Outcome, Ranks, Report};
use dtr_engine::save::SaveRequest;
use dtr_engine::{Config, Engine, Result};
use safetensors::SafeTensors;

use crate::golden::assert_golden;
use crate::state::{State, Store, singles};

const RANKS: u32 = 2;

/// Ranks that are threads of one process, without losses: the last one that reports publishes.
#[derive(Debug)]
struct Together {
    ranks: u32,
    shards: Mutex<Vec<ShardEntry>>,
    published: Condvar,
}

impl Ranks for Together {
    fn begin(&self, _step: u64) -> Result<Begun> {
        Ok(Begun { attempt: AttemptId::from_bytes([7; 16]), created_unix_ms: 1_790_000_000_000 })
    }

    fn report(
        &self,
        _attempt: Attempt,
        report: Report<'_>,
        _is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Outcome> {
        let mut shards = self.shards.lock().unwrap();
        shards.push(report.shard.clone());
        if shards.len() == self.ranks as usize {
            shards.sort_by_key(|shard| shard.rank);
            return Ok(Outcome::Publish { shards: shards.clone(), annotations: Vec::new() });
        }
        let _shards = self.published.wait_while(shards, |shards| !shards.is_empty()).unwrap();
        Ok(Outcome::Committed)
    }

    fn commit(&self, _attempt: Attempt, _manifest_crc32c: u32) -> Result<bool> {
        self.shards.lock().unwrap().clear();
        self.published.notify_all();
        Ok(true)
    }

    fn abort(&self, _: Attempt, reason: &str, _: bool) -> Result<()> {
        panic!("no rank fails: {reason}");
    }

    fn agree(&self, _: &[Attempt], _: Hindrance<'_>, _: Duration) -> Result<Agreed> {
        panic!("nobody loads");
    }
}

/// Step 30, whose ranks saved what one process saves at steps 10 and 20.
fn saved_by_ranks() -> Store {
    saved_alike(&[])
}

/// The same; what is at and below the nodes `replicated` saved once.
fn saved_alike(replicated: &[u32]) -> Store {
    let state = |rank: u64| State { step: 30, ..State::at(10 + 10 * rank) };
    saved_by(&[state(0), state(1)], replicated)
}

/// A step that as many ranks saved as there are states, each its own; what is at and below the
/// nodes `replicated` saved once.
pub(crate) fn saved_by(states: &[State], replicated: &[u32]) -> Store {
    let store = Store::empty();
    let ranks = u32::try_from(states.len()).unwrap();
    let (shards, published) = (Mutex::default(), Condvar::default());
    let together: Arc<dyn Ranks> = Arc::new(Together { ranks, shards, published });
    std::thread::scope(|scope| {
        for (rank, state) in (0..ranks).zip(states) {
            let (together, path) = (Arc::clone(&together), store.path());
            let config = Config {
                rank,
                world_size: ranks,
                chunk_bytes: 64 << 10,
                in_flight_bytes: Some(1 << 20),
                compression: Compression::None,
                job: "gpt".into(),
                ..Config::new(path)
            };
            scope.spawn(move || {
                let engine = Engine::open_among(config, together).unwrap();
                let request = SaveRequest { replicated: replicated.to_vec(), ..state.request() };
                engine.save(request).unwrap().result(None).unwrap().unwrap();
                engine.close().unwrap();
            });
        }
    });
    store
}

#[test]
fn a_rank_is_shown_and_said() {
    let store = saved_by_ranks();
    let first = store.run("inspect", &[]);
    assert_eq!(first.status, 0, "{first:?}");
    assert_golden("inspect-ranks", &store.redact(&first.stdout));
    let second = store.run("inspect", &["--rank", "1", "--json"]).json();
    assert_eq!(second["rank"], 1);
    assert_eq!(second["manifest"]["shards"].as_array().unwrap().len(), 2);
    let step = second["tree"].as_array().unwrap().iter().find(|entry| entry["path"] == "step");
    assert_eq!(step.unwrap()["value"], 20, "what rank 1 saved");
    let verified = store.run("verify", &[]);
    assert_eq!(verified.status, 0, "{verified:?}");
}

#[test]
fn a_rank_is_restored_when_it_is_named() {
    let store = saved_by_ranks();
    let output = store.beside("rank.safetensors");
    let output = output.to_str().unwrap();
    store.run("restore", &["--output", output]).assert_error(2);
    for rank in 0..RANKS {
        let number = rank.to_string();
        let run =
            store.run("restore", &["--rank", &number, "--output", output, "--force", "--json"]);
        assert_eq!(run.json()["rank"], rank);
        let bytes = std::fs::read(output).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let scale = if rank == 0 { 1.25 } else { 2.5 };
        let moment = file.tensor("optimizer.state.0.exp_avg").unwrap();
        assert!(moment.data() == singles(1000, scale), "rank {rank}");
    }
    let alone = store.beside("alone");
    let run = store.run("restore", &["--rank", "1", "--output", alone.to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    let engine = Engine::open(Config { read_only: true, ..Config::new(&alone) }).unwrap();
    assert_eq!(engine.checkpoint(30).unwrap().manifest().world_size, 1);
}

#[test]
fn ranks_are_compared_with_each_other() {
    let store = saved_by_ranks();
    store.run("diff", &["30", "30"]).assert_error(2);
    let same = store.run("diff", &["30", "30", "--rank", "1", "--exit-code"]);
    assert_eq!(same.status, 0, "{same:?}");
    let other = store.run("diff", &["30", "30", "--rank", "0", "--b-rank", "1", "--exit-code"]);
    assert_eq!(other.status, 1, "{other:?}");
    assert_golden("diff-ranks", &store.redact(&other.stdout));
    let json = store.run("diff", &["30", "30", "--rank", "0", "--b-rank", "1", "--json"]).json();
    assert_eq!((&json["a_rank"], &json["b_rank"]), (&0.into(), &1.into()));
}

#[test]
fn a_rank_that_is_not_there_is_wrong_usage() {
    let store = saved_by_ranks();
    let run = store.run("inspect", &["--rank", "2"]);
    run.assert_error(2);
    assert_golden("error-no-such-rank", &store.redact(&run.stderr));
    let run = store.run("restore", &["--output", store.beside("x.safetensors").to_str().unwrap()]);
    assert_golden("error-which-rank", &store.redact(&run.stderr));
}

/// The node of `model`, which is replicated.
const MODEL: u32 = 1;

#[test]
fn what_ranks_saved_alike_is_shown_compared_and_restored_whole() {
    let store = saved_alike(&[MODEL]);
    let shown = store.run("inspect", &["--rank", "1"]);
    assert_golden("inspect-replicated", &store.redact(&shown.stdout));
    let json = store.run("inspect", &["--json"]).json();
    assert!(json["storages"].as_array().unwrap().iter().any(|one| one["held"].is_object()));
    assert_eq!(store.run("verify", &[]).status, 0);

    let separate = saved_by_ranks();
    for rank in ["0", "1"] {
        let file = |store: &Store| {
            let output = store.beside("whole.safetensors");
            let output = output.to_str().unwrap();
            let run = store.run("restore", &["--rank", rank, "--output", output, "--force"]);
            assert_eq!(run.status, 0, "{run:?}");
            std::fs::read(output).unwrap()
        };
        assert!(file(&store) == file(&separate), "rank {rank}");
    }
    let diff = store.run("diff", &["30", "30", "--rank", "0", "--b-rank", "1"]);
    let other = separate.run("diff", &["30", "30", "--rank", "0", "--b-rank", "1"]);
    assert_eq!(store.redact(&diff.stdout), separate.redact(&other.stdout));

    // One rank's part, in a store of its own, has the model for any number of ranks.
    let alone = store.beside("alone");
    let run = store.run("restore", &["--rank", "1", "--output", alone.to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    let config = Config { read_only: true, rank: 1, world_size: 3, ..Config::new(&alone) };
    let checkpoint = Engine::open(config).unwrap().checkpoint(30).unwrap();
    assert!(checkpoint.is_replicated_only());
    let copied = store.beside("copied");
    assert_eq!(store.run("copy", &[copied.to_str().unwrap()]).status, 0);
    let copied = Engine::open(Config { read_only: true, ..Config::new(&copied) }).unwrap();
    assert!(copied.verify(30, &()).unwrap().damage.is_empty());
}
