//! A pool: the slots of one size in one namespace, over however many slabs it has now. Owns the lists of
//! free slots and the eviction policy; never touches a block's bytes or its key.
//!
//! Each slab has a list of its own, so that a slab comes and leaves in constant time, however many slots it and the pool have.

use kvstore_plane::{SlotEntry, SlotRef};

use crate::eviction::{BlockIndex, EvictionPolicy, PolicyKind};

/// The end of a free list.
const NONE: u32 = u32::MAX;

/// A pool's place in its [`crate::slots::Slots`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct PoolId(pub usize);

/// The slots of one slab.
struct SlabSlots {
    number: u32,
    slots: u32,
    /// The first slot of the list of those that were used and are free again.
    head: u32,
    /// Slots from here on were never used, and are in no list.
    fresh: u32,
    free: usize,
    /// It is leaving: nobody gets a slot of it.
    closed: bool,
    /// It is among the slabs with free slots.
    listed: bool,
}

/// Slots of one size.
pub(crate) struct Pool {
    pub(crate) slot_bytes: u64,
    /// Slots of a full slab: block indices are `ordinal * stride + slot`.
    stride: u32,
    /// The slab at each ordinal; ordinals are reused.
    slabs: Vec<Option<SlabSlots>>,
    /// Ordinals of the slabs with free slots; and of some that had, which go when they are met.
    with_free: Vec<u32>,
    /// Slabs.
    pub(crate) count: usize,
    /// Slots that can be had.
    pub(crate) free: usize,
    pub(crate) slots: usize,
    /// Slots that hold a block or are being filled.
    pub(crate) used: usize,
    pub(crate) policy: Box<dyn EvictionPolicy>,
    /// By block: the second in which it was stored or read last, where that is known. Empty where nobody wants to know.
    pub(crate) used_at: Vec<u32>,
    /// Whatever is not known counts as used in this second.
    pub(crate) used_since: u32,
}

impl Pool {
    pub(crate) fn new(slot_bytes: u64, stride: u32, policy: PolicyKind) -> Self {
        Self {
            slot_bytes,
            stride: stride.max(1),
            slabs: Vec::new(),
            with_free: Vec::new(),
            count: 0,
            free: 0,
            slots: 0,
            used: 0,
            policy: policy.build(0),
            used_at: Vec::new(),
            used_since: 0,
        }
    }

    pub(crate) fn index(&self, ordinal: u32, slot: u32) -> BlockIndex {
        BlockIndex(ordinal * self.stride + slot)
    }

    fn slab(&self, ordinal: u32) -> Option<&SlabSlots> {
        self.slabs.get(ordinal as usize)?.as_ref()
    }

    fn slab_mut(&mut self, ordinal: u32) -> Option<&mut SlabSlots> {
        self.slabs.get_mut(ordinal as usize)?.as_mut()
    }

    pub(crate) fn slot_ref(&self, block: BlockIndex) -> Option<SlotRef> {
        let slab = self.slab(block.0 / self.stride)?.number;
        Some(SlotRef { slab, slot: block.0 % self.stride })
    }

    pub(crate) fn slab_numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.slabs.iter().flatten().map(|slab| slab.number)
    }

    /// True when another slab of `slots` slots fits the pool's indices.
    pub(crate) fn accepts(&self, slots: u32) -> bool {
        slots <= self.stride && (self.slabs.len() as u64 + 1) * u64::from(self.stride) < u64::from(NONE)
    }

    /// Takes in slab `number`, all of whose `slots` slots are free. Returns its ordinal.
    pub(crate) fn add_slab(&mut self, number: u32, slots: u32) -> u32 {
        let ordinal = self.slabs.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slabs.push(None);
            self.slabs.len() - 1
        });
        if let Some(place) = self.slabs.get_mut(ordinal) {
            let free = slots as usize;
            *place = Some(SlabSlots { number, slots, head: NONE, fresh: 0, free, closed: false, listed: true });
        }
        self.with_free.push(ordinal as u32);
        self.count += 1;
        self.free += slots as usize;
        self.slots += slots as usize;
        self.policy.set_capacity(self.slots);
        ordinal as u32
    }

    /// The slab at `ordinal` is leaving: none of its slots is given away from now on.
    pub(crate) fn close_slab(&mut self, ordinal: u32) {
        let Some(slab) = self.slab_mut(ordinal).filter(|slab| !slab.closed) else { return };
        slab.closed = true;
        let free = slab.free;
        self.free -= free;
    }

    /// It stays after all.
    pub(crate) fn reopen_slab(&mut self, ordinal: u32) {
        let Some(slab) = self.slab_mut(ordinal).filter(|slab| slab.closed) else { return };
        slab.closed = false;
        let free = slab.free;
        self.free += free;
        self.list(ordinal);
    }

    pub(crate) fn is_closed(&self, ordinal: u32) -> bool {
        self.slab(ordinal).is_some_and(|slab| slab.closed)
    }

    /// Lets go of the closed slab at `ordinal`, all of whose slots are free.
    pub(crate) fn remove_slab(&mut self, ordinal: u32) {
        let Some(slab) = self.slabs.get_mut(ordinal as usize).and_then(Option::take) else { return };
        // Its ordinal may be used again before the list is next looked at.
        if slab.listed {
            self.with_free.retain(|listed| *listed != ordinal);
        }
        self.count -= 1;
        self.slots -= slab.slots as usize;
        self.policy.set_capacity(self.slots);
    }

    fn list(&mut self, ordinal: u32) {
        let Some(slab) = self.slab_mut(ordinal).filter(|slab| slab.free > 0 && !slab.closed && !slab.listed) else {
            return;
        };
        slab.listed = true;
        self.with_free.push(ordinal);
    }

    pub(crate) fn push_free(&mut self, block: BlockIndex, entry: &SlotEntry) {
        let (ordinal, slot) = (block.0 / self.stride, block.0 % self.stride);
        self.used -= 1;
        let Some(slab) = self.slab_mut(ordinal) else { return };
        entry.set_next_free(slab.head);
        slab.head = slot;
        slab.free += 1;
        if !slab.closed {
            self.free += 1;
            self.list(ordinal);
        }
    }

    /// A slot that [`Self::take_free`] would give: of the slab that was given back to last, so that others get empty.
    pub(crate) fn first_free(&mut self) -> Option<SlotRef> {
        loop {
            let ordinal = *self.with_free.last()?;
            let slab = self.slab_mut(ordinal);
            if let Some(slab) = slab.filter(|slab| slab.free > 0 && !slab.closed) {
                let slot = if slab.head == NONE { slab.fresh } else { slab.head };
                return Some(SlotRef { slab: slab.number, slot });
            }
            self.with_free.pop();
            if let Some(slab) = self.slab_mut(ordinal) {
                slab.listed = false;
            }
        }
    }

    /// Takes the slot at `block`, which [`Self::first_free`] named and whose entry is `entry`.
    pub(crate) fn take_free(&mut self, block: BlockIndex, entry: &SlotEntry) {
        let Some(slab) = self.slab_mut(block.0 / self.stride) else { return };
        if slab.head == NONE {
            slab.fresh += 1;
        } else {
            slab.head = entry.next_free();
        }
        slab.free -= 1;
        self.free -= 1;
        self.used += 1;
    }

    /// The second in which a block was used last.
    pub(crate) fn used_at(&self, block: BlockIndex) -> u32 {
        self.used_at.get(block.0 as usize).map_or(self.used_since, |used| self.used_since.max(*used))
    }
}
