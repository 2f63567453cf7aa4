//! The tier at one moment.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use super::NvmeTier;
use super::format::PAGE;
use super::state::{Health, State};
use super::store::Store;

/// The tier at one moment.
#[derive(Clone, Debug, Default)]
pub struct NvmeStatus {
    /// Bytes of blocks that wait to be written.
    pub dirty_bytes: u64,
    /// Puts wait above this.
    pub dirty_bytes_max: u64,
    /// Each volume.
    pub volumes: Vec<VolumeStatus>,
}

/// One volume at one moment. Counts are since the start.
#[derive(Clone, Debug, Default)]
pub struct VolumeStatus {
    /// Its folder.
    pub path: PathBuf,
    /// SERVING, REBUILDING, CHECKING, NO_SPACE, INDEX_CLOSED, READ_ONLY or LEFT.
    pub state: &'static str,
    /// Why, where it does not fully serve; also what a volume does not take although it serves.
    pub reason: Option<String>,
    /// The bound, the index included.
    pub bytes_max: u64,
    /// Bytes of disk taken, the index included.
    pub disk_bytes: u64,
    /// Bytes of that which the index takes.
    pub index_bytes: u64,
    /// The bound on those.
    pub index_bytes_max: u64,
    /// Blocks.
    pub blocks: u64,
    /// Bytes of frames that can be read.
    pub live_bytes: u64,
    /// Bytes of those that are pinned.
    pub pinned_bytes: u64,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Segments that may be written next.
    pub segments_free: u64,
    /// Segments still to be scanned.
    pub segments_unknown: u64,
    /// Transfers that wait: demand, prefetch, write-back.
    pub queued: [usize; 3],
    /// Transfers that the device has.
    pub flying: usize,
    /// Blocks that wait to be written.
    pub dirty_blocks: u64,
    /// Blocks written for the first time, and their bytes.
    pub admitted_blocks: u64,
    /// See `admitted_blocks`.
    pub admitted_bytes: u64,
    /// Bytes written to the device for frames and segments.
    pub device_written_bytes: u64,
    /// Bytes handed to the index.
    pub index_written_bytes: u64,
    /// Blocks read, and their frames' bytes.
    pub read_blocks: u64,
    /// See `read_blocks`.
    pub read_bytes: u64,
    /// Blocks that moved on when their segment was emptied.
    pub reinserted_blocks: u64,
    /// Bytes of them.
    pub reinserted_bytes: u64,
    /// Blocks forgotten for lack of room.
    pub dropped_blocks: u64,
    /// Segments emptied.
    pub reclaimed_segments: u64,
    /// Blocks that did not match their checksums.
    pub corrupt_blocks: u64,
    /// Index entries that were fenced off at the start.
    pub stale_blocks: u64,
    /// Blocks that were not written for lack of room, or because the volume takes no writes.
    pub refused_blocks: u64,
    /// Syncs.
    pub syncs: u64,
    /// Syncs of the data that failed.
    pub sync_failures: u64,
    /// Batches that the index did not take, or did not sync.
    pub index_failures: u64,
    /// Times that the index was found damaged and was built again: 1, or none.
    pub index_rebuilds: u64,
    /// Reads and writes that failed.
    pub io_errors: u64,
}

impl VolumeStatus {
    /// Bytes written to the device for each byte that was admitted; 0 before the first.
    pub fn write_amplification(&self) -> f64 {
        if self.admitted_bytes == 0 {
            return 0.0;
        }
        (self.device_written_bytes + self.index_written_bytes) as f64 / self.admitted_bytes as f64
    }
}

impl State {
    /// Why no segment can be freed.
    pub fn no_room_reason(&self, segment_bytes: u64) -> String {
        let (pinned, room) = (self.extents.pages().1 * PAGE, self.segments.allowed() as u64 * segment_bytes);
        format!(
            "no segment can be freed for new blocks: {pinned} bytes of {room} are pinned, and the rest is being read or written"
        )
    }
}

impl Store {
    /// Why the volume does not fully serve; or what it does not do although it serves.
    fn reason(&self, state: &State) -> Option<String> {
        let health = &state.health;
        match health {
            Health { left: true, .. } | Health { read_only: true, .. } => health.reason.clone(),
            Health { index_given_up: Some(why), .. } => Some(why.clone()),
            Health { no_space: true, .. } => Some("the file system is full".into()),
            Health { index_closed: true, .. } => {
                Some("the index cannot be written; it is opened again until that works".into())
            }
            Health { checking: true, .. } => health.reason.clone(),
            Health { rebuilding: 1.., .. } => {
                let unfinished =
                    || "an earlier start found the index damaged; a scan is finding the blocks again".into();
                Some(health.reason.clone().unwrap_or_else(unfinished))
            }
            Health { no_room: true, .. } => Some(state.no_room_reason(self.header.segment_bytes)),
            Health { keeps_space: true, .. } => {
                Some("the file system does not take back disk space beyond nvme.bytes".into())
            }
            Health { too_large: Some(bytes), .. } => Some(format!(
                "blocks of more than {} bytes have no room in a segment and stay in memory alone; one of {bytes} bytes was put",
                self.block_bytes_max()
            )),
            _ if !state.unread.is_empty() => Some(format!(
                "{} segments could not be read in full when the index was built again; a restart scans them once more",
                state.unread.len()
            )),
            _ if !state.suspects.is_empty() => Some(format!(
                "a sync failed: the blocks in {} segments are served, and are LOCAL again once they are put again",
                state.suspects.len()
            )),
            _ => None,
        }
    }
}

impl NvmeTier {
    /// The tier at this moment. Asks the file system for its sizes.
    pub fn status(&self) -> NvmeStatus {
        let volumes = self.stores.iter().map(|store| {
            let disk_bytes = store.disk_bytes();
            let (queued, flying) = store.volume.queued();
            let dirty_blocks = store.queue.lock().items.len() as u64;
            let counters = &store.counters;
            let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
            let state = store.state.lock();
            let (live_pages, pinned_pages) = state.extents.pages();
            let counts = state.segments.counts();
            VolumeStatus {
                path: store.path.clone(),
                state: state.health.name(),
                reason: store.reason(&state),
                bytes_max: get(&store.bytes_max),
                disk_bytes,
                index_bytes: store.index.disk_bytes(),
                index_bytes_max: store.index.bytes_max(),
                blocks: state.extents.len() as u64,
                live_bytes: live_pages * PAGE,
                pinned_bytes: pinned_pages * PAGE,
                segment_bytes: store.header.segment_bytes,
                segments_free: counts.free as u64,
                segments_unknown: counts.unknown as u64,
                queued,
                flying,
                dirty_blocks,
                admitted_blocks: get(&counters.admitted_blocks),
                admitted_bytes: get(&counters.admitted_bytes),
                device_written_bytes: get(&counters.device_written_bytes),
                index_written_bytes: get(&counters.index_written_bytes),
                read_blocks: get(&counters.read_blocks),
                read_bytes: get(&counters.read_bytes),
                reinserted_blocks: get(&counters.reinserted_blocks),
                reinserted_bytes: get(&counters.reinserted_bytes),
                dropped_blocks: get(&counters.dropped_blocks),
                reclaimed_segments: get(&counters.reclaimed_segments),
                corrupt_blocks: get(&counters.corrupt_blocks),
                stale_blocks: get(&counters.stale_blocks),
                refused_blocks: get(&counters.refused_blocks),
                syncs: get(&counters.syncs),
                sync_failures: get(&counters.sync_failures),
                index_failures: get(&counters.index_failures),
                index_rebuilds: get(&counters.index_rebuilds),
                io_errors: get(&counters.io_errors),
            }
        });
        NvmeStatus {
            dirty_bytes: self.dirty_bytes(),
            dirty_bytes_max: self.dirty_max.load(Ordering::Acquire),
            volumes: volumes.collect(),
        }
    }
}
