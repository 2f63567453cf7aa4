//! Asking a worker: one request, one answer, and what a failure says of the worker.

use std::error::Error as _;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{HttpConnector, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::connections::{self, Connector};
use crate::caps;
use crate::fleet::{Evidence, Worker};

/// What a worker answers.
pub(super) type Upstream = http::Response<Incoming>;
type HttpClient = Client<Connector, Full<Bytes>>;

/// Who answered: for people, and for tests.
const WORKER_HEADER: &str = "x-kvstore-worker";
/// Names the data-parallel rank that is to answer. (Source: vLLM 0.32, `vllm/entrypoints/openai/engine/serving.py`.)
const RANK_HEADER: &str = "x-data-parallel-rank";

/// A request as it goes to a worker.
#[derive(Clone, Copy)]
pub(super) struct Outgoing<'a> {
    pub(super) method: &'a Method,
    /// With its query.
    pub(super) path: &'a str,
    /// As the client sent them.
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a Bytes,
    /// The router reads the answer, so it must not come compressed.
    pub(super) reads: bool,
    /// The data-parallel rank that is to have it, where the engine has several.
    pub(super) rank: Option<u32>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The worker's fault, as far as can be told.
    Worker(Evidence, String),
    /// The router's own time is over; the worker may be sound.
    TimedOut(Duration),
    /// The request cannot be sent to anybody.
    Request(String),
}

impl Failure {
    /// In words.
    pub(super) fn message(&self) -> String {
        match self {
            Self::Worker(_, why) | Self::Request(why) => why.clone(),
            Self::TimedOut(within) => format!("the worker did not answer within {} s", within.as_secs()),
        }
    }
}

/// Connections to the workers.
pub(super) struct Workers {
    pooled: HttpClient,
    /// Its connections are never used twice.
    fresh: HttpClient,
}

impl Workers {
    pub(super) fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(caps::CONNECT_WITHIN));
        connector.set_keepalive(Some(Duration::from_secs(30)));
        connector.set_nodelay(true);
        let builder = |idle: usize| {
            let mut builder = Client::builder(TokioExecutor::new());
            builder
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(caps::IDLE_CONNECTION_TIME)
                .pool_max_idle_per_host(idle);
            builder
        };
        let connector = Connector::new(connector);
        Self {
            pooled: builder(caps::IDLE_CONNECTIONS_MAX).build(connector.clone()),
            fresh: builder(0).build(connector),
        }
    }

    /// Asks a worker, and judges it by how that ends. `within`: until the head of its answer.
    pub(super) async fn ask(
        &self,
        worker: &Worker,
        request: Outgoing<'_>,
        within: Duration,
    ) -> Result<Upstream, Failure> {
        let asked = tokio::time::timeout(within, self.ask_twice(&worker.spec.url, request)).await;
        let asked = asked.unwrap_or(Err(Failure::TimedOut(within)));
        match asked {
            Ok(answer) => {
                if worker.succeeded() {
                    tracing::info!(worker = worker.spec.id, "the worker answers again");
                }
                Ok(answer)
            }
            Err(failure) => {
                if let Failure::Worker(evidence, why) = &failure {
                    judge(worker, *evidence, why);
                }
                Err(failure)
            }
        }
    }

    /// A connection that was kept may have been closed by the worker just now, which says nothing of it: a fresh one is tried. A worker that
    /// hangs up later has begun to work, and is not asked again.
    async fn ask_twice(&self, url: &str, request: Outgoing<'_>) -> Result<Upstream, Failure> {
        let build = || outgoing(url, request).map_err(Failure::Request);
        let fault = |error: &hyper_util::client::legacy::Error| Failure::Worker(evidence_of(error), cause_of(error));
        let begun = Instant::now();
        let mut request_here = build()?;
        let connection = capture_connection(&mut request_here);
        let answered = self.pooled.request(request_here).await;
        let was_used = connection.connection_metadata().as_ref().is_some_and(connections::is_used_again);
        let first = match answered {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let spoke =
            first.source().and_then(|error| error.downcast_ref::<hyper::Error>()).is_some_and(hyper::Error::is_parse);
        if first.is_connect() || !was_used || spoke || begun.elapsed() > caps::STALE_WITHIN {
            return Err(fault(&first));
        }
        self.fresh.request(build()?).await.map_err(|error| fault(&error))
    }

    /// What a worker says at a path, of a mebibyte at most.
    pub(super) async fn get(
        &self,
        url: &str,
        path: &str,
        within: Duration,
    ) -> Result<(http::StatusCode, Bytes), Failure> {
        let (method, headers, body) = (Method::GET, HeaderMap::new(), Bytes::new());
        let request = Outgoing { method: &method, path, headers: &headers, body: &body, reads: true, rank: None };
        self.whole(url, request, within, 1 << 20).await
    }

    /// What it answers to JSON.
    pub(super) async fn post(
        &self,
        url: &str,
        path: &str,
        body: Bytes,
        within: Duration,
    ) -> Result<(http::StatusCode, Bytes), Failure> {
        let json = HeaderValue::from_static("application/json");
        let (method, headers) = (Method::POST, HeaderMap::from_iter([(header::CONTENT_TYPE, json)]));
        let request = Outgoing { method: &method, path, headers: &headers, body: &body, reads: true, rank: None };
        self.whole(url, request, within, caps::ENGINE_PROMPT_BYTES_MAX).await
    }

    async fn whole(
        &self,
        url: &str,
        request: Outgoing<'_>,
        within: Duration,
        most: usize,
    ) -> Result<(http::StatusCode, Bytes), Failure> {
        let whole = async {
            let answer = self.ask_twice(url, request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), most).collect().await;
            let body = body.map_err(|error| Failure::Worker(Evidence::Doubt, error.to_string()))?;
            Ok((status, body.to_bytes()))
        };
        tokio::time::timeout(within, whole).await.unwrap_or(Err(Failure::TimedOut(within)))
    }
}

/// Takes down what a failure says of a worker.
pub(super) fn judge(worker: &Worker, evidence: Evidence, why: &str) {
    if worker.failed(evidence, why) {
        tracing::warn!(worker = worker.spec.id, why, "the worker is away: it gets no requests until it answers");
    } else if worker.is_up() {
        tracing::warn!(worker = worker.spec.id, why, "the worker did not answer a request");
    }
}

fn outgoing(url: &str, request: Outgoing<'_>) -> Result<http::Request<Full<Bytes>>, String> {
    // Of `OPTIONS *`, say.
    if !request.path.starts_with('/') {
        return Err(format!("{:?} is no path; use one that begins with /", request.path));
    }
    let url = format!("{}{}", url.trim_end_matches('/'), request.path);
    let built = http::Request::builder().method(request.method).uri(&url).body(Full::new(request.body.clone()));
    let mut built = built.map_err(|error| format!("the path cannot be passed on: {error}"))?;
    copy_headers(request.headers, built.headers_mut());
    for ours in [header::HOST, header::CONTENT_LENGTH, header::EXPECT] {
        built.headers_mut().remove(ours);
    }
    // A client that names a rank knows why.
    if let Some(rank) = request.rank.filter(|_| !request.headers.contains_key(RANK_HEADER)) {
        built.headers_mut().insert(RANK_HEADER, HeaderValue::from(rank));
    }
    if request.reads {
        built.headers_mut().remove(header::ACCEPT_ENCODING);
    }
    Ok(built)
}

fn evidence_of(error: &hyper_util::client::legacy::Error) -> Evidence {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            return Evidence::Gone;
        }
        cause = error.source();
    }
    Evidence::Doubt
}

/// An error, with what caused it.
pub(super) fn cause_of(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {}", cause_of(source)))
}

/// Copies all headers but those that say something of one connection, not of the message.
pub(super) fn copy_headers(from: &HeaderMap, to: &mut HeaderMap) {
    let named = from.get_all(header::CONNECTION);
    let named: Vec<&str> = named
        .iter()
        .filter_map(|names| names.to_str().ok())
        .flat_map(|names| names.split(','))
        .map(str::trim)
        .collect();
    for (name, value) in from {
        if !is_of_the_connection(name) && !named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str())) {
            to.append(name.clone(), value.clone());
        }
    }
}

fn is_of_the_connection(name: &HeaderName) -> bool {
    const NAMES: [HeaderName; 7] = [
        header::CONNECTION,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    NAMES.contains(name) || name == "keep-alive" || name == "proxy-connection"
}

/// Whether a message is of this media type, whatever its parameters are.
pub(super) fn is_of_type(headers: &HeaderMap, kind: &str) -> bool {
    let said = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    said.split(';').next().is_some_and(|said| said.trim().eq_ignore_ascii_case(kind))
}

/// Says who answered.
pub(super) fn name_worker(worker: &Worker, headers: &mut HeaderMap) {
    if let Ok(id) = HeaderValue::from_str(&worker.spec.id) {
        headers.insert(WORKER_HEADER, id);
    }
}
