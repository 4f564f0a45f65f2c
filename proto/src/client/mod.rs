//! A worker's side of the protocol: one connection, one native thread, heartbeats that Python
//! cannot hold up.
//!
//! ```text
//! callers ──► [Pending] ──► dtr-coordinator thread: calls, retries, heartbeats ──► coordinator
//! ```
//!
//! Always holds:
//! - a coordinator that does not answer is asked again, at a new connection with its name resolved
//!   again, until the call's own deadline; training goes on meanwhile;
//! - the same call sent again is the same call: what was drawn at random is drawn once;
//! - a worker that was fenced off changes nothing of the job until it is registered again, which
//!   its heartbeat sees to, unless somebody else has its place.

mod checkpoints;
mod connection;
mod error;
mod heartbeat;
mod retry;
mod view;
mod worker;

pub use checkpoints::{Agreement, ShardOutcome, ShardReport};
pub use connection::{Connection, Options, Pending};
pub use error::{ClientError, ErrorKind};
pub use worker::{BarrierWait, Notice, Registration, Worker};
