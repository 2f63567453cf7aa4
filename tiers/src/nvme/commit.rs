//! The committer: puts what was written into the index and the map, and answers those who wait for LOCAL, all
//! that came meanwhile together. Deals with syncs that fail and with an index that takes no writes.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::extents::Entry;
use super::format::{Extent, IndexValue};
use super::index::IndexBatch;
use super::store::{State, Store, add};
use super::write::{Commit, Framed, NoPlace, answer, is_no_space};
use crate::block::Digest;
use crate::caps;

/// What was written is synced this often at least, so that a loss of power costs seconds.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// Commits that one round takes at most.
const COMMITS_PER_ROUND: usize = 4096;
/// A failed index is opened again after this long, then after twice as long each time, up to a second.
const RETRY_INDEX_AFTER: Duration = Duration::from_millis(25);
/// Times that a volume may fail to sync and be checked again before it stays read-only.
const SYNC_FAILURES_MAX: u64 = 3;

impl Store {
    /// The committer's life.
    pub fn commit_forever(self: &Arc<Self>, commits: &mpsc::Receiver<Commit>) {
        let mut last_sync = Instant::now();
        let (mut next_retry, mut retry_after) = (Instant::now(), RETRY_INDEX_AFTER);
        // Deletions that the index has yet to take: a block must not come back after a restart.
        let mut owed: Vec<Digest> = Vec::new();
        loop {
            let closed = self.state.lock().health.index_closed;
            let first = commits.recv_timeout(if closed { retry_after } else { SYNC_EVERY });
            let mut round: Vec<Commit> = match first {
                Ok(commit) => vec![commit],
                Err(mpsc::RecvTimeoutError::Timeout) => Vec::new(),
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            };
            round.extend(commits.try_iter().take(COMMITS_PER_ROUND));
            let stop = round.iter().any(|commit| matches!(commit, Commit::Stop));
            let due = stop || last_sync.elapsed() >= SYNC_EVERY;
            if !closed {
                retry_after = RETRY_INDEX_AFTER;
            } else if Instant::now() >= next_retry {
                self.retry_index();
                retry_after = (retry_after * 2).min(SYNC_EVERY);
                next_retry = Instant::now() + retry_after;
            }
            if self.commit(round, &mut owed, due) {
                last_sync = Instant::now();
            }
            if stop {
                return;
            }
        }
    }

    /// One round. True where it synced.
    fn commit(self: &Arc<Self>, round: Vec<Commit>, owed: &mut Vec<Digest>, due: bool) -> bool {
        let mut batch = IndexBatch::default();
        let (mut written, mut failed, mut sync_waiters) = (Vec::new(), Vec::new(), Vec::new());
        for commit in round {
            match commit {
                Commit::Written(framed, Ok(())) => written.extend(framed),
                Commit::Written(framed, Err(error)) => {
                    self.write_failed(&error);
                    failed.extend(framed);
                }
                Commit::Deleted(digests) => owed.extend(digests),
                Commit::Sync(waiter) => sync_waiters.push(waiter),
                Commit::Pinned(id, record) => batch.put_pin(id, &record),
                Commit::Unpinned(id) => batch.delete_pin(id),
                Commit::Stop => {}
            }
        }
        self.fail(failed);
        owed.iter().for_each(|digest| batch.delete_block(*digest));
        let mut wanted = !sync_waiters.is_empty();
        let numbers;
        {
            let state = self.state.lock();
            numbers = state.numbers.save(&mut batch);
            written.iter().for_each(|framed| batch.put_block(framed.dirty.digest, &framed.value));
            let waits = |framed: &Framed| {
                state.pending.get(framed.dirty.digest).is_some_and(|pending| !pending.waiters.is_empty())
            };
            wanted |= written.iter().any(waits);
            // Nothing was written since the last sync: nothing is due.
            wanted |= due && !(state.unsynced.is_empty() && batch.is_empty());
        }
        if batch.is_empty() && !wanted {
            return false;
        }
        let outcome = self.sync_both(batch, wanted);
        match outcome {
            Ok(local) => {
                owed.clear();
                self.state.lock().numbers.saved(numbers);
                self.publish(written, local && wanted);
                sync_waiters.into_iter().for_each(|waiter| _ = waiter.send(local));
            }
            Err(problem) => {
                if let NoPlace::Index(error) = &problem {
                    tracing::error!(%error, "the index cannot be written");
                    self.close_index();
                }
                self.fail(written);
                sync_waiters.into_iter().for_each(|waiter| _ = waiter.send(false));
            }
        }
        self.peers.cleaned.notify_waiters();
        wanted
    }

    /// Writes the batch; with `sync` syncs data and the index's log side by side. True where what was
    /// written before is safe now; false where the data's sync failed.
    pub fn sync_both(self: &Arc<Self>, batch: IndexBatch, sync: bool) -> Result<bool, NoPlace> {
        add(&self.counters.index_written_bytes, batch.bytes());
        if !sync {
            self.index.write(batch, false).map_err(NoPlace::Index)?;
            return Ok(true);
        }
        let covered: Vec<u32> = self.state.lock().unsynced.iter().copied().collect();
        let (send, receive) = mpsc::sync_channel(1);
        self.volume.sync(Box::new(move |result| drop(send.send(result))));
        let indexed = self.index.write(batch, true);
        let synced = receive.recv().unwrap_or_else(|_| Err(io::Error::other("the volume was closed")));
        add(&self.counters.syncs, 1);
        if let Err(error) = synced {
            self.sync_failed(&error);
            return Ok(false);
        }
        indexed.map_err(NoPlace::Index)?;
        let mut state = self.state.lock();
        // A segment that is still open is written further: it stays on the list.
        let State { segments, unsynced, .. } = &mut *state;
        covered.iter().filter(|segment| !segments.is_open(**segment)).for_each(|segment| {
            unsynced.remove(segment);
        });
        Ok(true)
    }

    /// The blocks are where the index says: from now on they are found.
    fn publish(&self, written: Vec<Framed>, local: bool) {
        let mut cancelled = Vec::new();
        let mut ended = Vec::with_capacity(written.len());
        let mut state = self.state.lock();
        for Framed { dirty, value } in written {
            state.segments.end_write(value.extent.segment);
            let pending = state.pending.remove(dirty.digest).unwrap_or_default();
            if pending.cancelled {
                // Its frame is there all the same: a scan must not find it.
                state.segments.begin_read(value.extent.segment);
                cancelled.push((dirty.digest, value.extent));
                ended.push((dirty, pending, false));
                continue;
            }
            let pinned = state.pins.holds(dirty.digest);
            let (digest, used) = (dirty.digest, state.second);
            let IndexValue { extent, parent_tag, namespace, name, .. } = value;
            state.extents.insert(Entry { digest, parent_tag, extent, hits: 0, pinned, namespace, used, name });
            add(&self.counters.admitted_blocks, 1);
            add(&self.counters.admitted_bytes, u64::from(dirty.block.length()));
            ended.push((dirty, pending, true));
        }
        drop(state);
        for (dirty, pending, stored) in ended {
            if stored {
                dirty.block.stored();
            }
            answer(Some(pending), stored && local);
        }
        self.deleted(&cancelled);
    }

    /// Blocks were deleted whose frames are on the volume: the index forgets them, and their headers are zeroed.
    /// For each a read of its segment was begun, which the zeroing ends.
    pub fn deleted(&self, gone: &[(Digest, Extent)]) {
        if gone.is_empty() {
            return;
        }
        self.queue.lock().buried.extend(gone.iter().map(|(_, extent)| *extent));
        self.queue_changed.notify_one();
        let _ = self.commits.send(Commit::Deleted(gone.iter().map(|(digest, _)| *digest).collect()));
    }

    fn fail(&self, failed: Vec<Framed>) {
        for Framed { dirty, value } in failed {
            let pending = {
                let mut state = self.state.lock();
                state.segments.end_write(value.extent.segment);
                state.pending.remove(dirty.digest)
            };
            add(&self.counters.refused_blocks, 1);
            drop(dirty);
            answer(pending, false);
        }
    }

    fn write_failed(&self, error: &io::Error) {
        add(&self.counters.io_errors, 1);
        if is_no_space(error) {
            return self.file_system_is_full();
        }
        tracing::warn!(%error, path = %self.path.display(), "a write failed; its blocks stay in memory");
        self.note_device_error(error);
    }

    /// After a failed sync nothing that was written since the last one can be trusted to be on the platter, and
    /// the sync is not tried again: a second one may succeed with the data gone. What was written since is read
    /// back past the page cache; what does not verify is forgotten; writing goes on in fresh segments.
    fn sync_failed(self: &Arc<Self>, error: &io::Error) {
        add(&self.counters.sync_failures, 1);
        {
            let state = self.state.lock();
            if state.health.left || state.health.read_only || state.health.checking {
                return;
            }
        }
        let failures = self.counters.sync_failures.load(Ordering::Relaxed);
        tracing::error!(%error, path = %self.path.display(), "a sync failed; the blocks written since the last sync are checked");
        let mut state = self.state.lock();
        state.health.checking = true;
        state.health.reason = Some(format!("a sync failed: {error}"));
        state.segments.seal_all();
        if failures >= SYNC_FAILURES_MAX {
            state.health.read_only = true;
            state.health.reason = Some(format!("{failures} syncs failed, the last with: {error}"));
        }
        drop(state);
        let store = Arc::clone(self);
        let checker = std::thread::Builder::new().name("kvstore-check".into());
        if let Err(error) = checker.spawn(move || store.check_unsynced()) {
            tracing::error!(%error, "the blocks written since the last sync cannot be checked; the volume stays read-only");
        }
    }

    /// The index failed: it is closed, and opened again until that works.
    pub fn close_index(&self) {
        let mut state = self.state.lock();
        state.health.index_closed = true;
        state.health.reason = Some("the index cannot be written; it is being opened again".into());
    }

    fn retry_index(&self) {
        if !self.state.lock().health.index_closed {
            return;
        }
        match self.index.reopen() {
            Ok(()) => {
                let mut state = self.state.lock();
                state.health.index_closed = false;
                state.health.reason = None;
                drop(state);
                tracing::info!(path = %self.path.display(), "the index is open again");
            }
            Err(error) => tracing::warn!(%error, "the index cannot be opened yet"),
        }
    }

    /// The device said no. Some errors say that it is gone; others are counted, and enough in a row say the same.
    pub fn note_device_error(&self, error: &io::Error) {
        // ENXIO, ENODEV, ESHUTDOWN.
        let gone = matches!(error.raw_os_error(), Some(6 | 19 | 108));
        let in_a_row = self.read_errors.fetch_add(1, Ordering::AcqRel) + 1;
        if gone || in_a_row >= caps::NVME_ERRORS_IN_A_ROW_MAX {
            self.leave(format!("{in_a_row} transfers in a row failed, the last with: {error}"));
        }
    }
}
