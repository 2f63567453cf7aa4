//! Counters: plain atomics that the data path adds to. `status/` tells what each of them means, and renders them.

use std::sync::atomic::{AtomicU64, Ordering};

/// What happened since the start.
#[derive(Default)]
pub struct Traffic {
    /// Blocks stored.
    pub put_blocks: AtomicU64,
    /// Bytes stored.
    pub put_bytes: AtomicU64,
    /// Blocks that a get found.
    pub get_hits: AtomicU64,
    /// Blocks that a get did not find.
    pub get_misses: AtomicU64,
    /// Bytes that gets sent.
    pub get_bytes: AtomicU64,
    /// Look-ups.
    pub lookups: AtomicU64,
    /// Puts and gets that were answered Busy.
    pub busy: AtomicU64,
    /// Commands that came over the local plane.
    pub local_commands: AtomicU64,
    /// Blocks whose bytes did not match their checksum.
    pub quarantined: AtomicU64,
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// Reads one.
pub fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
