//! RegisterLayout: makes a layout known, by its digest.

use kvstore_proto::v1::{RegisterLayoutRequest, RegisterLayoutResponse};
use kvstore_tiers::host::NamespaceId;
use tonic::Status;

use crate::daemon::Daemon;
use crate::wire;

/// Registers a layout, or finds it registered.
pub fn register_layout(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: RegisterLayoutRequest,
) -> Result<RegisterLayoutResponse, Status> {
    let layout = wire::layout(request.layout)?;
    let registered = daemon.host.register_layout(namespace, layout).map_err(wire::register_error)?;
    Ok(RegisterLayoutResponse {
        layout_digest: registered.digest.to_vec().into(),
        ordinal: registered.ordinal,
        wants_tokens: daemon.describing().is_some_and(|describing| describing.namespace == namespace),
        block_bytes: registered.groups.iter().map(|group| group.block_bytes).collect(),
    })
}
