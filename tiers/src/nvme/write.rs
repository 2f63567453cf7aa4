//! Writing: blocks from memory onto the volume, and what is known of them into the index.
//!
//! What the two threads of a volume pass on. The *flusher* (`flush.rs`) takes dirty blocks, finds places for
//! their frames and queues the writes; where there is no free segment it empties one first. The *committer*
//! (`commit.rs`) takes what was written, puts it into the index and the map, and answers those who wait for
//! LOCAL: all that came meanwhile with one sync of the data and one of the index's log, side by side (group
//! commit). It alone writes to the index and syncs, one round after the other: what a failed sync covered, and in which order
//! the index hears of things, is therefore never a question. The others tell it, and wait where they must.
//!
//! Order: frame, index, map. A frame without an index entry is an orphan that the next life of its segment
//! buries; an entry whose frame did not make it to the platter does not verify and is a miss.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use kvstore_transfer::frame::FrameIdentity;
use tokio::sync::oneshot;

use super::extents::Entry;
use super::format::{Extent, IndexValue, SegmentClass};
use super::store::Store;
use crate::block::Digest;
use crate::host::DemotingBlock;

/// Counts a block and its bytes as dirty while it lives.
pub(super) struct DirtyBytes {
    of: Arc<DirtyCount>,
    bytes: u64,
}

/// What waits to be written, of all volumes.
#[derive(Default)]
pub(super) struct DirtyCount {
    pub bytes: AtomicU64,
    pub blocks: AtomicU64,
}

impl DirtyBytes {
    pub fn new(of: &Arc<DirtyCount>, bytes: u64) -> Self {
        of.bytes.fetch_add(bytes, Ordering::AcqRel);
        of.blocks.fetch_add(1, Ordering::AcqRel);
        Self { of: Arc::clone(of), bytes }
    }
}

impl Drop for DirtyBytes {
    fn drop(&mut self) {
        self.of.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.of.blocks.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A block that is to be written.
pub(super) struct Dirty {
    pub digest: Digest,
    pub parent_tag: u64,
    pub identity: FrameIdentity,
    pub section_bytes: u32,
    /// The sections' checksums, where the put took them; else they are taken here.
    pub sums: Vec<u32>,
    pub block: DemotingBlock,
    pub _bytes: DirtyBytes,
}

/// Who waits for a block on its way.
#[derive(Default)]
pub(super) struct Pending {
    /// It was deleted meanwhile.
    pub cancelled: bool,
    /// Told true once it is LOCAL, false once it will not be.
    pub waiters: Vec<oneshot::Sender<bool>>,
}

/// What came of [`Store::begin_pending`].
pub(super) enum Begun {
    /// Another writes it; whoever waits is told with that write's others.
    Already,
    /// It is for the caller to write.
    Now,
    /// The volume does not take it.
    Refused,
}

impl Store {
    /// Notes that a block is on its way. From then on others wait for its write, so that its bytes must be `at_hand`.
    pub fn begin_pending(&self, digest: Digest, waiter: Option<oneshot::Sender<bool>>, at_hand: bool) -> Begun {
        let mut state = self.state.lock();
        // Under the lock: who stops answers all that wait under it, and answers nobody later.
        if self.is_stopping() {
            return Begun::Refused;
        }
        if let Some(pending) = state.pending.get_mut(digest).filter(|pending| !pending.cancelled) {
            pending.waiters.extend(waiter);
            return Begun::Already;
        }
        if !at_hand || state.pending.get(digest).is_some() || !state.health.takes_writes() {
            return Begun::Refused;
        }
        state.pending.insert(digest, Pending { cancelled: false, waiters: Vec::from_iter(waiter) });
        Begun::Now
    }
}

/// The blocks on their way to a volume.
#[derive(Default)]
pub(super) struct PendingBlocks {
    by_digest: HashMap<Digest, Pending>,
    tags: HashSet<u64>,
}

impl PendingBlocks {
    pub fn insert(&mut self, digest: Digest, pending: Pending) {
        self.tags.insert(digest.tag());
        self.by_digest.insert(digest, pending);
    }

    pub fn remove(&mut self, digest: Digest) -> Option<Pending> {
        self.tags.remove(&digest.tag());
        self.by_digest.remove(&digest)
    }

    pub fn get_mut(&mut self, digest: Digest) -> Option<&mut Pending> {
        self.by_digest.get_mut(&digest)
    }

    pub fn get(&self, digest: Digest) -> Option<&Pending> {
        self.by_digest.get(&digest)
    }

    pub fn is_empty(&self) -> bool {
        self.by_digest.is_empty()
    }

    /// All who wait for a block.
    pub fn take_waiters(&mut self) -> Vec<oneshot::Sender<bool>> {
        self.by_digest.values_mut().flat_map(|pending| std::mem::take(&mut pending.waiters)).collect()
    }

    pub fn has_tag(&self, tag: u64) -> bool {
        self.tags.contains(&tag)
    }
}

/// Dirty blocks, oldest first, and the places of deleted ones, whose headers are to be zeroed. Bounded by the
/// limits on dirty blocks, and by the blocks that were on the volume.
pub(super) struct WriteQueue {
    pub items: VecDeque<Dirty>,
    pub buried: VecDeque<Extent>,
    /// Those whose zeroing failed: tried again later.
    pub unburied: Vec<Extent>,
    /// When the flusher looks after its other work next, where there is some.
    pub chores_at: Instant,
}

impl Default for WriteQueue {
    fn default() -> Self {
        Self { items: VecDeque::new(), buried: VecDeque::new(), unburied: Vec::new(), chores_at: Instant::now() }
    }
}

/// A frame that was queued for the device.
pub(super) struct Framed {
    pub dirty: Dirty,
    pub value: IndexValue,
}

/// A segment that is to begin a life, once what moved out of it is safe from a loss of power.
pub(super) struct Life {
    pub segment: u32,
    pub life: u64,
    pub class: SegmentClass,
}

/// A block whose frame was copied to another place.
pub(super) struct Move {
    pub from: Entry,
    pub to: Entry,
    pub value: IndexValue,
    /// What the index had of it before: to go back to, where the copy cannot be made safe.
    pub before: IndexValue,
}

/// Blocks that a scan found in a segment.
pub(super) struct Found {
    pub segment: u32,
    pub life: u64,
    pub class: SegmentClass,
    pub blocks: Vec<(Entry, IndexValue)>,
    /// The segment has no more.
    pub last: bool,
}

/// What the committer is told. Where it answers: true once the index has it.
pub(super) enum Commit {
    /// A write ended.
    Written(Vec<Framed>, io::Result<()>),
    /// The index owes something: see [`super::owed::Owed`].
    Owed,
    /// Everything before is to be synced; then the answer. With the count of failed syncs when that was asked for: one that
    /// failed since covered it.
    Sync(oneshot::Sender<bool>, u64),
    /// A segment begins a life.
    Life(Life, SyncSender<bool>),
    /// Blocks have moved out of a segment that is being emptied.
    Moved(Vec<Move>, SyncSender<bool>),
    /// Blocks were found.
    Found(Found, SyncSender<bool>),
    /// No more will come.
    Stop,
}

/// Why a frame found no place.
#[derive(Debug)]
pub(super) enum NoPlace {
    /// All segments are in use or pinned.
    NoRoom,
    /// It has no room in one segment.
    TooLarge,
    /// It changed in memory, or left it.
    Unreadable,
    /// The volume takes no writes just now.
    NoWrites,
    /// The device failed.
    Io(io::Error),
}

pub(super) fn is_no_space(error: &io::Error) -> bool {
    // ENOSPC and EDQUOT.
    matches!(error.raw_os_error(), Some(28 | 122))
}

pub(super) fn answer(pending: Option<Pending>, local: bool) {
    for waiter in pending.into_iter().flat_map(|pending| pending.waiters) {
        // Whoever waited may have left.
        let _ = waiter.send(local);
    }
}
