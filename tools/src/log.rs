//! The engine's log, on stderr.
//!
//! Always holds: without `RUST_LOG`, warnings and errors are shown; a `RUST_LOG` that cannot be
//! understood is said so, never obeyed in part.

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;

use crate::console::Plain;

/// Starts printing the log, as `RUST_LOG` says: `debug`, or `warn,dtr_engine=debug`.
pub(crate) fn start() {
    let wanted = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let parsed = wanted.as_deref().map(str::parse::<Targets>);
    let default = || Targets::new().with_default(tracing::Level::WARN);
    let (filter, refused) = match parsed {
        None => (default(), None),
        Some(Ok(targets)) => (targets, None),
        Some(Err(error)) => (default(), Some(error)),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| Plain::text(std::io::stderr()))
        .with_ansi(false)
        .compact();
    let log = tracing_subscriber::registry().with(filter).with(lines);
    // In a process that logs already, that goes on.
    let _started_before = tracing::subscriber::set_global_default(log);
    if let Some(error) = refused {
        tracing::warn!(%error, "RUST_LOG is not understood: warnings and errors are shown");
    }
}
