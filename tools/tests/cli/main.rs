//! `ckpt-tool` as people and scripts run it: what it prints, where, and its exit status.
#![forbid(unsafe_code)]

mod damage;
mod doctor;
mod errors;
mod golden;
mod output;
mod restore;
mod state;
mod tool;
