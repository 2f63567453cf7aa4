//! Placement: which blocks are where, which stay and which go.
//!
//! Owns layouts, slots, eviction, the Host, Nvme and Object tiers. Knows nothing of the network, of configuration
//! files, or of who asks.

pub mod admission;
pub mod below;
mod block;
pub mod caps;
pub mod changes;
pub mod claim;
mod clock;
mod distinct;
pub mod eviction;
pub mod host;
mod layout;
pub mod meter;
pub mod nvme;
pub mod object;
mod pool;
mod readable;
pub mod sampled;
pub mod simulate;
pub mod slots;
pub mod stack;
pub mod tier;

pub use block::{Block, BlockRef, Digest, OwnedRun, Run, Wanted, block_name};
pub use clock::BootTime;
/// The bucket that the Object tier stands on.
pub use kvstore_bucket as bucket;
pub use kvstore_plane::{InvalidHash, SEQUENCE_HASH_BYTES_MAX, SequenceHash, SlotKey};
pub use kvstore_transfer::{HugePages, Slab, crc32};
pub use layout::{BlockKind, DimensionOrder, InvalidLayout, LayerGroup, Layout, PartRange, Shard};
pub use pool::PoolId;
pub use readable::{GroupPresence, readable_prefix};
pub use tier::{Tier, TierSet};
