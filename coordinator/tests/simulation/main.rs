//! The state machine under a network and a clock that misbehave, checked against a model.
//!
//! Four simulated workers register, meet at a barrier, save a step together and go round. A seed
//! draws everything: delays, losses, duplicates (and so reordering), partitions, paused and killed
//! workers, jobs that end as a whole, coordinators that end before or after they kept something,
//! clocks that jump; and whether workers share a store or have one each. Beside it other jobs come
//! and go, more than the coordinator keeps. Then the world calms down, and the job must move on.
//!
//! What is checked, at every event:
//! - epochs never go back, not even over a restart;
//! - a barrier is released with one arrival of every rank, each really sent, none used twice;
//! - a step has one commit, of an attempt whose shards were all written, and it is the store's, or
//!   is in every worker's own store and is never taken back there;
//! - a process that was replaced, declared dead or left changes nothing;
//! - no more jobs and barriers are kept than allowed, and no job is forgotten that has a living
//!   worker or an open attempt;
//! - nobody is declared dead that was heard of within the timeout, whatever clock and restarts do;
//! - every call ends, and a calm job commits.
//!
//! `DTR_TORTURE_STATES=10000` runs more, and `DTR_TORTURE_FIRST=17` begins with that seed. The same
//! seed gives the same history.

#[path = "../support/budget.rs"]
mod budget;
mod client;
mod model;
mod world;

use std::hash::Hasher as _;

use world::World;

const WORLD_SIZE: u32 = 4;
const JOB: &str = "sim";
const TIMEOUT_MS: u64 = 5_000;
const BARRIER_MS: u64 = 20_000;
const REPORT_MS: u64 = 15_000;
/// Jobs that are kept, and barriers of each.
const JOBS_MAX: usize = 2;
const BARRIERS_MAX: usize = 2;

#[test]
fn seeds() {
    let seeds = budget::budget(200);
    let mut commits = 0;
    for seed in seeds.clone() {
        commits += World::new(seed).run().commits.len();
    }
    assert!(commits > 0, "a simulation that commits nothing shows nothing");
    budget::tell(&seeds);
}

#[test]
fn the_same_seed_is_the_same_history() {
    for seed in [1, 2, 3] {
        let hash = |seed| World::new(seed).run().trace.finish();
        assert_eq!(hash(seed), hash(seed), "seed {seed}");
    }
}

fn rank(worker: usize) -> u32 {
    u32::try_from(worker).expect("few workers")
}
