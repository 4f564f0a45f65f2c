//! The engine from its front door: real stores in scratch directories, real devices below.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do, and say what was skipped or counted"
)]

mod alone;
mod faults;
mod flat;
mod lifecycle;
mod pressure;
mod round_trip;
mod slow_device;
mod space;
mod support;
#[expect(dead_code, reason = "nobody here counts operations")]
#[path = "../crash/tap.rs"]
mod tap;
mod workers;
