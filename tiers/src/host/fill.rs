//! Filling: the one way in which bytes enter the Host tier.

use std::sync::Arc;

use kvstore_plane::SequenceHash;
use kvstore_transfer::{FillError, SharedMemory, SlotFill};

use super::HostTier;
use super::lease::{LeasedBlock, Leasing};
use super::namespace::{NamespaceId, RegisteredLayout};
use super::room::{Room, SlabPlan};
use crate::clock::BootTime;
use crate::layout::LayerGroup;
use crate::slots::{FillTicket, Incoming, Publish, Reserve, Urgency};

/// A writer that is slower than this between two notes counts as having stalled in between; a quarter of
/// the stall after which another may take over.
const NOTE_PROGRESS_MS: u64 = crate::caps::FILL_STALL_MS / 4;

/// A block that a client wants to write.
#[derive(Clone, Copy, Debug)]
pub struct FillRequest<'a> {
    /// The layout.
    pub layout: &'a RegisteredLayout,
    /// The layer group.
    pub group: u16,
    /// The block's name.
    pub hash: SequenceHash,
    /// The block before it.
    pub parent: Option<SequenceHash>,
    /// Its bytes: what the layout says, or less for kinds that vary.
    pub length: u32,
    /// Who brings it, how urgently, and until when.
    pub urgency: Urgency,
}

/// What came of [`HostTier::begin_fill`].
pub enum BeginFill {
    /// Fill it, then commit. Where the pool's free slots run low, also a slab to make meanwhile, so that no
    /// later fill waits for one: make it, or give the plan back.
    Fill(BlockFill, Option<SlabPlan>),
    /// Already readable.
    Resident,
    /// Another writer brings it: look again soon; once it stalled, the next call takes over.
    InFlight,
    /// Make this slab, then call again.
    NeedsSlab(SlabPlan),
    /// Memory is on its way: call again soon.
    Wait,
    /// No room, and nothing that may leave.
    Busy,
    /// It is brought ahead of need, and what would leave for it is worth more.
    Outranked,
}

impl HostTier {
    /// Reserves a slot for a block. Evicts as needed; never waits.
    pub fn begin_fill(self: &Arc<Self>, request: &FillRequest<'_>, now: BootTime) -> BeginFill {
        let namespace = request.layout.namespace;
        let Some(group) = request.layout.group(u32::from(request.group)) else { return BeginFill::Busy };
        let key = Self::key(request.layout, request.group, request.hash);
        let incoming = Incoming { key, kind: group.group.kind, parent: request.parent, pool: group.pool };
        let urgency = request.urgency;
        let mut state = self.state.lock();
        if self.is_of_no_use(&state, namespace, &incoming, urgency) {
            // What is before it may wait for room itself.
            return if state.makes_room(namespace, group.pool) { BeginFill::Wait } else { BeginFill::Outranked };
        }
        loop {
            let Some(at) = state.namespace_mut(namespace) else { return BeginFill::Busy };
            at.slots.set_now(now);
            match at.slots.reserve(&incoming, urgency, now) {
                Reserve::Reserved(ticket) => {
                    at.note_demand(group.pool, 1, now);
                    let sections = section_bytes(&group.group, group.block_bytes);
                    let fill = self.fill(namespace, ticket, (request.length, sections), &mut at.slots, now);
                    let Some(fill) = fill else { return BeginFill::Busy };
                    return BeginFill::Fill(fill, self.plan_ahead(&mut state, namespace, group.pool));
                }
                Reserve::Resident => return BeginFill::Resident,
                Reserve::InFlight => return BeginFill::InFlight,
                Reserve::Busy => return BeginFill::Busy,
                Reserve::NoSlot => match self.room_for(&mut state, namespace, &incoming, urgency, now) {
                    Room::Make(plan) => return BeginFill::NeedsSlab(plan),
                    Room::Taken(slab) => {
                        drop(state);
                        drop(slab);
                        self.slabs_changed();
                        state = self.state.lock();
                    }
                    Room::Evicted => {}
                    Room::Wait => return BeginFill::Wait,
                    Room::Outranked => return BeginFill::Outranked,
                    Room::Busy => return BeginFill::Busy,
                },
            }
        }
    }

    fn fill(
        self: &Arc<Self>,
        namespace: NamespaceId,
        ticket: FillTicket,
        (length, section_bytes): (u32, u32),
        slots: &mut crate::slots::Slots<Arc<kvstore_transfer::Slab>>,
        now: BootTime,
    ) -> Option<BlockFill> {
        let slab = slots.slab(ticket.slot.slab).cloned();
        // SAFETY: `Slots` reserved this slot for this ticket alone: until BlockFill hands the ticket
        // back, no other fill gets the slot and no reader finds it; a superseded slot is not reused either.
        let fill = slab.and_then(|slab| unsafe { SlotFill::new(slab, ticket.slot.slot, length as usize) });
        if fill.is_none() {
            // A length that is no block's of this layout; callers check it first.
            slots.abort(ticket);
        }
        let fill = fill?.with_sections(section_bytes);
        Some(BlockFill { tier: Arc::clone(self), namespace, fill: Some((ticket, fill)), noted: now })
    }
}

/// Bytes of a frame's section: whole layers, at least 64 KiB of them, at most 16 sections; or the whole
/// block, where layers cannot be told apart. A part of a block can then be checked before the rest has come.
pub fn section_bytes(group: &LayerGroup, block_bytes: u64) -> u32 {
    const SECTIONS: u64 = 16;
    const LEAST: u64 = 64 << 10;
    let layer = block_bytes / u64::from(group.layers.max(1));
    if !group.has_layers() || layer == 0 {
        return block_bytes.max(1) as u32;
    }
    let layers = u64::from(group.layers).div_ceil(SECTIONS).max(LEAST.div_ceil(layer));
    (layers * layer).min(block_bytes) as u32
}

/// A slot that a transfer fills. Given up by [`Self::filled`] or [`Self::not_filled`] alone: dropped without them, the slot stays
/// reserved for ever, which is a leak, but never one that the kernel writes into for somebody else.
#[must_use]
pub struct TransferFill {
    tier: Arc<HostTier>,
    namespace: NamespaceId,
    ticket: FillTicket,
}

impl TransferFill {
    /// The transfer is over and `fill` its memory, which has the whole block, checked; `crc32` is the block's.
    pub fn filled(self, fill: SlotFill, crc32: u32) -> FilledBlock {
        let Self { tier, namespace, ticket } = self;
        FilledBlock { tier, namespace, ticket: Some(ticket), length: fill.length() as u32, crc32 }
    }

    /// The transfer is over and `fill` its memory, which does not have the block: to be filled from elsewhere.
    pub fn not_filled(self, mut fill: SlotFill) -> BlockFill {
        fill.restart();
        let Self { tier, namespace, ticket } = self;
        BlockFill { tier, namespace, fill: Some((ticket, fill)), noted: BootTime::default() }
    }
}

/// A block that is whole in its slot, and that nobody sees yet. Dropped before it is published, it is not there, and its slot
/// is free.
pub struct FilledBlock {
    tier: Arc<HostTier>,
    namespace: NamespaceId,
    ticket: Option<FillTicket>,
    length: u32,
    crc32: u32,
}

impl FilledBlock {
    /// Bytes of the block.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Makes it readable, and leases it for whoever waits for it. `tail`: it is the last of its request.
    pub fn publish(mut self, tail: bool) -> (Publish, Option<LeasedBlock>) {
        let Some(ticket) = self.ticket.take() else { return (Publish::Superseded, None) };
        let mut state = self.tier.state.lock();
        let Some(namespace) = state.namespace_mut(self.namespace) else { return (Publish::Superseded, None) };
        let key = namespace.slots.key_of(&ticket);
        let published = namespace.slots.publish(ticket, self.length, self.crc32, tail);
        match key.filter(|_| published == Publish::Published) {
            Some(key) => match self.tier.lease_in(namespace, self.namespace, &key) {
                Leasing::Leased(block) => (published, Some(block)),
                _ => (published, None),
            },
            None => (published, None),
        }
    }
}

impl Drop for FilledBlock {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take()
            && let Some(namespace) = self.tier.state.lock().namespace_mut(self.namespace)
        {
            namespace.slots.abort(ticket);
        }
    }
}

/// The right to bring one block. Dropped without a commit, the block is not there, and its slot is free.
pub struct BlockFill {
    tier: Arc<HostTier>,
    namespace: NamespaceId,
    fill: Option<(FillTicket, SlotFill)>,
    noted: BootTime,
}

impl BlockFill {
    /// Copies `bytes` behind what is there.
    pub fn append(&mut self, bytes: &[u8], now: BootTime) -> Result<(), FillError> {
        let Some((_, fill)) = self.fill.as_mut() else { return Err(FillError { given: bytes.len(), room: 0 }) };
        fill.append(bytes)?;
        self.note_progress(now);
        Ok(())
    }

    /// Copies bytes that a client left in memory that it can write to: see [`SlotFill::append_shared`].
    pub fn append_shared(
        &mut self,
        source: &SharedMemory,
        offset: u64,
        bytes: usize,
        now: BootTime,
    ) -> Result<bool, FillError> {
        let Some((_, fill)) = self.fill.as_mut() else { return Err(FillError { given: bytes, room: 0 }) };
        let inside = fill.append_shared(source, offset, bytes)?;
        self.note_progress(now);
        Ok(inside)
    }

    /// Copies bytes out of a lower tier behind what is there. That is no progress of a writer: a put of the block may take it over.
    pub fn append_promoted(&mut self, bytes: &[u8]) -> Result<(), FillError> {
        match self.fill.as_mut() {
            Some((_, fill)) => fill.append(bytes),
            None => Err(FillError { given: bytes.len(), room: 0 }),
        }
    }

    /// Begins again with the first byte.
    pub fn restart(&mut self) {
        if let Some((_, fill)) = self.fill.as_mut() {
            fill.restart();
        }
    }

    /// The block turned out shorter than it might have been.
    pub fn shorten(&mut self, length: usize) {
        if let Some((_, fill)) = self.fill.as_mut() {
            fill.shorten(length);
        }
    }

    fn note_progress(&mut self, now: BootTime) {
        let Some((ticket, _)) = self.fill.as_ref().filter(|_| now.ms_since(self.noted) >= NOTE_PROGRESS_MS) else {
            return;
        };
        self.noted = now;
        if let Some(namespace) = self.tier.state.lock().namespace_mut(self.namespace) {
            namespace.slots.progress(ticket, now);
        }
    }

    /// Bytes still missing.
    pub fn room(&self) -> usize {
        self.fill.as_ref().map_or(0, |(_, fill)| fill.room())
    }

    /// Bytes that the block will have.
    pub fn length(&self) -> usize {
        self.fill.as_ref().map_or(0, |(_, fill)| fill.length())
    }

    /// CRC-32 of what was copied so far.
    pub fn crc32(&self) -> u32 {
        self.fill.as_ref().map_or(0, |(_, fill)| fill.crc32())
    }

    /// Splits the right into what a transfer takes along and what ends it.
    pub fn into_transfer(mut self) -> Option<(TransferFill, SlotFill)> {
        let (ticket, mut fill) = self.fill.take()?;
        fill.restart();
        Some((TransferFill { tier: Arc::clone(&self.tier), namespace: self.namespace, ticket }, fill))
    }

    /// CRC-32 of each section of what was copied: see [`section_bytes`].
    pub fn section_sums(&self) -> Vec<u32> {
        self.fill.as_ref().map(|(_, fill)| fill.section_sums()).unwrap_or_default()
    }

    /// Makes the block readable; `tail` for the last of its request. It must be complete: with bytes missing
    /// nothing is published.
    pub fn commit(self, tail: bool) -> Publish {
        self.commit_leased(tail).0
    }

    /// The same, and leases the block, so that it is still there when it goes to disk.
    pub fn commit_leased(self, tail: bool) -> (Publish, Option<LeasedBlock>) {
        match self.filled() {
            Some(filled) => filled.publish(tail),
            None => (Publish::Superseded, None),
        }
    }

    /// The block, where it is complete; else its slot is free again.
    pub fn filled(mut self) -> Option<FilledBlock> {
        let (ticket, fill) = self.fill.take_if(|(_, fill)| fill.room() == 0)?;
        let (length, crc32) = (fill.length() as u32, fill.crc32());
        Some(FilledBlock {
            tier: Arc::clone(&self.tier),
            namespace: self.namespace,
            ticket: Some(ticket),
            length,
            crc32,
        })
    }
}

impl Drop for BlockFill {
    fn drop(&mut self) {
        if let Some((ticket, fill)) = self.fill.take() {
            drop(fill);
            if let Some(namespace) = self.tier.state.lock().namespace_mut(self.namespace) {
                namespace.slots.abort(ticket);
            }
        }
    }
}
