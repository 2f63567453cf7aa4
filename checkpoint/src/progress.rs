//! How far a save, a restore or a check is: read while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts, in bytes of files unless said.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes in all.
    pub total: AtomicU64,
    /// Of those, done.
    pub done: AtomicU64,
    /// Of those, found to be there already.
    pub found: AtomicU64,
    /// Bytes that went to the store, or came from it.
    pub moved: AtomicU64,
}

impl Progress {
    pub(crate) fn add(counter: &AtomicU64, bytes: u64) {
        counter.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A counter.
    pub fn read(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}
