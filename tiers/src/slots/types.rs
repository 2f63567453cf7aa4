//! What goes into slots and what comes out of them.

use kvstore_plane::{SequenceHash, SlotKey, SlotRecord, SlotRef};

use crate::clock::BootTime;
use crate::layout::BlockKind;
use crate::pool::PoolId;

/// A block that someone wants to bring in.
#[derive(Clone, Copy, Debug)]
pub struct Incoming {
    /// Its key.
    pub key: SlotKey,
    /// Its kind.
    pub kind: BlockKind,
    /// The block before it in its prefix.
    pub parent: Option<SequenceHash>,
    /// Where its slot comes from.
    pub pool: PoolId,
}

/// Who brings a block, and how urgently. A flight has the highest priority and the latest deadline of all
/// that wait for it; one that leaves takes nothing back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Urgency {
    /// Whether a client writes it, or a lower tier is read.
    pub source: FlightSource,
    /// The lane it deserves.
    pub priority: Priority,
    /// When nobody waits any more.
    pub deadline: BootTime,
}

/// What fills a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlightSource {
    /// A client's put.
    Writer,
    /// A copy out of a lower tier.
    Promotion,
}

/// Lanes, least urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Priority {
    /// Background.
    Background,
    /// Ahead of need.
    Prefetch,
    /// Somebody waits.
    Demand,
}

/// The right to fill one reserved slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FillTicket {
    /// The slot.
    pub slot: SlotRef,
    /// Fences a ticket off from later uses of the slot.
    pub(super) generation: u64,
}

/// What came of [`Slots::reserve`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reserve {
    /// Fill this slot, then publish or abort.
    Reserved(FillTicket),
    /// Already readable: nothing to bring.
    Resident,
    /// Somebody else brings it; look again later.
    InFlight,
    /// The pool has no free slot: make room, then ask again.
    NoSlot,
    /// Too many flights at once.
    Busy,
}

/// What came of [`Slots::publish`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Publish {
    /// Readable from now on.
    Published,
    /// Deleted, or replaced by another writer, while it was filled: the bytes went nowhere.
    Superseded,
}

/// What a look-up sees of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Presence {
    /// Readable.
    Resident,
    /// On its way.
    InFlight,
    /// Not here.
    Absent,
}

/// What came of [`Slots::delete`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delete {
    /// Gone.
    Deleted,
    /// Was not there.
    Absent,
    /// Pinned: unpin it first.
    Pinned,
}

/// A block that was pinned, and the only one that the pin is of: what comes later into its slot, or under its key, is another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pinned {
    pub(super) slot: SlotRef,
    /// Of the slab: numbers are used again.
    pub(super) serial: u64,
    pub(super) generation: u64,
}

/// A block that would leave, and that no tier below has: leased, until whoever takes it releases it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaving {
    /// Where it is.
    pub slot: SlotRef,
    /// What is there.
    pub record: SlotRecord,
    /// The block before it in its prefix, where that is in memory.
    pub parent: Option<SequenceHash>,
}

/// A block that was evicted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evicted {
    /// Its key.
    pub key: SlotKey,
    /// What [`Slots::end_demote`](super::Slots::end_demote) was told of tiers below, one bit each; and bit 2 where the block
    /// was offered to them. What a tier below dropped since is not known here.
    pub copies: u8,
}
