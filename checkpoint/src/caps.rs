//! Bounds, each with its reason.

/// Bytes of a chunk: large enough that a request's latency does not show, small enough that a change costs little.
pub const CHUNK_BYTES: usize = 8 << 20;
/// Chunks under way at once: with what each takes while it is encoded, 200 MiB at most.
pub const CHUNKS_AT_ONCE: usize = 8;
/// Chunks under way at once in a save that compresses nothing: 128 MiB. On a local disk most of a chunk's time is a wait for its syncs, and
/// those that wait together share them.
pub const PLAIN_CHUNKS_AT_ONCE: usize = 16;
/// Files that are restored at once. Those of compile caches are small: a file's open and fsync take longer than its bytes.
pub const FILES_AT_ONCE: usize = 8;
/// Files that a process holds open in memory: its descriptors. Models have some hundred files.
pub const MEMORY_FILES_MAX: usize = 512;
/// Commits that are read at once for a listing: each is a request of some milliseconds.
pub const COMMITS_AT_ONCE: usize = 32;
/// Milliseconds between two looks at a lock that another process holds: a restore takes seconds.
pub const LOCK_POLL_MS: u64 = 20;
/// Snapshots in a node's cache: each has a lock file, and all are looked at when room is made.
pub const CACHED_MAX: usize = 1024;
/// Chunks of a snapshot: 8 TiB of large ones. The largest checkpoints have 2 TiB, in some 100,000 tensors.
pub const CHUNKS_MAX: usize = 1 << 20;
/// Files of a snapshot: compile caches have some 10,000.
pub const FILES_MAX: usize = 1 << 16;
/// Tensors of a file: the largest checkpoints have some 100,000, in many files.
pub const TENSORS_MAX: usize = 1 << 18;
/// Dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 64;
/// Bytes of a safetensors file's header, as its library has it.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes of a rank's manifest: a million chunks, and the names of a million tensors.
pub const MANIFEST_BYTES_MAX: u64 = 256 << 20;
/// Bytes of a commit, and of a name.
pub const RECORD_BYTES_MAX: u64 = 1 << 20;
/// Ranks of a snapshot.
pub const RANKS_MAX: usize = 4096;
/// Facts of a snapshot.
pub const FACTS_MAX: usize = 256;
/// Bytes of a text in a manifest.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Snapshots that are listed, and names: each takes a request.
pub const SNAPSHOTS_MAX: usize = 10_000;
/// Chunks that a collection may mark: 32 TiB of large ones, in some 200 MiB of memory.
pub const MARKED_MAX: usize = 4 << 20;
/// A save that takes longer gives up; one that was killed holds collections up for so long.
pub const SAVE_MS_MAX: u64 = 24 * 3600 * 1000;
/// A save gives up so long before that: its last request has this much to arrive.
pub const SAVE_MARGIN_MS: u64 = 10 * 60 * 1000;
/// Milliseconds until a request has failed for good.
pub const REQUEST_MS: u64 = 120_000;
