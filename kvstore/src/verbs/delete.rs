//! Delete: makes blocks unreadable at once, in every tier. OK is a promise across a crash: what was deleted does not come back.

use kvstore_proto::v1::{DeleteRequest, DeleteResponse};
use kvstore_tiers::host::NamespaceId;
use kvstore_tiers::residency::Delete;
use tonic::Status;

use super::until_synced;
use crate::daemon::Daemon;
use crate::{caps, wire};

/// Deletes blocks; pinned ones stay, in every tier, and are counted. The lower tiers first: a promotion that began before is then
/// superseded in memory, and none can begin after.
pub async fn delete(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &DeleteRequest,
) -> Result<DeleteResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let mut hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    let asked = hashes.len();
    // What memory alone holds, for a ticket say, keeps its copies below.
    let mut held = daemon.host.held(&layout, group, &hashes).into_iter();
    hashes.retain(|_| held.next() == Some(false));
    let mut pinned = asked - hashes.len();
    let mut deleting = daemon.deletions.begin();
    let mut below = vec![Delete::Absent; hashes.len()];
    let mut in_bucket = std::collections::HashSet::new();
    if let Some(nvme) = &daemon.nvme {
        below = nvme.delete(&layout, group, &hashes);
        deleting.has_deleted = below.contains(&Delete::Deleted);
        let held = below.iter().filter(|outcome| **outcome == Delete::Pinned).count();
        pinned += held;
        if held > 0 {
            let mut outcomes = below.iter();
            hashes.retain(|_| outcomes.next() != Some(&Delete::Pinned));
            below.retain(|outcome| *outcome != Delete::Pinned);
        }
    }
    if let Some(object) = &daemon.object {
        in_bucket = object.delete(&layout, group, &hashes).await.map_err(|trouble| {
            Status::unavailable(format!(
                "the blocks were not deleted from the object store: {trouble}; delete them again once the store answers"
            ))
        })?;
    }
    let mut deleted = 0;
    let above = daemon.host.delete(&layout, group, &hashes);
    for ((hash, below), above) in hashes.iter().zip(below).zip(above) {
        match (below, above) {
            (_, Delete::Pinned) => pinned += 1,
            (Delete::Deleted, _) | (_, Delete::Deleted) => deleted += 1,
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
    Ok(DeleteResponse { deleted, pinned: pinned as u64 })
}
