//! What deletions owe to the disks' indexes.
//!
//! A deletion whose sync failed was not answered OK, and is made up for by the next one, whichever blocks that one finds: until then
//! the tier remembers that a sync is owed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// See the head of this file.
#[derive(Default)]
pub struct Deletions {
    under_way: AtomicU64,
    /// Deletions that ended without a sync.
    unsynced: AtomicU64,
    /// As many of them as a later sync has made up for.
    made_up: AtomicU64,
}

/// A deletion under way. Dropped before it was synced, it leaves a sync owed.
pub struct Deleting {
    of: Arc<Deletions>,
    /// It found something.
    pub has_deleted: bool,
}

impl Deletions {
    /// Before the first block goes: who finds a block gone finds the deletion, too.
    pub fn begin(self: &Arc<Self>) -> Deleting {
        self.under_way.fetch_add(1, Ordering::SeqCst);
        Deleting { of: Arc::clone(self), has_deleted: false }
    }
}

impl Deleting {
    /// True where an answer needs a sync: this deletion found something, or another did and has yet to sync.
    pub fn needs_sync(&self) -> bool {
        let others = self.of.under_way.load(Ordering::SeqCst) > 1;
        let owed = self.of.unsynced.load(Ordering::SeqCst) > self.of.made_up.load(Ordering::SeqCst);
        self.has_deleted || others || owed
    }

    /// What is owed by now: see [`Self::synced`].
    pub fn owed(&self) -> u64 {
        self.of.unsynced.load(Ordering::SeqCst)
    }

    /// A sync that began after [`Self::owed`] was asked has all that was deleted.
    pub fn synced(mut self, owed: u64) {
        self.of.made_up.fetch_max(owed, Ordering::SeqCst);
        self.has_deleted = false;
    }
}

impl Drop for Deleting {
    fn drop(&mut self) {
        if self.has_deleted {
            self.of.unsynced.fetch_add(1, Ordering::SeqCst);
        }
        self.of.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first of two deletions ends without a sync, because its disk failed or its deadline passed. The second one finds nothing
    /// to delete, and must sync all the same; and so on until one does.
    #[test]
    fn a_deletion_that_was_not_synced_leaves_a_sync_owed() {
        let deletions = Arc::new(Deletions::default());
        assert!(!deletions.begin().needs_sync(), "nothing was deleted");
        let mut first = deletions.begin();
        first.has_deleted = true;
        assert!(first.needs_sync());
        assert!(deletions.begin().needs_sync(), "another has deleted, and has yet to sync");
        drop(first);
        let second = deletions.begin();
        assert!(second.needs_sync());
        deletions.made_up.fetch_max(deletions.unsynced.load(Ordering::SeqCst), Ordering::SeqCst);
        assert!(!second.needs_sync(), "a sync made up for it");
    }
}
