//! An answer that is not a stream of events: kept until it is whole, where it is short, so that another worker can be asked if it breaks
//! off; passed on as it comes otherwise.

use std::convert::Infallible;
use std::pin::pin;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::response::Parts;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};

use super::answers::Finder;
use super::body::{Bodies, Held};
use super::call::Call;
use super::openai::ApiError;
use super::upstream::{Upstream, cause_of, copy_headers, is_of_type, name_worker};
use crate::caps;
use crate::place::Placed;

/// What came of reading an answer.
enum Read {
    Whole(Bytes),
    /// It is longer than the router keeps, or has memory for: what came of it.
    Long(Bytes),
    Broken(String),
    /// Nothing came for so long.
    Silent(Duration),
}

async fn read(bodies: &Bodies, body: &mut Incoming, silence: Duration) -> Read {
    let mut kept = BytesMut::new();
    let mut held: Option<Held> = None;
    loop {
        match tokio::time::timeout(silence, body.frame()).await {
            Err(_) => return Read::Silent(silence),
            Ok(None) => return Read::Whole(kept.freeze()),
            Ok(Some(Err(error))) => return Read::Broken(cause_of(&error)),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    kept.extend_from_slice(&data);
                }
                if kept.len() > caps::ANSWER_UNCOUNTED && held.is_none() {
                    held = bodies.hold(caps::ANSWER_KEPT_MAX);
                }
                if kept.len() > caps::ANSWER_KEPT_MAX || kept.len() > caps::ANSWER_UNCOUNTED && held.is_none() {
                    return Read::Long(kept.freeze());
                }
            }
        }
    }
}

/// Whether an answer is worth waiting for: others may be streams of a kind that is not known here.
fn is_kept(upstream: &Upstream) -> bool {
    is_of_type(upstream.headers(), "application/json")
        || upstream.body().size_hint().exact().is_some_and(|bytes| bytes <= caps::ANSWER_KEPT_MAX as u64)
}

/// Answers with what a worker says, or another, if its answer breaks off. `but`: engines that had the request.
pub(super) async fn answer(
    call: Call,
    mut placed: Placed,
    mut upstream: Upstream,
    mut but: Vec<usize>,
) -> Result<Response, ApiError> {
    let silence = call.app.router.options().silence;
    loop {
        if !is_kept(&upstream) {
            return Ok(as_it_comes(placed, upstream, Bytes::new(), silence));
        }
        let (parts, mut body) = upstream.into_parts();
        let read = {
            let mut reading = pin!(read(&call.app.bodies, &mut body, silence));
            // Its prompt is computed long before its answer is: by then, as far as can be told.
            tokio::select! {
                read = &mut reading => read,
                () = tokio::time::sleep(placed.terms.expected_time()) => {
                    placed.assume_prefilled();
                    reading.await
                }
            }
        };
        match read {
            Read::Whole(bytes) => return Ok(respond(&placed, &parts, Body::from(bytes))),
            Read::Long(bytes) => return Ok(as_it_comes(placed, Upstream::from_parts(parts, body), bytes, silence)),
            Read::Silent(silence) => return Err(ApiError::timed_out(silence)),
            Read::Broken(why) => {
                let worker = &placed.worker.spec.id;
                tracing::warn!(worker, why, "the worker's answer broke off, so the request goes to another worker");
                if but.len() >= caps::TRIES_MAX {
                    return Err(ApiError::unavailable(
                        "the answers of several workers broke off; try again in a moment",
                    ));
                }
                (placed, upstream) = call.send_somewhere(&mut but).await?;
            }
        }
    }
}

fn respond(placed: &Placed, parts: &Parts, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = parts.status;
    copy_headers(&parts.headers, response.headers_mut());
    name_worker(&placed.worker, response.headers_mut());
    response
}

struct Passing {
    placed: Placed,
    first: Bytes,
    body: Incoming,
    silence: Duration,
    told: bool,
    finder: Option<Finder>,
}

impl Passing {
    async fn next(&mut self) -> Option<Result<Bytes, std::io::Error>> {
        if !self.first.is_empty() {
            return Some(Ok(std::mem::take(&mut self.first)));
        }
        loop {
            let frame = match tokio::time::timeout(self.silence, self.body.frame()).await {
                Err(_) => return Some(Err(std::io::Error::other("the worker sent nothing for too long"))),
                Ok(None) => return None,
                Ok(Some(Err(error))) => return Some(Err(std::io::Error::other(cause_of(&error)))),
                Ok(Some(Ok(frame))) => frame,
            };
            if let Ok(data) = frame.into_data() {
                if !std::mem::replace(&mut self.told, true) {
                    self.placed.assume_prefilled();
                }
                self.placed.heard(Instant::now());
                if let Some(finder) = &mut self.finder {
                    finder.see(&data);
                }
                return Some(Ok(data));
            }
        }
    }
}

/// Passes an answer on as it comes. Where it breaks off, so does the connection to the client: it shows that it has not all of it.
pub(super) fn as_it_comes(placed: Placed, upstream: Upstream, first: Bytes, silence: Duration) -> Response {
    passed(placed, upstream, first, silence, None)
}

/// The same; `finder` looks for the id of an answer that the worker keeps.
pub(super) fn passed(
    placed: Placed,
    upstream: Upstream,
    first: Bytes,
    silence: Duration,
    finder: Option<Finder>,
) -> Response {
    let (parts, body) = upstream.into_parts();
    // Nothing more comes, as of answers to HEAD: their length is that of what they leave out.
    if first.is_empty() && body.is_end_stream() {
        return respond(&placed, &parts, Body::empty());
    }
    let mut response = respond(&placed, &parts, Body::empty());
    let passing = Passing { placed, first, body, silence, told: false, finder };
    let frames = futures::stream::unfold(Some(passing), |passing| async move {
        let mut passing = passing?;
        match passing.next().await? {
            Ok(data) => Some((Ok(data), Some(passing))),
            Err(error) => {
                tracing::warn!(worker = passing.placed.worker.spec.id, %error, "the worker's answer broke off");
                Some((Err(error), None))
            }
        }
    });
    *response.body_mut() = Body::from_stream(frames.boxed());
    response
}

/// A stream that cannot fail, as a body.
pub(super) fn body_of(pieces: impl futures::Stream<Item = Bytes> + Send + 'static) -> Body {
    Body::from_stream(pieces.map(Ok::<Bytes, Infallible>))
}
