//! Pin and Unpin: a promise not to evict a prefix for a while. `kvstore_tiers::stack` says how each tier keeps it.

use bytes::Bytes;
use kvstore_proto::v1::{PinRequest, PinResponse, UnpinRequest, UnpinResponse};
use kvstore_tiers::Run;
use kvstore_tiers::caps::PIN_TTL_MS_MAX;
use kvstore_tiers::host::{HoldKind, NamespaceId};
use kvstore_tiers::stack::Term;
use tonic::Status;

use crate::daemon::{Daemon, random_hold_id};
use crate::{caps, clock, wire};

/// Pins the leading readable run of a prefix. With an Nvme tier, its blocks are LOCAL and the pin's record is synced before the
/// answer. Dropped before that, or where it fails, nothing is pinned.
pub async fn pin(daemon: &Daemon, namespace: NamespaceId, request: &PinRequest) -> Result<PinResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    if !(1..=PIN_TTL_MS_MAX).contains(&request.ttl_ms) {
        return Err(wire::invalid(
            "ttl_ms",
            format!("{} is out of range: it must be 1 to {PIN_TTL_MS_MAX} ms", request.ttl_ms),
        ));
    }
    let now = clock::now();
    let term = Term { now, expires: now.plus_ms(request.ttl_ms) };
    let prefix = Run { layout: &layout, group, hashes: &hashes };
    let pinned = daemon.stack.pin(&prefix, random_hold_id(), term).await.map_err(|error| wire::hold_refused(&error))?;
    Ok(match pinned {
        Some((taken, blocks)) => PinResponse { pin: wire::hold_bytes(taken.keep()), pinned_blocks: blocks as u32 },
        None => PinResponse { pin: Bytes::new(), pinned_blocks: 0 },
    })
}

/// Ends a pin before its time.
pub fn unpin(daemon: &Daemon, namespace: NamespaceId, request: &UnpinRequest) -> Result<UnpinResponse, Status> {
    let id = wire::hold_id("pin", &request.pin)?;
    Ok(UnpinResponse { unpinned: daemon.stack.release(namespace, id, HoldKind::Pin) })
}
