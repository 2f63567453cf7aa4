//! Get: where the blocks of a call come from.
//!
//! A call leases its blocks together, up to a bounded number of them; a longer one goes on with the next as those before are sent.
//! All calls together may lease a bounded number. What is below memory is brought ahead of the block that is being sent, so that
//! the memory may be smaller than the request.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use kvstore_proto::v1::GetRequest;
use kvstore_tiers::below::Ask;
use kvstore_tiers::host::{LeasedBlock, Leasing, NamespaceId, RegisteredLayout};
use kvstore_tiers::residency::Priority;
use kvstore_tiers::stack::{Asked, Policy, Promotion, Window};
use kvstore_tiers::{BlockRef, Run, SequenceHash};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tonic::Status;

use super::put::too_many_calls;
use crate::daemon::Daemon;
use crate::{caps, clock, telemetry, wire};

/// A call that started.
pub struct Get {
    /// Its blocks, in order.
    pub source: Source,
    /// The parts of each block that are asked for; `None`: all of it.
    pub ranges: Option<Vec<Range<u64>>>,
    /// It ends with the first block that is not there.
    pub leading_run: bool,
    /// Counts among the calls that may be under way.
    pub _call: OwnedSemaphorePermit,
}

/// Where a call's blocks come from, in order.
pub enum Source {
    /// All that is there is leased already.
    Ready(VecDeque<(usize, Answer)>),
    /// A task brings them.
    Coming(mpsc::Receiver<(usize, Answer)>),
}

/// What became of one asked block.
pub enum Answer {
    /// It is leased, and counts among the blocks that calls may lease.
    Hit(LeasedBlock, Option<OwnedSemaphorePermit>),
    /// It is on its way, and did not come in time.
    InFlight,
    /// It is nowhere.
    Miss,
    /// It is pinned, and not to be had.
    Lost,
}

impl Answer {
    fn of(leasing: Leasing, permits: &mut OwnedSemaphorePermit) -> Self {
        match leasing {
            Leasing::Leased(block) => Self::Hit(block, permits.split(1)),
            Leasing::InFlight => Self::InFlight,
            Leasing::Miss => Self::Miss,
        }
    }

    /// True where its bytes are there.
    pub fn is_hit(&self) -> bool {
        matches!(self, Self::Hit(..))
    }
}

/// Starts a get. Everything that can be wrong is found before the first byte.
pub fn get(
    daemon: &Arc<Daemon>,
    namespace: NamespaceId,
    request: GetRequest,
    deadline: Instant,
) -> Result<Get, Status> {
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
    let leases = hashes.len().min(caps::BLOCKS_PER_GET_WINDOW);
    let permits = Arc::clone(&daemon.leasable).try_acquire_many_owned(leases as u32).map_err(|_| {
        telemetry::add(&daemon.traffic.busy, 1);
        Status::resource_exhausted(format!(
            "the gets in progress would hold more than {} blocks, which is the maximum: try again later",
            caps::LEASED_BLOCKS_MAX
        ))
    })?;
    let source = Bringing { daemon: Arc::clone(daemon), layout, group, hashes, deadline }.start(permits);
    Ok(Get { source, ranges: (!whole).then_some(ranges), leading_run: request.leading_run, _call: call })
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

/// The blocks of a call that are yet to be leased.
struct Bringing {
    daemon: Arc<Daemon>,
    layout: Arc<RegisteredLayout>,
    group: u16,
    hashes: Vec<SequenceHash>,
    deadline: Instant,
}

impl Bringing {
    /// Leases the first blocks, a permit for each. Where that is all, and all of it is there, no task is needed.
    fn start(self, mut permits: OwnedSemaphorePermit) -> Source {
        let first = self.hashes.get(..permits.num_permits()).unwrap_or_default();
        let leasings = self.lease(first);
        let is_all = first.len() == self.hashes.len();
        let all_there = leasings.iter().all(|leasing| matches!(leasing, Leasing::Leased(_)));
        if is_all && (all_there || !self.daemon.stack.has_below()) {
            let answers = leasings.into_iter().map(|leasing| Answer::of(leasing, &mut permits));
            return Source::Ready(answers.enumerate().collect());
        }
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(self.bring(leasings, permits, send));
        Source::Coming(receive)
    }

    fn lease(&self, hashes: &[SequenceHash]) -> Vec<Leasing> {
        let leasings = self.daemon.host.lease_run(&self.layout, self.group, hashes, clock::now());
        // What is read from memory is worth keeping below, too.
        let is_hit = |leasing: &Leasing| matches!(leasing, Leasing::Leased(_));
        let read: Vec<_> =
            hashes.iter().zip(&leasings).filter(|(_, leasing)| is_hit(leasing)).map(|(hash, _)| *hash).collect();
        self.daemon.stack.below(&Run { layout: &self.layout, group: self.group, hashes: &read }, Ask::Read);
        leasings
    }

    /// Brings what tiers below memory have, some blocks ahead of the one that is sent. Ends when nobody listens any more.
    async fn bring(
        self,
        leasings: Vec<Leasing>,
        mut permits: OwnedSemaphorePermit,
        send: mpsc::Sender<(usize, Answer)>,
    ) {
        let promotion = Promotion {
            stack: Arc::clone(&self.daemon.stack),
            layout: Arc::clone(&self.layout),
            group: self.group,
            priority: Priority::Demand,
            deadline: self.deadline,
        };
        let mut leasings = Some(leasings);
        let mut start = 0;
        for part in self.hashes.chunks(caps::BLOCKS_PER_GET_WINDOW) {
            let leasings = match leasings.take() {
                Some(leasings) => leasings,
                None => {
                    // Those of blocks that were not there: calls that wait must not hold what others wait for.
                    drop(permits.split(permits.num_permits()));
                    let Some(more) = self.permits_for(part.len(), &send).await else { return };
                    permits = more;
                    self.lease(part)
                }
            };
            let below = promotion.below(part).await;
            let asked = part.iter().zip(leasings).zip(below).enumerate().map(|(at, ((hash, leasing), below))| {
                let known = Some(leasing).filter(|leasing| !below || matches!(leasing, Leasing::Leased(_)));
                Asked { index: start + at, hash: *hash, known }
            });
            let policy = Policy { ahead: promotion.ahead(), ends_outranked: false, ends_full: false };
            let mut window = Window::new(&promotion, policy, asked);
            loop {
                let next = tokio::select! {
                    next = window.next() => next,
                    () = send.closed() => return,
                };
                let Some((index, hash, leasing)) = next else { break };
                let answer = match Answer::of(leasing, &mut permits) {
                    Answer::Miss if self.is_pinned(hash) => Answer::Lost,
                    answer => answer,
                };
                if send.send((index, answer)).await.is_err() {
                    return;
                }
            }
            start += part.len();
        }
    }

    /// Waits until so many more blocks may be leased. `None` where nobody listens any more; whoever does is told at the deadline.
    async fn permits_for(&self, blocks: usize, send: &mpsc::Sender<(usize, Answer)>) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            permits = Arc::clone(&self.daemon.leasable).acquire_many_owned(blocks as u32) => permits.ok(),
            () = send.closed() => None,
        }
    }

    fn is_pinned(&self, hash: SequenceHash) -> bool {
        let block = BlockRef { layout: &self.layout, group: self.group, hash };
        self.daemon.stack.is_held_below(&block)
    }
}
