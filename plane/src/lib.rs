//! The shared-memory formats that a daemon and its local clients both map.
//!
//! Owns layout and atomics: the slab header, the slot directory, the key table, lease words, touches, rings, and the
//! messages in them. Never does I/O, never maps memory, never blocks. The byte-by-byte descriptions are
//! `docs/design/slab.md` and `docs/design/local-plane.md`.

mod attachment;
mod bytes;
pub mod caps;
mod commands;
mod directory;
mod event_name;
mod header;
mod key;
mod key_table;
mod lease;
mod ring;
mod sleep;
mod stream;
mod sync;
mod touch;
mod usable;

/// The local plane's socket of a namespace is its gRPC socket's path and this.
pub const SOCKET_SUFFIX: &str = ".plane";

pub use attachment::{
    AttachmentView, BadDatagram, CLIENT_PAGE_BYTES, DAEMON_PAGE_BYTES, FromClient, FromDaemon, PLANE_VERSION, Welcome,
    capabilities,
};
pub use commands::{BadCommand, Command, Completion, StageBlock, verbs};
pub use directory::{SLOT_ENTRY_BYTES, SlotEntry, SlotRecord, SlotState};
pub use event_name::{event_name, name_seed};
pub use header::{HEADER_BYTES, HUGE_PAGES_FROM_BYTES, HeaderError, SLAB_VERSION, SlabGeometry, SlabHeader};
pub use key::{InvalidHash, NO_HASH, SEQUENCE_HASH_BYTES_MAX, SequenceHash, SlotKey};
pub use key_table::{HeapTable, KeyTable, PROBE_BUCKETS_MAX, SlotRef, TableFull, TableMemory, TableView};
pub use lease::{LeaseWords, announce, withdrawn};
pub use ring::{Corrupt, Push, RecordHead, RingReader, RingView, RingWriter};
pub use sleep::{fall_asleep, must_kick, wake_up};
pub use stream::stream_copy;
pub use touch::{TouchRing, Touched};
pub use usable::{GroupRun, usable_prefix, window_blocks};

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
