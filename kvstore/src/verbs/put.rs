//! Put: receives blocks as a stream. Each block is readable once it is complete and matches its checksum.
//!
//! A block's bytes are copied once, from the connection's buffers into its slot, and checksummed on the
//! way. A complete block is committed when the next one starts or the call ends, because only then does the
//! daemon know whether it is the last block of its request. A call never waits for another writer while it has
//! an uncommitted block, so two calls can't wait for each other.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use kvstore_proto::data_stream::{Part, PartDecoder, StreamError};
use kvstore_proto::v1::put_request::Part as Wire;
use kvstore_proto::v1::{Level, PutBlock, PutOpen, PutRequest, PutResponse, PutResult, PutStatus};
use kvstore_tiers::admission::Admission;
use kvstore_tiers::host::{BeginFill, BlockFill, FillRequest, LeasedBlock, NamespaceId, RegisteredLayout};
use kvstore_tiers::nvme::{BlockRef, WriteBack};
use kvstore_tiers::object::{Offer, Offered};
use kvstore_tiers::residency::{FlightSource, Priority, Publish, Urgency};
use kvstore_tiers::{SequenceHash, SlotKey};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;

use super::room_below;
use crate::admission::Occasion;
use crate::config::Uploads;
use crate::daemon::Daemon;
use crate::{caps, clock, telemetry, wire};

/// Stores the blocks that `body` brings.
pub async fn put(
    daemon: &Arc<Daemon>,
    namespace: NamespaceId,
    body: Body,
    deadline: Instant,
) -> Result<PutResponse, Status> {
    let _permit = daemon.data_calls.try_acquire().map_err(|_| too_many_calls(daemon))?;
    let mut call = PutCall {
        daemon,
        namespace,
        deadline,
        target: None,
        more_follows: false,
        current: None,
        last: None,
        results: Vec::new(),
        hashes: Vec::new(),
        local: Vec::new(),
        durable: Vec::new(),
        or_lower: false,
    };
    tokio::time::timeout_at(deadline, async {
        call.run(body).await?;
        call.until_local().await;
        call.until_durable().await
    })
    .await
    .map_err(|_| late())??;
    Ok(PutResponse { results: call.results })
}

/// The answer when too many data calls are under way.
pub fn too_many_calls(daemon: &Daemon) -> Status {
    telemetry::add(&daemon.traffic.busy, 1);
    Status::resource_exhausted(format!(
        "{} put and get calls are in progress, which is the maximum: try again later",
        caps::DATA_CALLS_MAX
    ))
}

fn late() -> Status {
    Status::deadline_exceeded("the call's deadline passed; the blocks that were complete by then are stored")
}

fn stream_error(error: StreamError) -> Status {
    match error {
        StreamError::Compressed => Status::unimplemented(error.to_string()),
        StreamError::TooLarge(_) => Status::resource_exhausted(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}

/// Where blocks go, and how safe they shall be.
#[derive(Clone)]
pub struct Target {
    /// The layout.
    pub layout: Arc<RegisteredLayout>,
    /// The layer group.
    pub group: u16,
    /// The level that was asked for.
    pub level: Level,
    /// The blocks go to the bucket in the background, whatever the configuration says.
    pub upload: bool,
}

impl Target {
    /// True where the call waits for the disk.
    pub fn waits_for_disk(&self) -> bool {
        self.level == Level::Local
    }

    /// True where puts wait while uploads keep too much memory: somebody waits for DURABLE, or memory alone has the blocks until
    /// they are uploaded. A store that does not answer is waited for by nobody but the former.
    pub(super) fn waits_for_uploads(&self, daemon: &Daemon) -> bool {
        let Some(object) = &daemon.object else { return false };
        let memory_alone = daemon.nvme.is_none() || daemon.admitter.admission(self.layout.namespace) != Admission::All;
        let uploads_all = || self.upload || daemon.uploads_of(self.layout.namespace) == Uploads::All;
        self.level == Level::Durable || (memory_alone && uploads_all() && object.answers())
    }

    /// True where a block goes to the bucket: asked for, or by the configuration.
    fn uploads(&self, daemon: &Daemon, hash: &SequenceHash) -> bool {
        daemon.object.is_some()
            && (self.level == Level::Durable
                || self.upload
                || match daemon.uploads_of(self.layout.namespace) {
                    Uploads::Asked | Uploads::Evicted => false,
                    // By the request that stores it, and by one before.
                    Uploads::Reused => daemon.admitter.is_reused(&self.layout, hash),
                    Uploads::All => true,
                })
    }
}

/// The block whose bytes are coming.
struct Current {
    hash: SequenceHash,
    parent: Option<SequenceHash>,
    expected: u64,
    received: u64,
    crc32: Option<u32>,
    into: Into,
}

/// Where a block's bytes go.
pub enum Into {
    /// A slot.
    Slot(Box<BlockFill>),
    /// Nowhere: the answer is known already, the bytes are read past.
    Past(PutStatus),
}

struct PutCall<'a> {
    daemon: &'a Arc<Daemon>,
    namespace: NamespaceId,
    deadline: Instant,
    target: Option<Target>,
    more_follows: bool,
    current: Option<Current>,
    /// The last block that is there now.
    last: Option<SequenceHash>,
    results: Vec<PutResult>,
    /// The names of the results' blocks, where DURABLE was asked for.
    hashes: Vec<SequenceHash>,
    /// Results that wait to become LOCAL.
    local: Vec<(usize, oneshot::Receiver<bool>)>,
    /// Results that wait to become DURABLE.
    durable: Vec<(usize, oneshot::Receiver<bool>)>,
    /// A lower level will do, where DURABLE is not to be had now.
    or_lower: bool,
}

impl PutCall<'_> {
    async fn run(&mut self, mut body: Body) -> Result<(), Status> {
        let mut decoder = PartDecoder::new();
        while let Some(frame) = body.frame().await {
            let Ok(bytes) = frame?.into_data() else { continue };
            decoder.push(bytes);
            while let Some(part) = decoder.next_part::<PutRequest>().map_err(stream_error)? {
                match part {
                    Part::Data(bytes) => self.data(&bytes)?,
                    Part::Message(message) => self.message(message).await?,
                }
            }
        }
        decoder.finish().map_err(stream_error)?;
        let tail = self.target.is_some() && !self.more_follows;
        self.finish_block(tail)?;
        if self.results.is_empty() {
            return Err(wire::invalid("block", "the call has no block: send at least one"));
        }
        if let (Some(target), Some(last)) = (&self.target, self.last) {
            self.daemon.host.refresh_chain(&target.layout, target.group, last);
        }
        Ok(())
    }

    async fn message(&mut self, message: PutRequest) -> Result<(), Status> {
        match message.part {
            Some(Wire::Open(open)) => self.open(&open),
            Some(Wire::Block(block)) => {
                self.finish_block(false)?;
                self.begin_block(&block).await
            }
            Some(Wire::Data(bytes)) => self.data(&bytes),
            None => Err(wire::invalid("part", "a message must have open, block or data")),
        }
    }

    fn open(&mut self, open: &PutOpen) -> Result<(), Status> {
        if self.target.is_some() {
            return Err(wire::invalid("open", "must be the first message, and must come only once"));
        }
        match Level::try_from(open.level) {
            Ok(Level::Unspecified | Level::Memory) => {}
            Ok(Level::Local) if self.daemon.nvme.is_some() => {}
            Ok(Level::Local) => return Err(no_tier("LOCAL", "an Nvme tier")),
            Ok(Level::Durable) => match &self.daemon.object {
                None => return Err(no_tier("DURABLE", "an object store (object.url)")),
                Some(object) => {
                    if let Some(why) = object.refuses_durable().filter(|_| !open.or_lower) {
                        return Err(not_durable(&why));
                    }
                }
            },
            Err(_) => {
                return Err(wire::invalid(
                    "open.level",
                    format!("{} is not a level: use MEMORY, LOCAL or DURABLE", open.level),
                ));
            }
        }
        let layout = wire::known_layout(self.daemon, self.namespace, &open.layout_digest)?;
        let (group, _) = wire::known_group(&layout, open.group)?;
        self.more_follows = open.more_follows;
        self.or_lower = open.or_lower;
        let level = if open.level() == Level::Unspecified { Level::Memory } else { open.level() };
        if open.upload && self.daemon.object.is_none() {
            return Err(no_tier("DURABLE (open.upload)", "an object store (object.url)"));
        }
        self.target = Some(Target { layout, group, level, upload: open.upload });
        Ok(())
    }

    async fn begin_block(&mut self, block: &PutBlock) -> Result<(), Status> {
        let target = self.target.as_ref().ok_or_else(|| wire::invalid("block", "must come after open"))?;
        if self.results.len() >= caps::BLOCKS_PER_PUT_MAX {
            let problem = format!("block: one call can store at most {} blocks", caps::BLOCKS_PER_PUT_MAX);
            return Err(Status::resource_exhausted(problem));
        }
        let hash = wire::hash("block.sequence_hash", &block.sequence_hash)?;
        let parent = match block.parent_hash.as_ref() {
            [] => None,
            bytes => Some(wire::hash("block.parent_hash", bytes)?),
        };
        let length = checked_length(target, block.length)?;
        let request = fill_request(target, hash, parent, length, self.deadline);
        let has_room = room_below::wait_for(self.daemon, target).await;
        let into = if has_room { begin(self.daemon, &request).await? } else { busy(self.daemon) };
        self.current = Some(Current { hash, parent, expected: block.length, received: 0, crc32: block.crc32, into });
        Ok(())
    }

    fn data(&mut self, bytes: &Bytes) -> Result<(), Status> {
        let at = self.results.len();
        let current = self.current.as_mut().ok_or_else(|| wire::invalid("data", "must come after block"))?;
        current.received += bytes.len() as u64;
        if current.received > current.expected {
            let problem =
                format!("block {at} ({}) announced {} bytes but brought more", current.hash, current.expected);
            return Err(wire::invalid("data", problem));
        }
        if let Into::Slot(fill) = &mut current.into {
            fill.append(bytes, clock::now()).map_err(|error| wire::invalid("data", error))?;
        }
        Ok(())
    }

    /// The block that was coming is complete, or the stream is wrong.
    fn finish_block(&mut self, tail: bool) -> Result<(), Status> {
        let Some(current) = self.current.take() else { return Ok(()) };
        let (at, hash) = (self.results.len(), current.hash);
        if current.received != current.expected {
            let problem =
                format!("block {at} ({hash}) announced {} bytes but brought {}", current.expected, current.received);
            return Err(wire::invalid("data", problem));
        }
        let Some(target) = &self.target else { return Ok(()) };
        let finished = match current.into {
            Into::Past(status) => present(self.daemon, target, hash, current.parent, status),
            Into::Slot(fill) => {
                let crc32 = fill.crc32();
                if let Some(expected) = current.crc32.filter(|expected| *expected != crc32) {
                    let problem = format!(
                        "block {at} ({hash}) was not stored: its bytes have the checksum {crc32:08x}, but it announced {expected:08x}"
                    );
                    return Err(wire::invalid("block.crc32", problem));
                }
                publish(self.daemon, target, *fill, hash, current.parent, tail)
            }
        };
        if finished.level == Level::Memory {
            self.last = Some(hash);
        }
        if let Some(local) = finished.local {
            self.local.push((self.results.len(), local));
        }
        if let Some(durable) = finished.durable {
            self.durable.push((self.results.len(), durable));
        }
        if target.level == Level::Durable {
            self.hashes.push(hash);
        }
        self.results.push(PutResult { status: finished.status.into(), level: finished.level.into() });
        Ok(())
    }
}

/// What became of a block.
pub struct Finished {
    /// The answer.
    pub status: PutStatus,
    /// The level that it has by now.
    pub level: Level,
    /// Where LOCAL was asked for: brings true once it is.
    pub local: Option<oneshot::Receiver<bool>>,
    /// Where DURABLE was asked for: brings true once it is.
    pub durable: Option<oneshot::Receiver<bool>>,
}

impl Finished {
    fn of(status: PutStatus, level: Level) -> Self {
        Self { status, level, local: None, durable: None }
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
    let is_written = daemon.nvme.is_some() || target.uploads(daemon, &hash);
    let sums = if is_written { fill.section_sums() } else { Vec::new() };
    let bytes = fill.length() as u64;
    // Leased until it is queued for the disk: under pressure it would be the first to leave, as the newest leaf of its chain.
    let (published, leased) = fill.commit_leased(tail);
    match published {
        Publish::Published => {
            telemetry::add(&daemon.traffic.put_blocks, 1);
            telemetry::add(&daemon.traffic.put_bytes, bytes);
            written_back(daemon, target, hash, parent, sums, PutStatus::Stored, leased)
        }
        Publish::Superseded => Finished::of(PutStatus::Superseded, Level::Unspecified),
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
        PutStatus::Present | PutStatus::Joined => written_back(daemon, target, hash, parent, Vec::new(), status, None),
        _ => Finished::of(status, Level::Unspecified),
    }
}

/// The block is readable: it goes to disk and to the bucket in the background, or, where that was asked for, before the answer.
fn written_back(
    daemon: &Daemon,
    target: &Target,
    hash: SequenceHash,
    parent: Option<SequenceHash>,
    sums: Vec<u32>,
    status: PutStatus,
    leased: Option<LeasedBlock>,
) -> Finished {
    let mut finished = Finished::of(status, Level::Memory);
    let uploads = target.uploads(daemon, &hash);
    let sums_of_upload = if uploads { sums.clone() } else { Vec::new() };
    // Where the bucket cannot be had, a DURABLE put is LOCAL at least.
    let occasion = if target.level == Level::Memory { Occasion::Stored } else { Occasion::Must };
    let admitted = || daemon.admitter.admits(&target.layout, target.group, &hash, occasion, clock::now());
    if let Some(nvme) = daemon.nvme.as_ref() {
        let block = BlockRef { layout: &target.layout, group: target.group, hash };
        if !admitted() {
            telemetry::add(&daemon.traffic.not_admitted, 1);
        } else if let WriteBack::Queued(Some(local)) = nvme.write_back(&block, parent, sums, target.waits_for_disk()) {
            finished.local = Some(local);
        }
    }
    if let Some(object) = daemon.object.as_ref().filter(|_| uploads) {
        let key = SlotKey { layout: target.layout.ordinal, group: target.group, hash };
        // Gone again already: then it is nobody's any more.
        let Some(block) = leased.or_else(|| daemon.host.lease_quietly(target.layout.namespace, &key)) else {
            return finished;
        };
        let (layout, group, durable) = (Arc::clone(&target.layout), target.group, target.level == Level::Durable);
        let has_waited = target.waits_for_uploads(daemon);
        let offer = Offer { layout, group, hash, parent, block, sums: sums_of_upload, durable, has_waited };
        if let Offered::Accepted(Some(waiting)) = object.offer(offer) {
            finished.durable = Some(waiting);
        }
    }
    finished
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

impl PutCall<'_> {
    /// Waits for the blocks that are to be LOCAL. One that cannot be stays MEMORY, and its result says so.
    async fn until_local(&mut self) {
        for (at, local) in std::mem::take(&mut self.local) {
            if local.await == Ok(true)
                && let Some(result) = self.results.get_mut(at)
            {
                result.level = Level::Local.into();
            }
        }
    }
}

impl PutCall<'_> {
    /// Waits for the blocks that are to be DURABLE. Those that cannot be now are LOCAL, or MEMORY, and are uploaded later; the
    /// call fails, unless a lower level will do.
    async fn until_durable(&mut self) -> Result<(), Status> {
        let Some(target) = self.target.as_ref().filter(|target| target.level == Level::Durable) else { return Ok(()) };
        let Some(object) = &self.daemon.object else { return Ok(()) };
        object.flush();
        for (at, durable) in std::mem::take(&mut self.durable) {
            if durable.await == Ok(true)
                && let Some(result) = self.results.get_mut(at)
            {
                result.level = Level::Durable.into();
            }
        }
        let stored = |result: &&PutResult| result.level() != Level::Unspecified;
        let lacking = self.results.iter().filter(stored).filter(|result| result.level() != Level::Durable).count();
        if lacking == 0 {
            return Ok(());
        }
        if !self.or_lower {
            let why = object.status().reason;
            let why = if why.is_empty() { "the object store did not take them".to_owned() } else { why };
            return Err(not_durable(&format!("{lacking} of {} blocks: {why}", self.results.len())));
        }
        self.lower(&Arc::clone(&target.layout), target.group).await;
        Ok(())
    }

    /// What is not DURABLE is LOCAL, where it is on disk.
    async fn lower(&mut self, layout: &Arc<RegisteredLayout>, group: u16) {
        let Some(nvme) = self.daemon.nvme.clone() else { return };
        for synced in nvme.sync() {
            if synced.await != Ok(true) {
                return;
            }
        }
        for (result, hash) in self.results.iter_mut().zip(&self.hashes) {
            if result.level() == Level::Memory && nvme.presence(layout, group, &[*hash]) == [true] {
                result.level = Level::Local.into();
            }
        }
    }
}

/// The answer where DURABLE cannot be had now.
fn not_durable(why: &str) -> Status {
    Status::unavailable(format!(
        "the blocks are not DURABLE: {why}. The daemon uploads the stored blocks once the store answers. To accept less, ask for the level LOCAL, or set or_lower in the request"
    ))
}

/// The answer where a level has no tier.
pub fn no_tier(level: &str, tier: &str) -> Status {
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
            BeginFill::NeedsSlab(plan) if slabs < caps::SLABS_PER_FILL_MAX => {
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
