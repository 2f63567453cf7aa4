//! The proxy: a request goes to the worker that is expected to answer first, and its answer back. Until the first byte another worker may be tried;
//! after it, an answer that breaks off is gone on with elsewhere, from the tokens that came: the next worker finds their prefix in the store.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::App;
use super::openai::{ApiError, Kind, Prompt, Request};
use super::relay::Relay;
use crate::caps;
use crate::fleet::{Role, Worker};
use crate::place::{Asked, Placed, Refused};

pub(super) type Upstream = http::Response<Incoming>;

/// Who answered: for people, and for tests.
const WORKER_HEADER: &str = "x-kvstore-worker";

/// Answers a request.
pub async fn handle(app: Arc<App>, kind: Kind, headers: HeaderMap, bytes: Bytes) -> Result<Response, ApiError> {
    let request = Arc::new(Request::read(kind, &headers, &bytes)?);
    drop(bytes);
    let mut asked = app.asked(&request).await;
    let mut body = request.body.clone();
    app.encode_first(&request, &headers).await;
    asked.role = app.answering_role(&request.model);
    if let Some(parameters) = app.prefill_first(&request, &asked, &headers).await
        && let Some(body) = body.as_object_mut()
    {
        body.insert("kv_transfer_params".into(), parameters);
    }
    let resumes = request.stream && app.options.resume && request.is_resumable();
    if resumes && let Some(body) = body.as_object_mut() {
        body.insert("return_token_ids".into(), Value::Bool(true));
    }
    let call = Call { app, request, asked, headers, body: Bytes::from(body.to_string()), resumes };
    let (placed, upstream) = call.send_somewhere(&mut Vec::new()).await?;
    let is_stream = upstream
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    if call.request.stream && is_stream && upstream.status().is_success() {
        Ok(Relay::begin(call, placed, upstream))
    } else {
        call.answer_whole(placed, upstream).await
    }
}

/// A request on its way.
pub(super) struct Call {
    pub(super) app: Arc<App>,
    pub(super) request: Arc<Request>,
    pub(super) asked: Asked,
    headers: HeaderMap,
    body: Bytes,
    /// It can be gone on with elsewhere.
    pub(super) resumes: bool,
}

impl Call {
    /// Sends the request to one worker after the other, until one takes it: one that answers, if only that the request is wrong.
    pub(super) async fn send_somewhere(&self, but: &mut Vec<usize>) -> Result<(Placed, Upstream), ApiError> {
        self.send_to_some(self.request.kind.path(), &self.body, but).await
    }

    /// The same, of another request.
    pub(super) async fn send_to_some(
        &self,
        path: &str,
        body: &Bytes,
        but: &mut Vec<usize>,
    ) -> Result<(Placed, Upstream), ApiError> {
        let mut last: Option<(Placed, Upstream)> = None;
        loop {
            let placed = match self.app.router.place(&self.asked, but).await {
                Ok(placed) => placed,
                // Nobody else is there: what the last one said is the answer.
                Err(Refused::AllAway(_)) if last.is_some() => break,
                Err(refused) => return Err(refused.into()),
            };
            but.push(placed.worker.number);
            self.app.hint(&placed, &self.asked);
            match self.app.send(&placed.worker, path, &self.headers, body).await {
                Ok(upstream) if !is_the_workers_fault(upstream.status()) => return Ok((placed, upstream)),
                Ok(upstream) => {
                    tracing::warn!(worker = placed.worker.spec.id, status = %upstream.status(), "the worker did not take a request");
                    last = Some((placed, upstream));
                }
                Err(error) => {
                    tracing::warn!(worker = placed.worker.spec.id, error, "the worker cannot be reached");
                    placed.worker.set_up(false);
                }
            }
            if but.len() >= caps::TRIES_MAX {
                break;
            }
        }
        last.ok_or_else(|| ApiError::unavailable("no worker could be reached; try again in a moment"))
    }

    /// An answer that comes in one piece.
    async fn answer_whole(self, placed: Placed, upstream: Upstream) -> Result<Response, ApiError> {
        let mut but = vec![placed.worker.number];
        let (mut placed, mut upstream) = (placed, upstream);
        loop {
            let (status, headers) = (upstream.status(), upstream.headers().clone());
            let expected = placed.terms.expected_time();
            let whole = Limited::new(upstream.into_body(), caps::ANSWER_BYTES_MAX).collect();
            tokio::pin!(whole);
            // Its prompt is computed long before its answer is: by then, as far as can be told.
            let collected = tokio::select! {
                collected = &mut whole => collected,
                () = tokio::time::sleep(expected) => {
                    placed.assume_prefilled();
                    whole.await
                }
            };
            match collected {
                Ok(collected) => {
                    let mut response = Response::new(Body::from(collected.to_bytes()));
                    *response.status_mut() = status;
                    copy_headers(&headers, response.headers_mut());
                    response.headers_mut().remove(header::TRANSFER_ENCODING);
                    name_worker(&placed.worker, response.headers_mut());
                    return Ok(response);
                }
                Err(error) => {
                    tracing::warn!(
                        worker = placed.worker.spec.id,
                        error,
                        "the worker's answer broke off, so the request goes to another worker"
                    );
                    if but.len() >= caps::TRIES_MAX {
                        return Err(ApiError::unavailable(
                            "the answers of several workers broke off; try again in a moment",
                        ));
                    }
                    (placed, upstream) = self.send_somewhere(&mut but).await?;
                }
            }
        }
    }
}

fn is_the_workers_fault(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

pub(super) fn copy_headers(from: &HeaderMap, to: &mut HeaderMap) {
    for (name, value) in from {
        if !is_of_the_connection(name) && name != header::CONTENT_LENGTH {
            to.append(name.clone(), value.clone());
        }
    }
}

/// Headers that say something of one connection, not of the request.
fn is_of_the_connection(name: &HeaderName) -> bool {
    const NAMES: [&str; 9] = [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
    ];
    NAMES.contains(&name.as_str())
}

pub(super) fn name_worker(worker: &Worker, headers: &mut HeaderMap) {
    if let Ok(id) = HeaderValue::from_str(&worker.spec.id) {
        headers.insert(WORKER_HEADER, id);
    }
}

impl App {
    /// What routing needs to know of a request.
    pub(super) async fn asked(self: &Arc<Self>, request: &Arc<Request>) -> Asked {
        let (app, reading) = (Arc::clone(self), Arc::clone(request));
        // A long prompt takes milliseconds to tokenize and to hash.
        let known = tokio::task::spawn_blocking(move || app.chain_of(&reading)).await;
        let (model, session) = (request.model.clone(), request.session);
        match known {
            Ok(Some((tokens, chain))) => Asked { model, tokens, chain, session, role: Role::Both },
            _ => Asked { model, tokens: request.guessed_tokens(), session, ..Asked::default() },
        }
    }

    fn chain_of(&self, request: &Request) -> Option<(u64, crate::hashing::Chain)> {
        let model = self.models.get(&request.model);
        let tokenizer = model.and_then(|model| model.tokens.as_ref());
        let encoded = match request.prompt() {
            Prompt::Tokens(tokens) => Ok(tokens),
            Prompt::Text(text) => tokenizer?.encode(text, true),
            Prompt::Chat => tokenizer?.encode_chat(&request.body),
            Prompt::Other => return None,
        };
        let tokens = match encoded {
            Ok(tokens) => tokens,
            Err(error) => {
                tracing::debug!(%error, model = request.model, "the prompt cannot be tokenized, so the request is routed without its tokens");
                return None;
            }
        };
        let adapter = model.filter(|model| model.adapter).map(|_| request.model.as_str());
        let block_tokens = self.router.fleet.block_tokens(&request.model)?;
        let chain = self.router.fleet.hashing().chain(&tokens, block_tokens, adapter, request.salt.as_deref()).ok()?;
        Some((tokens.len() as u64, chain))
    }

    /// Whole requests go to workers that do both halves, or to those that do the second where a pool is split.
    pub(super) fn answering_role(&self, model: &str) -> Role {
        let decodes = |worker: &Arc<Worker>| worker.spec.model == model && worker.spec.role == Role::Decode;
        if self.router.fleet.workers().iter().any(decodes) { Role::Decode } else { Role::Both }
    }

    fn has_role(&self, model: &str, role: Role) -> bool {
        let has = |worker: &Arc<Worker>| worker.spec.model == model && worker.spec.role == role && worker.is_up();
        self.router.fleet.workers().iter().any(has)
    }

    /// Tells the node that blocks of its slower tiers are wanted in memory.
    fn hint(&self, placed: &Placed, asked: &Asked) {
        let [_, nvme, object] = placed.terms.cached.fetched_bytes;
        if let Some(node) = placed.worker.node.clone()
            && nvme + object > 0
        {
            let (model, chain) = (asked.model.clone(), asked.chain.clone());
            tokio::spawn(async move { node.prefetch(&model, &chain).await });
        }
    }

    /// Where there are workers for prompts alone, and this one has much to compute: one of them computes it first, and the store has it then. What it
    /// says is to be told to the worker that answers.
    async fn prefill_first(&self, request: &Request, asked: &Asked, headers: &HeaderMap) -> Option<Value> {
        if !self.has_role(&request.model, Role::Prefill) {
            return None;
        }
        let here = self.router.candidates(asked, &[]).ok()?;
        let least = here.iter().map(|candidate| candidate.terms.tokens_to_compute).min();
        if least.is_some_and(|least| least < self.router.options().split_tokens_min) {
            return None;
        }
        let prefill = Asked { role: Role::Prefill, ..asked.clone() };
        let placed = self.router.place(&prefill, &[]).await.ok()?;
        let mut body = request.body.clone();
        let fields = body.as_object_mut()?;
        let one = json!(1);
        fields.remove("stream_options");
        fields.remove("min_tokens");
        fields.insert("stream".into(), Value::Bool(false));
        fields.insert("max_tokens".into(), one.clone());
        if request.kind == Kind::Chat {
            fields.insert("max_completion_tokens".into(), one);
        }
        // As vLLM's connectors that hand over blocks expect it; the store's passes it over.
        fields.entry("kv_transfer_params").or_insert_with(|| {
            json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null, "remote_block_ids": null, "remote_host": null, "remote_port": null})
        });
        let answer = self.send(&placed.worker, request.kind.path(), headers, &Bytes::from(body.to_string())).await;
        let answer = match answer {
            Ok(answer) if answer.status().is_success() => answer,
            Ok(answer) => {
                tracing::warn!(worker = placed.worker.spec.id, status = %answer.status(), "the worker did not compute a prompt ahead");
                return None;
            }
            Err(error) => {
                tracing::warn!(worker = placed.worker.spec.id, error, "the worker did not compute a prompt ahead");
                placed.worker.set_up(false);
                return None;
            }
        };
        let whole = Limited::new(answer.into_body(), caps::ANSWER_BYTES_MAX).collect().await.ok()?.to_bytes();
        let whole: Value = serde_json::from_slice(&whole).ok()?;
        whole.get("kv_transfer_params").filter(|parameters| parameters.is_object()).cloned()
    }

    /// Where there are workers for inputs that are no text, they get each of them first; the store has their outputs then.
    async fn encode_first(&self, request: &Request, headers: &HeaderMap) {
        if request.kind != Kind::Chat || !self.has_role(&request.model, Role::Encode) {
            return;
        }
        let messages = request.body.get("messages").and_then(Value::as_array);
        let parts = messages.into_iter().flatten().filter_map(|message| message.get("content")?.as_array()).flatten();
        let others = parts.filter(|part| part.get("type").is_some_and(|kind| kind != "text"));
        let each = others.take(caps::ENCODED_PARTS_MAX).map(|part| async move {
            let asked = Asked { model: request.model.clone(), tokens: 1, role: Role::Encode, ..Asked::default() };
            let placed = self.router.place(&asked, &[]).await.ok()?;
            let body = json!({"model": request.model, "max_tokens": 1, "stream": false, "messages": [{"role": "user", "content": [part]}]});
            let answer = self.send(&placed.worker, Kind::Chat.path(), headers, &Bytes::from(body.to_string())).await;
            match answer {
                Ok(answer) => _ = Limited::new(answer.into_body(), caps::ANSWER_BYTES_MAX).collect().await,
                Err(error) => {
                    tracing::warn!(worker = placed.worker.spec.id, error, "the worker did not encode an input ahead");
                    placed.worker.set_up(false);
                }
            }
            Some(())
        });
        futures::future::join_all(each).await;
    }

    /// Sends a body to a worker.
    async fn send(&self, worker: &Worker, path: &str, headers: &HeaderMap, body: &Bytes) -> Result<Upstream, String> {
        let url = format!("{}{path}", worker.spec.url.trim_end_matches('/'));
        let mut request = http::Request::post(&url).body(Full::new(body.clone())).map_err(|error| error.to_string())?;
        for (name, value) in headers {
            let ours = [header::CONTENT_LENGTH, header::CONTENT_TYPE, header::ACCEPT_ENCODING, header::EXPECT];
            if !is_of_the_connection(name) && !ours.contains(name) {
                request.headers_mut().append(name.clone(), value.clone());
            }
        }
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let silence = self.router.options().silence;
        match tokio::time::timeout(silence, self.client.request(request)).await {
            Ok(answer) => answer.map_err(|error| cause_of(&error)),
            Err(_) => Err(format!("the worker did not answer within {} s", silence.as_secs())),
        }
    }
}

pub(super) fn cause_of(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

impl App {
    /// What routing needs to know of the rest of an answer: a prompt of tokens.
    pub(super) fn asked_again(&self, asked: &Asked, request: &Request, tokens: &[u32]) -> Asked {
        let adapter = self.models.get(&request.model).filter(|model| model.adapter).map(|_| request.model.as_str());
        let block_tokens = self.router.fleet.block_tokens(&request.model).unwrap_or(16);
        let chain = self.router.fleet.hashing().chain(tokens, block_tokens, adapter, request.salt.as_deref());
        Asked { tokens: tokens.len() as u64, chain: chain.unwrap_or_default(), ..asked.clone() }
    }

    /// Tokens that a model's context has, as one of its workers says.
    pub(super) async fn model_tokens_max(&self, model: &str) -> Option<u64> {
        for worker in self.router.fleet.workers().iter().filter(|worker| worker.spec.model == model && worker.is_up()) {
            let found = async {
                let models = self.get(worker, "/v1/models", Duration::from_secs(2)).await.ok()?;
                let models: Value = serde_json::from_slice(&models).ok()?;
                let is_it = |entry: &&Value| entry.get("id").is_some_and(|id| id == model);
                models.get("data")?.as_array()?.iter().find(is_it)?.get("max_model_len")?.as_u64()
            };
            if let Some(found) = found.await {
                return Some(found);
            }
        }
        None
    }

    /// What a worker says at a path.
    pub(super) async fn get(&self, worker: &Worker, path: &str, within: Duration) -> Result<Bytes, String> {
        let url = format!("{}{path}", worker.spec.url.trim_end_matches('/'));
        let request = http::Request::get(&url).body(Full::new(Bytes::new())).map_err(|error| error.to_string())?;
        let whole = async {
            let answer = self.client.request(request).await.map_err(|error| cause_of(&error))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), 1 << 20).collect().await.map_err(|error| error.to_string())?;
            if status.is_server_error() { Err(format!("{status}")) } else { Ok(body.to_bytes()) }
        };
        tokio::time::timeout(within, whole).await.unwrap_or_else(|_| Err("the worker did not answer in time".into()))
    }
}
