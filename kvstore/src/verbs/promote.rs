//! Promote: brings blocks from disk or from the bucket into memory, for gets and prefetches.

use std::sync::Arc;

use kvstore_tiers::host::{LeasedBlock, Leasing, RegisteredLayout};
use kvstore_tiers::nvme::{BlockRef, Promote};
use kvstore_tiers::object::ReadBatch;
use kvstore_tiers::residency::{Presence, Priority};
use kvstore_tiers::{BootTime, SequenceHash};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::admission::Occasion;
use crate::daemon::Daemon;
use crate::{caps, clock};

/// A block on its way from a lower tier.
pub enum Coming {
    /// It is decided already.
    Now(Leasing),
    /// The channel brings it, or nothing.
    Soon(oneshot::Receiver<Option<LeasedBlock>>),
    /// Somebody else brings it, or there is no room yet: to be asked for again.
    Later,
    /// It is brought ahead of need, and what would leave memory for it is worth more.
    Outranked,
}

/// The blocks that a call wants, and how urgently.
pub struct Promoter {
    /// The daemon.
    pub daemon: Arc<Daemon>,
    /// The layout of all blocks.
    pub layout: Arc<RegisteredLayout>,
    /// Their group.
    pub group: u16,
    /// The lane.
    pub priority: Priority,
    /// Nobody waits any more.
    pub deadline: Instant,
}

impl Promoter {
    /// Starts to bring a block, making a slab where one is needed.
    pub async fn start(&self, hash: SequenceHash) -> Coming {
        let mut batch = ReadBatch::default();
        let coming = self.start_in(&mut batch, hash).await;
        self.send(batch);
        coming
    }

    /// The same, as a part of `batch`: what comes from the bucket and lies side by side there comes together. Nothing of it
    /// comes before [`Self::send`].
    pub async fn start_in(&self, batch: &mut ReadBatch, hash: SequenceHash) -> Coming {
        let now = clock::now();
        let left = self.deadline.saturating_duration_since(Instant::now());
        let deadline = now.plus_ms(left.as_millis() as u64);
        for _ in 0..caps::SLABS_PER_FILL_MAX {
            match self.promote(batch, hash, deadline, now) {
                Promote::Started(block) => return Coming::Soon(block),
                // In memory alone, or come into it just now.
                Promote::Absent => return Coming::Now(self.lease(hash)),
                Promote::Resident => match self.lease(hash) {
                    Leasing::Miss => {}
                    leasing => return Coming::Now(leasing),
                },
                Promote::InFlight | Promote::Busy => return Coming::Later,
                Promote::Outranked => return Coming::Outranked,
                Promote::NeedsSlab(plan) => {
                    let host = Arc::clone(&self.daemon.host);
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

    /// From the fastest tier that has it.
    fn promote(&self, batch: &mut ReadBatch, hash: SequenceHash, deadline: BootTime, now: BootTime) -> Promote {
        let block = self.block(hash);
        let from_disk = self.daemon.nvme.as_ref().map(|nvme| nvme.promote(&block, self.priority, deadline, now));
        match (from_disk, &self.daemon.object) {
            (None | Some(Promote::Absent), Some(object)) => {
                // Prefetches may be for nothing; what is asked for now is worth a write, by the same rules as what is put.
                let keeps = || {
                    self.priority == Priority::Demand
                        && self.daemon.admitter.admits(&self.layout, self.group, &hash, Occasion::Promoted, now)
                };
                object.promote(batch, &block, &self.layout, self.priority, keeps, deadline, now)
            }
            (from_disk, _) => from_disk.unwrap_or(Promote::Absent),
        }
    }

    /// Makes the requests of a batch.
    pub fn send(&self, mut batch: ReadBatch) {
        if let Some(object) = &self.daemon.object {
            object.send(&mut batch, self.priority, self.deadline);
        }
    }

    /// Which blocks lower tiers have. What is in the bucket, and nobody here knows of, is looked for first, until the deadline
    /// at most.
    pub async fn below(&self, hashes: &[SequenceHash]) -> Vec<bool> {
        let mut below = match &self.daemon.nvme {
            Some(nvme) => nvme.presence(&self.layout, self.group, hashes),
            None => vec![false; hashes.len()],
        };
        let Some(object) = &self.daemon.object else { return below };
        let presences = self.daemon.host.presence(&self.layout, self.group, hashes);
        let is_here = |(presence, below): (&Presence, &bool)| *presence == Presence::Resident || *below;
        let here = presences.iter().zip(&below).take_while(|both| is_here(*both)).count();
        let unknown = hashes.get(here..).unwrap_or_default();
        if let Some(searching) = object.search(&self.layout, self.group, unknown, clock::now()) {
            let _ = tokio::time::timeout_at(self.deadline, searching.ended()).await;
        }
        let in_bucket = object.presence(&self.layout, self.group, hashes);
        below.iter_mut().zip(in_bucket).for_each(|(below, in_bucket)| *below |= in_bucket);
        below
    }

    /// Blocks that are brought ahead of the one that is used: what the device does at once; where there is a bucket, enough to
    /// keep several streams busy, and no more than an eighth of the memory.
    pub fn window(&self) -> usize {
        let block_bytes = self.layout.group(u32::from(self.group)).map_or(1, |group| group.block_bytes.max(1));
        let memory = self.memory_blocks() / 8;
        match &self.daemon.object {
            None => caps::PROMOTIONS_PER_CALL,
            Some(_) => ((caps::OBJECT_WINDOW_BYTES / block_bytes) as usize)
                .min(memory)
                .clamp(caps::PROMOTIONS_PER_CALL, caps::BLOCKS_PER_GET_WINDOW),
        }
    }

    /// Blocks that fit the memory.
    pub fn memory_blocks(&self) -> usize {
        let block_bytes = self.layout.group(u32::from(self.group)).map_or(1, |group| group.block_bytes.max(1));
        (self.daemon.host.limits().bytes / block_bytes) as usize
    }

    /// True where the block is pinned, and is nowhere: a loss.
    pub fn is_pinned(&self, hash: SequenceHash) -> bool {
        self.daemon.nvme.as_ref().is_some_and(|nvme| nvme.is_pinned(&self.block(hash)))
    }

    /// Woken by the end of any promotion; the time is for room that others make.
    async fn some_promotion(&self) {
        let disk = async {
            match &self.daemon.nvme {
                Some(nvme) => nvme.promoted().await,
                None => std::future::pending().await,
            }
        };
        let bucket = async {
            match &self.daemon.object {
                Some(object) => object.promoted().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = disk => {}
            () = bucket => {}
            () = tokio::time::sleep(caps::PROMOTE_POLL) => {}
        }
    }

    /// Waits until the block is there, or is not to be had: nobody has it, or the deadline passed.
    pub async fn finish(&self, hash: SequenceHash, coming: Coming) -> Leasing {
        let mut coming = coming;
        loop {
            match coming {
                Coming::Now(leasing) => return leasing,
                Coming::Outranked => return Leasing::Miss,
                Coming::Soon(block) => {
                    return match tokio::time::timeout_at(self.deadline, block).await {
                        Ok(Ok(Some(block))) => Leasing::Leased(block),
                        // Damaged here: a copy elsewhere is found by asking again; none ends as a miss.
                        Ok(_) => match self.start(hash).await {
                            Coming::Now(leasing) => leasing,
                            _ => Leasing::InFlight,
                        },
                        Err(_) => Leasing::InFlight,
                    };
                }
                Coming::Later => {
                    if Instant::now() >= self.deadline {
                        return Leasing::InFlight;
                    }
                    self.some_promotion().await;
                    coming = self.start(hash).await;
                }
            }
        }
    }

    fn lease(&self, hash: SequenceHash) -> Leasing {
        let mut leased = self.daemon.host.lease_run(&self.layout, self.group, &[hash], clock::now());
        leased.pop().unwrap_or(Leasing::Miss)
    }

    /// A block's name, as the tier takes it.
    pub fn block(&self, hash: SequenceHash) -> BlockRef<'_> {
        BlockRef { layout: &self.layout, group: self.group, hash }
    }
}
