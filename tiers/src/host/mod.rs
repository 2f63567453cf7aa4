//! The Host tier: blocks in pinned memory of this node, for all namespaces, within one bound of bytes.
//!
//! Owns the slabs, the lock around the residencies, and the decision which pool of slots gets memory.
//! Copies happen outside the lock; a slab is made outside it too. Never waits for anything: a caller that
//! needs a slab is told so, and makes it where blocking is allowed.

mod attached;
mod demote;
mod fill;
mod holds;
mod lease;
mod lock;
mod namespace;
mod ready;
mod room;
mod steps;
mod unused;
mod write_back;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use kvstore_plane::{SequenceHash, SlotKey};
use kvstore_transfer::{HugePages, Slab, SlabError};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::caps;
use crate::changes::ChangeLog;
use crate::clock::BootTime;
use crate::eviction::PolicyKind;
use crate::layout::{InvalidLayout, Layout};
use crate::pool::PoolId;
use crate::slots::{Delete, Presence, SlotCounts};

pub use attached::{AttachError, Attached, ReadersView, StagingMemory};
pub use demote::DemotingBlock;
pub use fill::{BeginFill, BlockFill, FillRequest, FilledBlock, TransferFill, section_bytes};
pub use holds::{Held, HoldError, HoldId, HoldKind};
pub use lease::{LeasedBlock, Leasing};
pub use namespace::{LayoutGroup, NamespaceId, NamespaceLimits, RegisteredLayout, namespace_digest};
pub use room::SlabPlan;
pub use write_back::LeavingBlock;

use holds::Holds;
use lock::StateLock;
use namespace::Namespace;
use ready::Ready;
use steps::Steps;

/// How large the Host tier is and how it behaves; all but the policy may change while it runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostLimits {
    /// Bytes of all slabs at most.
    pub bytes: u64,
    /// Above this part of a full pool's slots in use (percent), blocks are evicted in the background ...
    pub high_watermark_percent: u32,
    /// ... down to this part.
    pub low_watermark_percent: u32,
}

/// What the tier is made with.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Sizes that may change later.
    pub limits: HostLimits,
    /// Whether slabs ask for huge pages.
    pub huge_pages: HugePages,
    /// Which block goes first.
    pub policy: PolicyKind,
    /// Secret of the key tables: random, so that no client can aim at one bucket.
    pub seed: u64,
    /// Grows with every start.
    pub epoch: u64,
    /// The most that `limits.bytes` may ever become: for what is sized once.
    pub bytes_ceiling: u64,
}

/// Why a layout was not registered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RegisterError {
    /// A field is wrong.
    #[error("invalid layout: {0}")]
    Invalid(#[from] InvalidLayout),
    /// A block would not fit.
    #[error("a block of {block_bytes} bytes does not fit the Host tier of {host_bytes} bytes; raise host.bytes")]
    TooLarge {
        /// Bytes of a block.
        block_bytes: u64,
        /// The tier's bound.
        host_bytes: u64,
    },
    /// The namespace has as many layouts as it may.
    #[error("the namespace already has {} layouts, which is the most it may have", caps::LAYOUTS_MAX)]
    TooMany,
    /// The namespace has blocks of as many sizes as it may.
    #[error("the namespace already has blocks of {} sizes, which is the most it may have", caps::POOLS_MAX)]
    TooManySizes,
}

/// The tier's state at one moment.
#[derive(Clone, Debug, Default)]
pub struct HostStatus {
    /// The bound.
    pub bytes_max: u64,
    /// Bytes of slabs, those included that only a reader keeps, and those that are being made.
    pub bytes_mapped: u64,
    /// Bytes that were made ready for slabs to come. With those above, they are within the bound.
    pub bytes_ready: u64,
    /// Each pool.
    pub pools: Vec<PoolStatus>,
    /// Sums over all namespaces.
    pub counts: SlotCounts,
    /// Blocks that are readable or on their way.
    pub blocks: u64,
    /// Fills under way.
    pub flights: u64,
    /// Bytes of pinned blocks.
    pub pinned_bytes: u64,
    /// Slabs that moved from one pool to another.
    pub slabs_moved: u64,
}

/// One pool at one moment.
#[derive(Clone, Debug, Default)]
pub struct PoolStatus {
    /// Whose.
    pub namespace: String,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Slots.
    pub slots: u64,
    /// Slots in use.
    pub used: u64,
    /// Slabs.
    pub slabs: u64,
}

/// See the head of this file. Shared by `Arc`.
pub struct HostTier {
    state: StateLock,
    /// Bytes of all slabs that are mapped, readers' included, or planned.
    mapped: Arc<AtomicU64>,
    /// The part of it that is staging memory of clients.
    staging: Arc<AtomicU64>,
    /// Memory that no slab uses yet.
    ready: Ready,
    /// Called when slabs came or left.
    slab_watchers: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
    /// Slabs made so far.
    slab_serial: AtomicU32,
    /// Blocks that clients said they read.
    local_reads: AtomicU64,
    /// Blocks are to be offered to the tiers below.
    leaving: Notify,
    /// When unused blocks were swept last.
    swept: AtomicU64,
    /// There are tiers below.
    has_below: AtomicBool,
    huge_pages: HugePages,
    epoch: u64,
    changes: Arc<ChangeLog>,
}

struct State {
    limits: HostLimits,
    /// Bytes of a full slab: fixed at the start, so that a pool's slots can be numbered.
    slab_bytes: u64,
    namespaces: Vec<Namespace>,
    /// The pools for which slabs are being made.
    making: Vec<(NamespaceId, PoolId)>,
    slabs_moved: u64,
    /// Slabs that left and that somebody still has mapped.
    retired: Vec<Weak<Slab>>,
    /// When a pool took a slab from another last.
    taken: BootTime,
    /// A pool is taking one: it takes some steps.
    taking: bool,
}

impl State {
    /// Bytes of slabs that left and will be free once their last reader unmaps them.
    fn retiring_bytes(&mut self) -> u64 {
        self.retired.retain(|slab| slab.strong_count() > 0);
        self.retired.iter().filter_map(Weak::upgrade).map(|slab| slab.geometry().slab_bytes).sum()
    }

    fn namespace(&self, id: NamespaceId) -> Option<&Namespace> {
        self.namespaces.get(id.0)
    }

    fn namespace_mut(&mut self, id: NamespaceId) -> Option<&mut Namespace> {
        self.namespaces.get_mut(id.0)
    }

    /// The slab of `plan` is made, or will not be.
    fn end_plan(&mut self, plan: &SlabPlan) {
        if let Some(at) = self.making.iter().position(|pool| *pool == (plan.namespace, plan.pool)) {
            self.making.swap_remove(at);
        }
    }
}

impl HostTier {
    /// A tier without slabs; they come with the first blocks.
    pub fn new(options: HostOptions, namespaces: &[String]) -> Arc<Self> {
        let changes = Arc::new(ChangeLog::new(xxh3_64_with_seed(&options.epoch.to_le_bytes(), options.seed)));
        let namespaces = namespaces
            .iter()
            .take(caps::NAMESPACES_MAX)
            .zip(0u64..)
            .map(|(name, at)| {
                let seed = options.seed.wrapping_add(at);
                Namespace::new(name, seed, options.policy, options.bytes_ceiling, Arc::clone(&changes))
            })
            .collect();
        Arc::new(Self {
            state: StateLock::new(State {
                limits: options.limits,
                slab_bytes: room::slab_bytes_of(options.limits.bytes),
                namespaces,
                making: Vec::new(),
                slabs_moved: 0,
                retired: Vec::new(),
                taken: BootTime::default(),
                taking: false,
            }),
            mapped: Arc::new(AtomicU64::new(0)),
            ready: Ready::new(options.limits.bytes, room::memory_bytes_of(room::slab_bytes_of(options.limits.bytes))),
            staging: Arc::new(AtomicU64::new(0)),
            slab_watchers: Mutex::new(Vec::new()),
            slab_serial: AtomicU32::new(0),
            local_reads: AtomicU64::new(0),
            leaving: Notify::new(),
            swept: AtomicU64::new(0),
            has_below: AtomicBool::new(false),
            huge_pages: options.huge_pages,
            epoch: options.epoch,
            changes,
        })
    }

    /// What became readable in a tier of this node, or left it.
    pub fn changes(&self) -> &Arc<ChangeLog> {
        &self.changes
    }

    /// Registers a layout; registering it again gives the same.
    pub fn register_layout(
        &self,
        namespace: NamespaceId,
        layout: Layout,
    ) -> Result<Arc<RegisteredLayout>, RegisterError> {
        layout.validate()?;
        let mut state = self.state.lock();
        let (host_bytes, slab_bytes) = (state.limits.bytes, state.slab_bytes);
        let largest = layout.groups.iter().map(|group| group.block_bytes(layout.block_tokens)).max().unwrap_or(0);
        if room::slab_geometry(slab_bytes, largest, host_bytes).is_none() {
            return Err(RegisterError::TooLarge { block_bytes: largest, host_bytes });
        }
        let Some(namespace_state) = state.namespace_mut(namespace) else { return Err(RegisterError::TooMany) };
        namespace_state.register(namespace, layout, slab_bytes)
    }

    /// The layout with this digest.
    pub fn layout(&self, namespace: NamespaceId, digest: &[u8; 32]) -> Option<Arc<RegisteredLayout>> {
        self.state.lock().namespace(namespace)?.layout(digest)
    }

    /// The layouts of all shards of the tensor-parallel group that `layout` belongs to, by shard; registered, where they
    /// were not. `None` where the namespace has no room for more layouts.
    pub fn siblings(&self, layout: &RegisteredLayout) -> Vec<Option<Arc<RegisteredLayout>>> {
        let mut state = self.state.lock();
        let slab_bytes = state.slab_bytes;
        let namespace = state.namespace_mut(layout.namespace);
        namespace.map(|namespace| namespace.siblings(layout, slab_bytes)).unwrap_or_default()
    }

    /// The presence of each block of a prefix.
    pub fn presence(&self, layout: &RegisteredLayout, group: u16, hashes: &[SequenceHash]) -> Vec<Presence> {
        let mut out = Vec::with_capacity(hashes.len());
        for run in hashes.chunks(caps::KEYS_PER_LOCK) {
            let state = self.state.lock();
            if let Some(namespace) = state.namespace(layout.namespace) {
                namespace.slots.presence_of_run(layout.ordinal, group, run, &mut out);
            }
        }
        out
    }

    /// Deletes blocks; what became of each.
    pub fn delete(&self, layout: &RegisteredLayout, group: u16, hashes: &[SequenceHash]) -> Vec<Delete> {
        let mut outcomes = Vec::with_capacity(hashes.len());
        let mut steps = Steps::begin(self);
        for hash in hashes {
            let Some(namespace) = steps.next().namespace_mut(layout.namespace) else { break };
            outcomes.push(namespace.slots.delete(&Self::key(layout, group, *hash)));
        }
        outcomes
    }

    /// True where a block is readable here.
    pub fn is_resident(&self, namespace: NamespaceId, key: &SlotKey) -> bool {
        let state = self.state.lock();
        state.namespace(namespace).is_some_and(|at| at.slots.presence(key) == Presence::Resident)
    }

    /// Which of these blocks a pin or a ticket holds here.
    pub fn held(&self, layout: &RegisteredLayout, group: u16, hashes: &[SequenceHash]) -> Vec<bool> {
        let mut held = Vec::with_capacity(hashes.len());
        let mut steps = Steps::begin(self);
        for hash in hashes {
            let Some(namespace) = steps.next().namespace_mut(layout.namespace) else { break };
            held.push(namespace.slots.is_held(&Self::key(layout, group, *hash)));
        }
        held
    }

    /// Drops a block that turned out damaged, pinned or not.
    pub fn drop_key(&self, namespace: NamespaceId, key: &SlotKey) {
        if let Some(namespace) = self.state.lock().namespace_mut(namespace) {
            namespace.slots.quarantine(key);
        }
    }

    /// A request stored a chain that ends with `last`: all of it is as recent.
    pub fn refresh_chain(&self, layout: &RegisteredLayout, group: u16, last: SequenceHash) {
        if let Some(namespace) = self.state.lock().namespace_mut(layout.namespace) {
            namespace.slots.refresh(&Self::key(layout, group, last));
        }
    }

    /// Makes the slab that a [`SlabPlan`] stands for. Blocks for milliseconds, where no memory of its size was ready for it.
    pub fn make_slab(&self, mut plan: SlabPlan) -> Result<(), SlabError> {
        plan.surplus.clear();
        let header = plan.header(self.epoch, self.slab_serial.fetch_add(1, Ordering::Relaxed));
        let ready = plan.memory.take().map(|memory| Slab::new(memory, header));
        let made = match ready {
            Some(Ok(slab)) => Ok(slab),
            // Memory of hugetlbfs cannot be cut to a size that is no multiple of its pages.
            Some(Err(_)) => {
                self.mapped.fetch_add(plan.bytes(), Ordering::AcqRel);
                Slab::create(header, self.huge_pages, Arc::clone(&self.mapped))
            }
            None => Slab::create(header, self.huge_pages, Arc::clone(&self.mapped)),
        };
        let mut state = self.state.lock();
        state.end_plan(&plan);
        let slab = Arc::new(made?);
        if let Some(namespace) = state.namespace_mut(plan.namespace) {
            namespace.add_slab(plan.pool, slab);
        }
        drop(state);
        self.slabs_changed();
        Ok(())
    }

    /// Gives up a plan: nobody will make its slab.
    pub fn drop_plan(&self, mut plan: SlabPlan) {
        let mut state = self.state.lock();
        match plan.memory.take() {
            Some(memory) => self.ready.put_back([memory]),
            None => drop(self.mapped.fetch_sub(plan.bytes(), Ordering::SeqCst)),
        }
        self.ready.put_back(plan.surplus.drain(..));
        state.end_plan(&plan);
        drop(state);
    }

    /// What may change while it runs.
    pub fn limits(&self) -> HostLimits {
        self.state.lock().limits
    }

    /// Changes it. A smaller bound is reached by [`Self::tick`], as leases end.
    pub fn set_limits(&self, limits: HostLimits) {
        self.state.lock().limits = limits;
        self.ready.set_limit(limits.bytes);
    }

    /// There is a tier below: what finds no room that it is worth passes through memory all the same.
    pub fn set_has_below(&self) {
        self.has_below.store(true, Ordering::Relaxed);
    }

    /// What each namespace may have, in the order of their numbers. A smaller bound is reached by [`Self::tick`], as leases end.
    pub fn set_namespace_limits(&self, limits: impl Iterator<Item = NamespaceLimits>) {
        let mut state = self.state.lock();
        for (namespace, limits) in state.namespaces.iter_mut().zip(limits) {
            namespace.limits = limits;
            namespace.slots.set_writes_back(limits.writes_back);
        }
    }

    /// Background work: ends holds that expired, evicts above the high watermark, gives back slabs above
    /// the bound. Call it a few times a second.
    pub fn tick(&self, now: BootTime) {
        self.take_touches(now);
        self.expire_holds(now);
        let count = self.state.lock().namespaces.len();
        (0..count).for_each(|at| self.look_again(NamespaceId(at)));
        let mut retired = self.shrink();
        retired.extend(self.shrink_namespaces());
        self.evict_to_watermark();
        if self.state.lock().namespaces.iter().any(|namespace| namespace.slots.has_leaving()) {
            self.leaving.notify_one();
        }
        self.sweep_unused(now);
        if !retired.is_empty() {
            self.slabs_changed();
        }
        // Unmapping a slab takes a while: not under the lock.
        drop(retired);
        self.look_at_ready();
    }

    /// Every slab there is now: for verification, slab by slab.
    pub fn slabs(&self) -> Vec<(NamespaceId, u32)> {
        let count = self.state.lock().namespaces.len();
        let mut slabs = Vec::new();
        for at in 0..count {
            let state = self.state.lock();
            let Some(namespace) = state.namespaces.get(at) else { break };
            let numbers = namespace.slots.pools().flat_map(|pool| namespace.slots.slab_numbers(pool));
            slabs.extend(numbers.map(|slab| (NamespaceId(at), slab)));
        }
        slabs
    }

    /// Keys of the readable blocks of a slab.
    pub fn keys_of_slab(&self, namespace: NamespaceId, slab: u32) -> Vec<SlotKey> {
        let mut keys = Vec::new();
        self.each_lock_of_slab(namespace, |at, slots| at.slots.keys_in(slab, slots, &mut keys));
        keys
    }

    /// Looks at the slots of a slab, a lock's worth at a time, as long as `look` says that there are more.
    fn each_lock_of_slab(&self, namespace: NamespaceId, mut look: impl FnMut(&Namespace, Range<u32>) -> bool) {
        let step = caps::KEYS_PER_LOCK as u32;
        for from in (0..).step_by(caps::KEYS_PER_LOCK) {
            let state = self.state.lock();
            let more = state.namespace(namespace).is_some_and(|at| look(at, from..from + step));
            MutexGuard::unlock_fair(state);
            if !more {
                break;
            }
        }
    }

    /// Names for events of the readable blocks of a slab.
    pub fn names_of_slab(&self, namespace: NamespaceId, slab: u32, out: &mut Vec<u64>) {
        let mut keys = Vec::new();
        self.each_lock_of_slab(namespace, |at, slots| {
            keys.clear();
            let more = at.slots.keys_in(slab, slots, &mut keys);
            out.extend(keys.iter().filter_map(|key| at.event_name(key)));
            more
        });
    }

    /// The layouts of a namespace that were registered, from number `from` on.
    pub fn layouts(&self, namespace: NamespaceId, from: u32) -> Vec<Arc<RegisteredLayout>> {
        let state = self.state.lock();
        let layouts = (from..).map_while(|ordinal| state.namespace(namespace)?.layout_at(ordinal).cloned());
        layouts.collect()
    }

    /// The tier at this moment.
    pub fn status(&self) -> HostStatus {
        let state = self.state.lock();
        let mut status = HostStatus {
            bytes_max: state.limits.bytes,
            bytes_mapped: self.mapped.load(Ordering::Acquire),
            bytes_ready: self.ready.bytes(),
            slabs_moved: state.slabs_moved,
            ..HostStatus::default()
        };
        let count = state.namespaces.len();
        drop(state);
        for at in 0..count {
            if let Some(namespace) = self.state.lock().namespaces.get(at) {
                namespace.add_to(&mut status);
            }
        }
        status
    }

    fn key(layout: &RegisteredLayout, group: u16, hash: SequenceHash) -> SlotKey {
        SlotKey { layout: layout.ordinal, group, hash }
    }
}
