//! Lookup: how far a prefix can be used, and where its blocks are.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvstore_proto::v1::{LookupRequest, LookupResponse, ReleaseTicketRequest, ReleaseTicketResponse};
use kvstore_tiers::below::{Ask, Searching};
use kvstore_tiers::caps::TICKET_TTL_MS_MAX;
use kvstore_tiers::host::{HoldId, HoldKind, NamespaceId, RegisteredLayout};
use kvstore_tiers::nvme::PinRefused;
use kvstore_tiers::residency::Presence;
use kvstore_tiers::{BlockRef, BootTime, GroupPresence, Run, SequenceHash, Tier, TierSet, readable_prefix};
use tonic::Status;

use super::taken::Taken;
use crate::daemon::Daemon;
use crate::{caps, clock, telemetry, wire};

/// Times that blocks are looked for to be held, where some leave between the look and the hold.
const TICKET_ATTEMPTS: usize = 3;

/// One layer group of one shard that a look-up asks about.
struct Part {
    layout: Arc<RegisteredLayout>,
    group: u16,
    presences: Vec<Presence>,
    below: Vec<TierSet>,
}

impl Part {
    fn at(&self, block: usize) -> Option<wire::Located> {
        Some(wire::Located { host: *self.presences.get(block)?, below: *self.below.get(block)? })
    }

    fn run<'a>(&'a self, hashes: &'a [SequenceHash]) -> Run<'a> {
        Run { layout: &self.layout, group: self.group, hashes }
    }
}

/// The same, once the bucket was searched for what is nowhere else; it waits for that as long as the request allows.
pub async fn lookup_patiently(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &LookupRequest,
) -> Result<LookupResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    let searches = match parts_of(daemon, &layout, request, &hashes)? {
        Some(parts) => search(daemon, &parts, &hashes),
        None => Vec::new(),
    };
    let wait = Duration::from_millis(u64::from(request.search_wait_ms)).min(caps::SEARCH_WAIT_MAX);
    let ended = async {
        for search in searches {
            search.ended().await;
        }
    };
    let _ = tokio::time::timeout(wait, ended).await;
    lookup(daemon, namespace, request)
}

/// True where a look-up may have to wait: it is then to be made by [`lookup_patiently`].
pub fn may_wait(daemon: &Daemon, request: &LookupRequest) -> bool {
    daemon.stack.has(Tier::Object) && request.search_wait_ms > 0
}

/// Starts to search the bucket for the blocks of which nothing is known.
fn search(daemon: &Daemon, parts: &[Part], hashes: &[SequenceHash]) -> Vec<Searching> {
    if !daemon.stack.has(Tier::Object) {
        return Vec::new();
    }
    let search = |part: &Part| {
        let here = (0..hashes.len()).take_while(|block| part.at(*block).is_some_and(|at| at.is_here())).count();
        daemon.stack.search(&part.run(hashes.get(here..).unwrap_or_default()))
    };
    parts.iter().flat_map(search).collect()
}

/// Answers a look-up.
pub fn lookup(daemon: &Daemon, namespace: NamespaceId, request: &LookupRequest) -> Result<LookupResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    if u64::from(request.ticket_ttl_ms) > TICKET_TTL_MS_MAX {
        return Err(wire::invalid(
            "ticket_ttl_ms",
            format!("{} is too long: it must be at most {TICKET_TTL_MS_MAX} ms", request.ticket_ttl_ms),
        ));
    }
    telemetry::add(&daemon.traffic.lookups, 1);
    let is_new = daemon.accesses.note(&layout, &hashes, clock::now());
    if is_new {
        daemon.stack.count(&layout, &hashes);
    }
    let mut ticket = Bytes::new();
    let mut attempts = if request.ticket_ttl_ms > 0 { TICKET_ATTEMPTS } else { 0 };
    let (parts, readable) = loop {
        let Some(parts) = parts_of(daemon, &layout, request, &hashes)? else {
            // There is no room to register every shard of the group: nothing is known of it.
            return Ok(LookupResponse { residency: vec![0; hashes.len()], ..LookupResponse::default() });
        };
        let readable = readable_blocks(&layout, &parts);
        if readable == 0 || attempts == 0 {
            break (parts, readable);
        }
        attempts -= 1;
        match hold_for_ticket(daemon, namespace, &parts, hashes.get(..readable).unwrap_or_default(), request) {
            Holding::Held(id) => {
                ticket = wire::hold_bytes(id);
                break (parts, readable);
            }
            Holding::Refused => attempts = 0,
            Holding::Left => {}
        }
    };
    let residency =
        (0..hashes.len()).map(|block| wire::residency(parts.iter().filter_map(|part| part.at(block)))).collect();
    for part in parts.iter().filter(|_| is_new) {
        let resident = part.presences.iter().take_while(|presence| **presence == Presence::Resident).count();
        let run = hashes.get(..resident).unwrap_or_default();
        daemon.stack.asked_for(&part.run(run));
    }
    let searching = readable < hashes.len() && !search(daemon, &parts, &hashes).is_empty();
    Ok(LookupResponse { readable_blocks: readable as u32, residency, searching, ticket })
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
        return Err(wire::invalid("groups", "a group is named more than once: name each group once"));
    }
    let shards = if request.all_shards { daemon.host.siblings(layout) } else { vec![Some(Arc::clone(layout))] };
    let mut parts = Vec::with_capacity(groups.len() * shards.len());
    for shard in shards {
        let Some(shard) = shard else { return Ok(None) };
        for group in &groups {
            let (group, _) = wire::known_group(layout, *group)?;
            let presences = daemon.host.presence(&shard, group, hashes);
            let run = Run { layout: &shard, group, hashes };
            let below = daemon.stack.below(&run, Ask::Want(clock::now()));
            parts.push(Part { layout: Arc::clone(&shard), group, presences, below });
        }
    }
    Ok(Some(parts))
}

fn readable_blocks(layout: &RegisteredLayout, parts: &[Part]) -> usize {
    let present: Vec<Vec<bool>> = parts
        .iter()
        .map(|part| {
            (0..part.presences.len()).map(|block| part.at(block).is_some_and(|at| !at.tiers().is_empty())).collect()
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

/// What became of a ticket.
enum Holding {
    /// It holds all of it.
    Held(HoldId),
    /// A block left since it was found.
    Left,
    /// As much is held as may be.
    Refused,
}

/// Holds what was found readable, or nothing.
fn hold_for_ticket(
    daemon: &Daemon,
    namespace: NamespaceId,
    parts: &[Part],
    readable: &[SequenceHash],
    request: &LookupRequest,
) -> Holding {
    let held: Vec<Vec<SequenceHash>> = parts
        .iter()
        .map(|part| {
            let run = readable.iter().zip(&part.presences);
            run.filter(|(_, presence)| **presence == Presence::Resident).map(|(hash, _)| *hash).collect()
        })
        .collect();
    let runs: Vec<_> =
        parts.iter().zip(&held).map(|(part, hashes)| (&*part.layout, part.group, hashes.as_slice())).collect();
    let expires = clock::now().plus_ms(u64::from(request.ticket_ttl_ms));
    let mut taken = Taken::nothing(daemon, namespace, HoldKind::Ticket);
    let Ok(got) = taken.in_memory(&runs, expires) else { return Holding::Refused };
    if got.blocks < held.iter().map(Vec::len).sum::<usize>() {
        return Holding::Left;
    }
    match hold_on_disk(daemon, parts, readable, taken.id(), expires) {
        Ok(true) => Holding::Held(taken.keep()),
        Ok(false) => Holding::Left,
        Err(_) => Holding::Refused,
    }
}

/// Holds the blocks that are on disk alone. False where one of them left meanwhile.
fn hold_on_disk(
    daemon: &Daemon,
    parts: &[Part],
    readable: &[SequenceHash],
    id: HoldId,
    expires: BootTime,
) -> Result<bool, PinRefused> {
    let Some(nvme) = &daemon.nvme else { return Ok(true) };
    let below = |part: &&Part, block: usize| part.at(block).is_some_and(|at| at.tiers().fastest() == Some(Tier::Nvme));
    let blocks: Vec<BlockRef<'_>> = parts
        .iter()
        .flat_map(|part| {
            let chosen = readable.iter().enumerate().filter(move |(block, _)| below(&part, *block));
            chosen.map(move |(_, hash)| BlockRef { layout: &part.layout, group: part.group, hash: *hash })
        })
        .collect();
    if blocks.is_empty() {
        return Ok(true);
    }
    nvme.pin(id.0, &blocks, expires, false, clock::now())?;
    Ok(blocks.iter().all(|block| nvme.presence(block.layout, block.group, &[block.hash]) == [true]))
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
