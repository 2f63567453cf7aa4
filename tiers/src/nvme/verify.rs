//! Verification: every frame read and compared with its checksums, of a running tier or of a folder.

use std::path::Path;
use std::sync::Arc;

use kvstore_transfer::Lane;

use super::extents::Entry;
use super::store::{OpenError, Store};
use super::write::Commit;
use super::{NvmeOptions, NvmeTier, Peers};
use crate::caps;
use crate::changes::ChangeLog;

/// Times that a segment is scanned, where the index does not take what was found: a check ends, on a full disk too.
const SCANS_MAX: u32 = 3;

/// What to do with blocks that are damaged.
#[derive(Clone, Copy, Default, Debug)]
pub struct VerifyOptions {
    /// Forget them, so that they are not found any more.
    pub quarantine: bool,
}

/// What was found.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// Blocks that the index names.
    pub blocks: u64,
    /// Read so far.
    pub verified: u64,
    /// Bytes of their frames.
    pub verified_bytes: u64,
    /// Damaged, or not to be read.
    pub corrupt: u64,
    /// Entries that a new life of their segment has fenced off.
    pub stale: u64,
    /// Segments whose blocks have to be found again, because the index was lost.
    pub unknown_segments: u64,
}

impl NvmeTier {
    /// The blocks of all volumes, to be checked by [`Self::verify_block`].
    pub fn blocks_to_verify(&self) -> Vec<(usize, u32)> {
        let segments = |at: usize, store: &Arc<Store>| {
            let count = store.state.lock().segments.len() as u32;
            (0..count).map(move |segment| (at, segment)).collect::<Vec<_>>()
        };
        self.stores.iter().enumerate().flat_map(|(at, store)| segments(at, store)).collect()
    }

    /// Checks the blocks of one segment and adds to the report; damaged ones are forgotten. Blocks.
    pub fn verify_segment(&self, volume: usize, segment: u32, report: &mut VerifyReport) {
        if let Some(store) = self.stores.get(volume) {
            verify_segment(store, segment, VerifyOptions { quarantine: true }, report);
        }
    }

    /// Blocks of all volumes.
    pub fn blocks(&self) -> u64 {
        self.stores.iter().map(|store| store.state.lock().extents.len() as u64).sum()
    }
}

fn verify_segment(store: &Arc<Store>, segment: u32, options: VerifyOptions, report: &mut VerifyReport) {
    let entries: Vec<Entry> = store.state.lock().extents.of_segment(segment);
    for entry in entries {
        // Forgotten or moved since.
        let Some(now) = store.begin_read(entry.digest) else { continue };
        let frame = store.read_whole(&now, Lane::Background);
        store.end_read(&now);
        report.verified += 1;
        report.verified_bytes += now.extent.bytes();
        if matches!(frame, Ok(Some(_))) {
            continue;
        }
        report.corrupt += 1;
        // What could not be read may be sound.
        if options.quarantine && frame.is_ok() {
            store.quarantine(&now);
        }
    }
}

/// Checks a folder that no daemon uses; `progress` is told as it goes.
pub fn verify_folder(
    path: &Path,
    options: &NvmeOptions,
    verify: VerifyOptions,
    mut progress: impl FnMut(&VerifyReport),
) -> Result<VerifyReport, OpenError> {
    let dirty = Arc::default();
    let peers = Arc::new(Peers::new(dirty, Arc::new(ChangeLog::new(0))));
    if !path.join("blocks").exists() {
        let cause = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(OpenError::Io { step: "find a volume in", path: path.to_owned(), cause });
    }
    // As large as it is: nothing is given back, and nothing taken.
    let length = std::fs::metadata(path.join("blocks")).map_or(0, |metadata| metadata.len());
    let least = caps::NVME_SEGMENTS_MIN as u64 * caps::NVME_SEGMENT_BYTES_MAX;
    let bytes = length.saturating_add(options.index_bytes.unwrap_or(caps::NVME_INDEX_BYTES_MIN)).saturating_add(least);
    let options = &NvmeOptions { bytes, ..options.clone() };
    let (store, commits) = Store::open(path, options, peers)?;
    let committer = {
        let store = Arc::clone(&store);
        std::thread::spawn(move || store.commit_forever(&commits))
    };
    let mut report = VerifyReport {
        blocks: store.state.lock().extents.len() as u64,
        stale: store.counters.stale_blocks.load(std::sync::atomic::Ordering::Relaxed),
        ..VerifyReport::default()
    };
    let unknown = store.state.lock().segments.unknown();
    report.unknown_segments = unknown.len() as u64;
    if !unknown.is_empty() {
        store.rebuild(SCANS_MAX);
        report.blocks = store.state.lock().extents.len() as u64;
    }
    let segments = store.state.lock().segments.len() as u32;
    for segment in 0..segments {
        verify_segment(&store, segment, verify, &mut report);
        progress(&report);
    }
    let _ = store.commits.send(Commit::Stop);
    let _ = committer.join();
    store.let_go();
    Ok(report)
}
