//! The router in front of workers: where requests go, and what becomes of an answer when its worker does not last.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use kvstore_router::cost::Choose;
use kvstore_router::fleet::Role;
use kvstore_router::place::PlaceOptions;
use kvstore_router::serve::ServeOptions;
use kvstore_tests::engine::{Mood, ScriptedEngine, answer, text};
use kvstore_tests::front::{Front, spec, until};
use serde_json::{Value, json};

const QUICK: Duration = Duration::from_millis(2);

async fn two() -> (ScriptedEngine, ScriptedEngine, Front) {
    two_of(QUICK).await
}

/// Two that take so long for a token, and a router before them.
async fn two_of(delay: Duration) -> (ScriptedEngine, ScriptedEngine, Front) {
    let (a, b) = (ScriptedEngine::start("m", delay).await, ScriptedEngine::start("m", delay).await);
    let front =
        Front::start(&[spec("a", &a.url(), Role::Both), spec("b", &b.url(), Role::Both)], PlaceOptions::default())
            .await;
    (a, b, front)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_come_whole_and_in_pieces_from_where_the_prefix_is() {
    let (_a, _b, front) = two().await;
    // So long that to compute it takes longer than a worker that stood still for a moment is thought to take.
    let prompt: Vec<u32> = (0..4000).collect();
    front.holds("b", &prompt);
    let tokens: Vec<u64> = prompt.iter().map(|token| u64::from(*token)).collect();
    for _ in 0..3 {
        let whole = front.post("/v1/completions", json!({"model": "m", "prompt": prompt, "max_tokens": 5})).await;
        assert_eq!((whole.status, whole.worker.as_str()), (200, "b"));
        assert_eq!(whole.json()["choices"][0]["text"], text(&answer(&tokens, 5)));
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": 5, "stream": true, "stream_options": {"include_usage": true}});
        let stream = front.post("/v1/completions", body).await;
        assert_eq!((stream.worker.as_str(), stream.text()), ("b", text(&answer(&tokens, 5))));
        assert_eq!(stream.headers["content-type"], "text/event-stream; charset=utf-8");
        let pieces = stream.pieces();
        assert!(
            pieces.iter().all(|piece| piece["choices"][0]["token_ids"].is_null()),
            "nobody asked for them: {pieces:?}"
        );
        assert_eq!(pieces.last().unwrap()["usage"]["completion_tokens"], 5);
    }
    let asked = json!({"model": "m", "prompt": prompt, "max_tokens": 2, "stream": true, "return_token_ids": true});
    let pieces = front.post("/v1/completions", asked).await.pieces();
    assert_eq!(pieces[0]["choices"][0]["token_ids"], json!(answer(&tokens, 1)));
    let chat =
        json!({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": true});
    let chat = front.post("/v1/chat/completions", chat).await;
    assert_eq!(chat.pieces()[0]["choices"][0]["delta"]["role"], "assistant");
    until("all is over", || front.idle()).await;
    let b = front.router.fleet.worker("b").unwrap();
    assert!(front.router.speed_of(&b).learnt() >= 3, "streams teach how fast a worker is");
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_first_byte_another_worker_is_tried() {
    let (a, b, front) = two().await;
    let prompt: Vec<u32> = (0..64).collect();
    front.holds("a", &prompt);
    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 3});
    for mood in [Mood::Refuses(500), Mood::Refuses(503), Mood::Refuses(429)] {
        a.set_mood(mood);
        let answer = front.post("/v1/completions", body.clone()).await;
        assert_eq!((answer.status, answer.worker.as_str()), (200, "b"), "{mood:?}");
    }
    // A stream that ends before its first token is begun again.
    a.set_mood(Mood::DiesAfter(0));
    let mut stream = body.clone();
    stream["stream"] = json!(true);
    assert_eq!(front.post("/v1/completions", stream).await.text(), text(&answer(&(0..64).collect::<Vec<u64>>(), 3)));
    // What is wrong with the request is not the worker's fault.
    a.set_mood(Mood::Refuses(400));
    b.set_mood(Mood::Refuses(400));
    let before = a.requests() + b.requests();
    let answer = front.post("/v1/completions", body.clone()).await;
    assert_eq!((answer.status, a.requests() + b.requests() - before), (400, 1));
    // All fail: what the last said is said.
    a.set_mood(Mood::Refuses(500));
    b.set_mood(Mood::Refuses(503));
    let answer = front.post("/v1/completions", body.clone()).await;
    assert!(answer.status >= 500 && answer.json()["error"]["message"] == "refused as it was told");
    // One is gone, then both; one comes back.
    drop(a);
    b.set_mood(Mood::Well);
    assert_eq!(front.post("/v1/completions", body.clone()).await.worker, "b");
    drop(b);
    let gone = front.post("/v1/completions", body.clone()).await;
    assert_eq!((gone.status, &gone.json()["error"]["code"]), (503, &json!("unavailable")));
    assert!(gone.headers.contains_key("retry-after"));
    until("all is over", || front.idle()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_goes_on_elsewhere_with_the_same_tokens() {
    for (mood, path) in [
        (Mood::DiesAfter(7), "/v1/completions"),
        (Mood::FailsAfter(7), "/v1/completions"),
        (Mood::DiesAfter(7), "/v1/chat/completions"),
    ] {
        // Before a conversation breaks off, there is time to see where it is.
        let (a, b, front) = two_of(if path == "/v1/completions" { QUICK } else { Duration::from_millis(200) }).await;
        let mut body = json!({"model": "m", "max_tokens": 20, "stream": true, "temperature": 0, "user": "u", "stream_options": {"include_usage": true}});
        let prompt: Vec<u64> = match path {
            "/v1/completions" => {
                let prompt: Vec<u32> = (0..160).collect();
                front.holds("a", &prompt);
                body["prompt"] = json!(prompt);
                prompt.iter().map(|token| u64::from(*token)).collect()
            }
            _ => {
                body["messages"] = json!([{"role": "user", "content": "hello"}]);
                body["messages"].to_string().bytes().map(u64::from).collect()
            }
        };
        a.set_mood(mood);
        if path != "/v1/completions" {
            b.set_mood(mood);
        }
        let streaming = front.post(path, body);
        let (stream, ()) = tokio::join!(streaming, async {
            // Whichever has the conversation dies; the other lives.
            until("it is at a worker", || a.requests() + b.requests() > 0).await;
            let other = if a.requests() > 0 { &b } else { &a };
            other.set_mood(Mood::Well);
        });
        assert_eq!(stream.text(), text(&answer(&prompt, 20)), "{mood:?} {path}");
        let pieces = stream.pieces();
        assert!(pieces.iter().all(|piece| piece["id"] == pieces[0]["id"] && piece["object"] != "text_completion"));
        let usage = &pieces.last().unwrap()["usage"];
        assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(prompt.len()), &json!(20)));
        assert_eq!((a.requests(), b.requests()), (1, 1));
        let rest = if stream.worker == "a" { b.bodies() } else { a.bodies() };
        assert_eq!(rest[0]["prompt"].as_array().unwrap().len(), prompt.len() + rest_of(path));
        assert_eq!(rest[0]["max_tokens"], 20 - rest_of(path));
        let metrics = String::from_utf8(front.get("/metrics").await.body.to_vec()).unwrap();
        assert!(metrics.contains("kvstore_router_resumed_total 1"), "{metrics}");
        until("all is over", || front.idle()).await;
    }
}

/// Tokens before the break: a conversation's first piece has none.
fn rest_of(path: &str) -> usize {
    if path == "/v1/completions" { 7 } else { 6 }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_cannot_go_on_ends_with_an_error() {
    let (a, b, front) = two().await;
    a.set_mood(Mood::DiesAfter(3));
    b.set_mood(Mood::DiesAfter(3));
    let broken = async |more: Value| {
        let mut body = json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 9, "stream": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let stream = front.post("/v1/completions", body).await;
        stream.pieces().last().unwrap()["error"]["message"].as_str().unwrap_or_default().to_owned()
    };
    assert!(broken(json!({"logprobs": 3})).await.contains("cannot be continued"));
    // Both die, again and again: four tries at most, of two workers.
    let error = broken(json!({})).await;
    assert!(error.contains("broke off"), "{error}");
    a.hide_token_ids();
    b.hide_token_ids();
    assert!(broken(json!({})).await.contains("text without token ids"));
    until("all is over", || front.idle()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_ends_its_request_at_the_worker() {
    let slow = ScriptedEngine::start("m", Duration::from_millis(50)).await;
    let front = Front::start(&[spec("a", &slow.url(), Role::Both)], PlaceOptions::default()).await;
    let body = json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 1000, "stream": true});
    let request = http::Request::post(format!("{}/v1/completions", front.url))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .unwrap();
    let mut response = front.client.request(request).await.unwrap();
    response.body_mut().frame().await.unwrap().unwrap();
    assert_eq!(slow.streaming(), 1);
    drop(response);
    until("the worker's connection ends", || slow.streaming() == 0).await;
    until("its load is gone", || front.idle()).await;
    // One that waits for an answer in one piece.
    let waiting = front.post("/v1/completions", json!({"model": "m", "prompt": [1], "max_tokens": 1000}));
    assert!(tokio::time::timeout(Duration::from_millis(100), waiting).await.is_err());
    until("its load is gone, too", || front.idle()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_waits_then_sheds_with_retry_after() {
    // An answer takes some two seconds: the third and the fourth wait so long, a fifth would wait for twice as long.
    let engine = ScriptedEngine::start("m", Duration::from_millis(300)).await;
    let choose = Choose { requests_max: 2, ..Choose::default() };
    let options = PlaceOptions { choose, queue_time: Duration::from_secs(4), queue_max: 3, ..PlaceOptions::default() };
    let front = Front::start(&[spec("a", &engine.url(), Role::Both)], options).await;
    let body = json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 8});
    let all = futures::future::join_all((0..12).map(|_| front.post("/v1/completions", body.clone()))).await;
    let served = all.iter().filter(|answer| answer.status == 200).count();
    assert!((4..=6).contains(&served), "two at once, and up to three that waited: {served}");
    for answer in all.iter().filter(|answer| answer.status != 200) {
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("overloaded")));
        let seconds: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!(seconds >= 1);
    }
    assert_eq!(engine.requests(), served);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_prompts_are_computed_by_the_prefill_pool_and_short_ones_are_not() {
    let prefill = ScriptedEngine::start("m", QUICK).await;
    let decode = ScriptedEngine::start("m", QUICK).await;
    let workers = [spec("p", &prefill.url(), Role::Prefill), spec("d", &decode.url(), Role::Decode)];
    let options = PlaceOptions { split_tokens_min: 100, ..PlaceOptions::default() };
    let front = Front::start(&workers, options).await;
    let ask = async |prompt: &[u32]| {
        front.post("/v1/completions", json!({"model": "m", "prompt": prompt, "max_tokens": 3})).await
    };
    let long: Vec<u32> = (0..320).collect();
    assert_eq!(ask(&long).await.worker, "d");
    assert_eq!((prefill.requests(), decode.requests()), (1, 1));
    let (at_prefill, at_decode) = (&prefill.bodies()[0], &decode.bodies()[0]);
    assert_eq!(
        (&at_prefill["max_tokens"], &at_prefill["kv_transfer_params"]["do_remote_decode"]),
        (&json!(1), &json!(true))
    );
    assert_eq!((&at_decode["max_tokens"], &at_decode["kv_transfer_params"]), (&json!(3), &json!({"from": "m"})));
    assert_eq!(ask(&[1, 2, 3]).await.worker, "d");
    assert_eq!(prefill.requests(), 1, "short");
    front.holds("d", &long);
    assert_eq!(ask(&long).await.worker, "d");
    assert_eq!(prefill.requests(), 1, "cached");
    // Without it, whoever answers computes.
    drop(prefill);
    let other: Vec<u32> = (5000..5320).collect();
    assert_eq!((ask(&other).await.status, decode.requests()), (200, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_go_to_the_encoders_first() {
    let encode = ScriptedEngine::start("m", QUICK).await;
    let both = ScriptedEngine::start("m", QUICK).await;
    let front = Front::start(
        &[spec("e", &encode.url(), Role::Encode), spec("b", &both.url(), Role::Both)],
        PlaceOptions::default(),
    )
    .await;
    let picture = |at: u32| json!({"type": "image_url", "image_url": {"url": format!("http://x/{at}.png")}});
    let body = json!({"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, picture(1), picture(2)]}]});
    assert_eq!(front.post("/v1/chat/completions", body).await.worker, "b");
    assert_eq!((encode.requests(), both.requests()), (2, 1));
    assert!(encode.bodies().iter().all(|body| body["messages"][0]["content"].as_array().unwrap().len() == 1));
    front.post("/v1/chat/completions", json!({"model": "m", "messages": [{"role": "user", "content": "text"}]})).await;
    assert_eq!(encode.requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_get_errors_in_openais_shape() {
    let (a, b, front) = two().await;
    for (path, body, status, code) in [
        ("/v1/completions", "{\"model\": \"x\", \"prompt\": \"a\"}", 404, json!("model_not_found")),
        ("/v1/embeddings", "{\"model\": \"x\", \"input\": \"a\"}", 404, json!("model_not_found")),
        ("/explain", "[]", 400, Value::Null),
        ("/explain", "{\"model\": 7}", 400, Value::Null),
    ] {
        let answer = front.post_bytes(path, body.to_owned()).await;
        assert_eq!(answer.status, status, "{path} {body}");
        let error = &answer.json()["error"];
        assert!(
            error["message"].as_str().is_some_and(|message| !message.is_empty()) && error["type"].is_string(),
            "{error}"
        );
        assert_eq!(error["code"], code);
    }
    let large = front.post_bytes("/v1/completions", vec![b' '; (64 << 20) + 1]).await;
    assert!(large.status == 413 && large.json()["error"]["message"].as_str().unwrap().contains("67108864 bytes"));
    assert_eq!(a.requests() + b.requests(), 0);
    let models = front.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "m");
    // What is no JSON a worker may understand; where several models are served, nobody knows whose it is.
    let mistakes = ["{", "[]", "{\"model\": 7}", "\u{0}\u{1}"];
    front.router.fleet.add_worker(kvstore_router::fleet::WorkerSpec::new("c", "http://127.0.0.1:1", "other"));
    for body in mistakes {
        let error = front.post_bytes("/v1/chat/completions", body.to_owned()).await;
        assert!(error.status == 400 && error.json()["error"]["type"] == "invalid_request_error", "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn indexers_questions_are_answered() {
    let (_a, _b, front) = two().await;
    let prompt: Vec<u32> = (0..320).collect();
    front.holds("a", &prompt[..160]);
    let found = front.post("/query", json!({"token_ids": prompt, "model_name": "m"})).await.json();
    assert_eq!(found["scores"]["a"], json!({"0": 160}));
    assert_eq!(
        (&found["instances"]["a"]["longest_matched"], &found["instances"]["b"]["gpu"]),
        (&json!(160), &json!(0))
    );
    let names = front.router.fleet.hashing().chain(&prompt, 16, None, None).unwrap().names;
    let signed: Vec<i64> = names.iter().map(|name| name.cast_signed()).collect();
    let found = front.post("/query_by_hash", json!({"block_hashes": signed, "model_name": "m"})).await.json();
    assert_eq!(found["instances"]["a"]["gpu"], 160);
    let registered =
        json!({"instance_id": 7, "endpoint": "tcp://127.0.0.1:1", "model_name": "m", "block_size": 16, "dp_rank": 1});
    assert_eq!(front.post("/register", registered).await.status, 201);
    let wrong = front
        .post("/register", json!({"instance_id": 7, "endpoint": "nowhere", "model_name": "m", "block_size": 16}))
        .await;
    assert!(wrong.status == 400 && wrong.json()["error"].as_str().unwrap().contains("nowhere"));
    let workers = front.get("/workers").await.json();
    let ids: Vec<&str> = workers.as_array().unwrap().iter().map(|worker| worker["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["7@1", "a", "b"]);
    // Known for its blocks alone: no request goes there.
    let explained = front.post("/explain", json!({"model": "m", "prompt": prompt})).await.json();
    assert_eq!(explained["workers"].as_array().unwrap().len(), 2);
    let chosen = explained["workers"].as_array().unwrap().iter().find(|worker| worker["chosen"] == true).unwrap();
    assert_eq!(
        (&chosen["worker"], &chosen["engine_tokens"], &explained["prompt_tokens"]),
        (&json!("a"), &json!(160), &json!(320))
    );
    assert_eq!(front.post("/unregister", json!({"instance_id": 7})).await.status, 200);
    assert_eq!(front.post("/unregister", json!({"instance_id": 7})).await.status, 404);
    for path in ["/health", "/ready", "/dump", "/load", "/metrics"] {
        assert_eq!(front.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_count_each_others_requests() {
    let slow = ScriptedEngine::start("m", Duration::from_millis(100)).await;
    let other = ScriptedEngine::start("m", QUICK).await;
    let workers = [spec("a", &slow.url(), Role::Both), spec("b", &other.url(), Role::Both)];
    let first = Front::start(&workers[..1], PlaceOptions::default()).await;
    let serve = ServeOptions { peers: vec![first.url.clone()], ..ServeOptions::default() };
    let second = Front::start_with(&workers, PlaceOptions::default(), serve).await;
    let long: Vec<u32> = (0..3000).collect();
    // Longer than the rest of this test takes.
    let busy = json!({"model": "m", "prompt": long, "max_tokens": 900, "stream": true});
    let mut streams = Vec::new();
    for _ in 0..3 {
        let request = http::Request::post(format!("{}/v1/completions", first.url))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(busy.to_string())))
            .unwrap();
        streams.push(first.client.request(request).await.unwrap());
    }
    until("the second knows of them", || {
        let asked = kvstore_router::place::Asked { model: "m".into(), tokens: 10, ..Default::default() };
        let candidates = second.router.candidates(&asked, &[]).unwrap();
        candidates.iter().any(|candidate| candidate.load.requests() == 3)
    })
    .await;
    for _ in 0..4 {
        let quick = json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 1});
        assert_eq!(second.post("/v1/completions", quick).await.worker, "b");
    }
}
