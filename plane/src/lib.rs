//! The shared-memory formats that a daemon and its local clients both map.
//!
//! Owns layout and atomics: the slab header, the slot directory, the key table. Never does I/O, never
//! maps memory, never blocks. The byte-by-byte description is `docs/design/slab.md`.

mod directory;
mod header;
mod key;
mod key_table;

pub use directory::{SLOT_ENTRY_BYTES, SlotEntry, SlotRecord, SlotState};
pub use header::{HEADER_BYTES, HeaderError, SLAB_VERSION, SlabGeometry, SlabHeader};
pub use key::{InvalidHash, SEQUENCE_HASH_BYTES_MAX, SequenceHash, SlotKey};
pub use key_table::{KeyTable, SlotRef};

/// Asks the processor to load the cache line of `item`; nothing where that can't be said.
pub fn prefetch<T>(item: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of a live reference's address reads nothing and cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(item).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = item;
}
