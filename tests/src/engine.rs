//! An engine to go behind the router: it speaks OpenAI's API and publishes KV events, its tokens follow from what stands before them, and it fails when it is
//! told to. What real engines do is tested with real ones, in `shims/tests/engines`.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::StreamExt;
use http::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

/// What it does when a request comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mood {
    /// Answers.
    #[default]
    Well,
    /// Answers with this status.
    Refuses(u16),
    /// Hangs up after so many pieces of an answer.
    DiesAfter(usize),
    /// Says that it failed after so many pieces.
    FailsAfter(usize),
    /// Takes the request and says nothing.
    Hangs,
}

struct Shared {
    model: String,
    mood: Mutex<Mood>,
    delay: Duration,
    knows_token_ids: AtomicBool,
    requests: AtomicUsize,
    streaming: AtomicUsize,
    bodies: Mutex<Vec<Value>>,
}

/// See the head of this file.
pub struct ScriptedEngine {
    /// Where it serves.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: AbortHandle,
}

/// The token that follows.
pub fn next_token(tokens: &[u64]) -> u64 {
    tokens.iter().fold(7u64, |sum, token| sum.wrapping_mul(31).wrapping_add(*token + 1)) % 1000
}

/// The answer to a prompt.
pub fn answer(prompt: &[u64], count: usize) -> Vec<u64> {
    let mut all = prompt.to_vec();
    (0..count).for_each(|_| all.push(next_token(&all)));
    all.split_off(prompt.len())
}

/// Words for tokens, as text.
pub fn text(tokens: &[u64]) -> String {
    tokens.iter().map(|token| format!(" {token}")).collect()
}

impl ScriptedEngine {
    /// One that serves `model`, taking `delay` for each token.
    pub async fn start(model: &str, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::start_on(listener, model, delay)
    }

    fn start_on(listener: TcpListener, model: &str, delay: Duration) -> Self {
        let shared = Arc::new(Shared {
            model: model.to_owned(),
            mood: Mutex::default(),
            delay,
            knows_token_ids: AtomicBool::new(true),
            requests: AtomicUsize::new(0),
            streaming: AtomicUsize::new(0),
            bodies: Mutex::default(),
        });
        let routes = axum::Router::new()
            .route("/v1/completions", post(completions))
            .route("/v1/chat/completions", post(completions))
            .route("/v1/models", get(models))
            .route("/health", get(|| async { "" }))
            .with_state(Arc::clone(&shared));
        let address = listener.local_addr().unwrap();
        let serve = async move { axum::serve(listener, routes).await.unwrap() };
        Self { address, shared, task: tokio::spawn(serve).abort_handle() }
    }

    /// What it does from now on.
    pub fn set_mood(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    /// It does not say which tokens its text is.
    pub fn hide_token_ids(&self) {
        self.shared.knows_token_ids.store(false, Ordering::Relaxed);
    }

    /// Requests that came.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Answers that are being streamed.
    pub fn streaming(&self) -> usize {
        self.shared.streaming.load(Ordering::Relaxed)
    }

    /// What came.
    pub fn bodies(&self) -> Vec<Value> {
        self.shared.bodies.lock().unwrap().clone()
    }

    /// As workers are named.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for ScriptedEngine {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn models(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": shared.model, "object": "model", "max_model_len": 4096}]}))
}

struct Streaming(Arc<Shared>);

impl Drop for Streaming {
    fn drop(&mut self) {
        self.0.streaming.fetch_sub(1, Ordering::Relaxed);
    }
}

#[expect(clippy::too_many_lines, reason = "one request of a simulated engine, from top to bottom")]
async fn completions(State(shared): State<Arc<Shared>>, Json(body): Json<Value>) -> Response {
    shared.requests.fetch_add(1, Ordering::Relaxed);
    shared.bodies.lock().unwrap().push(body.clone());
    let mood = *shared.mood.lock().unwrap();
    match mood {
        Mood::Refuses(status) => {
            let error =
                json!({"error": {"message": "refused as it was told", "type": "x", "param": null, "code": null}});
            return (StatusCode::from_u16(status).unwrap(), Json(error)).into_response();
        }
        Mood::Hangs => tokio::time::sleep(Duration::from_secs(3600)).await,
        _ => {}
    }
    let is_chat = body.get("messages").is_some();
    // Letters are the tokens of a text.
    let prompt: Vec<u64> = match (&body["prompt"], &body["messages"]) {
        (Value::Array(tokens), _) => tokens.iter().map(|token| token.as_u64().unwrap()).collect(),
        (Value::String(text), _) => text.bytes().map(u64::from).collect(),
        (_, messages) => messages.to_string().bytes().map(u64::from).collect(),
    };
    let count = body["max_completion_tokens"].as_u64().or(body["max_tokens"].as_u64()).unwrap_or(16) as usize;
    let tokens = answer(&prompt, count);
    let with_ids = body["return_token_ids"] == true && shared.knows_token_ids.load(Ordering::Relaxed);
    let usage =
        json!({"prompt_tokens": prompt.len(), "completion_tokens": count, "total_tokens": prompt.len() + count});
    static ID: AtomicU64 = AtomicU64::new(0);
    let head = json!({"id": format!("id-{}", ID.fetch_add(1, Ordering::Relaxed)), "created": 1, "model": shared.model});
    if body["stream"] != true {
        tokio::time::sleep(shared.delay * count as u32).await;
        let mut whole = head;
        let choice = if is_chat {
            json!({"message": {"role": "assistant", "content": text(&tokens)}})
        } else {
            json!({"text": text(&tokens)})
        };
        whole["choices"] = json!([choice]);
        whole["usage"] = usage;
        whole["kv_transfer_params"] = json!({"from": shared.model});
        return Json(whole).into_response();
    }
    shared.streaming.fetch_add(1, Ordering::Relaxed);
    let streaming = Streaming(Arc::clone(&shared));
    let mut pieces = Vec::new();
    if is_chat {
        let mut first = head.clone();
        first["choices"] = json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]);
        if with_ids {
            first["prompt_token_ids"] = json!(prompt);
        }
        pieces.push(first);
    }
    for (at, token) in tokens.iter().enumerate() {
        let reason = if at + 1 == count { json!("length") } else { Value::Null };
        let mut choice = json!({"index": 0, "finish_reason": reason});
        match is_chat {
            true => choice["delta"] = json!({"content": text(&[*token])}),
            false => choice["text"] = json!(text(&[*token])),
        }
        if with_ids {
            choice["token_ids"] = json!([token]);
            if at == 0 && !is_chat {
                choice["prompt_token_ids"] = json!(prompt);
            }
        }
        let mut piece = head.clone();
        piece["choices"] = json!([choice]);
        pieces.push(piece);
    }
    if body["stream_options"]["include_usage"] == true {
        let mut last = head;
        last["choices"] = json!([]);
        last["usage"] = usage;
        pieces.push(last);
    }
    let delay = shared.delay;
    let stream = futures::stream::iter(pieces.into_iter().enumerate()).then(move |(at, piece)| {
        let _counted = &streaming;
        async move {
            tokio::time::sleep(delay).await;
            match mood {
                Mood::DiesAfter(count) if at == count => Err(std::io::Error::other("as it was told")),
                Mood::FailsAfter(count) if at == count => {
                    Ok(Bytes::from("data: {\"error\": {\"message\": \"the engine is dead\"}}\n\n"))
                }
                _ => Ok(Bytes::from(format!("data: {piece}\n\n"))),
            }
        }
    });
    let end = futures::stream::once(async { Ok::<_, std::io::Error>(Bytes::from("data: [DONE]\n\n")) });
    let mut response = Response::new(Body::from_stream(stream.chain(end)));
    response.headers_mut().insert("content-type", "text/event-stream; charset=utf-8".parse().unwrap());
    response
}
