//! Metrics and health over HTTP, for Prometheus and Kubernetes.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Router, response::Response};
use tokio::net::TcpListener;
use tokio::sync::watch;

use kvstore_tiers::nvme::VolumeStatus;

use crate::daemon::Daemon;
use crate::telemetry;
use crate::verbs::status;

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
    let text = telemetry::render(&daemon);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// The process runs and answers.
async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether new work is taken, and how each tier does: 200 or 503.
async fn readyz(State(daemon): State<Arc<Daemon>>) -> Response {
    let host = daemon.host.status();
    let body = serde_json::json!({
        "state": status::state(&daemon),
        "tiers": {
            "host": {
                "ready": host.bytes_mapped <= host.bytes_max,
                "bytes_mapped": host.bytes_mapped,
                "bytes_max": host.bytes_max,
                "quarantined": telemetry::get(&daemon.traffic.quarantined),
            },
            "nvme": daemon.nvme.as_ref().map(|nvme| {
                let volumes = nvme.status().volumes;
                let volume = |volume: &VolumeStatus| serde_json::json!({
                    "path": volume.path, "ready": volume.state == "SERVING", "state": volume.state,
                    "reason": volume.reason,
                });
                volumes.iter().map(volume).collect::<Vec<_>>()
            }),
            "object": daemon.object.as_ref().map(|object| {
                let object = object.status();
                serde_json::json!({
                    "ready": object.state == "SERVING", "state": object.state, "reason": object.reason,
                    "backlog_bytes": object.backlog_bytes, "backlog_bytes_max": object.backlog_bytes_max,
                })
            }),
        }
    });
    let code = if daemon.is_draining() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}
