//! The checkpoint engine: tensors' bytes in, committed checkpoint out.
//!
//! Knows no Python and no CUDA, and of networks only S3 (feature `s3`) and other ranks (feature
//! `coordinator`). A byte travels through the modules in the order in which they are declared here,
//! from the store's front door to the device.
#![deny(missing_docs)]

pub mod clock;
pub mod codec;
pub mod config;
pub mod copy;
pub mod engine;
pub mod error;
pub mod format;
pub mod io;
pub mod load;
pub mod progress;
pub mod ranks;
pub mod recovery;
pub mod retention;
pub mod save;
pub mod store;
mod sync;
pub mod transfer;

pub use config::Config;
pub use engine::Engine;
pub use error::EngineError;

/// What every fallible verb of the engine returns.
pub type Result<T> = std::result::Result<T, EngineError>;
