//! The bucket as a tier below memory: see [`crate::below`].

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use kvstore_plane::SequenceHash;

use super::ObjectTier;
use super::upload::{Offer, Offered};
use crate::below::{Ask, Below, Hold, Holding, Known, NotDeleted, NotHeld, Read, ReadUrgency, Room, Write, Written};
use crate::block::{OwnedRun, Run};
use crate::host::{HoldId, HoldKind};
use crate::slots::Delete;

impl Below for ObjectTier {
    fn presence(&self, run: &Run<'_>, ask: Ask) -> Known {
        // First: what a search found that has ended by now is seen below.
        let searching = match ask {
            Ask::Search(now) => {
                self.this.upgrade().and_then(|this| this.search(run.layout, run.group, run.hashes, now))
            }
            _ => None,
        };
        let mut there = self.presence(run.layout, run.group, run.hashes);
        match ask {
            Ask::Look | Ask::Want(_) | Ask::Read | Ask::Hurry | Ask::Search(_) => {}
            Ask::Coming => {
                let uploads = self.uploads.lock();
                let waits = |hash: &SequenceHash| uploads.has(self.digest(run.layout, run.group, hash));
                there.iter_mut().zip(run.hashes).for_each(|(there, hash)| *there |= waits(hash));
            }
            // A reference in the bucket binds collectors, not who deletes: see `hold`.
            Ask::Held => there.fill(false),
        }
        Known { there, searching }
    }

    fn read(self: Arc<Self>, reads: Vec<Read>, urgency: ReadUrgency) {
        self.read_blocks(reads, urgency);
    }

    fn write(self: Arc<Self>, write: Write) -> Written {
        let Write { block, parent, sums, leased, awaited, has_waited } = write;
        let lease = || self.host.lease_quietly(block.layout.namespace, &block.as_ref().key());
        // Gone again already: then it is nobody's any more.
        let Some(leased) = leased.or_else(lease) else { return Written::Refused };
        let (layout, group, hash) = (block.layout, block.group, block.hash);
        let offer = Offer { layout, group, hash, parent, block: leased, sums, durable: awaited, has_waited };
        match self.offer(offer) {
            Offered::Accepted(waiting) => Written::Coming(waiting),
            Offered::Full => Written::Refused,
        }
    }

    fn room(&self, wanted: bool) -> Room<'_> {
        let freed = self.uploaded();
        let is_there = self.has_upload_room();
        if wanted && !is_there {
            // What makes the room may be what is being put together.
            self.make_room();
        }
        Room { is_there, answers: self.answers(), freed }
    }

    /// A pin is a reference in the bucket: no collector deletes its blocks. A ticket ends long before a collector would come.
    fn hold(self: Arc<Self>, hold: Hold) -> Result<Holding, NotHeld> {
        match hold.kind {
            HoldKind::Ticket => Ok(None),
            HoldKind::Pin => {
                let [run] = <[OwnedRun; 1]>::try_from(hold.runs)
                    .map_err(|_| NotHeld::Failed("a pin in the bucket is of one run".into()))?;
                let ttl_ms = hold.expires.0.saturating_sub(hold.now.0);
                let referred = self.refer_whoever_waits(hold.id.0, run, ttl_ms);
                Ok(Some(referred.map_err(|trouble| NotHeld::Failed(trouble.to_string())).boxed()))
            }
        }
    }

    fn release(self: Arc<Self>, id: HoldId, kind: HoldKind) -> bool {
        if kind == HoldKind::Pin {
            self.end_reference(id.0);
        }
        // Whether there was one nobody knows before the store says so.
        false
    }

    fn delete(self: Arc<Self>, run: OwnedRun) -> BoxFuture<'static, Result<Vec<Delete>, NotDeleted>> {
        let deleted = async move {
            let deleted = ObjectTier::delete(&self, &run.layout, run.group, &run.hashes).await.map_err(|trouble| {
                NotDeleted(format!(
                    "the blocks were not deleted from the object store: {trouble}; delete them again once the store answers"
                ))
            })?;
            let of = |hash: &SequenceHash| if deleted.contains(hash) { Delete::Deleted } else { Delete::Absent };
            Ok(run.hashes.iter().map(of).collect())
        };
        deleted.boxed()
    }
}
