//! What a medium can do to a store: lose what was not synced, tear it, reorder it; change, cut and
//! mix up what was; fail, fill up and lose its power. And what can be done to a process that saves:
//! it is killed. The engine is used from its front door.
//!
//! Always holds: a state is known by its number, which is printed when it fails and makes it again;
//! `budget.rs` says how many are tried and how to try more.
#![deny(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do, and say how much was tried"
)]

mod budget;
mod check;
mod damage;
mod device;
mod failed_sync;
mod full_disk;
mod history;
mod kill;
mod medium;
mod mutants;
mod one_failure;
mod power_cut;
mod power_loss;
mod process;
mod recorder;
mod rival;
mod shutdown;
mod state;
mod tap;
