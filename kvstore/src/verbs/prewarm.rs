//! Prewarm: brings the chunks of a snapshot into memory, or onto the disk, before a worker asks for them.
//!
//! What this node has in a slower tier comes from there, and the rest from the store, each chunk verified by its name before it is a
//! block. Where the snapshot is to be kept, chunks stay (leased) until all are there, and are then pinned.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kvstore_checkpoint::digest::Digest;
use kvstore_checkpoint::manifest::{Commit, Extent};
use kvstore_checkpoint::store::Store;
use kvstore_proto::v1::{self, PrewarmProgress, PrewarmTier, PutStatus};
use kvstore_tiers::below::Ask;
use kvstore_tiers::caps::{HELD_PERCENT_MAX, NVME_SEGMENTS_PER_VOLUME, PIN_TTL_MS_MAX};
use kvstore_tiers::host::{HoldKind, LeasedBlock, Leasing, NamespaceId};
use kvstore_tiers::slots::{Presence, Priority};
use kvstore_tiers::stack::{Level, Promotion, Term, Wish};
use kvstore_tiers::{Run, SequenceHash, Tier};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use super::put::{self, Into, Target};
use super::snapshots::{ChunkRun, chunk_runs, commit, refused, store};
use crate::config::PrewarmConfig;
use crate::daemon::{Daemon, random_hold_id};
use crate::prewarms::{Counts, Ended, Flight, Key, Share, Turn, Warm};
use crate::{caps, clock, wire};

/// The least time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How soon something is tried again that found no room.
const RETRY: Duration = Duration::from_millis(50);
const DEADLINE_MS_DEFAULT: u64 = 600_000;
/// More than the header of a frame, and what a segment says of itself.
const SEGMENT_MARGIN: u64 = 64 << 10;

/// What is wanted.
#[derive(Clone)]
pub struct Wanted {
    /// The snapshot's name or id.
    pub snapshot: String,
    /// Where it goes.
    pub tier: Tier,
    /// Until when.
    pub deadline: Instant,
    /// How long it is pinned then, in milliseconds; 0: not.
    pub keep_ms: u64,
}

/// What a request wants.
pub fn wanted(daemon: &Daemon, request: v1::PrewarmSnapshotRequest) -> Result<Wanted, Status> {
    let tier = match request.tier() {
        PrewarmTier::Unspecified | PrewarmTier::PrewarmMemory => Tier::Host,
        PrewarmTier::PrewarmDisk => Tier::Nvme,
    };
    check_tier(daemon, tier)?;
    let deadline_ms = match request.deadline_ms {
        0 => DEADLINE_MS_DEFAULT,
        asked if asked <= caps::PREWARM_MS_MAX => asked,
        asked => {
            let problem = format!("{asked} is too long: it must be at most {} ms", caps::PREWARM_MS_MAX);
            return Err(wire::invalid("deadline_ms", problem));
        }
    };
    if request.keep_ms > PIN_TTL_MS_MAX {
        let problem = format!("{} is too long: it must be at most {PIN_TTL_MS_MAX} ms", request.keep_ms);
        return Err(wire::invalid("keep_ms", problem));
    }
    let deadline = Instant::now() + Duration::from_millis(deadline_ms);
    Ok(Wanted { snapshot: request.snapshot, tier, deadline, keep_ms: request.keep_ms })
}

fn check_tier(daemon: &Daemon, tier: Tier) -> Result<(), Status> {
    match daemon.stack.has(tier) || tier == Tier::Host {
        true => Ok(()),
        false => Err(Status::failed_precondition(
            "tier: this daemon has no disk: set nvme.paths, or prewarm the snapshot into memory",
        )),
    }
}

/// Brings a snapshot, and reports. Where somebody does the same already, waits for that. What has begun goes on where nobody listens.
pub async fn prewarm(
    daemon: Arc<Daemon>,
    namespace: NamespaceId,
    wanted: Wanted,
    reports: mpsc::Sender<Result<PrewarmProgress, Status>>,
) {
    let answer = tokio::select! {
        answer = tokio::time::timeout_at(wanted.deadline, prewarm_and_pin(&daemon, namespace, &wanted, &reports)) => answer,
        () = reports.closed() => return,
    };
    let answer = answer.unwrap_or_else(|_| Err(late()));
    let _ = reports.send_timeout(answer, caps::REPORT_STALL).await;
}

fn late() -> Status {
    Status::deadline_exceeded(
        "the prewarm's deadline passed: what has come so far is there; prewarm it again for the rest",
    )
}

async fn prewarm_and_pin(
    daemon: &Arc<Daemon>,
    namespace: NamespaceId,
    wanted: &Wanted,
    reports: &mpsc::Sender<Result<PrewarmProgress, Status>>,
) -> Result<PrewarmProgress, Status> {
    let commit = commit(store(daemon)?, &wanted.snapshot).await?;
    let id = commit.id.clone();
    let key = Key { namespace, id: id.clone(), tier: wanted.tier, is_kept: wanted.keep_ms > 0 };
    loop {
        let (flight, turn) = daemon.prewarms.join(&key)?;
        if let Some(turn) = turn {
            tokio::spawn(fly(Arc::clone(daemon), turn, namespace, commit.clone(), wanted.clone()));
        }
        let ended = flight.ended();
        tokio::pin!(ended);
        let ended = loop {
            tokio::select! {
                ended = &mut ended => break ended,
                () = tokio::time::sleep(REPORT_EVERY) => {
                    // It can be done again, and keeps no stop waiting.
                    if daemon.is_draining() {
                        return Err(wire::draining());
                    }
                    // A slow listener misses reports.
                    let _ = reports.try_send(Ok(progress(&id, &flight.counts)));
                }
            }
        };
        match ended {
            Ok(warm) => {
                let pins = pin(daemon, namespace, &warm, wanted).await?;
                return Ok(PrewarmProgress { ready: true, pins, ..progress(&id, &flight.counts) });
            }
            // Whoever began it had less time.
            Err(status) if status.code() == tonic::Code::DeadlineExceeded => {}
            Err(status) => return Err(status),
        }
    }
}

fn progress(id: &str, counts: &Counts) -> PrewarmProgress {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    PrewarmProgress {
        id: id.to_owned(),
        total_bytes: read(&counts.total),
        done_bytes: read(&counts.done),
        found_bytes: read(&counts.found),
        read_bytes: read(&counts.read),
        ..PrewarmProgress::default()
    }
}

/// Pins what has come where it was brought: in memory by one pin, until the daemon ends; on the disk by one for each layout.
async fn pin(daemon: &Daemon, namespace: NamespaceId, warm: &Warm, wanted: &Wanted) -> Result<Vec<Bytes>, Status> {
    if wanted.keep_ms == 0 {
        return Ok(Vec::new());
    }
    let left = || Status::unavailable("chunks left while they were being pinned: prewarm the snapshot again");
    let now = clock::now();
    let term = Term { now, expires: now.plus_ms(wanted.keep_ms) };
    if wanted.tier == Tier::Host {
        let runs: Vec<_> = warm.runs.iter().map(|(layout, hashes)| (&**layout, 0, hashes.as_slice())).collect();
        let id = random_hold_id();
        let held = daemon.host.hold(namespace, id, HoldKind::Pin, &runs, term.expires);
        let held = held.map_err(|error| wire::hold_refused(&error.into()))?;
        if held.blocks < warm.runs.iter().map(|(_, hashes)| hashes.len()).sum() {
            daemon.host.release_hold(namespace, id, HoldKind::Pin);
            return Err(left());
        }
        return Ok(vec![wire::hold_bytes(id)]);
    }
    let mut taken = Vec::new();
    for (layout, hashes) in &warm.runs {
        let run = Run { layout, group: 0, hashes };
        let pinned = daemon.stack.pin(&run, random_hold_id(), term).await;
        match pinned.map_err(|error| wire::hold_refused(&error))? {
            Some((hold, blocks)) if blocks == hashes.len() => taken.push(hold),
            _ => return Err(left()),
        }
    }
    // All of them, or none.
    Ok(taken.into_iter().map(|hold| wire::hold_bytes(hold.keep())).collect())
}

async fn fly(daemon: Arc<Daemon>, turn: Turn, namespace: NamespaceId, commit: Commit, wanted: Wanted) {
    let work = bring_all(&daemon, namespace, &commit, &wanted, &turn.flight);
    let ended = tokio::time::timeout_at(wanted.deadline, work).await.unwrap_or_else(|_| Err(late()));
    turn.end(ended);
}

async fn bring_all(
    daemon: &Arc<Daemon>,
    namespace: NamespaceId,
    commit: &Commit,
    wanted: &Wanted,
    flight: &Arc<Flight>,
) -> Ended {
    let store = store(daemon)?;
    let files = store.files(commit).await.map_err(|error| refused(&error))?;
    let runs = chunk_runs(daemon, namespace, &files)?;
    let share = match wanted.tier {
        Tier::Host => check_memory(daemon, namespace, &runs, wanted)?,
        _ => check_disk(daemon, namespace, &runs).map(|()| None)?,
    };
    flight.counts.total.store(runs.iter().flat_map(|run| &run.bytes).sum(), Ordering::Relaxed);
    let mut chunks = Vec::new();
    for run in &runs {
        let level = if wanted.tier == Tier::Nvme { Level::Local } else { Level::Memory };
        let wish = Wish { namespace, level, upload: false };
        let target = Target { layout: Arc::clone(&run.layout), group: 0, wish };
        let (daemon, store, flight) = (Arc::clone(daemon), store.clone(), Arc::clone(flight));
        let bringing = Arc::new(Bringing { daemon, store, target, wanted: wanted.clone(), flight });
        let of_run = run.hashes.iter().zip(&run.bytes);
        chunks.extend(of_run.map(|(hash, bytes)| (Arc::clone(&bringing), *hash, *bytes)));
    }
    let each =
        futures::stream::iter(chunks).map(|(bringing, hash, bytes)| async move { bringing.bring(hash, bytes).await });
    let came: Vec<Option<LeasedBlock>> = each.buffer_unordered(caps::PREWARM_CHUNKS_AT_ONCE).try_collect().await?;
    if wanted.keep_ms == 0 {
        all_there(daemon, &runs, wanted.tier)?;
    }
    let runs = runs.into_iter().map(|run| (run.layout, run.hashes)).collect();
    Ok(Arc::new(Warm { runs, leased: came.into_iter().flatten().collect(), _share: share }))
}

/// Whether what has come has stayed: nothing holds it.
fn all_there(daemon: &Daemon, runs: &[ChunkRun], tier: Tier) -> Result<(), Status> {
    let is_gone = |run: &ChunkRun| {
        let tiers = daemon.stack.residency(&Run { layout: &run.layout, group: 0, hashes: &run.hashes }, Ask::Look);
        tiers.iter().any(|tiers| !tiers.has(tier))
    };
    match runs.iter().any(is_gone) {
        true => Err(Status::resource_exhausted(
            "chunks left again while others came, because other blocks need the room: prewarm the snapshot with a time to keep it, or make the tier larger",
        )),
        false => Ok(()),
    }
}

/// Refuses what can never be in memory all at once. What is to be kept gets its share of what may be held.
fn check_memory(
    daemon: &Daemon,
    namespace: NamespaceId,
    runs: &[ChunkRun],
    wanted: &Wanted,
) -> Result<Option<Share>, Status> {
    let config = daemon.config();
    let limits = daemon.namespaces().get(namespace.0).map(|name| config.host_limits_of(name));
    let whole = limits.and_then(|limits| limits.bytes).unwrap_or(u64::MAX).min(config.host.bytes);
    let sizes =
        runs.iter().map(|run| (run.layout.group(0).map_or(0, |group| group.block_bytes), run.hashes.len() as u64));
    let needed = daemon.host.bytes_for(sizes);
    let too_large = |most: u64, of: &str| {
        Status::failed_precondition(format!(
            "the snapshot needs {} of memory, and at most {} {of}: raise host.bytes, or prewarm it onto the disk",
            bytesize::ByteSize(needed),
            bytesize::ByteSize(most)
        ))
    };
    if needed > whole {
        return Err(too_large(whole, "may be taken"));
    }
    if wanted.keep_ms == 0 {
        return Ok(None);
    }
    let percent = limits.map_or(HELD_PERCENT_MAX, |limits| limits.held_percent);
    let may_be_held = |percent: u64| config.host.bytes / 100 * percent;
    if needed > may_be_held(percent) {
        return Err(too_large(may_be_held(percent), "may be pinned"));
    }
    daemon.prewarms.share(needed, may_be_held(HELD_PERCENT_MAX)).map(Some)
}

/// Refuses what can never be on the disk all at once. A block lies in one segment, and small volumes have small ones.
fn check_disk(daemon: &Daemon, namespace: NamespaceId, runs: &[ChunkRun]) -> Result<(), Status> {
    let config = daemon.config();
    let policy = daemon.namespaces().get(namespace.0).and_then(|name| config.policies.get(name));
    let all: u64 = daemon.nvme.iter().flat_map(|nvme| nvme.status().volumes).map(|volume| volume.bytes_max).sum();
    let most = policy.and_then(|policy| policy.nvme_bytes).unwrap_or(u64::MAX).min(all);
    let needed: u64 = runs.iter().flat_map(|run| &run.bytes).sum();
    if needed > most {
        return Err(Status::failed_precondition(format!(
            "the snapshot needs {} of disk, and at most {} may be taken: raise nvme.bytes",
            bytesize::ByteSize(needed),
            bytesize::ByteSize(most)
        )));
    }
    let largest = runs.iter().flat_map(|run| &run.bytes).copied().max().unwrap_or_default();
    let volumes = daemon.nvme.as_ref().map(|nvme| nvme.status().volumes).unwrap_or_default();
    let least = volumes.iter().map(|volume| volume.segment_bytes).min().unwrap_or_default();
    // Beside the chunk: the frame's header, and what a segment says of itself.
    let needed = largest + SEGMENT_MARGIN;
    if needed <= least {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "the snapshot has chunks of {}, and a segment of the disk has {}: start the daemon on an empty folder, with nvme.bytes at least {}",
        bytesize::ByteSize(largest),
        bytesize::ByteSize(least),
        bytesize::ByteSize(needed.next_power_of_two() * NVME_SEGMENTS_PER_VOLUME)
    )))
}

/// Brings chunks of one layout.
struct Bringing {
    daemon: Arc<Daemon>,
    store: Store,
    target: Target,
    wanted: Wanted,
    flight: Arc<Flight>,
}

/// What a look for a chunk says.
enum Look {
    There(Option<LeasedBlock>),
    Nowhere,
    Later,
}

/// What came of storing a chunk.
enum Put {
    Done,
    /// There was no room, or the disk did not take it: later, perhaps.
    Refused,
}

impl Bringing {
    /// Brings one chunk; its lease, where it is in memory and to be kept.
    async fn bring(&self, hash: SequenceHash, bytes: u64) -> Result<Option<LeasedBlock>, Status> {
        let (mut is_found, mut plain, mut refusals) = (true, None, 0);
        let leased = loop {
            match self.look(hash).await {
                Look::There(leased) => break leased,
                Look::Nowhere => {
                    is_found = false;
                    // Read once, however long there is no room for it.
                    if plain.is_none() && !self.is_in_memory(hash) {
                        plain = Some(self.read(hash, bytes).await?);
                    }
                    match self.put(hash, plain.as_ref()).await? {
                        Put::Done => continue,
                        Put::Refused => refusals += 1,
                    }
                }
                Look::Later => {}
            }
            if self.wanted.tier == Tier::Nvme && refusals > caps::PREWARM_REFUSALS_MAX {
                return Err(Status::unavailable(
                    "the disk does not take chunks: prewarm the snapshot again once it takes writes",
                ));
            }
            tokio::time::sleep(RETRY).await;
        };
        if is_found {
            self.flight.counts.found.fetch_add(bytes, Ordering::Relaxed);
        }
        self.flight.counts.done.fetch_add(bytes, Ordering::Relaxed);
        Ok(leased.filter(|_| self.wanted.keep_ms > 0))
    }

    fn has(&self, hash: SequenceHash, tier: Tier) -> bool {
        let hashes = [hash];
        let run = Run { layout: &self.target.layout, group: 0, hashes: &hashes };
        self.daemon.stack.below(&run, Ask::Look).iter().all(|tiers| tiers.has(tier))
    }

    fn is_in_memory(&self, hash: SequenceHash) -> bool {
        self.daemon.host.presence(&self.target.layout, 0, &[hash]) == [Presence::Resident]
    }

    fn promotion(&self, priority: Priority) -> Promotion {
        Promotion {
            stack: Arc::clone(&self.daemon.stack),
            layout: Arc::clone(&self.target.layout),
            group: 0,
            priority,
            deadline: self.wanted.deadline,
        }
    }

    async fn look(&self, hash: SequenceHash) -> Look {
        if self.wanted.tier == Tier::Nvme {
            return if self.has(hash, Tier::Nvme) { Look::There(None) } else { Look::Nowhere };
        }
        let mut leasing = self.promotion(Priority::Prefetch).bring(hash).await;
        // What is in memory is worth more than what comes ahead of need; but this was asked for.
        if matches!(leasing, Leasing::Miss) && self.has(hash, Tier::Nvme) {
            leasing = self.promotion(Priority::Demand).bring(hash).await;
        }
        match leasing {
            Leasing::Leased(block) => Look::There(Some(block)),
            Leasing::InFlight => Look::Later,
            Leasing::Miss => Look::Nowhere,
        }
    }

    async fn read(&self, hash: SequenceHash, bytes: u64) -> Result<Bytes, Status> {
        let read = self.store.read_extent(Extent { bytes, chunk: Digest(hash.padded()) }).await;
        let (plain, moved) = read.map_err(|error| refused(&error))?;
        self.flight.counts.read.fetch_add(moved, Ordering::Relaxed);
        Ok(plain)
    }

    /// Stores a chunk that was verified; without bytes, one that is in memory.
    async fn put(&self, hash: SequenceHash, plain: Option<&Bytes>) -> Result<Put, Status> {
        let (daemon, target) = (&self.daemon, &self.target);
        let length = plain.map_or(1, Bytes::len) as u32;
        let request = put::fill_request(target, hash, None, length, self.wanted.deadline);
        if !daemon.stack.until_room(&target.wish).await {
            return Ok(Put::Refused);
        }
        let finished = match (put::begin(daemon, &request).await?, plain) {
            (Into::Slot(mut fill), Some(plain)) => {
                let plain = plain.clone();
                // Copied and summed: milliseconds.
                let filled =
                    tokio::task::spawn_blocking(move || fill.append(&plain, clock::now()).map(|()| fill)).await;
                let filled = filled.map_err(|error| Status::internal(error.to_string()))?;
                let fill = filled.map_err(|error| Status::internal(error.to_string()))?;
                put::publish(daemon, target, *fill, hash, None, true)
            }
            // It left memory in this moment.
            (Into::Slot(_), None) => return Ok(Put::Refused),
            (Into::Past(status @ (PutStatus::Present | PutStatus::Joined)), _) => {
                put::present(daemon, target, hash, None, status)
            }
            (Into::Past(_), _) => return Ok(Put::Refused),
        };
        if target.wish.level == Level::Memory {
            return Ok(Put::Done);
        }
        let is_local = match finished.copies.local {
            Some(local) => local.await.unwrap_or(false),
            None => false,
        };
        Ok(if is_local { Put::Done } else { Put::Refused })
    }
}

/// Prewarms what the configuration says, each again and again until it is there: the store may be away.
pub fn prewarm_configured(daemon: &Arc<Daemon>) {
    let config = daemon.config();
    let Some(snapshots) = &config.snapshots else { return };
    let Some(namespace) = daemon.namespace(&snapshots.namespace) else { return };
    for wanted in &snapshots.prewarm {
        tokio::spawn(prewarm_until_there(Arc::clone(daemon), namespace, wanted.clone()));
    }
}

async fn prewarm_until_there(daemon: Arc<Daemon>, namespace: NamespaceId, configured: PrewarmConfig) {
    let PrewarmConfig { snapshot, tier } = configured;
    let mut wait = caps::PREWARM_RETRY;
    loop {
        let deadline = Instant::now() + Duration::from_millis(caps::PREWARM_MS_MAX);
        let wanted = Wanted { snapshot: snapshot.clone(), tier, deadline, keep_ms: 0 };
        // Nobody reads reports.
        let (reports, _none) = mpsc::channel(1);
        match prewarm_and_pin(&daemon, namespace, &wanted, &reports).await {
            Ok(done) => {
                let (bytes, read) = (done.total_bytes, done.read_bytes);
                tracing::info!(snapshot, tier = tier.name(), bytes, read, "prewarmed a snapshot");
                return;
            }
            Err(status) if status.code() == tonic::Code::FailedPrecondition => {
                tracing::error!(snapshot, error = status.message(), "cannot prewarm a snapshot");
                return;
            }
            Err(_) if daemon.is_draining() => return,
            Err(status) => {
                tracing::warn!(snapshot, error = status.message(), retry = ?wait, "cannot prewarm a snapshot yet");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(caps::PREWARM_RETRY_MAX);
            }
        }
    }
}
