//! Prefetches under way, and those that ended lately: what is asked of them later. `verbs/prefetch.rs` does their work.

use std::collections::HashMap;
use std::sync::Arc;

use kvstore_proto::v1::PrefetchState;
use kvstore_tiers::host::{HoldId, NamespaceId};
use kvstore_tiers::{BootTime, SequenceHash};
use parking_lot::{Mutex, MutexGuard};
use tonic::Status;

use crate::caps;

/// Prefetches, running and lately ended.
#[derive(Default)]
pub struct Prefetches(Mutex<HashMap<HoldId, Prefetch>>);

/// One of them.
#[derive(Clone)]
pub struct Prefetch {
    /// Whose it is.
    pub namespace: NamespaceId,
    /// The blocks' layout ...
    pub layout_digest: [u8; 32],
    /// ... and layer group.
    pub group: u16,
    /// The blocks, in order.
    pub hashes: Arc<[SequenceHash]>,
    /// When it ends at the latest.
    pub deadline: BootTime,
    /// Blocks are being brought.
    pub running: bool,
    /// How it ended, and when.
    pub ended: Option<(PrefetchState, BootTime)>,
}

impl Prefetches {
    /// All of them, by ticket.
    pub fn lock(&self) -> MutexGuard<'_, HashMap<HoldId, Prefetch>> {
        self.0.lock()
    }

    /// Forgets what ended a while ago, or was never watched to its end.
    pub fn forget_old(&self, now: BootTime) {
        let kept_ms = caps::PREFETCH_KEPT.as_millis() as u64;
        self.0.lock().retain(|_, prefetch| {
            let end = prefetch.ended.map_or(prefetch.deadline, |(_, at)| at.min(prefetch.deadline));
            now.ms_since(end) < kept_ms
        });
    }

    /// One of this namespace's.
    pub fn get(&self, namespace: NamespaceId, id: HoldId) -> Result<Prefetch, Status> {
        let found = self.0.lock().get(&id).filter(|prefetch| prefetch.namespace == namespace).cloned();
        found.ok_or_else(|| {
            Status::not_found("ticket: there is no such prefetch, or it ended a while ago: start a new one")
        })
    }

    /// The bringing is over.
    pub fn stop_running(&self, id: HoldId) {
        if let Some(prefetch) = self.0.lock().get_mut(&id) {
            prefetch.running = false;
        }
    }

    /// True where it has ended, or was forgotten.
    pub fn has_ended(&self, id: HoldId) -> bool {
        self.0.lock().get(&id).is_none_or(|prefetch| prefetch.ended.is_some())
    }

    /// Ends a prefetch, if it has not ended; the state in which it ended.
    pub fn end(&self, id: HoldId, state: PrefetchState, now: BootTime) -> Option<PrefetchState> {
        let mut prefetches = self.0.lock();
        let prefetch = prefetches.get_mut(&id)?;
        Some(prefetch.ended.get_or_insert((state, now)).0)
    }
}
