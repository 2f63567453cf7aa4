//! Put: a block becomes readable once it is complete and matches its checksum. Reserves slots, publishes, and has copies go
//! below; whoever brings the bytes (a stream of gRPC, the local plane) brings them into the slot.

use std::sync::Arc;

use kvstore_proto::v1::PutStatus;
use kvstore_tiers::caps::SLABS_PER_FILL_MAX;
use kvstore_tiers::host::{BeginFill, BlockFill, FillRequest, LeasedBlock, RegisteredLayout};
use kvstore_tiers::slots::{FlightSource, Priority, Publish, Urgency};
use kvstore_tiers::stack::{Copies, Copy, Level, Wish};
use kvstore_tiers::{Block, BlockKind, SequenceHash, Tier};
use tokio::time::Instant;
use tonic::Status;

use crate::daemon::Daemon;
use crate::{caps, clock, telemetry, wire};

/// The answer when too many data calls are under way.
pub fn too_many_calls(daemon: &Daemon) -> Status {
    telemetry::add(&daemon.traffic.busy, 1);
    Status::resource_exhausted(format!(
        "too many put and get calls are in progress: at most {}, and of one namespace no more than it leaves to others; try again later",
        caps::DATA_CALLS_MAX
    ))
}

/// Where blocks go, and how safe they shall be.
#[derive(Clone)]
pub struct Target {
    /// The layout.
    pub layout: Arc<RegisteredLayout>,
    /// The layer group.
    pub group: u16,
    /// How safe.
    pub wish: Wish,
}

/// Where a block's bytes go.
pub enum Into {
    /// A slot.
    Slot(Box<BlockFill>),
    /// Nowhere: the answer is known already, the bytes are read past.
    Past(PutStatus),
}

/// What became of a block.
pub struct Finished {
    /// The answer.
    pub status: PutStatus,
    /// The level that it has by now; none where it is not there.
    pub level: Option<Level>,
    /// What somebody waits for.
    pub copies: Copies,
}

impl Finished {
    fn nowhere(status: PutStatus) -> Self {
        Self { status, level: None, copies: Copies::default() }
    }
}

/// A complete block becomes readable, and goes to disk in the background.
pub fn publish(
    daemon: &Daemon,
    target: &Target,
    fill: BlockFill,
    hash: SequenceHash,
    parent: Option<SequenceHash>,
    tail: bool,
) -> Finished {
    let sums = if daemon.stack.has_below() { fill.section_sums() } else { Vec::new() };
    let bytes = fill.length() as u64;
    // Leased until it is queued for the disk: under pressure it would be the first to leave, as the newest leaf of its chain.
    let (published, leased) = fill.commit_leased(tail);
    match published {
        Publish::Published => {
            telemetry::add(&daemon.traffic.put_blocks, 1);
            telemetry::add(&daemon.traffic.put_bytes, bytes);
            copied(daemon, target, hash, parent, sums, PutStatus::Stored, leased)
        }
        Publish::Superseded => Finished::nowhere(PutStatus::Superseded),
    }
}

/// The block was there already, or another writer brought it, or there was no room for it.
pub fn present(
    daemon: &Daemon,
    target: &Target,
    hash: SequenceHash,
    parent: Option<SequenceHash>,
    status: PutStatus,
) -> Finished {
    match status {
        PutStatus::Present | PutStatus::Joined => copied(daemon, target, hash, parent, Vec::new(), status, None),
        _ => Finished::nowhere(status),
    }
}

/// The block is readable: copies go below in the background, or, where that was asked for, before the answer.
fn copied(
    daemon: &Daemon,
    target: &Target,
    hash: SequenceHash,
    parent: Option<SequenceHash>,
    sums: Vec<u32>,
    status: PutStatus,
    leased: Option<LeasedBlock>,
) -> Finished {
    let block = Block { layout: Arc::clone(&target.layout), group: target.group, hash };
    let copies = daemon.stack.stored(Copy { block, parent, sums, leased }, &target.wish);
    Finished { status, level: Some(Level::Memory), copies }
}

/// A client's wish to bring a block.
pub fn fill_request(
    target: &Target,
    hash: SequenceHash,
    parent: Option<SequenceHash>,
    length: u32,
    deadline: Instant,
) -> FillRequest<'_> {
    let left = deadline.saturating_duration_since(Instant::now());
    let urgency = Urgency {
        source: FlightSource::Writer,
        priority: Priority::Demand,
        deadline: clock::now().plus_ms(left.as_millis() as u64),
    };
    FillRequest { layout: &target.layout, group: target.group, hash, parent, length, urgency }
}

/// What of a wish this daemon has no tier for.
pub fn check_tiers(daemon: &Daemon, wish: &Wish) -> Result<(), Status> {
    if wish.level == Level::Local && !daemon.stack.has(Tier::Nvme) {
        return Err(no_tier("LOCAL", "an Nvme tier"));
    }
    let lacks_bucket = !daemon.stack.has(Tier::Object);
    if wish.level == Level::Durable && lacks_bucket {
        return Err(no_tier("DURABLE", "an object store (object.url)"));
    }
    if wish.upload && lacks_bucket {
        return Err(no_tier("DURABLE (upload)", "an object store (object.url)"));
    }
    Ok(())
}

/// The answer where a level has no tier.
fn no_tier(level: &str, tier: &str) -> Status {
    Status::failed_precondition(format!(
        "level {level} needs {tier}, which this daemon does not have: configure one, or ask for a lower level"
    ))
}

/// The block's length, where it is one of this layout and group.
pub fn checked_length(target: &Target, length: u64) -> Result<u32, Status> {
    let group = target
        .layout
        .group(u32::from(target.group))
        .ok_or_else(|| wire::invalid("group", "the layout has no such group"))?;
    if group.group.kind == BlockKind::Chunk {
        let problem = "chunks of snapshots are stored by the daemon alone, which verifies them: call PrewarmSnapshot";
        return Err(wire::invalid("block", problem));
    }
    let right = if group.group.kind.varies_in_length() {
        (1..=group.block_bytes).contains(&length)
    } else {
        length == group.block_bytes
    };
    if !right {
        let problem =
            format!("the block has {length} bytes; a block of this layout and group has {} bytes", group.block_bytes);
        return Err(wire::invalid("block.length", problem));
    }
    // A layout's blocks are at most caps::BLOCK_BYTES_MAX, which is less than 2^32.
    Ok(length as u32)
}

/// Reserves a slot, once there is room and no other writer is at work. Ends with the call's deadline.
pub async fn begin(daemon: &Arc<Daemon>, request: &FillRequest<'_>) -> Result<Into, Status> {
    let mut joined = false;
    let (mut slabs, mut waits) = (0, 0);
    loop {
        match daemon.host.begin_fill(request, clock::now()) {
            BeginFill::Fill(fill, ahead) => {
                if let Some(plan) = ahead {
                    let host = Arc::clone(&daemon.host);
                    // A failure shows when the slab is needed.
                    tokio::task::spawn_blocking(move || host.make_slab(plan));
                }
                return Ok(Into::Slot(Box::new(fill)));
            }
            BeginFill::Resident if joined => return Ok(Into::Past(PutStatus::Joined)),
            BeginFill::Resident => return Ok(Into::Past(PutStatus::Present)),
            BeginFill::InFlight => {
                joined = true;
                tokio::time::sleep(caps::JOIN_POLL).await;
            }
            BeginFill::NeedsSlab(plan) if slabs < SLABS_PER_FILL_MAX => {
                slabs += 1;
                let host = Arc::clone(&daemon.host);
                let made = tokio::task::spawn_blocking(move || host.make_slab(plan)).await;
                if let Ok(Err(error)) = made {
                    tracing::warn!(%error, "there is no memory for a slab");
                    return Ok(busy(daemon));
                }
            }
            BeginFill::NeedsSlab(plan) => {
                daemon.host.drop_plan(plan);
                return Ok(busy(daemon));
            }
            BeginFill::Wait if waits < caps::ROOM_WAITS_MAX => {
                waits += 1;
                tokio::time::sleep(caps::ROOM_POLL).await;
            }
            BeginFill::Wait | BeginFill::Busy | BeginFill::Outranked => return Ok(busy(daemon)),
        }
    }
}

/// The answer where there is no room.
pub fn busy(daemon: &Daemon) -> Into {
    telemetry::add(&daemon.traffic.busy, 1);
    Into::Past(PutStatus::Busy)
}
