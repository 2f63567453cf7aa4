//! Atomics and locks: those of the machine, or, in the package `index/shuttle`, those of the model checker.

#[cfg(not(shuttle))]
pub use parking_lot::Mutex;
#[cfg(not(shuttle))]
pub use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

#[cfg(shuttle)]
pub use shuttle::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// A lock without poisoning, as `parking_lot` has it.
#[cfg(shuttle)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

#[cfg(shuttle)]
impl<T> Mutex<T> {
    pub fn new(inner: T) -> Self {
        Self(shuttle::sync::Mutex::new(inner))
    }

    pub fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
