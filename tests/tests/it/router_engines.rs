//! What the router does for the engine that a worker runs: vLLM and SGLang make two prompts of one request, and keep answers alike.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use kvstore_chat::engine::Engine;
use kvstore_chat::prompts::Prompts;
use kvstore_router::events::vllm::{Batch, Event, Stored};
use kvstore_router::fleet::{Role, WorkerSpec};
use kvstore_router::place::PlaceOptions;
use kvstore_router::serve::{Model, ServeOptions};
use kvstore_tests::front::{Front, spec, until};
use kvstore_tests::raw_worker::{RawRequest, RawWorker, Step, chunk, stream_end, stream_head, whole};
use serde_json::{Value, json};

use crate::router_places::{explained, until_explained, words, write_model};

const OF_SGLANG: &str =
    r#"{"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "sglang", "max_model_len": 4096}]}"#;
const OF_VLLM: &str =
    r#"{"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 4096}]}"#;
/// It shows roles, and whatever of a tool is null.
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}{% for tool in tools or [] %}{% if 'defer_loading' in tool %}w98 {% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}";

fn json_of(value: &Value) -> Vec<Step> {
    whole("200 OK", "application/json", value.to_string().as_bytes())
}

/// A worker that says of each prompt which tokens this engine makes of it.
async fn worker(folder: &Path, engine: Engine) -> RawWorker {
    let prompts = Arc::new(Prompts::load(folder, None).unwrap());
    let worker = RawWorker::start(move |request: &RawRequest| match request.line().contains("/tokenize") {
        true => json_of(&json!({"tokens": prompts.encode_chat(engine, &request.body).unwrap()})),
        false => json_of(&json!({"ok": true})),
    });
    let worker = worker.await;
    worker.set_models(if engine == Engine::Sglang { OF_SGLANG } else { OF_VLLM });
    worker
}

async fn in_front_of(folder: &Path, workers: &[WorkerSpec]) -> Front {
    let model = Model { tokens: Some(Prompts::load(folder, None).unwrap()), ..Model::default() };
    let models = HashMap::from([("m".to_owned(), model)]);
    Front::start_for(workers, PlaceOptions::default(), ServeOptions::default(), models).await
}

async fn differing(front: &Front) -> String {
    let metrics = String::from_utf8_lossy(&front.get("/metrics").await.body).into_owned();
    metrics.lines().find(|line| line.starts_with("kvstore_router_differing_shapes_total")).unwrap().to_owned()
}

/// The router made vLLM's prompts for every engine: of SGLang's, those with tools and those that end with an answer were others.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_those_of_the_engine_that_a_worker_says_it_is() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), TEMPLATE);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let messages = json!([{"role": "user", "content": words(0, 60)}, {"role": "assistant", "content": "w7"}]);
    // The one tool takes a token in SGLang alone; the last answer is a question there.
    let request = json!({"model": "m", "tools": tools, "messages": messages, "add_generation_prompt": true});
    for (engine, tokens) in [(Engine::Vllm, 64), (Engine::Sglang, 65)] {
        let worker = worker(folder.path(), engine).await;
        let front = in_front_of(folder.path(), &[spec("a", &worker.url(), Role::Both)]).await;
        until("it is known whose prompts they are", || {
            front.router.fleet.worker("a").unwrap().engine() == Some(engine)
        })
        .await;
        let rows = front.get("/workers").await.json();
        assert_eq!(rows[0]["engine"], engine.to_string());
        let made = explained(&front, &request).await;
        assert_eq!((&made["tokens_known"], &made["prompt_tokens"]), (&json!(true), &json!(tokens)), "{made}");
        let ours = Prompts::load(folder.path(), None).unwrap();
        front.holds("a", &ours.encode_chat(engine, request.to_string().as_bytes()).unwrap());
        let found =
            until_explained(&front, &request, "its blocks are found", |said| said["workers"][0]["engine_tokens"] == 64)
                .await;
        assert_eq!(found["placed_by"], "tokens");
        until("the engine was asked", || {
            worker.requests().iter().filter(|request| request.line().contains("/tokenize")).count() >= 3
        })
        .await;
        assert_eq!(differing(&front).await, "kvstore_router_differing_shapes_total 0", "{engine}");
    }
}

/// Two engines of one model make two prompts: neither counts as known.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_on_two_engines_has_no_prompt_that_is_known() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), TEMPLATE);
    let workers = [worker(folder.path(), Engine::Vllm).await, worker(folder.path(), Engine::Vllm).await];
    let mut specs = [spec("a", &workers[0].url(), Role::Both), spec("b", &workers[1].url(), Role::Both)];
    // What is configured counts more than what a worker says.
    specs[1].engine = Some(Engine::Sglang);
    let front = in_front_of(folder.path(), &specs).await;
    let request = json!({"model": "m", "messages": [{"role": "user", "content": words(0, 60)}]});
    let said = until_explained(&front, &request, "both are known", |said| said["tokens_known"] == false).await;
    let why = said["not_known"].as_str().unwrap();
    assert!(why.contains("vllm") && why.contains("sglang"), "{why}");
}

/// SGLang takes no header that names a data-parallel rank: the request went to any of them.
#[tokio::test(flavor = "multi_thread")]
async fn sglang_is_told_of_the_rank_in_the_body() {
    let worker = RawWorker::start(|_| json_of(&json!({"ok": true}))).await;
    worker.set_models(OF_SGLANG);
    let front = Front::start(&[spec("a", &worker.url(), Role::Both)], PlaceOptions::default()).await;
    until("it is known whose prompts they are", || front.router.fleet.worker("a").unwrap().engine().is_some()).await;
    let prompt: Vec<u32> = (0..64).collect();
    let hashes = front.router.fleet.hashing().chain(&prompt, 16, None, None).unwrap().names;
    for (rank, held) in [(0, 1), (1, 3)] {
        let stored = Stored { hashes: hashes[..held].to_vec(), block_tokens: 16, ..Stored::default() };
        let batch = Batch { events: vec![Event::Stored(stored)], rank: Some(rank), ..Batch::default() };
        front.router.fleet.worker("a").unwrap().view.apply(&batch, 0);
    }
    for (named, due) in [(None, 1), (Some(0), 0)] {
        let mut request = json!({"model": "m", "prompt": prompt});
        if let Some(named) = named {
            request["routed_dp_rank"] = json!(named);
        }
        front.post("/v1/completions", request).await;
        let last: Value = serde_json::from_slice(&worker.requests().pop().unwrap().body).unwrap();
        assert_eq!(last["routed_dp_rank"], due, "{named:?}");
    }
}

/// An answer of the Responses API is kept by the worker that gave it. Requests that went on with it went anywhere, and were told that there
/// is no such answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_gone_on_with_where_it_is_kept() {
    let start = |name: &'static str| {
        RawWorker::start(move |request: &RawRequest| {
            let id = format!("resp_{name}{}", request.at.1);
            let created = json!({"type": "response.created", "response": {"id": id, "status": "in_progress"}});
            match String::from_utf8_lossy(&request.body).contains("\"stream\":true") {
                // Cut within the id.
                true => {
                    let event = format!("event: response.created\ndata: {created}\n\n");
                    let at = event.find("resp_").unwrap() + 3;
                    vec![stream_head(), chunk(&event.as_bytes()[..at]), chunk(&event.as_bytes()[at..]), stream_end()]
                }
                false => json_of(&json!({"id": id, "object": "response", "previous_response_id": "resp_other"})),
            }
        })
    };
    let workers = [start("a").await, start("b").await];
    let specs = [spec("a", &workers[0].url(), Role::Both), spec("b", &workers[1].url(), Role::Both)];
    let front = Front::start(&specs, PlaceOptions::default()).await;
    let id_of = |answer: &[u8]| {
        let text = String::from_utf8_lossy(answer).into_owned();
        let start = text.find("resp_").unwrap();
        text[start..].split('"').next().unwrap().to_owned()
    };
    let mut at = std::collections::BTreeSet::new();
    for of in 0..8 {
        let stream = of % 2 == 1;
        let first =
            front.post("/v1/responses", json!({"model": "m", "input": format!("number {of}"), "stream": stream})).await;
        let mut id = id_of(&first.body);
        at.insert(first.worker.clone());
        for turn in 0..3 {
            let next = json!({"model": "m", "input": format!("{turn}"), "previous_response_id": id, "stream": stream});
            let answer = front.post("/v1/responses", next).await;
            assert_eq!(answer.worker, first.worker, "turn {turn} of {of}");
            let asked = front.post(&format!("/v1/responses/{id}/cancel"), json!({})).await;
            assert_eq!(asked.worker, first.worker, "what is asked of it goes there, too");
            id = id_of(&answer.body);
        }
    }
    assert_eq!(at.len(), 2, "they began at both");
}
