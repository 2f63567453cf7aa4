//! Metrics and health over HTTP, for Prometheus and Kubernetes.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Router, response::Response};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::daemon::Daemon;
use crate::status;

/// Serves `/metrics`, `/healthz` and `/readyz` until `stop` says so.
pub async fn serve(daemon: Arc<Daemon>, listener: TcpListener, mut stop: watch::Receiver<bool>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(daemon);
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    axum::serve(listener, router).with_graceful_shutdown(stopped).await
}

async fn metrics(State(daemon): State<Arc<Daemon>>) -> Response {
    let text = status::metrics::render(&status::status(&daemon));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// The process runs and answers.
async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether new work is taken, and how each tier does: 200 or 503.
async fn readyz(State(daemon): State<Arc<Daemon>>) -> Response {
    let body = status::ready(&status::status(&daemon));
    let code = if daemon.is_draining() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}
