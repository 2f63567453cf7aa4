//! Motion of bytes: slabs of memory, and frames, the form in which bytes are stored.
//!
//! Knows slots, offsets and checksums. Never decides what stays or goes, and looks at no index: a frame
//! carries its block's identity as opaque fields.

pub mod frame;
mod slab;
mod slot;

pub use slab::{HugePages, Slab, SlabError};
pub use slot::{FillError, SlotBytes, SlotFill};

/// CRC-32 (IEEE 802.3), the checksum of blocks in memory and on the wire.
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}
