//! A request on its way to one worker after the other, until one takes it.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use kvstore_chat::engine::Engine;

use super::app::App;
use super::body::Held;
use super::json::Object;
use super::openai::{ApiError, Request};
use super::resume;
use super::upstream::{Failure, Outgoing, Upstream};
use crate::caps;
use crate::fleet::Worker;
use crate::hashing::Chain;
use crate::place::{Asked, Placed, Refused};

/// See the head of this file.
pub(super) struct Call {
    pub(super) app: Arc<App>,
    pub(super) request: Arc<Request>,
    pub(super) asked: Asked,
    pub(super) headers: HeaderMap,
    /// With its query.
    pub(super) path: String,
    /// As it goes to workers.
    pub(super) body: Bytes,
    /// Why a broken answer cannot be gone on with at another worker; `None` where it can.
    pub(super) hindrance: Option<String>,
    /// The router asks for token ids, and the client does not.
    pub(super) hides: bool,
    /// The memory that the request takes.
    pub(super) held: Held,
}

impl Call {
    /// Its answer has begun, and it is not asked from its start again: what that took is given up.
    pub(super) fn forget_prompt(&mut self) {
        self.request = Arc::new(resume::what_is_needed(&self.request));
        (self.body, self.held, self.asked.chain) = (Bytes::new(), Held::default(), Chain::default());
        // Each value is a part of the buffer that the connection was read into: one that is kept keeps all of it.
        self.headers = if self.hindrance.is_some() { HeaderMap::new() } else { copies(&self.headers) };
    }

    /// Sends the request to one worker after the other, until one takes it: one that answers, if only that the request is wrong.
    pub(super) async fn send_somewhere(&self, but: &mut Vec<usize>) -> Result<(Placed, Upstream), ApiError> {
        self.send_to_some(&self.path, &self.body, but).await
    }

    /// The same, of another request. `but`: engines that had it already; those that get it are added.
    pub(super) async fn send_to_some(
        &self,
        path: &str,
        body: &Bytes,
        but: &mut Vec<usize>,
    ) -> Result<(Placed, Upstream), ApiError> {
        let mut last: Option<(Placed, Upstream)> = None;
        let (headers, reads) = (&self.headers, self.reads());
        let request = Outgoing { method: &Method::POST, path, headers, body, reads, rank: None };
        loop {
            let placed = match self.app.router.place(&self.asked, but).await {
                Ok(placed) => placed,
                // Nobody else is there: what the last one said is the answer.
                Err(Refused::AllAway(_)) if last.is_some() => break,
                Err(refused) => return Err(refused.into()),
            };
            but.push(placed.worker.number);
            self.app.hint(&placed, &self.asked);
            let silence = self.app.router.options().silence;
            let rank = self.app.router.fleet.rank_of(&self.asked.chain, &placed.worker);
            let named = rank.and_then(|rank| body_for_rank(body, &placed.worker, rank));
            let request = Outgoing { rank, body: named.as_ref().unwrap_or(body), ..request };
            match self.app.workers.ask(&placed.worker, request, silence).await {
                Ok(upstream) if !is_the_workers_fault(upstream.status()) => return Ok((placed, upstream)),
                Ok(upstream) => {
                    tracing::warn!(worker = placed.worker.spec.id, status = %upstream.status(), "the worker did not take a request");
                    last = Some((placed, upstream));
                }
                Err(Failure::TimedOut(within)) => return Err(ApiError::timed_out(within)),
                Err(Failure::Request(why)) => return Err(ApiError::invalid(None, why)),
                Err(Failure::Worker(..)) => {}
            }
            if but.len() >= caps::TRIES_MAX {
                break;
            }
        }
        last.ok_or_else(|| ApiError::unavailable("no worker could be reached; try again in a moment"))
    }

    fn reads(&self) -> bool {
        self.request.streams()
    }
}

/// The body that names a data-parallel rank, for SGLang, which takes no header for that. (Source: SGLang 0.5.23,
/// `sglang/srt/entrypoints/openai/protocol.py`.) `None` where the client named one, or it is another engine.
fn body_for_rank(body: &Bytes, worker: &Worker, rank: u32) -> Option<Bytes> {
    const FIELDS: [&str; 2] = ["routed_dp_rank", "data_parallel_rank"];
    if worker.engine() != Some(Engine::Sglang) {
        return None;
    }
    let body = Object::read(body.clone()).ok()?;
    let is_named = FIELDS.iter().any(|field| !body.value(field).is_null());
    (!is_named).then(|| body.with(&[(FIELDS[0], &rank.to_string())]))
}

/// The same headers, in memory of their own.
fn copies(headers: &HeaderMap) -> HeaderMap {
    let copy = |(name, value): (&HeaderName, &HeaderValue)| {
        let copy = HeaderValue::from_bytes(value.as_bytes()).unwrap_or_else(|_| value.clone());
        (name.clone(), copy)
    };
    headers.iter().map(copy).collect()
}

fn is_the_workers_fault(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}
