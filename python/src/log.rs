//! Where the engine's log goes: standard error, by `RUST_LOG` (default `warn`) and `LOG_FORMAT`
//! (`json`, or text).
//!
//! Not through Python's `logging`: that needs the GIL, which the engine's threads never take.

use tracing_subscriber::EnvFilter;

/// Starts logging, unless the process has set up its own.
pub(crate) fn start() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let wants_json = std::env::var_os("LOG_FORMAT").is_some_and(|format| format == "json");
    let started =
        if wants_json { builder.json().try_init() } else { builder.with_ansi(false).try_init() };
    // An error means that somebody else's subscriber is there: it gets the events.
    drop(started);
}
