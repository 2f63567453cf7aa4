//! One namespace's part of the Host tier: its layouts, its slots, its holds, and how much each of
//! its pools is used.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use kvstore_plane::{SlotKey, name_seed};
use kvstore_transfer::Slab;
use parking_lot::RwLock;

use super::attached::{AttachedReaders, SharedTable};
use super::{Holds, HostStatus, PoolStatus, RegisterError, room};
use crate::caps;
use crate::changes::{Change, ChangeLog, NamespaceTag};
use crate::clock::BootTime;
use crate::eviction::{Claim, PolicyKind};
use crate::layout::{BlockKind, LayerGroup, Layout, Shard};
use crate::pool::PoolId;
use crate::slots::{FlightSource, Incoming, Priority, Readers, Slots, Urgency, Watcher};
use crate::tier::Tier;

/// A namespace's place in the configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct NamespaceId(pub usize);

/// A namespace's name, as disks and buckets know it.
pub fn namespace_digest(name: &str) -> [u8; 32] {
    *blake3::hash(name.as_bytes()).as_bytes()
}

/// What one namespace may have of the Host tier; may change while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NamespaceLimits {
    /// Bytes of its slabs at most; `None`: as many as the tier has.
    pub bytes: Option<u64>,
    /// At most this part of the tier may be pinned or held by tickets, in percent.
    pub held_percent: u64,
    /// What nobody stored or read in this long leaves; `None`: nothing does.
    pub ttl_ms: Option<u64>,
    /// Blocks that no tier below has are offered to them before they leave: see [`HostTier::take_leaving`](super::HostTier).
    pub writes_back: bool,
}

impl Default for NamespaceLimits {
    fn default() -> Self {
        Self { bytes: None, held_percent: caps::HELD_PERCENT_MAX, ttl_ms: None, writes_back: false }
    }
}

/// A layout that clients may use.
#[derive(Debug)]
pub struct RegisteredLayout {
    /// Whose.
    pub namespace: NamespaceId,
    /// The daemon's number for the digest in this namespace.
    pub ordinal: u32,
    /// As registered.
    pub layout: Layout,
    /// Names the layout.
    pub digest: [u8; 32],
    /// Digest of the namespace's name.
    pub namespace_digest: [u8; 32],
    /// Its groups, with where their blocks go.
    pub groups: Vec<LayoutGroup>,
    family: [u8; 32],
}

/// A layer group of a registered layout.
#[derive(Debug)]
pub struct LayoutGroup {
    /// As registered.
    pub group: LayerGroup,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// What events name its blocks by.
    pub name_seed: u64,
    pub(super) pool: PoolId,
}

impl RegisteredLayout {
    /// The group with this number.
    pub fn group(&self, group: u32) -> Option<&LayoutGroup> {
        self.groups.get(group as usize)
    }

    /// True where the group's blocks are pieces of snapshots.
    pub fn is_of_chunks(&self, group: u16) -> bool {
        self.group(u32::from(group)).is_some_and(|group| group.group.kind == BlockKind::Chunk)
    }
}

/// Bytes of blocks that were asked of a pool, fading by half every [`DEMAND_HALF_MS`]. Bytes, because a
/// block's worth to an engine grows with its size: about as much was computed for it.
#[derive(Clone, Copy, Default)]
pub(super) struct Demand {
    faded: f64,
    at: BootTime,
    /// When the pool last looked at others for a slab.
    looked: BootTime,
}

/// Slabs follow demand over tens of seconds: shorter than a shift of traffic, longer than a burst.
const DEMAND_HALF_MS: f64 = 10_000.0;

impl Demand {
    pub(super) fn at(&self, now: BootTime) -> f64 {
        self.faded * 0.5f64.powf(now.ms_since(self.at) as f64 / DEMAND_HALF_MS)
    }

    fn add(&mut self, bytes: u64, now: BootTime) {
        self.faded = self.at(now) + bytes as f64;
        self.at = now;
    }
}

pub(super) struct Namespace {
    name: String,
    pub(super) digest: [u8; 32],
    /// Of its key table.
    pub(super) seed: u64,
    pub(super) table: SharedTable,
    pub(super) readers: Arc<AttachedReaders>,
    pub(super) slots: Slots<Arc<Slab>>,
    pub(super) holds: Holds,
    pub(super) limits: NamespaceLimits,
    /// Bytes of its slabs.
    pub(super) slab_bytes: u64,
    layouts: Vec<Arc<RegisteredLayout>>,
    /// What events name the blocks by, by layout and group.
    name_seeds: NameSeeds,
    by_digest: HashMap<[u8; 32], u32>,
    families: HashMap<[u8; 32], Vec<u32>>,
    demand: Vec<Demand>,
}

/// By layout and group.
#[derive(Clone, Default)]
struct NameSeeds(Arc<RwLock<Vec<Box<[u64]>>>>);

/// Tells the log of each block that becomes readable or leaves.
fn watcher(log: Arc<ChangeLog>, namespace: NamespaceTag, seeds: NameSeeds) -> Watcher {
    Box::new(move |key, stored| {
        if !log.is_followed() {
            return;
        }
        let seed =
            seeds.0.read().get(key.layout as usize).and_then(|groups| groups.get(usize::from(key.group)).copied());
        if let Some(seed) = seed {
            let name = key.hash.event_name(seed);
            log.push(Change { name, namespace, tier: Tier::Host, stored });
        }
    })
}

impl Namespace {
    pub(super) fn new(name: &str, seed: u64, policy: PolicyKind, bytes_ceiling: u64, log: Arc<ChangeLog>) -> Self {
        let readers = Arc::new(AttachedReaders::default());
        let table = SharedTable::create(bytes_ceiling);
        let mut slots = Slots::new(seed, policy, table.memory(), Arc::clone(&readers) as Arc<dyn Readers>);
        let digest = namespace_digest(name);
        let name_seeds = NameSeeds::default();
        slots.watch(watcher(log, NamespaceTag::of(&digest), name_seeds.clone()));
        Self {
            name: name.to_owned(),
            digest,
            name_seeds,
            seed,
            table,
            readers,
            slots,
            holds: Holds::default(),
            limits: NamespaceLimits::default(),
            slab_bytes: 0,
            layouts: Vec::new(),
            by_digest: HashMap::new(),
            families: HashMap::new(),
            demand: Vec::new(),
        }
    }

    pub(super) fn add_slab(&mut self, pool: PoolId, slab: Arc<Slab>) {
        let bytes = slab.geometry().slab_bytes;
        if self.slots.add_slab(pool, slab).is_some() {
            self.slab_bytes += bytes;
        }
    }

    pub(super) fn register(
        &mut self,
        namespace: NamespaceId,
        layout: Layout,
        slab_bytes: u64,
    ) -> Result<Arc<RegisteredLayout>, RegisterError> {
        let digest = layout.digest();
        if let Some(known) = self.layout(&digest) {
            return Ok(known);
        }
        if self.layouts.len() >= caps::LAYOUTS_MAX {
            return Err(RegisterError::TooMany);
        }
        let sizes = layout.groups.iter().map(|group| room::slot_bytes(group.block_bytes(layout.block_tokens)));
        let known = self.slots.pools().map(|pool| self.slots.pool_occupancy(pool).0);
        if known.chain(sizes).collect::<BTreeSet<u64>>().len() > caps::POOLS_MAX {
            return Err(RegisterError::TooManySizes);
        }
        let ordinal = self.layouts.len() as u32;
        let groups = layout.groups.iter().zip(0u16..).map(|(group, number)| {
            let name_seed = name_seed(&self.digest, &digest, number);
            self.place_group(group, name_seed, layout.block_tokens, slab_bytes)
        });
        let groups = groups.collect();
        let family = layout.family_digest();
        let registered = Arc::new(RegisteredLayout {
            namespace,
            ordinal,
            layout,
            digest,
            namespace_digest: self.digest,
            groups,
            family,
        });
        self.by_digest.insert(digest, ordinal);
        self.families.entry(family).or_default().push(ordinal);
        self.layouts.push(Arc::clone(&registered));
        self.name_seeds.0.write().push(registered.groups.iter().map(|group| group.name_seed).collect());
        Ok(registered)
    }

    fn place_group(&mut self, group: &LayerGroup, name_seed: u64, block_tokens: u32, slab_bytes: u64) -> LayoutGroup {
        let block_bytes = group.block_bytes(block_tokens);
        let stride = room::slots_per_slab(slab_bytes, block_bytes);
        let pool = self.slots.pool(room::slot_bytes(block_bytes), stride);
        LayoutGroup { group: group.clone(), block_bytes, name_seed, pool }
    }

    pub(super) fn layout(&self, digest: &[u8; 32]) -> Option<Arc<RegisteredLayout>> {
        self.layouts.get(*self.by_digest.get(digest)? as usize).cloned()
    }

    /// What events name a block.
    pub(super) fn event_name(&self, key: &SlotKey) -> Option<u64> {
        let group = self.layout_at(key.layout)?.group(u32::from(key.group))?;
        Some(key.hash.event_name(group.name_seed))
    }

    pub(super) fn layout_at(&self, ordinal: u32) -> Option<&Arc<RegisteredLayout>> {
        self.layouts.get(ordinal as usize)
    }

    /// The shards of a layout's tensor-parallel group, by number; those that nobody has registered yet are registered: what
    /// they stored in an earlier life may be on disk. `None` where there is no room for them.
    pub(super) fn siblings(
        &mut self,
        layout: &RegisteredLayout,
        slab_bytes: u64,
    ) -> Vec<Option<Arc<RegisteredLayout>>> {
        let shards = 0..layout.layout.shard.count;
        let known = self.families.get(&layout.family).map_or(0, Vec::len);
        let missing = shards.len().saturating_sub(known);
        if missing > 0 && self.layouts.len() + missing <= caps::LAYOUTS_MAX {
            for index in shards.clone() {
                let shard = Shard { index, ..layout.layout.shard };
                // They are of one size with `layout`, which is registered: there is a pool for them.
                let _ = self.register(layout.namespace, Layout { shard, ..layout.layout.clone() }, slab_bytes);
            }
        }
        let mut found = vec![None; shards.len()];
        for ordinal in self.families.get(&layout.family).into_iter().flatten() {
            if let Some(sibling) = self.layout_at(*ordinal)
                && let Some(place) = found.get_mut(sibling.layout.shard.index as usize)
            {
                *place = Some(Arc::clone(sibling));
            }
        }
        found
    }

    /// Evicts a block of `pool`, or a few, for `incoming` if it is for that, and the same blocks of their sibling shards: a group is read as far as all
    /// its shards are there, so that the others would only take up room. False where nothing may leave.
    pub(super) fn evict(&mut self, pool: PoolId, incoming: Option<(&Incoming, Claim)>) -> bool {
        self.evict_some(pool, incoming, caps::EVICT_BATCH)
    }

    /// The same, `most` blocks at most, with their siblings.
    pub(super) fn evict_some(&mut self, pool: PoolId, incoming: Option<(&Incoming, Claim)>, most: usize) -> bool {
        let mut evicted = self.slots.evict_some(pool, incoming, most);
        if evicted.is_empty() && self.slots.look_again() {
            evicted = self.slots.evict_some(pool, incoming, most);
        }
        let mut siblings = Vec::new();
        for key in evicted.iter().map(|evicted| evicted.key) {
            let family = self.layout_at(key.layout).and_then(|layout| self.families.get(&layout.family));
            if let Some(family) = family.filter(|family| family.len() > 1) {
                let others = family.iter().filter(|ordinal| **ordinal != key.layout);
                siblings.extend(others.map(|ordinal| SlotKey { layout: *ordinal, ..key }));
            }
        }
        if !siblings.is_empty() {
            self.slots.evict_keys(siblings.into_iter());
        }
        // A slot that was freed by looking again is room too.
        !evicted.is_empty() || self.slots.has_free_slot(pool)
    }

    /// The same, and whether it is for want of worth that nothing left. Somebody waits for what is promoted, and what a client stores
    /// passes through to the tiers below, if there are any; without, there is no other place for it. These find room all the same, unless
    /// they come ahead of need.
    pub(super) fn evict_for(&mut self, incoming: &Incoming, urgency: Urgency, has_below: bool) -> (bool, bool) {
        let ahead_of_need = urgency.priority == Priority::Prefetch;
        let claim = if ahead_of_need { Claim::Wanted } else { Claim::Stored };
        if self.evict(incoming.pool, Some((incoming, claim))) {
            return (true, false);
        }
        if ahead_of_need {
            self.slots.refused(incoming);
            return (false, true);
        }
        let passes = has_below || urgency.source == FlightSource::Promotion;
        let evicted = self.evict(incoming.pool, Some((incoming, Claim::Insists)).filter(|_| !passes));
        if !evicted {
            self.slots.refused(incoming);
        }
        (evicted, !evicted && !passes)
    }

    pub(super) fn note_demand(&mut self, pool: PoolId, blocks: usize, now: BootTime) {
        let (slot_bytes, _, _) = self.slots.pool_occupancy(pool);
        if self.demand.len() <= pool.0 {
            self.demand.resize(pool.0 + 1, Demand::default());
        }
        if let Some(demand) = self.demand.get_mut(pool.0) {
            demand.add(blocks as u64 * slot_bytes, now);
        }
    }

    /// True once every `every_ms` for each pool.
    pub(super) fn may_look(&mut self, pool: PoolId, now: BootTime, every_ms: u64) -> bool {
        let Some(demand) = self.demand.get_mut(pool.0).filter(|demand| now.ms_since(demand.looked) >= every_ms) else {
            return false;
        };
        demand.looked = now;
        true
    }

    pub(super) fn demand(&self, pool: PoolId, now: BootTime) -> f64 {
        self.demand.get(pool.0).map_or(0.0, |demand| demand.at(now))
    }

    /// True where somebody asked for a block of it lately: in the last few minutes.
    pub(super) fn is_asked(&self, now: BootTime) -> bool {
        self.slots.pools().any(|pool| self.demand(pool, now) > 1.0)
    }

    pub(super) fn add_to(&self, status: &mut HostStatus) {
        let counts = self.slots.counts();
        status.counts.published += counts.published;
        status.counts.evicted += counts.evicted;
        status.counts.deleted += counts.deleted;
        status.counts.aborted += counts.aborted;
        status.counts.taken_over += counts.taken_over;
        status.blocks += self.slots.len() as u64;
        status.flights += self.slots.flights() as u64;
        status.pinned_bytes += self.slots.pinned_bytes();
        for pool in self.slots.pools() {
            let (slot_bytes, slots, used) = self.slots.pool_occupancy(pool);
            let slabs = self.slots.slab_count(pool) as u64;
            let namespace = self.name.clone();
            status.pools.push(PoolStatus { namespace, slot_bytes, slots: slots as u64, used: used as u64, slabs });
        }
    }
}
