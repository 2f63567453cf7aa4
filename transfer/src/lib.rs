//! Motion of bytes: slabs of memory, frames (the form in which bytes are stored), and the volumes that
//! frames are read from and written to, through lanes of different urgency.
//!
//! Knows slots, offsets and checksums. Never decides what stays or goes, and looks at no index: a frame
//! carries its block's identity as opaque fields.

mod aligned;
pub mod frame;
mod lanes;
mod shared;
mod slab;
mod slot;
mod sums;
pub mod volume;

pub use aligned::AlignedBytes;
pub use lanes::{LANES, Lane, LaneCaps, Lanes};
pub use shared::{SharedMemory, Writers};
pub use slab::{HUGE_PAGE_BYTES, HugePages, Slab, SlabError, SlabMemory};
pub use slot::{FillError, SlotBytes, SlotFill};
pub use sums::SectionSums;

/// CRC-32 (IEEE 802.3), the checksum of blocks in memory and on the wire.
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}
