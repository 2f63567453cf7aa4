//! The proxy: a request goes to the worker that is expected to answer first, and its answer back. Until the first byte another worker may be tried;
//! after it, an answer that breaks off is gone on with elsewhere, from the tokens that came: the next worker finds their prefix in the store.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use super::App;
use super::openai::{ApiError, Kind, Prompt, Request};
use super::sse::{self, Events};
use crate::caps;
use crate::fleet::{Role, Worker};
use crate::place::{Asked, Placed, Refused};

type Upstream = http::Response<Incoming>;

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
struct Call {
    app: Arc<App>,
    request: Arc<Request>,
    asked: Asked,
    headers: HeaderMap,
    body: Bytes,
    resumes: bool,
}

impl Call {
    /// Sends the request to one worker after the other, until one takes it: one that answers, if only that the request is wrong.
    async fn send_somewhere(&self, but: &mut Vec<usize>) -> Result<(Placed, Upstream), ApiError> {
        self.send_to_some(self.request.kind.path(), &self.body, but).await
    }

    async fn send_to_some(
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
                    tracing::warn!(worker = placed.worker.spec.id, status = %upstream.status(), "a worker did not take a request");
                    last = Some((placed, upstream));
                }
                Err(error) => {
                    tracing::warn!(worker = placed.worker.spec.id, error, "a worker cannot be reached");
                    placed.worker.set_up(false);
                }
            }
            if but.len() >= caps::TRIES_MAX {
                break;
            }
        }
        last.ok_or_else(|| ApiError::unavailable("no worker could be reached: try again in a moment"))
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
                        "an answer broke off: the request goes to another worker"
                    );
                    if but.len() >= caps::TRIES_MAX {
                        return Err(ApiError::unavailable("the workers' answers broke off"));
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

fn copy_headers(from: &HeaderMap, to: &mut HeaderMap) {
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

fn name_worker(worker: &Worker, headers: &mut HeaderMap) {
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
                tracing::debug!(%error, model = request.model, "a request is routed without its tokens");
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
                tracing::warn!(worker = placed.worker.spec.id, status = %answer.status(), "a prompt was not computed ahead");
                return None;
            }
            Err(error) => {
                tracing::warn!(worker = placed.worker.spec.id, error, "a prompt was not computed ahead");
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
                    tracing::warn!(worker = placed.worker.spec.id, error, "an input was not encoded ahead");
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
            Err(_) => Err(format!("no answer within {} s", silence.as_secs())),
        }
    }
}

fn cause_of(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// An answer that comes in pieces.
struct Relay {
    call: Call,
    placed: Placed,
    body: Incoming,
    events: Events,
    out: VecDeque<Bytes>,
    answer: Answer,
    /// Workers that had it.
    but: Vec<usize>,
    done: bool,
}

/// What came so far.
#[derive(Default)]
struct Answer {
    /// What every piece says: id, model, and when.
    id: Option<Value>,
    created: Option<Value>,
    model: Option<Value>,
    prompt: Option<Vec<u32>>,
    generated: Vec<u32>,
    /// Pieces of another worker are to look like the first one's.
    resumed: bool,
    /// Tokens that came before the answer was gone on with last.
    before: usize,
    /// Some piece was sent that tokens alone do not bring back.
    opaque: bool,
    sent: bool,
    finished: bool,
}

/// What to do with a piece.
enum Piece {
    Send(Value),
    /// The worker says that it failed.
    Failed(String),
}

impl Answer {
    /// Takes a piece of the answer as the worker sent it; as the client is to see it.
    fn take(&mut self, mut piece: Value, request: &Request) -> Piece {
        if let Some(error) = piece.get("error") {
            return Piece::Failed(error.to_string());
        }
        let Some(fields) = piece.as_object_mut() else { return Piece::Failed("a piece that is no object".into()) };
        if !self.resumed {
            self.id = self.id.take().or_else(|| fields.get("id").cloned());
            self.created = self.created.take().or_else(|| fields.get("created").cloned());
            self.model = self.model.take().or_else(|| fields.get("model").cloned());
        }
        let list = |value: Option<Value>| -> Option<Vec<u32>> { serde_json::from_value(value?).ok() };
        let mut prompt = list(fields.get("prompt_token_ids").cloned());
        if !request.wants_token_ids {
            fields.remove("prompt_token_ids");
        }
        let (mut new, mut has_content) = (Vec::new(), false);
        for choice in fields.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(choice) = choice.as_object_mut() else { continue };
            prompt = prompt.or_else(|| list(choice.get("prompt_token_ids").cloned()));
            let tokens = list(choice.get("token_ids").cloned());
            if !request.wants_token_ids {
                choice.remove("prompt_token_ids");
                choice.remove("token_ids");
            }
            let text = |value: Option<&Value>| value.and_then(Value::as_str).is_some_and(|text| !text.is_empty());
            let delta = choice.get("delta").and_then(Value::as_object);
            let with_text = text(choice.get("text")) || text(delta.and_then(|delta| delta.get("content")));
            has_content |= with_text || tokens.as_ref().is_some_and(|tokens| !tokens.is_empty());
            // Calls of tools, and thoughts, are not told by tokens alone.
            let is_known = |(name, value): (&String, &Value)| {
                matches!(name.as_str(), "role" | "content")
                    || value.is_null()
                    || value.as_array().is_some_and(Vec::is_empty)
            };
            self.opaque |= delta.is_some_and(|delta| !delta.iter().all(is_known));
            self.opaque |= with_text && tokens.is_none();
            new.extend(tokens.unwrap_or_default());
            self.finished |= choice.get("finish_reason").is_some_and(|reason| !reason.is_null());
        }
        if !self.resumed && self.prompt.is_none() {
            self.prompt = prompt;
        }
        self.generated.extend(&new);
        self.sent |= has_content;
        if self.resumed {
            self.dress(&mut piece, request);
        }
        Piece::Send(piece)
    }

    /// Makes a piece of a continuation look like one of the answer that it continues.
    fn dress(&self, piece: &mut Value, request: &Request) {
        let Some(fields) = piece.as_object_mut() else { return };
        for (name, value) in [("id", &self.id), ("created", &self.created), ("model", &self.model)] {
            if let Some(value) = value {
                fields.insert(name.into(), value.clone());
            }
        }
        if let Some(usage) = fields.get_mut("usage").and_then(Value::as_object_mut) {
            let prompt = self.prompt.as_ref().map_or(0, Vec::len) as u64;
            let completion = usage.get("completion_tokens").and_then(Value::as_u64).unwrap_or(0) + self.before as u64;
            usage.insert("prompt_tokens".into(), json!(prompt));
            usage.insert("completion_tokens".into(), json!(completion));
            usage.insert("total_tokens".into(), json!(prompt + completion));
        }
        if request.kind == Kind::Chat {
            fields.insert("object".into(), json!("chat.completion.chunk"));
            for choice in fields.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
                let Some(choice) = choice.as_object_mut() else { continue };
                let text = choice.remove("text").unwrap_or_else(|| json!(""));
                choice.insert("delta".into(), json!({"content": text}));
                choice.remove("prompt_logprobs");
            }
        }
    }

    /// The request for the rest of the answer: what was asked for, as a prompt of tokens. `None` where that cannot be.
    fn rest(&self, request: &Request, tokens_max: Option<u64>) -> Option<Value> {
        let prompt = self.prompt.as_ref().filter(|_| !self.opaque)?;
        let came = self.generated.len() as u64;
        let room = request.max_tokens().or(tokens_max.map(|max| max.saturating_sub(prompt.len() as u64)))?;
        let left = room.checked_sub(came).filter(|left| *left > 0)?;
        let all: Vec<u32> = prompt.iter().chain(&self.generated).copied().collect();
        const KEPT: [&str; 22] = [
            "model",
            "stream_options",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "seed",
            "stop",
            "stop_token_ids",
            "logit_bias",
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "user",
            "cache_salt",
            "priority",
            "allowed_token_ids",
            "bad_words",
            "length_penalty",
            "truncate_prompt_tokens",
        ];
        let kept = KEPT.iter().filter_map(|name| Some(((*name).to_owned(), request.body.get(*name)?.clone())));
        let mut rest: Map<String, Value> = kept.collect();
        rest.insert("prompt".into(), json!(all));
        rest.insert("max_tokens".into(), json!(left));
        rest.insert("stream".into(), Value::Bool(true));
        rest.insert("return_token_ids".into(), Value::Bool(true));
        rest.insert("add_special_tokens".into(), Value::Bool(false));
        if let Some(least) = request.body.get("min_tokens").and_then(Value::as_u64) {
            rest.insert("min_tokens".into(), json!(least.saturating_sub(came)));
        }
        Some(Value::Object(rest))
    }
}

impl Relay {
    fn begin(call: Call, placed: Placed, upstream: Upstream) -> Response {
        let (parts, body) = upstream.into_parts();
        let but = vec![placed.worker.number];
        let mut response = Response::new(Body::empty());
        copy_headers(&parts.headers, response.headers_mut());
        name_worker(&placed.worker, response.headers_mut());
        let relay = Self {
            call,
            placed,
            body,
            events: Events::default(),
            out: VecDeque::new(),
            answer: Answer::default(),
            but,
            done: false,
        };
        // Dropped with the client's connection, it drops the worker's.
        let pieces = futures::stream::unfold(relay, |mut relay| async move {
            let piece = relay.next().await?;
            Some((Ok::<Bytes, Infallible>(piece), relay))
        });
        *response.body_mut() = Body::from_stream(pieces.boxed());
        response
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(piece) = self.out.pop_front() {
                return Some(piece);
            }
            if self.done {
                return None;
            }
            let silence = self.call.app.router.options().silence;
            let broken = match tokio::time::timeout(silence, self.body.frame()).await {
                Ok(Some(Ok(frame))) => frame.into_data().ok().and_then(|bytes| self.take(&bytes).err()),
                Ok(Some(Err(error))) => Some(cause_of(&error)),
                Ok(None) => Some("the answer ended in the middle".to_owned()),
                Err(_) => Some(format!("nothing came for {} s", silence.as_secs())),
            };
            if let Some(why) = broken {
                self.go_on_elsewhere(&why).await;
            }
        }
    }

    fn take(&mut self, bytes: &Bytes) -> Result<(), String> {
        self.events.push(bytes).map_err(|error| error.to_string())?;
        while let Some(data) = self.events.next_data() {
            if data == "[DONE]" {
                self.out.push_back(sse::event("[DONE]"));
                self.done = true;
                return Ok(());
            }
            let piece: Value =
                serde_json::from_str(&data).map_err(|error| format!("a piece that is not JSON: {error}"))?;
            let before = self.answer.generated.len();
            match self.answer.take(piece, &self.call.request) {
                Piece::Send(piece) => {
                    let new = (self.answer.generated.len() - before) as u64;
                    if self.answer.sent {
                        self.placed.tokens(new.max(1));
                    }
                    self.out.push_back(sse::event(&piece.to_string()));
                }
                Piece::Failed(why) => return Err(why),
            }
        }
        Ok(())
    }

    /// The worker is gone, or gave up: the answer goes on at another, or ends with an error that says so.
    async fn go_on_elsewhere(&mut self, why: &str) {
        let worker = Arc::clone(&self.placed.worker);
        if self.answer.finished {
            // All but the end came.
            self.out.push_back(sse::event("[DONE]"));
            self.done = true;
            return;
        }
        tracing::warn!(worker = worker.spec.id, why, tokens = self.answer.generated.len(), "an answer broke off");
        match self.another().await {
            Ok((placed, upstream)) => {
                tracing::info!(
                    from = worker.spec.id,
                    to = placed.worker.spec.id,
                    "the answer goes on at another worker"
                );
                self.call.app.counts.resumed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                (self.placed, self.body, self.events) = (placed, upstream.into_body(), Events::default());
            }
            Err(problem) => {
                self.call.app.counts.broken.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let error = ApiError::unavailable(format!("the worker's answer broke off ({why}), and {problem}"));
                self.out.push_back(sse::event(&error.body().to_string()));
                self.out.push_back(sse::event("[DONE]"));
                self.done = true;
            }
        }
    }

    async fn another(&mut self) -> Result<(Placed, Upstream), String> {
        if self.but.len() >= caps::TRIES_MAX {
            return Err("it was tried at several workers already".into());
        }
        let before = self.but.len();
        let found = if !self.answer.sent {
            // Nothing came yet: all of it is asked for again.
            self.call.send_somewhere(&mut self.but).await
        } else {
            if !self.call.resumes {
                return Err(
                    "this request cannot be gone on with (it has tools, choices, log-probabilities or a format)".into(),
                );
            }
            let tokens_max = match self.call.request.max_tokens() {
                Some(_) => None,
                None => self.call.app.model_tokens_max(&self.call.request.model).await,
            };
            let rest = self.answer.rest(&self.call.request, tokens_max);
            let rest = rest.ok_or("its worker did not say which tokens came (return_token_ids)")?;
            let tokens: Vec<u32> =
                rest.get("prompt").and_then(|tokens| serde_json::from_value(tokens.clone()).ok()).unwrap_or_default();
            self.call.asked = self.call.app.asked_again(&self.call.asked, &self.call.request, &tokens);
            let body = Bytes::from(rest.to_string());
            self.answer.resumed = true;
            self.answer.before = self.answer.generated.len();
            self.call.send_to_some(Kind::Completion.path(), &body, &mut self.but).await
        };
        let (placed, upstream) = found.map_err(|error| error.message().to_owned())?;
        if !upstream.status().is_success() {
            let id = &placed.worker.spec.id;
            return Err(format!(
                "worker {id:?} answered {} to the rest ({} tries)",
                upstream.status(),
                self.but.len() - before
            ));
        }
        Ok((placed, upstream))
    }
}

impl App {
    fn asked_again(&self, asked: &Asked, request: &Request, tokens: &[u32]) -> Asked {
        let adapter = self.models.get(&request.model).filter(|model| model.adapter).map(|_| request.model.as_str());
        let block_tokens = self.router.fleet.block_tokens(&request.model).unwrap_or(16);
        let chain = self.router.fleet.hashing().chain(tokens, block_tokens, adapter, request.salt.as_deref());
        Asked { tokens: tokens.len() as u64, chain: chain.unwrap_or_default(), ..asked.clone() }
    }

    /// Tokens that a model's context has, as one of its workers says.
    async fn model_tokens_max(&self, model: &str) -> Option<u64> {
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
        tokio::time::timeout(within, whole).await.unwrap_or_else(|_| Err("no answer in time".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: Kind, body: Value) -> Request {
        Request::read(kind, &HeaderMap::new(), body.to_string().as_bytes()).unwrap()
    }

    fn sent(piece: Piece) -> Value {
        match piece {
            Piece::Send(piece) => piece,
            Piece::Failed(why) => panic!("{why}"),
        }
    }

    #[test]
    fn a_continuation_looks_like_what_it_continues() {
        let request = request(
            Kind::Chat,
            json!({"model": "m", "stream": true, "max_tokens": 10, "temperature": 0, "tools": null, "messages": [{"role": "user", "content": "x"}]}),
        );
        let mut answer = Answer::default();
        let role = json!({"id": "a", "created": 1, "model": "m", "object": "chat.completion.chunk", "prompt_token_ids": [1, 2], "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]});
        let seen = sent(answer.take(role, &request));
        assert_eq!(
            (seen.get("prompt_token_ids"), answer.sent),
            (None, false),
            "what the client did not ask for is not sent"
        );
        let first = json!({"id": "a", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": "p"}, "token_ids": [7, 8], "finish_reason": null}]});
        let seen = sent(answer.take(first, &request));
        assert_eq!(seen["choices"][0], json!({"index": 0, "delta": {"content": "p"}, "finish_reason": null}));
        let rest = answer.rest(&request, None).unwrap();
        assert_eq!(
            (&rest["prompt"], &rest["max_tokens"], &rest["temperature"]),
            (&json!([1, 2, 7, 8]), &json!(8), &json!(0))
        );
        (answer.resumed, answer.before) = (true, 2);
        let more = json!({"id": "b", "created": 9, "model": "m", "object": "text_completion", "choices": [{"index": 0, "text": "q", "token_ids": [9], "prompt_token_ids": [1, 2, 7, 8], "finish_reason": "stop"}], "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}});
        let seen = sent(answer.take(more, &request));
        assert_eq!(
            (&seen["id"], &seen["created"], &seen["object"]),
            (&json!("a"), &json!(1), &json!("chat.completion.chunk"))
        );
        assert_eq!(seen["choices"][0], json!({"index": 0, "delta": {"content": "q"}, "finish_reason": "stop"}));
        assert_eq!(seen["usage"], json!({"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}));
        assert!(answer.finished && answer.generated == [7, 8, 9]);
    }

    #[test]
    fn what_tokens_do_not_tell_is_not_gone_on_with() {
        let request = request(
            Kind::Chat,
            json!({"model": "m", "stream": true, "max_tokens": 10, "messages": [{"role": "user", "content": "x"}]}),
        );
        for delta in [json!({"tool_calls": [{"index": 0}]}), json!({"reasoning_content": "hm"})] {
            let mut answer = Answer { prompt: Some(vec![1]), ..Answer::default() };
            sent(answer.take(json!({"choices": [{"index": 0, "delta": delta, "token_ids": [1]}]}), &request));
            assert!(answer.rest(&request, None).is_none());
        }
        let mut answer = Answer { prompt: Some(vec![1]), ..Answer::default() };
        sent(answer.take(json!({"choices": [{"index": 0, "delta": {"content": "text without tokens"}}]}), &request));
        assert!(answer.rest(&request, None).is_none());
        assert!(matches!(Answer::default().take(json!({"error": {"message": "dead"}}), &request), Piece::Failed(_)));
        // All that was asked for came.
        let whole = Answer { prompt: Some(vec![1]), generated: vec![1; 10], ..Answer::default() };
        assert!(whole.rest(&request, None).is_none());
    }
}
