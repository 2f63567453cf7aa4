//! What standalone indexers answer over HTTP: who has how much of a prompt, who is known, and what the router would do, and why.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router as Routes};
use http::{HeaderMap, StatusCode};
use kvstore_chat::engine::Engine;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::app::App;
use super::openai::{ApiError, Kind, Request};
use crate::cost::{Choice, Why, WorkerLoad};
use crate::fleet::{Role, WorkerSpec};
use crate::hashing::Chain;
use crate::place::{Asked, Candidate, Known, by_what};

/// Paths that are the router's own, whatever the method.
const OWN: [&str; 11] = [
    "/register",
    "/unregister",
    "/workers",
    "/query",
    "/query_by_hash",
    "/dump",
    "/explain",
    "/load",
    "/health",
    "/ready",
    "/metrics",
];

/// Whether a path is one of them.
pub(super) fn is_own(path: &str) -> bool {
    OWN.contains(&path)
}

/// A path is asked for with a method that it does not have.
pub(super) fn no_such_method(request: &axum::extract::Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{method} is not a method of the router's {path}; docs/router.md lists the router's paths");
    (StatusCode::METHOD_NOT_ALLOWED, Json(json!({"error": message}))).into_response()
}

pub(super) fn routes() -> Routes<Arc<App>> {
    Routes::new()
        .route("/register", post(register))
        .route("/unregister", post(unregister))
        .route("/workers", get(workers))
        .route("/query", post(query))
        .route("/query_by_hash", post(query_by_hash))
        .route("/dump", get(dump))
        .route("/explain", post(explain_request))
        .route("/load", get(load))
        .route("/health", get(|| async { Json(json!({"status": "ok"})) }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
}

fn wrong(message: impl Into<String>) -> Response {
    (StatusCode::BAD_REQUEST, Json(json!({"error": message.into()}))).into_response()
}

/// A number or a text: others name instances by numbers.
#[derive(Deserialize)]
#[serde(untagged)]
enum InstanceId {
    Number(u64),
    Text(String),
}

impl InstanceId {
    /// The worker's name here: each rank that is registered for itself is one.
    fn worker(&self, rank: u16) -> String {
        let id = match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        };
        if rank == 0 { id } else { format!("{id}@{rank}") }
    }
}

/// The instance of a worker.
fn instance_of(worker: &str) -> &str {
    match worker.rsplit_once('@') {
        Some((instance, rank)) if rank.parse::<u16>().is_ok() => instance,
        _ => worker,
    }
}

#[derive(Deserialize)]
struct Register {
    instance_id: InstanceId,
    endpoint: String,
    model_name: String,
    block_size: u32,
    #[serde(default)]
    dp_rank: u16,
    #[serde(default)]
    replay_endpoint: Option<String>,
    #[serde(default)]
    topic: String,
    /// Where it serves requests; without, its blocks alone are known.
    #[serde(default)]
    url: String,
    #[serde(default)]
    node: Option<String>,
    #[serde(default)]
    role: Role,
    #[serde(default)]
    engine: Option<Engine>,
}

async fn register(State(app): State<Arc<App>>, body: Result<Json<Register>, JsonRejection>) -> Response {
    let Json(asked) = match body {
        Ok(asked) => asked,
        Err(rejection) => return wrong(rejection.body_text()),
    };
    let spec = WorkerSpec {
        engine: asked.engine,
        id: asked.instance_id.worker(asked.dp_rank),
        url: asked.url,
        model: asked.model_name,
        role: asked.role,
        node: asked.node,
        events: Some(asked.endpoint),
        replay: asked.replay_endpoint,
        topic: asked.topic,
        ranks: 1,
        first_rank: asked.dp_rank,
        block_tokens: asked.block_size,
    };
    if let Err(problem) = spec.check() {
        return wrong(problem);
    }
    if app.router.fleet.workers().len() >= crate::caps::WORKERS_MAX {
        return wrong(format!(
            "{} workers are registered, which is the most that the router supports",
            crate::caps::WORKERS_MAX
        ));
    }
    app.router.fleet.add_worker(spec);
    (StatusCode::CREATED, Json(json!({"status": "ok"}))).into_response()
}

#[derive(Deserialize)]
struct Unregister {
    instance_id: InstanceId,
    #[serde(default)]
    dp_rank: Option<u16>,
}

async fn unregister(State(app): State<Arc<App>>, body: Result<Json<Unregister>, JsonRejection>) -> Response {
    let Json(asked) = match body {
        Ok(asked) => asked,
        Err(rejection) => return wrong(rejection.body_text()),
    };
    let instance = asked.instance_id.worker(0);
    let ids: Vec<String> = match asked.dp_rank {
        Some(rank) => vec![asked.instance_id.worker(rank)],
        None => {
            let all = app.router.fleet.workers();
            all.iter().map(|worker| worker.spec.id.clone()).filter(|id| instance_of(id) == instance).collect()
        }
    };
    let removed = ids.iter().filter(|id| app.router.fleet.remove_worker(id)).count();
    match removed {
        0 => (StatusCode::NOT_FOUND, Json(json!({"error": format!("instance {instance:?} is not registered")})))
            .into_response(),
        _ => Json(json!({"status": "ok"})).into_response(),
    }
}

#[derive(Serialize)]
struct WorkerRow {
    id: String,
    model: String,
    url: String,
    role: Role,
    up: bool,
    node: Option<String>,
    events: Option<String>,
    block_tokens: Option<u32>,
    /// Whose prompts it makes.
    engine: Option<Engine>,
    load: WorkerLoad,
    prefill_tokens_per_second: f64,
    requests_learnt_from: u64,
    event_messages: u64,
    stored_blocks: u64,
    removed_blocks: u64,
    orphans: u64,
    fences: u64,
    unread: u64,
    /// Models and adapters that it says that it serves.
    serves: Vec<String>,
    /// What the router lacks of it, or could not read.
    problems: Vec<String>,
}

fn worker_rows(app: &App) -> Vec<WorkerRow> {
    let loads = app.router.loads();
    let row = |worker: &Arc<crate::fleet::Worker>| {
        let (counts, speed) = (worker.view.counts(), app.router.speed_of(worker));
        WorkerRow {
            id: worker.spec.id.clone(),
            model: worker.spec.model.clone(),
            url: worker.spec.url.clone(),
            role: worker.spec.role,
            up: worker.is_up(),
            node: worker.spec.node.clone(),
            events: worker.spec.events.clone(),
            block_tokens: worker.block_tokens(),
            engine: worker.engine(),
            load: loads.get(&worker.spec.id).copied().unwrap_or_default(),
            prefill_tokens_per_second: speed.tokens_per_second(),
            requests_learnt_from: speed.learnt(),
            event_messages: counts.batches,
            stored_blocks: counts.stored,
            removed_blocks: counts.removed,
            orphans: counts.orphans,
            fences: counts.fences,
            unread: counts.unread,
            serves: worker.served().iter().map(|served| served.id.clone()).collect(),
            problems: worker.problems().into_iter().chain(problem_of_model(app, &worker.spec.model)).collect(),
        }
    };
    app.router.fleet.workers().iter().map(row).collect()
}

fn problem_of_model(app: &App, model: &str) -> Option<String> {
    let why = app.models.get(model)?.problem.as_ref()?;
    Some(format!("model {model:?}: {why}"))
}

async fn workers(State(app): State<Arc<App>>) -> Json<Vec<WorkerRow>> {
    Json(worker_rows(&app))
}

#[derive(Deserialize)]
struct Query {
    token_ids: Vec<u32>,
    model_name: String,
    #[serde(default)]
    lora_name: Option<String>,
    #[serde(default)]
    cache_salt: Option<String>,
}

async fn query(State(app): State<Arc<App>>, body: Result<Json<Query>, JsonRejection>) -> Response {
    let Json(asked) = match body {
        Ok(asked) => asked,
        Err(rejection) => return wrong(rejection.body_text()),
    };
    let Some(block_tokens) = app.router.fleet.block_tokens(&asked.model_name) else {
        return scores(&app, &asked.model_name, &Chain::default());
    };
    let hashing = app.router.fleet.hashing();
    match hashing.chain(&asked.token_ids, block_tokens, asked.lora_name.as_deref(), asked.cache_salt.as_deref()) {
        Ok(chain) => scores(&app, &asked.model_name, &chain),
        Err(error) => wrong(error.to_string()),
    }
}

#[derive(Deserialize)]
struct QueryByHash {
    block_hashes: Vec<Number>,
    model_name: String,
}

/// A hash: 64 bits, signed or not.
#[derive(Deserialize, Clone, Copy)]
#[serde(untagged)]
enum Number {
    Unsigned(u64),
    Signed(i64),
}

impl Number {
    fn bits(self) -> u64 {
        match self {
            Self::Unsigned(number) => number,
            Self::Signed(number) => number.cast_unsigned(),
        }
    }
}

async fn query_by_hash(State(app): State<Arc<App>>, body: Result<Json<QueryByHash>, JsonRejection>) -> Response {
    let Json(asked) = match body {
        Ok(asked) => asked,
        Err(rejection) => return wrong(rejection.body_text()),
    };
    let block_tokens = app.router.fleet.block_tokens(&asked.model_name).unwrap_or(1);
    let names = asked.block_hashes.iter().map(|hash| hash.bits()).collect();
    scores(&app, &asked.model_name, &Chain { block_tokens, names, hashes: Vec::new() })
}

#[derive(Serialize, Default)]
struct Overlap {
    longest_matched: u64,
    gpu: u64,
    dp: BTreeMap<String, u64>,
    cpu: u64,
    disk: u64,
    /// The bucket: not in the others' answers.
    external: u64,
}

/// Matched tokens by instance, rank and tier, each tier's beyond those before it.
fn scores(app: &App, model: &str, chain: &Chain) -> Response {
    let fleet = &app.router.fleet;
    let workers = fleet.serving(model);
    let located = fleet.locate(chain, &workers);
    let mut instances: BTreeMap<String, Overlap> = BTreeMap::new();
    for (worker, cached) in workers.iter().zip(located) {
        let overlap = instances.entry(instance_of(&worker.spec.id).to_owned()).or_default();
        for (rank, tokens) in fleet.engine_tokens_by_rank(chain, worker) {
            overlap.dp.insert(rank.to_string(), tokens);
        }
        let [cpu, disk, external] = cached.tier_tokens;
        overlap.gpu = overlap.gpu.max(cached.engine_tokens);
        overlap.cpu = overlap.cpu.max(cpu);
        overlap.disk = overlap.disk.max(disk);
        overlap.external = overlap.external.max(external);
        overlap.longest_matched = overlap.longest_matched.max(cached.tokens());
    }
    let scores: BTreeMap<&String, &BTreeMap<String, u64>> =
        instances.iter().map(|(id, overlap)| (id, &overlap.dp)).collect();
    let frequencies: [u64; 0] = [];
    Json(json!({"scores": scores, "frequencies": frequencies, "instances": instances})).into_response()
}

async fn dump(State(app): State<Arc<App>>) -> Json<Value> {
    let fleet = &app.router.fleet;
    let index = |status: crate::index::IndexStatus| {
        json!({
            "blocks": status.blocks,
            "pairs": status.pairs,
            "bytes": status.bytes,
            "bytes_max": status.bytes_max,
            "evicted": status.evicted,
            "refused": status.refused,
        })
    };
    let node = |node: &Arc<crate::fleet::Node>| {
        let status = node.status();
        let rate = |rate: &crate::cost::TierRate| json!({"bytes_per_second": rate.bytes_per_second, "latency_seconds": rate.latency_seconds, "queued_bytes": rate.queued_bytes});
        let [host, nvme, object] = &status.rates;
        json!({
            "address": node.address,
            "whole": status.whole,
            "draining": status.draining,
            "layouts": status.layouts,
            "rates": {"host": rate(host), "nvme": rate(nvme), "object": rate(object)},
        })
    };
    Json(json!({
        "workers": worker_rows(&app),
        "nodes": fleet.nodes().iter().map(node).collect::<Vec<_>>(),
        "engine_index": index(fleet.engine_index().status()),
        "node_index": index(fleet.tier_index().status()),
        "waiting": app.router.waiting(),
        "shed": app.router.counts.shed.load(Ordering::Relaxed),
    }))
}

async fn load(State(app): State<Arc<App>>) -> Json<HashMap<String, WorkerLoad>> {
    Json(app.router.loads())
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.router.fleet.workers().iter().any(|worker| worker.is_up()) {
        true => plain(StatusCode::OK, "ready"),
        false => plain(StatusCode::SERVICE_UNAVAILABLE, "no worker answers"),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(http::header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics()).into_response()
}

async fn explain_request(State(app): State<Arc<App>>, headers: HeaderMap, body: axum::body::Body) -> Response {
    explain_body(&app, &headers, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn explain_body(app: &Arc<App>, headers: &HeaderMap, body: axum::body::Body) -> Result<Response, ApiError> {
    let (body, _held) = app.bodies.read(headers, body).await?;
    let mut request = Request::read(Kind::Completion, headers, body)?;
    if request.body.get("messages").is_some() {
        request.kind = Kind::Chat;
    }
    let model = app.model_of(&request.model).await?;
    let mut asked = app.asked_whole(&Arc::new(request), model).await;
    asked.role = app.answering_role(&asked.model);
    Ok(Json(explain(app, &asked)?).into_response())
}

/// What a request would cost at each worker, and which it would go to; places nothing.
pub fn explain(app: &App, asked: &Asked) -> Result<Value, crate::place::Refused> {
    let mut candidates = app.router.candidates(asked, &[])?;
    let chosen = app.router.choose(asked, &mut candidates);
    let row = |candidate: &Candidate| {
        let terms = &candidate.terms;
        let [host, nvme, object] = terms.cached.fetched_bytes;
        json!({
            "worker": candidate.worker.spec.id,
            "chosen": candidate.chosen,
            "expected_seconds": terms.expected(),
            "queue_seconds": terms.queue_seconds,
            "prefill_seconds": terms.prefill_seconds,
            "fetch_seconds": terms.fetch_seconds,
            "engine_tokens": terms.cached.engine_tokens,
            "engine_host_tokens": terms.cached.engine_host_tokens,
            "messages": candidate.messages,
            "fetched_tokens": terms.cached.fetched_tokens,
            "fetched_bytes": {"host": host, "nvme": nvme, "object": object},
            "tokens_to_compute": terms.tokens_to_compute,
            "tokens_ahead": terms.tokens_ahead,
            "requests": candidate.load.requests(),
            "prefill_tokens_per_second": app.router.speed_of(&candidate.worker).tokens_per_second(),
        })
    };
    let why = match &chosen {
        Ok(choice) => in_words(choice),
        Err(refused) => refused.to_string(),
    };
    let equals = chosen.as_ref().map_or(0, |choice| choice.equals);
    Ok(json!({
        "model": asked.model,
        "prompt_tokens": asked.tokens,
        "tokens_known": asked.known == Known::Tokens,
        "not_known": asked.not_known.as_deref(),
        "placed_by": by_what(asked, &candidates).label(),
        "block_tokens": asked.chain.block_tokens,
        "why": why,
        "equals": equals,
        "workers": candidates.iter().map(row).collect::<Vec<_>>(),
    }))
}

fn in_words(choice: &Choice) -> String {
    match choice.why {
        Why::Session { costlier: true } => {
            "the chosen worker served the session before, and costs little more than the best worker".into()
        }
        Why::Session { costlier: false } => "the chosen worker served the session before, and none is better".into(),
        Why::Chance => {
            "the chosen worker was drawn by chance, the more likely the sooner a worker answers (place.temperature)"
                .into()
        }
        Why::Best if choice.equals > 1 => format!(
            "{} workers are expected to answer equally soon; they take turns, and it is the chosen worker's",
            choice.equals
        ),
        Why::Best => "the chosen worker is expected to answer first".into(),
    }
}

/// Nothing to say but a status.
fn plain(status: StatusCode, text: &'static str) -> Response {
    (status, text).into_response()
}
