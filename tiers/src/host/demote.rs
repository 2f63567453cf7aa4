//! Demoting: a readable block's bytes on their way to a lower tier.

use std::sync::Arc;

use kvstore_plane::{SequenceHash, SlotRef};
use kvstore_transfer::SlotBytes;

use super::HostTier;
use super::namespace::{NamespaceId, RegisteredLayout};

/// Keeps a block where it is while it is copied to a lower tier. Ends when it is dropped.
pub struct DemotingBlock {
    tier: Arc<HostTier>,
    namespace: NamespaceId,
    slot: SlotRef,
    length: u32,
    crc32: u32,
    copies: u8,
}

/// The bit of a slot's `copies` that says: the Nvme tier took the block. It may have dropped it since.
const NVME_COPY: u8 = 1;

impl DemotingBlock {
    /// The block's bytes, for a transfer. They must be gone before this value is: whoever takes them keeps
    /// both, and drops the bytes first.
    pub(crate) fn bytes(&self) -> Option<SlotBytes> {
        let slab = self.tier.state.lock().namespace(self.namespace)?.slots.slab(self.slot.slab).cloned()?;
        // SAFETY: begin_demote() leased the slot, and end_demote() in our Drop gives the lease back: until
        // then nobody else gets the slot. The only callers (nvme::flush) drop the bytes before this value: where they
        // are copied or summed, at once; where they are transferred, in the transfer's completion, which passes this
        // value on only after it dropped them.
        unsafe { SlotBytes::new(slab, self.slot.slot, self.length as usize) }
    }

    /// Bytes of the block.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// CRC-32 of the block, as it was filled.
    pub fn crc32(&self) -> u32 {
        self.crc32
    }

    /// The Nvme tier has taken it.
    pub fn stored(mut self) {
        self.copies = NVME_COPY;
    }
}

impl Drop for DemotingBlock {
    fn drop(&mut self) {
        if let Some(namespace) = self.tier.state.lock().namespace_mut(self.namespace) {
            namespace.slots.end_demote(self.slot, self.copies);
        }
    }
}

impl HostTier {
    /// Keeps a readable block in place for a copy; `None` where it is not readable, or being copied already.
    pub fn begin_demote(
        self: &Arc<Self>,
        layout: &RegisteredLayout,
        group: u16,
        hash: SequenceHash,
    ) -> Option<DemotingBlock> {
        let mut state = self.state.lock();
        let namespace = state.namespace_mut(layout.namespace)?;
        let (slot, record) = namespace.slots.begin_demote(&Self::key(layout, group, hash))?;
        let (tier, namespace) = (Arc::clone(self), layout.namespace);
        Some(DemotingBlock { tier, namespace, slot, length: record.length, crc32: record.crc32, copies: 0 })
    }
}
