//! Pin and Unpin: a promise not to evict a prefix for a while.

use bytes::Bytes;
use kvstore_proto::v1::{PinRequest, PinResponse, UnpinRequest, UnpinResponse};
use kvstore_tiers::caps::PIN_TTL_MS_MAX;
use kvstore_tiers::host::{HoldKind, NamespaceId};
use tonic::Status;

use crate::daemon::{Daemon, random_hold_id};
use crate::{caps, clock, wire};

/// Pins the leading readable run of a prefix.
pub fn pin(daemon: &Daemon, namespace: NamespaceId, request: &PinRequest) -> Result<PinResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    if !(1..=PIN_TTL_MS_MAX).contains(&request.ttl_ms) {
        return Err(wire::invalid("ttl_ms", format!("{} is not within 1 to {PIN_TTL_MS_MAX}", request.ttl_ms)));
    }
    let expires = clock::now().plus_ms(request.ttl_ms);
    let runs = [(&*layout, group, hashes.as_slice())];
    let id = random_hold_id();
    let held = daemon.host.hold(namespace, id, HoldKind::Pin, &runs, expires).map_err(wire::hold_error)?;
    if held.blocks == 0 {
        daemon.host.release_hold(namespace, id, HoldKind::Pin);
        return Ok(PinResponse { pin: Bytes::new(), pinned_blocks: 0 });
    }
    Ok(PinResponse { pin: wire::hold_bytes(id), pinned_blocks: held.blocks as u32 })
}

/// Ends a pin before its time.
pub fn unpin(daemon: &Daemon, namespace: NamespaceId, request: &UnpinRequest) -> Result<UnpinResponse, Status> {
    let id = wire::hold_id("pin", &request.pin)?;
    Ok(UnpinResponse { unpinned: daemon.host.release_hold(namespace, id, HoldKind::Pin) })
}
