//! `ckpt-tool` as people and scripts run it: what it prints, where, and its exit status.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod copy;
mod damage;
mod doctor;
mod errors;
mod escape;
mod golden;
mod output;
mod ranks;
mod restore;
mod several;
mod slices;
mod state;
mod tool;
