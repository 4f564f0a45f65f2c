//! The words that cross a process or a disk.
//!
//! Always holds: the code in `gen` is exactly what `dtruntime/v1/*.proto` generates (a test
//! compares); it is written by `cargo run -p dtr-proto --example gen`. Without the features
//! `client` and `server` this crate is messages, the words that both sides say, and nothing else.
#![forbid(unsafe_code)]

#[cfg(feature = "client")]
pub mod client;

pub mod refusal;
pub mod span;

/// Version 1 of every message.
#[path = "gen/dtruntime.v1.rs"]
#[allow(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    clippy::pedantic,
    missing_docs,
    unused_qualifications,
    reason = "generated code"
)]
#[rustfmt::skip]
pub mod v1;

/// The barrier at which all ranks of a job open a store together. Who waits at it has none open,
/// and reports no shard of a save that others have begun.
pub const OPENING_BARRIER: &str = "open a checkpoint manager";

/// Most bytes of `Shard.annotations`, what rank 0's manifest says besides the shards: beside as
/// many shards as a part has, they fit into a message.
pub const ANNOTATIONS_BYTES_MAX: usize = 1 << 20;

/// Most bytes of a message that lists the files of a dataset; any other has a few MiB at most.
pub const FILES_BYTES_MAX: usize = 32 << 20;

/// Every message and service, described for gRPC reflection.
pub const FILE_DESCRIPTORS: &[u8] = include_bytes!("gen/dtruntime.v1.bin");
