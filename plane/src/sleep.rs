//! Sleeping without losing a wake-up: who goes to sleep says so, fences, and looks once more; who has work for it
//! writes the work, fences, and looks whether it sleeps.

use crate::sync::{AtomicU64, Ordering, fence};

/// Sleeper: from now on the other side kicks. Look for work once more before sleeping.
pub fn fall_asleep(sleeps: &AtomicU64) {
    sleeps.store(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
}

/// Sleeper: it looks by itself again.
pub fn wake_up(sleeps: &AtomicU64) {
    sleeps.store(0, Ordering::Relaxed);
}

/// The other side, after it wrote work: true where the sleeper must be kicked.
pub fn must_kick(sleeps: &AtomicU64) -> bool {
    fence(Ordering::SeqCst);
    sleeps.load(Ordering::Relaxed) == 1
}
