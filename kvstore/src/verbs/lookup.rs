//! Lookup: how far a prefix can be used, and where its blocks are.

use std::sync::Arc;

use kvstore_proto::v1::{LookupRequest, LookupResponse, ReleaseTicketRequest, ReleaseTicketResponse};
use kvstore_tiers::caps::TICKET_TTL_MS_MAX;
use kvstore_tiers::host::{HoldKind, NamespaceId, RegisteredLayout};
use kvstore_tiers::residency::Presence;
use kvstore_tiers::{GroupPresence, SequenceHash, readable_prefix};
use tonic::Status;

use crate::daemon::{Daemon, random_hold_id};
use crate::{caps, clock, telemetry, wire};

/// One layer group of one shard that a look-up asks about.
struct Part {
    layout: Arc<RegisteredLayout>,
    group: u16,
    presences: Vec<Presence>,
}

/// Answers a look-up.
pub fn lookup(daemon: &Daemon, namespace: NamespaceId, request: &LookupRequest) -> Result<LookupResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    if u64::from(request.ticket_ttl_ms) > TICKET_TTL_MS_MAX {
        return Err(wire::invalid(
            "ticket_ttl_ms",
            format!("{} is more than {TICKET_TTL_MS_MAX}", request.ticket_ttl_ms),
        ));
    }
    telemetry::add(&daemon.traffic.lookups, 1);
    let Some(parts) = parts_of(daemon, &layout, request, &hashes)? else {
        // A shard of the group is not registered: it has nothing.
        return Ok(LookupResponse { residency: vec![0; hashes.len()], ..LookupResponse::default() });
    };
    let readable = readable_blocks(&layout, &parts);
    let residency = (0..hashes.len())
        .map(|block| wire::residency(parts.iter().filter_map(|part| part.presences.get(block).copied())))
        .collect();
    let mut response = LookupResponse { readable_blocks: readable as u32, residency, ..LookupResponse::default() };
    if request.ticket_ttl_ms > 0 && readable > 0 {
        hold_for_ticket(daemon, namespace, &parts, &hashes, request.ticket_ttl_ms, &mut response)?;
    }
    Ok(response)
}

/// The asked groups of the asked shards; `None` when one of the shards is not registered.
fn parts_of(
    daemon: &Daemon,
    layout: &Arc<RegisteredLayout>,
    request: &LookupRequest,
    hashes: &[SequenceHash],
) -> Result<Option<Vec<Part>>, Status> {
    let mut groups = request.groups.clone();
    groups.dedup();
    if groups.is_empty() {
        groups = (0..layout.groups.len() as u32).collect();
    }
    if groups.len() > layout.groups.len() {
        return Err(wire::invalid("groups", "names groups more than once"));
    }
    let shards = if request.all_shards { daemon.host.siblings(layout) } else { vec![Some(Arc::clone(layout))] };
    let mut parts = Vec::with_capacity(groups.len() * shards.len());
    for shard in shards {
        let Some(shard) = shard else { return Ok(None) };
        for group in &groups {
            let (group, _) = wire::known_group(layout, *group)?;
            let presences = daemon.host.presence(&shard, group, hashes);
            parts.push(Part { layout: Arc::clone(&shard), group, presences });
        }
    }
    Ok(Some(parts))
}

fn readable_blocks(layout: &RegisteredLayout, parts: &[Part]) -> usize {
    let present: Vec<Vec<bool>> = parts
        .iter()
        .map(|part| part.presences.iter().map(|presence| *presence == Presence::Resident).collect())
        .collect();
    let groups: Vec<_> = parts
        .iter()
        .zip(&present)
        .filter_map(|(part, present)| {
            let kind = layout.group(u32::from(part.group))?.group.kind;
            Some(GroupPresence { kind, present })
        })
        .collect();
    readable_prefix(&groups, layout.layout.block_tokens)
}

/// Holds what was found readable. Where some of it left since, the answer shrinks to what is held.
fn hold_for_ticket(
    daemon: &Daemon,
    namespace: NamespaceId,
    parts: &[Part],
    hashes: &[SequenceHash],
    ttl_ms: u32,
    response: &mut LookupResponse,
) -> Result<(), Status> {
    let readable = response.readable_blocks as usize;
    let held: Vec<Vec<SequenceHash>> = parts
        .iter()
        .map(|part| {
            let run = hashes.iter().zip(&part.presences).take(readable);
            run.filter(|(_, presence)| **presence == Presence::Resident).map(|(hash, _)| *hash).collect()
        })
        .collect();
    let runs: Vec<_> =
        parts.iter().zip(&held).map(|(part, hashes)| (&*part.layout, part.group, hashes.as_slice())).collect();
    let expires = clock::now().plus_ms(u64::from(ttl_ms));
    let id = random_hold_id();
    let got = daemon.host.hold(namespace, id, HoldKind::Ticket, &runs, expires).map_err(wire::hold_error)?;
    if got.blocks < held.iter().map(Vec::len).sum() {
        daemon.host.release_hold(namespace, id, HoldKind::Ticket);
        response.readable_blocks = 0;
        return Ok(());
    }
    response.ticket = wire::hold_bytes(id);
    Ok(())
}

/// Ends a ticket before its time.
pub fn release_ticket(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &ReleaseTicketRequest,
) -> Result<ReleaseTicketResponse, Status> {
    let id = wire::hold_id("ticket", &request.ticket)?;
    Ok(ReleaseTicketResponse { released: daemon.host.release_hold(namespace, id, HoldKind::Ticket) })
}
