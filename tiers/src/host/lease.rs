//! Leases: reading blocks where they lie.

use std::ops::Deref;
use std::sync::Arc;

use kvstore_plane::{SequenceHash, SlotKey, SlotRef};
use kvstore_transfer::SlotBytes;

use super::HostTier;
use super::namespace::{Namespace, NamespaceId, RegisteredLayout};
use super::steps::Steps;
use crate::clock::BootTime;
use crate::slots::Presence;

/// One asked block.
pub enum Leasing {
    /// Readable until the lease is dropped.
    Leased(LeasedBlock),
    /// On its way.
    InFlight,
    /// Not here.
    Miss,
}

/// A block's bytes, which stay as they are while this value lives.
pub struct LeasedBlock {
    tier: Arc<HostTier>,
    namespace: NamespaceId,
    slot: SlotRef,
    /// `None` only while the lease ends.
    bytes: Option<SlotBytes>,
    crc32: u32,
}

impl LeasedBlock {
    /// Of a lease that `Slots` has counted already.
    pub(super) fn new(
        tier: &Arc<HostTier>,
        namespace: NamespaceId,
        slot: SlotRef,
        bytes: SlotBytes,
        crc32: u32,
    ) -> Self {
        Self { tier: Arc::clone(tier), namespace, slot, bytes: Some(bytes), crc32 }
    }

    /// CRC-32 of the bytes, as they were filled.
    pub fn crc32(&self) -> u32 {
        self.crc32
    }
}

impl Deref for LeasedBlock {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.as_deref().unwrap_or_default()
    }
}

impl AsRef<[u8]> for LeasedBlock {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for LeasedBlock {
    fn drop(&mut self) {
        self.bytes = None;
        if let Some(namespace) = self.tier.state.lock().namespace_mut(self.namespace) {
            namespace.slots.release(self.slot);
        }
    }
}

impl HostTier {
    /// Leases the blocks of a request, in prefix order, and counts the hits as read by it.
    pub fn lease_run(
        self: &Arc<Self>,
        layout: &RegisteredLayout,
        group: u16,
        hashes: &[SequenceHash],
        now: BootTime,
    ) -> Vec<Leasing> {
        // Where each hit is, and where the part without a hole begins that it is in.
        let mut hits: Vec<(SlotRef, SlotRef)> = Vec::with_capacity(hashes.len());
        let (mut leasings, mut part) = (Vec::with_capacity(hashes.len()), None);
        let mut steps = Steps::begin(self);
        for hash in hashes {
            let Some(namespace) = steps.next().namespace_mut(layout.namespace) else { break };
            let leasing = self.lease_in(namespace, layout.namespace, &Self::key(layout, group, *hash));
            part = match &leasing {
                Leasing::Leased(block) => part.or(Some(block.slot)),
                _ => None,
            };
            if let (Leasing::Leased(block), Some(first)) = (&leasing, part) {
                hits.push((block.slot, first));
            }
            leasings.push(leasing);
        }
        let mut after: Option<(SlotRef, SlotRef)> = None;
        for (slot, first) in hits.iter().rev() {
            if let Some(namespace) = steps.next().namespace_mut(layout.namespace) {
                namespace.slots.set_now(now);
                let ends = after.is_none_or(|(_, of)| of != *first);
                namespace.slots.touch_before(*slot, after.map(|(after, _)| after), ends.then_some(*first));
            }
            after = Some((*slot, *first));
        }
        if let Some(group) = layout.group(u32::from(group))
            && let Some(namespace) = steps.next().namespace_mut(layout.namespace)
        {
            namespace.note_demand(group.pool, hashes.len(), now);
        }
        leasings
    }

    /// Leases one block without counting it as read: for verification.
    pub fn lease_quietly(self: &Arc<Self>, namespace: NamespaceId, key: &SlotKey) -> Option<LeasedBlock> {
        let mut state = self.state.lock();
        match self.lease_in(state.namespace_mut(namespace)?, namespace, key) {
            Leasing::Leased(block) => Some(block),
            _ => None,
        }
    }

    pub(super) fn lease_in(self: &Arc<Self>, namespace: &mut Namespace, id: NamespaceId, key: &SlotKey) -> Leasing {
        let Some((slot, record)) = namespace.slots.lease(key) else {
            let on_its_way = namespace.slots.presence(key) == Presence::InFlight;
            return if on_its_way { Leasing::InFlight } else { Leasing::Miss };
        };
        let slab = namespace.slots.slab(slot.slab).cloned();
        // SAFETY: the lease just taken keeps `Slots` from giving the slot to anyone until release(),
        // which LeasedBlock calls after it dropped the bytes.
        let bytes = slab.and_then(|slab| unsafe { SlotBytes::new(slab, slot.slot, record.length as usize) });
        if bytes.is_none() {
            namespace.slots.release(slot);
            return Leasing::Miss;
        }
        Leasing::Leased(LeasedBlock { tier: Arc::clone(self), namespace: id, slot, bytes, crc32: record.crc32 })
    }
}
