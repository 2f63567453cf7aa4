//! Eviction: which block of a pool leaves next. Decides on metadata alone; touches no bytes,
//! takes no lock, reads no clock.
//!
//! A policy knows blocks by their [`BlockIndex`] in one pool (blocks of one namespace and one slot
//! size). The slots' state machine tells it what arrives, what is read and what left, and asks for a victim.
//! What is pinned, leased or in flight is held: a held block is never named as a victim.

mod cells;
mod chains;
mod classes;
mod ghosts;
mod guard;
mod lifetimes;
mod links;
mod lru;
mod session;
mod sessions;
mod windows;

pub use lru::Lru;
pub use sessions::Sessions;

/// A block's place in its pool: dense, reused after removal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct BlockIndex(pub u32);

/// What kind of state a block holds, as far as eviction cares.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum EvictionKind {
    /// Full attention: useless without its whole prefix, so a block with children stays.
    #[default]
    Attention,
    /// Sliding window: only the last blocks of a chain matter, so no block protects another.
    SlidingWindow,
    /// Recurrent state: the newest state of a chain replaces the older ones.
    RecurrentState,
    /// Encoder output: belongs to no chain.
    EncoderOutput,
}

impl EvictionKind {
    /// How many kinds there are.
    pub const COUNT: usize = 4;

    /// True where a block is worth nothing once its parent has gone.
    pub fn needs_prefix(self) -> bool {
        matches!(self, Self::Attention)
    }

    pub(crate) fn ordinal(self) -> usize {
        match self {
            Self::Attention => 0,
            Self::SlidingWindow => 1,
            Self::RecurrentState => 2,
            Self::EncoderOutput => 3,
        }
    }
}

/// A block that becomes resident.
#[derive(Clone, Copy, Debug)]
pub struct NewBlock {
    /// Where its chain begins.
    pub origin: Origin,
    /// A well-mixed hash of its key: how a policy recognises a block that it evicted before.
    pub key_hash: u64,
    /// The kind of state it holds.
    pub kind: EvictionKind,
    /// True for the last block of its request. Engines that store partial blocks rarely read it again.
    pub tail: bool,
    /// What it may take room from.
    pub claim: Claim,
}

/// What a block that comes may take room from. Never from its own request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Claim {
    /// From what is worth less than its own session.
    #[default]
    Stored,
    /// Also from what is worth the same: somebody said that it will be read soon.
    Wanted,
    /// From anything: there is no other place for it.
    Insists,
}

/// What precedes a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Nothing: it begins a chain, or belongs to none.
    Root,
    /// This block, which is in the same pool.
    After(BlockIndex),
    /// A block that is not in the pool.
    Absent,
}

/// Where a block belongs that does not come in the order of its chain.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place<'a> {
    /// Blocks between its origin and it, which are on their way.
    pub missing: u32,
    /// Blocks behind it that came ahead of it.
    pub followers: &'a [BlockIndex],
}

/// How a block was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touch {
    /// A request read the chain that ends with it: where it needs its prefix, all of that was used.
    Hit,
    /// A request read it, and behind it this block, which was named just before.
    HitBefore(BlockIndex),
    /// A request read the blocks from `first` up to it: all of what it reads, or a part. `after` was named just before.
    HitFrom {
        /// The least deep of the part.
        first: BlockIndex,
        /// See [`Self::HitBefore`].
        after: Option<BlockIndex>,
    },
    /// A request stored it, or found it stored, as the last block of its chain: it and its ancestors are
    /// as recent as that, the root most of all, but were not read once more.
    Refresh,
}

impl Touch {
    /// What the same request read behind the block.
    fn after(self) -> Option<BlockIndex> {
        match self {
            Self::HitBefore(after) => Some(after),
            Self::HitFrom { after, .. } => after,
            Self::Hit | Self::Refresh => None,
        }
    }
}

/// Why a block leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Removal {
    /// For lack of room: worth remembering by the same hash as at [`EvictionPolicy::insert`].
    Evicted {
        /// See [`NewBlock::key_hash`].
        key_hash: u64,
    },
    /// Deleted, or its slot was withdrawn: forget it.
    Dropped,
}

/// Ancestors that one refresh walks up to, at most: a prompt of a million tokens in blocks of 256. It
/// bounds the time of one call.
const ANCESTORS_MAX: usize = 4096;

/// An eviction policy over one pool.
///
/// Callers touch the blocks of one request from its last to its first. Every method is O(1) amortised, but for a touch, which walks
/// up its chain as far as others used it last, and allocates only when the pool grows.
pub trait EvictionPolicy: Send {
    /// It is `now_ms` now: a time that never goes back.
    fn at(&mut self, now_ms: u64);
    /// `block` became resident.
    fn insert(&mut self, block: BlockIndex, new: NewBlock);
    /// `block` became resident, not in the order of its chain.
    fn insert_at(&mut self, block: BlockIndex, new: NewBlock, place: Place<'_>);
    /// `block` was used.
    fn touch(&mut self, block: BlockIndex, touch: Touch);
    /// `block` left.
    fn remove(&mut self, block: BlockIndex, removal: Removal);
    /// While held, `block` is not named by [`Self::victim`].
    fn hold(&mut self, block: BlockIndex, held: bool);
    /// The block that should leave next; `None` when all are held. Where it is for `incoming`, also `None` when whatever could leave
    /// is worth more, or of the same request. Changes nothing that a caller sees.
    fn victim(&mut self, incoming: Option<&NewBlock>) -> Option<BlockIndex>;
    /// The block that may leave with `block`, which was named as a victim: the one before it, where only `block` follows that one and
    /// nothing holds it. Where blocks leave in batches, a prefix leaves from its end, not block by block.
    fn before_victim(&self, block: BlockIndex) -> Option<BlockIndex>;
    /// A block found no room, and does not come: worth remembering.
    fn refused(&mut self, incoming: &NewBlock);
    /// The block before `block` in its prefix, where it is in the pool.
    fn parent(&self, block: BlockIndex) -> Option<BlockIndex>;
    /// The pool now has room for about `blocks` blocks.
    fn set_capacity(&mut self, blocks: usize);
}

/// The policies that a configuration can name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PolicyKind {
    /// Learns how long sessions of each class wait until they go on: see [`Sessions`].
    #[default]
    Sessions,
    /// Least recently used: see [`Lru`].
    Lru,
}

impl PolicyKind {
    /// Every policy, for suites that run over all of them.
    pub const ALL: [Self; 2] = [Self::Sessions, Self::Lru];

    /// The name in configuration and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Lru => "lru",
        }
    }

    /// A new, empty policy of this kind.
    pub fn build(self, capacity_blocks: usize) -> Box<dyn EvictionPolicy> {
        self.build_of_sample(capacity_blocks, 1, 1)
    }

    /// The same for a small model of a pool, with one block in `blocks_in` of it, of one in `sessions_in` of its sessions.
    pub fn build_of_sample(self, capacity_blocks: usize, blocks_in: u64, sessions_in: u64) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Sessions => Box::new(Sessions::of_sample(capacity_blocks, blocks_in, sessions_in)),
            Self::Lru => Box::new(Lru::new()),
        }
    }
}

impl std::str::FromStr for PolicyKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| format!("unknown eviction policy {name:?}; use \"sessions\" or \"lru\""))
    }
}

/// Grows `items` to `len`, by a sixteenth more than it has at least: amortised O(1), with a sixteenth of
/// slack at most where doubling would waste half.
fn grow<T: Clone>(items: &mut Vec<T>, len: usize, vacant: T) {
    if items.capacity() < len {
        let target = len.max(items.len() + items.len() / 16);
        items.reserve_exact(target - items.len());
    }
    items.resize(len, vacant);
}
