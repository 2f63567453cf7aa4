//! Unused blocks of namespaces with such a time leave: see [`crate::slots::Slots::sweep_unused`].

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvstore_transfer::Slab;
use parking_lot::MutexGuard;

use super::{HostTier, NamespaceId};
use crate::caps;
use crate::clock::BootTime;
use crate::slots::Slots;

type HostSlots = Slots<Arc<Slab>>;

impl HostTier {
    /// Tells the namespaces the time; sweeps once an eighth of the shortest of their times is over, some slots at a time.
    pub(super) fn sweep_unused(&self, now: BootTime) {
        let mut shortest = None;
        let mut state = self.state.lock();
        let second = (now.ms_since(BootTime(self.epoch)) / 1000) as u32;
        for namespace in &mut state.namespaces {
            let ttl = namespace.limits.ttl_ms.map(|ttl| (ttl / 1000) as u32);
            namespace.slots.set_now(now);
            namespace.slots.set_second(second, ttl);
            shortest = shortest.into_iter().chain(namespace.limits.ttl_ms).min();
        }
        drop(state);
        let Some(every) = shortest.map(|ttl: u64| (ttl / caps::TTL_PARTS).max(1000)) else { return };
        if now.0.saturating_sub(self.swept.load(Ordering::Relaxed)) < every {
            return;
        }
        self.swept.store(now.0, Ordering::Relaxed);
        let slabs = self.slabs();
        let each = |(namespace, slab): &(NamespaceId, u32), step: fn(&mut HostSlots, u32, u32) -> Option<u32>| {
            let mut from = Some(0);
            while let Some(slot) = from {
                let mut state = self.state.lock();
                from = state.namespace_mut(*namespace).and_then(|at| step(&mut at.slots, *slab, slot));
                MutexGuard::unlock_fair(state);
            }
        };
        slabs.iter().for_each(|slab| each(slab, HostSlots::renew_prefixes));
        slabs.iter().for_each(|slab| each(slab, HostSlots::sweep_unused));
    }
}
