//! Metrics and health over HTTP, for Prometheus and Kubernetes.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::IncomingStream;
use axum::{Router, response::Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tower::util::MapRequestLayer;

use crate::caps;
use crate::connections::{Connection, Place, Places};
use crate::daemon::Daemon;
use crate::status;

/// Serves `/metrics`, `/healthz` and `/readyz` until `stop` says so.
pub async fn serve(
    daemon: Arc<Daemon>,
    listener: TcpListener,
    places: usize,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .layer(MapRequestLayer::new(note_asked))
        .with_state(daemon);
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let listener = Bounded { listener, places: Places::new(places) };
    let service = router.into_make_service_with_connect_info::<Asker>();
    axum::serve(listener, service).with_graceful_shutdown(stopped).await
}

/// A listener with a bounded number of places. Peers that ask seldom give theirs up to newcomers.
struct Bounded {
    listener: TcpListener,
    places: Arc<Places>,
}

impl axum::serve::Listener for Bounded {
    type Io = Connection<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.listener.accept().await {
                Ok((io, from)) => {
                    let place = self.places.take().await;
                    return (Connection::new(io, place, caps::HTTP_ASKS_WITHIN, None), from);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(caps::ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Whoever asks.
#[derive(Clone)]
struct Asker(Arc<Place>);

impl Connected<IncomingStream<'_, Bounded>> for Asker {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Self {
        Self(Arc::clone(stream.io().place()))
    }
}

fn note_asked(request: Request) -> Request {
    if let Some(ConnectInfo(Asker(place))) = request.extensions().get() {
        place.asked(caps::HTTP_ASKS_AGAIN_WITHIN);
    }
    request
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
