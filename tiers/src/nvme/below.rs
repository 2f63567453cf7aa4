//! The disks as a tier below memory: see [`crate::below`].

use std::sync::Arc;

use kvstore_transfer::Lane;

use super::read::Reading;
use super::{NvmeTier, WriteBack};
use crate::below::{Ask, Below, Known, NotRead, Read, ReadUrgency, Room, WhyNotRead, Write, Written};
use crate::block::{BlockRef, Run, Wanted};
use crate::meter::ReadRate;
use crate::residency::Priority;

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
        let written = self.write_back(&block.as_ref(), parent, sums, awaited);
        // It is leased for its way to the disk by now.
        drop(leased);
        match written {
            WriteBack::Queued(waiting) => Written::Coming(waiting),
            WriteBack::Refused => Written::Refused,
        }
    }

    fn room(&self, _wanted: bool) -> Room<'_> {
        let freed = self.peers.cleaned.notified();
        Room { is_there: self.has_dirty_room(), answers: true, freed }
    }
}

impl NvmeTier {
    fn read_one(&self, read: Read, priority: Priority) {
        let Read { block, fill, done } = read;
        let lane = match priority {
            Priority::Demand => Lane::Demand,
            Priority::Prefetch => Lane::Prefetch,
            Priority::Writeback => Lane::Writeback,
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
