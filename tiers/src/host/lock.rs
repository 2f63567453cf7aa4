//! The lock of the tier's state. Who takes it for moments says so where it has to wait, and long work gives way to it.

use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::State;

/// How often a thread looks whether the lock is free, or is not wanted any more, before it sleeps: some microseconds, which is more
/// than one piece of long work, and a tenth of what it takes to wake a thread.
const LOOKS: u32 = 64;

/// See the head of this file.
pub(super) struct StateLock {
    state: Mutex<State>,
    /// Threads in [`Self::lock`] that found it taken. Only a hint: it orders nothing.
    waiting: AtomicU32,
}

impl StateLock {
    pub(super) fn new(state: State) -> Self {
        Self { state: Mutex::new(state), waiting: AtomicU32::new(0) }
    }

    /// For moments: a few blocks at most, or the look at a thousand keys.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        if let Some(state) = self.state.try_lock() {
            return state;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let state = self.spin().unwrap_or_else(|| self.state.lock());
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        state
    }

    fn spin(&self) -> Option<MutexGuard<'_, State>> {
        (0..LOOKS).find_map(|_| {
            std::hint::spin_loop();
            if self.state.is_locked() { None } else { self.state.try_lock() }
        })
    }

    /// For work that gives way to others as it goes: [`super::steps::Steps`].
    pub(super) fn lock_for_long(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// True where somebody waits who wants it for a moment.
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Lets go of the lock for those who wait, and takes it again. Who still spins takes it by itself; who fell asleep is handed it.
    pub(super) fn give_way(&self, state: &mut MutexGuard<'_, State>) {
        MutexGuard::unlocked_fair(state, || {
            for _ in 0..LOOKS {
                // It is there again, and nobody has to wake this thread.
                if !self.is_wanted() && !self.state.is_locked() {
                    break;
                }
                std::hint::spin_loop();
            }
        });
    }
}
