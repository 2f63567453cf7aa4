//! The router's bounds, each with its reason. Those of the index are in `kvstore_index::caps`.

/// Bytes of one message of events: a prompt of a million tokens in it, five bytes each at most.
pub const EVENT_BYTES_MAX: usize = 6 << 20;
/// Events of one message: each takes some 150 bytes here, and two there.
pub const EVENTS_PER_MESSAGE_MAX: usize = 1 << 16;
/// A prefetch that the router asks for ends after this long: by then the engine has asked itself.
pub const PREFETCH_DEADLINE_MS: u32 = 10_000;
/// Pieces of prompts whose tokens are kept, for each model: some 1.3 KiB each.
pub const PIECES_KEPT_MAX: usize = 1 << 14;
/// Sessions of which it is known where they were: 100 bytes each.
pub const SESSIONS_MAX: usize = 100_000;
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
