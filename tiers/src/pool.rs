//! A pool: the slots of one size in one namespace, over however many slabs it has now. Owns the list of
//! free slots and the eviction policy; never touches a block's bytes or its key.

use kvstore_plane::{SlotEntry, SlotRef};

use crate::eviction::{BlockIndex, EvictionPolicy, PolicyKind};

/// The end of the free list.
const NONE: u32 = u32::MAX;

/// A pool's place in its residency.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct PoolId(pub usize);

/// Slots of one size.
pub(crate) struct Pool {
    pub(crate) slot_bytes: u64,
    /// Slots of a full slab: block indices are `ordinal * stride + slot`.
    stride: u32,
    /// The slab at each ordinal; ordinals are reused.
    slabs: Vec<Option<u32>>,
    free_head: u32,
    pub(crate) free: usize,
    pub(crate) slots: usize,
    pub(crate) policy: Box<dyn EvictionPolicy>,
    /// By block: the second in which it was stored or read last. Empty where nobody wants to know.
    pub(crate) used_at: Vec<u32>,
}

impl Pool {
    pub(crate) fn new(slot_bytes: u64, stride: u32, policy: PolicyKind) -> Self {
        let policy = policy.build(0);
        let (stride, slabs, used_at) = (stride.max(1), Vec::new(), Vec::new());
        Self { slot_bytes, stride, slabs, free_head: NONE, free: 0, slots: 0, policy, used_at }
    }

    /// Slots that hold a block or are being filled.
    pub(crate) fn used(&self) -> usize {
        self.slots - self.free
    }

    pub(crate) fn index(&self, ordinal: u32, slot: u32) -> BlockIndex {
        BlockIndex(ordinal * self.stride + slot)
    }

    pub(crate) fn slot_ref(&self, block: BlockIndex) -> Option<SlotRef> {
        let slab = self.slabs.get((block.0 / self.stride) as usize).copied().flatten()?;
        Some(SlotRef { slab, slot: block.0 % self.stride })
    }

    pub(crate) fn slab_numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.slabs.iter().copied().flatten()
    }

    /// True when another slab of `slots` slots fits the pool's indices.
    pub(crate) fn accepts(&self, slots: u32) -> bool {
        slots <= self.stride && (self.slabs.len() as u64 + 1) * u64::from(self.stride) < u64::from(NONE)
    }

    /// Takes in slab `number`, all of whose slots are free. Returns its ordinal.
    pub(crate) fn add_slab(&mut self, number: u32, directory: &[SlotEntry]) -> u32 {
        let ordinal = self.slabs.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slabs.push(None);
            self.slabs.len() - 1
        });
        if let Some(place) = self.slabs.get_mut(ordinal) {
            *place = Some(number);
        }
        for slot in (0..directory.len()).rev() {
            if let Some(entry) = directory.get(slot) {
                self.push_free(self.index(ordinal as u32, slot as u32), entry);
            }
        }
        self.slots += directory.len();
        self.policy.set_capacity(self.slots);
        ordinal as u32
    }

    /// Lets go of the slab at `ordinal`, all of whose slots are free. `entry_at` finds an entry of any of
    /// the pool's slabs by ordinal and slot.
    pub(crate) fn remove_slab<'a>(
        &mut self,
        ordinal: u32,
        slots: usize,
        entry_at: impl Fn(u32, u32) -> Option<&'a SlotEntry>,
    ) {
        let entry_of = |index: u32| entry_at(index / self.stride, index % self.stride);
        let free: Vec<u32> = std::iter::successors(Some(self.free_head).filter(|head| *head != NONE), |at| {
            entry_of(*at).map(SlotEntry::next_free).filter(|next| *next != NONE)
        })
        .collect();
        let kept: Vec<_> = free
            .into_iter()
            .rev()
            .filter(|index| index / self.stride != ordinal)
            .filter_map(|index| Some((BlockIndex(index), entry_of(index)?)))
            .collect();
        (self.free_head, self.free) = (NONE, 0);
        for (block, entry) in kept {
            self.push_free(block, entry);
        }
        if let Some(place) = self.slabs.get_mut(ordinal as usize) {
            *place = None;
        }
        self.slots -= slots;
        self.policy.set_capacity(self.slots);
    }

    pub(crate) fn push_free(&mut self, block: BlockIndex, entry: &SlotEntry) {
        entry.set_next_free(self.free_head);
        self.free_head = block.0;
        self.free += 1;
    }

    pub(crate) fn first_free(&self) -> Option<BlockIndex> {
        (self.free_head != NONE).then_some(BlockIndex(self.free_head))
    }

    /// Takes the first free slot, whose entry is `entry`.
    pub(crate) fn pop_free(&mut self, entry: &SlotEntry) {
        self.free_head = entry.next_free();
        self.free -= 1;
    }
}
