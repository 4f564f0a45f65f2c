//! Bytes <-> types, pure: what a shard, an index and a manifest are.
//!
//! Always holds: a reader never trusts a length (each is bounded by the bytes at hand and by a
//! named limit before memory is allocated); what one version wrote, every later one reads; a
//! writer checks the same rules that a reader does, so nothing is written that cannot be read.
//!
#![doc = include_str!("../../docs/format.md")]

/// Fails with [`FormatError::Damaged`] unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::format::FormatError::Damaged(format!($($message)+)));
        }
    };
}

pub mod checksum;
pub mod index;
pub mod layout;
pub mod manifest;
pub mod names;
pub mod shard;
pub mod tree;

/// What a reader of bytes found wrong: one sentence with expected and actual values. The caller
/// adds the file's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes break a rule of the format.
    #[error("{0}")]
    Damaged(String),
    /// The bytes were written by a newer version.
    #[error("{0}")]
    Newer(String),
}
