//! Delete: makes blocks unreadable at once, in every tier. OK is a promise across a crash: what was deleted does not come back.

use kvstore_proto::v1::{DeleteRequest, DeleteResponse};
use kvstore_tiers::Run;
use kvstore_tiers::host::NamespaceId;
use tonic::Status;

use crate::daemon::Daemon;
use crate::{caps, wire};

/// Deletes blocks; pinned ones stay, in every tier, and are counted.
pub async fn delete(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &DeleteRequest,
) -> Result<DeleteResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    let run = Run { layout: &layout, group, hashes: &hashes };
    let deleted = daemon.stack.delete(&run).await.map_err(|problem| Status::unavailable(problem.to_string()))?;
    Ok(DeleteResponse { deleted: deleted.deleted as u64, pinned: deleted.pinned as u64 })
}
