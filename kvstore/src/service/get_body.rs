//! The body of a get's response: blocks on their way from their slots into the connection.
//!
//! Nothing is copied here: the connection's writes read the slots. Each block is released once it was handed to the connection.
//! A call gives its leases back at its deadline, whether or not the client reads. The only exception is the block that the
//! connection is sending just then, which is given back when it is sent or the connection ends.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::Frame;
use kvstore_proto::data_stream::{self, DATA_BYTES_MAX};
use kvstore_proto::v1::get_response::Part;
use kvstore_proto::v1::{GetBlock, GetResponse, GetStatus};
use kvstore_tiers::host::LeasedBlock;
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::Status;

use crate::daemon::{Daemon, InFlight};
use crate::telemetry;
use crate::verbs::get::{Answer, Get, Source};

/// Bytes of one `data` message: enough that framing costs nothing.
const DATA_BYTES: usize = 1 << 20;
/// Ranges shorter than this are gathered by a copy: a page costs less to copy than to write apart.
const GATHER_BELOW_BYTES: u64 = 4096;

/// A block's bytes on their way into the connection: ends the lease when the last slice is gone.
struct Outgoing(LeasedBlock);

impl AsRef<[u8]> for Outgoing {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// What is left of a call.
struct Sending {
    get: Get,
    /// Frames of the block that is being sent.
    ready: VecDeque<Bytes>,
    daemon: Arc<Daemon>,
    started: Instant,
    _in_flight: InFlight,
}

impl Sending {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(bytes));
            }
            let next = std::task::ready!(self.get.source.poll_next(context));
            let Some((index, answer)) = next else { return Poll::Ready(None) };
            let hit = answer.is_hit();
            let counter = if hit { &self.daemon.traffic.get_hits } else { &self.daemon.traffic.get_misses };
            telemetry::add(counter, 1);
            self.prepare(index, answer);
            if self.get.leading_run && !hit {
                self.get.source = Source::Ended;
            }
        }
    }

    /// Lines up the frames of one block.
    fn prepare(&mut self, index: usize, answer: Answer) {
        let message = |status: GetStatus, length: usize, crc32| {
            let block = GetBlock { index: index as u32, status: status.into(), length: length as u64, crc32 };
            data_stream::message(&GetResponse { part: Some(Part::Block(block)) })
        };
        let block = match answer {
            Answer::Miss => return self.ready.push_back(message(GetStatus::Miss, 0, None)),
            Answer::InFlight => return self.ready.push_back(message(GetStatus::InFlight, 0, None)),
            Answer::Lost => return self.ready.push_back(message(GetStatus::DataLoss, 0, None)),
            Answer::Hit(block) => block,
        };
        let crc32 = block.crc32();
        let bytes = Bytes::from_owner(Outgoing(block));
        let pieces = match &self.get.ranges {
            None => vec![bytes.clone()],
            Some(ranges) => cut(&bytes, ranges),
        };
        let length: usize = pieces.iter().map(Bytes::len).sum();
        let crc32 = self.get.ranges.is_none().then_some(crc32);
        telemetry::add(&self.daemon.traffic.get_bytes, length as u64);
        self.ready.push_back(message(GetStatus::Hit, length, crc32));
        for mut piece in pieces {
            while !piece.is_empty() {
                let data = piece.split_to(piece.len().min(DATA_BYTES));
                self.ready.push_back(data_stream::data_head(data.len()));
                self.ready.push_back(data);
            }
        }
    }
}

const _: () = assert!(DATA_BYTES <= DATA_BYTES_MAX);

/// The asked parts of a block; a block that is shorter than its layout says has fewer.
fn cut(bytes: &Bytes, ranges: &[Range<u64>]) -> Vec<Bytes> {
    let within = |range: &Range<u64>| {
        let end = (range.end as usize).min(bytes.len());
        (range.start as usize).min(end)..end
    };
    if ranges.iter().all(|range| range.end - range.start >= GATHER_BELOW_BYTES) {
        return ranges.iter().map(|range| bytes.slice(within(range))).collect();
    }
    let gathered: Vec<u8> = ranges.iter().flat_map(|range| bytes.slice(within(range))).collect();
    vec![Bytes::from(gathered)]
}

/// The body of a get's response.
pub struct GetBody {
    shared: Arc<Mutex<Shared>>,
    deadline: AbortHandle,
    ended: bool,
}

/// What the body and its deadline share.
struct Shared {
    /// Emptied at the deadline, so that a client that does not read keeps no lease.
    sending: Option<Sending>,
    /// Who waits for the next block, and has to hear of the deadline.
    waiting: Option<Waker>,
}

impl GetBody {
    pub(super) fn new(daemon: &Arc<Daemon>, get: Get, deadline: Instant, in_flight: InFlight) -> Self {
        let (daemon, ready, started) = (Arc::clone(daemon), VecDeque::new(), Instant::now());
        let sending = Sending { get, ready, daemon, started, _in_flight: in_flight };
        let shared = Arc::new(Mutex::new(Shared { sending: Some(sending), waiting: None }));
        let late = Arc::clone(&shared);
        let watchdog = tokio::spawn(async move {
            tokio::time::sleep_until(deadline).await;
            let mut shared = late.lock();
            let (dropped, waiting) = (shared.sending.take(), shared.waiting.take());
            drop(shared);
            drop(dropped);
            if let Some(waiting) = waiting {
                waiting.wake();
            }
        });
        Self { shared, deadline: watchdog.abort_handle(), ended: false }
    }
}

impl Drop for GetBody {
    fn drop(&mut self) {
        self.deadline.abort();
    }
}

impl http_body::Body for GetBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut shared = self.shared.lock();
        shared.waiting = Some(context.waker().clone());
        let status = match shared.sending.as_mut() {
            Some(call) => match std::task::ready!(call.poll_frame(context)) {
                Some(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                None => {
                    metrics::histogram!("kvstore_get_seconds").record(call.started.elapsed().as_secs_f64());
                    Status::ok("")
                }
            },
            None => Status::deadline_exceeded("the call's deadline passed before the client had read all blocks"),
        };
        shared.sending = None;
        drop(shared);
        self.ended = true;
        let mut trailers = http::HeaderMap::new();
        let added = status.add_header(&mut trailers);
        Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))))
    }
}
