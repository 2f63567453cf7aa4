//! Deleting: a pack without some of its blocks. The others are written to packs of their own first, frame by frame as they are;
//! then the old one goes. Copies in packs that this node does not know of, another's branches, go with the collector.
//!
//! An answer OK is a promise: the blocks do not come back, whatever is killed afterwards. So an upload that is being written just
//! now is waited for, that it is not owed any more is on the disk first, and a store that cannot be searched is an error.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use kvstore_plane::SequenceHash;
use kvstore_transfer::frame::FrameHeader;
use object_store::ObjectMeta;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::Pack;
use super::pack::{Footer, PackedBlock};
use super::proof::is_sound;
use super::write::Packing;
use crate::block::Digest;
use crate::bucket::Trouble;
use crate::caps;
use crate::host::RegisteredLayout;

/// A pack that comes damaged is read so often: what was damaged on its way comes right.
const READS_MAX: usize = 3;

impl ObjectTier {
    /// Deletes blocks from the bucket, as far as this node knows where they are; those that it deleted. They are not uploaded
    /// any more, either. Where the future is dropped, some may be deleted.
    pub async fn delete(
        self: &Arc<Self>,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
    ) -> Result<HashSet<SequenceHash>, Trouble> {
        self.until_not_uploaded(layout, group, hashes).await?;
        let digests: Vec<Digest> = hashes.iter().map(|hash| self.digest(layout, group, hash)).collect();
        let unwanted: HashSet<Digest> = digests.iter().copied().collect();
        let (mut deleted, mut nowhere) = (HashSet::new(), HashSet::new());
        // A block may be in a second pack, which shows once the first is gone. Where nothing was, nothing shows.
        for _ in 0..caps::OBJECT_BRANCHES_MAX {
            self.search_anew(layout, group, hashes, &mut nowhere).await?;
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
                return Ok(deleted);
            }
            for pack in packs.values() {
                let deadline = Instant::now() + self.write_time(pack.bytes);
                for other in self.packs_beside(layout, group, pack, deadline).await? {
                    if other.blocks.iter().any(|block| unwanted.contains(&block.digest)) {
                        self.without(layout, group, &other, &unwanted).await?;
                    }
                }
                self.without(layout, group, pack, &unwanted).await?;
            }
        }
        Err(Trouble::Failed("there are too many objects with these blocks to delete them in one call".into()))
    }

    /// Blocks that wait to be uploaded are not, and those that are being written just now are in the bucket, or not. A restart
    /// does not upload them either.
    async fn until_not_uploaded(
        self: &Arc<Self>,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
    ) -> Result<(), Trouble> {
        let unwanted: HashSet<SequenceHash> = hashes.iter().copied().collect();
        let deadline = Instant::now() + self.write_time(2 * caps::OBJECT_PACK_BYTES);
        loop {
            let cancelled = self.uploads.lock().cancel(layout, group, &unwanted);
            for batch in cancelled {
                self.drop_batch(batch);
            }
            let digests = hashes.iter().map(|hash| self.digest(layout, group, hash));
            let under_way: Vec<oneshot::Receiver<bool>> = self.uploads.lock().unwanted(digests);
            if under_way.is_empty() {
                break;
            }
            for upload in under_way {
                // However it ended. One that failed may wait for its next try by now, and is cancelled.
                if tokio::time::timeout_at(deadline, upload).await.is_err() {
                    return Err(Trouble::Failed("some of the blocks are being uploaded just now".into()));
                }
            }
        }
        let tier = Arc::clone(self);
        let synced = tokio::task::spawn_blocking(move || tier.sync_log()).await;
        synced.map_err(std::io::Error::other).flatten().map_err(|error| {
            Trouble::Failed(format!("the upload log cannot be written, so a restart would upload the blocks: {error}"))
        })
    }

    async fn without(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        pack: &Arc<Pack>,
        unwanted: &HashSet<Digest>,
    ) -> Result<(), Trouble> {
        let deadline = Instant::now() + self.write_time(pack.bytes);
        let wanted = pack.blocks.iter().filter(|block| !unwanted.contains(&block.digest)).count();
        if wanted > 0 {
            // What is kept of it is in memory until it is written again, and beside it what comes when it is read once more.
            let _room = self.rewritten_bytes.room(2 * pack.bytes, deadline).await?;
            let read = self.read_wanted(layout, group, pack, unwanted, deadline).await;
            let (object, blocks) = match read {
                Err(Trouble::NotFound) => {
                    self.state.lock().directory.remove(pack);
                    return Ok(());
                }
                read => read?,
            };
            if blocks.len() < wanted {
                let lost = wanted - blocks.len();
                tracing::warn!(pack = %pack.location, lost, "damaged blocks go with the blocks that are deleted");
            }
            let follows = |a: &PackedBlock, b: &PackedBlock| a.offset + a.frame_bytes == b.offset;
            for run in blocks.chunk_by(follows) {
                self.write_again(layout, group, &object, run, deadline).await?;
            }
        }
        self.bucket.delete(&pack.location, deadline).await?;
        self.state.lock().directory.remove(pack);
        Ok(())
    }

    /// A pack's bytes, and those of its blocks that stay and are what their frames say, which need no footer for that. It is read
    /// again where one is not.
    async fn read_wanted(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        pack: &Pack,
        unwanted: &HashSet<Digest>,
        deadline: Instant,
    ) -> Result<(Bytes, Vec<PackedBlock>), Trouble> {
        let footer = footer_of(layout, group, [0; 16], Vec::new());
        let wanted: Vec<_> = pack.blocks.iter().filter(|block| !unwanted.contains(&block.digest)).collect();
        let mut best = (Bytes::new(), Vec::new());
        let mut there = pack.bytes;
        for _ in 0..READS_MAX {
            let (object, _): (Bytes, ObjectMeta) = match self.bucket.read(&pack.location, 0..there, deadline).await {
                // It was cut: what is left of it may be whole. Of nothing there is no range.
                Err(Trouble::Cut { bytes: 0, .. }) => break,
                Err(Trouble::Cut { bytes, .. }) => {
                    there = bytes;
                    continue;
                }
                read => read?,
            };
            let sound = |packed: &&super::directory::Packed| {
                let frame = object.get(packed.offset as usize..);
                let (bytes, length) = FrameHeader::decode(frame?).ok()?.identity.hash;
                let hash = SequenceHash::new(bytes.get(..usize::from(length))?).ok()?;
                let block = PackedBlock { hash, offset: packed.offset, frame_bytes: packed.frame_bytes };
                let ours = self.digest(layout, group, &hash) == packed.digest && is_sound(&block, &footer, frame);
                ours.then_some(block)
            };
            let blocks: Vec<PackedBlock> = wanted.iter().copied().filter_map(|packed| sound(&packed)).collect();
            if best.0.is_empty() || blocks.len() > best.1.len() {
                best = (object, blocks);
            }
            if best.1.len() == wanted.len() {
                break;
            }
        }
        Ok(best)
    }

    /// Some neighbouring frames of an object, as a pack of their own.
    async fn write_again(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        object: &Bytes,
        run: &[PackedBlock],
        deadline: Instant,
    ) -> Result<(), Trouble> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(()) };
        let range = first.offset as usize..(last.offset + last.frame_bytes) as usize;
        let moved = |block: &PackedBlock| PackedBlock { offset: block.offset - first.offset, ..*block };
        let nonce = self.next_id().to_le_bytes();
        let footer = footer_of(layout, group, nonce, run.iter().map(moved).collect());
        let footer_bytes = Bytes::from(footer.encode());
        let bytes = range.len() as u64 + footer_bytes.len() as u64;
        let pieces = vec![object.slice(range), footer_bytes.clone()];
        self.store_packing(layout, &Packing { pieces, bytes, footer, footer_bytes }, deadline).await
    }
}

fn footer_of(layout: &RegisteredLayout, group: u16, nonce: [u8; 16], blocks: Vec<PackedBlock>) -> Footer {
    Footer { namespace_digest: layout.namespace_digest, layout_digest: layout.digest, group, nonce, blocks }
}
