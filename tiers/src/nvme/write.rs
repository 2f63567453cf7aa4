//! Writing: blocks from memory onto the volume, and what is known of them into the index.
//!
//! What the two threads of a volume pass on. The *flusher* (`flush.rs`) takes dirty blocks, finds places for
//! their frames and queues the writes; where there is no free segment it empties one first. The *committer*
//! (`commit.rs`) takes what was written, puts it into the index and the map, and answers those who wait for
//! LOCAL: all that came meanwhile with one sync of the data and one of the index's log, side by side (group
//! commit).
//!
//! Order: frame, index, map. A frame without an index entry is an orphan that the next life of its segment
//! buries; an entry whose frame did not make it to the platter does not verify and is a miss.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_transfer::frame::FrameIdentity;
use tokio::sync::oneshot;

use super::format::{Extent, IndexValue};
use super::index::IndexError;
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

    pub fn has_tag(&self, tag: u64) -> bool {
        self.tags.contains(&tag)
    }
}

/// Dirty blocks, oldest first, and the places of deleted ones, whose headers are to be zeroed. Bounded by the
/// limits on dirty blocks, and by the blocks that were on the volume.
#[derive(Default)]
pub(super) struct WriteQueue {
    pub items: VecDeque<Dirty>,
    pub buried: VecDeque<Extent>,
}

/// A frame that was queued for the device.
pub(super) struct Framed {
    pub dirty: Dirty,
    pub value: IndexValue,
}

/// What the committer is told.
pub(super) enum Commit {
    /// A write ended.
    Written(Vec<Framed>, io::Result<()>),
    /// Blocks are gone from the map.
    Deleted(Vec<Digest>),
    /// Everything before is to be synced; then the answer.
    Sync(oneshot::Sender<bool>),
    /// A pin began.
    Pinned(u128, Vec<u8>),
    /// A pin ended.
    Unpinned(u128),
    /// No more will come.
    Stop,
}

/// Why a frame found no place.
#[derive(Debug)]
pub(super) enum NoPlace {
    /// Too large, or all segments are in use or pinned.
    NoRoom,
    /// The file system is full.
    NoSpace,
    /// The device failed.
    Io(io::Error),
    /// The index failed.
    Index(IndexError),
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
