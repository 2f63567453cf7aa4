//! Requests as OpenAI's API has them: what of them routing needs, and errors in its shape.

use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use crate::cost::Overload;
use crate::place::Refused;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

impl Kind {
    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completion => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// An error, as clients of OpenAI's API expect it.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<&'static str>,
    code: Option<&'static str>,
    retry_after: Option<u64>,
}

impl ApiError {
    /// The request is wrong.
    pub fn invalid(param: Option<&'static str>, message: impl Into<String>) -> Self {
        let kind = "invalid_request_error";
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), kind, param, code: None, retry_after: None }
    }

    /// There is no such path.
    pub fn unknown_path(path: &str) -> Self {
        let message =
            format!("the router does not serve {path}; it serves /v1/chat/completions, /v1/completions and /v1/models");
        Self { status: StatusCode::NOT_FOUND, ..Self::invalid(None, message) }
    }

    /// The workers' answers cannot be had.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let (kind, retry_after) = ("server_error", Some(1));
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self { status, message: message.into(), kind, param: None, code: Some("unavailable"), retry_after }
    }

    /// What it says.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// As it goes into a stream that has begun.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::UnknownModel { .. } => Self {
                status: StatusCode::NOT_FOUND,
                code: Some("model_not_found"),
                ..Self::invalid(Some("model"), message)
            },
            Refused::AllAway(_) => Self::unavailable(message),
            Refused::Overload(Overload { retry_seconds }) => Self {
                code: Some("overloaded"),
                retry_after: Some(retry_seconds.ceil().clamp(1.0, 600.0) as u64),
                ..Self::unavailable(message)
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// A request that was read.
#[derive(Debug)]
pub struct Request {
    /// Which kind.
    pub kind: Kind,
    /// All of it.
    pub body: Value,
    /// The model.
    pub model: String,
    /// The answer comes in pieces.
    pub stream: bool,
    /// The client asked for token ids.
    pub wants_token_ids: bool,
    /// The adapter's name, where the model's is one: engines serve adapters under names of their own.
    pub salt: Option<String>,
    /// Names the session.
    pub session: Option<u64>,
}

/// The prompt, as far as it is known without a tokenizer.
#[derive(Debug, PartialEq, Eq)]
pub enum Prompt<'a> {
    /// Token ids.
    Tokens(Vec<u32>),
    /// A text, to be tokenized with what the model expects around it.
    Text(&'a str),
    /// A conversation.
    Chat,
    /// More than one, or something else: routed by load alone.
    Other,
}

impl Request {
    /// Reads a request's body.
    pub fn read(kind: Kind, headers: &HeaderMap, bytes: &[u8]) -> Result<Self, ApiError> {
        let body: Value = serde_json::from_slice(bytes)
            .map_err(|error| ApiError::invalid(None, format!("the body is not JSON: {error}")))?;
        if !body.is_object() {
            return Err(ApiError::invalid(None, "the body is not a JSON object"));
        }
        let model = match body.get("model") {
            Some(Value::String(model)) if !model.is_empty() => model.clone(),
            None => return Err(ApiError::invalid(Some("model"), "model is missing; name one that /v1/models lists")),
            Some(_) => {
                return Err(ApiError::invalid(Some("model"), "model is not a string; name one that /v1/models lists"));
            }
        };
        let stream = match body.get("stream") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(stream)) => *stream,
            Some(_) => return Err(ApiError::invalid(Some("stream"), "stream must be true or false")),
        };
        let text = |field: &str| body.get(field).and_then(Value::as_str).map(str::to_owned);
        let salt = text("cache_salt");
        let session = headers.get("x-session-id").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let session = session.or_else(|| text("prompt_cache_key")).or_else(|| text("user"));
        let session = session.map(|session| xxh3_64(session.as_bytes()));
        let wants_token_ids = body.get("return_token_ids").and_then(Value::as_bool).unwrap_or(false);
        let request = Self { kind, body, model, stream, wants_token_ids, salt, session };
        request.check_prompt()?;
        Ok(request)
    }

    fn check_prompt(&self) -> Result<(), ApiError> {
        match self.kind {
            Kind::Chat => match self.body.get("messages") {
                Some(Value::Array(messages)) if !messages.is_empty() => {
                    let wrong = messages.iter().position(|message| !message.get("role").is_some_and(Value::is_string));
                    match wrong {
                        Some(at) => Err(ApiError::invalid(
                            Some("messages"),
                            format!("messages[{at}] has no role; add a string such as \"user\""),
                        )),
                        None => Ok(()),
                    }
                }
                _ => Err(ApiError::invalid(
                    Some("messages"),
                    "messages is missing or empty; it must be a list of messages",
                )),
            },
            Kind::Completion => match self.body.get("prompt") {
                Some(Value::String(_)) => Ok(()),
                Some(Value::Array(prompt)) if !prompt.is_empty() => Ok(()),
                None if self.body.get("prompt_embeds").is_some() => Ok(()),
                _ => {
                    let message =
                        "prompt is missing or empty; it must be a string, a list of token ids, or a list of those";
                    Err(ApiError::invalid(Some("prompt"), message))
                }
            },
        }
    }

    /// Its prompt.
    pub fn prompt(&self) -> Prompt<'_> {
        if self.kind == Kind::Chat {
            return Prompt::Chat;
        }
        let Some(prompt) = self.body.get("prompt") else { return Prompt::Other };
        match prompt {
            Value::String(text) => Prompt::Text(text),
            Value::Array(prompts) => match prompts.as_slice() {
                [Value::String(text)] => Prompt::Text(text),
                [Value::Array(tokens)] => token_ids(tokens).map_or(Prompt::Other, Prompt::Tokens),
                tokens => token_ids(tokens).map_or(Prompt::Other, Prompt::Tokens),
            },
            _ => Prompt::Other,
        }
    }

    /// A guess at the prompt's tokens, where nothing says how many there are: four bytes each, as English has them.
    pub fn guessed_tokens(&self) -> u64 {
        let prompt = self.body.get("prompt").or_else(|| self.body.get("messages"));
        (prompt.map_or(0, bytes_of_texts) / 4).max(1)
    }

    fn field(&self, name: &str) -> &Value {
        self.body.get(name).unwrap_or(&Value::Null)
    }

    /// Whether a broken answer can be gone on with elsewhere: one choice, of which all that matters is its tokens.
    pub fn is_resumable(&self) -> bool {
        let one = |name: &str| self.field(name).as_u64().is_none_or(|count| count == 1);
        let absent = |name: &&str| match self.field(name) {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::Object(format) => format.get("type").is_some_and(|kind| kind == "text"),
            _ => false,
        };
        const STATEFUL: [&str; 16] = [
            "logprobs",
            "top_logprobs",
            "prompt_logprobs",
            "echo",
            "suffix",
            "use_beam_search",
            "tools",
            "functions",
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "presence_penalty",
            "frequency_penalty",
        ];
        let one_prompt = self.kind == Kind::Chat || !matches!(self.prompt(), Prompt::Other);
        one("n") && one("best_of") && one_prompt && STATEFUL.iter().all(absent)
    }

    /// Tokens that it asks for at most, where it says so.
    pub fn max_tokens(&self) -> Option<u64> {
        let of = |name: &str| self.field(name).as_u64();
        match self.kind {
            Kind::Chat => of("max_completion_tokens").or_else(|| of("max_tokens")),
            // What OpenAI and engines take for granted.
            Kind::Completion => Some(of("max_tokens").unwrap_or(16)),
        }
    }
}

fn token_ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|token| token.as_u64().and_then(|token| u32::try_from(token).ok())).collect()
}

fn bytes_of_texts(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(list) => list.iter().map(bytes_of_texts).sum(),
        Value::Object(fields) => fields.values().map(bytes_of_texts).sum(),
        // A token.
        Value::Number(_) => 4,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: Kind, body: &Value) -> Result<Request, ApiError> {
        Request::read(kind, &HeaderMap::new(), body.to_string().as_bytes())
    }

    #[test]
    fn wrong_requests_are_named_in_openais_shape() {
        for (kind, body, param, says) in [
            (Kind::Chat, json!([]), None, "not a JSON object"),
            (Kind::Chat, json!({"messages": []}), Some("model"), "model is missing"),
            (Kind::Chat, json!({"model": 7, "messages": []}), Some("model"), "not a string"),
            (Kind::Chat, json!({"model": "m"}), Some("messages"), "messages is missing"),
            (
                Kind::Chat,
                json!({"model": "m", "messages": [{"content": "x"}]}),
                Some("messages"),
                "messages[0] has no role",
            ),
            (
                Kind::Chat,
                json!({"model": "m", "stream": "yes", "messages": [{"role": "user"}]}),
                Some("stream"),
                "true or false",
            ),
            (Kind::Completion, json!({"model": "m", "prompt": []}), Some("prompt"), "prompt is missing"),
            (Kind::Completion, json!({"model": "m", "prompt": 5}), Some("prompt"), "prompt is missing"),
        ] {
            let error = read(kind, &body).unwrap_err();
            let shape = error.body();
            assert!(shape["error"]["message"].as_str().unwrap().contains(says), "{shape}");
            assert_eq!(shape["error"]["type"], "invalid_request_error");
            assert_eq!(shape["error"]["param"].as_str(), param);
            assert_eq!(error.into_response().status(), StatusCode::BAD_REQUEST);
        }
        assert!(
            Request::read(Kind::Chat, &HeaderMap::new(), b"{").unwrap_err().body()["error"]["message"]
                .as_str()
                .unwrap()
                .contains("not JSON")
        );
        let overload = ApiError::from(Refused::Overload(Overload { retry_seconds: 2.4 })).into_response();
        assert_eq!(
            (overload.status(), &overload.headers()[header::RETRY_AFTER]),
            (StatusCode::SERVICE_UNAVAILABLE, &HeaderValue::from(3))
        );
        let unknown = Refused::UnknownModel { model: "x".into(), known: "m".into() };
        assert_eq!(ApiError::from(unknown).into_response().status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn prompts_come_in_many_forms() {
        let prompt = |prompt: Value| {
            let request = read(Kind::Completion, &json!({"model": "m", "prompt": prompt})).unwrap();
            format!("{:?}", request.prompt())
        };
        assert_eq!(prompt(json!("a")), "Text(\"a\")");
        assert_eq!(prompt(json!(["a"])), "Text(\"a\")");
        assert_eq!(prompt(json!([1, 2])), "Tokens([1, 2])");
        assert_eq!(prompt(json!([[1, 2]])), "Tokens([1, 2])");
        for other in [json!(["a", "b"]), json!([[1], [2]]), json!([1, -2]), json!([4_294_967_296u64])] {
            assert_eq!(prompt(other), "Other");
        }
        let chat = read(
            Kind::Chat,
            &json!({"model": "m", "user": "u", "messages": [{"role": "user", "content": "12345678"}]}),
        );
        let chat = chat.unwrap();
        assert_eq!((chat.prompt(), chat.guessed_tokens(), chat.session), (Prompt::Chat, 3, Some(xxh3_64(b"u"))));
    }

    #[test]
    fn what_has_more_state_than_its_tokens_is_not_resumed() {
        let resumable = |more: Value| {
            let mut body = json!({"model": "m", "prompt": [1, 2]});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            read(Kind::Completion, &body).unwrap().is_resumable()
        };
        assert!(resumable(json!({})));
        assert!(resumable(
            json!({"n": 1, "logprobs": null, "tools": [], "presence_penalty": 0, "response_format": {"type": "text"}})
        ));
        for stateful in [
            json!({"n": 2}),
            json!({"logprobs": 5}),
            json!({"echo": true}),
            json!({"tools": [{}]}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"frequency_penalty": 0.5}),
            json!({"prompt": ["a", "b"]}),
        ] {
            assert!(!resumable(stateful.clone()), "{stateful}");
        }
    }
}
