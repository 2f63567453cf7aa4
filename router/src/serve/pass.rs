//! Every other route of an engine's server: passed to a sound worker of the request's model, by load, and its answer back, both as they
//! came.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, header};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::answers::{self, Finder};
use super::app::App;
use super::body::Held;
use super::json::Object;
use super::openai::ApiError;
use super::upstream::{Failure, Outgoing, is_of_type};
use super::whole::passed;
use crate::caps;
use crate::place::Asked;

/// Answers a request of which the router knows nothing but where it may go.
pub(super) async fn pass(State(app): State<Arc<App>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    app.counts.requests.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    answer(&app, parts, body).await.unwrap_or_else(IntoResponse::into_response)
}

/// Passes a request on by load alone, whatever its body is.
pub(super) async fn unread(
    app: &App,
    path: &str,
    headers: &HeaderMap,
    body: (Bytes, Held),
    model: String,
) -> Result<Response, ApiError> {
    let asked =
        Asked { tokens: (body.0.len() as u64 / 4).max(1), role: app.answering_role(&model), model, ..Asked::default() };
    send(app, &asked, Outgoing { method: &http::Method::POST, path, headers, body: &body.0, reads: false, rank: None })
        .await
}

async fn answer(app: &App, parts: Parts, body: Body) -> Result<Response, ApiError> {
    // Others are offers that may be passed over.
    let upgrade = parts.headers.get(header::UPGRADE).map_or(&b""[..], |value| value.as_bytes());
    if upgrade.eq_ignore_ascii_case(b"websocket") {
        return Err(ApiError::no_upgrade());
    }
    let (body, _held): (Bytes, Held) = app.bodies.read(&parts.headers, body).await?;
    let object = Object::read(body.clone()).ok();
    let (named, session) = what_it_names(&parts.headers, &body, object.as_ref());
    // Where several models are served and none is named, anybody may know.
    let model = match named {
        Some(named) => app.model_of(&named).await?,
        None => String::new(),
    };
    let role = app.answering_role(&model);
    let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let after = answers::gone_on_with(path, object.as_ref(), app.seed, |name| app.router.is_kept(name));
    let messages = object.map(|object| app.beginnings(&object, &model)).unwrap_or_default();
    let tokens = messages.last().map_or(body.len() as u64, |whole| whole.bytes) / 4;
    let asked = Asked { model, tokens: tokens.max(1), messages, session, after, role, ..Asked::default() };
    let reads = answers::makes_one(path, &parts.method);
    let outgoing = Outgoing { method: &parts.method, path, headers: &parts.headers, body: &body, reads, rank: None };
    send(app, &asked, outgoing).await
}

async fn send(app: &App, asked: &Asked, outgoing: Outgoing<'_>) -> Result<Response, ApiError> {
    let silence = app.router.options().silence;
    let mut but = Vec::new();
    loop {
        let placed = app.router.place(asked, &but).await?;
        but.push(placed.worker.number);
        match app.workers.ask(&placed.worker, outgoing, silence).await {
            Ok(upstream) => {
                let finder = answers::makes_one(outgoing.path, outgoing.method)
                    .then(|| Finder::new(&app.router, &placed.worker, app.seed));
                return Ok(passed(placed, upstream, Bytes::new(), silence, finder));
            }
            Err(Failure::TimedOut(within)) => return Err(ApiError::timed_out(within)),
            Err(Failure::Request(why)) => return Err(ApiError::invalid(None, why)),
            Err(Failure::Worker(..)) if but.len() < caps::TRIES_MAX => {}
            Err(Failure::Worker(..)) => {
                return Err(ApiError::unavailable("no worker could be reached; try again in a moment"));
            }
        }
    }
}

/// The model and the session that a body names, as JSON or as a form.
fn what_it_names(headers: &HeaderMap, body: &Bytes, object: Option<&Object>) -> (Option<String>, Option<u64>) {
    let session = headers.get("x-session-id").and_then(|value| value.to_str().ok()).map(str::to_owned);
    if is_of_type(headers, "multipart/form-data") {
        return (field_of_form(body, "model"), session.map(|session| xxh3_64(session.as_bytes())));
    }
    let Some(object) = object else {
        return (None, session.map(|session| xxh3_64(session.as_bytes())));
    };
    let text = |name: &str| match object.value(name) {
        Value::String(text) if !text.is_empty() => Some(text),
        _ => None,
    };
    let session = session.or_else(|| text("prompt_cache_key")).or_else(|| text("user"));
    (text("model"), session.map(|session| xxh3_64(session.as_bytes())))
}

/// A short text field of a multipart form.
fn field_of_form(body: &[u8], name: &str) -> Option<String> {
    let quoted = format!("name=\"{name}\"");
    let find = |from: usize, what: &[u8]| {
        body.get(from..)?.windows(what.len()).position(|window| window == what).map(|at| from + at)
    };
    let at = find(0, quoted.as_bytes())?;
    let start = find(at, b"\r\n\r\n")? + 4;
    let end = find(start, b"\r\n")?;
    let value = std::str::from_utf8(body.get(start..end)?).ok()?;
    (!value.is_empty() && value.len() <= 1024).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_and_objects_name_their_model() {
        let named = |kind: &str, body: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
            let body = Bytes::copy_from_slice(body.as_bytes());
            what_it_names(&headers, &body, Object::read(body.clone()).ok().as_ref())
        };
        let form = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF\0\r\n--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--b--\r\n";
        assert_eq!(named("multipart/form-data; boundary=b", form), (Some("whisper".into()), None));
        assert_eq!(named("multipart/form-data; boundary=b", "--b--\r\n"), (None, None));
        let (model, session) = named("application/json", "{\"input\": \"x\", \"model\": \"m\", \"user\": \"u\"}");
        assert_eq!((model.as_deref(), session), (Some("m"), Some(xxh3_64(b"u"))));
        for other in ["", "[1]", "{\"model\": 7}", "{\"model\": \"\"}", "audio"] {
            assert_eq!(named("application/json", other), (None, None), "{other}");
        }
    }
}
