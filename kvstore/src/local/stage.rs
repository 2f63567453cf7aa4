//! Stage and copy: how blocks come in over the local plane. A client stages blocks: the daemon reserves slots, and says at once
//! which blocks it already has. The client then leaves their bytes, piece by piece, in its staging memory. The daemon copies a
//! piece while the client fills the next one, and tells the client when the piece's place is free again.
//!
//! The daemon trusts nothing that the client wrote. It checks offsets and lengths at each use. The bytes may change while it
//! copies them, so it computes the checksum from the copy.

use std::collections::HashMap;
use std::sync::Arc;

use kvstore_plane::{Completion, StageBlock};
use kvstore_proto::v1::PutStatus;
use kvstore_tiers::Tier;
use kvstore_tiers::host::{BeginFill, BlockFill};
use kvstore_tiers::stack::Level;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tonic::Status;

use super::client::{LocalClient, Task};
use crate::daemon::{Daemon, InFlight};
use crate::verbs::put::{self, Finished, Into, Target};
use crate::{caps, clock, wire};

/// What the blocks of one Stage command have in common.
pub struct Batch {
    /// Who stores them.
    pub daemon: Arc<Daemon>,
    /// Where what waits is done.
    pub runtime: Handle,
    /// Where they go.
    pub target: Target,
    /// What is not whole then is dropped.
    pub expires: Instant,
    /// A drain waits until the last block is decided.
    pub _call: InFlight,
}

/// A block on its way in.
pub enum Stage {
    /// It has no slot yet; pieces of it wait.
    Pending {
        /// What came meanwhile.
        pieces: Vec<Piece>,
        /// What it came with.
        batch: Arc<Batch>,
    },
    /// It has one.
    Filling(Box<Filling>),
}

impl Stage {
    pub(super) fn expires(&self) -> Instant {
        match self {
            Self::Pending { batch, .. } => batch.expires,
            Self::Filling(filling) => filling.batch.expires,
        }
    }
}

/// A block with a slot.
pub struct Filling {
    fill: BlockFill,
    block: StageBlock,
    batch: Arc<Batch>,
}

/// Bytes in staging memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
    /// No more follow.
    pub last: bool,
    /// Of all bytes, with the last.
    pub crc32: Option<u32>,
}

impl Batch {
    /// Reserves slots for blocks; those that are decided at once are answered at once.
    pub fn stage(self, client: &Arc<LocalClient>, first_tag: u64, blocks: &[StageBlock]) {
        let batch = Arc::new(self);
        for (tag, block) in (first_tag..).zip(blocks) {
            if let Err(status) = batch.stage_one(client, tag, block) {
                client.fail(tag, &status);
            }
        }
    }

    fn stage_one(self: &Arc<Self>, client: &Arc<LocalClient>, tag: u64, block: &StageBlock) -> Result<(), Status> {
        let Self { daemon, target, .. } = &**self;
        put::checked_length(target, u64::from(block.length))?;
        put::check_tiers(daemon, &target.wish)?;
        {
            let stages = client.stages.lock();
            if stages.contains_key(&tag) {
                return Err(wire::invalid("tag", "another block is already staged under this tag"));
            }
            if stages.len() >= caps::STAGES_PER_CLIENT_MAX {
                let problem = format!(
                    "{} blocks are staged, which is the maximum: finish or abandon some of them",
                    caps::STAGES_PER_CLIENT_MAX
                );
                return Err(Status::resource_exhausted(problem));
            }
        }
        if daemon.stack.has_room(&target.wish) {
            let request = put::fill_request(target, block.hash, block.parent, block.length, self.expires);
            match daemon.host.begin_fill(&request, clock::now()) {
                BeginFill::Fill(fill, ahead) => {
                    if let Some(plan) = ahead {
                        let host = Arc::clone(&daemon.host);
                        self.runtime.spawn_blocking(move || host.make_slab(plan));
                    }
                    let filling = Filling { fill, block: *block, batch: Arc::clone(self) };
                    client.stages.lock().insert(tag, Stage::Filling(Box::new(filling)));
                    client.complete(tag, &Completion::Staged);
                    return Ok(());
                }
                BeginFill::Resident => {
                    let finished = put::present(daemon, target, block.hash, block.parent, PutStatus::Present);
                    self.finish(client, tag, block, finished);
                    return Ok(());
                }
                BeginFill::NeedsSlab(plan) => daemon.host.drop_plan(plan),
                BeginFill::InFlight | BeginFill::Busy | BeginFill::Wait | BeginFill::Outranked => {}
            }
        }
        let Some(task) = client.begin_task() else {
            return Err(Status::resource_exhausted("too many commands of this client are waiting: try again later"));
        };
        client.stages.lock().insert(tag, Stage::Pending { pieces: Vec::new(), batch: Arc::clone(self) });
        self.runtime.spawn(Arc::clone(self).wait_for_slot(Arc::clone(client), task, tag, *block));
        Ok(())
    }

    /// Until there is room, and no other writer is at work.
    async fn wait_for_slot(self: Arc<Self>, client: Arc<LocalClient>, _task: Task, tag: u64, block: StageBlock) {
        let Self { daemon, target, .. } = &*self;
        let begun = tokio::time::timeout_at(self.expires, async {
            if !daemon.stack.until_room(&target.wish).await {
                return Ok(put::busy(daemon));
            }
            let request = put::fill_request(target, block.hash, block.parent, block.length, self.expires);
            put::begin(daemon, &request).await
        });
        let status = match begun.await {
            Ok(Ok(Into::Slot(fill))) => {
                let filling = Filling { fill: *fill, block, batch: Arc::clone(&self) };
                let mut stages = client.stages.lock();
                let pieces = match stages.remove(&tag) {
                    Some(Stage::Pending { pieces, batch }) if Arc::ptr_eq(&batch, &self) => pieces,
                    // It was abandoned, and its tag is another block's by now.
                    Some(other) => return drop(stages.insert(tag, other)),
                    None => return,
                };
                stages.insert(tag, Stage::Filling(Box::new(filling)));
                // Under the lock: pieces that come now come after these.
                let copied: Vec<Copied> =
                    pieces.into_iter().map(|piece| apply(&client, &mut stages, tag, piece)).collect();
                drop(stages);
                client.complete(tag, &Completion::Staged);
                copied.into_iter().for_each(|copied| report(&client, tag, copied));
                return;
            }
            Ok(Ok(Into::Past(status))) => {
                if self.unstage_own(&client, tag) {
                    let finished = put::present(daemon, target, block.hash, block.parent, status);
                    self.finish(&client, tag, &block, finished);
                }
                return;
            }
            Ok(Err(status)) => status,
            Err(_) => late(),
        };
        if self.unstage_own(&client, tag) {
            client.fail(tag, &status);
        }
    }

    /// Forgets a block of this batch that waits; false where its tag is another's by now, or nobody's.
    fn unstage_own(self: &Arc<Self>, client: &LocalClient, tag: u64) -> bool {
        let is_own = |stage: &Stage| matches!(stage, Stage::Pending { batch, .. } if Arc::ptr_eq(batch, self));
        let own = client.stages.lock().get(&tag).is_some_and(is_own);
        own && unstage(client, tag)
    }

    /// Answers for a block, once it is as safe as was asked.
    fn finish(self: &Arc<Self>, client: &Arc<LocalClient>, tag: u64, block: &StageBlock, finished: Finished) {
        if block.tail && finished.level.is_some() {
            self.daemon.host.refresh_chain(&self.target.layout, self.target.group, block.hash);
        }
        let stored =
            |level| Completion::Stored { status: finished.status as u32, level: wire::level_message(level) as u32 };
        let Some(local) = finished.copies.local.filter(|_| self.target.wish.awaits(Tier::Nvme)) else {
            return client.complete(tag, &stored(finished.level));
        };
        let Some(task) = client.begin_task() else {
            return client.complete(tag, &stored(finished.level));
        };
        let (client, memory, on_disk) = (Arc::clone(client), stored(finished.level), stored(Some(Level::Local)));
        let batch = Arc::clone(self);
        self.runtime.spawn(async move {
            // A disk that does not answer by then leaves the block MEMORY.
            let synced = tokio::time::timeout_at(batch.expires, local).await == Ok(Ok(true));
            client.complete(tag, if synced { &on_disk } else { &memory });
            drop((task, batch));
        });
    }
}

fn late() -> Status {
    Status::deadline_exceeded("the put's deadline passed; the blocks that were complete by then are stored")
}

/// Forgets a staged block, and gives back the places of its pieces. False where it was forgotten already.
fn unstage(client: &LocalClient, tag: u64) -> bool {
    let removed = client.stages.lock().remove(&tag);
    if let Some(Stage::Pending { pieces, .. }) = &removed {
        pieces.iter().for_each(|_| client.complete(tag, &Completion::Copied));
    }
    removed.is_some()
}

/// The client gives up a staged block.
pub fn abandon(client: &LocalClient, tag: u64) {
    unstage(client, tag);
}

/// Drops what was staged and not brought in time.
pub fn expire(client: &LocalClient, now: Instant) {
    let late_ones: Vec<u64> =
        client.stages.lock().iter().filter(|(_, stage)| stage.expires() <= now).map(|(tag, _)| *tag).collect();
    for tag in late_ones {
        if unstage(client, tag) {
            client.fail(tag, &late());
        }
    }
    client.promoted.lock().retain(|_, promoted| promoted.until > now);
}

/// The next piece of a staged block lies in staging memory.
pub fn copy(client: &Arc<LocalClient>, tag: u64, piece: Piece) {
    let mut stages = client.stages.lock();
    if let Some(Stage::Pending { pieces, .. }) = stages.get_mut(&tag)
        && pieces.len() < caps::PIECES_PENDING_MAX
    {
        return pieces.push(piece);
    }
    let copied = apply(client, &mut stages, tag, piece);
    drop(stages);
    report(client, tag, copied);
}

/// What a piece came to.
enum Copied {
    /// More follow; or the block was decided before, and its bytes are of no use.
    Partly,
    /// The block is whole.
    Whole(Box<Filling>),
    /// The block will not come.
    Failed(Status),
}

fn apply(client: &LocalClient, stages: &mut HashMap<u64, Stage>, tag: u64, piece: Piece) -> Copied {
    let done = match stages.get_mut(&tag) {
        None => return Copied::Partly,
        Some(Stage::Pending { .. }) => Err(wire::invalid("copy", "there are more pieces than a block can have")),
        Some(Stage::Filling(filling)) => copy_piece(client, filling, piece),
    };
    match done {
        Ok(()) if !piece.last => Copied::Partly,
        Ok(()) => match stages.remove(&tag) {
            Some(Stage::Filling(filling)) => Copied::Whole(filling),
            _ => Copied::Partly,
        },
        Err(status) => {
            stages.remove(&tag);
            Copied::Failed(status)
        }
    }
}

fn report(client: &Arc<LocalClient>, tag: u64, copied: Copied) {
    client.complete(tag, &Completion::Copied);
    match copied {
        Copied::Partly => {}
        Copied::Failed(status) => client.fail(tag, &status),
        Copied::Whole(filling) => {
            let Filling { fill, block, batch } = *filling;
            let finished = put::publish(&batch.daemon, &batch.target, fill, block.hash, block.parent, block.tail);
            batch.finish(client, tag, &block, finished);
        }
    }
}

fn copy_piece(client: &LocalClient, filling: &mut Filling, piece: Piece) -> Result<(), Status> {
    let invalid = |problem: String| wire::invalid("copy", format!("block {}: {problem}", filling.block.hash));
    if piece.bytes as usize > kvstore_plane::caps::PIECE_BYTES_MAX || (!piece.last && !piece.bytes.is_multiple_of(64)) {
        return Err(invalid(format!("a piece of {} bytes is too large, or not a multiple of 64", piece.bytes)));
    }
    let staging = client.staging().ok_or_else(|| invalid("the client has no staging memory".into()))?;
    let inside = filling
        .fill
        .append_shared(&staging.memory, piece.offset, piece.bytes as usize, clock::now())
        .map_err(|error| wire::invalid("copy", error))?;
    let invalid = |problem: String| wire::invalid("copy", format!("block {}: {problem}", filling.block.hash));
    if !inside {
        return Err(invalid(format!("{} bytes at {} are not inside the staging memory", piece.bytes, piece.offset)));
    }
    if !piece.last {
        return Ok(());
    }
    if filling.fill.room() > 0 {
        return Err(invalid(format!("{} bytes are missing", filling.fill.room())));
    }
    match piece.crc32.filter(|expected| *expected != filling.fill.crc32()) {
        Some(expected) => Err(invalid(format!(
            "it was not stored: its bytes have the checksum {:08x}, but it announced {expected:08x}",
            filling.fill.crc32()
        ))),
        None => Ok(()),
    }
}
