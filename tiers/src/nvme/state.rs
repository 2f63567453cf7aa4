//! What memory knows of a volume, all under one lock: where blocks are, how the volume does, and what it owes its index. Pure.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use super::extents::{Entry, Extents};
use super::format::Extent;
use super::namespaces::Numbers;
use super::owed::Owed;
use super::pins::Pins;
use super::segments::Segments;
use super::write::PendingBlocks;
use crate::block::Digest;
use crate::caps;

/// Whether a volume serves, and if not fully, why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// The disk has gone: nothing on it can be read.
    pub left: bool,
    /// Nothing more is written until a restart.
    pub read_only: bool,
    /// The file system is full: nothing is written until there is room.
    pub no_space: bool,
    /// The index does not take writes; it is being opened again.
    pub index_closed: bool,
    /// It is not opened again before a restart, and why.
    pub index_given_up: Option<String>,
    /// What was written since the last sync is being checked, after a sync failed.
    pub checking: bool,
    /// Blocks are being found again: segments still to be scanned.
    pub rebuilding: usize,
    /// Why it has left, is read-only, or is being checked.
    pub reason: Option<String>,
    /// No segment can be freed for new blocks.
    pub no_room: bool,
    /// The smallest block that was refused because no segment has room for it, in bytes of its frame.
    pub too_large: Option<u64>,
    /// Disk space beyond the bound cannot be given back.
    pub keeps_space: bool,
}

impl Health {
    /// True where blocks can be written.
    pub fn takes_writes(&self) -> bool {
        !(self.left || self.read_only || self.no_space || self.index_closed || self.checking)
    }

    /// One word.
    pub fn name(&self) -> &'static str {
        match self {
            Self { left: true, .. } => "LEFT",
            Self { read_only: true, .. } => "READ_ONLY",
            Self { no_space: true, .. } => "NO_SPACE",
            Self { index_closed: true, .. } => "INDEX_CLOSED",
            Self { checking: true, .. } => "CHECKING",
            Self { rebuilding: 1.., .. } => "REBUILDING",
            _ => "SERVING",
        }
    }
}

/// What happened since the start.
#[derive(Default)]
pub(super) struct Counters {
    pub admitted_blocks: AtomicU64,
    pub admitted_bytes: AtomicU64,
    pub device_written_bytes: AtomicU64,
    pub index_written_bytes: AtomicU64,
    pub read_blocks: AtomicU64,
    pub read_bytes: AtomicU64,
    pub reinserted_blocks: AtomicU64,
    pub reinserted_bytes: AtomicU64,
    pub dropped_blocks: AtomicU64,
    pub reclaimed_segments: AtomicU64,
    pub corrupt_blocks: AtomicU64,
    pub stale_blocks: AtomicU64,
    pub refused_blocks: AtomicU64,
    pub syncs: AtomicU64,
    pub sync_failures: AtomicU64,
    pub index_failures: AtomicU64,
    pub index_rebuilds: AtomicU64,
    pub io_errors: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// What memory knows of the volume.
pub(super) struct State {
    pub extents: Extents,
    pub segments: Segments,
    pub pins: Pins,
    /// Blocks on their way to the volume.
    pub pending: PendingBlocks,
    pub health: Health,
    /// Segments that were written since the last sync began, or are being written; at the start, all that an earlier life wrote.
    pub unsynced: HashSet<u32>,
    /// Segments that a failed sync was to cover: nothing in them is safe from a loss of power.
    pub suspects: HashSet<u32>,
    /// Syncs of the data that failed: what was asked for before the last of them cannot be promised any more.
    pub failed_syncs: u64,
    /// What the index has yet to take.
    pub owed: Owed,
    /// Blocks that were deleted while segments are still to be scanned: the scan must not find them.
    pub buried: HashSet<Digest>,
    /// There were too many of those: deletions are not promised before the scan is over.
    pub forgets_deletions: bool,
    /// Segments that a scan could not read in full: the next start scans them again.
    pub unread: HashSet<u32>,
    /// The namespaces' numbers.
    pub numbers: Numbers,
    /// Of this daemon's life.
    pub second: u32,
}

impl State {
    /// Nothing is known yet.
    pub fn new(segments: Segments) -> Self {
        Self {
            extents: Extents::default(),
            segments,
            pins: Pins::default(),
            pending: PendingBlocks::default(),
            health: Health::default(),
            unsynced: HashSet::new(),
            suspects: HashSet::new(),
            failed_syncs: 0,
            owed: Owed::default(),
            buried: HashSet::new(),
            forgets_deletions: false,
            unread: HashSet::new(),
            numbers: Numbers::default(),
            second: 0,
        }
    }

    /// The number of the namespace with this digest; it is given one.
    pub fn namespace_number(&mut self, digest: &[u8; 32]) -> u8 {
        let number = self.numbers.assign(digest);
        self.extents.name_namespace(number, digest);
        number
    }

    /// Forgets a block, here and in the index.
    pub fn drop_block(&mut self, digest: Digest) -> Option<Entry> {
        let entry = self.extents.remove(digest)?;
        self.owed.delete(digest);
        Some(entry)
    }

    /// No scan is to come any more: what must not be found by one is forgotten.
    pub fn unbury_all(&mut self) {
        self.forgets_deletions = false;
        let Self { owed, buried, .. } = self;
        owed.unbury(buried.drain());
    }

    /// The same for one that must not come back: also not by a scan that is still to come across it. Its place, whose header is to
    /// be zeroed: a read of the segment begins.
    pub fn delete_block(&mut self, digest: Digest) -> Deleted {
        let entry = self.drop_block(digest);
        if let Some(entry) = &entry {
            self.segments.begin_read(entry.extent.segment);
        }
        let scanned = self.health.rebuilding == 0 && self.unread.is_empty();
        if !scanned && !self.buried.contains(&digest) {
            self.forgets_deletions |= self.buried.len() >= caps::NVME_BURIED_MAX;
            if !self.forgets_deletions {
                self.buried.insert(digest);
                self.owed.bury(digest);
            }
        }
        // An index that could not be read, or that is to be built again, may name what nobody here knows.
        let known = scanned && self.health.index_given_up.is_none() && !self.owed.is_deleted(digest);
        Deleted { frame: entry.map(|entry| entry.extent), known }
    }
}

/// What came of [`State::delete_block`].
pub(super) struct Deleted {
    /// Where its frame lies.
    pub frame: Option<Extent>,
    /// It is known to be nowhere on the volume, neither there nor in the index.
    pub known: bool,
}
