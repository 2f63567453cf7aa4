//! What the index has yet to take: deletions, pins, and what else must hold after a crash. Pure.
//!
//! Noted under the volume's lock, together with the change in memory, and kept until a batch that has it was written: a failed
//! write loses nothing, however long the index takes none. Each thing is owed once, so that all of it is bounded by what is
//! on the volume, and by the bounds on pins.

use std::collections::{HashMap, HashSet};

use super::batch::IndexBatch;
use crate::block::Digest;

/// A pin's record that is to be written, or `None` where it is to go.
struct PinOwed {
    record: Option<Vec<u8>>,
    /// A batch with this pin was begun: the index may have it.
    tried: bool,
}

#[derive(Default)]
struct Debts {
    deleted: HashSet<Digest>,
    buried: HashSet<Digest>,
    unburied: Vec<Digest>,
    pins: HashMap<u128, PinOwed>,
    suspects: HashSet<u32>,
    given_back: HashSet<u32>,
}

impl Debts {
    fn is_empty(&self) -> bool {
        self.deleted.is_empty()
            && self.buried.is_empty()
            && self.unburied.is_empty()
            && self.pins.is_empty()
            && self.suspects.is_empty()
            && self.given_back.is_empty()
    }
}

/// See the head of this file.
#[derive(Default)]
pub(super) struct Owed {
    /// Of no batch yet.
    next: Debts,
    /// Of the batch that is being written.
    writing: Debts,
    /// The index took it, and its log was not synced yet: a sync that fails may have lost it.
    unsynced: Debts,
}

impl Owed {
    /// A block is gone from the map.
    pub fn delete(&mut self, digest: Digest) {
        self.next.deleted.insert(digest);
    }

    /// True where the index may still have a block that was deleted.
    pub fn is_deleted(&self, digest: Digest) -> bool {
        [&self.next, &self.writing, &self.unsynced].iter().any(|debts| debts.deleted.contains(&digest))
    }

    /// A scan must not find this block.
    pub fn bury(&mut self, digest: Digest) {
        self.next.buried.insert(digest);
    }

    /// No scan will come across these blocks any more.
    pub fn unbury(&mut self, digests: impl IntoIterator<Item = Digest>) {
        self.next.unburied.extend(digests);
        self.next.buried.clear();
    }

    /// A pin began.
    pub fn pin(&mut self, id: u128, record: Vec<u8>) {
        let tried = self.is_tried(id);
        self.next.pins.insert(id, PinOwed { record: Some(record), tried });
    }

    /// A pin ended.
    pub fn unpin(&mut self, id: u128) {
        let tried = self.is_tried(id);
        // One that the index never heard of leaves nothing behind.
        let unheard = !tried && self.next.pins.get(&id).is_some_and(|owed| owed.record.is_some());
        if unheard {
            self.next.pins.remove(&id);
        } else {
            self.next.pins.insert(id, PinOwed { record: None, tried });
        }
    }

    fn is_tried(&self, id: u128) -> bool {
        let taken = self.writing.pins.contains_key(&id) || self.unsynced.pins.contains_key(&id);
        taken || self.next.pins.get(&id).is_some_and(|owed| owed.tried)
    }

    /// What a segment holds cannot be made safe from a loss of power any more.
    pub fn suspect(&mut self, segment: u32) {
        self.next.suspects.insert(segment);
    }

    /// A segment has no disk space any more.
    pub fn give_back(&mut self, segment: u32) {
        self.next.given_back.insert(segment);
    }

    /// A segment begins a life: what was owed of its last one is void.
    pub fn begin_life(&mut self, segment: u32) {
        self.next.suspects.remove(&segment);
        self.next.given_back.remove(&segment);
    }

    /// Nothing is to be written.
    pub fn is_empty(&self) -> bool {
        self.next.is_empty() && self.writing.is_empty()
    }

    /// Deletions that no batch has yet.
    pub fn deletions(&self) -> usize {
        self.next.deleted.len()
    }

    /// Puts what is owed into `batch`, at most `deletions_max` of the deletions. Then comes [`Self::written`] or
    /// [`Self::failed`]. Blocks that `is_here` says were put anew since: their deletion is void, and must not reach the newer copy.
    pub fn begin(&mut self, batch: &mut IndexBatch, deletions_max: usize, is_here: impl Fn(Digest) -> bool) {
        let mut debts = std::mem::take(&mut self.next);
        if debts.deleted.len() > deletions_max {
            let first = debts.deleted.extract_if(|_| true).take(deletions_max).collect();
            self.next.deleted = std::mem::replace(&mut debts.deleted, first);
        }
        debts.deleted.retain(|digest| !is_here(*digest));
        debts.deleted.iter().for_each(|digest| batch.delete_block(*digest));
        debts.buried.iter().for_each(|digest| batch.put_buried(*digest));
        debts.unburied.iter().for_each(|digest| batch.delete_buried(*digest));
        for (id, pin) in &mut debts.pins {
            pin.tried = true;
            match &pin.record {
                Some(record) => batch.put_pin(*id, record),
                None => batch.delete_pin(*id),
            }
        }
        debts.suspects.iter().for_each(|segment| batch.put_suspect(*segment));
        debts.given_back.iter().for_each(|segment| batch.delete_segment(*segment));
        self.writing = debts;
    }

    /// The index took the batch; with `synced`, its log has all of it and of the batches before on the disk.
    pub fn written(&mut self, synced: bool) {
        let debts = std::mem::take(&mut self.writing);
        if synced {
            self.unsynced = Debts::default();
            return;
        }
        let Debts { deleted, buried, unburied, pins, suspects, given_back } = &mut self.unsynced;
        deleted.extend(debts.deleted);
        buried.extend(debts.buried);
        if !debts.unburied.is_empty() {
            buried.clear();
        }
        unburied.extend(debts.unburied);
        pins.extend(debts.pins);
        suspects.extend(debts.suspects);
        given_back.extend(debts.given_back);
    }

    /// It did not, or could not sync its log: all since the last good sync is owed as before; what came meanwhile is newer.
    pub fn failed(&mut self) {
        for debts in [std::mem::take(&mut self.writing), std::mem::take(&mut self.unsynced)] {
            self.next.deleted.extend(debts.deleted);
            self.next.unburied.extend(debts.unburied);
            if self.next.unburied.is_empty() {
                self.next.buried.extend(debts.buried);
            }
            for (id, pin) in debts.pins {
                self.next.pins.entry(id).and_modify(|newer| newer.tried = true).or_insert(pin);
            }
            self.next.suspects.extend(debts.suspects);
            self.next.given_back.extend(debts.given_back);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(owed: &mut Owed, here: &[u128]) -> usize {
        let mut batch = IndexBatch::default();
        owed.begin(&mut batch, 100, |digest| here.contains(&digest.0));
        batch.changes()
    }

    /// A write that failed must not lose what it was to write.
    #[test]
    fn what_failed_is_owed_again() {
        let mut owed = Owed::default();
        owed.delete(Digest(1));
        owed.pin(7, vec![1]);
        owed.suspect(3);
        assert_eq!(begin(&mut owed, &[]), 3);
        assert!(owed.is_deleted(Digest(1)) && !owed.is_empty(), "while it is being written");
        owed.failed();
        assert!(owed.is_deleted(Digest(1)));
        assert_eq!(begin(&mut owed, &[]), 3);
        owed.written(true);
        assert!(owed.is_empty() && !owed.is_deleted(Digest(1)));
    }

    /// A block that was put again after a deletion which the index did not take: the deletion must not reach the newer copy.
    #[test]
    fn a_newer_copy_voids_an_owed_deletion() {
        let mut owed = Owed::default();
        owed.delete(Digest(1));
        owed.delete(Digest(2));
        begin(&mut owed, &[]);
        owed.failed();
        assert_eq!(begin(&mut owed, &[1]), 1, "only the other one goes");
        owed.written(true);
        assert!(owed.is_empty());
    }

    /// Pins that come and go while the index takes nothing leave nothing behind; those that it may have are deleted there.
    #[test]
    fn pins_that_the_index_never_heard_of_are_forgotten() {
        let mut owed = Owed::default();
        for id in 0..1000 {
            owed.pin(id, vec![0; 8]);
            owed.unpin(id);
        }
        assert!(owed.is_empty());
        owed.pin(1, vec![0; 8]);
        begin(&mut owed, &[]);
        owed.unpin(1);
        owed.failed();
        assert_eq!(begin(&mut owed, &[]), 1, "the failed batch may have reached the log");
        owed.written(true);
        owed.unpin(2);
        assert_eq!(begin(&mut owed, &[]), 1, "an older pin is deleted");
    }

    /// What the index took without a sync is not on the disk: where a later sync of its log fails, it is written once more.
    #[test]
    fn what_was_not_synced_is_owed_again_when_a_sync_fails() {
        let mut owed = Owed::default();
        owed.delete(Digest(1));
        owed.pin(7, vec![1]);
        assert_eq!(begin(&mut owed, &[]), 2);
        owed.written(false);
        assert!(owed.is_empty() && owed.is_deleted(Digest(1)), "nothing to write, and not safe yet");
        owed.unpin(7);
        assert_eq!(begin(&mut owed, &[]), 1);
        owed.failed();
        assert_eq!(begin(&mut owed, &[]), 2, "the deletion, and the end of the pin");
        owed.written(true);
        owed.delete(Digest(2));
        begin(&mut owed, &[]);
        owed.failed();
        assert_eq!(begin(&mut owed, &[]), 1, "what was synced is done");
    }

    #[test]
    fn many_deletions_are_written_in_parts() {
        let mut owed = Owed::default();
        (0..250).for_each(|name| owed.delete(Digest(name)));
        let mut parts = Vec::new();
        while !owed.is_empty() {
            parts.push(begin(&mut owed, &[]));
            owed.written(true);
        }
        assert_eq!(parts, [100, 100, 50]);
    }
}
