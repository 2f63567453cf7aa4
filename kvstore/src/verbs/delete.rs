//! Delete: makes blocks unreadable at once, in every tier.
//!
//! OK is a promise across a crash: what was deleted does not come back. A deletion whose sync failed was not answered OK, and is
//! made up for by the next delete, whichever blocks that one finds: until then the daemon remembers that a sync is owed.

use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_proto::v1::{DeleteRequest, DeleteResponse};
use kvstore_tiers::host::NamespaceId;
use kvstore_tiers::residency::Delete;
use tonic::Status;

use super::until_synced;
use crate::daemon::Daemon;
use crate::{caps, wire};

/// What deletions owe to the disks' indexes.
#[derive(Default)]
pub struct Deletions {
    under_way: AtomicU64,
    /// Deletions that ended without a sync.
    unsynced: AtomicU64,
    /// As many of them as a later sync has made up for.
    made_up: AtomicU64,
}

/// A deletion under way. Dropped before it was synced, it leaves a sync owed.
struct Deleting<'a> {
    of: &'a Deletions,
    has_deleted: bool,
}

impl<'a> Deleting<'a> {
    /// Before the first block goes: who finds a block gone finds the deletion, too.
    fn begin(of: &'a Deletions) -> Self {
        of.under_way.fetch_add(1, Ordering::SeqCst);
        Self { of, has_deleted: false }
    }

    /// True where an answer needs a sync: this deletion found something, or another did and has yet to sync.
    fn needs_sync(&self) -> bool {
        let others = self.of.under_way.load(Ordering::SeqCst) > 1;
        let owed = self.of.unsynced.load(Ordering::SeqCst) > self.of.made_up.load(Ordering::SeqCst);
        self.has_deleted || others || owed
    }

    async fn sync(mut self, daemon: &Daemon) -> Result<(), Status> {
        let unsynced = self.of.unsynced.load(Ordering::SeqCst);
        let problem = "the blocks are deleted, but the disk's index could not be written: they may come back after a crash; delete them again once the disk takes writes";
        until_synced(daemon, problem).await?;
        self.of.made_up.fetch_max(unsynced, Ordering::SeqCst);
        self.has_deleted = false;
        Ok(())
    }
}

impl Drop for Deleting<'_> {
    fn drop(&mut self) {
        if self.has_deleted {
            self.of.unsynced.fetch_add(1, Ordering::SeqCst);
        }
        self.of.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Deletes blocks; pinned ones stay and are counted. The lower tier first: a promotion that began before is
/// then superseded in memory, and none can begin after.
pub async fn delete(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &DeleteRequest,
) -> Result<DeleteResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    let mut deleting = Deleting::begin(&daemon.deletions);
    let mut outcomes = vec![Delete::Absent; hashes.len()];
    let mut in_bucket = std::collections::HashSet::new();
    if let Some(nvme) = &daemon.nvme {
        outcomes = nvme.delete(&layout, group, &hashes);
        deleting.has_deleted = outcomes.contains(&Delete::Deleted);
    }
    if let Some(object) = &daemon.object {
        let unpinned = hashes.iter().zip(&outcomes).filter(|(_, below)| **below != Delete::Pinned);
        let unpinned: Vec<_> = unpinned.map(|(hash, _)| *hash).collect();
        in_bucket = object.delete(&layout, group, &unpinned).await.map_err(|trouble| {
            Status::unavailable(format!(
                "the blocks were not deleted from the object store: {trouble}; delete them again once the store answers"
            ))
        })?;
    }
    let (mut deleted, mut pinned) = (0, 0);
    for (hash, below) in hashes.iter().zip(outcomes) {
        let above = match below {
            Delete::Pinned => vec![],
            _ => daemon.host.delete(&layout, group, &[*hash]),
        };
        match (below, above.first()) {
            (Delete::Pinned, _) | (_, Some(Delete::Pinned)) => pinned += 1,
            (Delete::Deleted, _) | (_, Some(Delete::Deleted)) => deleted += 1,
            _ if in_bucket.contains(hash) => deleted += 1,
            _ => {}
        }
    }
    deleting.has_deleted |= deleted > 0;
    if deleting.needs_sync() {
        deleting.sync(daemon).await?;
    }
    Ok(DeleteResponse { deleted, pinned })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first of two deletions ends without a sync, because its disk failed or its deadline passed. The second one finds nothing
    /// to delete, and must sync all the same; and so on until one does.
    #[test]
    fn a_deletion_that_was_not_synced_leaves_a_sync_owed() {
        let deletions = Deletions::default();
        assert!(!Deleting::begin(&deletions).needs_sync(), "nothing was deleted");
        let mut first = Deleting::begin(&deletions);
        first.has_deleted = true;
        assert!(first.needs_sync());
        assert!(Deleting::begin(&deletions).needs_sync(), "another has deleted, and has yet to sync");
        drop(first);
        let second = Deleting::begin(&deletions);
        assert!(second.needs_sync());
        deletions.made_up.fetch_max(deletions.unsynced.load(Ordering::SeqCst), Ordering::SeqCst);
        assert!(!second.needs_sync(), "a sync made up for it");
    }
}
