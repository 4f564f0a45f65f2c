//! The engine from its front door: real stores in scratch directories, real devices below.

mod faults;
mod lifecycle;
mod round_trip;
mod support;
