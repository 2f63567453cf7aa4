//! The proxy: a request goes to the worker that is expected to answer first, and its answer back, both as they came. Until the first byte
//! another worker may be tried; after it, an answer that breaks off is gone on with elsewhere where that is exact.

use std::sync::Arc;

use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;

use super::app::App;
use super::body::Held;
use super::call::Call;
use super::openai::{ApiError, Kind, Request};
use super::relay::{Relay, is_stream};
use super::{pass, resume, whole};

/// Answers a request for a text. `path`: with its query.
pub(super) async fn answer(
    app: Arc<App>,
    kind: Kind,
    path: String,
    headers: HeaderMap,
    (bytes, held): (Bytes, Held),
) -> Result<Response, ApiError> {
    let request = match Request::read(kind, &headers, bytes.clone()) {
        Ok(request) => Arc::new(request),
        // What cannot be read here an engine may: Python writes NaN, and reads it. Where only one model can be meant, it says what is wrong.
        Err(error) => {
            let model = app.model_of("").await.map_err(|_| error)?;
            return pass::unread(&app, &path, &headers, (bytes, held), model).await;
        }
    };
    drop(bytes);
    let model = app.model_of(&request.model).await?;
    let mut asked = app.asked(&request, model).await;
    app.encode_first(&request, &asked.model, &headers).await;
    asked.role = app.answering_role(&asked.model);
    let mut set: Vec<(&str, String)> = Vec::new();
    if let Some(parameters) = app.prefill_first(&request, &asked, &headers).await {
        set.push(("kv_transfer_params", parameters.to_string()));
    }
    // Nobody else could go on with it: then nothing is asked for that the client did not.
    let hindrance = match (app.options.resume, request.streams() && app.engines(&asked) > 1) {
        (false, _) => Some("resume is off".into()),
        (true, false) => Some("there is no other".into()),
        (true, true) => resume::hindrance(&request)
            .map(|field| format!("the tokens of its answer do not carry the request's field {field:?}")),
    };
    let resumes = hindrance.is_none();
    let hides = resumes && !request.wants_token_ids;
    if hides {
        set.push(("return_token_ids", "true".into()));
    }
    let set: Vec<(&str, &str)> = set.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let body = request.body.with(&set);
    let call = Call { app, request, asked, headers, path, body, hindrance, hides, held };
    let mut but = Vec::new();
    let (placed, upstream) = call.send_somewhere(&mut but).await?;
    match is_stream(&upstream) {
        true => Ok(Relay::begin(call, placed, upstream, but)),
        false => whole::answer(call, placed, upstream, but).await,
    }
}
