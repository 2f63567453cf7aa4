//! Prefetch: brings a prefix into memory before it is needed, in order and a few blocks at a time. Calls that wait for
//! blocks go first. A prefetch ends when each block is in memory or found in no tier, at its deadline, or when it is
//! cancelled. A transfer in progress still completes.

use std::sync::Arc;
use std::time::Duration;

use kvstore_proto::v1::{
    CancelPrefetchRequest, CancelPrefetchResponse, PrefetchProgress, PrefetchRequest, PrefetchResponse, PrefetchState,
    WatchPrefetchRequest,
};
use kvstore_tiers::below::Ask;
use kvstore_tiers::host::{HoldId, NamespaceId};
use kvstore_tiers::slots::{Presence, Priority};
use kvstore_tiers::stack::{Asked, Policy, Promotion, Window};
use kvstore_tiers::{Run, SequenceHash, TierSet};
use tonic::Status;

use crate::daemon::{Daemon, random_hold_id};
use crate::prefetches::Prefetch;
use crate::{caps, clock, wire};

/// How often a running prefetch looks whether blocks on their way have come.
const POLL: Duration = Duration::from_millis(20);
const DEADLINE_MS_DEFAULT: u64 = 10_000;

/// Starts a prefetch.
pub fn prefetch(
    daemon: &Arc<Daemon>,
    namespace: NamespaceId,
    request: &PrefetchRequest,
) -> Result<PrefetchResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes: Arc<[SequenceHash]> = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?.into();
    let deadline_max = caps::DEADLINE_MAX.as_millis() as u64;
    let deadline_ms = match u64::from(request.deadline_ms) {
        0 => DEADLINE_MS_DEFAULT,
        asked if asked <= deadline_max => asked,
        asked => {
            return Err(wire::invalid(
                "deadline_ms",
                format!("{asked} is too long: it must be at most {deadline_max} ms"),
            ));
        }
    };
    let presences = daemon.host.presence(&layout, group, &hashes);
    let run = presences.iter().take_while(|presence| **presence == Presence::Resident).count();
    if let Some(last) = run.checked_sub(1).and_then(|last| hashes.get(last)) {
        daemon.host.refresh_chain(&layout, group, *last);
    }
    let id = random_hold_id();
    let deadline = clock::now().plus_ms(deadline_ms);
    let promotion = daemon.stack.has_below().then(|| Promotion {
        stack: Arc::clone(&daemon.stack),
        layout: Arc::clone(&layout),
        group,
        priority: Priority::Prefetch,
        deadline: tokio::time::Instant::now() + Duration::from_millis(deadline_ms),
    });
    let running = promotion.is_some();
    let layout_digest = layout.digest;
    let prefetch =
        Prefetch { namespace, layout_digest, group, hashes: Arc::clone(&hashes), deadline, running, ended: None };
    let mut prefetches = daemon.prefetches.lock();
    let kept: usize = prefetches.values().map(|prefetch| prefetch.hashes.len()).sum();
    if prefetches.len() >= caps::PREFETCHES_MAX || kept + prefetch.hashes.len() > caps::PREFETCH_HASHES_MAX {
        let (most, hashes) = (caps::PREFETCHES_MAX, caps::PREFETCH_HASHES_MAX);
        let problem = format!(
            "there would be more than {most} prefetches, or they would name more than {hashes} blocks: try again later"
        );
        return Err(Status::resource_exhausted(problem));
    }
    prefetches.insert(id, prefetch);
    drop(prefetches);
    if let Some(promotion) = promotion {
        tokio::spawn(bring(Arc::clone(daemon), promotion, id, hashes));
    }
    Ok(PrefetchResponse { ticket: wire::hold_bytes(id) })
}

/// Brings the blocks in, in order, until all are there or nowhere or the prefetch has ended.
async fn bring(daemon: Arc<Daemon>, promotion: Promotion, id: HoldId, hashes: Arc<[SequenceHash]>) {
    let below = promotion.below(&hashes).await;
    let presences = daemon.host.presence(&promotion.layout, promotion.group, &hashes);
    // More than that would push out its own beginning, and all else.
    let most = promotion.memory_blocks() / 2;
    let wanted = hashes
        .iter()
        .zip(below)
        .zip(presences)
        .filter(|((_, below), presence)| *below && *presence != Presence::Resident)
        .take(most)
        .enumerate()
        .map(|(index, ((hash, _), _))| Asked { index, hash: *hash, known: None });
    let policy = Policy { ahead: promotion.ahead(), ends_outranked: true, ends_full: false };
    let mut window = Window::new(&promotion, policy, wanted);
    while !daemon.prefetches.has_ended(id) && tokio::time::Instant::now() < promotion.deadline {
        // The lease ends at once: the block is there for whoever comes.
        let Some(_leased) = window.next().await else { break };
    }
    daemon.prefetches.stop_running(id);
}

/// The next report of a prefetch, and whether it is the last.
pub fn progress(daemon: &Daemon, namespace: NamespaceId, id: HoldId) -> Result<(PrefetchProgress, bool), Status> {
    let prefetch = daemon.prefetches.get(namespace, id)?;
    let layout = wire::known_layout(daemon, namespace, &prefetch.layout_digest)?;
    let presences = daemon.host.presence(&layout, prefetch.group, &prefetch.hashes);
    let run = Run { layout: &layout, group: prefetch.group, hashes: &prefetch.hashes };
    let below = daemon.stack.below(&run, Ask::Look);
    let count = |wanted| presences.iter().filter(|presence| **presence == wanted).count() as u32;
    let nowhere = |(presence, below): &(&Presence, &TierSet)| **presence == Presence::Absent && below.is_empty();
    let missing = presences.iter().zip(&below).filter(nowhere).count() as u32;
    let now = clock::now();
    let state = match prefetch.ended {
        Some((state, _)) => Some(state),
        None if !prefetch.running && count(Presence::InFlight) == 0 => {
            daemon.prefetches.end(id, PrefetchState::Done, now)
        }
        None if now >= prefetch.deadline => daemon.prefetches.end(id, PrefetchState::Deadline, now),
        None => None,
    };
    let progress = PrefetchProgress {
        state: state.unwrap_or(PrefetchState::Running).into(),
        blocks: prefetch.hashes.len() as u32,
        ready: count(Presence::Resident),
        missing,
    };
    Ok((progress, state.is_some()))
}

/// The ticket of a watch.
pub fn watched(request: &WatchPrefetchRequest) -> Result<HoldId, Status> {
    wire::hold_id("ticket", &request.ticket)
}

/// Waits until the next report is due.
pub async fn until_next() {
    tokio::time::sleep(POLL).await;
}

/// Cancels a prefetch.
pub fn cancel(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &CancelPrefetchRequest,
) -> Result<CancelPrefetchResponse, Status> {
    let id = wire::hold_id("ticket", &request.ticket)?;
    let running = daemon.prefetches.get(namespace, id)?.ended.is_none();
    daemon.prefetches.end(id, PrefetchState::Cancelled, clock::now());
    Ok(CancelPrefetchResponse { cancelled: running })
}
