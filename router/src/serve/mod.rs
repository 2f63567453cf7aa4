//! The router's faces: OpenAI's API in front of the workers, every other route of theirs, and what standalone indexers answer.

mod ahead;
mod answers;
mod app;
mod body;
mod call;
mod connections;
mod indexer;
mod json;
mod known;
mod listen;
mod metrics;
mod models;
mod openai;
mod pass;
mod proxy;
mod relay;
mod resume;
mod shapes;
mod sse;
mod upstream;
mod verify;
mod whole;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router as Routes;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use http::Method;
use http::uri::PathAndQuery;
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use app::{App, Model, ServeCounts, ServeOptions};
pub use indexer::explain;
use openai::Kind;

use crate::caps;
use crate::cost::WorkerLoad;

impl App {
    /// Serves until `stop` turns true; answers under way are finished, for half a minute at most.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: watch::Receiver<bool>) {
        let background = tokio::spawn(Arc::clone(&self).work_forever());
        let is_idle = || self.router.waiting() == 0 && self.router.under_way() == 0;
        listen::serve(listener, self.routes(), stop, is_idle).await;
        background.abort();
    }

    fn routes(self: &Arc<Self>) -> Routes {
        Routes::new()
            .route("/v1/completions", any(completion))
            .route("/v1/chat/completions", any(chat))
            .route("/v1/models", get(models::models))
            .route("/v1/models/{*id}", get(models::model))
            .merge(indexer::routes())
            .method_not_allowed_fallback(other_method)
            .fallback(pass::pass)
            .with_state(Arc::clone(self))
    }

    async fn work_forever(self: Arc<Self>) {
        let mut health = tokio::time::interval(self.options.health_every);
        let mut models = tokio::time::interval(caps::MODELS_EVERY);
        let mut peers = tokio::time::interval(caps::PEERS_EVERY);
        loop {
            tokio::select! {
                _ = models.tick() => {
                    self.ask_models().await;
                    self.compare_usual();
                }
                _ = health.tick() => {
                    self.router.tick();
                    self.look_after_workers().await;
                }
                _ = peers.tick(), if !self.options.peers.is_empty() => self.ask_peers().await,
            }
        }
    }

    async fn ask_peers(&self) {
        let each = self.options.peers.iter().map(|url| async move {
            let (_, body) = self.workers.get(url, "/load", caps::HEALTH_WITHIN).await.ok()?;
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
}

/// A method that a path does not have: of the router's own paths, that is the answer; another is the worker's.
async fn other_method(State(app): State<Arc<App>>, request: Request) -> Response {
    match indexer::is_own(request.uri().path()) {
        true => indexer::no_such_method(&request),
        false => pass::pass(State(app), request).await,
    }
}

async fn completion(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(app, Kind::Completion, request).await
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(app, Kind::Chat, request).await
}

async fn answer(app: Arc<App>, kind: Kind, request: Request) -> Response {
    // What it is the worker knows.
    if request.method() != Method::POST {
        return pass::pass(State(app), request).await;
    }
    app.counts.requests.fetch_add(1, Ordering::Relaxed);
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or(kind.path(), PathAndQuery::as_str).to_owned();
    let answered = match app.bodies.read(&parts.headers, body).await {
        Ok(read) => proxy::answer(app, kind, path, parts.headers, read).await,
        Err(error) => Err(error),
    };
    answered.unwrap_or_else(IntoResponse::into_response)
}
