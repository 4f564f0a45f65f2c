//! What the benchmarks and the profile share: a state to save, the cases to measure, and a recorder
//! of the engine's spans.
//!
//! Always holds: nothing in the workspace depends on this crate.
#![forbid(unsafe_code)]

pub mod cases;
pub mod machine;
pub mod profile;
pub mod spans;
pub mod state;
