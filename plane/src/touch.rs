//! The touch ring of one client: the slots that it read, for the eviction policy. Lossy: what the daemon does not
//! take in time is overwritten, and costs nothing but recency.

use crate::key_table::SlotRef;
use crate::sync::{AtomicU64, Ordering};

/// A view of a client's touches.
#[derive(Clone, Copy)]
pub struct TouchRing<'a> {
    written: &'a AtomicU64,
    words: &'a [AtomicU64],
}

/// What [`TouchRing::take`] found.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Touches that were taken.
    pub taken: u64,
    /// Touches that were overwritten before.
    pub lost: u64,
}

impl<'a> TouchRing<'a> {
    /// A view of a client's memory.
    pub fn new(written: &'a AtomicU64, words: &'a [AtomicU64]) -> Self {
        Self { written, words }
    }

    /// Rings have as many words as a power of two.
    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.words.get(at as usize & self.words.len().wrapping_sub(1))
    }

    /// Client, one thread at a time: a request read `slots`; the leaf of its prefix first.
    pub fn push(&self, slots: impl Iterator<Item = SlotRef>) {
        let mut at = self.written.load(Ordering::Relaxed);
        for slot in slots {
            if let Some(word) = self.word(at) {
                word.store(slot.to_word(), Ordering::Relaxed);
            }
            at = at.wrapping_add(1);
        }
        self.written.store(at, Ordering::Release);
    }

    /// Daemon: hands over what was written since `seen`, in order, and moves `seen` on. Whatever the memory says,
    /// no more than the ring holds.
    pub fn take(&self, seen: &mut u64, mut each: impl FnMut(SlotRef)) -> Touched {
        let written = self.written.load(Ordering::Acquire);
        let behind = written.wrapping_sub(*seen);
        let capacity = self.words.len() as u64;
        let taken = behind.min(capacity);
        for at in 0..taken {
            let at = written.wrapping_sub(taken).wrapping_add(at);
            if let Some(word) = self.word(at) {
                each(SlotRef::from_word(word.load(Ordering::Relaxed)));
            }
        }
        *seen = written;
        // A client that counts backwards says nothing of value: no more than a ring was lost.
        Touched { taken, lost: (behind - taken).min(capacity) }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn touches_come_in_order_and_the_oldest_are_lost() {
        let (written, words) = (AtomicU64::new(u64::MAX - 1), [const { AtomicU64::new(0) }; 4]);
        let ring = TouchRing::new(&written, &words);
        let slot = |slot| SlotRef { slab: 1, slot };
        let mut seen = u64::MAX - 1;
        ring.push([slot(1), slot(2), slot(3)].into_iter());
        let mut got = Vec::new();
        assert_eq!(ring.take(&mut seen, |slot| got.push(slot.slot)), Touched { taken: 3, lost: 0 });
        assert_eq!(got, [1, 2, 3]);
        ring.push((10..17).map(slot));
        got.clear();
        assert_eq!(ring.take(&mut seen, |slot| got.push(slot.slot)), Touched { taken: 4, lost: 3 });
        assert_eq!(got, [13, 14, 15, 16]);
        written.store(0, Ordering::Relaxed);
        assert!(ring.take(&mut seen, |_| {}).taken <= 4);
    }
}
