//! Lookup: how far a prefix can be used, and where its blocks are.

use std::sync::Arc;
use std::time::Duration;

use kvstore_proto::v1::{LookupRequest, LookupResponse, ReleaseTicketRequest, ReleaseTicketResponse};
use kvstore_tiers::below::{Ask, Searching};
use kvstore_tiers::caps::TICKET_TTL_MS_MAX;
use kvstore_tiers::host::{HoldId, HoldKind, NamespaceId, RegisteredLayout};
use kvstore_tiers::slots::Presence;
use kvstore_tiers::stack::{Found, Term};
use kvstore_tiers::{GroupPresence, Run, SequenceHash, Tier, TierSet, readable_prefix};
use tonic::Status;

use crate::daemon::{Daemon, random_hold_id};
use crate::{caps, clock, telemetry, wire};

/// Times that blocks are looked for to be held, where some leave between the look and the hold.
const TICKET_ATTEMPTS: usize = 3;
/// Looks of one look-up, where searches of the bucket end between the look and the question whether they go on.
const LOOKS_MAX: usize = 3;

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
    let Some((looked, searching)) = look_and_search(daemon, namespace, request, &layout, &hashes)? else {
        // There is no room to register every shard of the group: nothing is known of it.
        return Ok(LookupResponse { residency: vec![0; hashes.len()], ..LookupResponse::default() });
    };
    let Looked { parts, readable, ticket } = looked;
    let residency =
        (0..hashes.len()).map(|block| wire::residency(parts.iter().filter_map(|part| part.at(block)))).collect();
    for part in parts.iter().filter(|_| is_new) {
        let resident = part.presences.iter().take_while(|presence| **presence == Presence::Resident).count();
        let run = hashes.get(..resident).unwrap_or_default();
        daemon.stack.asked_for(&part.run(run));
    }
    let ticket = ticket.map(wire::hold_bytes).unwrap_or_default();
    Ok(LookupResponse { readable_blocks: readable as u32, residency, searching, ticket })
}

/// What a look found, and the ticket that holds it.
struct Looked {
    parts: Vec<Part>,
    readable: usize,
    ticket: Option<HoldId>,
}

/// Looks for blocks, and searches the bucket for the rest. Where nothing is being searched for, all that earlier searches found is in
/// what was looked at. `None` where a shard cannot be registered.
fn look_and_search(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &LookupRequest,
    layout: &Arc<RegisteredLayout>,
    hashes: &[SequenceHash],
) -> Result<Option<(Looked, bool)>, Status> {
    let mut looks = LOOKS_MAX;
    loop {
        let Some(looked) = look(daemon, namespace, request, layout, hashes)? else { return Ok(None) };
        let is_short = looked.readable < hashes.len();
        let searching = is_short && !search(daemon, &looked.parts, hashes).is_empty();
        looks -= 1;
        if searching || !is_short || looks == 0 || !daemon.stack.has(Tier::Object) {
            return Ok(Some((looked, searching)));
        }
        // A search may have ended since the look, and found what the look did not see.
        let now = parts_of(daemon, layout, request, hashes)?.map_or(0, |parts| readable_blocks(layout, &parts));
        if now <= looked.readable {
            return Ok(Some((looked, false)));
        }
        if let Some(id) = looked.ticket {
            daemon.stack.release(namespace, id, HoldKind::Ticket);
        }
    }
}

/// Looks for blocks once, and holds them where a ticket is asked for.
fn look(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &LookupRequest,
    layout: &Arc<RegisteredLayout>,
    hashes: &[SequenceHash],
) -> Result<Option<Looked>, Status> {
    let mut attempts = if request.ticket_ttl_ms > 0 { TICKET_ATTEMPTS } else { 0 };
    loop {
        let Some(parts) = parts_of(daemon, layout, request, hashes)? else { return Ok(None) };
        let readable = readable_blocks(layout, &parts);
        if readable == 0 || attempts == 0 {
            return Ok(Some(Looked { parts, readable, ticket: None }));
        }
        attempts -= 1;
        match hold_for_ticket(daemon, namespace, &parts, hashes.get(..readable).unwrap_or_default(), request) {
            Holding::Held(id) => return Ok(Some(Looked { parts, readable, ticket: Some(id) })),
            Holding::Refused => attempts = 0,
            Holding::Left => {}
        }
    }
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
    let found = |part: &Part| {
        let tiers = (0..readable.len()).map(|block| part.at(block).map_or(TierSet::NONE, |at| at.tiers()));
        tiers.collect::<Vec<_>>()
    };
    let found: Vec<Found<'_>> =
        parts.iter().map(|part| Found { run: part.run(readable), tiers: found(part) }).collect();
    let now = clock::now();
    let term = Term { now, expires: now.plus_ms(u64::from(request.ticket_ttl_ms)) };
    match daemon.stack.hold_found(namespace, random_hold_id(), &found, term) {
        Ok(Some(taken)) => Holding::Held(taken.keep()),
        Ok(None) => Holding::Left,
        Err(_) => Holding::Refused,
    }
}

/// Ends a ticket before its time.
pub fn release_ticket(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &ReleaseTicketRequest,
) -> Result<ReleaseTicketResponse, Status> {
    let id = wire::hold_id("ticket", &request.ticket)?;
    Ok(ReleaseTicketResponse { released: daemon.stack.release(namespace, id, HoldKind::Ticket) })
}
