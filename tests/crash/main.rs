//! What a medium can do to a store: lose what was not synced, tear it, reorder it; or change, cut
//! and mix up what was. The engine is used from its front door.
//!
//! Always holds: a state is known by its number, which is printed when it fails and makes it again;
//! `budget.rs` says how many are tried and how to try more.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do, and say how much was tried"
)]

mod budget;
mod check;
mod damage;
mod history;
mod medium;
mod power_loss;
mod recorder;
mod state;
