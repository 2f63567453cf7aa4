//! The router's faces: OpenAI's API in front of the workers, and what standalone indexers answer.

mod indexer;
mod openai;
mod proxy;
mod relay;
mod sse;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router as Routes;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, Uri};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use indexer::explain;
use openai::{ApiError, Kind};

use crate::caps;
use crate::cost::WorkerLoad;
use crate::place::Router;
use crate::tokens::Tokens;

type HttpClient = Client<HttpConnector, Full<Bytes>>;

/// A model, as the router is told of it.
#[derive(Default)]
pub struct Model {
    /// Its tokenizer; none: texts are routed by load alone.
    pub tokens: Option<Tokens>,
    /// It is an adapter (LoRA) that engines serve under this name.
    pub adapter: bool,
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Answers that break off are gone on with elsewhere; workers are asked for token ids for that.
    pub resume: bool,
    /// Other replicas of this router, whose requests under way count, too.
    pub peers: Vec<String>,
    /// How often workers are asked whether they live.
    pub health_every: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { resume: true, peers: Vec::new(), health_every: Duration::from_secs(2) }
    }
}

/// Counts since the start.
#[derive(Default, Debug)]
pub struct ServeCounts {
    /// Requests.
    pub requests: AtomicU64,
    /// Answers that went on at another worker.
    pub resumed: AtomicU64,
    /// Answers that broke off for good.
    pub broken: AtomicU64,
}

/// What all requests share.
pub struct App {
    /// Where requests go.
    pub router: Arc<Router>,
    models: HashMap<String, Model>,
    options: ServeOptions,
    client: HttpClient,
    counts: ServeCounts,
}

impl App {
    /// In front of these workers.
    pub fn new(router: Arc<Router>, models: HashMap<String, Model>, options: ServeOptions) -> Arc<Self> {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(Duration::from_secs(2)));
        connector.set_keepalive(Some(Duration::from_secs(30)));
        connector.set_nodelay(true);
        let client =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(caps::IDLE_CONNECTIONS_MAX).build(connector);
        Arc::new(Self { router, models, options, client, counts: ServeCounts::default() })
    }

    /// Serves until `stop` turns true; answers under way are finished, for half a minute at most.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, mut stop: watch::Receiver<bool>) -> std::io::Result<()> {
        let background = tokio::spawn(Arc::clone(&self).work_forever());
        let stopped = {
            let mut stop = stop.clone();
            async move { _ = stop.wait_for(|stop| *stop).await }
        };
        let served = axum::serve(listener, self.routes()).with_graceful_shutdown(stopped).into_future();
        let overdue = async {
            _ = stop.wait_for(|stop| *stop).await;
            tokio::time::sleep(caps::CLOSE_WITHIN).await;
        };
        let ended = tokio::select! {
            served = served => served,
            () = overdue => Ok(()),
        };
        background.abort();
        ended
    }

    fn routes(self: &Arc<Self>) -> Routes {
        Routes::new()
            .route("/v1/completions", post(completion))
            .route("/v1/chat/completions", post(chat))
            .route("/v1/models", get(models))
            .merge(indexer::routes())
            .fallback(unknown)
            .layer(DefaultBodyLimit::max(caps::REQUEST_BYTES_MAX))
            .with_state(Arc::clone(self))
    }

    async fn work_forever(self: Arc<Self>) {
        let mut health = tokio::time::interval(self.options.health_every);
        let mut peers = tokio::time::interval(caps::PEERS_EVERY);
        loop {
            tokio::select! {
                _ = health.tick() => {
                    self.router.tick();
                    self.look_after_workers().await;
                }
                _ = peers.tick(), if !self.options.peers.is_empty() => self.ask_peers().await,
            }
        }
    }

    /// A worker that does not answer gets nothing until it does.
    async fn look_after_workers(&self) {
        let workers = self.router.fleet.workers();
        let each = workers.iter().filter(|worker| !worker.spec.url.is_empty()).map(|worker| async {
            let up = self.get(worker, "/health", caps::HEALTH_WITHIN).await;
            if worker.set_up(up.is_ok()) {
                match up {
                    Ok(_) => tracing::info!(worker = worker.spec.id, "the worker answers"),
                    Err(error) => tracing::warn!(
                        worker = worker.spec.id,
                        error,
                        "the worker does not answer, so it gets no requests"
                    ),
                }
            }
        });
        futures::future::join_all(each).await;
    }

    async fn ask_peers(&self) {
        let each = self.options.peers.iter().map(|url| async move {
            let peer = format!("{}/load", url.trim_end_matches('/'));
            let request = http::Request::get(&peer).body(Full::new(Bytes::new())).ok()?;
            let answer = tokio::time::timeout(caps::HEALTH_WITHIN, self.client.request(request)).await.ok()?.ok()?;
            let body = http_body_util::Limited::new(answer.into_body(), 1 << 20);
            let body = http_body_util::BodyExt::collect(body).await.ok()?.to_bytes();
            serde_json::from_slice::<HashMap<String, WorkerLoad>>(&body).ok()
        });
        let mut sum: HashMap<String, WorkerLoad> = HashMap::new();
        for (id, load) in futures::future::join_all(each).await.into_iter().flatten().flatten() {
            let known = sum.entry(id).or_default();
            known.prefill_tokens += load.prefill_tokens;
            known.prefilling += load.prefilling;
            known.decoding += load.decoding;
            known.held_tokens += load.held_tokens;
        }
        self.router.set_others(sum);
    }

    /// Figures for Prometheus.
    fn metrics(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::new();
        let place = &self.router.counts;
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counters = [
            ("requests_total", "Requests that the router received", get(&self.counts.requests)),
            ("placed_total", "Requests that the router placed at a worker", get(&place.placed)),
            ("by_affinity_total", "Requests that stayed at the worker of their session", get(&place.by_affinity)),
            ("shed_total", "Requests that were refused because all workers were full", get(&place.shed)),
            ("resumed_total", "Answers that broke off and continued at another worker", get(&self.counts.resumed)),
            ("broken_total", "Answers that broke off and could not be continued", get(&self.counts.broken)),
            (
                "expired_total",
                "Requests that expired because the router heard nothing more of them",
                get(&place.expired),
            ),
            ("prompt_tokens_total", "Prompt tokens of the requests that were placed", get(&place.tokens)),
            (
                "cached_tokens_total",
                "Prompt tokens that the chosen workers had or could fetch",
                get(&place.cached_tokens),
            ),
        ];
        for (name, help, value) in counters {
            let _ = writeln!(
                text,
                "# HELP kvstore_router_{name} {help}\n# TYPE kvstore_router_{name} counter\nkvstore_router_{name} {value}"
            );
        }
        let fleet = &self.router.fleet;
        let (engines, tiers) = (fleet.engine_index().status(), fleet.tier_index().status());
        let gauges = [
            ("waiting", "Requests that wait for a worker", self.router.waiting() as u64),
            (
                "workers_up",
                "Workers that answer",
                fleet.workers().iter().filter(|worker| worker.is_up()).count() as u64,
            ),
            ("engine_index_blocks", "Blocks in the index of the engines' memory", engines.blocks),
            ("engine_index_bytes", "Bytes of the index of the engines' memory", engines.bytes),
            ("node_index_blocks", "Blocks in the index of the nodes' tiers", tiers.blocks),
            ("node_index_bytes", "Bytes of the index of the nodes' tiers", tiers.bytes),
        ];
        for (name, help, value) in gauges {
            let _ = writeln!(
                text,
                "# HELP kvstore_router_{name} {help}\n# TYPE kvstore_router_{name} gauge\nkvstore_router_{name} {value}"
            );
        }
        text
    }
}

async fn completion(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Response {
    answer(app, Kind::Completion, headers, body).await
}

async fn chat(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Response {
    answer(app, Kind::Chat, headers, body).await
}

async fn answer(
    app: Arc<App>,
    kind: Kind,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Response {
    app.counts.requests.fetch_add(1, Ordering::Relaxed);
    match body {
        Ok(body) => proxy::handle(app, kind, headers, body).await.unwrap_or_else(IntoResponse::into_response),
        Err(rejection) => {
            let message = format!(
                "the request body cannot be read ({rejection}); it may have at most {} MiB",
                caps::REQUEST_BYTES_MAX >> 20
            );
            ApiError::invalid(None, message).into_response()
        }
    }
}

async fn models(State(app): State<Arc<App>>) -> axum::Json<Value> {
    let mut names: Vec<String> = app.router.fleet.workers().iter().map(|worker| worker.spec.model.clone()).collect();
    names.sort_unstable();
    names.dedup();
    let entries: Vec<Value> = names
        .iter()
        .map(|name| json!({"id": name, "object": "model", "created": 0, "owned_by": "kvstore-router"}))
        .collect();
    axum::Json(json!({"object": "list", "data": entries}))
}

async fn unknown(uri: Uri) -> Response {
    ApiError::unknown_path(uri.path()).into_response()
}

/// Nothing to say but a status.
pub(crate) fn plain(status: StatusCode, text: &'static str) -> Response {
    (status, text).into_response()
}
