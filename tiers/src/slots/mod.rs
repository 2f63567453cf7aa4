//! Slots: which block each holds, and who may fill, read or replace it. Generic over the memory. Touches no
//! block's bytes, does no I/O, awaits nothing and reads no clock: a million random steps run in a test.
//!
//! One [`Slots`] serves one namespace. A block's life in it:
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

mod demote;
mod fill;
mod leave;
mod look;
mod read;
mod readers;
mod slabs;
mod types;
mod unused;
mod write_back;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use kvstore_plane::{KeyTable, SequenceHash, SlotEntry, SlotKey, SlotRef, SlotState, TableFull, TableMemory};

use crate::caps;
use crate::clock::BootTime;
use crate::eviction::{BlockIndex, Claim, NewBlock, Origin, PolicyKind};
use crate::pool::{Pool, PoolId};

pub use readers::{NoReaders, Readers, Waits};
pub use slabs::Withdrawn;
pub use types::{
    Delete, Evicted, FillTicket, FlightSource, Incoming, Leaving, Pinned, Presence, Priority, Publish, Reserve, Urgency,
};

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

struct Fill {
    generation: u64,
    incoming: Incoming,
    /// The first block of its chain that is being filled, or was when this one came: what is before that is in memory, or is not.
    head: SequenceHash,
    /// How many blocks it is behind that one.
    behind: u32,
    urgency: Urgency,
    progress: BootTime,
    superseded: bool,
}

struct SlabPlace<S> {
    memory: S,
    pool: PoolId,
    ordinal: u32,
    /// Tells it from earlier slabs of its number.
    serial: u64,
    /// Slots that hold something.
    used: usize,
    /// Slots whose blocks can't leave now: see [`is_kept`].
    kept: usize,
}

/// True where what is in a slot can't leave now: it is leased, pinned, demoting, being filled, or waits for its readers.
fn is_kept(entry: &SlotEntry) -> bool {
    match entry.state() {
        SlotState::Free => false,
        SlotState::Resident => entry.leases() > 0 || entry.pins() > 0 || entry.is_demoting(),
        SlotState::Filling | SlotState::Doomed => true,
    }
}

/// Counts since the start; all of blocks.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct SlotCounts {
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

/// A block that was published while the one before it was being filled.
struct Early {
    slot: SlotRef,
    generation: u64,
    key: SlotKey,
}

/// See the head of this file.
pub struct Slots<S> {
    seed: u64,
    policy: PolicyKind,
    table: KeyTable,
    slabs: Vec<Option<SlabPlace<S>>>,
    slabs_added: u64,
    pools: Vec<Pool>,
    fills: HashMap<SlotRef, Fill>,
    /// By the block before them: blocks that were published while that one was being filled, with their generations.
    early: HashMap<SlotKey, Vec<Early>>,
    /// Victims that were leased when they were named: candidates again once they are released.
    parked: HashSet<SlotRef>,
    readers: Arc<dyn Readers>,
    waiting: readers::Waiting,
    counts: SlotCounts,
    pinned_bytes: u64,
    /// Told by whoever calls: see [`Slots::set_now`].
    now_ms: u64,
    /// Since they were made: see `unused.rs`.
    second: u32,
    /// Seconds after which a block that nobody used leaves.
    ttl: Option<u32>,
    /// The block up to whose ancestors the renewal of a prefix got, where it is to go on.
    renewing: Option<(PoolId, BlockIndex)>,
    /// Blocks are offered to the tiers below before they leave.
    writes_back: bool,
    /// Those that are to be offered, leased: see `write_back.rs`.
    leaving: Vec<Leaving>,
    /// Hears of each block that becomes readable (true) or leaves.
    watcher: Option<Watcher>,
}

/// See [`Slots::watch`].
pub type Watcher = Box<dyn Fn(&SlotKey, bool) + Send>;

impl<S: SlabMemory> Slots<S> {
    /// None yet. `seed` should be secret: sequence hashes come from clients, and a client that
    /// knew it could fill one bucket of the key table. `table` holds the key table, which is full when it is; `readers`
    /// are all who read slots without asking.
    pub fn new(
        seed: u64,
        policy: PolicyKind,
        table: Box<dyn TableMemory + Send + Sync>,
        readers: Arc<dyn Readers>,
    ) -> Self {
        Self {
            seed,
            policy,
            table: KeyTable::new(table),
            slabs: Vec::new(),
            slabs_added: 0,
            pools: Vec::new(),
            // Room for what is usually in flight, so that no fill allocates.
            fills: HashMap::with_capacity(caps::FILLS_USUAL),
            early: HashMap::new(),
            parked: HashSet::with_capacity(caps::FILLS_USUAL),
            readers,
            waiting: readers::Waiting::default(),
            counts: SlotCounts::default(),
            pinned_bytes: 0,
            now_ms: 0,
            second: 0,
            ttl: None,
            renewing: None,
            writes_back: false,
            leaving: Vec::new(),
            watcher: None,
        }
    }

    /// `watcher` is told of each block that becomes readable (true) or is no longer (false) from now on.
    pub fn watch(&mut self, watcher: Watcher) {
        self.watcher = Some(watcher);
    }

    fn tell_watcher(&self, key: &SlotKey, stored: bool) {
        if let Some(watcher) = &self.watcher {
            watcher(key, stored);
        }
    }

    /// It is so late now: eviction policies learn how long blocks wait.
    pub fn set_now(&mut self, now: BootTime) {
        self.now_ms = self.now_ms.max(now.0);
    }

    /// A pool, whose policy knows the time.
    fn pool_now(&mut self, pool: PoolId) -> Option<&mut Pool> {
        let pool = self.pools.get_mut(pool.0)?;
        pool.policy.at(self.now_ms);
        Some(pool)
    }

    /// What is in memory of the chain of a block that comes.
    fn origin_of(&self, incoming: &Incoming) -> Origin {
        self.place_of(incoming).0
    }

    /// The same, and how many blocks between that and it are on their way.
    fn place_of(&self, incoming: &Incoming) -> (Origin, u32) {
        let (mut before, mut missing) = (incoming.parent, 0);
        // Its parent; where that is being filled, the first of the chain that is; and what is before that one.
        for _ in 0..3 {
            let Some(hash) = before else { return (Origin::Root, missing) };
            let Some((slot, entry)) = self.find(&SlotKey { hash, ..incoming.key }) else { break };
            if let Some((pool, block)) = self.place(slot)
                && entry.state() == SlotState::Resident
                && pool == incoming.pool
            {
                return (Origin::After(block), missing);
            }
            let Some(fill) = self.live_fill(slot) else { break };
            (before, missing) = match fill.head == hash {
                true => (fill.incoming.parent, missing + 1),
                false => (Some(fill.head), missing + fill.behind),
            };
        }
        (if before.is_none() { Origin::Root } else { Origin::Absent }, missing)
    }

    /// True where a block comes that needs what precedes it, which is not there and does not come.
    pub fn lacks_beginning(&self, incoming: &Incoming) -> bool {
        self.origin_of(incoming) == Origin::Absent && self.find(&incoming.key).is_none()
    }

    /// See [`Fill::head`] and [`Fill::behind`].
    fn head_of(&self, incoming: &Incoming) -> (SequenceHash, u32) {
        let parent = incoming.parent.and_then(|hash| self.find_slot(&SlotKey { hash, ..incoming.key }));
        let fill = parent.and_then(|slot| self.live_fill(slot));
        fill.map_or((incoming.key.hash, 0), |fill| (fill.head, fill.behind + 1))
    }

    /// A block was published while what is before it is being filled; false where there are too many such blocks to note one more.
    fn note_early(&mut self, slot: SlotRef, incoming: &Incoming) -> bool {
        let Some(hash) = incoming.parent else { return false };
        let Some(generation) = self.entry(slot).map(SlotEntry::generation) else { return false };
        let before = SlotKey { hash, ..incoming.key };
        if self.early.len() >= caps::FILLS_MAX && !self.early.contains_key(&before) {
            let mut early = std::mem::take(&mut self.early);
            early.retain(|_, blocks| blocks.iter().any(|early| self.is_still(early)));
            self.early = early;
            if self.early.len() >= caps::FILLS_MAX {
                return false;
            }
        }
        let mut early = self.early.remove(&before).unwrap_or_default();
        early.retain(|early| self.is_still(early));
        let has_room = early.len() < caps::EARLY_FOLLOWERS_MAX;
        if has_room {
            early.push(Early { slot, generation, key: incoming.key });
        }
        self.early.insert(before, early);
        has_room
    }

    /// The blocks of `pool` that were published before `key`, which is before them.
    fn take_early(&mut self, key: &SlotKey, pool: PoolId) -> Vec<BlockIndex> {
        if self.early.is_empty() {
            return Vec::new();
        }
        let early = self.early.remove(key).unwrap_or_default();
        let there = early.iter().filter(|early| self.is_still(early));
        there.filter_map(|early| self.place(early.slot)).filter(|(of, _)| *of == pool).map(|(_, block)| block).collect()
    }

    fn is_still(&self, early: &Early) -> bool {
        let is_it = |entry: &SlotEntry| entry.generation() == early.generation && entry.key() == early.key;
        self.entry(early.slot).is_some_and(|entry| entry.state() == SlotState::Resident && is_it(entry))
    }

    fn live_fill(&self, slot: SlotRef) -> Option<&Fill> {
        self.fills.get(&slot).filter(|fill| !fill.superseded)
    }

    fn new_block(&self, incoming: &Incoming, origin: Origin, tail: bool) -> NewBlock {
        let key_hash = incoming.key.table_hash(self.seed);
        NewBlock { origin, key_hash, kind: incoming.kind.eviction(), tail, claim: Claim::Stored }
    }

    fn take_free(&mut self, pool: PoolId) -> Option<SlotRef> {
        let state = self.pools.get_mut(pool.0)?;
        let slot = state.first_free()?;
        let place = self.slabs.get_mut(slot.slab as usize)?.as_mut()?;
        let entry = place.memory.directory().get(slot.slot as usize)?;
        state.take_free(state.index(place.ordinal, slot.slot), entry);
        place.used += 1;
        Some(slot)
    }

    /// Changes the entry of `slot`, and counts whether its block may leave. `None` where there is no such slot.
    fn change<T>(&mut self, slot: SlotRef, change: impl FnOnce(&SlotEntry) -> T) -> Option<T> {
        let place = self.slabs.get_mut(slot.slab as usize)?.as_mut()?;
        let entry = place.memory.directory().get(slot.slot as usize)?;
        let before = is_kept(entry);
        let changed = change(entry);
        match (before, is_kept(entry)) {
            (false, true) => place.kept += 1,
            (true, false) => place.kept = place.kept.saturating_sub(1),
            _ => {}
        }
        Some(changed)
    }

    fn free(&mut self, slot: SlotRef) {
        let Some((pool, block)) = self.place(slot) else { return };
        self.change(slot, |entry| entry.withdraw(SlotState::Free));
        let Some(place) = self.slabs.get_mut(slot.slab as usize).and_then(Option::as_mut) else { return };
        let Some(entry) = place.memory.directory().get(slot.slot as usize) else { return };
        place.used = place.used.saturating_sub(1);
        if let Some(pool) = self.pools.get_mut(pool.0) {
            pool.push_free(block, entry);
        }
    }

    fn file(&mut self, slot: SlotRef, key: &SlotKey) -> Result<(), TableFull> {
        let Self { table, slabs, seed, .. } = self;
        table.insert(key.table_hash(*seed), slot, |filed| {
            let place = slabs.get(filed.slab as usize).and_then(Option::as_ref);
            let entry = place.and_then(|place| place.memory.directory().get(filed.slot as usize));
            entry.map_or(0, |entry| entry.key().table_hash(*seed))
        })
    }

    fn unfile(&mut self, slot: SlotRef, key: &SlotKey) {
        self.table.remove(key.table_hash(self.seed), slot);
    }

    /// Counts since the start.
    pub fn counts(&self) -> SlotCounts {
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
        let mut keys = Vec::new();
        self.keys_in(number, 0..u32::MAX, &mut keys);
        keys
    }

    /// Those in some of its slots. False where the slab has none further on.
    pub fn keys_in(&self, number: u32, slots: Range<u32>, out: &mut Vec<SlotKey>) -> bool {
        let entries = self.slab(number).map(SlabMemory::directory).unwrap_or_default();
        let range = slots.start.min(entries.len() as u32) as usize..entries.len().min(slots.end as usize);
        let keys = entries.get(range).unwrap_or_default().iter().filter_map(SlotEntry::read).map(|record| record.key);
        out.extend(keys);
        entries.len() > slots.end as usize
    }
}
