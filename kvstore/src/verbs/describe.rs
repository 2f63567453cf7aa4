//! DescribeBlocks: the tokens of blocks, for the events that are published.

use std::sync::Arc;

use kvstore_proto::v1::{DescribeBlocksRequest, DescribeBlocksResponse};
use kvstore_tiers::host::NamespaceId;
use tonic::Status;

use crate::daemon::Daemon;
use crate::describing::{Description, Descriptions};
use crate::{caps, wire};

/// Bytes of an adapter's name.
const ADAPTER_BYTES_MAX: usize = 256;

/// Takes descriptions, where events are published.
pub fn describe(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: DescribeBlocksRequest,
) -> Result<DescribeBlocksResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    let each = layout.layout.block_tokens as usize;
    if request.tokens.len() != hashes.len() * each {
        let problem = format!(
            "the request has {} tokens for {} blocks of {each} tokens each",
            request.tokens.len(),
            hashes.len()
        );
        return Err(wire::invalid("tokens", problem));
    }
    if request.adapter.len() > ADAPTER_BYTES_MAX {
        return Err(wire::invalid("adapter", format!("the name must have at most {ADAPTER_BYTES_MAX} bytes")));
    }
    let mut parent = match request.parent_hash.as_ref() {
        [] => None,
        bytes => Some(wire::hash("parent_hash", bytes)?),
    };
    let Some(describing) = daemon.describing().filter(|describing| describing.namespace == namespace) else {
        return Ok(DescribeBlocksResponse { taken: false });
    };
    // One shard tells for all: they are stored side by side, and others know no shards.
    if layout.layout.shard.index > 0 {
        return Ok(DescribeBlocksResponse { taken: true });
    }
    let adapter: Option<Arc<str>> = (!request.adapter.is_empty()).then(|| request.adapter.as_str().into());
    let blocks = hashes
        .into_iter()
        .zip(request.tokens.chunks_exact(each.max(1)))
        .map(|(hash, tokens)| {
            let (tokens, adapter) = (tokens.into(), adapter.clone());
            Description { hash, parent: parent.replace(hash), tokens, group, adapter }
        })
        .collect();
    Ok(DescribeBlocksResponse { taken: describing.describe(Descriptions { layout, blocks }) })
}
