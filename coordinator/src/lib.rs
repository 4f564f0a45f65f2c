//! The coordinator: who is alive, who waits, which checkpoint is complete, who reads which files.
//!
//! It sees names, steps, ranks and checksums, never a checkpoint's bytes. A pure state machine
//! ([`state`]) decides; [`driver`] gives it time and keeps what it decided ([`journal`]) before
//! anybody is told; [`service`] and [`server`] let the network in.
//!
#![doc = include_str!("../docs/protocol.md")]
#![forbid(unsafe_code)]

pub mod auth;
pub mod config;
mod connections;
pub mod driver;
pub mod embedded;
pub mod health;
pub mod journal;
mod limits;
pub mod metrics;
mod pages;
pub mod server;
pub mod service;
pub mod state;
pub mod telemetry;
