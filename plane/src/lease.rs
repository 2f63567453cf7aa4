//! The lease words of one client: each names a slot that the client reads, or is 0.
//!
//! A reader writes the slot into a word of its own, fences, and only then looks whether the slot's entry is
//! readable. The daemon makes an entry unreadable, fences, and only then looks whether a word names the slot.
//! Whatever the order, one of the two sees the other: `docs/design/local-plane.md` has the proof.
//!
//! A word is used again and again. The daemon may see only its newest name, and none of the zeroes in between: so each store that
//! takes a name away, be it with 0 or with another name, is a Release, and each of the daemon's loads is an Acquire. What was read
//! under the earlier name was then read before the daemon looked.

use crate::key_table::SlotRef;
use crate::sync::{AtomicU64, Ordering, fence};

/// Set in every word that names a slot, so that slot 0 of slab 0 is not "none".
const NAMES: u64 = 1 << 63;

/// One client's words, and how many of them it uses.
#[derive(Clone, Copy)]
pub struct LeaseWords<'a> {
    /// Words from here on were never used: what the daemon need not look at.
    used: &'a AtomicU64,
    words: &'a [AtomicU64],
}

impl<'a> LeaseWords<'a> {
    /// A view of a client's memory.
    pub fn new(used: &'a AtomicU64, words: &'a [AtomicU64]) -> Self {
        Self { used, words }
    }

    /// Words there are.
    pub fn capacity(&self) -> usize {
        self.words.len()
    }

    /// Client: words below `used` may name slots from now on. Before the first of them is written.
    pub fn use_words(&self, used: usize) {
        if (self.used.load(Ordering::Relaxed) as usize) < used {
            self.used.store(used as u64, Ordering::Relaxed);
        }
    }

    /// Client: names `slot`. Worth nothing before [`announce`]. What was read under an earlier name of this word was read before.
    pub fn name(&self, word: usize, slot: SlotRef) {
        if let Some(word) = self.words.get(word) {
            word.store(NAMES | slot.to_word(), Ordering::Release);
        }
    }

    /// Client: the slot that a word of its own names.
    pub fn slot_of(&self, word: usize) -> Option<SlotRef> {
        let word = self.words.get(word)?.load(Ordering::Relaxed);
        (word & NAMES != 0).then(|| SlotRef::from_word(word))
    }

    /// Client: names nothing any more. Everything that was read under the lease was read before.
    pub fn clear(&self, word: usize) {
        if let Some(word) = self.words.get(word) {
            word.store(0, Ordering::Release);
        }
    }

    /// Daemon: every slot that is named, after the fence that follows a withdrawal.
    pub fn named(&self) -> impl Iterator<Item = SlotRef> + use<'a> {
        let used = (self.used.load(Ordering::Acquire) as usize).min(self.words.len());
        let words = self.words.iter().take(used).map(|word| word.load(Ordering::Acquire));
        words.filter(|word| word & NAMES != 0).map(SlotRef::from_word)
    }
}

/// Client: between naming slots and looking at their entries.
pub fn announce() {
    fence(Ordering::SeqCst);
}

/// Daemon: between withdrawing entries and looking who names them.
pub fn withdrawn() {
    fence(Ordering::SeqCst);
}
