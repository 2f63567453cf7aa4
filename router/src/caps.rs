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
/// Bytes of one message of events: a prompt of a million tokens in it, five bytes each at most.
pub const EVENT_BYTES_MAX: usize = 6 << 20;
/// Events of one message: each takes some 150 bytes here, and two there.
pub const EVENTS_PER_MESSAGE_MAX: usize = 1 << 16;
/// A prefetch that the router asks for ends after this long: by then the engine has asked itself.
pub const PREFETCH_DEADLINE_MS: u32 = 10_000;
/// Sessions of which it is known where they were: 100 bytes each.
pub const SESSIONS_MAX: usize = 100_000;
/// The least bound of an index: a few segments.
pub const INDEX_BYTES_MIN: u64 = 1 << 20;
/// Segments that are swept of holders that left with each event: they are gone after a few thousand events, and a sweep of a
/// segment costs a tenth of a millisecond.
pub const SEGMENTS_SWEPT_PER_EVENT: usize = 1;
/// Bytes of a request's body: a conversation with some pictures in it.
pub const REQUEST_BYTES_MAX: usize = 32 << 20;
/// Bytes of an answer that does not come in pieces.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Bytes of one event of an answer that does: the first may bring a whole prompt's token ids.
pub const ANSWER_EVENT_BYTES_MAX: usize = 16 << 20;
/// Workers that a request is tried at, before its first byte and after.
pub const TRIES_MAX: usize = 4;
/// Connections to a worker that wait for the next request.
pub const IDLE_CONNECTIONS_MAX: usize = 64;
/// A worker, or another replica, that does not answer within this is away.
pub const HEALTH_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);
/// How often other replicas are asked what they have under way.
pub const PEERS_EVERY: std::time::Duration = std::time::Duration::from_millis(200);
/// At its end the router waits this long for answers under way.
pub const CLOSE_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);
/// Workers at once: each has up to some holders in the index.
pub const WORKERS_MAX: usize = 2048;
/// Pictures and the like of one request that are encoded ahead.
pub const ENCODED_PARTS_MAX: usize = 64;
