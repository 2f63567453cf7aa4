//! Where requests go, by what is known of their prompts, and what a worker is told of it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_chat::engine::Engine;
use kvstore_chat::prompts::Prompts;
use kvstore_router::events::vllm::{Batch, Event, Stored};
use kvstore_router::fleet::Role;
use kvstore_router::place::PlaceOptions;
use kvstore_router::serve::{Model, ServeOptions};
use kvstore_tests::front::{Front, spec};
use kvstore_tests::raw_worker::{RawRequest, RawWorker, Step, whole};
use serde_json::{Value, json};

fn ok() -> Vec<Step> {
    whole("200 OK", "application/json", b"{\"ok\": true}")
}

async fn two() -> (Vec<RawWorker>, Front) {
    let workers = vec![RawWorker::start(|_| ok()).await, RawWorker::start(|_| ok()).await];
    let specs: Vec<_> =
        workers.iter().zip(["a", "b"]).map(|(worker, id)| spec(id, &worker.url(), Role::Both)).collect();
    let front = Front::start(&specs, PlaceOptions::default()).await;
    (workers, front)
}

/// Several data-parallel ranks behind one address: the engine put each request on any of them, wherever its prefix was.
#[tokio::test(flavor = "multi_thread")]
async fn the_rank_that_has_the_prefix_is_named() {
    let worker = RawWorker::start(|_| ok()).await;
    let front = Front::start(&[spec("a", &worker.url(), Role::Both)], PlaceOptions::default()).await;
    let prompt: Vec<u32> = (0..64).collect();
    let hashes = front.router.fleet.hashing().chain(&prompt, 16, None, None).unwrap().names;
    let tells = |rank: u32, hashes: &[u64]| {
        let stored = Stored { hashes: hashes.to_vec(), block_tokens: 16, ..Stored::default() };
        let batch = Batch { events: vec![Event::Stored(stored)], rank: Some(rank), ..Batch::default() };
        front.router.fleet.worker("a").unwrap().view.apply(&batch, 0);
    };
    let named = async || {
        front.post("/v1/completions", json!({"model": "m", "prompt": prompt})).await;
        let last = worker.requests().pop().unwrap();
        last.header("x-data-parallel-rank").map(str::to_owned)
    };
    tells(0, &hashes[..1]);
    assert_eq!(named().await, None, "it has one rank, as far as is known");
    tells(1, &hashes[..3]);
    assert_eq!(named().await.as_deref(), Some("1"));
    tells(0, &hashes[1..3]);
    assert_eq!(named().await, None, "both have as much");
}

/// Nobody renders these: a conversation with a picture, the Responses API, the Messages API. Each goes on where it began.
#[tokio::test(flavor = "multi_thread")]
async fn conversations_of_every_api_go_on_where_they_began() {
    let (_workers, front) = two().await;
    let picture = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "text", "text": "what is it"}]});
    let said = |role: &str, text: String| json!({"role": role, "content": text});
    for (path, field) in
        [("/v1/chat/completions", "messages"), ("/v1/responses", "input"), ("/v1/messages", "messages")]
    {
        let mut conversations: Vec<(Vec<Value>, String)> = Vec::new();
        for turn in 0..4 {
            for of in 0..6 {
                if turn == 0 {
                    conversations.push((
                        vec![said("system", format!("you are number {of} of {path}")), picture.clone()],
                        String::new(),
                    ));
                }
                let (messages, at) = &mut conversations[of];
                let mut request = json!({"model": "m"});
                request[field] = json!(messages);
                let answer = front.post(path, request).await;
                assert_eq!(answer.status, 200);
                match turn {
                    0 => *at = answer.worker,
                    _ => assert_eq!(answer.worker, *at, "{path}: turn {turn} of {of}"),
                }
                messages.push(said("assistant", format!("answer {turn}")));
                messages.push(said("user", format!("and then {turn}? {}", "more ".repeat(of * 40))));
            }
        }
        let at: std::collections::BTreeSet<&str> = conversations.iter().map(|(_, at)| at.as_str()).collect();
        assert_eq!(at.len(), 2, "they began at both: {path}");
    }
    let metrics = front.get("/metrics").await;
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    assert!(metrics.contains("kvstore_router_placed_by_total{by=\"messages\"} 54"), "{metrics}");
    assert!(metrics.contains("kvstore_router_placed_by_total{by=\"load\"} 18"), "{metrics}");
}

/// A model with a token for each of some words, whose template writes them.
pub(crate) fn write_model(folder: &Path, template: &str) {
    let words = ["[UNK]".to_owned(), "user".into(), "assistant".into(), "system".into()];
    let words = words.into_iter().chain((0..100).map(|at| format!("w{at}")));
    let vocabulary: serde_json::Map<String, Value> = words.zip(0..).map(|(word, id)| (word, json!(id))).collect();
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), json!({"chat_template": template}).to_string()).unwrap();
}

const TEMPLATE: &str = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}{% if tools %}w99 {% endif %}{% if add_generation_prompt %}assistant {% endif %}";

pub(crate) fn words(from: usize, count: usize) -> String {
    (from..from + count).map(|at| format!("w{} ", at % 90)).collect()
}

pub(crate) async fn explained(front: &Front, request: &Value) -> Value {
    front.post("/explain", request.clone()).await.json()
}

/// Waits, for a minute at most, until a request is explained so.
pub(crate) async fn until_explained(
    front: &Front,
    request: &Value,
    what: &str,
    reached: impl Fn(&Value) -> bool,
) -> Value {
    let begun = Instant::now();
    loop {
        let explained = explained(front, request).await;
        if reached(&explained) {
            return explained;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: {explained}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A router in front of two workers that say of prompts with tools that they have one token more than the router makes of them.
async fn in_front_of_another_template(folder: &Path) -> (Vec<RawWorker>, Front) {
    write_model(folder, TEMPLATE);
    let engine = Arc::new(Prompts::load(folder, None).unwrap());
    let start = || {
        let engine = Arc::clone(&engine);
        RawWorker::start(move |request: &RawRequest| match request.line().contains("/tokenize") {
            true => {
                let has_tools = String::from_utf8_lossy(&request.body).contains("tools");
                let mut tokens = engine.encode_chat(Engine::Vllm, &request.body).unwrap();
                if has_tools {
                    tokens.insert(0, 3);
                }
                whole("200 OK", "application/json", json!({"tokens": tokens}).to_string().as_bytes())
            }
            false => ok(),
        })
    };
    let workers = vec![start().await, start().await];
    let specs: Vec<_> =
        workers.iter().zip(["a", "b"]).map(|(worker, id)| spec(id, &worker.url(), Role::Both)).collect();
    let model = Model { tokens: Some(Prompts::load(folder, None).unwrap()), ..Model::default() };
    let models = HashMap::from([("m".to_owned(), model)]);
    let front = Front::start_for(&specs, PlaceOptions::default(), ServeOptions::default(), models).await;
    (workers, front)
}

/// A template of the engine's that is not the model's: the router believed in its own prompts, and sent conversations anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_are_not_the_engines_are_noticed_and_its_own_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let (workers, front) = in_front_of_another_template(folder.path()).await;
    let plain = json!({"model": "m", "messages": [{"role": "user", "content": words(0, 64)}]});
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let with_tools = json!({"model": "m", "tools": tools, "messages": [{"role": "user", "content": words(0, 64)}]});
    // The router asks by itself, before anybody asks it.
    let differs =
        until_explained(&front, &with_tools, "tools differ", |explained| explained["tokens_known"] == false).await;
    assert!(differs["not_known"].as_str().unwrap().contains("of this shape than the router: tools"), "{differs}");
    let known = explained(&front, &plain).await;
    assert_eq!((&known["tokens_known"], &known["prompt_tokens"]), (&json!(true), &json!(66)), "{known}");
    // An engine told what it makes of the first turn, and one has its blocks, the other not.
    until_explained(&front, &with_tools, "an engine told", |explained| explained["placed_by"] == "beginning").await;
    let mut engines = Prompts::load(folder.path(), None)
        .unwrap()
        .encode_chat(Engine::Vllm, with_tools.to_string().as_bytes())
        .unwrap();
    engines.insert(0, 3);
    front.holds("b", &engines);
    let mut next = with_tools.clone();
    let messages = next["messages"].as_array_mut().unwrap();
    messages.push(json!({"role": "assistant", "content": "w1"}));
    messages.push(json!({"role": "user", "content": words(7, 20)}));
    let explained =
        until_explained(&front, &next, "the beginning is known", |explained| explained["placed_by"] == "beginning")
            .await;
    let row = explained["workers"].as_array().unwrap().iter().find(|row| row["worker"] == "b").unwrap();
    assert_eq!((&row["engine_tokens"], &row["chosen"]), (&json!(64), &json!(true)), "{explained}");
    let begun = Instant::now();
    loop {
        let metrics = front.get("/metrics").await;
        let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
        if metrics.contains("kvstore_router_differing_shapes_total 2") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "tools, and their calls: {metrics}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let asked = workers.iter().flat_map(RawWorker::requests).filter(|request| request.line().contains("/tokenize"));
    assert!(asked.count() <= 8, "each shape once, and each conversation that is not known");
}

/// What a request says of how its prompt is cut counts.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_cut_as_requests_say() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), TEMPLATE);
    let worker = RawWorker::start(|_| ok()).await;
    let model = Model { tokens: Some(Prompts::load(folder.path(), None).unwrap()), ..Model::default() };
    let models = HashMap::from([("m".to_owned(), model)]);
    let specs = [spec("a", &worker.url(), Role::Both)];
    let front = Front::start_for(&specs, PlaceOptions::default(), ServeOptions::default(), models).await;
    let last: Vec<u32> = Prompts::load(folder.path(), None).unwrap().encode(&words(36, 64), true).unwrap();
    front.holds("a", &last);
    for (field, value, count, cached) in [
        ("truncation_side", json!("left"), json!(64), json!(64)),
        ("truncation_side", json!("right"), json!(64), json!(0)),
        ("truncation_side", json!(null), json!(64), json!(0)),
    ] {
        let mut request = json!({"model": "m", "prompt": words(0, 100), "truncate_prompt_tokens": 64});
        request[field] = value.clone();
        let explained = explained(&front, &request).await;
        assert_eq!((&explained["tokens_known"], &explained["prompt_tokens"]), (&json!(true), &count), "{value}");
        assert_eq!(explained["workers"][0]["engine_tokens"], cached, "{value}");
    }
    let unknown =
        explained(&front, &json!({"model": "m", "prompt": words(0, 100), "truncate_prompt_tokens": -1})).await;
    assert_eq!(unknown["tokens_known"], false);
    assert_eq!(unknown["not_known"], "the prompt is cut to what the model's context holds");
}
