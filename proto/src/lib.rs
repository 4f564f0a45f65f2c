//! The words that cross a process or a disk.
//!
//! Always holds: the code in `gen` is exactly what `dtruntime/v1/*.proto` generates (a test
//! compares); it is written by `cargo run -p dtr-proto --example gen`.
#![forbid(unsafe_code)]

/// Version 1 of every message.
#[path = "gen/dtruntime.v1.rs"]
#[allow(
    clippy::allow_attributes,
    clippy::pedantic,
    missing_docs,
    unused_qualifications,
    reason = "generated code"
)]
#[rustfmt::skip]
pub mod v1;
