//! Room: which pool gets memory. A pool without a free slot gets a new slab while the bound allows one;
//! then an unused slab of another pool; then a slab of a namespace that has more than its share, while its own has less, or of a
//! pool that is asked for far fewer bytes per slab; and else it evicts a block of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvstore_plane::{HUGE_PAGES_FROM_BYTES, SlabGeometry, SlabHeader};
use kvstore_transfer::{HUGE_PAGE_BYTES, Slab, SlabMemory};
use parking_lot::MutexGuard;

use super::namespace::{Namespace, NamespaceId};
use super::steps::Steps;
use super::{HostTier, State};
use crate::caps;
use crate::clock::BootTime;
use crate::pool::PoolId;
use crate::slots::{FlightSource, Incoming, Priority, Urgency, Withdrawn};

/// A slab moves only to a pool whose slabs are used this many times as much: moving one back and forth
/// costs the blocks in it.
const DEMAND_RATIO: f64 = 2.0;
/// A slab is made ahead once less than one part in this many of a slab is free: time to make it while the
/// rest is filled.
const LOW_PARTS: usize = 2;
/// No slab smaller than this part of a full one is made to use up the last of the bound.
const SMALLEST_PART: u64 = 8;

/// A slab that a pool may have, and that somebody has yet to make.
#[derive(Debug)]
pub struct SlabPlan {
    pub(super) namespace: NamespaceId,
    pub(super) pool: PoolId,
    namespace_digest: [u8; 32],
    geometry: SlabGeometry,
    /// Memory that was ready for it.
    pub(super) memory: Option<SlabMemory>,
    /// Memory that was ready, and that has to go first.
    pub(super) surplus: Vec<SlabMemory>,
}

impl SlabPlan {
    /// Bytes of the slab.
    pub(super) fn bytes(&self) -> u64 {
        self.geometry.slab_bytes
    }

    pub(super) fn header(&self, epoch: u64, slab: u32) -> SlabHeader {
        SlabHeader { epoch, slab, namespace_digest: self.namespace_digest, geometry: self.geometry }
    }
}

/// What making room came to.
pub(super) enum Room {
    /// Make this slab, then ask again.
    Make(SlabPlan),
    /// Another pool gave this slab up: unmap it, not under the lock, then ask again.
    Taken(Arc<Slab>),
    /// A slot is free now.
    Evicted,
    /// Memory is on its way: a slab is being made, readers have yet to unmap one that left, or what would leave is still being
    /// filled, written or sent.
    Wait,
    /// Everything is leased, pinned, or on its way.
    Busy,
    /// What would leave is worth more than what comes.
    Outranked,
}

/// Bytes of a slot for blocks of `block_bytes`: whole pages.
pub(super) fn slot_bytes(block_bytes: u64) -> u64 {
    block_bytes.max(1).next_multiple_of(4096)
}

/// Bytes of a full slab, in a tier that starts with `host_bytes`.
pub(super) fn slab_bytes_of(host_bytes: u64) -> u64 {
    (host_bytes / caps::SLABS_PER_TIER).clamp(caps::SLAB_BYTES_MIN, caps::SLAB_BYTES_MAX)
}

/// Bytes that hold any full slab of about so many bytes: see [`SlabGeometry::new`].
pub(super) fn memory_bytes_of(slab_bytes: u64) -> u64 {
    slab_bytes.next_multiple_of(if slab_bytes >= HUGE_PAGES_FROM_BYTES { HUGE_PAGE_BYTES } else { 4096 })
}

/// Slots of a full slab.
pub(super) fn slots_per_slab(slab_bytes: u64, block_bytes: u64) -> u32 {
    SlabGeometry::new(slot_bytes(block_bytes), slab_bytes).slot_count
}

/// The slab that a pool with such blocks gets when `room` bytes are left; `None` when none fits.
pub(super) fn slab_geometry(slab_bytes: u64, block_bytes: u64, room: u64) -> Option<SlabGeometry> {
    let full = SlabGeometry::new(slot_bytes(block_bytes), slab_bytes);
    if full.slab_bytes <= room {
        return Some(full);
    }
    let part = SlabGeometry::new(slot_bytes(block_bytes), room);
    let worth_it = part.slab_bytes * SMALLEST_PART >= full.slab_bytes;
    (part.slab_bytes <= room && worth_it).then_some(part)
}

impl HostTier {
    /// The least memory that blocks take: sizes, and how many of each.
    pub fn bytes_for(&self, blocks: impl Iterator<Item = (u64, u64)>) -> u64 {
        let slab_bytes = self.state.lock().slab_bytes;
        let of_size = |(block_bytes, count): (u64, u64)| {
            let full = SlabGeometry::new(slot_bytes(block_bytes), slab_bytes);
            let per_slab = u64::from(full.slot_count.max(1));
            count / per_slab * full.slab_bytes + count % per_slab * full.slot_bytes
        };
        blocks.map(of_size).sum()
    }

    pub(super) fn room_for(
        &self,
        state: &mut MutexGuard<'_, State>,
        namespace: NamespaceId,
        incoming: &Incoming,
        urgency: Urgency,
        now: BootTime,
    ) -> Room {
        let pool = incoming.pool;
        // Several that want a slot at once need one slab, not one each.
        if state.making.contains(&(namespace, pool)) {
            return Room::Wait;
        }
        if let Some(plan) = self.plan(state, namespace, pool) {
            return Room::Make(plan);
        }
        if self.ready.comes_soon() && self.has_room_but_for_ready(state, namespace, pool) {
            return Room::Wait;
        }
        // What is on its way already is waited for, or every slab would leave before the first is unmapped.
        let retiring = state.retiring_bytes();
        let awaited = retiring >= state.slab_bytes / 2;
        if state.taking {
            return Room::Wait;
        }
        if !awaited && let Some(slab) = self.take_from_others(state, namespace, pool, now) {
            state.slabs_moved += 1;
            state.taken = now;
            return Room::Taken(slab);
        }
        // Clients unmap within milliseconds, and a block is worth more than that; one that is stopped is not waited for.
        if awaited && now.ms_since(state.taken) < UNMAP_MS {
            return Room::Wait;
        }
        let at = state.namespace_mut(namespace);
        let outcome =
            at.map_or((false, false), |at| at.evict_for(incoming, urgency, self.has_below.load(Ordering::Relaxed)));
        let (evicted, outranked) = outcome;
        if state.namespace(namespace).is_some_and(|namespace| namespace.slots.has_leaving()) {
            self.leaving.notify_one();
        }
        // A block that is written to disk or sent just now keeps its whole prefix in memory, and leaves soon; so may one
        // that is being filled.
        let kept_for_now = state.makes_room(namespace, pool);
        match evicted {
            true => Room::Evicted,
            // What comes ahead of need waits for nothing.
            false if outranked && urgency.priority == Priority::Prefetch => Room::Outranked,
            false if awaited || kept_for_now => Room::Wait,
            false if outranked => Room::Outranked,
            false => Room::Busy,
        }
    }

    /// What is stored behind a beginning that is nowhere can't be read. It gets none of the last free slots: those that the low
    /// watermark keeps free would fill with it, and what is above the high one would leave the end of another chain.
    pub(super) fn is_of_no_use(
        &self,
        state: &State,
        namespace: NamespaceId,
        incoming: &Incoming,
        urgency: Urgency,
    ) -> bool {
        let passes = urgency.source == FlightSource::Promotion || self.has_below.load(Ordering::Relaxed);
        if passes || self.ready.comes_soon() || incoming.parent.is_none() || !incoming.kind.eviction().needs_prefix() {
            return false;
        }
        let Some(slots) = state.namespace(namespace).map(|at| &at.slots) else { return false };
        let (_, count, used) = slots.pool_occupancy(incoming.pool);
        let kept_free = 2 * (100 - u64::from(state.limits.low_watermark_percent.min(100)));
        let is_full = (count - used.min(count)) as u64 * 100 <= count as u64 * kept_free;
        is_full && !self.has_room_but_for_ready(state, namespace, incoming.pool) && slots.lacks_beginning(incoming)
    }

    /// A slab for a pool whose free slots run low, while the bound allows one and none is being made.
    pub(super) fn plan_ahead(&self, state: &mut State, namespace: NamespaceId, pool: PoolId) -> Option<SlabPlan> {
        let slots = &state.namespace(namespace)?.slots;
        let (_, count, _) = slots.pool_occupancy(pool);
        let per_slab = count / slots.slab_count(pool).max(1);
        let low = slots.free_slots(pool) * LOW_PARTS < per_slab;
        if !low || state.making.contains(&(namespace, pool)) { None } else { self.plan(state, namespace, pool) }
    }

    /// True where there is room for a slab, and memory that is being made ready takes it just now.
    fn has_room_but_for_ready(&self, state: &State, namespace: NamespaceId, pool: PoolId) -> bool {
        let room = state.limits.bytes.saturating_sub(self.mapped.load(Ordering::SeqCst));
        let room = room.min(state.room_of(namespace));
        let slots = state.namespace(namespace).map(|at| at.slots.pool_occupancy(pool));
        slots.is_some_and(|(slot_bytes, _, _)| slab_geometry(state.slab_bytes, slot_bytes, room).is_some())
    }

    fn plan(&self, state: &mut State, namespace: NamespaceId, pool: PoolId) -> Option<SlabPlan> {
        // What is being made ready cannot be taken yet, nor given back.
        let room = state.limits.bytes.saturating_sub(self.mapped.load(Ordering::SeqCst) + self.ready.making());
        let room = room.min(state.room_of(namespace));
        let namespace_state = state.namespace(namespace)?;
        let (slot_bytes, _, _) = namespace_state.slots.pool_occupancy(pool);
        let geometry = slab_geometry(state.slab_bytes, slot_bytes, room)?;
        let memory = self.ready.take(geometry.slab_bytes, &self.mapped);
        if memory.is_none() {
            self.mapped.fetch_add(geometry.slab_bytes, Ordering::SeqCst);
        }
        let room = state.limits.bytes.saturating_sub(self.mapped.load(Ordering::SeqCst) + self.ready.making());
        let surplus = self.ready.surplus(room);
        let namespace_digest = namespace_state.digest;
        let plan = SlabPlan { namespace, pool, namespace_digest, geometry, memory, surplus };
        state.making.push((namespace, pool));
        Some(plan)
    }
}

/// Slabs of a pool that are tried, emptiest first, before the pool is given up as a donor for now.
const SLABS_TRIED: usize = 4;
/// A pool looks at the others for a slab this often at most: it costs the lock a look at one slab's slots.
const LOOK_EVERY_MS: u64 = 50;
/// An eviction may take a batch, and the same blocks of sibling shards: it counts as so many steps.
const EVICTED_AT_ONCE: u32 = caps::EVICT_BATCH as u32;
/// How long a pool waits for readers to unmap the slab that it took, before it evicts a block of its own.
const UNMAP_MS: u64 = 100;

impl State {
    /// True where there may be room in a moment, without anybody's asking again.
    pub(super) fn makes_room(&mut self, namespace: NamespaceId, pool: PoolId) -> bool {
        let on_its_way = |at: &Namespace| at.slots.has_parked() || at.slots.flights() > 0;
        self.taking
            || self.making.contains(&(namespace, pool))
            || self.retiring_bytes() > 0
            || self.namespace(namespace).is_some_and(on_its_way)
    }

    /// Bytes of slabs that a namespace may have yet, of its own bound.
    fn room_of(&self, namespace: NamespaceId) -> u64 {
        let Some(at) = self.namespace(namespace) else { return 0 };
        let Some(bytes) = at.limits.bytes else { return u64::MAX };
        let making = self.making.iter().filter(|(of, _)| *of == namespace).count() as u64 * self.slab_bytes;
        bytes.saturating_sub(at.slab_bytes + making)
    }

    /// What each namespace may have while others want it, in bytes: of those that have memory, as much as their own bounds are
    /// to each other; one without a bound counts as an equal part.
    fn shares(&self) -> Vec<u64> {
        let holds = |namespace: &Namespace| namespace.slab_bytes > 0;
        let count = self.namespaces.iter().filter(|namespace| holds(namespace)).count().max(1) as u64;
        let whole = self.limits.bytes;
        let weight = |at: &Namespace| at.limits.bytes.map_or(whole / count, |bytes| bytes.min(whole)).max(1);
        let total: u128 =
            self.namespaces.iter().filter(|at| holds(at)).map(|namespace| u128::from(weight(namespace))).sum();
        let share = |at: &Namespace| (u128::from(whole) * u128::from(weight(at)) / total.max(1)) as u64;
        self.namespaces.iter().map(share).collect()
    }

    /// True where a namespace has more than its share, with `more` bytes.
    fn is_beyond(&self, shares: &[u64], at: usize, more: u64) -> bool {
        let (Some(namespace), Some(share)) = (self.namespaces.get(at), shares.get(at)) else { return false };
        namespace.slab_bytes + more > *share
    }

    /// The pools from which `pool` may take a slab, the best first.
    fn donors(&mut self, namespace: NamespaceId, pool: PoolId, now: BootTime) -> Vec<(usize, PoolId)> {
        // Pools of one namespace share its bound: what it takes from others must fit, too.
        let only_own = self.room_of(namespace) < self.slab_bytes;
        let Some(receiver) = self.namespace_mut(namespace) else { return Vec::new() };
        let slabs = receiver.slots.slab_count(pool);
        if slabs > 0 && !receiver.may_look(pool, now, LOOK_EVERY_MS) {
            return Vec::new();
        }
        let wanted = receiver.demand(pool, now) / (slabs + 1) as f64;
        let shares = self.shares();
        let grows_beyond = self.is_beyond(&shares, namespace.0, self.slab_bytes);
        let mut donors: Vec<(bool, f64, usize, PoolId)> = Vec::new();
        for (at, donor) in self.namespaces.iter().enumerate() {
            let is_other = NamespaceId(at) != namespace;
            if only_own && is_other {
                continue;
            }
            // Whoever is within its share, and used, gives nothing to one that would be beyond its own.
            let is_beyond = self.is_beyond(&shares, at, 0);
            if is_other && grows_beyond && !is_beyond && donor.is_asked(now) {
                continue;
            }
            // And who is beyond it gives to who is not.
            let gives_way = is_other && is_beyond && !grows_beyond;
            for other in donor.slots.pools().filter(|other| (NamespaceId(at), *other) != (namespace, pool)) {
                let count = donor.slots.slab_count(other);
                if count == 0 {
                    continue;
                }
                let empty = donor.slots.pool_occupancy(other).2 == 0;
                let demand = donor.demand(other, now) / count as f64;
                if empty || slabs == 0 || gives_way || demand * DEMAND_RATIO < wanted {
                    donors.push((!empty, demand, at, other));
                }
            }
        }
        donors.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        donors.into_iter().map(|(_, _, at, other)| (at, other)).collect()
    }

    /// The emptiest slabs of a pool.
    fn emptiest(&self, namespace: usize, pool: PoolId) -> Vec<u32> {
        let Some(slots) = self.namespaces.get(namespace).map(|at| &at.slots) else { return Vec::new() };
        let mut slabs = slots.slab_numbers(pool);
        slabs.retain(|slab| !slots.slab_is_leaving(*slab));
        if slabs.len() > SLABS_TRIED {
            slabs.select_nth_unstable_by_key(SLABS_TRIED, |slab| slots.slab_used(*slab));
            slabs.truncate(SLABS_TRIED);
        }
        slabs.sort_by_key(|slab| slots.slab_used(*slab));
        slabs
    }

    /// Where the tier can't grow, and a pool is fuller than the high watermark: the blocks that are to leave it.
    fn above_watermark(&self, at: usize, pool: PoolId, room: u64) -> usize {
        let Some(namespace) = self.namespaces.get(at) else { return 0 };
        // A slab on its way makes room without an eviction.
        if self.making.contains(&(NamespaceId(at), pool)) {
            return 0;
        }
        let (slot_bytes, slots, used) = namespace.slots.pool_occupancy(pool);
        let part = |percent: u32| (slots as u64 * u64::from(percent)).div_ceil(100);
        let can_grow = slab_geometry(self.slab_bytes, slot_bytes, room).is_some();
        if can_grow || used as u64 <= part(self.limits.high_watermark_percent) {
            return 0;
        }
        used.saturating_sub(part(self.limits.low_watermark_percent) as usize)
    }
}

/// Slabs that leave: in steps under the lock, which others may have in between.
impl HostTier {
    /// Takes a slab from another pool for `pool`, where that is right.
    fn take_from_others(
        &self,
        state: &mut MutexGuard<'_, State>,
        namespace: NamespaceId,
        pool: PoolId,
        now: BootTime,
    ) -> Option<Arc<Slab>> {
        let donors = state.donors(namespace, pool, now);
        // Others that want a slab just now wait for this: each would take one else, and more than are needed would leave.
        state.taking = true;
        let taken = donors.into_iter().find_map(|(at, other)| self.withdraw_emptiest(state, at, other));
        state.taking = false;
        taken
    }

    /// Withdraws the emptiest slab of a pool from which nothing is stuck.
    fn withdraw_emptiest(
        &self,
        state: &mut MutexGuard<'_, State>,
        namespace: usize,
        pool: PoolId,
    ) -> Option<Arc<Slab>> {
        let emptiest = state.emptiest(namespace, pool);
        let slots = &state.namespaces.get(namespace)?.slots;
        let slab = emptiest.into_iter().find(|slab| !slots.slab_is_stuck(*slab))?;
        self.withdraw(state, namespace, slab)
    }

    fn withdraw(&self, state: &mut MutexGuard<'_, State>, namespace: usize, slab: u32) -> Option<Arc<Slab>> {
        let mut step = state.namespaces.get_mut(namespace)?.slots.begin_withdraw(slab);
        loop {
            match step {
                Withdrawn::More(from) => {
                    MutexGuard::bump(state);
                    step = state.namespaces.get_mut(namespace)?.slots.withdraw_some(slab, from);
                }
                Withdrawn::Stuck => return None,
                Withdrawn::Done(slab) => {
                    if let Some(namespace) = state.namespaces.get_mut(namespace) {
                        namespace.slab_bytes = namespace.slab_bytes.saturating_sub(slab.geometry().slab_bytes);
                    }
                    state.retired.push(Arc::downgrade(&slab));
                    return Some(slab);
                }
            }
        }
    }

    /// Slabs of the namespaces that `which` chooses, the emptiest first.
    fn by_use(&self, which: impl Fn(&Namespace) -> bool) -> Vec<(usize, usize, u32)> {
        let count = self.state.lock().namespaces.len();
        let mut slabs = Vec::new();
        for at in 0..count {
            let state = self.state.lock();
            let Some(namespace) = state.namespaces.get(at).filter(|namespace| which(namespace)) else { continue };
            let slots = &namespace.slots;
            let numbers = slots.pools().flat_map(|pool| slots.slab_numbers(pool));
            slabs.extend(numbers.map(|slab| (slots.slab_used(slab), at, slab)));
        }
        slabs.sort_unstable();
        slabs
    }

    fn withdraw_unstuck(&self, namespace: usize, slab: u32) -> Option<Arc<Slab>> {
        let mut state = self.state.lock();
        let slots = &state.namespaces.get(namespace)?.slots;
        if slots.slab_is_leaving(slab) || slots.slab_is_stuck(slab) {
            return None;
        }
        self.withdraw(&mut state, namespace, slab)
    }

    /// Withdraws slabs until the tier is within its bound, as far as leases allow, the emptiest first.
    pub(super) fn shrink(&self) -> Vec<Arc<Slab>> {
        let mut retired = Vec::new();
        if !self.is_over() {
            return retired;
        }
        for (_, namespace, slab) in self.by_use(|_| true) {
            // Asked again for each: others may shrink it at the same time.
            if !self.is_over() {
                break;
            }
            retired.extend(self.withdraw_unstuck(namespace, slab));
        }
        retired
    }

    /// True where the tier maps more than its bound, beside what is to be unmapped already.
    fn is_over(&self) -> bool {
        let mut state = self.state.lock();
        let mapped = self.mapped.load(Ordering::Acquire);
        mapped > state.limits.bytes + state.retiring_bytes()
    }

    /// Withdraws slabs of namespaces that have more than their own bound, as far as leases allow, the emptiest first.
    pub(super) fn shrink_namespaces(&self) -> Vec<Arc<Slab>> {
        let is_over = |namespace: &Namespace| namespace.limits.bytes.is_some_and(|bytes| namespace.slab_bytes > bytes);
        let mut retired = Vec::new();
        if !self.state.lock().namespaces.iter().any(is_over) {
            return retired;
        }
        for (_, namespace, slab) in self.by_use(is_over) {
            if self.state.lock().namespaces.get(namespace).is_some_and(is_over) {
                retired.extend(self.withdraw_unstuck(namespace, slab));
            }
        }
        retired
    }

    /// Where the tier can't grow, evicts from each pool that is fuller than the high watermark.
    pub(super) fn evict_to_watermark(&self) {
        let state = self.state.lock();
        let of = |(at, namespace): (usize, &Namespace)| namespace.slots.pools().map(move |pool| (at, pool));
        let pools: Vec<(usize, PoolId)> = state.namespaces.iter().enumerate().flat_map(of).collect();
        drop(state);
        let mut steps = Steps::begin(self);
        for (at, pool) in pools {
            // Looked at under the lock, as plans are made and dropped: one that was just dropped would take room that is free again.
            let state = steps.next();
            let room = state.limits.bytes.saturating_sub(self.mapped.load(Ordering::Acquire));
            let mut above = state.above_watermark(at, pool, room);
            while above > 0 {
                // As long as it gets emptier: what is left may all be held, with slots to spare.
                let Some(namespace) = steps.take(EVICTED_AT_ONCE).namespaces.get_mut(at) else { break };
                let before = namespace.slots.pool_occupancy(pool).2;
                namespace.evict_some(pool, None, above.min(caps::EVICT_BATCH));
                let evicted = before.saturating_sub(namespace.slots.pool_occupancy(pool).2);
                if evicted == 0 {
                    break;
                }
                above = above.saturating_sub(evicted);
            }
        }
    }
}
