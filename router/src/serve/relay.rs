//! An answer that comes in pieces, from its worker to its client, byte by byte as it came. One that breaks off is gone on with at another
//! worker where that is exact ([`super::resume`]); otherwise it ends with an error that the client sees.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header;
use hyper::body::{Body as _, Incoming};
use tokio::time::Sleep;

use super::body::Held;
use super::call::Call;
use super::openai::{ApiError, Kind};
use super::resume::{Answer, Verdict};
use super::sse::{self, Event, Events};
use super::upstream::{Upstream, cause_of, copy_headers, is_of_type, judge, name_worker};
use super::whole::body_of;
use crate::caps;
use crate::fleet::Evidence;
use crate::place::Placed;

/// An answer that comes in pieces.
pub(super) struct Relay {
    call: Call,
    placed: Placed,
    body: Incoming,
    events: Events,
    out: VecDeque<Bytes>,
    answer: Answer,
    /// Engines that had it.
    but: Vec<usize>,
    /// What the worker said of its failure, as it came.
    failure: Option<Bytes>,
    /// The memory that a long event takes until it is whole, and how many bytes of it may be there.
    held: (Held, usize),
    silence: Duration,
    heard: Instant,
    timer: Pin<Box<Sleep>>,
    state: State,
}

/// Why no more comes.
enum Break {
    /// The connection ended.
    Worker(String),
    /// The router's own time is over; the worker may be sound.
    Silent(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// More is to come.
    Open,
    /// More is to come that is not read here, but passed on.
    Unread,
    /// The worker said that this was all, or that it failed: what follows is passed on, if anything does.
    Closing,
    Over,
}

/// Whether an answer is a stream of events that can be read here.
pub(super) fn is_stream(upstream: &Upstream) -> bool {
    let encoding = upstream.headers().get(header::CONTENT_ENCODING).map_or(&b""[..], |value| value.as_bytes());
    let plain = encoding.is_empty() || encoding.eq_ignore_ascii_case(b"identity");
    upstream.status().is_success() && plain && is_of_type(upstream.headers(), "text/event-stream")
}

impl Relay {
    /// Begins to relay what a worker streams.
    /// `but`: engines that had the request.
    pub(super) fn begin(call: Call, placed: Placed, upstream: Upstream, but: Vec<usize>) -> Response {
        let (parts, body) = upstream.into_parts();
        let mut response = Response::new(Body::empty());
        *response.status_mut() = parts.status;
        copy_headers(&parts.headers, response.headers_mut());
        // It may end otherwise than the worker thinks.
        response.headers_mut().remove(header::CONTENT_LENGTH);
        name_worker(&placed.worker, response.headers_mut());
        let silence = call.app.router.options().silence;
        let relay = Self {
            but,
            silence,
            timer: Box::pin(tokio::time::sleep(silence)),
            call,
            placed,
            body,
            events: Events::default(),
            out: VecDeque::new(),
            answer: Answer::default(),
            failure: None,
            held: (Held::default(), caps::ANSWER_UNCOUNTED),
            heard: Instant::now(),
            state: State::Open,
        };
        // Dropped with the client's connection, it drops the worker's.
        *response.body_mut() = body_of(futures::stream::unfold(relay, |mut relay| async move {
            let piece = relay.next().await?;
            Some((piece, relay))
        }));
        response
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(piece) = self.out.pop_front() {
                return Some(piece);
            }
            if self.state == State::Over {
                return None;
            }
            match self.frame().await {
                Ok(Some(bytes)) if self.state == State::Unread => return Some(bytes),
                Ok(Some(bytes)) => {
                    if let Err(why) = self.take(bytes) {
                        self.go_on_elsewhere(&why).await;
                    }
                }
                Ok(None) => self.ended().await,
                Err(broke) => self.broke(broke).await,
            }
        }
    }

    /// The next bytes; none at the end.
    async fn frame(&mut self) -> Result<Option<Bytes>, Break> {
        loop {
            let polled = std::future::poll_fn(|cx| match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(frame) => Poll::Ready(Some(frame)),
                Poll::Pending => self.timer.as_mut().poll(cx).map(|()| None),
            });
            match polled.await {
                // Set once and not for each piece, it may come early.
                None if self.heard.elapsed() < self.patience() => self.set_timer(),
                None => {
                    return Err(Break::Silent(format!("the worker sent nothing for {} s", self.patience().as_secs())));
                }
                Some(None) => return Ok(None),
                Some(Some(Err(error))) => return Err(Break::Worker(cause_of(&error))),
                Some(Some(Ok(frame))) => {
                    self.heard = Instant::now();
                    self.placed.heard(self.heard);
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// Behind its end, a worker closes the answer, or it is closed for it.
    fn patience(&self) -> Duration {
        if self.state == State::Closing { caps::END_WITHIN } else { self.silence }
    }

    fn set_timer(&mut self) {
        let due = self.heard + self.patience();
        self.timer.as_mut().reset(due.into());
    }

    fn close(&mut self) {
        self.state = State::Closing;
        self.set_timer();
    }

    /// Takes bytes of the answer; or why it cannot go on.
    fn take(&mut self, bytes: Bytes) -> Result<(), String> {
        self.events.push(bytes);
        while let Some(event) = self.events.next() {
            self.take_event(event)?;
        }
        self.count_partial();
        // What came at once goes on at once: a write costs more than a copy.
        if self.out.len() > 1 {
            let all = self.out.iter().map(Bytes::as_ref).collect::<Vec<&[u8]>>().concat();
            self.out.clear();
            self.out.push_back(all.into());
        }
        Ok(())
    }

    /// An event that is long, or longer than there is memory for, is passed on without being read, and whatever follows it.
    fn count_partial(&mut self) {
        let partial = self.events.partial();
        if partial > self.held.1 {
            // Twice as much each time.
            match self.call.app.bodies.hold(2 * partial) {
                Some(held) => self.held = (held, 2 * partial),
                None => self.held.1 = 0,
            }
        } else if partial == 0 && self.held.1 > caps::ANSWER_UNCOUNTED {
            self.held = (Held::default(), caps::ANSWER_UNCOUNTED);
        }
        if partial > caps::ANSWER_EVENT_BYTES_MAX || partial > self.held.1 {
            self.answer.pass_over();
            self.call.forget_prompt();
            self.out.push_back(self.events.rest());
            (self.state, self.held) = (State::Unread, (Held::default(), 0));
        }
    }

    fn take_event(&mut self, event: Event) -> Result<(), String> {
        let Some(data) = event.data().filter(|_| self.state == State::Open) else {
            // A comment, such as one that keeps the connection alive; what follows the end; or what is no text.
            if !event.is_text() {
                self.answer.pass_over();
            }
            self.out.push_back(event.into_bytes());
            return Ok(());
        };
        if data == "[DONE]" {
            drop(data);
            self.close();
            self.out.push_back(event.into_bytes());
            return Ok(());
        }
        let (before, is_first) = (self.answer.tokens(), !self.answer.was_sent());
        match self.answer.take(&data, &self.call.request, self.call.hides) {
            Verdict::AsItCame => {
                drop(data);
                self.out.push_back(event.into_bytes());
            }
            Verdict::As(data) => self.out.push_back(event.with_data(&data)),
            Verdict::Dropped => {}
            Verdict::Refused => {
                drop(data);
                self.close();
                self.out.push_back(event.into_bytes());
                return Ok(());
            }
            Verdict::Differs => return Err("the worker computed another answer than what came before".to_owned()),
            Verdict::Failed(why) => {
                drop(data);
                self.failure = Some(event.into_bytes());
                return Err(why);
            }
        }
        if is_first && self.answer.was_sent() {
            self.call.forget_prompt();
            // Its tokens take memory, too, for as long as the answer goes on.
            match self.call.app.bodies.hold(self.answer.prompt_tokens() * size_of::<u32>()) {
                Some(held) => self.call.held = held,
                None => self.answer.forget_prompt(),
            }
        }
        let new = (self.answer.tokens().saturating_sub(before)) as u64;
        self.placed.tokens(new.max(1));
        Ok(())
    }

    /// The worker closed the answer as a server does at its end.
    async fn ended(&mut self) {
        let whole = self.state == State::Closing || self.answer.is_whole(&self.call.request);
        if whole || self.state == State::Unread || !self.answer.is_read() && self.answer.was_sent() {
            let rest = self.events.rest();
            self.out.extend((!rest.is_empty()).then_some(rest));
            self.state = State::Over;
        } else {
            self.go_on_elsewhere("the answer ended in the middle").await;
        }
    }

    async fn broke(&mut self, broke: Break) {
        // All was said.
        if matches!(self.state, State::Closing | State::Over) {
            self.state = State::Over;
            return;
        }
        let why = match broke {
            Break::Worker(why) => {
                judge(&self.placed.worker, Evidence::Doubt, &why);
                why
            }
            // Nobody is asked again from the start for the router's own limit.
            Break::Silent(_) if !self.answer.was_sent() => return self.end_with(&ApiError::timed_out(self.silence)),
            Break::Silent(why) => why,
        };
        if self.state == State::Unread {
            // It may be within an event.
            self.out.push_back(Bytes::from_static(b"\n\n"));
            return self.end_with(&ApiError::unavailable(format!("the worker's answer broke off ({why})")));
        }
        self.go_on_elsewhere(&why).await;
    }

    /// No end that looks like one: an answer that ends with an error is not whole.
    fn end_with(&mut self, error: &ApiError) {
        self.call.app.counts.broken.fetch_add(1, Ordering::Relaxed);
        self.out.push_back(sse::event(&error.body().to_string()));
        self.state = State::Over;
    }

    /// The worker is gone, or gave up: the answer goes on at another, or ends with an error that says so.
    async fn go_on_elsewhere(&mut self, why: &str) {
        let failure = self.failure.take();
        if failure.is_none() && self.answer.is_whole(&self.call.request) {
            // All but the end came.
            self.out.push_back(sse::event("[DONE]"));
            self.state = State::Over;
            return;
        }
        let worker = Arc::clone(&self.placed.worker);
        tracing::warn!(worker = worker.spec.id, why, tokens = self.answer.tokens(), "the worker's answer broke off");
        match self.another().await {
            Ok((placed, upstream)) => {
                let (from, to) = (&worker.spec.id, &placed.worker.spec.id);
                tracing::info!(from, to, "the answer continues at another worker");
                self.call.app.counts.resumed.fetch_add(1, Ordering::Relaxed);
                (self.placed, self.body, self.events) = (placed, upstream.into_body(), Events::default());
                self.heard = Instant::now();
                self.set_timer();
            }
            Err(problem) => {
                if let Some(failure) = failure {
                    self.call.app.counts.broken.fetch_add(1, Ordering::Relaxed);
                    // The worker's own word, and whatever it says behind it.
                    self.out.push_back(failure);
                    self.close();
                    return self.pass_what_is_there();
                }
                self.end_with(&ApiError::unavailable(format!("the worker's answer broke off ({why}), and {problem}")));
            }
        }
    }

    /// Events that came with the last one.
    fn pass_what_is_there(&mut self) {
        while let Some(event) = self.events.next() {
            self.out.push_back(event.into_bytes());
        }
    }

    async fn another(&mut self) -> Result<(Placed, Upstream), String> {
        if self.but.len() >= caps::TRIES_MAX {
            return Err("the router has already tried several workers".into());
        }
        let before = self.but.len();
        let found = if !self.answer.was_sent() {
            // Nothing came yet: all of it is asked for again.
            self.call.send_somewhere(&mut self.but).await
        } else {
            self.send_rest().await?
        };
        let (placed, upstream) = found.map_err(|error| error.message().to_owned())?;
        if !is_stream(&upstream) {
            let id = &placed.worker.spec.id;
            return Err(format!(
                "worker {id:?} answered {} to the rest of the request ({} tries)",
                upstream.status(),
                self.but.len() - before
            ));
        }
        Ok((placed, upstream))
    }

    async fn send_rest(&mut self) -> Result<Result<(Placed, Upstream), ApiError>, String> {
        if let Some(field) = &self.call.hindrance {
            return Err(format!("it cannot be continued at another worker: {field}"));
        }
        let (app, request) = (Arc::clone(&self.call.app), Arc::clone(&self.call.request));
        let tokens_max = match request.max_tokens() {
            Some(_) => None,
            None => app.model_tokens_max(&self.placed.worker, &self.call.asked.model).await,
        };
        let tokenizer = app.models.get(&self.call.asked.model).and_then(|model| model.tokens.as_ref());
        let rest = self.answer.rest(&request, tokenizer, tokens_max);
        let rest = rest.map_err(|why| format!("it cannot be continued at another worker: {why}"))?;
        self.call.asked = app.asked_again(&self.call.asked, &request, &rest.prompt);
        self.answer.goes_on(&rest);
        Ok(self.call.send_to_some(Kind::Completion.path(), &rest.body, &mut self.but).await)
    }
}
