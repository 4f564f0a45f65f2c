//! What somebody can put into a store: bytes that lie, bombs, names and links that lead out of it.
//! The engine is used from its front door.
//!
//! Always holds: a case is known by its number, which is printed when it fails and makes it again;
//! `DTR_TORTURE_STATES` says how many are tried, and `DTR_TORTURE_FIRST` from which one on.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do, and say how much was tried"
)]

mod aligned;
#[path = "../engine/alone.rs"]
mod alone;
mod bombs;
#[expect(dead_code, reason = "these tests go through their numbers one after the other")]
#[path = "../crash/budget.rs"]
mod budget;
mod clock;
mod escape;
mod forge;
mod limits;
mod replay;
#[expect(dead_code, reason = "histories of saves are for the tests of the medium")]
#[path = "../crash/state.rs"]
mod state;
