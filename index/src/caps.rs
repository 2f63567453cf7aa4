//! The bounds of this crate, each with its reason. In models of concurrency (shuttle) tables are small: every place is watched.

/// Holders at once (a holder is one tier of one worker or node): their tags have 12 bits. A thousand workers with memory of their
/// own, and a thousand nodes with two tiers each, are three thousand.
pub const HOLDERS_MAX: usize = if cfg!(shuttle) { 64 } else { 4095 };
/// Bits of a block's place in the directory of segments: at 128 KiB each, 32 GiB of them.
pub const DIRECTORY_BITS: u32 = 18;
/// Buckets of a segment: 128 KiB, little enough to split without being noticed (some 100 us), much enough that the directory is small.
pub const SEGMENT_BUCKETS: usize = if cfg!(shuttle) { 32 } else { 1024 };
/// Cells that are made at once.
pub const CELLS_PER_CHUNK: usize = if cfg!(shuttle) { 4 } else { 1024 };
/// Buckets that a block may lie behind its own.
pub const PROBES_MAX: usize = 16;
/// Times that a reader looks again at what changes under its eyes, before it counts as not there.
pub const READ_TRIES: usize = 8;
/// The least bound of an index: a few segments.
pub const INDEX_BYTES_MIN: u64 = 1 << 20;
/// Segments that are swept of holders that left with each event: they are gone after a few thousand events, and a sweep of a
/// segment costs a tenth of a millisecond.
pub const SEGMENTS_SWEPT_PER_EVENT: usize = 1;
