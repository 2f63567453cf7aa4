//! Numbers that nobody can guess.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_tiers::host::HoldId;

/// A name that another client cannot guess.
pub fn random_hold_id() -> HoldId {
    HoldId(random_u128())
}

/// SipHash under a key from the system's random source, of a counter: distinct, and not to be guessed.
pub fn random_u128() -> u128 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    u128::from(KEY.hash_one((count, 0u8))) << 64 | u128::from(KEY.hash_one((count, 1u8)))
}
