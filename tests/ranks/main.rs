//! Several ranks that save one checkpoint: complete, or not there.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests fail as tests do and say what was counted, and those of the \
              engine's tests are more than is used here"
)]

#[path = "../crash/budget.rs"]
mod budget;
mod loads;
mod losses;
mod replicated;
mod saves;
mod schedules;
#[path = "../engine/support.rs"]
mod support;
mod world;
