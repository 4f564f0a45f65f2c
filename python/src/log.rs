//! The log of the engine and of the coordinator's client: to stderr, and traces to a collector.
//!
//! Always holds: it is not Python's `logging`: that needs the GIL, which our threads never take;
//! it begins with the first store or coordinator that is opened: `ckpt-tool` has a log of its own.

use std::sync::Once;

/// Starts it, once.
pub(crate) fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| coordinator::telemetry::start("dtruntime", "warn"));
}
