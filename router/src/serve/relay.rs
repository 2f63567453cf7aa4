//! An answer that comes in pieces, from its worker to its client; one that breaks off is gone on with at another worker, from the tokens that came.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Map, Value, json};

use super::openai::{ApiError, Kind, Request};
use super::proxy::{Call, Upstream, cause_of, copy_headers, name_worker};
use super::sse::{self, Events};
use crate::caps;
use crate::place::Placed;

/// An answer that comes in pieces.
pub(super) struct Relay {
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
        let Some(fields) = piece.as_object_mut() else {
            return Piece::Failed("the worker sent a piece that is not a JSON object".into());
        };
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
    /// Begins to relay what a worker streams.
    pub(super) fn begin(call: Call, placed: Placed, upstream: Upstream) -> Response {
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
                Err(_) => Some(format!("the worker sent nothing for {} s", silence.as_secs())),
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
            let piece: Value = serde_json::from_str(&data)
                .map_err(|error| format!("the worker sent a piece that is not JSON: {error}"))?;
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
        tracing::warn!(
            worker = worker.spec.id,
            why,
            tokens = self.answer.generated.len(),
            "the worker's answer broke off"
        );
        match self.another().await {
            Ok((placed, upstream)) => {
                tracing::info!(
                    from = worker.spec.id,
                    to = placed.worker.spec.id,
                    "the answer continues at another worker"
                );
                self.call.app.counts.resumed.fetch_add(1, Ordering::Relaxed);
                (self.placed, self.body, self.events) = (placed, upstream.into_body(), Events::default());
            }
            Err(problem) => {
                self.call.app.counts.broken.fetch_add(1, Ordering::Relaxed);
                let error = ApiError::unavailable(format!("the worker's answer broke off ({why}), and {problem}"));
                self.out.push_back(sse::event(&error.body().to_string()));
                self.out.push_back(sse::event("[DONE]"));
                self.done = true;
            }
        }
    }

    async fn another(&mut self) -> Result<(Placed, Upstream), String> {
        if self.but.len() >= caps::TRIES_MAX {
            return Err("the router has already tried several workers".into());
        }
        let before = self.but.len();
        let found = if !self.answer.sent {
            // Nothing came yet: all of it is asked for again.
            self.call.send_somewhere(&mut self.but).await
        } else {
            if !self.call.resumes {
                return Err(
                    "this request cannot be continued at another worker: it asks for something that its tokens alone do not carry (such as tools, \
                     several choices, log-probabilities, a format or penalties), or resume is off".into(),
                );
            }
            let tokens_max = match self.call.request.max_tokens() {
                Some(_) => None,
                None => self.call.app.model_tokens_max(&self.call.request.model).await,
            };
            let rest = self.answer.rest(&self.call.request, tokens_max);
            let rest = rest.ok_or("the worker did not say which tokens it sent (return_token_ids)")?;
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
                "worker {id:?} answered {} to the rest of the request ({} tries)",
                upstream.status(),
                self.but.len() - before
            ));
        }
        Ok((placed, upstream))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

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
