//! Delete: makes blocks unreadable at once.

use kvstore_proto::v1::{DeleteRequest, DeleteResponse};
use kvstore_tiers::host::NamespaceId;
use tonic::Status;

use crate::daemon::Daemon;
use crate::{caps, wire};

/// Deletes blocks; pinned ones stay and are counted.
pub fn delete(daemon: &Daemon, namespace: NamespaceId, request: &DeleteRequest) -> Result<DeleteResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    let (deleted, pinned) = daemon.host.delete(&layout, group, &hashes);
    Ok(DeleteResponse { deleted, pinned })
}
