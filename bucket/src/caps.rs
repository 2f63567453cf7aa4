//! Bounds of requests to an object store, each with its reason.

/// Bytes of a file that are read at once, where the store is a local path: few enough to stay in a core's cache until they are
/// copied, and many for one call to another thread.
pub const OBJECT_FILE_STEP_BYTES: u64 = 512 << 10;
/// A failed request is made again after this long, with jitter, then after twice as long each time ...
pub const OBJECT_BACKOFF_MS: u64 = 50;
/// ... up to this.
pub const OBJECT_BACKOFF_MS_MAX: u64 = 2_000;
/// Times that one request is made at most.
pub const OBJECT_TRIES_MAX: u32 = 6;
/// Retries, in all, for each request that succeeds, in percent: a store in trouble is not given more work than usual.
pub const OBJECT_RETRY_PERCENT: u64 = 20;
/// ... and this many saved up.
pub const OBJECT_RETRIES_SAVED: u64 = 100;
/// Requests that fail in a row before the store counts as away ...
pub const OBJECT_FAILURES_IN_A_ROW_MAX: u32 = 8;
/// ... and is left alone, but for one request each time this is over.
pub const OBJECT_AWAY_MS: u64 = 1_000;
/// Bytes of the larger body with which a store is asked whether it checks uploads: those of a pack or a chunk, so that what it does to a body
/// of many packets shows.
pub const PROBE_BYTES: u64 = 8 << 20;
