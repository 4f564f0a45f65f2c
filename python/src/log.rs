//! The log of the engine and of the coordinator's client: to stderr, and traces to a collector.
//!
//! Always holds: it is not Python's `logging`, which needs the GIL, and our threads never take that;
//! it begins with the first store or coordinator that is opened, for `ckpt-tool` has its own.

use std::sync::Once;

/// Starts it, once.
pub(crate) fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| coordinator::telemetry::start("dtruntime", "warn"));
}
