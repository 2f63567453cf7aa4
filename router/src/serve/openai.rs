//! Requests as OpenAI's API has them: what of them routing needs, and errors in its shape.

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::json::Object;
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

    /// The request names no model, and several are served.
    pub fn no_model(known: &str) -> Self {
        Self::invalid(Some("model"), format!("model is missing; name one of those that the router serves: {known}"))
    }

    /// There is no such model.
    pub fn no_such_model(id: &str) -> Self {
        let message = format!("the model {id:?} is not served here; /v1/models lists those that are");
        Self { status: StatusCode::NOT_FOUND, code: Some("model_not_found"), ..Self::invalid(Some("model"), message) }
    }

    /// The router passes no WebSockets.
    pub fn no_upgrade() -> Self {
        let message = "the router does not pass WebSockets; connect to a worker itself";
        Self { status: StatusCode::NOT_IMPLEMENTED, code: Some("not_implemented"), ..Self::invalid(None, message) }
    }

    /// The body is longer than the router takes.
    pub fn too_large(max: u64) -> Self {
        let message = format!(
            "the request's body has more than {} bytes, which is the router's limit (request_bytes in its configuration)",
            max
        );
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, code: Some("request_too_large"), ..Self::invalid(None, message) }
    }

    /// The body did not come.
    pub fn slow_body(within: std::time::Duration) -> Self {
        let message = format!("nothing came of the request's body for {} s", within.as_secs());
        Self { status: StatusCode::REQUEST_TIMEOUT, code: Some("timeout"), ..Self::invalid(None, message) }
    }

    /// The router holds as many bytes of requests as it may.
    pub fn busy() -> Self {
        Self {
            code: Some("overloaded"),
            ..Self::unavailable("the router holds as many requests as it has memory for; try again in a moment")
        }
    }

    /// The router's own time is over.
    pub fn timed_out(within: std::time::Duration) -> Self {
        let message = format!(
            "the worker sent nothing for {} s, which is the router's limit (place.silence_seconds)",
            within.as_secs()
        );
        let status = StatusCode::GATEWAY_TIMEOUT;
        Self { status, retry_after: None, code: Some("timeout"), ..Self::unavailable(message) }
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

/// A request that was read as far as routing needs it.
#[derive(Debug)]
pub struct Request {
    /// Which kind.
    pub kind: Kind,
    /// All of it, as it came.
    pub body: Object,
    /// The model; empty where it names none.
    pub model: String,
    /// The client asked for token ids.
    pub wants_token_ids: bool,
    /// A tenant's salt: other blocks of the same tokens.
    pub salt: Option<String>,
    /// Names the session.
    pub session: Option<u64>,
    /// Choices that its answer has.
    pub choices: u64,
}

/// The prompt, as far as it is known without a tokenizer.
#[derive(Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids.
    Tokens(Vec<u32>),
    /// A text, to be tokenized with what the model expects around it.
    Text(String),
    /// A conversation.
    Chat,
    /// More than one, or something else: routed by load alone.
    Other,
}

impl Request {
    /// Reads a request's body. What it does not need it leaves to the worker, which says what is wrong with it.
    pub fn read(kind: Kind, headers: &HeaderMap, body: Bytes) -> Result<Self, ApiError> {
        let body = Object::read(body)
            .map_err(|error| ApiError::invalid(None, format!("the request's body is not a JSON object: {error}")))?;
        let model = match body.value("model") {
            Value::String(model) => model,
            Value::Null => String::new(),
            _ => return Err(ApiError::invalid(Some("model"), "model is not a string; name one that /v1/models lists")),
        };
        let text = |field: &str| body.value(field).as_str().map(str::to_owned);
        let salt = text("cache_salt");
        let session = headers.get("x-session-id").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let session = session.or_else(|| text("prompt_cache_key")).or_else(|| text("user"));
        let session = session.map(|session| xxh3_64(session.as_bytes()));
        let wants_token_ids = body.value("return_token_ids").as_bool().unwrap_or(false);
        let choices = choices(kind, &body);
        Ok(Self { kind, body, model, wants_token_ids, salt, session, choices })
    }

    /// The answer is to come in pieces.
    pub fn streams(&self) -> bool {
        self.body.value("stream") == true
    }

    /// Its prompt.
    pub fn prompt(&self) -> Prompt {
        if self.kind == Kind::Chat {
            return Prompt::Chat;
        }
        match self.body.value("prompt") {
            Value::String(text) => Prompt::Text(text),
            Value::Array(prompts) => match prompts.as_slice() {
                [Value::String(text)] => Prompt::Text(text.clone()),
                [Value::Array(tokens)] => token_ids(tokens).map_or(Prompt::Other, Prompt::Tokens),
                tokens => token_ids(tokens).map_or(Prompt::Other, Prompt::Tokens),
            },
            _ => Prompt::Other,
        }
    }

    /// A guess at the prompt's tokens, where nothing says how many there are: four bytes each, as English has them.
    pub fn guessed_tokens(&self) -> u64 {
        let prompt = match self.body.value("prompt") {
            Value::Null => self.body.value("messages"),
            prompt => prompt,
        };
        (bytes_of_texts(&prompt) / 4).max(1)
    }

    /// The request without its prompt, and whatever else is of no use once its answer has begun: prompts are long, and answers slow.
    pub fn without_prompt(&self, needed: &[&str]) -> Self {
        let is_needed = |name: &str| needed.contains(&name);
        let (model, salt) = (self.model.clone(), self.salt.clone());
        Self { body: self.body.only(is_needed), model, salt, ..*self }
    }

    /// Tokens that it asks for at most, where it says so.
    pub fn max_tokens(&self) -> Option<u64> {
        let of = |name: &str| self.body.value(name).as_u64();
        match self.kind {
            Kind::Chat => of("max_completion_tokens").or_else(|| of("max_tokens")),
            // What OpenAI and engines take for granted.
            Kind::Completion => Some(of("max_tokens").unwrap_or(16)),
        }
    }
}

fn choices(kind: Kind, body: &Object) -> u64 {
    // As engines read it: 2.0 and "2" are two.
    let each = match body.value("n") {
        Value::Number(number) => number.as_f64().unwrap_or(1.0) as u64,
        Value::String(text) => text.trim().parse().unwrap_or(u64::MAX),
        _ => 1,
    };
    // Each may be a prompt, or several: only the engine knows.
    if !body.value("prompt_embeds").is_null() {
        return u64::MAX;
    }
    let prompts = match body.value("prompt") {
        Value::Array(prompts) if kind == Kind::Completion => match prompts.first() {
            Some(Value::String(_) | Value::Array(_)) => prompts.len() as u64,
            _ => 1,
        },
        _ => 1,
    };
    each.max(1).saturating_mul(prompts)
}

fn token_ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|token| token.as_u64().and_then(|token| u32::try_from(token).ok())).collect()
}

fn bytes_of_texts(value: &Value) -> u64 {
    match value {
        // A picture inside of the request: engines make some hundred tokens of it, whatever its size.
        Value::String(text) if text.starts_with("data:") => text.len().min(2048) as u64,
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
        Request::read(kind, &HeaderMap::new(), body.to_string().into())
    }

    #[test]
    fn wrong_requests_are_named_in_openais_shape() {
        for (body, param, says) in [
            ("[]", None, "not a JSON object"),
            ("{", None, "not a JSON object"),
            ("{\"model\": 7}", Some("model"), "not a string"),
        ] {
            let error = Request::read(Kind::Chat, &HeaderMap::new(), Bytes::from(body)).unwrap_err();
            let shape = error.body();
            assert!(shape["error"]["message"].as_str().unwrap().contains(says), "{shape}");
            assert_eq!(shape["error"]["type"], "invalid_request_error");
            assert_eq!(shape["error"]["param"].as_str(), param);
            assert_eq!(error.into_response().status(), StatusCode::BAD_REQUEST);
        }
        let overload = ApiError::from(Refused::Overload(Overload { retry_seconds: 2.4 })).into_response();
        assert_eq!(
            (overload.status(), &overload.headers()[header::RETRY_AFTER]),
            (StatusCode::SERVICE_UNAVAILABLE, &HeaderValue::from(3))
        );
        let unknown = Refused::UnknownModel { model: "x".into(), known: "m".into() };
        assert_eq!(ApiError::from(unknown).into_response().status(), StatusCode::NOT_FOUND);
        for (error, status) in [
            (ApiError::too_large(5), 413),
            (ApiError::timed_out(std::time::Duration::from_secs(1)), 504),
            (ApiError::busy(), 503),
        ] {
            assert_eq!(error.into_response().status().as_u16(), status);
        }
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
}
