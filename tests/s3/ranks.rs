//! Ranks with a directory each, or one of each machine, that drain into one store in S3.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use dtr_engine::config::BestMode;
use dtr_engine::engine::GcOptions;
use dtr_engine::error::CoordinationKind;
use dtr_engine::ranks::{Agreed, Hindrance, Ranks, Report};
use dtr_engine::save::{SaveInfo, SaveRequest};
use dtr_engine::{Config, Engine, EngineError, Result};

use crate::faults::through;
use crate::place::{LONG, Place, open, open_among, until};
use crate::proxy::{Fault, Proxy};
use crate::support::finish;
use crate::world::{Between, Beyond, Call, Rank, World, is_aborted, save_all, state_of, together};

/// Which ranks share a directory.
#[derive(Clone, Copy, Debug)]
enum Machines {
    OneEach,
    OneForAll,
}

/// Ranks that have nothing in common but a coordinator and a store in S3.
struct Cluster {
    world: World,
    remote: Config,
    machines: Machines,
    keep_last_n: Option<u32>,
    remote_bytes_per_second: Option<u64>,
}

impl Cluster {
    fn new(place: &Place, size: u32, machines: Machines) -> Self {
        Self {
            world: World::new(size),
            remote: place.config(),
            machines,
            keep_last_n: None,
            remote_bytes_per_second: None,
        }
    }

    fn directory(&self, rank: u32) -> PathBuf {
        match self.machines {
            Machines::OneEach => self.world.path().join(format!("machine-{rank}")),
            Machines::OneForAll => self.world.path().join("machine"),
        }
    }

    fn config(&self, rank: u32) -> Config {
        Config {
            path: self.directory(rank),
            s3: self.remote.s3.clone(),
            remote: Some(self.remote.path.to_str().unwrap().into()),
            keep_last_n: self.keep_last_n,
            remote_bytes_per_second: self.remote_bytes_per_second,
            ..self.world.config(rank)
        }
    }

    fn ranks(&self) -> Vec<Rank> {
        let open =
            |rank| self.world.rank_opened(rank, |ranks| open_among(self.config(rank), ranks));
        (0..self.world.size).map(open).collect()
    }

    /// The store in S3, to somebody who only reads.
    fn remote(&self) -> Engine {
        open(Config { read_only: true, ..self.remote.clone() })
    }
}

fn step_in(directory: &Path, step: u64) -> PathBuf {
    directory.join(format!("step-{step:012}"))
}

fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All upload `step`: what came of it, by rank.
fn uploaded(ranks: &[Rank], step: u64) {
    for outcome in together(ranks, |rank| rank.engine.uploaded(step, Some(LONG))) {
        outcome.unwrap().expect("it ends in time").unwrap();
    }
}

fn agreed(ranks: &[Rank]) -> Vec<Option<u64>> {
    let offer = |rank: &Rank| rank.engine.agree(&rank.engine.steps()?, Hindrance::None, LONG);
    let agree = |rank: &Rank| match offer(rank) {
        // Others took the place of workers that were dropped without a word.
        Err(EngineError::Coordination { kind: CoordinationKind::MembershipChanged, .. }) => {
            offer(rank)
        }
        agreed => agreed,
    };
    let step = |agreed: Result<Agreed>| match agreed.unwrap() {
        Agreed::Step(step) => Some(step),
        Agreed::Nothing { .. } => None,
        hindered @ Agreed::Hindered { .. } => panic!("nothing is wrong: {hindered:?}"),
    };
    together(ranks, agree).into_iter().map(step).collect()
}

/// Saves `step` with another state than it was saved with before.
fn save_anew(rank: &Rank, step: u64, rewind: bool) -> Result<SaveInfo> {
    let state = state_of(rank.number, step + 500);
    let mut request = state.request(step);
    request.rewind = rewind;
    finish(&rank.engine.save(request)?)
}

/// Gives an attempt up once its manifest is in this rank's own store, while it is armed.
#[derive(Debug)]
struct Regrets {
    ranks: Arc<dyn Ranks>,
    is_armed: Arc<AtomicBool>,
}

impl Between for Regrets {
    fn pass<T>(&self, call: Call<'_>, go: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Call::Report(attempt, Report { published_crc32c: Some(_), .. }) = call
            && self.is_armed.load(Ordering::Relaxed)
        {
            self.ranks.abort(attempt, "the test wants it", false)?;
        }
        go()
    }
}

#[test]
fn every_rank_commits_in_its_own_directory_and_one_checkpoint_arrives_in_s3() {
    for machines in [Machines::OneEach, Machines::OneForAll] {
        let place = Place::new();
        let cluster = Cluster::new(&place, 3, machines);
        let ranks = cluster.ranks();
        for step in [1, 2] {
            let infos = save_all(&ranks, step);
            uploaded(&ranks, step);
            let remote = cluster.remote();
            let manifest = remote.manifest(step).unwrap();
            assert_eq!(manifest.shards.len(), 3);
            assert!(infos.iter().all(|info| info.attempt == manifest.attempt));
            assert_eq!(remote.verify(step, &()).unwrap().damage, [], "{machines:?}");
            for rank in &ranks {
                let here = rank.engine.checkpoint(step).unwrap();
                state_of(rank.number, step).assert_equals(&here);
                let there = remote.checkpoint_of_rank(step, rank.number).unwrap();
                state_of(rank.number, step).assert_equals(&there);
                let files = names_in(&step_in(&cluster.directory(rank.number), step));
                let shards = if matches!(machines, Machines::OneEach) { 1 } else { 3 };
                assert_eq!(files.len(), 1 + shards, "{files:?}");
                // A shard of another machine comes from S3.
                let other = (rank.number + 1) % 3;
                let others = rank.engine.checkpoint_of_rank(step, other).unwrap();
                state_of(other, step).assert_equals(&others);
            }
        }
        assert!(together(&ranks, |rank| rank.engine.close()).iter().all(Result::is_ok));
        assert_eq!(place.unfinished(), 0);
    }
}

#[test]
fn shards_of_other_ranks_are_opened_without_looking_at_the_store_again() {
    let place = Place::new();
    let cluster = Cluster::new(&place, 3, Machines::OneForAll);
    let ranks = cluster.ranks();
    save_all(&ranks, 2);
    uploaded(&ranks, 2);
    let proxy = Proxy::start(place.address(), Arc::new(|_| Fault::None));
    let mut remote = through(&proxy, &cluster.remote);
    // Nothing comes late here, but from a service that is busy itself.
    remote.s3.request_timeout_ms = 60_000;
    let remote = open(Config { read_only: true, ..remote });
    // The survey knows from then on what does not change.
    remote.checkpoint_of_rank(2, 0).unwrap();
    let before = proxy.requests();
    let own = remote.checkpoint_of_rank(2, 0).unwrap();
    let named = proxy.requests() - before;
    for rank in [1, 2] {
        let before = proxy.requests();
        let beside = remote.shard_beside(&own, rank).unwrap();
        let requests = proxy.requests() - before;
        // Neither a listing nor the manifest.
        assert!(requests + 2 <= named, "rank {rank}: {requests} and {named}");
        state_of(rank, 2).assert_equals(&beside);
    }
}

#[test]
fn a_new_machine_reads_from_s3_what_the_old_one_had() {
    let place = Place::new();
    let cluster = Cluster::new(&place, 2, Machines::OneEach);
    let ranks = cluster.ranks();
    save_all(&ranks, 7);
    uploaded(&ranks, 7);
    drop(ranks);
    std::fs::remove_dir_all(cluster.directory(1)).unwrap();
    let ranks = cluster.ranks();
    assert_eq!(agreed(&ranks), [Some(7), Some(7)]);
    for rank in &ranks {
        state_of(rank.number, 7).assert_equals(&rank.engine.checkpoint(7).unwrap());
    }
    save_all(&ranks, 8);
    uploaded(&ranks, 8);
    assert_eq!(cluster.remote().steps().unwrap(), [7, 8]);
}

#[test]
fn a_rank_that_cannot_publish_leaves_no_checkpoint_on_any() {
    let place = Place::new();
    let cluster = Cluster::new(&place, 3, Machines::OneEach);
    let ranks = cluster.ranks();
    save_all(&ranks, 1);
    // A directory is where one rank's manifest is to be.
    let obstacle = step_in(&cluster.directory(1), 2).join("manifest.json");
    std::fs::create_dir_all(&obstacle).unwrap();
    let outcomes = together(&ranks, |rank| rank.save(2));
    for (rank, outcome) in outcomes.iter().enumerate() {
        let error = outcome.as_ref().unwrap_err();
        assert!(rank == 1 || is_aborted(error) && error.to_string().contains("rank 1"), "{error}");
    }
    for rank in 0..3 {
        let left = names_in(&step_in(&cluster.directory(rank), 2));
        assert!(left == ["manifest.json"] && rank == 1 || left.is_empty(), "rank {rank}: {left:?}");
    }
    std::fs::remove_dir(obstacle).unwrap();
    assert!(ranks.iter().all(|rank| rank.engine.steps().unwrap() == [1]));
    save_all(&ranks, 3);
    uploaded(&ranks, 3);
    assert_eq!(cluster.remote().steps().unwrap(), [1, 3]);
}

#[test]
fn where_no_step_is_whole_nothing_goes_and_what_comes_back_is_loaded() {
    let place = Place::new();
    let mut cluster = Cluster::new(&place, 2, Machines::OneEach);
    // Nothing gets anywhere.
    cluster.remote_bytes_per_second = Some(1);
    let ranks = cluster.ranks();
    save_all(&ranks, 10);
    drop(ranks);
    let (lost, away) = (cluster.directory(1), cluster.world.path().join("away"));
    std::fs::rename(&lost, &away).unwrap();
    cluster.remote_bytes_per_second = None;
    let ranks = cluster.ranks();
    assert_eq!(agreed(&ranks), [None, None]);
    // What the other machine has is in the way, and stays: its part of it may come back.
    let refused = together(&ranks, |rank| save_anew(rank, 5, false));
    assert!(refused.iter().all(Result::is_err), "{refused:?}");
    assert_eq!(ranks[0].engine.steps().unwrap(), [10]);
    drop(ranks);
    std::fs::remove_dir_all(&lost).unwrap();
    std::fs::rename(&away, &lost).unwrap();
    let ranks = cluster.ranks();
    assert_eq!(agreed(&ranks), [Some(10), Some(10)]);
    for rank in &ranks {
        state_of(rank.number, 10).assert_equals(&rank.engine.checkpoint(10).unwrap());
    }
}

#[test]
fn a_step_that_one_machine_lost_before_it_was_uploaded_is_loaded_by_none_and_saved_again() {
    let place = Place::new();
    let mut cluster = Cluster::new(&place, 2, Machines::OneEach);
    let ranks = cluster.ranks();
    save_all(&ranks, 1);
    uploaded(&ranks, 1);
    drop(ranks);
    // Step 2 does not get anywhere.
    cluster.remote_bytes_per_second = Some(1);
    let ranks = cluster.ranks();
    save_all(&ranks, 2);
    drop(ranks);
    std::fs::remove_dir_all(cluster.directory(1)).unwrap();
    cluster.remote_bytes_per_second = None;
    let ranks = cluster.ranks();
    assert_eq!(ranks[0].engine.steps().unwrap(), [1, 2]);
    assert_eq!(agreed(&ranks), [Some(1), Some(1)]);
    for rank in &ranks {
        state_of(rank.number, 1).assert_equals(&rank.engine.checkpoint(1).unwrap());
    }
    assert_eq!(cluster.remote().steps().unwrap(), [1]);
    // All went back to step 1, so what one alone has of step 2 is in nobody's way.
    let again = together(&ranks, |rank| save_anew(rank, 2, false));
    let infos: Vec<_> = again.into_iter().map(Result::unwrap).collect();
    uploaded(&ranks, 2);
    let remote = cluster.remote();
    assert_eq!(remote.manifest(2).unwrap().attempt, infos[0].attempt);
    for rank in &ranks {
        let again = remote.checkpoint_of_rank(2, rank.number).unwrap();
        state_of(rank.number, 502).assert_equals(&again);
    }
}

#[test]
fn each_rank_prunes_its_directory_and_rank_0_the_store_in_s3() {
    for machines in [Machines::OneEach, Machines::OneForAll] {
        let place = Place::new();
        let mut cluster = Cluster::new(&place, 2, machines);
        cluster.keep_last_n = Some(2);
        let ranks = cluster.ranks();
        for step in 1..=5 {
            save_all(&ranks, step);
            uploaded(&ranks, step);
        }
        assert!(together(&ranks, |rank| rank.engine.close()).iter().all(Result::is_ok));
        for rank in 0..2 {
            let mut steps = names_in(&cluster.directory(rank));
            steps.retain(|name| name.starts_with("step-"));
            assert_eq!(steps, ["step-000000000004", "step-000000000005"], "{machines:?}");
        }
        let remote = cluster.remote();
        assert_eq!(remote.steps().unwrap(), [4, 5]);
        let now = GcOptions { dry_run: true, grace: Some(Duration::ZERO) };
        assert_eq!(remote.gc(now).unwrap().removed, [], "{machines:?}");
    }
}

#[test]
fn what_a_failed_rewind_replaced_stands_again() {
    for machines in [Machines::OneEach, Machines::OneForAll] {
        let place = Place::new();
        let cluster = Cluster::new(&place, 3, machines);
        let is_armed = Arc::new(AtomicBool::new(false));
        let open = |number| {
            cluster.world.rank_opened(number, |ranks| {
                let between =
                    Regrets { ranks: Arc::clone(&ranks), is_armed: Arc::clone(&is_armed) };
                open_among(cluster.config(number), Arc::new(Beyond { between, ranks }))
            })
        };
        let ranks: Vec<_> = (0..3).map(open).collect();
        let before = save_all(&ranks, 1);
        is_armed.store(true, Ordering::Relaxed);
        for outcome in together(&ranks, |rank| save_anew(rank, 1, true)) {
            let error = outcome.unwrap_err();
            assert!(is_aborted(&error), "{error}");
        }
        for rank in &ranks {
            assert_eq!(rank.engine.manifest(1).unwrap().attempt, before[0].attempt);
            state_of(rank.number, 1).assert_equals(&rank.engine.checkpoint(1).unwrap());
        }
        is_armed.store(false, Ordering::Relaxed);
        let after = together(&ranks, |rank| save_anew(rank, 1, true));
        let after: Vec<_> = after.into_iter().map(Result::unwrap).collect();
        uploaded(&ranks, 1);
        assert_eq!(cluster.remote().manifest(1).unwrap().attempt, after[0].attempt);
    }
}

/// Puts a manifest back once rank 0 has removed it, before its own rank goes on.
#[derive(Debug)]
struct PutsLate {
    remote: PathBuf,
    local: PathBuf,
    is_armed: Arc<AtomicBool>,
}

impl Between for PutsLate {
    fn pass<T>(&self, call: Call<'_>, go: impl FnOnce() -> Result<T>) -> Result<T> {
        let is_last = matches!(call, Call::Report(_, Report { published_crc32c: Some(_), .. }));
        let heard = go();
        if is_last && self.is_armed.load(Ordering::Relaxed) {
            while self.remote.exists() {
                std::thread::yield_now();
            }
            std::fs::create_dir_all(self.remote.parent().unwrap()).unwrap();
            std::fs::copy(&self.local, &self.remote).unwrap();
        }
        heard
    }
}

/// Else a step that a rewind retired would stand again, once what retired it is gone.
#[test]
fn a_manifest_that_came_after_rank_0_had_removed_its_step_is_taken_back() {
    let Some(place) = Place::own("it puts an object") else { return };
    let cluster = Cluster::new(&place, 2, Machines::OneEach);
    let is_armed = Arc::new(AtomicBool::new(false));
    let remote = step_in(&place.objects(&cluster.remote), 2).join("manifest.json");
    let open = |number| {
        cluster.world.rank_opened(number, |ranks| {
            let local = step_in(&cluster.directory(number), 2).join("manifest.json");
            let is_armed = Arc::clone(&is_armed);
            let between = PutsLate { remote: remote.clone(), local, is_armed };
            let config = cluster.config(number);
            if number == 0 {
                return open_among(config, ranks);
            }
            open_among(config, Arc::new(Beyond { between, ranks }))
        })
    };
    let ranks: Vec<_> = (0..2).map(open).collect();
    for step in [1, 2] {
        save_all(&ranks, step);
        uploaded(&ranks, step);
    }
    is_armed.store(true, Ordering::Relaxed);
    assert!(together(&ranks, |rank| save_anew(rank, 1, true)).iter().all(Result::is_ok));
    uploaded(&ranks, 1);
    assert!(together(&ranks, |rank| rank.engine.close()).iter().all(Result::is_ok));
    assert!(!remote.exists());
    assert_eq!(cluster.remote().steps().unwrap(), [1]);
}

/// Saves `step`, with what this rank measured.
fn save_measured(rank: &Rank, step: u64, loss: f64) -> Result<SaveInfo> {
    let state = state_of(rank.number, step);
    let metadata = [("loss".to_owned(), loss.into())].into_iter().collect();
    finish(&rank.engine.save(SaveRequest { metadata, ..state.request(step) })?)
}

fn save_measured_by_all(ranks: &[Rank], step: u64, loss: impl Fn(u32) -> f64 + Sync) {
    let saved = together(ranks, |rank| save_measured(rank, step, loss(rank.number)));
    assert!(saved.iter().all(Result::is_ok), "{saved:?}");
}

#[test]
fn what_one_rank_alone_has_is_not_the_best_and_keeps_nothing_from_its_place() {
    let place = Place::new();
    let mut cluster = Cluster::new(&place, 2, Machines::OneEach);
    cluster.keep_last_n = Some(2);
    let ranks = cluster.ranks();
    save_measured_by_all(&ranks, 10, |_| 0.5);
    uploaded(&ranks, 10);
    drop(ranks);
    cluster.remote_bytes_per_second = Some(1);
    let ranks = cluster.ranks();
    save_measured_by_all(&ranks, 20, |_| 0.1);
    drop(ranks);
    std::fs::remove_dir_all(cluster.directory(1)).unwrap();
    cluster.remote_bytes_per_second = None;
    let ranks = cluster.ranks();
    assert_eq!(agreed(&ranks), [Some(10), Some(10)]);
    let best = |ranks: &[Rank]| -> Vec<Vec<u64>> {
        let of = |rank: &Rank| rank.engine.best_steps("loss", BestMode::Min).unwrap();
        ranks.iter().map(of).collect()
    };
    assert_eq!(best(&ranks), [[10], [10]]);
    // Past the step, not to it.
    save_measured_by_all(&ranks, 25, |_| 0.9);
    uploaded(&ranks, 25);
    assert_eq!(best(&ranks), [[10, 25], [10, 25]]);
    assert!(names_in(&step_in(&cluster.directory(0), 20)).is_empty());
    assert!(together(&ranks, |rank| rank.engine.close()).iter().all(Result::is_ok));
    assert_eq!(cluster.remote().steps().unwrap(), [10, 25]);
}

#[test]
fn ranks_that_measure_differently_say_what_rank_0_says() {
    let place = Place::new();
    let cluster = Cluster::new(&place, 3, Machines::OneEach);
    let ranks = cluster.ranks();
    save_measured_by_all(&ranks, 1, |rank| f64::from(rank) + 0.5);
    uploaded(&ranks, 1);
    for rank in &ranks {
        assert_eq!(rank.engine.metadata(1).unwrap()["loss"], 0.5);
    }
    assert_eq!(cluster.remote().metadata(1).unwrap()["loss"], 0.5);
    let large = "x".repeat(2 << 20);
    let too_much = together(&ranks, |rank| {
        let state = state_of(rank.number, 2);
        let metadata = [("text".to_owned(), large.clone().into())].into_iter().collect();
        finish(&rank.engine.save(SaveRequest { metadata, ..state.request(2) })?)
    });
    let told = too_much[0].as_ref().unwrap_err().to_string();
    assert!(told.contains("attach less `metadata`"), "{told}");
    assert!(too_much.iter().all(Result::is_err));
    assert!(ranks.iter().all(|rank| rank.engine.steps().unwrap() == [1]));
}

#[test]
fn the_newest_that_arrived_is_kept_until_a_newer_one_has() {
    let place = Place::new();
    let mut cluster = Cluster::new(&place, 2, Machines::OneEach);
    cluster.keep_last_n = Some(1);
    let ranks = cluster.ranks();
    save_all(&ranks, 1);
    uploaded(&ranks, 1);
    drop(ranks);
    cluster.remote_bytes_per_second = Some(1);
    let ranks = cluster.ranks();
    for step in [2, 3] {
        save_all(&ranks, step);
    }
    drop(ranks);
    assert_eq!(cluster.remote().steps().unwrap(), [1]);
    // One machine is lost, and with it steps 2 and 3; not step 1.
    std::fs::remove_dir_all(cluster.directory(1)).unwrap();
    cluster.remote_bytes_per_second = None;
    let ranks = cluster.ranks();
    assert_eq!(agreed(&ranks), [Some(1), Some(1)]);
    for rank in &ranks {
        state_of(rank.number, 1).assert_equals(&rank.engine.checkpoint(1).unwrap());
    }
    for step in [2, 3, 4, 5] {
        let saved = together(&ranks, |rank| save_anew(rank, step, false));
        assert!(saved.iter().all(Result::is_ok), "{saved:?}");
        uploaded(&ranks, step);
    }
    assert!(together(&ranks, |rank| rank.engine.close()).iter().all(Result::is_ok));
    let steps = cluster.remote().steps().unwrap();
    assert!(steps.ends_with(&[5]) && steps.len() <= 2, "{steps:?}");
}

#[test]
fn ranks_that_changed_machines_bring_what_lies_there() {
    let place = Place::new();
    let mut cluster = Cluster::new(&place, 2, Machines::OneEach);
    cluster.remote_bytes_per_second = Some(1);
    let ranks = cluster.ranks();
    save_all(&ranks, 1);
    drop(ranks);
    let [one, other] = [0, 1].map(|rank| cluster.directory(rank));
    let aside = cluster.world.path().join("aside");
    std::fs::rename(&one, &aside).unwrap();
    std::fs::rename(&other, &one).unwrap();
    std::fs::rename(&aside, &other).unwrap();
    cluster.remote_bytes_per_second = None;
    let ranks = cluster.ranks();
    uploaded(&ranks, 1);
    assert_eq!(cluster.remote().verify(1, &()).unwrap().damage, []);
    drop(ranks);
    let ranks = cluster.ranks();
    assert_eq!(agreed(&ranks), [Some(1), Some(1)]);
    for rank in &ranks {
        state_of(rank.number, 1).assert_equals(&rank.engine.checkpoint(1).unwrap());
    }
}

/// Saves a state that is the same on all ranks, `count` tensors of it as replicated.
fn save_alike(rank: &Rank, step: u64, count: u32) -> Result<SaveInfo> {
    let state = state_of(0, step);
    let request = SaveRequest { replicated: (1..=count).collect(), ..state.request(step) };
    finish(&rank.engine.save(request)?)
}

#[test]
fn what_all_save_alike_is_written_once_and_read_from_s3() {
    let place = Place::new();
    let mut cluster = Cluster::new(&place, 3, Machines::OneEach);
    let count = u32::try_from(state_of(0, 1).0.len()).unwrap();
    let ranks = cluster.ranks();
    let saved = together(&ranks, |rank| save_alike(rank, 1, count));
    let raw_bytes: u64 = saved.into_iter().map(|info| info.unwrap().raw_bytes).sum();
    let state_bytes: usize = state_of(0, 1).0.iter().map(|storage| storage.bytes.len()).sum();
    let written_twice = raw_bytes - state_bytes as u64;
    assert!(written_twice < 3 * 64 * u64::from(count), "padding only: {written_twice}");
    uploaded(&ranks, 1);
    drop(ranks);
    // What is committed on all machines and not yet there is read once it is.
    cluster.remote_bytes_per_second = Some(1);
    let ranks = cluster.ranks();
    for outcome in together(&ranks, |rank| save_alike(rank, 2, count)) {
        outcome.unwrap();
    }
    assert_eq!(agreed(&ranks), [Some(2); 3]);
    let error = ranks[1].engine.checkpoint(2).unwrap_err();
    assert!(matches!(error, EngineError::NotFound { .. }), "{error}");
    drop(ranks);
    cluster.remote_bytes_per_second = None;
    let ranks = cluster.ranks();
    uploaded(&ranks, 2);
    for (rank, step) in ranks.iter().flat_map(|rank| [(rank, 1), (rank, 2)]) {
        state_of(0, step).assert_equals(&rank.engine.checkpoint(step).unwrap());
        let step = step_in(&cluster.directory(rank.number), step);
        assert_eq!(names_in(&step).len(), 2, "the manifest, and this rank's shard");
    }
    assert_eq!(cluster.remote().verify(2, &()).unwrap().damage, []);
}

#[test]
fn machines_that_hold_other_things_alike_are_told_before_anything_is_published() {
    let place = Place::new();
    let cluster = Cluster::new(&place, 2, Machines::OneEach);
    let ranks = cluster.ranks();
    let refused = together(&ranks, |rank| save_alike(rank, 1, 2 - rank.number));
    for (rank, outcome) in ranks.iter().zip(refused) {
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("ranks 0 and 1 disagree on the replicated entries"));
        assert_eq!(rank.engine.steps().unwrap(), [0; 0]);
        assert_eq!(names_in(&step_in(&cluster.directory(rank.number), 1)), [""; 0]);
    }
    save_all(&ranks, 2);
}

#[test]
fn what_is_not_in_s3_yet_is_kept_and_told_when_a_rank_leaves() {
    let place = Place::new();
    let cluster = Cluster::new(&place, 2, Machines::OneEach);
    let ranks = cluster.ranks();
    save_all(&ranks, 1);
    uploaded(&ranks, 1);
    drop(ranks);
    // Only rank 0 comes back, with a step that rank 1 has not uploaded.
    let mut slow = cluster;
    slow.remote_bytes_per_second = Some(1);
    let ranks = slow.ranks();
    save_all(&ranks, 2);
    drop(ranks);
    slow.remote_bytes_per_second = None;
    let rank = slow.world.rank_opened(0, |ranks| open_among(slow.config(0), ranks));
    assert!(rank.engine.uploaded(2, Some(Duration::from_millis(300))).unwrap().is_none());
    rank.engine.drain(None).unwrap();
    let error = rank.engine.uploaded(2, None).unwrap().unwrap().unwrap_err();
    assert!(matches!(error, EngineError::Closed { .. }), "{error}");
    assert!(error.to_string().contains("those of others are not yet"), "{error}");
    assert_eq!(slow.remote().steps().unwrap(), [1]);
    drop(rank);
    // The rank that uploads the last one publishes it.
    let ranks = slow.ranks();
    uploaded(&ranks[1..], 2);
    assert_eq!(slow.remote().steps().unwrap(), [1, 2]);
}

/// The path of the shard of `rank` in a step's directory.
fn shard_in(step: &Path, rank: u32) -> PathBuf {
    let prefix = format!("rank-{rank:05}.");
    let name = names_in(step).into_iter().find(|name| name.starts_with(&prefix));
    step.join(name.expect("its shard is there"))
}

/// Waits until a file exists.
fn appears(path: &Path) {
    until(&path.display().to_string(), || path.exists());
}

#[test]
fn a_shard_that_was_lost_in_s3_before_all_had_come_is_brought_once_more() {
    let Some(place) = Place::own("it moves and removes objects") else { return };
    let mut cluster = Cluster::new(&place, 3, Machines::OneEach);
    cluster.remote_bytes_per_second = Some(1);
    drop({
        let ranks = cluster.ranks();
        save_all(&ranks, 2);
        ranks
    });
    let there = step_in(&place.objects(&cluster.remote), 2);
    let [own, other] = [0, 1].map(|rank| {
        let here = shard_in(&step_in(&cluster.directory(rank), 2), rank);
        (there.join(here.file_name().unwrap()), here)
    });
    // That of rank 1 has come; rank 2 does not.
    std::fs::create_dir_all(&there).unwrap();
    std::fs::copy(&other.1, &other.0).unwrap();
    cluster.remote_bytes_per_second = None;
    let rank = cluster.world.rank_opened(0, |ranks| open_among(cluster.config(0), ranks));
    appears(&own.0);
    // Only once it was seen there.
    assert!(rank.engine.uploaded(2, Some(Duration::from_millis(500))).unwrap().is_none());
    std::fs::remove_file(&own.0).unwrap();
    appears(&own.0);
}

#[test]
fn a_step_whose_shard_is_nowhere_is_given_up() {
    let place = Place::new();
    let mut cluster = Cluster::new(&place, 2, Machines::OneEach);
    cluster.remote_bytes_per_second = Some(1);
    drop({
        let ranks = cluster.ranks();
        save_all(&ranks, 2);
        ranks
    });
    std::fs::remove_file(shard_in(&step_in(&cluster.directory(0), 2), 0)).unwrap();
    cluster.remote_bytes_per_second = None;
    let rank = cluster.world.rank_opened(0, |ranks| open_among(cluster.config(0), ranks));
    let outcome = rank.engine.uploaded(2, Some(LONG)).unwrap().expect("it ends in time");
    assert!(matches!(outcome, Err(EngineError::NotFound { .. })), "{outcome:?}");
}

#[test]
fn a_machine_that_comes_back_does_not_bring_its_old_checkpoints_over_newer_ones() {
    let place = Place::new();
    let world = World::new(1);
    let remote = place.config();
    let machine = |name: &str| Config {
        path: world.path().join(name),
        s3: remote.s3.clone(),
        remote: Some(remote.path.to_str().unwrap().into()),
        ..world.config(0)
    };
    let save = |engine: &Engine, seed: u64, step: u64, rewind: bool| {
        let state = state_of(0, seed);
        let mut request = state.request(step);
        request.rewind = rewind;
        finish(&engine.save(request).unwrap()).unwrap()
    };
    let first = open(machine("first"));
    for step in [1, 2] {
        save(&first, step, step, false);
    }
    first.close().unwrap();
    // Created later, by the clock of the rank that saves.
    let then = SystemTime::now();
    while then.elapsed().unwrap() < Duration::from_millis(5) {
        std::thread::yield_now();
    }
    let second = open(machine("second"));
    state_of(0, 1).assert_equals(&second.checkpoint(1).unwrap());
    let newer = save(&second, 77, 2, true);
    second.close().unwrap();
    let first = open(machine("first"));
    assert_eq!(first.steps().unwrap(), [1, 2]);
    assert_eq!(first.manifest(2).unwrap().attempt, newer.attempt);
    state_of(0, 77).assert_equals(&first.checkpoint(2).unwrap());
    first.drain(None).unwrap();
    let reader = open(Config { read_only: true, ..remote.clone() });
    assert_eq!(reader.manifest(2).unwrap().attempt, newer.attempt);
    save(&first, 3, 3, false);
    let again = save(&first, 78, 2, true);
    first.close().unwrap();
    assert_eq!(reader.steps().unwrap(), [1, 2]);
    assert_eq!(reader.manifest(2).unwrap().attempt, again.attempt);
    state_of(0, 78).assert_equals(&reader.checkpoint(2).unwrap());
}
