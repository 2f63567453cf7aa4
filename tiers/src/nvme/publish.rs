//! Publishing: what was written is found from now on, or is not, and whoever waited for it hears.

use std::sync::mpsc;

use super::batch::IndexBatch;
use super::extents::Entry;
use super::format::{Extent, IndexValue};
use super::state::{State, add};
use super::store::Store;
use super::write::{Found, Framed, Move, answer};

impl Store {
    /// The blocks are where the index says: from now on they are found. `local`: they are safe from a loss of power, but for those
    /// in segments that a failed sync has left in doubt.
    pub fn publish(&self, written: Vec<Framed>, local: bool) {
        let mut buried = Vec::new();
        let mut ended = Vec::with_capacity(written.len());
        let mut state = self.state.lock();
        for Framed { dirty, value } in written {
            state.segments.end_write(value.extent.segment);
            let pending = state.pending.remove(dirty.digest).unwrap_or_default();
            if pending.cancelled {
                // Its frame is there all the same: a scan must not find it; and the index may have it.
                state.owed.delete(dirty.digest);
                state.segments.begin_read(value.extent.segment);
                buried.push(value.extent);
                ended.push((dirty, pending, false, false));
                continue;
            }
            let pinned = state.pins.holds(dirty.digest);
            let (digest, used) = (dirty.digest, state.second);
            let IndexValue { extent, parent_tag, namespace, name, .. } = value;
            let safe = local && !state.suspects.contains(&extent.segment);
            let before =
                state.extents.insert(Entry { digest, parent_tag, extent, hits: 0, pinned, namespace, used, name });
            if let Some(before) = before.filter(|_| safe) {
                // Written anew, because its first copy was in doubt: a deletion would leave that one behind.
                state.segments.begin_read(before.segment);
                buried.push(before);
            }
            add(&self.counters.admitted_blocks, 1);
            add(&self.counters.admitted_bytes, u64::from(dirty.block.length()));
            ended.push((dirty, pending, true, safe));
        }
        let owes = !state.owed.is_empty();
        drop(state);
        for (dirty, pending, stored, safe) in ended {
            if stored {
                dirty.block.stored();
            }
            answer(Some(pending), safe);
        }
        self.bury_later(buried);
        if owes {
            self.wake_committer();
        }
    }

    /// The index has the new places of blocks that moved.
    pub fn publish_moves(&self, moves: Vec<(Vec<Move>, Option<mpsc::SyncSender<bool>>)>) {
        for (moves, done) in moves {
            let mut buried = Vec::new();
            let mut state = self.state.lock();
            let State { extents, segments, pins, .. } = &mut *state;
            for Move { from, to, .. } in moves {
                segments.end_write(to.extent.segment);
                // Deleted, or put anew, meanwhile: the copy is dead, and a scan must not find it.
                if extents.get(from.digest).is_none_or(|now| now.extent != from.extent) {
                    segments.begin_read(to.extent.segment);
                    buried.push(to.extent);
                    continue;
                }
                extents.insert(Entry { pinned: pins.holds(from.digest), ..to });
                add(&self.counters.reinserted_blocks, 1);
                add(&self.counters.reinserted_bytes, to.extent.bytes());
            }
            drop(state);
            self.bury_later(buried);
            done.into_iter().for_each(|done| _ = done.send(true));
        }
    }

    /// The index never heard of these moves: the blocks stay where they were, the copies are dead.
    pub fn drop_moves(&self, moves: Vec<(Vec<Move>, Option<mpsc::SyncSender<bool>>)>) {
        for (moves, done) in moves {
            self.drop_copies(moves.iter().map(|moved| moved.to.extent).collect());
            done.into_iter().for_each(|done| _ = done.send(false));
        }
    }

    /// These copies of blocks are dead, and a scan must not find them.
    pub fn drop_copies(&self, copies: Vec<Extent>) {
        {
            let mut state = self.state.lock();
            for copy in &copies {
                state.segments.begin_read(copy.segment);
                state.segments.end_write(copy.segment);
            }
        }
        self.bury_later(copies);
    }

    /// Blocks were not written, or their write failed: they stay in memory alone. A scan must not find their frames, some of
    /// which may be whole.
    pub fn fail(&self, failed: Vec<Framed>) {
        let mut buried = Vec::with_capacity(failed.len());
        for Framed { dirty, value } in failed {
            let pending = {
                let mut state = self.state.lock();
                state.segments.begin_read(value.extent.segment);
                state.segments.end_write(value.extent.segment);
                state.pending.remove(dirty.digest)
            };
            buried.push(value.extent);
            add(&self.counters.refused_blocks, 1);
            drop(dirty);
            answer(pending, false);
        }
        self.bury_later(buried);
    }

    /// The same where the batch with the blocks failed: the index's log may have them, so that they are owed to be deleted
    /// there. Where an earlier copy is served, both stay, whichever of them the index has.
    pub fn fail_tried(&self, written: Vec<Framed>) {
        let mut dead = Vec::with_capacity(written.len());
        for Framed { dirty, value } in written {
            let mut state = self.state.lock();
            if state.extents.get(dirty.digest).is_none() {
                state.owed.delete(dirty.digest);
                drop(state);
                dead.push(Framed { dirty, value });
                continue;
            }
            state.segments.end_write(value.extent.segment);
            let pending = state.pending.remove(dirty.digest);
            drop(state);
            add(&self.counters.refused_blocks, 1);
            drop(dirty);
            answer(pending, false);
        }
        self.fail(dead);
    }

    /// The headers of these frames are to be zeroed. For each a read of its segment was begun, which the zeroing ends.
    pub fn bury_later(&self, extents: Vec<Extent>) {
        if !extents.is_empty() {
            self.queue.lock().buried.extend(extents);
            self.queue_changed.notify_one();
        }
    }
}

impl State {
    /// Blocks that a scan found: they are served, but for those that were deleted, whose places are returned, to be buried.
    pub fn take_found(&mut self, found: &Found) -> Vec<Extent> {
        let mut buried = Vec::new();
        self.segments.restore(found.segment, found.life, found.class, false);
        // Nobody knows whether that was ever synced.
        self.unsynced.insert(found.segment);
        for (entry, _) in &found.blocks {
            if self.buried.contains(&entry.digest) {
                if self.extents.get(entry.digest).is_some_and(|known| known.extent == entry.extent) {
                    // Put anew since it was deleted.
                    continue;
                }
                self.segments.begin_read(found.segment);
                buried.push(entry.extent);
                continue;
            }
            // The same block twice: it moved. The later copy counts, in the map and in the index.
            let newer = self.extents.get(entry.digest).is_none_or(|known| {
                let life = self.segments.life(known.extent.segment).unwrap_or(0);
                life < found.life || known.extent.segment == found.segment
            });
            if newer && !self.pending.get(entry.digest).is_some_and(|pending| pending.cancelled) {
                let pinned = self.pins.holds(entry.digest);
                self.extents.insert(Entry { pinned, ..*entry });
            }
        }
        buried
    }

    /// Puts into `batch` what the map took of that; the segment with the last of its blocks, so that a scan which is interrupted
    /// begins again.
    pub fn put_found(&self, found: &Found, batch: &mut IndexBatch) {
        for (entry, value) in &found.blocks {
            if self.extents.get(entry.digest).is_some_and(|now| now.extent == value.extent) {
                batch.put_block(entry.digest, value);
            }
        }
        if found.last {
            batch.put_segment(found.segment, found.life, found.class);
        }
    }
}
