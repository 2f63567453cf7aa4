//! The one thing here that safe code cannot say: that a line of memory will be needed soon.

#![allow(unsafe_code, reason = "there is no safe way to say it")]

/// Begins to load the line that `what` begins in. A hint: nothing waits for it.
#[cfg(target_arch = "x86_64")]
pub fn prefetch<T>(what: &T) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    let line = std::ptr::from_ref(what).cast::<i8>();
    // SAFETY: a prefetch reads nothing that the program sees, and faults nowhere; `what` is alive, besides.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line) }
}

/// Elsewhere nothing is begun: look-ups are slower, and as right.
#[cfg(not(target_arch = "x86_64"))]
pub fn prefetch<T>(_what: &T) {}
