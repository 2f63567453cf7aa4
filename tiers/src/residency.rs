//! Residency: decides who holds a block in memory, and who may fill, read or replace it. Touches no
//! block's bytes, does no I/O, awaits nothing and reads no clock: a million random steps run in a test.
//!
//! One residency serves one namespace. A block's life in it:
//!
//! ```text
//!            reserve                publish              evict, delete
//!   absent ----------> Filling ----------------> Resident -------------> absent
//!      ^                  | abort, superseded       |  with a lease: Doomed until the last release
//!      +------------------+                         +-- demote: readable throughout; leaves a copy below
//! ```
//!
//! A slot's state lives in its directory entry, in memory that other processes may map; what few blocks
//! need (writers, waiters, parked victims) lives in side tables that are bounded by what is in flight.
//! Filling is single-flight: a second writer or promotion of a key joins the first, adds its priority and
//! deadline, and may replace a writer that stalled. The replaced writer keeps its slot, which nobody else
//! uses until it has gone, so that late bytes go nowhere.

use std::collections::{HashMap, HashSet};

use kvstore_plane::{KeyTable, SequenceHash, SlotEntry, SlotKey, SlotRecord, SlotRef, SlotState};

use crate::caps;
use crate::clock::BootTime;
use crate::eviction::{BlockIndex, NewBlock, PolicyKind, Removal, Touch};
use crate::layout::BlockKind;
use crate::pool::{Pool, PoolId};

/// Memory that carries a slot directory.
pub trait SlabMemory {
    /// One entry per slot.
    fn directory(&self) -> &[SlotEntry];
}

impl SlabMemory for kvstore_transfer::Slab {
    fn directory(&self) -> &[SlotEntry] {
        kvstore_transfer::Slab::directory(self)
    }
}

impl<T: SlabMemory> SlabMemory for std::sync::Arc<T> {
    fn directory(&self) -> &[SlotEntry] {
        (**self).directory()
    }
}

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
    Writeback,
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
    generation: u64,
}

/// What came of [`Residency::reserve`].
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

/// What came of [`Residency::publish`].
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

/// What came of [`Residency::delete`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delete {
    /// Gone.
    Deleted,
    /// Was not there.
    Absent,
    /// Pinned: unpin it first.
    Pinned,
}

/// A block that was evicted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evicted {
    /// Its key.
    pub key: SlotKey,
    /// Lower tiers that still hold it: bit 0 Nvme, bit 1 Object.
    pub copies: u8,
}

struct Fill {
    generation: u64,
    incoming: Incoming,
    urgency: Urgency,
    progress: BootTime,
    superseded: bool,
}

struct SlabPlace<S> {
    memory: S,
    pool: PoolId,
    ordinal: u32,
    /// Slots that hold something.
    used: usize,
}

/// Counts since the start; all of blocks.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct ResidencyCounts {
    /// Published.
    pub published: u64,
    /// Evicted for lack of room.
    pub evicted: u64,
    /// Deleted on request.
    pub deleted: u64,
    /// Fills that ended without a block.
    pub aborted: u64,
    /// Writers replaced after they stalled.
    pub taken_over: u64,
}

/// See the head of this file.
pub struct Residency<S> {
    seed: u64,
    policy: PolicyKind,
    table: KeyTable,
    slabs: Vec<Option<SlabPlace<S>>>,
    pools: Vec<Pool>,
    fills: HashMap<SlotRef, Fill>,
    /// Victims that were leased when they were named: candidates again once they are released.
    parked: HashSet<SlotRef>,
    counts: ResidencyCounts,
    pinned_bytes: u64,
}

impl<S: SlabMemory> Residency<S> {
    /// An empty residency. `seed` should be secret: sequence hashes come from clients, and a client that
    /// knew it could fill one bucket of the key table.
    pub fn new(seed: u64, policy: PolicyKind) -> Self {
        Self {
            seed,
            policy,
            table: KeyTable::new(),
            slabs: Vec::new(),
            pools: Vec::new(),
            // Room for what is usually in flight, so that no fill allocates.
            fills: HashMap::with_capacity(caps::FILLS_USUAL),
            parked: HashSet::with_capacity(caps::FILLS_USUAL),
            counts: ResidencyCounts::default(),
            pinned_bytes: 0,
        }
    }

    // ---- slabs and pools

    /// The pool for slots of `slot_bytes`; slabs of it have at most `stride` slots.
    pub fn pool(&mut self, slot_bytes: u64, stride: u32) -> PoolId {
        let found = self.pools.iter().position(|pool| pool.slot_bytes == slot_bytes);
        PoolId(found.unwrap_or_else(|| {
            self.pools.push(Pool::new(slot_bytes, stride, self.policy));
            self.pools.len() - 1
        }))
    }

    /// The pools, in order.
    pub fn pools(&self) -> impl Iterator<Item = PoolId> + use<S> {
        (0..self.pools.len()).map(PoolId)
    }

    /// Bytes of a slot, slots, and slots in use, of `pool`.
    pub fn pool_occupancy(&self, pool: PoolId) -> (u64, usize, usize) {
        self.pools.get(pool.0).map_or((0, 0, 0), |pool| (pool.slot_bytes, pool.slots, pool.used()))
    }

    /// Takes in a slab whose slots are all free. `None` when the residency has as many as it can number;
    /// else the slab's number.
    pub fn add_slab(&mut self, pool: PoolId, memory: S) -> Option<u32> {
        let number = self.slabs.iter().position(Option::is_none).unwrap_or(self.slabs.len());
        let slots = memory.directory().len() as u32;
        let state = self.pools.get_mut(pool.0).filter(|state| state.accepts(slots) && number < caps::SLABS_MAX)?;
        let ordinal = state.add_slab(number as u32, memory.directory());
        if number == self.slabs.len() {
            self.slabs.push(None);
        }
        if let Some(place) = self.slabs.get_mut(number) {
            *place = Some(SlabPlace { memory, pool, ordinal, used: 0 });
        }
        Some(number as u32)
    }

    /// The slab numbers of `pool`.
    pub fn slab_numbers(&self, pool: PoolId) -> Vec<u32> {
        self.pools.get(pool.0).map(|pool| pool.slab_numbers().collect()).unwrap_or_default()
    }

    /// The memory of a slab.
    pub fn slab(&self, number: u32) -> Option<&S> {
        Some(&self.slabs.get(number as usize)?.as_ref()?.memory)
    }

    /// Slots of a slab that hold something.
    pub fn slab_used(&self, number: u32) -> usize {
        self.slabs.get(number as usize).and_then(Option::as_ref).map_or(0, |place| place.used)
    }

    /// True when something in a slab can't leave now: it is leased, pinned, demoting, or being filled.
    /// Looks at every slot.
    pub fn slab_is_stuck(&self, number: u32) -> bool {
        let entries = self.slab(number).map(SlabMemory::directory).unwrap_or_default();
        entries.iter().any(|entry| match entry.state() {
            SlotState::Free => false,
            SlotState::Resident => entry.leases() > 0 || entry.pins() > 0 || entry.is_demoting(),
            SlotState::Filling | SlotState::Doomed => true,
        })
    }

    /// Evicts every block of slab `number` and lets go of it. `None`, with some blocks gone perhaps, when
    /// one of them can't leave now.
    pub fn withdraw_slab(&mut self, number: u32) -> Option<S> {
        let count = self.slab(number)?.directory().len() as u32;
        for slot in 0..count {
            self.evict_slot(SlotRef { slab: number, slot });
        }
        if self.slab_used(number) > 0 {
            return None;
        }
        let place = self.slabs.get_mut(number as usize)?.take()?;
        let in_pool = self.slabs.iter().flatten().filter(|slab| slab.pool == place.pool);
        let directories: HashMap<u32, &[SlotEntry]> =
            in_pool.chain([&place]).map(|slab| (slab.ordinal, slab.memory.directory())).collect();
        if let Some(pool) = self.pools.get_mut(place.pool.0) {
            let entry = |ordinal: u32, slot: u32| directories.get(&ordinal)?.get(slot as usize);
            pool.remove_slab(place.ordinal, place.memory.directory().len(), entry);
        }
        Some(place.memory)
    }

    fn entry(&self, slot: SlotRef) -> Option<&SlotEntry> {
        self.slab(slot.slab)?.directory().get(slot.slot as usize)
    }

    fn place(&self, slot: SlotRef) -> Option<(PoolId, BlockIndex)> {
        let place = self.slabs.get(slot.slab as usize)?.as_ref()?;
        let pool = self.pools.get(place.pool.0)?;
        Some((place.pool, pool.index(place.ordinal, slot.slot)))
    }

    // ---- looking up

    fn find(&self, key: &SlotKey) -> Option<(SlotRef, &SlotEntry)> {
        let hash = key.table_hash(self.seed);
        let slot = self.table.find(hash, |slot| self.entry(slot).is_some_and(|entry| entry.is_key(key)))?;
        Some((slot, self.entry(slot)?))
    }

    /// Whether a block is readable, on its way, or neither.
    pub fn presence(&self, key: &SlotKey) -> Presence {
        match self.find(key).map(|(_, entry)| entry.state()) {
            Some(SlotState::Resident) => Presence::Resident,
            Some(SlotState::Filling) => Presence::InFlight,
            _ => Presence::Absent,
        }
    }

    /// The presence of each block of a prefix, into `out`. Loads the cache lines of a run of blocks side
    /// by side before it looks at the first.
    pub fn presence_of_run(&self, layout: u32, group: u16, hashes: &[SequenceHash], out: &mut Vec<Presence>) {
        const SIDE_BY_SIDE: usize = 32;
        let mut table_hashes = [0u64; SIDE_BY_SIDE];
        for run in hashes.chunks(SIDE_BY_SIDE) {
            for (to, hash) in table_hashes.iter_mut().zip(run) {
                *to = SlotKey { layout, group, hash: *hash }.table_hash(self.seed);
                self.table.prefetch(*to);
            }
            for hash in table_hashes.iter().take(run.len()) {
                if let Some(entry) = self.table.hint(*hash).and_then(|slot| self.entry(slot)) {
                    kvstore_plane::prefetch(entry);
                }
            }
            for (table_hash, hash) in table_hashes.iter().zip(run) {
                let key = SlotKey { layout, group, hash: *hash };
                let mut state = None;
                self.table.find(*table_hash, |slot| {
                    let entry = self.entry(slot).filter(|entry| entry.is_key(&key));
                    state = entry.map(|entry| entry.state());
                    state.is_some()
                });
                out.push(match state {
                    Some(SlotState::Resident) => Presence::Resident,
                    Some(SlotState::Filling) => Presence::InFlight,
                    _ => Presence::Absent,
                });
            }
        }
    }

    // ---- filling

    /// Reserves a slot for a block that its caller will bring.
    pub fn reserve(&mut self, incoming: &Incoming, urgency: Urgency, now: BootTime) -> Reserve {
        match self.find(&incoming.key).map(|(slot, entry)| (slot, entry.state())) {
            Some((_, SlotState::Resident)) => return Reserve::Resident,
            Some((slot, _)) => {
                if !self.join(slot, urgency, now) {
                    return Reserve::InFlight;
                }
                self.supersede(slot);
                self.counts.taken_over += 1;
            }
            None => {}
        }
        if self.fills.len() >= caps::FILLS_MAX {
            return Reserve::Busy;
        }
        let Some(slot) = self.take_free(incoming.pool) else { return Reserve::NoSlot };
        let Some(entry) = self.entry(slot) else { return Reserve::NoSlot };
        let generation = entry.reserve(&incoming.key, incoming.kind.number());
        let fill = Fill { generation, incoming: *incoming, urgency, progress: now, superseded: false };
        self.fills.insert(slot, fill);
        self.file(slot, &incoming.key);
        Reserve::Reserved(FillTicket { slot, generation })
    }

    /// Adds a waiter to a flight. True when the waiter, a writer, may replace the one that fills: that one
    /// stalled.
    fn join(&mut self, slot: SlotRef, urgency: Urgency, now: BootTime) -> bool {
        let Some(fill) = self.fills.get_mut(&slot) else { return false };
        fill.urgency.priority = fill.urgency.priority.max(urgency.priority);
        fill.urgency.deadline = fill.urgency.deadline.max(urgency.deadline);
        urgency.source == FlightSource::Writer && now.ms_since(fill.progress) >= caps::FILL_STALL_MS
    }

    /// The urgency that a flight has by now.
    pub fn flight(&self, key: &SlotKey) -> Option<Urgency> {
        let (slot, _) = self.find(key)?;
        self.fills.get(&slot).map(|fill| fill.urgency)
    }

    /// The slot of a live flight is no longer found by its key, and its ticket publishes nothing.
    fn supersede(&mut self, slot: SlotRef) {
        if let Some(fill) = self.fills.get_mut(&slot) {
            fill.superseded = true;
            let key = fill.incoming.key;
            self.unfile(slot, &key);
            if let Some(entry) = self.entry(slot) {
                entry.withdraw(SlotState::Doomed);
            }
        }
    }

    /// The bearer of `ticket` brought something just now.
    pub fn progress(&mut self, ticket: &FillTicket, now: BootTime) {
        if let Some(fill) = self.fill_of(ticket) {
            fill.progress = now;
        }
    }

    fn fill_of(&mut self, ticket: &FillTicket) -> Option<&mut Fill> {
        self.fills.get_mut(&ticket.slot).filter(|fill| fill.generation == ticket.generation)
    }

    /// The slot is filled: makes the block readable. The ticket is spent either way. `tail`: it is the last
    /// block of its request.
    pub fn publish(&mut self, ticket: FillTicket, length: u32, crc32: u32, tail: bool) -> Publish {
        if self.fill_of(&ticket).is_none_or(|fill| fill.superseded) {
            self.abort(ticket);
            return Publish::Superseded;
        }
        let Some(fill) = self.fills.remove(&ticket.slot) else { return Publish::Superseded };
        let incoming = fill.incoming;
        if let Some(entry) = self.entry(ticket.slot) {
            entry.publish(length, crc32);
        }
        let parent = incoming.parent.and_then(|hash| {
            let (slot, entry) = self.find(&SlotKey { hash, ..incoming.key })?;
            let (pool, block) = self.place(slot)?;
            (entry.state() == SlotState::Resident && pool == incoming.pool).then_some(block)
        });
        let key_hash = incoming.key.table_hash(self.seed);
        let new = NewBlock { parent, key_hash, kind: incoming.kind.eviction(), tail };
        if let Some((pool, block)) = self.place(ticket.slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.insert(block, new);
        }
        self.counts.published += 1;
        Publish::Published
    }

    /// The bearer of `ticket` gives up, or was superseded: frees its slot.
    pub fn abort(&mut self, ticket: FillTicket) {
        if self.fill_of(&ticket).is_none() {
            return;
        }
        if let Some(fill) = self.fills.remove(&ticket.slot) {
            if !fill.superseded {
                self.unfile(ticket.slot, &fill.incoming.key);
            }
            self.counts.aborted += 1;
            self.free(ticket.slot);
        }
    }

    // ---- reading

    /// A lease on a readable block: until it is released, its bytes stay as they are.
    pub fn lease(&mut self, key: &SlotKey) -> Option<(SlotRef, SlotRecord)> {
        let (slot, entry) = self.find(key)?;
        let record = entry.read()?;
        entry.set_leases(entry.leases() + 1);
        Some((slot, record))
    }

    /// Ends a lease.
    pub fn release(&mut self, slot: SlotRef) {
        let Some(entry) = self.entry(slot) else { return };
        let left = entry.leases().saturating_sub(1);
        entry.set_leases(left);
        if left > 0 {
            return;
        }
        let (state, pinned) = (entry.state(), entry.pins() > 0);
        match state {
            SlotState::Doomed => self.free(slot),
            _ if self.parked.remove(&slot) && !pinned => self.set_held(slot, false),
            _ => {}
        }
    }

    /// A request read `slots`, given in prefix order.
    pub fn touch(&mut self, slots: &[SlotRef]) {
        for slot in slots.iter().rev() {
            self.touch_one(*slot, Touch::Hit);
        }
    }

    /// A request stored a chain that ends with `key`: the whole chain is as recent as it.
    pub fn refresh(&mut self, key: &SlotKey) {
        if let Some((slot, entry)) = self.find(key)
            && entry.state() == SlotState::Resident
        {
            self.touch_one(slot, Touch::Refresh);
        }
    }

    fn touch_one(&mut self, slot: SlotRef, touch: Touch) {
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.touch(block, touch);
        }
    }

    // ---- pinning

    /// Promises not to evict the block. Its length in bytes; `None` where it is not readable.
    pub fn pin(&mut self, key: &SlotKey) -> Option<u32> {
        let (slot, entry) = self.find(key).filter(|(_, entry)| entry.state() == SlotState::Resident)?;
        let (pins, length) = (entry.pins(), entry.length());
        entry.set_pins(pins + 1);
        if pins == 0 {
            self.pinned_bytes += u64::from(length);
            self.set_held(slot, true);
        }
        Some(length)
    }

    /// Takes one pin back.
    pub fn unpin(&mut self, key: &SlotKey) {
        let Some((slot, entry)) = self.find(key) else { return };
        let pins = entry.pins();
        if pins == 0 {
            return;
        }
        entry.set_pins(pins - 1);
        if pins == 1 {
            let length = u64::from(entry.length());
            self.pinned_bytes = self.pinned_bytes.saturating_sub(length);
            self.parked.remove(&slot);
            self.set_held(slot, false);
        }
    }

    /// Bytes of blocks that are pinned.
    pub fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    fn set_held(&mut self, slot: SlotRef, held: bool) {
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.hold(block, held);
        }
    }

    // ---- leaving

    /// Makes a block unreadable at once. A flight of it is superseded.
    pub fn delete(&mut self, key: &SlotKey) -> Delete {
        let Some((slot, entry)) = self.find(key) else { return Delete::Absent };
        if entry.pins() > 0 {
            return Delete::Pinned;
        }
        match entry.state() {
            SlotState::Filling => self.supersede(slot),
            _ => self.drop_resident(slot, Removal::Dropped),
        }
        self.counts.deleted += 1;
        Delete::Deleted
    }

    /// Drops a resident block whose bytes turned out damaged, whatever promises were made of it.
    pub fn quarantine(&mut self, key: &SlotKey) {
        let Some((slot, entry)) = self.find(key).filter(|(_, entry)| entry.state() == SlotState::Resident) else {
            return;
        };
        if entry.pins() > 0 {
            self.pinned_bytes = self.pinned_bytes.saturating_sub(u64::from(entry.length()));
        }
        self.drop_resident(slot, Removal::Dropped);
    }

    /// Evicts the block of `pool` that its policy gives up first. `None` when every block is leased,
    /// pinned, or on its way.
    pub fn evict(&mut self, pool: PoolId) -> Option<Evicted> {
        loop {
            let state = self.pools.get_mut(pool.0)?;
            let victim = state.policy.victim()?;
            let slot = state.slot_ref(victim)?;
            if let Some(evicted) = self.evict_slot(slot) {
                return Some(evicted);
            }
            // Leased or being demoted: not a candidate again before that ends.
            self.parked.insert(slot);
            self.set_held(slot, true);
        }
    }

    /// Evicts the block in `slot`, where nothing keeps it.
    fn evict_slot(&mut self, slot: SlotRef) -> Option<Evicted> {
        let entry = self.entry(slot)?;
        let stays = entry.leases() > 0 || entry.pins() > 0 || entry.is_demoting();
        if entry.state() != SlotState::Resident || stays {
            return None;
        }
        let evicted = Evicted { key: entry.key(), copies: entry.copies() };
        let key_hash = evicted.key.table_hash(self.seed);
        self.drop_resident(slot, Removal::Evicted { key_hash });
        self.counts.evicted += 1;
        Some(evicted)
    }

    /// Evicts a block by name, where nothing keeps it: how the shards of one block leave together.
    pub fn evict_key(&mut self, key: &SlotKey) -> Option<Evicted> {
        let (slot, _) = self.find(key)?;
        self.evict_slot(slot)
    }

    fn drop_resident(&mut self, slot: SlotRef, removal: Removal) {
        let Some(entry) = self.entry(slot) else { return };
        let (key, leases) = (entry.key(), entry.leases());
        entry.withdraw(SlotState::Doomed);
        self.unfile(slot, &key);
        self.parked.remove(&slot);
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.remove(block, removal);
        }
        if leases == 0 {
            self.free(slot);
        }
    }

    // ---- demoting

    /// Starts a copy to a lower tier: the block stays readable, and stays until [`Self::end_demote`].
    pub fn begin_demote(&mut self, key: &SlotKey) -> Option<(SlotRef, SlotRecord)> {
        let (slot, entry) = self.find(key)?;
        if entry.is_demoting() {
            return None;
        }
        let record = entry.read()?;
        entry.set_demoting(true);
        entry.set_leases(entry.leases() + 1);
        Some((slot, record))
    }

    /// Ends it; `copies` are the lower tiers that hold the block now, in addition to those before.
    pub fn end_demote(&mut self, slot: SlotRef, copies: u8) {
        if let Some(entry) = self.entry(slot) {
            if entry.state() == SlotState::Resident {
                entry.set_demoting(false);
                entry.set_copies(entry.copies() | copies);
            }
            self.release(slot);
        }
    }

    /// Lower tiers that hold a resident block: bit 0 Nvme, bit 1 Object.
    pub fn copies(&self, key: &SlotKey) -> u8 {
        self.find(key).map_or(0, |(_, entry)| entry.copies())
    }

    // ---- slots and keys

    fn take_free(&mut self, pool: PoolId) -> Option<SlotRef> {
        let state = self.pools.get(pool.0)?;
        let slot = state.slot_ref(state.first_free()?)?;
        let place = self.slabs.get_mut(slot.slab as usize)?.as_mut()?;
        let entry = place.memory.directory().get(slot.slot as usize)?;
        self.pools.get_mut(pool.0)?.pop_free(entry);
        place.used += 1;
        Some(slot)
    }

    fn free(&mut self, slot: SlotRef) {
        let Some((pool, block)) = self.place(slot) else { return };
        let Some(place) = self.slabs.get_mut(slot.slab as usize).and_then(Option::as_mut) else { return };
        let Some(entry) = place.memory.directory().get(slot.slot as usize) else { return };
        entry.withdraw(SlotState::Free);
        place.used = place.used.saturating_sub(1);
        if let Some(pool) = self.pools.get_mut(pool.0) {
            pool.push_free(block, entry);
        }
    }

    fn file(&mut self, slot: SlotRef, key: &SlotKey) {
        let Self { table, slabs, seed, .. } = self;
        table.insert(key.table_hash(*seed), slot, |filed| {
            let place = slabs.get(filed.slab as usize).and_then(Option::as_ref);
            let entry = place.and_then(|place| place.memory.directory().get(filed.slot as usize));
            entry.map_or(0, |entry| entry.key().table_hash(*seed))
        });
    }

    fn unfile(&mut self, slot: SlotRef, key: &SlotKey) {
        self.table.remove(key.table_hash(self.seed), slot);
    }

    // ---- accounts

    /// Counts since the start.
    pub fn counts(&self) -> ResidencyCounts {
        self.counts
    }

    /// Keys that are readable or on their way.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// True when nothing is readable or on its way.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Flights.
    pub fn flights(&self) -> usize {
        self.fills.len()
    }

    /// Keys of the readable blocks of slab `number`: for verification.
    pub fn keys_of_slab(&self, number: u32) -> Vec<SlotKey> {
        let entries = self.slab(number).map(SlabMemory::directory).unwrap_or_default();
        entries.iter().filter_map(SlotEntry::read).map(|record| record.key).collect()
    }
}
