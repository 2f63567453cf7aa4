//! Get: where the blocks of a call come from.
//!
//! A call leases its blocks as they are sent, a few at a time: a reader that does not read keeps those few, and costs nobody else a
//! lease. What is below memory is brought ahead of the block that is being sent, so that the memory may be smaller than the
//! request.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll};

use kvstore_proto::v1::GetRequest;
use kvstore_tiers::below::Ask;
use kvstore_tiers::caps::PROMOTIONS_PER_CALL;
use kvstore_tiers::host::{HoldId, LeasedBlock, Leasing, NamespaceId, RegisteredLayout};
use kvstore_tiers::slots::{Presence, Priority};
use kvstore_tiers::stack::{Asked, Policy, Promotion, Window};
use kvstore_tiers::{BlockRef, Run, SequenceHash};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tonic::Status;

use super::put::too_many_calls;
use crate::daemon::Daemon;
use crate::data_calls::DataCall;
use crate::{caps, clock, wire};

/// A call that started.
pub struct Get {
    /// Its blocks, in order.
    pub source: Source,
    /// The parts of each block that are asked for; `None`: all of it.
    pub ranges: Option<Vec<Range<u64>>>,
    /// It ends with the first block that is not there.
    pub leading_run: bool,
    /// Counts among the calls that may be under way, until its task has ended, too.
    pub _call: Arc<DataCall>,
}

/// Where a call's blocks come from, in order.
pub enum Source {
    /// Memory.
    Here(Here),
    /// A task brings them.
    Coming(mpsc::Receiver<(usize, Answer)>),
    /// There are no more.
    Ended,
}

impl Source {
    /// The next block's place and its answer; `None` after the last.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Answer)>> {
        loop {
            match self {
                Self::Here(here) => match here.next() {
                    Next::Answer(index, answer) => return Poll::Ready(Some((index, answer))),
                    Next::Below(coming) => *self = Self::Coming(coming),
                    Next::End => *self = Self::Ended,
                },
                Self::Coming(blocks) => return blocks.poll_recv(context),
                Self::Ended => return Poll::Ready(None),
            }
        }
    }
}

/// What became of one asked block.
pub enum Answer {
    /// It is leased.
    Hit(LeasedBlock),
    /// It is on its way, and did not come in time.
    InFlight,
    /// It is nowhere.
    Miss,
    /// It is pinned, and not to be had.
    Lost,
}

impl Answer {
    fn of(leasing: Leasing) -> Self {
        match leasing {
            Leasing::Leased(block) => Self::Hit(block),
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
    let call = Arc::new(daemon.data_calls.enter(namespace).ok_or_else(|| too_many_calls(daemon))?);
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
    let bringing = Bringing { daemon: Arc::clone(daemon), layout, group, hashes, deadline, _call: Arc::clone(&call) };
    let source = bringing.start();
    Ok(Get { source, ranges: (!whole).then_some(ranges), leading_run: request.leading_run, _call: call })
}

fn check_ticket(daemon: &Daemon, namespace: NamespaceId, ticket: &[u8]) -> Result<(), Status> {
    match ticket.is_empty() {
        true => Ok(()),
        false => known_ticket(daemon, namespace, wire::hold_id("ticket", ticket)?),
    }
}

/// Whether a ticket still holds its blocks.
pub fn known_ticket(daemon: &Daemon, namespace: NamespaceId, ticket: HoldId) -> Result<(), Status> {
    match daemon.host.has_ticket(namespace, ticket, clock::now()) {
        true => Ok(()),
        false => Err(Status::not_found("ticket: the ticket is unknown or has expired: look the prefix up again")),
    }
}

/// The blocks of a call that are yet to be leased.
struct Bringing {
    daemon: Arc<Daemon>,
    layout: Arc<RegisteredLayout>,
    group: u16,
    hashes: Vec<SequenceHash>,
    deadline: Instant,
    _call: Arc<DataCall>,
}

impl Bringing {
    /// Where all of it is in memory, or nothing is below, no task is needed.
    fn start(self) -> Source {
        let here = |presence: &Presence| *presence == Presence::Resident;
        let is_here = !self.daemon.stack.has_below()
            || self.daemon.host.presence(&self.layout, self.group, &self.hashes).iter().all(here);
        if !is_here {
            return Source::Coming(self.bring_from(0));
        }
        let block_bytes = self.layout.group(u32::from(self.group)).map_or(1, |group| group.block_bytes.max(1));
        let step = (caps::LEASED_AHEAD_BYTES / block_bytes).clamp(1, caps::LEASED_AHEAD_BLOCKS) as usize;
        Source::Here(Here { bringing: Some(self), next: 0, step, leased: VecDeque::new() })
    }

    fn lease(&self, hashes: &[SequenceHash]) -> Vec<Leasing> {
        let leasings = self.daemon.host.lease_run(&self.layout, self.group, hashes, clock::now());
        let is_hit = |leasing: &Leasing| matches!(leasing, Leasing::Leased(_));
        self.note_read(hashes.iter().zip(&leasings).filter(|(_, leasing)| is_hit(leasing)).map(|(hash, _)| *hash));
        leasings
    }

    /// What is read from memory is worth keeping below, too.
    fn note_read(&self, read: impl Iterator<Item = SequenceHash>) {
        if self.daemon.stack.has_below() {
            let hashes: Vec<_> = read.collect();
            self.daemon.stack.below(&Run { layout: &self.layout, group: self.group, hashes: &hashes }, Ask::Read);
        }
    }

    /// Has a task bring what is left.
    fn bring_from(self, first: usize) -> mpsc::Receiver<(usize, Answer)> {
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(self.bring(first, send));
        receive
    }

    /// Brings what tiers below memory have, some blocks ahead of the one that is sent. Ends when nobody listens any more.
    async fn bring(self, first: usize, send: mpsc::Sender<(usize, Answer)>) {
        let promotion = Promotion {
            stack: Arc::clone(&self.daemon.stack),
            layout: Arc::clone(&self.layout),
            group: self.group,
            priority: Priority::Demand,
            deadline: self.deadline,
        };
        let mut start = first;
        for part in self.hashes.get(first..).unwrap_or_default().chunks(caps::BLOCKS_PER_GET_WINDOW) {
            tokio::select! {
                () = promotion.search(part) => {}
                () = send.closed() => return,
            }
            // Not before the search, which may take seconds.
            let (ahead, _permits) = self.ahead(promotion.ahead().min(part.len()));
            let presences = self.daemon.host.presence(&self.layout, self.group, part);
            let read = part.iter().zip(presences).filter(|(_, presence)| *presence == Presence::Resident);
            self.note_read(read.map(|(hash, _)| *hash));
            let asked = part.iter().enumerate().map(|(at, hash)| Asked { index: start + at, hash: *hash, known: None });
            let policy = Policy { ahead, ends_outranked: false, ends_full: false };
            let mut window = Window::new(&promotion, policy, asked);
            loop {
                let next = tokio::select! {
                    next = window.next() => next,
                    () = send.closed() => return,
                };
                let Some((index, hash, leasing)) = next else { break };
                let answer = match Answer::of(leasing) {
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

    /// How many blocks are brought ahead, and the permits for them: a part of what is left, so that calls whose readers do not read
    /// leave some to others, and to the local plane. Where nothing is left, one block at a time.
    fn ahead(&self, wanted: usize) -> (usize, Option<OwnedSemaphorePermit>) {
        let leasable = &self.daemon.leasable;
        let left = leasable.available_permits().saturating_sub(caps::LEASED_BLOCKS_RESERVED);
        let part = (left / caps::LEASABLE_PARTS).max(PROMOTIONS_PER_CALL).min(wanted);
        if part > left {
            return (1, None);
        }
        match Arc::clone(leasable).try_acquire_many_owned(part as u32) {
            Ok(permits) => (part.max(1), Some(permits)),
            Err(_) => (1, None),
        }
    }

    fn is_pinned(&self, hash: SequenceHash) -> bool {
        let block = BlockRef { layout: &self.layout, group: self.group, hash };
        self.daemon.stack.is_held_below(&block)
    }
}

/// Blocks that are in memory when the call starts.
pub struct Here {
    /// `None` once a task brings what is left.
    bringing: Option<Bringing>,
    /// The first that is yet to be leased.
    next: usize,
    /// Blocks that are leased at a time.
    step: usize,
    leased: VecDeque<(usize, Answer)>,
}

enum Next {
    Answer(usize, Answer),
    /// What is left comes from below.
    Below(mpsc::Receiver<(usize, Answer)>),
    End,
}

impl Here {
    fn next(&mut self) -> Next {
        if self.leased.is_empty() {
            self.lease_some();
        }
        match (self.leased.pop_front(), self.bringing.take()) {
            (Some((index, answer)), bringing) => {
                self.bringing = bringing;
                Next::Answer(index, answer)
            }
            (None, Some(bringing)) if self.next < bringing.hashes.len() => Next::Below(bringing.bring_from(self.next)),
            (None, _) => Next::End,
        }
    }

    /// Leases the next few. Ends before a block that has left memory since the call started, where a tier below may have it.
    fn lease_some(&mut self) {
        let Some(bringing) = &self.bringing else { return };
        let end = (self.next + self.step).min(bringing.hashes.len());
        let leasings = bringing.lease(bringing.hashes.get(self.next..end).unwrap_or_default());
        let may_be_below = bringing.daemon.stack.has_below();
        let stays = |leasing: &Leasing| !may_be_below || matches!(leasing, Leasing::Leased(_));
        let answers = leasings.into_iter().take_while(stays).map(Answer::of);
        self.leased.extend((self.next..).zip(answers));
        self.next += self.leased.len();
    }
}
