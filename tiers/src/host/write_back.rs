//! Write-back: what is to leave memory, and no tier below has, for whoever writes it there.

use std::sync::Arc;

use kvstore_plane::{SequenceHash, SlotKey};
use kvstore_transfer::SlotBytes;

use super::lease::LeasedBlock;
use super::{HostTier, NamespaceId, RegisteredLayout};

/// A block that would leave memory, and that no tier below has. Stays until this is dropped, and may leave then.
pub struct LeavingBlock {
    /// Its layout.
    pub layout: Arc<RegisteredLayout>,
    /// Its group.
    pub group: u16,
    /// Its name.
    pub hash: SequenceHash,
    /// The block before it in its prefix, where that is in memory.
    pub parent: Option<SequenceHash>,
    /// Its bytes.
    pub block: LeasedBlock,
}

impl HostTier {
    /// What is to leave, of namespaces that write back: [`super::NamespaceLimits::writes_back`].
    pub fn take_leaving(self: &Arc<Self>) -> Vec<LeavingBlock> {
        let mut leaving = Vec::new();
        let count = self.state.lock().namespaces.len();
        for at in 0..count {
            let mut state = self.state.lock();
            let Some(namespace) = state.namespaces.get_mut(at) else { break };
            for found in namespace.slots.take_leaving() {
                let key = found.record.key;
                let layout = namespace.layout_at(key.layout).cloned();
                let slab = namespace.slots.slab(found.slot.slab).cloned();
                // SAFETY: `Slots` leased the slot when it put it on this list: nobody else gets it until release(),
                // which LeasedBlock calls after it dropped the bytes.
                let bytes = slab
                    .and_then(|slab| unsafe { SlotBytes::new(slab, found.slot.slot, found.record.length as usize) });
                let (Some(layout), Some(bytes)) = (layout, bytes) else {
                    namespace.slots.release(found.slot);
                    continue;
                };
                let block = LeasedBlock::new(self, NamespaceId(at), found.slot, bytes, found.record.crc32);
                leaving.push(LeavingBlock { layout, group: key.group, hash: key.hash, parent: found.parent, block });
            }
        }
        leaving
    }

    /// Resolves when something is to leave.
    pub fn leaving(&self) -> tokio::sync::futures::Notified<'_> {
        self.leaving.notified()
    }

    /// The block before this one in its prefix, where both are in memory.
    pub fn parent_of(&self, namespace: NamespaceId, key: &SlotKey) -> Option<SequenceHash> {
        let state = self.state.lock();
        let slots = &state.namespace(namespace)?.slots;
        slots.parent_of(slots.find_slot(key)?)
    }
}
