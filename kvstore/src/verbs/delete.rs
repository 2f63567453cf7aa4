//! Delete: makes blocks unreadable at once, in every tier. OK is a promise across a crash: what was deleted does not come back.

use kvstore_proto::v1::{DeleteRequest, DeleteResponse};
use kvstore_tiers::host::NamespaceId;
use kvstore_tiers::residency::Delete;
use tonic::Status;

use super::until_synced;
use crate::daemon::Daemon;
use crate::{caps, wire};

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
    let mut deleting = daemon.deletions.begin();
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
    // A copy of what was still in memory may have gone to disk while the bucket was asked.
    if let Some(nvme) = daemon.nvme.as_ref().filter(|_| daemon.object.is_some()) {
        deleting.has_deleted |= nvme.delete(&layout, group, &hashes).contains(&Delete::Deleted);
    }
    deleting.has_deleted |= deleted > 0;
    if deleting.needs_sync() {
        let owed = deleting.owed();
        let problem = "the blocks are deleted, but the disk's index could not be written: they may come back after a crash; delete them again once the disk takes writes";
        until_synced(daemon, problem).await?;
        deleting.synced(owed);
    }
    Ok(DeleteResponse { deleted, pinned })
}
