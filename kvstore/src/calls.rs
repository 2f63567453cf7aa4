//! Calls in flight, and the end of new ones: the daemon drains before it stops. Tells the background work, too, whether there
//! is any use in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// Counts the calls in flight. Shared by `Arc`.
#[derive(Default)]
pub struct Calls {
    draining: AtomicBool,
    /// Told when the daemon begins to drain.
    drains: Notify,
    in_flight: AtomicU64,
    /// Told when no call is in flight any more.
    idle: Notify,
    /// Calls that ever came.
    came: AtomicU64,
    /// Somebody waits for the next call.
    awaited: AtomicBool,
    woken: Notify,
}

/// Keeps a call counted as in flight.
pub struct InFlight(Arc<Calls>);

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl Calls {
    /// Counts a call as in flight; `None` while draining.
    pub fn enter(self: &Arc<Self>) -> Option<InFlight> {
        // In one order with the flags, which others set before they read the counts.
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        self.came.fetch_add(1, Ordering::SeqCst);
        let guard = InFlight(Arc::clone(self));
        if self.awaited.load(Ordering::SeqCst) {
            self.wake();
        }
        (!self.is_draining()).then_some(guard)
    }

    /// Calls that came since the start, those that were refused included.
    pub fn came(&self) -> u64 {
        self.came.load(Ordering::SeqCst)
    }

    /// Calls in flight.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Waits for a call beyond the first `came`, or for [`Self::wake`], at most `time`. True where there was one.
    pub async fn next(&self, came: u64, time: Duration) -> bool {
        self.awaited.store(true, Ordering::SeqCst);
        let woken = self.came() != came || tokio::time::timeout(time, self.woken.notified()).await.is_ok();
        self.awaited.store(false, Ordering::SeqCst);
        woken
    }

    /// Ends [`Self::next`], now or when it is called next.
    pub fn wake(&self) {
        self.woken.notify_one();
    }

    /// True once new work is refused.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Resolves once new work is refused.
    pub async fn until_draining(&self) {
        let drains = self.drains.notified();
        tokio::pin!(drains);
        drains.as_mut().enable();
        if !self.is_draining() {
            drains.await;
        }
    }

    /// Refuses new work and waits up to `deadline` for what is in flight. What is left then.
    pub async fn drain(&self, deadline: Duration) -> u64 {
        if !self.draining.swap(true, Ordering::SeqCst) {
            tracing::info!("the daemon is draining: it refuses new calls");
            self.drains.notify_waiters();
        }
        let wait = async {
            loop {
                let idle = self.idle.notified();
                tokio::pin!(idle);
                idle.as_mut().enable();
                if self.in_flight() == 0 {
                    return;
                }
                idle.await;
            }
        };
        let _ = tokio::time::timeout(deadline, wait).await;
        self.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A daemon that drains waits for the calls in flight and takes no new ones; those who wait for the drain are told at once.
    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_calls_and_refuses_new_ones() {
        let calls = Arc::new(Calls::default());
        let call = calls.enter().unwrap();
        let told = tokio::spawn({
            let calls = Arc::clone(&calls);
            async move { calls.until_draining().await }
        });
        tokio::task::yield_now().await;
        assert_eq!(calls.drain(Duration::from_secs(1)).await, 1, "one is still in flight");
        told.await.unwrap();
        calls.until_draining().await;
        assert!(calls.enter().is_none());
        drop(call);
        assert_eq!((calls.drain(Duration::from_secs(1)).await, calls.in_flight()), (0, 0));
    }

    /// The background work sleeps while no calls come. A call that came just before it slept wakes it, too.
    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_next_call_misses_none() {
        let calls = Arc::new(Calls::default());
        assert!(!calls.next(0, Duration::from_secs(1)).await, "none came");
        drop(calls.enter());
        assert!(calls.next(0, Duration::from_secs(1)).await, "it came before");
        let waits = tokio::spawn({
            let calls = Arc::clone(&calls);
            async move { calls.next(1, Duration::from_secs(3600)).await }
        });
        tokio::task::yield_now().await;
        drop(calls.enter());
        assert!(waits.await.unwrap());
    }
}
