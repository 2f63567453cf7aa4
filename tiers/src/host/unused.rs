//! Unused blocks of namespaces with such a time leave: see [`crate::residency::Residency::sweep_unused`].

use std::sync::atomic::Ordering;

use super::{HostTier, NamespaceId};
use crate::caps;
use crate::clock::BootTime;

impl HostTier {
    /// Tells the namespaces the time; sweeps once an eighth of the shortest of their times is over, slab by slab.
    pub(super) fn sweep_unused(&self, now: BootTime) {
        let mut shortest = None;
        let mut state = self.state.lock();
        let second = (now.ms_since(BootTime(self.epoch)) / 1000) as u32;
        for namespace in &mut state.namespaces {
            let ttl = namespace.limits.ttl_ms.map(|ttl| (ttl / 1000) as u32);
            namespace.residency.set_second(second, ttl);
            shortest = shortest.into_iter().chain(namespace.limits.ttl_ms).min();
        }
        drop(state);
        let Some(every) = shortest.map(|ttl: u64| (ttl / caps::TTL_PARTS).max(1000)) else { return };
        if now.0.saturating_sub(self.swept.load(Ordering::Relaxed)) < every {
            return;
        }
        self.swept.store(now.0, Ordering::Relaxed);
        let slabs = self.slabs();
        let each = |(namespace, slab): &(NamespaceId, u32), sweeps: bool| {
            if let Some(namespace) = self.state.lock().namespace_mut(*namespace) {
                let residency = &mut namespace.residency;
                if sweeps {
                    residency.sweep_unused(*slab);
                } else {
                    residency.renew_prefixes(*slab);
                }
            }
        };
        slabs.iter().for_each(|slab| each(slab, false));
        slabs.iter().for_each(|slab| each(slab, true));
    }
}
