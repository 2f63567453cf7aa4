//! After a failed sync. What it covered may be gone from the platter though the kernel reads it back, and a second sync may succeed
//! all the same: so there is none. The volume takes no writes while the blocks that were covered are read back past the page
//! cache; what does not verify is forgotten. Then writing goes on, in fresh segments.
//!
//! What was read back is served, and is not safe from a loss of power by that: its segments stay suspects, over restarts too, until
//! they begin another life. A block in one is LOCAL again only once it was written anew.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use kvstore_transfer::Lane;

use super::state::{State, add};
use super::store::Store;

/// Times that a volume may fail to sync and be checked again before it stays read-only.
const SYNC_FAILURES_MAX: u64 = 3;

impl State {
    /// True while a sync of the data can be relied on.
    pub fn syncs(&self) -> bool {
        !(self.health.left || self.health.read_only || self.health.checking)
    }

    /// A sync begins: the segments that it covers. Those with a write under way stay for the next.
    pub fn begin_sync(&mut self) -> HashSet<u32> {
        let covered = std::mem::take(&mut self.unsynced);
        let State { segments, unsynced, .. } = self;
        unsynced.extend(covered.iter().filter(|segment| !segments.is_written(**segment)));
        covered
    }
}

impl Store {
    /// A sync of the data failed that covered these segments.
    pub fn sync_failed(self: &Arc<Self>, error: &io::Error, covered: &HashSet<u32>) {
        add(&self.counters.sync_failures, 1);
        tracing::error!(%error, path = %self.path.display(), "a sync failed; the blocks written since the last sync are checked");
        let suspects: HashSet<u32> = {
            let mut state = self.state.lock();
            let unsynced = std::mem::take(&mut state.unsynced);
            let suspects: HashSet<u32> = covered.iter().copied().chain(unsynced).collect();
            state.segments.seal_all();
            for segment in &suspects {
                state.suspects.insert(*segment);
                state.owed.suspect(*segment);
            }
            state.failed_syncs += 1;
            let failures = state.failed_syncs;
            state.health.checking = true;
            state.health.reason = Some(format!("a sync failed: {error}"));
            if failures >= SYNC_FAILURES_MAX {
                state.health.read_only = true;
                state.health.reason = Some(format!("{failures} syncs failed, the last with: {error}"));
            }
            suspects
        };
        self.wake_committer();
        let store = Arc::clone(self);
        let checker = std::thread::Builder::new().name("kvstore-check".into());
        if let Err(error) = checker.spawn(move || store.check(suspects)) {
            tracing::error!(%error, "the blocks written since the last sync cannot be checked; the volume stays read-only");
        }
    }

    /// Reads back all blocks of these segments, past the page cache, and forgets what does not verify.
    fn check(self: &Arc<Self>, suspects: HashSet<u32>) {
        let mut lost = 0u64;
        for segment in suspects {
            let entries = self.state.lock().extents.of_segment(segment);
            for entry in entries {
                if self.is_stopping() {
                    return;
                }
                if self.begin_read(entry.digest).is_some_and(|now| {
                    let damaged = matches!(self.read_whole(&now, Lane::Prefetch), Ok(None));
                    self.end_read(&now);
                    damaged
                }) {
                    lost += 1;
                    add(&self.counters.corrupt_blocks, 1);
                    self.forget(&entry);
                }
            }
        }
        self.state.lock().health.checking = false;
        self.wake_flusher();
        tracing::warn!(path = %self.path.display(), lost, "the blocks written before the failed sync have been checked");
    }
}
