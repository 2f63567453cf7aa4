//! Lookup: how far a prefix can be used, and where its blocks are.

use std::sync::Arc;

use kvstore_proto::v1::{LookupRequest, LookupResponse, ReleaseTicketRequest, ReleaseTicketResponse};
use kvstore_tiers::caps::TICKET_TTL_MS_MAX;
use kvstore_tiers::host::{HoldId, HoldKind, NamespaceId, RegisteredLayout};
use kvstore_tiers::nvme::BlockRef;
use kvstore_tiers::residency::Presence;
use kvstore_tiers::{BootTime, GroupPresence, SequenceHash, readable_prefix};
use tonic::Status;

use crate::daemon::{Daemon, random_hold_id};
use crate::{caps, clock, telemetry, wire};

/// One layer group of one shard that a look-up asks about.
struct Part {
    layout: Arc<RegisteredLayout>,
    group: u16,
    presences: Vec<Presence>,
    /// Which blocks are on disk.
    on_disk: Vec<bool>,
}

impl Part {
    fn at(&self, block: usize) -> Option<(Presence, bool)> {
        Some((*self.presences.get(block)?, self.on_disk.get(block).copied().unwrap_or(false)))
    }
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
        // There is no room to register every shard of the group: nothing is known of it.
        return Ok(LookupResponse { residency: vec![0; hashes.len()], ..LookupResponse::default() });
    };
    let readable = readable_blocks(&layout, &parts);
    let residency =
        (0..hashes.len()).map(|block| wire::residency(parts.iter().filter_map(|part| part.at(block)))).collect();
    let mut response = LookupResponse { readable_blocks: readable as u32, residency, ..LookupResponse::default() };
    if request.ticket_ttl_ms > 0 && readable > 0 {
        hold_for_ticket(daemon, namespace, &parts, &hashes, request.ticket_ttl_ms, &mut response)?;
    }
    Ok(response)
}

/// The asked groups of the asked shards; `None` where a shard cannot be registered.
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
            let on_disk = daemon.nvme.as_ref().map(|nvme| nvme.presence(&shard, group, hashes)).unwrap_or_default();
            parts.push(Part { layout: Arc::clone(&shard), group, presences, on_disk });
        }
    }
    Ok(Some(parts))
}

fn readable_blocks(layout: &RegisteredLayout, parts: &[Part]) -> usize {
    let present: Vec<Vec<bool>> = parts
        .iter()
        .map(|part| {
            let readable = |(presence, on_disk)| presence == Presence::Resident || on_disk;
            (0..part.presences.len()).map(|block| part.at(block).is_some_and(readable)).collect()
        })
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
    let on_disk = if got.blocks < held.iter().map(Vec::len).sum() {
        None
    } else {
        hold_on_disk(daemon, parts, hashes, readable, id, expires)?
    };
    if on_disk.is_none() {
        daemon.host.release_hold(namespace, id, HoldKind::Ticket);
        response.readable_blocks = 0;
        return Ok(());
    }
    response.ticket = wire::hold_bytes(id);
    Ok(())
}

/// Holds the blocks that are on disk alone. `None` where one of them left meanwhile.
fn hold_on_disk(
    daemon: &Daemon,
    parts: &[Part],
    hashes: &[SequenceHash],
    readable: usize,
    id: HoldId,
    expires: BootTime,
) -> Result<Option<()>, Status> {
    let Some(nvme) = &daemon.nvme else { return Ok(Some(())) };
    let below = |part: &&Part, block: usize| part.at(block).is_some_and(|(p, d)| p != Presence::Resident && d);
    let blocks: Vec<BlockRef<'_>> = parts
        .iter()
        .flat_map(|part| {
            let chosen = hashes.iter().take(readable).enumerate().filter(move |(block, _)| below(&part, *block));
            chosen.map(move |(_, hash)| BlockRef { layout: &part.layout, group: part.group, hash: *hash })
        })
        .collect();
    if blocks.is_empty() {
        return Ok(Some(()));
    }
    nvme.pin(id.0, &blocks, expires, false, clock::now())
        .map_err(|refused| Status::resource_exhausted(refused.to_string()))?;
    let there = blocks.iter().all(|block| nvme.presence(block.layout, block.group, &[block.hash]) == [true]);
    if !there {
        nvme.unpin(id.0);
    }
    Ok(there.then_some(()))
}

/// Ends a ticket before its time.
pub fn release_ticket(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &ReleaseTicketRequest,
) -> Result<ReleaseTicketResponse, Status> {
    let id = wire::hold_id("ticket", &request.ticket)?;
    let released = daemon.host.release_hold(namespace, id, HoldKind::Ticket);
    if released && let Some(nvme) = &daemon.nvme {
        nvme.unpin(id.0);
    }
    Ok(ReleaseTicketResponse { released })
}
