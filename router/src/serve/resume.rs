//! What came of an answer, and whether and how another worker can give its rest.
//!
//! An answer is gone on with only where that is exact: what decides about the rest is in the tokens that came, and in fields of the
//! request that are sent along. Any other field, one that is not known here too, forbids it.

use std::collections::BTreeSet;

use bytes::Bytes;
use kvstore_chat::prompts::Prompts;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::json::{Changes, range_of};
use super::openai::{Kind, Prompt, Request};
use crate::caps;

/// Fields that are sent along with the tokens.
const CARRIED: [&str; 15] = [
    "model",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "logit_bias",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "cache_salt",
    "priority",
];

/// Fields that say nothing of the tokens to come, or only through those of the prompt.
const PASSED_OVER: [&str; 22] = [
    "prompt",
    "messages",
    "stream",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "return_token_ids",
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "truncate_prompt_tokens",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "request_id",
    "session_id",
];

/// Fields of a request that matter once its answer has begun.
const NEEDED: [&str; 5] = ["n", "stream", "max_tokens", "max_completion_tokens", "min_tokens"];

/// What is needed of a request once its answer has begun.
pub fn what_is_needed(request: &Request) -> Request {
    request.without_prompt(&[&CARRIED[..], &NEEDED].concat())
}

/// Why a broken answer to a request cannot be gone on with: the field that stands in the way. `None` where it can.
pub fn hindrance(request: &Request) -> Option<String> {
    if request.kind == Kind::Completion && matches!(request.prompt(), Prompt::Other) {
        return Some("prompt".into());
    }
    let is_greedy = request.body.value("temperature").as_f64() == Some(0.0);
    let may = |name: &str, text: &str| {
        // A prompt is long, and is told by its tokens.
        let is_read = ["seed", "messages", "max_tokens", "max_completion_tokens", "min_tokens"].contains(&name);
        if !is_read && (CARRIED.contains(&name) || PASSED_OVER.contains(&name)) {
            return true;
        }
        let Ok(value) = serde_json::from_str::<Value>(text) else { return false };
        match name {
            // Pictures are no tokens.
            "messages" => has_text_alone(&value),
            // The sampler's state is lost; without chance there is none.
            "seed" => is_greedy || value.is_null(),
            // Engines take 10.0 and "10" for ten; here these are not known.
            "max_tokens" | "max_completion_tokens" | "min_tokens" => value.is_null() || value.is_u64(),
            "n" | "best_of" => value.is_null() || value == 1,
            "response_format" => value.is_null() || value.get("type").is_some_and(|kind| kind == "text"),
            "tool_choice" => value.is_null() || value == "none" || value == "auto",
            "parallel_tool_calls" => true,
            "presence_penalty" | "frequency_penalty" => value.is_null() || value.as_f64() == Some(0.0),
            "length_penalty" => value.is_null() || value.as_f64() == Some(1.0),
            "top_logprobs" => value.is_null() || value == 0,
            // Whatever it is: what is not asked for.
            _ => is_nothing(&value),
        }
    };
    request.body.members().find(|(name, text)| !may(name, text)).map(|(name, _)| name.to_owned())
}

/// Null, false, or empty.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn has_text_alone(messages: &Value) -> bool {
    let is_text = |part: &Value| part.is_string() || part.get("type").is_some_and(|kind| kind == "text");
    messages.as_array().is_some_and(|messages| {
        messages.iter().all(|message| match message.get("content") {
            None | Some(Value::Null | Value::String(_)) => true,
            Some(Value::Array(parts)) => parts.iter().all(is_text),
            Some(_) => false,
        })
    })
}

/// A piece of an answer, as far as the router reads it. What it does not name is passed on unread.
#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    created: Option<&'a RawValue>,
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt_token_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    #[serde(borrow)]
    token_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt_token_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    finish_reason: Option<&'a RawValue>,
}

impl Choice<'_> {
    fn text(&self) -> Option<String> {
        self.text.and_then(|text| serde_json::from_str(text.get()).ok())
    }

    fn ids(&self) -> Option<Vec<u32>> {
        self.token_ids.and_then(|ids| serde_json::from_str(ids.get()).ok())
    }
}

/// What the client has of a piece that comes again.
#[derive(Default)]
struct Known {
    bytes: usize,
    tokens: usize,
    /// It has all of it.
    is_whole: bool,
}

/// An error with a status of 400 to 499 is the request's.
fn is_refusal(error: &RawValue) -> bool {
    let error: Value = serde_json::from_str(error.get()).unwrap_or_default();
    let code = error.get("code").or_else(|| error.get("status"));
    code.and_then(Value::as_u64).is_some_and(|code| (400..500).contains(&code) && code != 429)
}

/// What came so far.
#[derive(Default)]
pub struct Answer {
    /// What every piece says: id, model, and when.
    id: Option<Value>,
    created: Option<Value>,
    model: Option<Value>,
    prompt: Option<Vec<u32>>,
    generated: Vec<u32>,
    /// Of these, those whose text was sent: engines hold back what may become a stop string, and half a character.
    told: usize,
    /// Of these, those behind which a character ends for certain: the last one brought text, and came alone.
    sure: usize,
    /// The text that was sent since.
    since: String,
    /// That is more than is kept.
    is_long: bool,
    /// The last text ends as half a character is written.
    is_cut: bool,
    /// What another worker has still to compute again.
    again: Again,
    /// Tokens that came before the answer was gone on with last.
    before: usize,
    /// Pieces of another worker are to look like the first one's.
    resumed: bool,
    /// Some piece was sent that tokens alone do not bring back.
    opaque: bool,
    /// Some piece cannot be read here.
    unread: bool,
    /// Anything of it was sent.
    sent: bool,
    /// Text was sent.
    has_text: bool,
    /// Choices of which anything came, and those that have ended.
    seen: BTreeSet<u64>,
    finished: BTreeSet<u64>,
    has_usage: bool,
}

/// What the client has of what another worker computes again. It is not sent twice.
#[derive(Clone, Debug, Default, PartialEq)]
struct Again {
    text: String,
    /// Empty for a client that did not ask for tokens.
    ids: Vec<u32>,
}

impl Again {
    /// Takes off what a piece brings: how many bytes of its text, and how many of its tokens, the client has. `None`: it says something else,
    /// or is the last one and leaves something out.
    fn take(&mut self, text: &str, ids: &[u32], is_last: bool) -> Option<(usize, usize)> {
        let (bytes, count) = (text.len().min(self.text.len()), ids.len().min(self.ids.len()));
        let is_same = text.as_bytes().get(..bytes) == self.text.as_bytes().get(..bytes)
            && ids.get(..count) == self.ids.get(..count);
        let is_all = bytes == self.text.len() && count == self.ids.len();
        if !is_same || is_last && !is_all {
            return None;
        }
        self.text.drain(..bytes);
        self.ids.drain(..count);
        Some((bytes, count))
    }

    fn is_over(&self) -> bool {
        self.text.is_empty() && self.ids.is_empty()
    }
}

/// What to do with a piece.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// It is sent as it came.
    AsItCame,
    /// It is sent with these data.
    As(Vec<u8>),
    /// It is not sent: nobody but the router asked for it.
    Dropped,
    /// The worker says that it failed.
    Failed(String),
    /// It is not sent: another worker computed something else than what the client has.
    Differs,
    /// The worker says that the request is wrong: nobody else would take it.
    Refused,
}

impl Answer {
    /// Anything of it was sent to the client.
    pub fn was_sent(&self) -> bool {
        self.sent
    }

    /// Tokens that came.
    pub fn tokens(&self) -> usize {
        self.generated.len()
    }

    /// A piece is sent that cannot be read here: JSON of another form, or none. The client may know what it is.
    pub fn pass_over(&mut self) {
        (self.opaque, self.unread, self.sent) = (true, true, true);
    }

    /// The tokens of its prompt, as the worker said them.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.as_ref().map_or(0, Vec::len)
    }

    /// There is no room for its prompt: it cannot be gone on with.
    pub fn forget_prompt(&mut self) {
        self.prompt = None;
        self.opaque = true;
    }

    /// Takes a piece of the answer as the worker sent it. `hides`: the router asked for token ids, and the client did not.
    pub fn take(&mut self, data: &str, request: &Request, hides: bool) -> Verdict {
        let Ok(piece) = serde_json::from_str::<Piece<'_>>(data) else {
            self.pass_over();
            return Verdict::AsItCame;
        };
        let choices = piece.choices.unwrap_or_default();
        if let Some(error) = piece.error
            && choices.is_empty()
        {
            return if is_refusal(error) { Verdict::Refused } else { Verdict::Failed(error.get().to_owned()) };
        }
        let Some(known) = self.known_of(&choices, hides) else { return Verdict::Differs };
        self.sent = true;
        let value = |text: Option<&RawValue>| text.and_then(|text| serde_json::from_str::<Value>(text.get()).ok());
        if !self.resumed {
            self.id = self.id.take().or_else(|| value(piece.id));
            self.created = self.created.take().or_else(|| value(piece.created));
            self.model = self.model.take().or_else(|| value(piece.model));
        }
        self.has_usage |= piece.usage.is_some();
        let mut hidden: Vec<&RawValue> = piece.prompt_token_ids.into_iter().collect();
        let mut prompt = piece.prompt_token_ids;
        for choice in &choices {
            prompt = prompt.or(choice.prompt_token_ids);
            hidden.extend(choice.prompt_token_ids.into_iter().chain(choice.token_ids));
            self.take_choice(choice);
        }
        if !self.resumed && self.prompt.is_none() {
            self.prompt = prompt.and_then(|prompt| serde_json::from_str(prompt.get()).ok());
        }
        if self.resumed {
            if known.is_whole && piece.usage.is_none() {
                return Verdict::Dropped;
            }
            return self.dressed(data, request, hides, &known).map_or(Verdict::AsItCame, Verdict::As);
        }
        if !hides || hidden.is_empty() {
            return Verdict::AsItCame;
        }
        // Without token ids to tell, vLLM sends nothing for tokens whose text it holds back.
        let is_idle = |choice: &Choice<'_>| {
            choice.delta.is_some_and(|delta| delta.get() == "{}")
                && choice.token_ids.is_some()
                && choice.finish_reason.is_none()
        };
        if piece.usage.is_none() && !choices.is_empty() && choices.iter().all(is_idle) {
            return Verdict::Dropped;
        }
        // What it says where nobody asks for them.
        let mut changes = Changes::default();
        hidden.iter().for_each(|ids| changes.replace(range_of(data.as_bytes(), ids.get()), "null"));
        Verdict::As(changes.apply(data.as_bytes()))
    }

    /// What the client has of a piece already. `None`: the piece is not what was to come again.
    fn known_of(&mut self, choices: &[Choice<'_>], hides: bool) -> Option<Known> {
        let Some(choice) = choices.first().filter(|_| !self.again.is_over()) else { return Some(Known::default()) };
        let (text, ids) = (choice.text().unwrap_or_default(), choice.ids().unwrap_or_default());
        let is_last = choice.finish_reason.is_some();
        let (bytes, tokens) = self.again.take(&text, &ids, is_last)?;
        let is_whole = !is_last && bytes == text.len() && (hides || tokens == ids.len());
        Some(Known { bytes, tokens, is_whole })
    }

    fn take_choice(&mut self, choice: &Choice<'_>) {
        let text = choice.text();
        let delta: Option<Map<String, Value>> =
            choice.delta.map(|delta| serde_json::from_str(delta.get()).unwrap_or_default());
        let content = delta.as_ref().and_then(|delta| delta.get("content")).and_then(Value::as_str);
        let text = text.as_deref().filter(|text| !text.is_empty()).or(content).unwrap_or_default();
        let (with_text, is_cut) = (!text.is_empty(), text.ends_with('\u{fffd}'));
        // Nobody asked for more than one.
        self.opaque |= choice.index.unwrap_or(0) > 0;
        // Calls of tools, thoughts, refusals: tokens alone do not tell them.
        let is_told =
            |(name, value): (&String, &Value)| matches!(name.as_str(), "role" | "content") || is_nothing(value);
        self.opaque |= delta.as_ref().is_some_and(|delta| !delta.iter().all(is_told));
        let tokens = choice.ids();
        self.opaque |= with_text && tokens.as_ref().is_none_or(Vec::is_empty);
        let tokens = tokens.unwrap_or_default();
        self.generated.extend(&tokens);
        if with_text {
            (self.told, self.is_cut, self.has_text) = (self.generated.len(), is_cut, true);
            if tokens.len() == 1 && !is_cut {
                (self.sure, self.is_long) = (self.told, false);
                self.since.clear();
            } else if self.since.len() + text.len() <= caps::AGAIN_BYTES_MAX {
                self.since.push_str(text);
            } else {
                self.is_long = true;
            }
        }
        self.seen.insert(choice.index.unwrap_or(0));
        if choice.finish_reason.is_some() {
            self.finished.insert(choice.index.unwrap_or(0));
        }
    }

    /// Whether all of it came, but perhaps its last line: every choice has ended, and what was asked for has come.
    pub fn is_whole(&self, request: &Request) -> bool {
        let usage = request.body.value("stream_options");
        let usage = usage.get("include_usage").is_some_and(|usage| *usage == true);
        let ended = self.finished.len() as u64 >= request.choices && self.seen.is_subset(&self.finished);
        ended && (self.has_usage || !usage)
    }

    /// Whether the router can tell a whole answer from one that broke off: it reads all pieces.
    pub fn is_read(&self) -> bool {
        self.sent && !self.unread
    }

    /// Makes a piece of a continuation look like one of the answer that it continues.
    fn dressed(&self, data: &str, request: &Request, hides: bool, known: &Known) -> Option<Vec<u8>> {
        let mut fields: Map<String, Value> = serde_json::from_str(data).ok()?;
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
            // Of the other worker's prompt, of which this one's is a part.
            let cached = usage.get_mut("prompt_tokens_details").and_then(|details| details.get_mut("cached_tokens"));
            if let Some(cached) = cached
                && cached.as_u64().is_some_and(|cached| cached > prompt)
            {
                *cached = json!(prompt);
            }
        }
        // The client has its prompt's tokens, if it wants them.
        fields.remove("prompt_token_ids");
        if request.kind == Kind::Chat {
            fields.insert("object".into(), json!("chat.completion.chunk"));
        }
        for choice in fields.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(choice) = choice.as_object_mut() else { continue };
            choice.remove("prompt_token_ids");
            if let Some(Value::String(text)) = choice.get_mut("text") {
                text.drain(..known.bytes.min(text.len()));
            }
            if let Some(Value::Array(ids)) = choice.get_mut("token_ids") {
                ids.drain(..known.tokens.min(ids.len()));
            }
            if hides && choice.contains_key("token_ids") {
                choice.insert("token_ids".into(), Value::Null);
            }
            if request.kind == Kind::Chat {
                let text = choice.remove("text").unwrap_or_else(|| json!(""));
                choice.insert("delta".into(), json!({"content": text}));
                choice.remove("prompt_logprobs");
            }
        }
        serde_json::to_vec(&fields).ok()
    }

    /// From here on come pieces of another worker, which got [`Self::rest`].
    pub fn goes_on(&mut self, rest: &Rest) {
        self.generated.truncate(rest.came);
        (self.resumed, self.before, self.told, self.sure) = (true, rest.came, rest.came, rest.came);
        (self.is_long, self.is_cut, self.again) = (false, false, rest.again.clone());
        self.since.clear();
    }

    /// From how many of the tokens that came the answer goes on, and what the client has behind them.
    /// An engine's text of a prompt that ends within a character is that of the whole prompt. So what brought no text is computed again.
    fn came(&self, request: &Request, tokenizer: Option<&Prompts>) -> Result<(usize, Again), &'static str> {
        let all = self.generated.len();
        // The client has the tokens, whatever their text is. An engine without a tokenizer writes none.
        if request.wants_token_ids && !self.has_text && all >= caps::HELD_BACK_MAX {
            return Ok((all, Again::default()));
        }
        // Without chance, what is computed again is the same.
        let is_greedy = request.body.value("temperature").as_f64() == Some(0.0);
        let (count, mut text) = match self.last_character(tokenizer) {
            Some(count) => (count, String::new()),
            None if is_greedy && !self.is_long && !self.is_cut => (self.sure, self.since.clone()),
            None => return Err("it may have broken off within a character"),
        };
        text.push_str(&self.again.text);
        let mut again = Again { text, ids: Vec::new() };
        if request.wants_token_ids {
            let held = self.generated.get(count..).unwrap_or_default();
            if !held.is_empty() && !is_greedy {
                return Err("the client has tokens whose text was held back");
            }
            again.ids = [held, &self.again.ids].concat();
        }
        Ok((count, again))
    }

    /// How many tokens the text that was sent has, if that is known.
    fn last_character(&self, tokenizer: Option<&Prompts>) -> Option<usize> {
        if self.sure == self.told {
            return Some(self.told);
        }
        let tokenizer = tokenizer.filter(|_| !self.is_cut)?;
        let least = self.told.saturating_sub(caps::CHARACTER_TOKENS_MAX).max(self.sure + 1);
        let is_whole = |count: &usize| tokenizer.ends_with_character(self.generated.get(..*count).unwrap_or_default());
        (least..=self.told).rev().find(is_whole)
    }

    /// The request for the rest of the answer: what was asked for, and what came, as tokens. `tokens_max`: what the model's context has,
    /// where the request does not say how many it wants. Or why that cannot be.
    pub fn rest(
        &self,
        request: &Request,
        tokenizer: Option<&Prompts>,
        tokens_max: Option<u64>,
    ) -> Result<Rest, &'static str> {
        if self.opaque {
            return Err(
                "it holds what its tokens alone do not tell (calls of tools, thoughts, or text without token ids)",
            );
        }
        if !self.finished.is_empty() {
            return Err("its end came");
        }
        let prompt =
            self.prompt.as_ref().ok_or("the worker did not say which tokens its prompt has (return_token_ids)")?;
        if request.kind == Kind::Chat && !self.has_text {
            return Err("nothing shows yet whether the model thinks or answers");
        }
        let (count, again) = self.came(request, tokenizer)?;
        let came = self.generated.get(..count).unwrap_or_default();
        let room = request.max_tokens().or(tokens_max.map(|max| max.saturating_sub(prompt.len() as u64)));
        let room = room.ok_or("nobody says how many tokens it may have")?;
        let left =
            room.checked_sub(count as u64).filter(|left| *left > 0).ok_or("all tokens that were asked for came")?;
        let all: Vec<u32> = prompt.iter().chain(came).copied().collect();
        let mut rest: Map<String, Value> = CARRIED
            .iter()
            .map(|name| ((*name).to_owned(), request.body.value(name)))
            .filter(|(_, value)| !value.is_null())
            .collect();
        rest.insert("prompt".into(), json!(all));
        rest.insert("max_tokens".into(), json!(left));
        rest.insert("stream".into(), Value::Bool(true));
        rest.insert("return_token_ids".into(), Value::Bool(true));
        rest.insert("add_special_tokens".into(), Value::Bool(false));
        if let Some(least) = request.body.value("min_tokens").as_u64() {
            rest.insert("min_tokens".into(), json!(least.saturating_sub(count as u64)));
        }
        Ok(Rest { body: Bytes::from(Value::Object(rest).to_string()), prompt: all, came: count, again })
    }
}

/// A request for the rest of an answer.
#[derive(Debug, PartialEq)]
pub struct Rest {
    /// For `/v1/completions`.
    pub body: Bytes,
    /// Its prompt.
    pub prompt: Vec<u32>,
    /// Tokens of it that are the answer's.
    came: usize,
    /// What the client has of the rest.
    again: Again,
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn request(kind: Kind, body: Value) -> Request {
        Request::read(kind, &HeaderMap::new(), body.to_string().into()).unwrap()
    }

    fn chat() -> Request {
        request(
            Kind::Chat,
            json!({"model": "m", "stream": true, "max_tokens": 10, "temperature": 0, "tools": null, "messages": [{"role": "user", "content": "x"}]}),
        )
    }

    fn seen(verdict: Verdict) -> Value {
        match verdict {
            Verdict::As(data) => serde_json::from_slice(&data).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_continuation_looks_like_what_it_continues() {
        let request = chat();
        let mut answer = Answer::default();
        let role = r#"{"id":"a","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"prompt_token_ids":[1, 2]}"#;
        let hidden = role.replace("[1, 2]", "null");
        assert_eq!(answer.take(role, &request, true), Verdict::As(hidden.into_bytes()), "nobody asked for them");
        assert_eq!(
            answer.rest(&request, None, None).unwrap_err(),
            "nothing shows yet whether the model thinks or answers"
        );
        let first = r#"{"id":"a","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"p"},"token_ids":[7],"finish_reason":null}]}"#;
        assert_eq!(answer.take(first, &request, false), Verdict::AsItCame);
        // Its text is held back.
        let held = r#"{"id":"a","created":1,"model":"m","choices":[{"index":0,"delta":{},"token_ids":[8],"finish_reason":null}]}"#;
        assert_eq!(answer.take(held, &request, true), Verdict::Dropped);
        let rest = answer.rest(&request, None, None).unwrap();
        assert_eq!(
            answer.rest(&what_is_needed(&request), None, None).as_ref(),
            Ok(&rest),
            "its prompt is not needed any more"
        );
        let body: Value = serde_json::from_slice(&rest.body).unwrap();
        assert_eq!(rest.prompt, [1, 2, 7], "from the last token whose text was sent");
        assert_eq!((&body["max_tokens"], &body["temperature"]), (&json!(9), &json!(0)));
        answer.goes_on(&rest);
        let more = r#"{"id":"b","created":9,"model":"m","object":"text_completion","choices":[{"index":0,"text":"q","token_ids":[9],"prompt_token_ids":[1,2,7],"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}"#;
        let seen = seen(answer.take(more, &request, true));
        assert_eq!(
            (&seen["id"], &seen["created"], &seen["object"]),
            (&json!("a"), &json!(1), &json!("chat.completion.chunk"))
        );
        assert_eq!(
            seen["choices"][0],
            json!({"index": 0, "token_ids": null, "finish_reason": "stop", "delta": {"content": "q"}})
        );
        assert_eq!(seen["usage"], json!({"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}));
        assert!(answer.is_whole(&request) && answer.generated == [7, 9]);
    }

    #[test]
    fn what_tokens_do_not_tell_is_not_gone_on_with() {
        let request = chat();
        let piece = |delta: Value, tokens: Value| {
            json!({"choices": [{"index": 0, "delta": delta, "token_ids": tokens}]}).to_string()
        };
        let known = || Answer { prompt: Some(vec![1]), ..Answer::default() };
        for (delta, tokens) in [
            (json!({"content": "x", "tool_calls": [{"index": 0}]}), json!([1])),
            (json!({"content": "x", "reasoning_content": "hm"}), json!([1])),
            (json!({"content": "x", "reasoning": "hm"}), json!([1])),
            (json!({"content": "x", "refusal": "no"}), json!([1])),
            (json!({"content": "x", "audio": {"id": 1}}), json!([1])),
            (json!({"content": "x"}), Value::Null),
            (json!({"content": "x"}), json!([])),
            // Half a character.
            (json!({"content": "x\u{fffd}"}), json!([1])),
        ] {
            let mut answer = known();
            assert_eq!(answer.take(&piece(delta.clone(), tokens.clone()), &request, false), Verdict::AsItCame);
            assert!(answer.rest(&request, None, None).is_err() && answer.was_sent(), "{delta} {tokens}");
        }
        let mut answer = known();
        answer.take(&piece(json!({"content": "x", "tool_calls": [], "refusal": null}), json!([1])), &request, false);
        assert!(answer.rest(&request, None, None).is_ok());
        // Its end came, if not all that was asked for.
        let mut answer = known();
        answer.take(&piece(json!({"content": "x"}), json!([1])), &request, false);
        answer.take(
            r#"{"choices": [{"index": 0, "delta": {}, "token_ids": [2], "finish_reason": "stop"}]}"#,
            &request,
            false,
        );
        assert_eq!(answer.rest(&request, None, None).unwrap_err(), "its end came");
        // All that was asked for came.
        let whole = Answer {
            prompt: Some(vec![1]),
            generated: vec![1; 10],
            told: 10,
            sure: 10,
            has_text: true,
            ..Answer::default()
        };
        assert_eq!(whole.rest(&request, None, None).unwrap_err(), "all tokens that were asked for came");
    }

    /// A client that asks for token ids has tokens whose text is held back.
    #[test]
    fn tokens_that_the_client_has_are_not_sent_again() {
        let body = |ids: bool| json!({"model": "m", "prompt": [1, 2], "stream": true, "max_tokens": 99, "return_token_ids": ids});
        let piece = |text: &str, token: u32| {
            json!({"choices": [{"index": 0, "text": text, "token_ids": [token], "prompt_token_ids": [1, 2]}]})
                .to_string()
        };
        let told = |ids: bool, texts: &[&str]| {
            let (request, mut answer) = (request(Kind::Completion, body(ids)), Answer::default());
            texts.iter().zip(3..).for_each(|(text, token)| _ = answer.take(&piece(text, token), &request, !ids));
            answer.rest(&request, None, None).map(|rest| rest.prompt.len() - 2)
        };
        assert_eq!((told(false, &["a", "b", ""]), told(true, &["a", "", "b"])), (Ok(2), Ok(3)));
        assert_eq!(told(true, &["a", "b", ""]), Err("the client has tokens whose text was held back"));
        assert_eq!(
            told(true, &[""; 3]),
            Err("the client has tokens whose text was held back"),
            "half a character, perhaps"
        );
        assert_eq!((told(true, &[""; 40]), told(false, &[""; 40])), (Ok(40), Ok(0)), "an engine without a tokenizer");
    }

    fn completion(more: &Value) -> Request {
        let mut body = json!({"model": "m", "prompt": [1, 2], "stream": true, "max_tokens": 99, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request(Kind::Completion, body)
    }

    fn piece(text: &str, tokens: &[u32]) -> String {
        json!({"choices": [{"index": 0, "text": text, "token_ids": tokens, "prompt_token_ids": [1, 2]}]}).to_string()
    }

    /// What a client gets of an answer: the first pieces of one worker, and all that another one sends.
    fn client_gets(answer: &mut Answer, request: &Request, pieces: &[String]) -> Result<(String, Vec<u64>), Verdict> {
        let (mut text, mut ids) = (String::new(), Vec::new());
        for piece in pieces {
            let piece: Value = match answer.take(piece, request, !request.wants_token_ids) {
                Verdict::AsItCame => serde_json::from_str(piece).unwrap(),
                Verdict::As(data) => serde_json::from_slice(&data).unwrap(),
                Verdict::Dropped => continue,
                other => return Err(other),
            };
            let choice = &piece["choices"][0];
            text.push_str(choice["text"].as_str().unwrap());
            ids.extend(choice["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
        }
        Ok((text, ids))
    }

    /// An answer broke off behind a piece of several tokens, of which the last may be part of a character: without a tokenizer nobody knows. The
    /// router gave up. What is not known to be whole is now computed again, from the last token that brought its text alone, and
    /// is not sent twice.
    #[test]
    fn what_may_end_within_a_character_is_computed_again_and_told_once() {
        let request = completion(&json!({}));
        let mut answer = Answer::default();
        // Tokens 6 and 7 are two of the three of one character.
        let before = [piece("a", &[3]), piece("bc", &[4, 5, 6]), piece("", &[7])];
        let (mut text, _) = client_gets(&mut answer, &request, &before).unwrap();
        let rest = answer.rest(&request, None, None).unwrap();
        assert_eq!(rest.prompt, [1, 2, 3], "behind the last character that is known to be whole");
        let body: Value = serde_json::from_slice(&rest.body).unwrap();
        assert_eq!(body["max_tokens"], 98);
        answer.goes_on(&rest);
        // Another worker cuts its pieces otherwise. It breaks off, too.
        text += &client_gets(&mut answer, &request, &[piece("b", &[4])]).unwrap().0;
        let rest = answer.rest(&request, None, None).unwrap();
        assert_eq!((&rest.prompt[..], rest.again.text.as_str()), (&[1, 2, 3, 4][..], "c"));
        answer.goes_on(&rest);
        let end = r#"{"choices":[{"index":0,"text":"d","token_ids":[9],"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":3}}}"#;
        text += &client_gets(&mut answer, &request, &[piece("c\u{4f60}", &[5, 6, 7, 8])]).unwrap().0;
        let seen = seen(answer.take(end, &request, true));
        assert_eq!((text.as_str(), &seen["choices"][0]["text"]), ("abc\u{4f60}", &json!("d")));
        assert_eq!(answer.generated, [3, 4, 5, 6, 7, 8, 9], "each token once");
        let usage = json!({"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2}});
        assert_eq!(seen["usage"], usage);
    }

    /// With chance, the second worker may say something else.
    #[test]
    fn what_was_drawn_by_chance_is_not_computed_again() {
        let pieces = [piece("a", &[3]), piece("bc", &[4, 5])];
        for (more, may) in [
            (json!({"temperature": 0}), true),
            (json!({"temperature": 0.5}), false),
            (json!({"temperature": null}), false),
        ] {
            let (request, mut answer) = (completion(&more), Answer::default());
            client_gets(&mut answer, &request, &pieces).unwrap();
            assert_eq!(answer.rest(&request, None, None).is_ok(), may, "{more}");
        }
        // Where the second differs all the same, or ends too early, nothing of it is sent.
        let early = r#"{"choices":[{"index":0,"text":"b","token_ids":[4],"finish_reason":"stop"}]}"#;
        for other in [piece("x", &[4]), piece("bx", &[4, 5]), early.to_owned()] {
            let (request, mut answer) = (completion(&json!({})), Answer::default());
            client_gets(&mut answer, &request, &pieces).unwrap();
            let rest = answer.rest(&request, None, None).unwrap();
            answer.goes_on(&rest);
            assert_eq!(
                client_gets(&mut answer, &request, std::slice::from_ref(&other)),
                Err(Verdict::Differs),
                "{other}"
            );
            assert_eq!(answer.rest(&request, None, None), Ok(rest), "as if it had not come");
        }
        // An answer all of whose pieces have several tokens is not computed a second time.
        let (request, mut answer) = (completion(&json!({})), Answer::default());
        client_gets(&mut answer, &request, &vec![piece(&"x".repeat(1000), &[4, 5]); 17]).unwrap();
        assert_eq!(answer.rest(&request, None, None), Err("it may have broken off within a character"));
    }

    /// A client that asks for tokens has those whose text is held back. They are computed again, too, and are not sent twice.
    #[test]
    fn tokens_of_half_a_character_reach_the_client_once() {
        let request = completion(&json!({"return_token_ids": true}));
        let mut answer = Answer::default();
        let (mut text, mut ids) =
            client_gets(&mut answer, &request, &[piece("a", &[3]), piece("", &[4]), piece("", &[5])]).unwrap();
        let rest = answer.rest(&request, None, None).unwrap();
        assert_eq!(rest.prompt, [1, 2, 3], "not within the character");
        answer.goes_on(&rest);
        let more = [piece("", &[4]), piece("\u{4f60}", &[5, 6]), piece("!", &[7])];
        let (more_text, more_ids) = client_gets(&mut answer, &request, &more).unwrap();
        text += &more_text;
        ids.extend(more_ids);
        assert_eq!((text.as_str(), &ids[..]), ("a\u{4f60}!", &[3, 4, 5, 6, 7][..]));
        let mut answer = Answer::default();
        client_gets(&mut answer, &request, &[piece("a", &[3]), piece("", &[4])]).unwrap();
        let rest = answer.rest(&request, None, None).unwrap();
        answer.goes_on(&rest);
        assert_eq!(client_gets(&mut answer, &request, &[piece("", &[8])]), Err(Verdict::Differs));
    }

    #[test]
    fn errors_are_told_from_pieces_that_name_none() {
        let request = chat();
        let failed = |data: &str| matches!(Answer::default().take(data, &request, true), Verdict::Failed(_));
        let mistake = r#"{"error": {"message": "too long", "type": "BadRequestError", "code": 400}}"#;
        assert_eq!(Answer::default().take(mistake, &request, true), Verdict::Refused);
        assert!(failed(r#"{"error": {"message": "dead", "code": 500}}"#) && failed(r#"{"error": {"code": 429}}"#));
        assert!(failed(r#"{"error": {"message": "dead"}}"#) && failed(r#"{"error": "dead", "choices": []}"#));
        for odd in [
            r#"{"error": null, "choices": []}"#,
            r#"{"choices": [{"delta": {}, "error": {"code": 1}}]}"#,
            r#"{"choices": [{"delta": {}}], "error": {"code": 1}}"#,
            r#"{"choices": null}"#,
            "[1, 2]",
            "7",
            "not JSON",
            r#"{"choices": "none"}"#,
        ] {
            let mut answer = Answer::default();
            assert_eq!(answer.take(odd, &request, false), Verdict::AsItCame, "{odd}");
            assert!(answer.was_sent(), "{odd}");
        }
    }

    #[test]
    fn an_answer_is_whole_when_all_of_it_came() {
        let end = |at: u64| format!(r#"{{"choices":[{{"index":{at},"text":"x","finish_reason":"stop"}}]}}"#);
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":1}}"#;
        for (more, ends, whole) in [
            (json!({}), vec![end(0)], true),
            (json!({"n": 2}), vec![end(0)], false),
            (json!({"n": 2}), vec![end(0), end(0)], false),
            (json!({"n": 2}), vec![end(0), end(1)], true),
            (json!({"prompt": ["a", "b"]}), vec![end(1)], false),
            (json!({"prompt": [[1], [2]], "n": 2}), vec![end(1), end(0), end(2)], false),
            (json!({"prompt": [[1], [2]], "n": 2}), vec![end(1), end(0), end(2), end(3)], true),
            (json!({"stream_options": {"include_usage": true}}), vec![end(0)], false),
            (json!({"stream_options": {"include_usage": true}}), vec![end(0), usage.into()], true),
            (json!({"stream_options": {"include_usage": false}}), vec![end(0)], true),
            (json!({"n": 2.0}), vec![end(0)], false),
            (json!({"n": "2"}), vec![end(0), end(1)], true),
            (json!({"prompt_embeds": ["a", "b"]}), vec![end(0), end(1)], false),
        ] {
            let mut body = json!({"model": "m", "prompt": [1, 2]});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let (request, mut answer) = (what_is_needed(&request(Kind::Completion, body)), Answer::default());
            ends.iter().for_each(|data| assert_eq!(answer.take(data, &request, false), Verdict::AsItCame));
            assert_eq!(answer.is_whole(&request), whole, "{more}");
        }
    }

    #[test]
    fn only_what_is_known_to_be_told_by_tokens_is_gone_on_with() {
        let hindered = |more: Value| {
            let mut body = json!({"model": "m", "prompt": [1, 2], "stream": true});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            hindrance(&request(Kind::Completion, body))
        };
        for fine in [
            json!({}),
            json!({"n": 1, "best_of": 1, "logprobs": null, "tools": [], "presence_penalty": 0, "frequency_penalty": 0.0}),
            json!({"response_format": {"type": "text"}, "tool_choice": "none", "stop": [], "echo": false, "suffix": ""}),
            json!({"temperature": 0, "seed": 7, "top_p": 0.9, "top_k": 5, "logit_bias": {"1": -100}, "stop_token_ids": [5]}),
            json!({"user": "u", "metadata": {"a": 1}, "cache_salt": "s", "priority": 3, "anything_new": null}),
        ] {
            assert_eq!(hindered(fine.clone()), None, "{fine}");
        }
        for (field, value) in [
            ("max_tokens", json!(10.0)),
            ("max_tokens", json!("10")),
            ("max_completion_tokens", json!(true)),
            ("min_tokens", json!(-1)),
            ("n", json!(2)),
            ("best_of", json!(2)),
            ("logprobs", json!(0)),
            ("echo", json!(true)),
            ("suffix", json!("x")),
            ("stop", json!("x")),
            ("stop", json!(["x"])),
            ("tools", json!([{}])),
            ("tool_choice", json!("required")),
            ("response_format", json!({"type": "json_object"})),
            ("frequency_penalty", json!(0.5)),
            ("seed", json!(7)),
            ("prompt", json!(["a", "b"])),
            ("bad_words", json!(["x"])),
            ("regex", json!("[a-z]")),
            ("vllm_xargs", json!({"budget": 1})),
            ("anything_new", json!(0)),
            ("anything_new", json!("x")),
        ] {
            assert_eq!(hindered(json!({field: value})).as_deref(), Some(field), "{value}");
        }
        let picture = json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]});
        assert_eq!(hindrance(&request(Kind::Chat, picture)).as_deref(), Some("messages"));
        let parts = json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant"}]});
        assert_eq!(hindrance(&request(Kind::Chat, parts)), None);
    }
}
