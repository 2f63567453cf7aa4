//! Deleting: a pack without some of its blocks. The others are written to packs of their own first, frame by frame as they are;
//! then the old one goes. Copies in packs that this node does not know of, another's branches, go with the collector.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvstore_plane::SequenceHash;
use object_store::PutPayload;
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::Pack;
use super::names::{BlockName, PackName};
use super::pack::{Footer, PackedBlock};
use super::requests::{Trouble, retried};
use crate::block::Digest;
use crate::caps;
use crate::changes::NamespaceTag;
use crate::host::RegisteredLayout;

impl ObjectTier {
    /// Deletes blocks from the bucket, as far as this node knows where they are; those that it deleted. They are not uploaded
    /// any more, either.
    pub async fn delete(
        self: &Arc<Self>,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
    ) -> Result<HashSet<SequenceHash>, Trouble> {
        self.cancel(layout, group, hashes);
        if let Some(searching) = self.search(layout, group, hashes, (self.clock)()) {
            searching.ended().await;
        }
        let digests: Vec<Digest> = hashes.iter().map(|hash| self.digest(layout, group, hash)).collect();
        let unwanted: HashSet<Digest> = digests.iter().copied().collect();
        let mut deleted = HashSet::new();
        // A block may be in a second pack, which shows once the first is gone.
        for _ in 0..caps::OBJECT_BRANCHES_MAX {
            let mut packs: BTreeMap<String, Arc<Pack>> = BTreeMap::new();
            {
                let state = self.state.lock();
                for (hash, digest) in hashes.iter().zip(&digests) {
                    if let Some(place) = state.directory.get(*digest) {
                        deleted.insert(*hash);
                        packs.insert(place.pack.location.to_string(), Arc::clone(&place.pack));
                    }
                }
            }
            if packs.is_empty() {
                break;
            }
            for pack in packs.values() {
                self.without(layout, group, pack, &unwanted).await?;
            }
        }
        Ok(deleted)
    }

    async fn without(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        pack: &Arc<Pack>,
        unwanted: &HashSet<Digest>,
    ) -> Result<(), Trouble> {
        let deadline = Instant::now()
            + Duration::from_millis(caps::OBJECT_STALL_MS * u64::from(caps::OBJECT_TRIES_MAX) + pack.bytes / 1000);
        if !pack.blocks.iter().all(|block| unwanted.contains(&block.digest)) {
            let (object, meta) = match self.bucket.read(&pack.location, 0..pack.bytes, deadline).await {
                Err(Trouble::NotFound) => {
                    self.state.lock().directory.remove(pack);
                    return Ok(());
                }
                read => read?,
            };
            // A footer that is damaged tells no names: the rest is lost with what is to go.
            if let Ok(footer) = Footer::decode(&object, meta.size) {
                let wanted = |block: &&PackedBlock| !unwanted.contains(&self.digest(layout, group, &block.hash));
                for run in
                    footer.blocks.chunk_by(|a, b| wanted(&a) == wanted(&b)).filter(|run| run.iter().all(|b| wanted(&b)))
                {
                    self.write_again(layout, group, &object, &footer, run, deadline).await?;
                }
            }
        }
        self.bucket.delete(&pack.location, deadline).await?;
        self.state.lock().directory.remove(pack);
        Ok(())
    }

    /// Some neighbouring frames of an object, as a pack of their own.
    async fn write_again(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        object: &Bytes,
        footer: &Footer,
        run: &[PackedBlock],
        deadline: Instant,
    ) -> Result<(), Trouble> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(()) };
        let range = first.offset as usize..(last.offset + last.frame_bytes) as usize;
        let moved = |block: &PackedBlock| PackedBlock { offset: block.offset - first.offset, ..*block };
        let nonce = self.next_id().to_le_bytes();
        let new = Footer { nonce, blocks: run.iter().map(moved).collect(), ..footer.clone() };
        let tail = Bytes::from(new.encode());
        let bytes = range.len() as u64 + tail.len() as u64;
        let names = self.names.group(layout, group);
        let (first, last) = (BlockName::of(&first.hash), BlockName::of(&last.hash));
        for rewrite in 0..caps::OBJECT_TRIES_MAX {
            let location = names.pack(&PackName { first, last, rewrite });
            let payload = || [object.slice(range.clone()), tail.clone()].into_iter().collect::<PutPayload>();
            match retried!(self.bucket, deadline, bytes, self.bucket.create(&location, payload())) {
                Ok(()) => {
                    let written_ms = super::probe::now_ms();
                    let blocks = new.blocks.iter().map(|block| self.packed(layout, group, block)).collect();
                    let namespace = NamespaceTag::of(&layout.namespace_digest);
                    self.state.lock().directory.insert(&Pack::new(location, bytes, written_ms, blocks, namespace));
                    return Ok(());
                }
                Err(Trouble::Exists) => {}
                Err(trouble) => return Err(trouble),
            }
        }
        Err(Trouble::Failed("too many objects already have these blocks".into()))
    }

    /// Blocks that wait to be uploaded are not.
    fn cancel(&self, layout: &Arc<RegisteredLayout>, group: u16, hashes: &[SequenceHash]) {
        let unwanted: HashSet<SequenceHash> = hashes.iter().copied().collect();
        let cancelled = self.uploads.lock().cancel(layout, group, &unwanted);
        for batch in cancelled {
            self.drop_batch(batch);
        }
        self.delete_once_written(layout, group, hashes);
    }
}
