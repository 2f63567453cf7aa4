//! The router in this process, in front of workers of a test.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kvstore_proto::hashes::Sha256Cbor;
use kvstore_router::events::vllm::{Batch, Event, Stored};
use kvstore_router::fleet::{Fleet, FleetOptions, Role, WorkerSpec};
use kvstore_router::hashing::Hashing;
use kvstore_router::place::{PlaceOptions, Router};
use kvstore_router::serve::{App, Model, ServeOptions};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// See the head of this file. It stops with this value.
pub struct Front {
    /// Where it serves.
    pub url: String,
    /// It.
    pub router: Arc<Router>,
    /// A client of it.
    pub client: Client<HttpConnector, Full<Bytes>>,
    _stop: watch::Sender<bool>,
}

/// What it answered.
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Who answered.
    pub worker: String,
    /// Its headers.
    pub headers: http::HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// Its body, as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?}", self.body))
    }

    /// What a stream's data lines say; its end is asserted: the last line, or an error, and never both.
    pub fn pieces(&self) -> Vec<Value> {
        let text = String::from_utf8(self.body.to_vec()).unwrap();
        let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        match data.last() {
            Some(&"[DONE]") => _ = data.pop(),
            last => assert!(last.is_some_and(|last| last.starts_with("{\"error\"")), "{text}"),
        }
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// The text of a stream's pieces.
    pub fn text(&self) -> String {
        let of = |piece: &Value| {
            let choice = &piece["choices"][0];
            let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
            text.unwrap_or_default().to_owned()
        };
        self.pieces().iter().map(of).collect()
    }
}

/// A worker of the model `m`.
pub fn spec(id: &str, url: &str, role: Role) -> WorkerSpec {
    WorkerSpec { role, block_tokens: 16, ..WorkerSpec::new(id, url, "m") }
}

impl Front {
    /// Starts one.
    pub async fn start(workers: &[WorkerSpec], options: PlaceOptions) -> Self {
        Self::start_with(workers, options, ServeOptions::default()).await
    }

    /// The same.
    pub async fn start_with(workers: &[WorkerSpec], options: PlaceOptions, serve: ServeOptions) -> Self {
        Self::start_for(workers, options, serve, HashMap::new()).await
    }

    /// The same, for these models.
    pub async fn start_for(
        workers: &[WorkerSpec],
        options: PlaceOptions,
        serve: ServeOptions,
        models: HashMap<String, Model>,
    ) -> Self {
        let fleet = Fleet::new(Hashing::Sha256Cbor(Sha256Cbor::default()), FleetOptions::default());
        fleet.set_workers(workers);
        let router = Router::new(fleet, options);
        let app = App::new(Arc::clone(&router), models, serve);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopping) = watch::channel(false);
        tokio::spawn(app.serve(listener, stopping));
        Self { url, router, client: Client::builder(TokioExecutor::new()).build_http(), _stop: stop }
    }

    /// Posts these bytes.
    pub async fn post_bytes(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        let request = http::Request::post(format!("{}{path}", self.url)).header("content-type", "application/json");
        let response = self.client.request(request.body(Full::new(body.into())).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let worker = parts.headers.get("x-kvstore-worker").map_or("", |id| id.to_str().unwrap()).to_owned();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { status: parts.status.as_u16(), worker, headers: parts.headers, body }
    }

    /// Posts JSON.
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_bytes(path, body.to_string()).await
    }

    /// Gets.
    pub async fn get(&self, path: &str) -> Answer {
        let request = http::Request::get(format!("{}{path}", self.url)).body(Full::default()).unwrap();
        let (parts, body) = self.client.request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { status: parts.status.as_u16(), worker: String::new(), headers: parts.headers, body }
    }

    /// The engine behind a worker says that it has this prompt.
    pub fn holds(&self, id: &str, tokens: &[u32]) {
        let hashing = self.router.fleet.hashing();
        let hashes = hashing.chain(tokens, 16, None, None).unwrap().names;
        let stored = Stored { hashes, block_tokens: 16, ..Stored::default() };
        let batch = Batch { events: vec![Event::Stored(stored)], ..Batch::default() };
        self.router.fleet.worker(id).unwrap().view.apply(&batch, 0);
    }

    /// Nothing is under way.
    pub fn idle(&self) -> bool {
        self.router.loads().values().all(|load| load.requests() == 0 && load.prefill_tokens == 0)
    }
}

/// Waits, for a minute at most.
pub async fn until(what: &str, reached: impl Fn() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
