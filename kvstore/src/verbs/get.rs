//! Get: sends blocks as a stream, directly from their slots.
//!
//! A call leases its blocks together when it starts, and releases each block once it was handed to the
//! connection. Nothing is copied here: the connection's writes read the slots. All calls together may lease
//! a bounded number of blocks. A call gives its leases back at its deadline, whether or not the client reads.
//! The only exception is the block that the connection is sending just then, which is given back when it is
//! sent or the connection ends. A task of the call brings blocks in from disk, a few at a time, ahead of the
//! block that is being sent. So the memory may be smaller than the request.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::Frame;
use kvstore_proto::data_stream::{self, DATA_BYTES_MAX};
use kvstore_proto::v1::get_response::Part;
use kvstore_proto::v1::{GetBlock, GetRequest, GetResponse, GetStatus};
use kvstore_tiers::SequenceHash;
use kvstore_tiers::host::{LeasedBlock, Leasing, NamespaceId, RegisteredLayout};
use kvstore_tiers::object::ReadBatch;
use kvstore_tiers::residency::Priority;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::Status;

use super::promote::{Coming, Promoter};
use super::put::too_many_calls;
use crate::daemon::{Daemon, InFlight};
use crate::{caps, clock, telemetry, wire};

/// Bytes of one `data` message: enough that framing costs nothing.
const DATA_BYTES: usize = 1 << 20;
/// Ranges shorter than this are gathered by a copy: a page costs less to copy than to write apart.
const GATHER_BELOW_BYTES: u64 = 4096;

/// Starts a get. Everything that can be wrong is found before the first byte.
pub fn get(
    daemon: &Arc<Daemon>,
    namespace: NamespaceId,
    request: GetRequest,
    deadline: Instant,
    in_flight: InFlight,
) -> Result<GetBody, Status> {
    let call = Arc::clone(&daemon.data_calls).try_acquire_owned().map_err(|_| too_many_calls(daemon))?;
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, layout_group) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::BLOCKS_PER_GET_MAX)?;
    let (layers, heads) = (wire::range(request.layers), wire::range(request.heads));
    let whole = layers.is_none() && heads.is_none();
    let ranges = layout_group
        .group
        .ranges(layout.layout.block_tokens, layers, heads)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    check_ticket(daemon, namespace, &request.ticket)?;
    let permits = Arc::clone(&daemon.leasable).try_acquire_many_owned(hashes.len() as u32).map_err(|_| {
        telemetry::add(&daemon.traffic.busy, 1);
        Status::resource_exhausted(format!(
            "the gets in progress would hold more than {} blocks, which is the maximum: try again later",
            caps::LEASED_BLOCKS_MAX
        ))
    })?;
    let leasings = daemon.host.lease_run(&layout, group, &hashes, clock::now());
    let source = source(daemon, &layout, group, hashes, leasings, deadline);
    let sending = Sending {
        source,
        permits,
        ranges: (!whole).then_some(ranges),
        leading_run: request.leading_run,
        ready: VecDeque::new(),
        daemon: Arc::clone(daemon),
        started: Instant::now(),
        _call: call,
        _in_flight: in_flight,
    };
    Ok(GetBody::new(sending, deadline))
}

/// Where a call's blocks come from, in order.
enum Source {
    /// All that is there is leased already.
    Ready(VecDeque<(usize, Asked)>),
    /// A task brings them.
    Coming(mpsc::Receiver<(usize, Asked)>),
}

/// One asked block.
enum Asked {
    Leasing(Leasing),
    /// Pinned, and not to be had.
    Lost,
}

impl Asked {
    fn is_hit(&self) -> bool {
        matches!(self, Self::Leasing(Leasing::Leased(_)))
    }
}

fn source(
    daemon: &Arc<Daemon>,
    layout: &Arc<RegisteredLayout>,
    group: u16,
    hashes: Vec<SequenceHash>,
    leasings: Vec<Leasing>,
    deadline: Instant,
) -> Source {
    let hits = |leasing: &Leasing| matches!(leasing, Leasing::Leased(_));
    if let Some(nvme) = &daemon.nvme {
        // What is read from memory is worth keeping on disk too.
        let read: Vec<_> =
            hashes.iter().zip(&leasings).filter(|(_, leasing)| hits(leasing)).map(|(hash, _)| *hash).collect();
        nvme.touch(layout, group, &read);
    }
    if leasings.iter().all(hits) || (daemon.nvme.is_none() && daemon.object.is_none()) {
        return Source::Ready(leasings.into_iter().map(Asked::Leasing).enumerate().collect());
    }
    let (send, receive) = mpsc::channel(1);
    let promoter = Promoter {
        daemon: Arc::clone(daemon),
        layout: Arc::clone(layout),
        group,
        priority: Priority::Demand,
        deadline,
    };
    tokio::spawn(bring(promoter, hashes, leasings, send));
    Source::Coming(receive)
}

/// Brings what lower tiers have, some blocks ahead of the one that is sent. Ends when nobody listens any more.
async fn bring(
    promoter: Promoter,
    hashes: Vec<SequenceHash>,
    leasings: Vec<Leasing>,
    send: mpsc::Sender<(usize, Asked)>,
) {
    let below = promoter.below(&hashes).await;
    let leasings = leasings.into_iter().zip(below).map(|(leasing, below)| match leasing {
        Leasing::Miss | Leasing::InFlight if below => None,
        leasing => Some(leasing),
    });
    // What is left: each block with its answer, where that is known already.
    let mut left: VecDeque<_> = hashes.iter().copied().zip(leasings).enumerate().collect();
    let mut window: VecDeque<(usize, SequenceHash, Coming)> = VecDeque::new();
    let ahead = promoter.window();
    loop {
        // Half a window at a time: each start may wake the disk's thread, and few wake-ups cost less; and what lies side by
        // side in the bucket comes with one request.
        let refill = window.len() <= ahead / 2;
        let mut batch = ReadBatch::default();
        while refill
            && window.len() < ahead
            && let Some((index, (hash, leasing))) = left.pop_front()
        {
            let coming = match leasing {
                Some(leasing) => Coming::Now(leasing),
                None => promoter.start_in(&mut batch, hash).await,
            };
            window.push_back((index, hash, coming));
        }
        promoter.send(batch);
        let Some((index, hash, coming)) = window.pop_front() else { return };
        if matches!(coming, Coming::Later) {
            // It may be this very call whose leases leave no room: those of blocks further on are given back,
            // and taken again in their turn.
            let held = |leasing: &Leasing| matches!(leasing, Leasing::Leased(_));
            for (_, _, coming) in &mut window {
                if matches!(coming, Coming::Now(leasing) if held(leasing)) {
                    *coming = Coming::Later;
                }
            }
            for (_, (_, leasing)) in &mut left {
                *leasing = leasing.take().filter(|leasing| !held(leasing));
            }
        }
        let leasing = tokio::select! {
            leasing = promoter.finish(hash, coming) => leasing,
            () = send.closed() => return,
        };
        let lost = matches!(leasing, Leasing::Miss) && promoter.is_pinned(hash);
        let answer = if lost { Asked::Lost } else { Asked::Leasing(leasing) };
        if send.send((index, answer)).await.is_err() {
            return;
        }
    }
}

fn check_ticket(daemon: &Daemon, namespace: NamespaceId, ticket: &[u8]) -> Result<(), Status> {
    if ticket.is_empty() {
        return Ok(());
    }
    let id = wire::hold_id("ticket", ticket)?;
    if daemon.host.has_ticket(namespace, id, clock::now()) {
        return Ok(());
    }
    Err(Status::not_found("ticket: the ticket is unknown or has expired: look the prefix up again"))
}

/// A block's bytes on their way into the connection: ends the lease when the last slice is gone.
struct Outgoing {
    block: LeasedBlock,
    _permit: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Outgoing {
    fn as_ref(&self) -> &[u8] {
        &self.block
    }
}

/// What is left of a call.
struct Sending {
    source: Source,
    permits: OwnedSemaphorePermit,
    /// `None` for whole blocks.
    ranges: Option<Vec<Range<u64>>>,
    leading_run: bool,
    /// Frames of the block that is being sent.
    ready: VecDeque<Bytes>,
    daemon: Arc<Daemon>,
    started: Instant,
    _call: OwnedSemaphorePermit,
    _in_flight: InFlight,
}

impl Sending {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(bytes));
            }
            let next = match &mut self.source {
                Source::Ready(blocks) => blocks.pop_front(),
                Source::Coming(blocks) => std::task::ready!(blocks.poll_recv(context)),
            };
            let Some((index, asked)) = next else { return Poll::Ready(None) };
            let hit = asked.is_hit();
            let counter = if hit { &self.daemon.traffic.get_hits } else { &self.daemon.traffic.get_misses };
            telemetry::add(counter, 1);
            self.prepare(index, asked);
            if self.leading_run && !hit {
                self.source = Source::Ready(VecDeque::new());
            }
        }
    }

    /// Lines up the frames of one block.
    fn prepare(&mut self, index: usize, asked: Asked) {
        let answer = |status: GetStatus, length: usize, crc32| {
            let block = GetBlock { index: index as u32, status: status.into(), length: length as u64, crc32 };
            data_stream::message(&GetResponse { part: Some(Part::Block(block)) })
        };
        let block = match asked {
            Asked::Leasing(Leasing::Miss) => return self.ready.push_back(answer(GetStatus::Miss, 0, None)),
            Asked::Leasing(Leasing::InFlight) => return self.ready.push_back(answer(GetStatus::InFlight, 0, None)),
            Asked::Lost => return self.ready.push_back(answer(GetStatus::DataLoss, 0, None)),
            Asked::Leasing(Leasing::Leased(block)) => block,
        };
        let crc32 = block.crc32();
        let bytes = Bytes::from_owner(Outgoing { block, _permit: self.permits.split(1) });
        let pieces = match &self.ranges {
            None => vec![bytes.clone()],
            Some(ranges) => cut(&bytes, ranges),
        };
        let length: usize = pieces.iter().map(Bytes::len).sum();
        let crc32 = self.ranges.is_none().then_some(crc32);
        telemetry::add(&self.daemon.traffic.get_bytes, length as u64);
        self.ready.push_back(answer(GetStatus::Hit, length, crc32));
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
    fn new(sending: Sending, deadline: Instant) -> Self {
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
