//! Checkpoints in S3, from the engine's front door to a server that is not ours.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests fail as tests do and say what was counted, and those of the \
              engine's tests are more than is used here"
)]

#[path = "../crash/budget.rs"]
mod budget;
mod errors;
mod faults;
mod lifecycle;
mod place;
mod proxy;
mod publishing;
mod ranks;
mod round_trip;
mod server;
#[path = "../engine/support.rs"]
mod support;
mod tier;
mod transfer;
#[path = "../ranks/world.rs"]
mod world;
