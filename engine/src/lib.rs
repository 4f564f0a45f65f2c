//! The checkpoint engine: tensors' bytes in, committed checkpoint out.
//!
//! Always holds: it knows no Python and no CUDA, and of networks only S3 (feature `s3`) and other
//! ranks (feature `coordinator`).
//!
//! The groups of modules are declared from the front door to the device; the decisions that the
//! pipelines go by stand between, and last what is beside the path of a byte.
#![deny(missing_docs)]
#![cfg_attr(
    not(feature = "s3"),
    expect(dead_code, reason = "a few parts of shared modules are used by S3 alone")
)]

// The front door.
pub mod engine;

// The pipelines of a save and of a load, and what several ranks say to one another.
pub mod load;
pub mod ranks;
pub mod save;

// Decisions and formats: pure.
pub mod codec;
pub mod format;
pub mod recovery;
mod retention;

// Stores, copies from one to another, and devices.
pub mod io;
mod store;
pub mod store_copy;

// Beside the path of a byte.
pub mod clock;
pub mod config;
pub mod error;
mod memcpy;
mod progress;
mod sync;
mod threads;

pub use config::Config;
pub use engine::Engine;
pub use error::EngineError;
pub use memcpy::copy_from;
pub use store::PendingUpload;
pub use sync::unpoisoned;

/// What every fallible verb of the engine returns.
pub type Result<T> = std::result::Result<T, EngineError>;
