//! Whether the prompts that are made here are the engine's. Of each shape of requests, one is compared: an engine says which tokens it makes
//! of it, off the request's path. Where they differ, requests of this shape are not read here for a while.
//!
//! What cannot be read here is asked of an engine, too, within a bound on calls and bytes: the blocks of its beginning are known then when
//! the conversation goes on. An engine that does not say is asked again after a while; until then what is made here is believed.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use kvstore_chat::conversation::Beginning;
use kvstore_chat::engine::Engine;
use kvstore_chat::shape::Shape;
use serde_json::{Map, Value};

use super::app::App;
use super::openai::{Kind, Request};
use super::shapes::Seen;
use crate::caps;
use crate::fleet::Worker;

impl App {
    /// Compares a prompt that was made here with an engine's, if none of its shape was; in the background.
    pub(super) fn compare(self: &Arc<Self>, request: &Arc<Request>, model: &str, shape: Shape) {
        let (body, engine) = (request.body.bytes(), self.engine_of(model).unwrap_or_default());
        if body.len() > caps::COMPARED_BYTES_MAX || !self.shapes.begin((model, engine), shape) {
            return;
        }
        let (app, request, model) = (Arc::clone(self), Arc::clone(request), model.to_owned());
        tokio::spawn(async move {
            let engines = app.ask_for_prompt(&request, &model).await;
            let (reading, of, reads) = (Arc::clone(&app), model.clone(), Arc::clone(&request));
            let ours = tokio::task::spawn_blocking(move || reading.whole_tokens(&reads, &of)).await;
            let seen = match (engines, ours) {
                (Some(engines), Ok(Ok(ours))) if engines == ours => Seen::Agrees(Instant::now()),
                (Some(engines), Ok(Ok(ours))) => {
                    let at = engines.iter().zip(&ours).take_while(|(one, other)| one == other).count();
                    tracing::warn!(model, %shape, at, ours = ours.len(), engines = engines.len(),
                        "the engine makes other tokens of a prompt than the router: prompts of this shape are not read here for a while");
                    app.counts.differing_shapes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    Seen::Differs(Instant::now())
                }
                _ => Seen::Later(Instant::now() + caps::ENGINE_PROMPT_AGAIN),
            };
            app.shapes.end((&model, engine), shape, seen);
        });
    }

    /// Asks an engine for the tokens of a prompt that cannot be read here, for when the conversation goes on; in the background.
    pub(super) fn learn_prompt(self: &Arc<Self>, request: &Arc<Request>, model: &str, messages: &[Beginning]) {
        let Some(whole) = messages.last().map(|beginning| beginning.name) else { return };
        if request.body.bytes().len() > caps::COMPARED_BYTES_MAX || self.shapes.is_told(whole) {
            return;
        }
        let (app, request, model) = (Arc::clone(self), Arc::clone(request), model.to_owned());
        tokio::spawn(async move {
            if let Some(tokens) = app.ask_for_prompt(&request, &model).await {
                let chain = app.chain(&request, &model, &tokens);
                if !chain.names.is_empty() {
                    app.shapes.tell(whole, chain);
                }
            }
        });
    }

    /// The tokens that an engine makes of a chat request's prompt; none where it does not say, or too many are being asked.
    async fn ask_for_prompt(&self, request: &Request, model: &str) -> Option<Vec<u32>> {
        let _call = self.shapes.calls.try_acquire().ok()?;
        let worker = self.who_may_say(model)?;
        let body = as_tokenized(request, self.engine_of(model).ok()?)?;
        let answer = self.workers.post(&worker.spec.url, "/tokenize", body, caps::ENGINE_PROMPT_WITHIN).await;
        let tokens = answer.ok().filter(|(status, _)| status.is_success()).and_then(|(_, answer)| tokens_of(&answer));
        if tokens.is_none() {
            self.shapes.was_silent(worker.number);
        }
        tokens
    }

    /// One that answers, and does not refuse to say.
    fn who_may_say(&self, model: &str) -> Option<Arc<Worker>> {
        let is_silent = |worker: &Worker| self.shapes.is_silent(worker.number);
        let may = |worker: &Arc<Worker>| worker.is_up() && !worker.spec.url.is_empty() && !is_silent(worker);
        self.router.fleet.serving(model).into_iter().find(may)
    }

    /// Compares prompts of the usual shapes before anybody asks for one.
    pub(super) fn compare_usual(self: &Arc<Self>) {
        for (model, known) in &self.models {
            if known.tokens.is_none() || self.who_may_say(model).is_none() {
                continue;
            }
            for body in USUAL {
                let body = Bytes::from(body.replace("MODEL", &Value::from(model.as_str()).to_string()));
                let Ok(request) = Request::read(Kind::Chat, &http::HeaderMap::new(), body) else { continue };
                let shape = Shape::of(|field| request.body.value(field));
                if self.whole_tokens(&request, model).is_ok() {
                    self.compare(&Arc::new(request), model, shape);
                }
            }
        }
    }
}

/// Requests of the usual shapes.
const USUAL: [&str; 3] = [
    r#"{"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}"#,
    r#"{"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}}}]}"#,
    r#"{"model": MODEL, "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": \"c\", \"a\": 1}"}}]}, {"role": "tool", "tool_call_id": "call_1", "content": "7"}], "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}}}]}"#,
];

/// A chat request as `/tokenize` takes it; none where that has no words for it.
fn as_tokenized(request: &Request, engine: Engine) -> Option<Bytes> {
    match engine {
        Engine::Vllm => as_vllm_tokenizes(request),
        Engine::Sglang => as_sglang_tokenizes(request),
    }
}

/// (Source: SGLang 0.5.23, `sglang/srt/entrypoints/openai/serving_tokenize.py`.) It makes a chat request of this, without its nulls.
fn as_sglang_tokenizes(request: &Request) -> Option<Bytes> {
    // With the first of these it does otherwise than the route for chats, which does not know it; and the last have no effect.
    const LEFT_OUT: [&str; 6] =
        ["add_generation_prompt", "add_special_tokens", "prompt", "stream", "stream_options", "input_ids"];
    // It drops nulls, which moves keys of tools; and it does not take an effort out of the arguments.
    let says = |field: &str, word: &str| request.body.get(field).is_some_and(|text| text.contains(word));
    let is_odd = says("chat_template_kwargs", "null")
        || says("chat_template_kwargs", "reasoning_effort")
        || says("tools", "null")
        || says("messages", "\"arguments\":{")
        || says("messages", "\"arguments\": {");
    if request.kind != Kind::Chat || is_odd {
        return None;
    }
    Some(request.body.only(|name| !LEFT_OUT.contains(&name)).bytes().clone())
}

/// (Source: vLLM 0.32, `vllm/entrypoints/serve/tokenize`.)
fn as_vllm_tokenizes(request: &Request) -> Option<Bytes> {
    const SAME: [&str; 8] = [
        "model",
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
    ];
    // It knows none of these, or reads them otherwise than the route for chats does.
    const OTHERS: [&str; 5] =
        ["reasoning_effort", "documents", "truncate_prompt_tokens", "truncation_side", "tool_choice"];
    let (body, is_null) = (&request.body, |field: &&str| request.body.value(field).is_null());
    let has_old_name = body.get("messages").is_some_and(|messages| messages.contains("\"reasoning_content\""));
    if request.kind != Kind::Chat || !OTHERS.iter().all(is_null) || has_old_name {
        return None;
    }
    let fields = SAME.iter().filter(|field| !is_null(field));
    let mut asked: Map<String, Value> = fields.map(|field| ((*field).to_owned(), body.value(field))).collect();
    // A chat may have an empty list of none; here it is one.
    if asked.get("tools").is_some_and(|tools| tools.as_array().is_some_and(Vec::is_empty)) {
        asked.remove("tools");
    }
    Some(Value::Object(asked).to_string().into())
}

/// The tokens of an answer.
fn tokens_of(answer: &[u8]) -> Option<Vec<u32>> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let tokens = answer.get("tokens")?.as_array()?.iter();
    tokens.map(|token| token.as_u64().and_then(|token| u32::try_from(token).ok())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(body: &Value) -> Option<Value> {
        let request = Request::read(Kind::Chat, &http::HeaderMap::new(), body.to_string().into()).unwrap();
        as_tokenized(&request, Engine::Vllm).map(|body| serde_json::from_slice(&body).unwrap())
    }

    #[test]
    fn what_tokenize_has_no_words_for_is_not_asked() {
        let plain =
            json!({"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 0.5, "tools": []});
        assert_eq!(asked(&plain), Some(json!({"model": "m", "messages": [{"role": "user", "content": "a"}]})));
        for (field, value) in [("reasoning_effort", json!("low")), ("tool_choice", json!("none"))] {
            let mut other = plain.clone();
            other[field] = value;
            assert_eq!(asked(&other), None, "{field}");
        }
        let old = json!({"messages": [{"role": "assistant", "reasoning_content": "r"}]});
        assert_eq!(asked(&old), None);
        let chat = json!({"model": "m", "messages": [], "add_generation_prompt": false, "tool_choice": "none"});
        let request =
            |body: &Value| Request::read(Kind::Chat, &http::HeaderMap::new(), body.to_string().into()).unwrap();
        let of_sglang = as_tokenized(&request(&chat), Engine::Sglang).unwrap();
        assert_eq!(of_sglang, r#"{"model":"m","messages":[],"tool_choice":"none"}"#);
        for odd in [
            json!({"messages": [], "chat_template_kwargs": {"a": null}}),
            json!({"messages": [], "chat_template_kwargs": {"reasoning_effort": "low"}}),
            json!({"messages": [], "tools": [{"function": {"description": null, "name": "f"}}]}),
        ] {
            assert_eq!(as_tokenized(&request(&odd), Engine::Sglang), None, "{odd}");
        }
        assert_eq!(tokens_of(br#"{"count": 2, "tokens": [1, 2]}"#), Some(vec![1, 2]));
        for other in ["", "[]", "{\"tokens\": [-1]}", "{\"choices\": []}"] {
            assert_eq!(tokens_of(other.as_bytes()), None, "{other}");
        }
    }
}
