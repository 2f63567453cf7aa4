//! References: what pins keep in the bucket, whatever a collector wants.
//!
//! A reference is written before the pin is acknowledged, and rests on nothing that a collector has said it deletes: `doomed` has
//! the protocol. A collector reads all references before it deletes anything, and those that came since before each batch. What it
//! cannot read, or not all of it, may protect anything: then nothing is deleted.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use kvstore_plane::SequenceHash;
use object_store::path::Path;
use object_store::{ObjectMeta, PutPayload};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ObjectTier;
use super::collect::{CollectError, Listing};
use super::directory::Pack;
use super::names::{BlockName, GroupNames};
use super::proof::Stamp;
use crate::block::OwnedRun;
use crate::bucket::{Lease, Trouble, retried};
use crate::caps;
use crate::host::RegisteredLayout;
use crate::slots::Presence;

/// A promise in the bucket that blocks stay: a pin's.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
struct Reference {
    version: u32,
    /// By the store's clock.
    expires_ms: i64,
    /// Below the root: namespace, layout, group.
    folder: String,
    blocks: Vec<String>,
}

/// Bytes of a reference at most: 65,536 names of 35 bytes.
const REFERENCE_BYTES_MAX: u64 = 4 << 20;
/// References that are read at once.
const READS_AT_ONCE: usize = 16;

/// A reference that is being made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// No request was made yet, or it is under way.
    Wanted,
    /// The same, and it is to be ended.
    Ended,
    /// No request was made, and none will be: there is nothing to end.
    Never,
}

/// A reference of which no request was made. Where it is dropped, none will be.
struct Unsent<'a> {
    tier: &'a ObjectTier,
    id: u128,
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        let mut unfinished = self.tier.unfinished_references.lock();
        match unfinished.get_mut(&self.id) {
            Some(unfinished) if *unfinished == Unfinished::Wanted => *unfinished = Unfinished::Never,
            _ => _ = unfinished.remove(&self.id),
        }
    }
}

/// What a collector knows of the references.
#[derive(Default)]
pub(super) struct References {
    /// Those that were read, and what the store said of them.
    read: HashMap<Path, Stamp>,
    /// What is referred to, by group.
    blocks: HashMap<Path, HashSet<BlockName>>,
    block_count: usize,
}

impl References {
    /// Blocks of a group that are referred to.
    pub fn of(&self, group: &Path) -> Option<&HashSet<BlockName>> {
        self.blocks.get(group)
    }

    /// Reads the references that came since the last time, which takes minutes where there are many: the lease is kept meanwhile.
    pub async fn read_new(&mut self, tier: &ObjectTier, lease: &mut Option<Lease>) -> Result<(), CollectError> {
        let now_ms = tier.bucket.clock.earliest_ms(tier.bucket.now()).ok_or(CollectError::NoTime)?;
        let mut listing = Listing::of(tier, &tier.references_folder());
        let (mut listed, mut new) = (0, Vec::new());
        while let Some(object) = listing.next().await? {
            tier.keep_lease(lease).await?;
            listed += 1;
            if listed > caps::OBJECT_REFERENCES_MAX {
                return Err(CollectError::TooManyReferences(format!("more than {} pins", caps::OBJECT_REFERENCES_MAX)));
            }
            if self.read.get(&object.location) != Some(&Stamp::of(&object)) {
                new.push(object);
            }
        }
        let reads = new.into_iter().map(async |object| (tier.read_reference(&object, now_ms).await, object));
        let reads: Vec<_> = reads.collect();
        let mut reads = futures::stream::iter(reads).buffer_unordered(READS_AT_ONCE);
        while let Some((reference, object)) = reads.next().await {
            tier.keep_lease(lease).await?;
            self.read.insert(object.location.clone(), Stamp::of(&object));
            if let Some(reference) = reference? {
                self.add(tier.names.root(), &reference)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, root: &Path, reference: &Reference) -> Result<(), CollectError> {
        self.block_count += reference.blocks.len();
        if self.block_count > caps::OBJECT_REFERRED_BLOCKS_MAX {
            let most = caps::OBJECT_REFERRED_BLOCKS_MAX;
            return Err(CollectError::TooManyReferences(format!("pins of more than {most} blocks")));
        }
        let blocks = reference.blocks.iter().filter_map(|block| BlockName::parse(block));
        self.blocks.entry(GroupNames::at(root, &reference.folder)).or_default().extend(blocks);
        Ok(())
    }
}

impl ObjectTier {
    fn references_folder(&self) -> Path {
        self.names.root().clone().join("refs")
    }

    fn reference_at(&self, id: u128) -> Path {
        self.references_folder().join(format!("{id:032x}"))
    }

    /// Blocks stay in the bucket for `ttl_ms`, whatever a collector wants: told to the bucket under the name `id`. Fails where a
    /// block that is nowhere else on this node is not in the bucket any more.
    pub async fn refer(
        &self,
        id: u128,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
        ttl_ms: u64,
    ) -> Result<(), Trouble> {
        let deadline = Instant::now() + self.bucket.stall() * 4;
        self.measure_if_old(deadline).await?;
        let now_ms = self.bucket.clock.latest_ms(self.bucket.now());
        let now_ms = now_ms.ok_or_else(|| Trouble::Failed("the store's time is not known".into()))?;
        let reference = Reference {
            version: 1,
            expires_ms: now_ms.saturating_add(ttl_ms as i64),
            folder: self.names.group(layout, group).below(self.names.root()),
            blocks: hashes.iter().map(|hash| BlockName::of(hash).to_string()).collect(),
        };
        let body = serde_json::to_vec(&reference).map_err(|error| Trouble::Failed(error.to_string()))?;
        let (location, mode) = (self.reference_at(id), object_store::PutMode::Overwrite);
        let payload = || PutPayload::from(body.clone());
        retried!(self.bucket, deadline, body.len() as u64, self.bucket.put(&location, payload(), mode.clone()))?;
        let spared = match self.packs_referred_to(layout, group, hashes) {
            Some(packs) => self.until_spared(&packs, deadline).await,
            None => Err(Trouble::NotFound),
        };
        if spared.is_err() {
            // It may stay until its time: it protects what is there.
            let _ = self.bucket.delete(&location, deadline).await;
        }
        spared
    }

    /// The packs that have these blocks, as far as is known; nothing where one of them is neither in a pack nor on this node.
    fn packs_referred_to(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
    ) -> Option<Vec<Arc<Pack>>> {
        let (mut packs, mut elsewhere) = (HashMap::new(), Vec::new());
        {
            let state = self.state.lock();
            for hash in hashes {
                match state.directory.get(self.digest(layout, group, hash)) {
                    Some(place) => _ = packs.insert(Arc::as_ptr(&place.pack), Arc::clone(&place.pack)),
                    None => elsewhere.push(*hash),
                }
            }
        }
        let in_memory = self.host.presence(layout, group, &elsewhere);
        let on_disk = self.nvme.as_ref().map(|nvme| nvme.presence(layout, group, &elsewhere));
        let is_here = |at: usize| {
            in_memory.get(at) == Some(&Presence::Resident)
                || on_disk.as_ref().is_some_and(|on_disk| on_disk.get(at) == Some(&true))
        };
        (0..elsewhere.len()).all(is_here).then(|| packs.into_values().collect())
    }

    /// Does what [`Self::refer`] does, and is not cut off where the caller leaves: the store may have the request already. Where it was
    /// ended meanwhile, what the request then made is ended, too.
    pub(super) async fn refer_whoever_waits(
        self: Arc<Self>,
        id: u128,
        run: OwnedRun,
        ttl_ms: u64,
    ) -> Result<(), Trouble> {
        let stopped = || Trouble::Failed("the daemon is stopping".into());
        self.unfinished_references.lock().insert(id, Unfinished::Wanted);
        let unsent = Unsent { tier: &self, id };
        let permit = Arc::clone(&self.referring).acquire_owned().await.map_err(|_| stopped())?;
        std::mem::forget(unsent);
        let (done, outcome) = oneshot::channel();
        let tier = Arc::clone(&self);
        self.runtime.spawn(async move {
            let referred = tier.refer(id, &run.layout, run.group, &run.hashes, ttl_ms).await;
            let unfinished = tier.unfinished_references.lock().remove(&id);
            if unfinished == Some(Unfinished::Ended) {
                tier.delete_reference(id).await;
            }
            drop(permit);
            let _ = done.send(referred);
        });
        outcome.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Ends a reference before its time, in the background. Where that fails, or too many requests of references are under way, it ends
    /// by its time.
    pub fn end_reference(self: &Arc<Self>, id: u128) {
        let mut unfinished = self.unfinished_references.lock();
        match unfinished.get_mut(&id) {
            Some(Unfinished::Never) => {
                unfinished.remove(&id);
                return;
            }
            Some(unfinished) => {
                *unfinished = Unfinished::Ended;
                return;
            }
            None => drop(unfinished),
        }
        let Ok(permit) = Arc::clone(&self.referring).try_acquire_owned() else { return };
        let tier = Arc::clone(self);
        self.runtime.spawn(async move {
            tier.delete_reference(id).await;
            drop(permit);
        });
    }

    async fn delete_reference(&self, id: u128) {
        let deadline = Instant::now() + self.bucket.stall() * 4;
        if let Err(trouble) = self.bucket.delete(&self.reference_at(id), deadline).await {
            tracing::debug!(%trouble, "a reference in the bucket could not be ended early; it ends at its time");
        }
    }

    /// Reads a reference; nothing where it ended. One whose time is over is deleted.
    async fn read_reference(&self, object: &ObjectMeta, now_ms: i64) -> Result<Option<Reference>, Trouble> {
        let deadline = Instant::now() + self.bucket.stall() * 4;
        let bytes = match self.bucket.read_all(&object.location, REFERENCE_BYTES_MAX, deadline).await {
            Err(Trouble::NotFound) => return Ok(None),
            read => read?.0,
        };
        let reference: Reference = serde_json::from_slice(&bytes)
            .map_err(|error| Trouble::Damaged(format!("the reference {} cannot be read: {error}", object.location)))?;
        if reference.version != 1 {
            let problem = format!(
                "the reference {} has version {}, which this build does not know",
                object.location, reference.version
            );
            return Err(Trouble::Unsupported(problem));
        }
        if reference.expires_ms <= now_ms {
            let _ = self.bucket.delete(&object.location, deadline).await;
            return Ok(None);
        }
        Ok(Some(reference))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reference as version 1 writes it, which later builds must read.
    #[test]
    fn reference_version_1() {
        let name = BlockName::of(&SequenceHash::new(&[7; 20]).unwrap()).to_string();
        let reference = Reference { version: 1, expires_ms: 12_345, folder: "a/b".into(), blocks: vec![name] };
        let sample = r#"{"version":1,"expires_ms":12345,"folder":"a/b","blocks":["6d083df7e4e3a09ac5a29dad59b9ed2d"]}"#;
        assert_eq!(serde_json::to_string(&reference).unwrap(), sample, "it is written differently now");
        assert_eq!(serde_json::from_str::<Reference>(sample).unwrap(), reference);
    }
}
