//! Promote: brings blocks from disk into memory, for whoever reads them or will.

use std::sync::Arc;

use kvstore_tiers::SequenceHash;
use kvstore_tiers::host::{LeasedBlock, Leasing, RegisteredLayout};
use kvstore_tiers::nvme::{BlockRef, NvmeTier, Promote};
use kvstore_tiers::residency::Priority;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::daemon::Daemon;
use crate::{caps, clock};

/// A block on its way from disk.
pub enum Coming {
    /// It is decided already.
    Now(Leasing),
    /// The channel brings it, or nothing.
    Soon(oneshot::Receiver<Option<LeasedBlock>>),
    /// Somebody else brings it, or there is no room yet: to be asked for again.
    Later,
}

/// The blocks that a call wants, and how urgently.
pub struct Promoter {
    /// The daemon.
    pub daemon: Arc<Daemon>,
    /// Its Nvme tier.
    pub nvme: Arc<NvmeTier>,
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
        let now = clock::now();
        let left = self.deadline.saturating_duration_since(Instant::now());
        let deadline = now.plus_ms(left.as_millis() as u64);
        for _ in 0..caps::SLABS_PER_FILL_MAX {
            match self.nvme.promote(&self.block(hash), self.priority, deadline, now) {
                Promote::Started(block) => return Coming::Soon(block),
                // In memory alone, or come into it just now.
                Promote::Absent => return Coming::Now(self.lease(hash)),
                Promote::Resident => match self.lease(hash) {
                    Leasing::Miss => {}
                    leasing => return Coming::Now(leasing),
                },
                Promote::InFlight | Promote::Busy => return Coming::Later,
                Promote::NeedsSlab(plan) => {
                    let host = Arc::clone(&self.daemon.host);
                    let made = tokio::task::spawn_blocking(move || host.make_slab(plan)).await;
                    if let Ok(Err(error)) = made {
                        tracing::warn!(%error, "no memory for a slab");
                        return Coming::Later;
                    }
                }
            }
        }
        Coming::Later
    }

    /// Waits until the block is there, or is not to be had: nobody has it, or the deadline passed.
    pub async fn finish(&self, hash: SequenceHash, coming: Coming) -> Leasing {
        let mut coming = coming;
        loop {
            match coming {
                Coming::Now(leasing) => return leasing,
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
                    // Woken by the end of any promotion; the poll is for room that others make.
                    let _ = tokio::time::timeout(caps::PROMOTE_POLL, self.nvme.promoted()).await;
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
