//! Forks: memory of the local plane is not inherited by a child, and threads and connections are the parent's. Whoever
//! keeps such things keeps the count of forks with them, and starts anew in a child.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

static FORKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// How often this process's line was forked until now: differs between a parent and its child.
pub(crate) fn forks() -> u64 {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        // SAFETY: the handler only adds to an atomic, which is safe in a child of any process.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
    FORKS.load(Ordering::Relaxed)
}
