//! Promoting: a block from disk into memory, once for all who ask for it.

use std::sync::Arc;

use kvstore_transfer::Lane;
use tokio::sync::oneshot;

use super::format::padded;
use super::read::Wanted;
use super::{BlockRef, NvmeTier};
use crate::clock::BootTime;
use crate::host::{BeginFill, FillRequest, LeasedBlock, SlabPlan};
use crate::meter::ReadRate;
use crate::residency::{FlightSource, Priority, Urgency};

/// What came of [`NvmeTier::promote`].
pub enum Promote {
    /// On its way into memory: the channel brings the block, leased, or nothing where it could not be read.
    Started(oneshot::Receiver<Option<LeasedBlock>>),
    /// Readable in memory already.
    Resident,
    /// Somebody brings it already: see [`NvmeTier::promoted`].
    InFlight,
    /// Make this slab, then ask again.
    NeedsSlab(SlabPlan),
    /// No room in memory, or the lane is full.
    Busy,
    /// It is brought ahead of need, and what would leave memory for it is worth more.
    Outranked,
    /// Not on disk.
    Absent,
}

impl NvmeTier {
    /// Starts to bring a block into memory. Never waits.
    pub fn promote(&self, block: &BlockRef<'_>, priority: Priority, deadline: BootTime, now: BootTime) -> Promote {
        let Some(group) = block.layout.group(u32::from(block.group)) else { return Promote::Absent };
        let lane = match priority {
            Priority::Demand => Lane::Demand,
            Priority::Prefetch => Lane::Prefetch,
            Priority::Writeback => Lane::Writeback,
        };
        let found = self.stores.iter().find_map(|store| {
            let digest = self.digest(store, block);
            let entry = store.begin_read(digest)?;
            if priority == Priority::Demand {
                // A read from disk says as much for a block as one from memory.
                store.state.lock().extents.touch(digest);
            }
            Some((store, entry))
        });
        let Some((store, entry)) = found else { return Promote::Absent };
        let request = FillRequest {
            layout: block.layout,
            group: block.group,
            hash: block.hash,
            parent: None,
            length: group.block_bytes as u32,
            urgency: Urgency { source: FlightSource::Promotion, priority, deadline },
        };
        let outcome = match self.host.begin_fill(&request, now) {
            BeginFill::Fill(fill, ahead) => {
                if let Some(plan) = ahead {
                    self.host.drop_plan(plan);
                }
                let Some(fill) = fill.into_transfer() else {
                    store.end_read(&entry);
                    return Promote::Busy;
                };
                let wanted = Wanted {
                    namespace_digest: block.layout.namespace_digest,
                    layout_digest: block.layout.digest,
                    group: block.group,
                    kind: group.group.kind.number(),
                    hash: padded(&block.hash),
                    block_bytes: group.block_bytes,
                    varies: group.group.kind.varies_in_length(),
                };
                let (send, receive) = oneshot::channel();
                let peers = Arc::clone(&self.peers);
                let reading = peers.meter.begin(entry.extent.bytes());
                let done = Box::new(move |block: Option<LeasedBlock>| {
                    if block.is_some() {
                        reading.done();
                    }
                    let _ = send.send(block);
                    peers.promoted.notify_waiters();
                });
                let queued = store.read(entry, wanted, fill, lane, done);
                return if queued { Promote::Started(receive) } else { Promote::Busy };
            }
            BeginFill::Resident => Promote::Resident,
            BeginFill::InFlight => {
                store.volume.raise(entry.digest.tag(), lane);
                Promote::InFlight
            }
            BeginFill::NeedsSlab(plan) => Promote::NeedsSlab(plan),
            BeginFill::Outranked => Promote::Outranked,
            BeginFill::Busy | BeginFill::Wait => Promote::Busy,
        };
        store.end_read(&entry);
        outcome
    }

    /// How fast the disks are read.
    pub fn read_rate(&self) -> ReadRate {
        self.peers.meter.rate()
    }

    /// Resolves after the next promotion ended: for those that wait for somebody else's.
    pub fn promoted(&self) -> tokio::sync::futures::Notified<'_> {
        self.peers.promoted.notified()
    }
}
