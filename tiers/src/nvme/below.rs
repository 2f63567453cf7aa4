//! The disks as a tier below memory: see [`crate::below`].

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use kvstore_transfer::Lane;

use super::read::Reading;
use super::{BegunWrite, NvmeTier, PinRefused};
use crate::below::{
    Ask, Below, Hold, Holding, Known, NotDeleted, NotHeld, NotRead, Read, ReadUrgency, Room, WhyNotRead, Write, Written,
};
use crate::block::{BlockRef, OwnedRun, Run, Wanted};
use crate::host::{HoldId, HoldKind};
use crate::meter::ReadRate;
use crate::slots::{Delete, Priority};

impl Below for NvmeTier {
    fn presence(&self, run: &Run<'_>, ask: Ask) -> Known {
        let present = match ask {
            Ask::Look | Ask::Search(_) => self.present(run, |extents, digest| extents.get(digest).is_some()),
            Ask::Want(now) => {
                let second = self.second(now);
                self.present(run, |extents, digest| extents.mark_used(digest, second))
            }
            Ask::Read => self.present(run, |extents, digest| {
                extents.touch(digest);
                extents.get(digest).is_some()
            }),
            Ask::Coming => run.blocks().map(|block| self.will_have(&block)).collect(),
            Ask::Held => run.blocks().map(|block| self.is_pinned(&block)).collect(),
            Ask::Hurry => {
                for store in &self.stores {
                    run.digests(store.header.seed)
                        .into_iter()
                        .for_each(|digest| store.volume.raise(digest.tag(), Lane::Demand));
                }
                return Known::default();
            }
        };
        present.into()
    }

    fn read(self: Arc<Self>, reads: Vec<Read>, urgency: ReadUrgency) {
        for read in reads {
            self.read_one(read, urgency.priority);
        }
    }

    fn write(self: Arc<Self>, write: Write) -> Written {
        let Write { block, parent, sums, leased, awaited, has_waited: _ } = write;
        let written = self.begin_write(&block.as_ref(), parent, sums, awaited);
        // It is leased for its way to the disk by now.
        drop(leased);
        match written {
            BegunWrite::Queued(waiting) => Written::Coming(waiting),
            BegunWrite::Refused => Written::Refused,
        }
    }

    fn room(&self, _wanted: bool) -> Room<'_> {
        let freed = self.peers.cleaned.notified();
        Room { is_there: self.has_dirty_room(), answers: true, freed }
    }

    fn hold(self: Arc<Self>, hold: Hold) -> Result<Holding, NotHeld> {
        let blocks: Vec<BlockRef<'_>> = hold.runs.iter().flat_map(|run| run.as_ref().blocks()).collect();
        let lasting = hold.kind == HoldKind::Pin;
        let pinned = self.pin(hold.id.0, &blocks, hold.expires, lasting, hold.now);
        pinned.map_err(|refused| match refused {
            PinRefused::TooLarge { .. } => NotHeld::TooLarge(refused.to_string()),
            PinRefused::TooManyBytes { .. } | PinRefused::TooMany => NotHeld::TooMuch(refused.to_string()),
        })?;
        Ok(lasting.then(|| {
            let synced = self.synced();
            let held = async move {
                let not_recorded = || NotHeld::Failed("the disk could not record the pin".into());
                synced.await.then_some(()).ok_or_else(not_recorded)
            };
            held.boxed()
        }))
    }

    fn release(self: Arc<Self>, id: HoldId, kind: HoldKind) -> bool {
        self.unpin(id.0, kind == HoldKind::Pin)
    }

    fn delete(self: Arc<Self>, run: OwnedRun) -> BoxFuture<'static, Result<Vec<Delete>, NotDeleted>> {
        let mut deleting = self.deletions.begin();
        let outcomes = NvmeTier::delete(&self, &run.layout, run.group, &run.hashes);
        deleting.has_deleted = outcomes.contains(&Delete::Deleted);
        let safe = async move {
            if deleting.needs_sync() {
                let owed = deleting.owed();
                if !self.synced().await {
                    let problem = "the blocks are deleted, but the disk's index could not be written: they may come back after a crash; delete them again once the disk takes writes";
                    return Err(NotDeleted(problem.into()));
                }
                deleting.synced(owed);
            }
            Ok(outcomes)
        };
        safe.boxed()
    }
}

impl NvmeTier {
    fn read_one(&self, read: Read, priority: Priority) {
        let Read { block, fill, done } = read;
        let lane = match priority {
            Priority::Demand => Lane::Demand,
            Priority::Prefetch => Lane::Prefetch,
            Priority::Background => Lane::Background,
        };
        let block = block.as_ref();
        let found = self.stores.iter().find_map(|store| {
            let digest = block.digest(store.header.seed);
            let entry = store.begin_read(digest)?;
            if priority == Priority::Demand {
                // A read from disk says as much for a block as one from memory.
                store.state.lock().extents.touch(digest);
            }
            Some((store, entry))
        });
        let Some((store, entry)) = found else {
            return done(Err(NotRead { fill: Some(fill), why: WhyNotRead::Absent }));
        };
        let Some(wanted) = Wanted::of(&block) else {
            store.end_read(&entry);
            return done(Err(NotRead { fill: Some(fill), why: WhyNotRead::Absent }));
        };
        let Some((ticket, slot)) = fill.into_transfer() else {
            store.end_read(&entry);
            return done(Err(NotRead { fill: None, why: WhyNotRead::Absent }));
        };
        let metered = self.peers.meter.begin(entry.extent.bytes());
        let done = Box::new(move |outcome: Result<_, _>| {
            if outcome.is_ok() {
                metered.done();
            }
            done(outcome);
        });
        store.read(Reading { entry, wanted, ticket, done }, slot, lane);
    }

    /// True where a block is on disk, or on its way there.
    fn will_have(&self, block: &BlockRef<'_>) -> bool {
        self.stores.iter().any(|store| {
            let digest = block.digest(store.header.seed);
            let state = store.state.lock();
            let pending = state.pending.get(digest).is_some_and(|pending| !pending.cancelled);
            !state.health.left && (pending || state.extents.get(digest).is_some())
        })
    }

    /// How fast the disks are read.
    pub fn read_rate(&self) -> ReadRate {
        self.peers.meter.rate()
    }
}
