//! Eviction: which block of a pool leaves next. Decides on metadata alone; touches no bytes,
//! takes no lock, reads no clock.
//!
//! A policy knows blocks by their [`BlockIndex`] in one pool (blocks of one namespace and one slot
//! size). The slots' state machine tells it what arrives, what is read and what left, and asks for a victim.
//! What is pinned, leased or in flight is held: a held block is never named as a victim.

mod ghosts;
mod hazard;
mod lifetimes;
mod links;
mod lru;

pub use hazard::Hazard;
pub use lru::Lru;

/// A block's place in its pool: dense, reused after removal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
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
    /// Its parent, where that is resident in the same pool.
    pub parent: Option<BlockIndex>,
    /// A well-mixed hash of its key: how a policy recognises a block that it evicted before.
    pub key_hash: u64,
    /// The kind of state it holds.
    pub kind: EvictionKind,
    /// True for the last block of its request. Engines that store partial blocks rarely read it again.
    pub tail: bool,
}

/// How a block was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touch {
    /// A request read it.
    Hit,
    /// A request stored it, or found it stored, as the last block of its chain: it and its ancestors are
    /// as recent as that, the root most of all, but were not read once more.
    Refresh,
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
/// Callers touch the blocks of one request from its last to its first, so that the root is the most
/// recent. Every method is O(1) amortised, but for a refresh, which walks up its chain, and allocates only
/// when the pool grows.
pub trait EvictionPolicy: Send {
    /// `block` became resident.
    fn insert(&mut self, block: BlockIndex, new: NewBlock);
    /// `block` was used.
    fn touch(&mut self, block: BlockIndex, touch: Touch);
    /// `block` left.
    fn remove(&mut self, block: BlockIndex, removal: Removal);
    /// While held, `block` is not named by [`Self::victim`].
    fn hold(&mut self, block: BlockIndex, held: bool);
    /// The block that should leave next; `None` when all are held. Changes nothing that a caller sees.
    fn victim(&mut self) -> Option<BlockIndex>;
    /// The block before `block` in its prefix, where it is in the pool.
    fn parent(&self, block: BlockIndex) -> Option<BlockIndex>;
    /// True where `block` is worth more to keep than the block with this hash of its key would be, were it there since just now.
    fn outranks(&self, block: BlockIndex, key_hash: u64, kind: EvictionKind) -> bool;
    /// The pool now has room for about `blocks` blocks.
    fn set_capacity(&mut self, blocks: usize);
}

/// The policies that a configuration can name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PolicyKind {
    /// Learns how long blocks of each class wait to be read again: see [`Hazard`].
    #[default]
    Hazard,
    /// Least recently used: see [`Lru`].
    Lru,
}

impl PolicyKind {
    /// Every policy, for suites that run over all of them.
    pub const ALL: [Self; 2] = [Self::Hazard, Self::Lru];

    /// The name in configuration and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hazard => "hazard",
            Self::Lru => "lru",
        }
    }

    /// A new, empty policy of this kind.
    pub fn build(self, capacity_blocks: usize) -> Box<dyn EvictionPolicy> {
        self.build_of_sample(capacity_blocks, 1)
    }

    /// The same for a small model of a pool, with one block in `one_in` of it.
    pub fn build_of_sample(self, capacity_blocks: usize, one_in: u64) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Hazard => Box::new(Hazard::of_sample(capacity_blocks, one_in)),
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
            .ok_or_else(|| format!("unknown eviction policy {name:?}; use \"hazard\" or \"lru\""))
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
