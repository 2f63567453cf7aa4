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

/// Entries of one log of sessions: a listing of it takes nine requests, and a session's newest record is at most 13 records away from its full
/// one. At 40 commits a second a log is full after three minutes.
pub const LOG_ENTRIES_MAX: u64 = 8192;
/// Entries that a writer may have under way. A part of the format: whoever looks for the end of a log looks so far behind a hole. Eight
/// requests of 25 ms are 320 commits a second.
pub const PIPELINED_MAX: u64 = 8;
/// Each session that goes on is named in one of so many entries in a row: as many are read for a claim, all at once. A part of the format.
pub const MENTIONED_EVERY: u64 = 16;
/// How far ahead of a log's end a writer that goes on is stopped at first: eight round trips of one with all its entries under way. Twice as far
/// each time that it was there before.
pub const SEAL_AHEAD: u64 = 64;
/// Times that a seal is tried ahead: by then it is farther ahead than a log is long.
pub const SEALS_MAX: u32 = 16;
/// Entries whose indexes are read at once.
pub const INDEXES_AT_ONCE: usize = 32;
/// Sessions that one writer may hold: an engine runs some hundred sequences, a daemon serves some engines.
pub const SESSIONS_HELD_MAX: usize = 4096;
/// Tokens of a session, its prompt included: the longest contexts are a million.
pub const TOKENS_MAX: usize = 1 << 22;
/// Blocks of a session, over all groups and ranks: a million tokens in blocks of 16, for four of each.
pub const BLOCKS_MAX: usize = 1 << 20;
/// Bytes of a block's name.
pub const BLOCK_NAME_BYTES_MAX: usize = 32;
/// Groups of layers times ranks of one session.
pub const SHARDS_MAX: usize = 4096;
/// Pieces of the KV of tokens that no block holds yet: for each shard some tokens, one at a time.
pub const PIECES_MAX: usize = 1 << 16;
/// Pieces of a record that joins what several appends added: all that the session has, and for each shard one that says what was replaced.
pub const DELTA_PIECES_MAX: usize = PIECES_MAX + SHARDS_MAX;
/// Bytes of a session's head, ids and blocks in a full record. With the largest sampler's state and as many pieces as there may be, it has at
/// most 39 MiB.
pub const SESSION_STATE_BYTES_MAX: u64 = 28 << 20;
/// Bytes of a piece: those of a chunk.
pub const PIECE_BYTES_MAX: usize = CHUNK_BYTES;
/// Bytes of what an engine keeps that nobody else reads: its own state, the state of a grammar, that of a detokeniser.
pub const OPAQUE_BYTES_MAX: usize = 64 << 10;
/// Tokens with a count for penalties: a vocabulary.
pub const PENALTIES_MAX: usize = 1 << 19;
/// Bytes of an entry: all are in memory while it is written, and a PUT of so many takes a second.
pub const ENTRY_BYTES_MAX: u64 = 64 << 20;
/// Bytes of an entry after which no more pieces of a session that was claimed go into it: its record, and steps of others, fit beside them.
pub const CLAIMED_BYTES_MAX: u64 = ENTRY_BYTES_MAX / 2;
/// Bytes of an entry's index: a row and a pointer for each of the sessions that a writer may hold, at 20 bytes each, and as much again.
pub const INDEX_BYTES_MAX: u64 = 256 << 10;
/// Bytes of an entry's end that are read for its index: some thousand rows. A longer index takes another request.
pub const INDEX_READ_BYTES: u64 = 16 << 10;
/// Bytes of one record: the ids and blocks of the longest session.
pub const SESSION_BYTES_MAX: u64 = ENTRY_BYTES_MAX;
/// Records between a session's newest and its full one: the binary digits of [`LOG_ENTRIES_MAX`], and the full one.
pub const PATH_MAX: usize = 16;
/// Times that a session may change its owner: a full log each three minutes, for a week.
pub const EPOCHS_MAX: u64 = 4096;
/// Bytes of one ownership.
pub const OWNER_BYTES_MAX: u64 = 16 << 10;
/// Requests of a claim or a listing at once.
pub const SESSION_READS_AT_ONCE: usize = 32;
/// Times that a claim begins anew because others claimed meanwhile.
pub const CLAIMS_MAX: usize = 16;
/// Objects of sessions that a listing or a collection looks through.
pub const SESSION_OBJECTS_MAX: usize = 1 << 20;
/// Objects of logs that a collection looks through: a thousand logs.
pub const LOG_OBJECTS_MAX: usize = 8 << 20;
/// A log into which nothing was written for so long, and in which no session goes on, is sealed by a collection. Too early costs its writer
/// another log, and nothing else.
pub const LOG_IDLE_MS: u64 = 24 * 3600 * 1000;
/// Steps that wait for a commit: all that a writer's sessions can have under way at once, and as many again.
pub const STEPS_WAITING_MAX: usize = 2 * SESSIONS_HELD_MAX;
/// Bytes of them: four commits.
pub const STEPS_WAITING_BYTES_MAX: u64 = 4 * ENTRY_BYTES_MAX;
