//! The bounds of this crate, each with its reason. In models of concurrency (shuttle) tables are small: every place is watched.

/// Holders at once (a holder is one tier of one worker or node): their tags have 12 bits. A thousand workers with memory of their
/// own, and a thousand nodes with two tiers each, are three thousand.
pub const HOLDERS_MAX: usize = if cfg!(shuttle) { 64 } else { 4095 };
/// Bits of a block's place in the directory, at most: enough for 64 GiB.
pub const DIRECTORY_BITS: u32 = 24;
/// Buckets of a unit: 64 KiB, much enough that the directory is small.
pub const UNIT_BUCKETS: usize = if cfg!(shuttle) { 8 } else { 512 };
/// Units that a group begins with ...
pub const UNITS_MIN: usize = 3;
/// ... and has at most: it takes units one by one, so that it is never more than a quarter emptier than it may be full, and is split in two
/// once it has these, which takes little enough not to be noticed (some 200 us).
pub const UNITS_MAX: usize = 5;
/// Cells that are made at once.
pub const CELLS_PER_CHUNK: usize = if cfg!(shuttle) { 4 } else { 1024 };
/// Buckets that a block may lie behind its own.
pub const PROBES_MAX: usize = 16;
/// Times that a reader looks again at what changes under its eyes, before it counts as not there.
pub const READ_TRIES: usize = 8;
/// The least bound of an index: a few units.
pub const INDEX_BYTES_MIN: u64 = 1 << 20;
/// Units that are swept of holders that left with each event: they are gone after a few thousand events, and a sweep of a unit costs
/// some 20 us.
pub const UNITS_SWEPT_PER_EVENT: usize = 1;
