//! The state machine, decision by decision: who may join, what counts as a failure, when barriers
//! and checkpoints end. Time is what the test says it is.
#![expect(clippy::unwrap_used, reason = "a test stops at its first surprise")]

mod barriers;
mod checkpoints;
mod limits;
mod members;
mod table;
