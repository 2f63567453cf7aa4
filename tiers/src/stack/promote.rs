//! Promotion: a block comes into memory, read from the fastest tier that gives it.
//!
//! A flight reserves the slot, then asks tier after tier to fill it. Where one fails, the same slot is filled from the next, and
//! whoever waits goes on waiting: a copy that is damaged on disk costs a read from the bucket, not a miss. Callers that want a
//! block which is on its way already wait for that flight. A caller that leaves cancels nothing that a tier has begun.

use std::sync::Arc;

use kvstore_plane::SequenceHash;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Stack;
use crate::below::{Arrived, Ask, NotRead, Read, ReadUrgency, WhyNotRead};
use crate::block::{Block, BlockRef, Run};
use crate::caps;
use crate::host::{BeginFill, BlockFill, FillRequest, LeasedBlock, Leasing, RegisteredLayout};
use crate::slots::{FlightSource, Presence, Priority, Publish, Urgency};
use crate::tier::{Tier, TierSet};

/// The blocks that a call wants in memory, and how urgently.
pub struct Promotion {
    /// The tiers.
    pub stack: Arc<Stack>,
    /// The layout of all blocks.
    pub layout: Arc<RegisteredLayout>,
    /// Their group.
    pub group: u16,
    /// The lane.
    pub priority: Priority,
    /// Nobody waits any more.
    pub deadline: Instant,
}

/// A block on its way from a lower tier.
pub enum Coming {
    /// It is decided already.
    Now(Leasing),
    /// A tier reads it.
    Soon(Flight),
    /// Somebody else brings it, or there is no room yet: to be asked for again.
    Later,
    /// It is brought ahead of need, and what would leave memory for it is worth more.
    Outranked,
}

/// See [`Coming::Soon`].
pub struct Flight(oneshot::Receiver<Landed>);

impl Flight {
    /// True where it has ended. What it brought is let go.
    pub(super) fn has_landed(&mut self) -> bool {
        !matches!(self.0.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }
}

/// How a flight ended.
enum Landed {
    Here(LeasedBlock),
    /// Deleted, or brought by somebody else, meanwhile.
    Superseded,
    /// A tier has as many transfers as it may.
    Busy,
    /// No tier gave it.
    Nowhere,
}

/// What became of a block that was waited for.
pub(super) enum Settled {
    As(Leasing),
    /// No tier gave it, though one was thought to have it.
    NotGiven,
    /// It came to nothing for a reason that is not the tiers': another try may do better.
    Later,
}

/// What a flight takes along from tier to tier.
struct Flying {
    block: Block,
    urgency: ReadUrgency,
    tried: TierSet,
    told: oneshot::Sender<Landed>,
}

/// Reads that are started and not sent yet: those that lie side by side travel together.
#[derive(Default)]
pub struct Batch(Vec<(Tier, Read)>);

impl Batch {
    /// True where there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Promotion {
    /// Brings one block, and waits for it until the deadline.
    pub async fn bring(&self, hash: SequenceHash) -> Leasing {
        let coming = self.start(hash).await;
        self.finish(hash, coming).await
    }

    pub(super) async fn start(&self, hash: SequenceHash) -> Coming {
        let mut batch = Batch::default();
        let coming = self.start_in(&mut batch, hash).await;
        self.send(batch);
        coming
    }

    /// Starts to bring a block, as a part of `batch`; makes a slab where one is needed. Nothing comes before [`Self::send`].
    pub async fn start_in(&self, batch: &mut Batch, hash: SequenceHash) -> Coming {
        for _ in 0..caps::SLABS_PER_FILL_MAX {
            let block = self.block(hash);
            // In memory alone, or come into it just now.
            let Some(lower) = self.stack.source(&block, TierSet::NONE) else {
                return Coming::Now(self.lease(hash));
            };
            match self.reserve(&block) {
                BeginFill::Fill(fill, ahead) => {
                    ahead.into_iter().for_each(|plan| self.stack.host.drop_plan(plan));
                    let (told, landing) = oneshot::channel();
                    let flying = Flying { block: block.owned(), urgency: self.urgency(), tried: TierSet::NONE, told };
                    batch.0.push((lower.tier, self.stack.read_of(lower.tier, flying, fill)));
                    return Coming::Soon(Flight(landing));
                }
                BeginFill::Resident => match self.lease(hash) {
                    Leasing::Miss => {}
                    leasing => return Coming::Now(leasing),
                },
                BeginFill::InFlight => {
                    self.hurry(&block);
                    return Coming::Later;
                }
                BeginFill::Busy | BeginFill::Wait => return Coming::Later,
                BeginFill::Outranked => return Coming::Outranked,
                BeginFill::NeedsSlab(plan) => {
                    let host = Arc::clone(&self.stack.host);
                    let made = tokio::task::spawn_blocking(move || host.make_slab(plan)).await;
                    if let Ok(Err(error)) = made {
                        tracing::warn!(%error, "there is no memory for a slab");
                        return Coming::Later;
                    }
                }
            }
        }
        Coming::Later
    }

    fn reserve(&self, block: &BlockRef<'_>) -> BeginFill {
        let Some(group) = block.layout.group(u32::from(block.group)) else { return BeginFill::Busy };
        let now = (self.stack.clock)();
        let left = self.deadline.saturating_duration_since(Instant::now());
        let deadline = now.plus_ms(left.as_millis() as u64);
        let request = FillRequest {
            layout: block.layout,
            group: block.group,
            hash: block.hash,
            parent: None,
            length: group.block_bytes as u32,
            urgency: Urgency { source: FlightSource::Promotion, priority: self.priority, deadline },
        };
        self.stack.host.begin_fill(&request, now)
    }

    /// Somebody else brings it, perhaps ahead of need: it is wanted now.
    fn hurry(&self, block: &BlockRef<'_>) {
        if self.priority == Priority::Demand {
            let run = Run { layout: block.layout, group: block.group, hashes: &[block.hash] };
            self.stack.below.iter().for_each(|lower| _ = lower.store.presence(&run, Ask::Hurry));
        }
    }

    /// Makes the requests of a batch.
    pub fn send(&self, batch: Batch) {
        let urgency = self.urgency();
        let mut left = batch.0;
        for lower in &self.stack.below {
            let (reads, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|(tier, _)| *tier == lower.tier);
            left = others;
            if !reads.is_empty() {
                Arc::clone(&lower.store).read(reads.into_iter().map(|(_, read)| read).collect(), urgency);
            }
        }
    }

    fn urgency(&self) -> ReadUrgency {
        ReadUrgency { priority: self.priority, deadline: self.deadline }
    }

    /// Waits until the block is there, or is not to be had: no tier gives it, or the deadline passed.
    async fn finish(&self, hash: SequenceHash, coming: Coming) -> Leasing {
        let mut coming = coming;
        loop {
            match self.settle(coming).await {
                Settled::As(leasing) => return leasing,
                Settled::NotGiven => return self.not_given(hash),
                Settled::Later => coming = self.start_later(hash).await,
            }
        }
    }

    /// Waits for what is under way.
    pub(super) async fn settle(&self, coming: Coming) -> Settled {
        match coming {
            Coming::Now(leasing) => Settled::As(leasing),
            Coming::Outranked => Settled::As(Leasing::Miss),
            Coming::Later => Settled::Later,
            Coming::Soon(Flight(landing)) => match tokio::time::timeout_at(self.deadline, landing).await {
                Ok(Ok(Landed::Here(block))) => Settled::As(Leasing::Leased(block)),
                Ok(Ok(Landed::Nowhere)) => Settled::NotGiven,
                Ok(Ok(Landed::Superseded | Landed::Busy) | Err(_)) => Settled::Later,
                Err(_) => Settled::As(Leasing::InFlight),
            },
        }
    }

    /// No tier gave it: it may have come into memory all the same. A tier that has it and failed may give it later.
    pub(super) fn not_given(&self, hash: SequenceHash) -> Leasing {
        match self.lease(hash) {
            Leasing::Miss if self.stack.source(&self.block(hash), TierSet::NONE).is_some() => Leasing::InFlight,
            leasing => leasing,
        }
    }

    /// Starts again, once another promotion has ended or some time is over.
    pub(super) async fn start_later(&self, hash: SequenceHash) -> Coming {
        if Instant::now() >= self.deadline {
            return Coming::Now(Leasing::InFlight);
        }
        self.some_promotion().await;
        self.start(hash).await
    }

    /// Woken by the end of any promotion; the time is for room that others make.
    async fn some_promotion(&self) {
        let _ = tokio::time::timeout(caps::PROMOTE_POLL, self.stack.landed.notified()).await;
    }

    /// What slow tiers may have, and nobody here knows of, is looked for, until the deadline at most.
    pub async fn search(&self, hashes: &[SequenceHash]) {
        if !self.stack.has(Tier::Object) {
            return;
        }
        let run = Run { layout: &self.layout, group: self.group, hashes };
        let presences = self.stack.host.presence(&self.layout, self.group, hashes);
        let known = self.stack.below(&run, Ask::Look);
        let is_near =
            |(presence, below): (&Presence, &TierSet)| *presence == Presence::Resident || below.has(Tier::Nvme);
        let near = presences.iter().zip(&known).take_while(|both| is_near(*both)).count();
        self.search_all(hashes.get(near..).unwrap_or_default()).await;
    }

    /// The same, whatever is near.
    pub(super) async fn search_all(&self, hashes: &[SequenceHash]) {
        for searching in self.stack.search(&Run { layout: &self.layout, group: self.group, hashes }) {
            let _ = tokio::time::timeout_at(self.deadline, searching.ended()).await;
        }
    }

    /// Which blocks tiers below memory have, once they were searched for.
    pub async fn below(&self, hashes: &[SequenceHash]) -> Vec<bool> {
        self.search(hashes).await;
        let run = Run { layout: &self.layout, group: self.group, hashes };
        self.stack.below(&run, Ask::Look).into_iter().map(|tiers| !tiers.is_empty()).collect()
    }

    /// Blocks that are brought ahead of the one that is used: what a disk does at once; where there is a bucket, enough to keep
    /// several streams busy, and no more than an eighth of the memory.
    pub fn ahead(&self) -> usize {
        if !self.stack.has(Tier::Object) {
            return caps::PROMOTIONS_PER_CALL;
        }
        let streams = (caps::OBJECT_WINDOW_BYTES / self.block_bytes()) as usize;
        streams.min(self.memory_blocks() / 8).clamp(caps::PROMOTIONS_PER_CALL, caps::PROMOTIONS_PER_CALL_MAX)
    }

    /// Blocks that fit the memory.
    pub fn memory_blocks(&self) -> usize {
        (self.stack.host.limits().bytes / self.block_bytes()) as usize
    }

    fn block_bytes(&self) -> u64 {
        self.layout.group(u32::from(self.group)).map_or(1, |group| group.block_bytes.max(1))
    }

    fn lease(&self, hash: SequenceHash) -> Leasing {
        if self.priority == Priority::Background {
            // Nobody asked for it: it is no use.
            let leased = self.stack.host.lease_quietly(self.layout.namespace, &self.block(hash).key());
            return leased.map_or(Leasing::Miss, Leasing::Leased);
        }
        let now = (self.stack.clock)();
        self.stack.host.lease_run(&self.layout, self.group, &[hash], now).pop().unwrap_or(Leasing::Miss)
    }

    /// One of its blocks.
    pub fn block(&self, hash: SequenceHash) -> BlockRef<'_> {
        BlockRef { layout: &self.layout, group: self.group, hash }
    }
}

impl Stack {
    /// A read of one tier. Where it does not give the block, the next tier fills the same slot, at once and whoever waits.
    fn read_of(self: &Arc<Self>, tier: Tier, flying: Flying, fill: BlockFill) -> Read {
        let stack = Arc::clone(self);
        let block = flying.block.clone();
        let done = Box::new(move |outcome: Result<Arrived, NotRead>| {
            let flying = Flying { tried: flying.tried.with(tier), ..flying };
            match outcome {
                Ok(arrived) => {
                    let demanded = flying.urgency.priority == Priority::Demand;
                    let landed = stack.land(tier, flying.block.as_ref(), arrived, demanded);
                    stack.end_flight(flying, landed);
                }
                // Its slot is given back at once; whoever waits asks again after a while.
                Err(NotRead { why: WhyNotRead::Busy, .. }) => drop(flying.told.send(Landed::Busy)),
                Err(NotRead { fill: Some(fill), .. }) => stack.fly_on(flying, fill),
                Err(NotRead { fill: None, .. }) => stack.end_flight(flying, Landed::Superseded),
            }
        });
        Read { block, fill, done }
    }

    fn fly_on(self: &Arc<Self>, flying: Flying, fill: BlockFill) {
        let Some(lower) = self.source(&flying.block.as_ref(), flying.tried) else {
            drop(fill);
            return self.end_flight(flying, Landed::Nowhere);
        };
        let urgency = flying.urgency;
        let read = self.read_of(lower.tier, flying, fill);
        Arc::clone(&lower.store).read(vec![read], urgency);
    }

    fn end_flight(&self, flying: Flying, landed: Landed) {
        // Whoever waited may have left.
        let _ = flying.told.send(landed);
        self.landed.notify_waiters();
    }

    /// A block arrived from `tier`: it is readable from now on, and what was asked for may be worth a copy in a faster tier.
    fn land(&self, tier: Tier, block: BlockRef<'_>, arrived: Arrived, demanded: bool) -> Landed {
        let Arrived { filled, sums, parent } = arrived;
        let (published, leased) = filled.publish(false);
        let (Publish::Published, Some(leased)) = (published, leased) else { return Landed::Superseded };
        if demanded {
            self.copy_up(tier, &block, parent, sums, leased.len() as u64);
        }
        Landed::Here(leased)
    }
}
