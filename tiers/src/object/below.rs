//! The bucket as a tier below memory: see [`crate::below`].

use std::sync::Arc;

use kvstore_plane::SequenceHash;

use super::ObjectTier;
use super::upload::{Offer, Offered};
use crate::below::{Ask, Below, Known, Read, ReadUrgency, Room, Write, Written};
use crate::block::Run;

impl Below for ObjectTier {
    fn presence(&self, run: &Run<'_>, ask: Ask) -> Known {
        let mut there = self.presence(run.layout, run.group, run.hashes);
        match ask {
            Ask::Look | Ask::Want(_) | Ask::Read | Ask::Hurry => {}
            Ask::Coming => {
                let uploads = self.uploads.lock();
                let waits = |hash: &SequenceHash| uploads.has(self.digest(run.layout, run.group, hash));
                there.iter_mut().zip(run.hashes).for_each(|(there, hash)| *there |= waits(hash));
            }
            Ask::Search(now) => {
                let this = self.this.upgrade();
                let searching = this.and_then(|this| this.search(run.layout, run.group, run.hashes, now));
                return Known { there, searching };
            }
        }
        there.into()
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
}
