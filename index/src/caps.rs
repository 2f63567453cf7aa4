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
/// Lines of a unit of a map: 64 KiB.
pub const MAP_UNIT_LINES: usize = if cfg!(shuttle) { 8 } else { 1024 };
/// Bits of a hash that a unit of a map may have more than all units need, as some have become two more often than others.
pub const MAP_DEPTH_SPREAD: u32 = 4;
/// Bits of the number of a chunk: its blocks have four more.
pub const NUMBER_BITS: u32 = 28;
/// An index with such a bound takes memory in huge pages; a smaller one would leave much of them empty ...
pub const HUGE_SLABS_FROM_BYTES: u64 = 64 << 20;
/// ... and takes it in slabs of this size.
pub const SLAB_BYTES_MIN: u64 = 64 << 10;
/// Names of an event that are on their way from memory side by side: as many as a core has under way at once.
pub const AHEAD: usize = 16;
/// Different hashes of the same blocks that are compared one after the other, before the map is asked.
pub const HASHES_COMPARED: usize = 4;
/// Runs that are swept of holders that left with each event.
pub const RUNS_SWEPT: u32 = if cfg!(shuttle) { 4 } else { 64 };
/// Blocks that a run gives up at once at the bound: some 10 us.
pub const GIVEN_UP: u32 = 256;
/// Runs that the hand passes in search of one that nobody looks up.
pub const RUNS_PASSED: u32 = 4096;
/// Lines that a word may lie behind its own: full ones come in clumps, some twenty of a thousand.
pub const MAP_PROBES_MAX: usize = if cfg!(shuttle) { 7 } else { 64 };
