//! Bytes of packs that are in memory to be checked or written again: a bound of bytes, and not of requests, for a frame may be as
//! large as a block.

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::bucket::Trouble;

/// Bytes are counted in these.
const UNIT_BYTES: u64 = 64 << 10;

/// So many bytes at once, or one piece that is larger than all of them. Whoever has some must not wait for more of the same.
pub(super) struct HeldBytes {
    units: Semaphore,
    units_max: u32,
}

impl HeldBytes {
    /// At most so many bytes.
    pub fn new(bytes_max: u64) -> Self {
        let units_max = (bytes_max / UNIT_BYTES).clamp(1, u64::from(u32::MAX)) as u32;
        Self { units: Semaphore::new(units_max as usize), units_max }
    }

    /// Room for `bytes`, until it is dropped. In turn: a large piece is not kept waiting by small ones.
    pub async fn room(&self, bytes: u64, deadline: Instant) -> Result<SemaphorePermit<'_>, Trouble> {
        let units = bytes.div_ceil(UNIT_BYTES).min(u64::from(self.units_max)) as u32;
        let room = tokio::time::timeout_at(deadline, self.units.acquire_many(units)).await;
        room.ok().and_then(Result::ok).ok_or_else(|| Trouble::Failed("too many packs are being checked".into()))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn bytes_are_bounded_and_a_piece_that_is_larger_than_all_comes_alone() {
        let held = HeldBytes::new(10 * UNIT_BYTES);
        let soon = Instant::now() + std::time::Duration::from_secs(60);
        let half = held.room(5 * UNIT_BYTES, soon).await.unwrap();
        let other = held.room(5 * UNIT_BYTES - 1, soon).await.unwrap();
        assert!(held.room(1, soon).now_or_never().is_none(), "full");
        drop(half);
        assert!(held.room(1000 * UNIT_BYTES, soon).now_or_never().is_none(), "not beside another");
        drop(other);
        let large = held.room(1000 * UNIT_BYTES, soon).await.unwrap();
        assert!(held.room(1, soon).now_or_never().is_none());
        drop(large);
        assert!(held.room(0, soon).now_or_never().is_some_and(|room| room.is_ok()));
        let _all = held.room(10 * UNIT_BYTES, soon).await.unwrap();
        assert!(held.room(1, Instant::now()).await.is_err(), "by the deadline");
    }
}
