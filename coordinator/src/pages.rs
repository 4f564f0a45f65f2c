//! The pages of the metrics address: numbers for Prometheus, and whether the coordinator is ready.
//!
//! Always holds: a page changes nothing; `/readyz` says no from the moment that the end was asked
//! for, and `/healthz` yes for as long as the process answers at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::routing::get;
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::driver::{Core, wall_ms};
use crate::metrics::{self, Histograms};
use crate::state::{Event, Reply};

/// What the pages of the metrics address look at.
#[derive(Clone)]
pub(crate) struct Pages {
    pub(crate) core: Core,
    pub(crate) histograms: Arc<Histograms>,
    pub(crate) draining: Arc<AtomicBool>,
}

/// Serves them on `listener` for as long as the process runs.
pub(crate) fn serve(listener: TcpListener, pages: Pages) {
    if let Ok(address) = listener.local_addr() {
        info!("metrics on http://{address}/metrics");
    }
    let router = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(show_ready))
        .with_state(pages);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            warn!("the metrics address stopped: {error}");
        }
    });
}

async fn show_metrics(
    Shared(pages): Shared<Pages>,
) -> Result<([(header::HeaderName, &'static str); 1], String), StatusCode> {
    let Ok(Reply::Summary(summary)) = pages.core.ask(Event::Inspect).await else {
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    };
    let text = metrics::render(&summary, &pages.histograms, wall_ms());
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

async fn show_ready(Shared(pages): Shared<Pages>) -> (StatusCode, &'static str) {
    if pages.draining.load(Ordering::Acquire) {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n");
    }
    match pages.core.ask(Event::Inspect).await {
        Ok(_) => (StatusCode::OK, "ready\n"),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"),
    }
}
