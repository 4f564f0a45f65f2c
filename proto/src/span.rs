//! How a process says where the time of a checkpoint's attempt went: an event of `tracing` for each
//! span, at level `trace`, from which a collector of traces makes spans.
//!
//! The trace's id is the attempt's: every rank and the coordinator know it, so nothing is passed
//! on besides, and all of them belong to one trace.
//!
//! Times are in microseconds.
//!
//! | field | what it says |
//! |---|---|
//! | `trace` | the attempt, 32 hex digits |
//! | `span` | the name |
//! | `id`, `parent` | which span it is, and is below; `parent` is empty for the topmost |
//! | `ago_us`, `took_us` | when it began, counted back from the event, and how long it took |
//! | `job`, `step`, `rank` | of the attempt; `rank` is left out by the coordinator |
//! | `error` | why it failed, or empty |

/// Target of the events.
pub const TARGET: &str = "dtruntime::span";
/// Id of the span that the coordinator reports: from the begin to the commit, or its end.
pub const CHECKPOINT: &str = "checkpoint";
