//! The committer: puts what was written into the index and the map, and answers those who wait for LOCAL, all
//! that came meanwhile together. The only writer of the index, and the only one that syncs.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::batch::IndexBatch;
use super::index::IndexError;
use super::state::{State, add};
use super::store::Store;
use super::write::{Commit, Found, Framed, Life, Move, is_no_space};
use crate::caps;

/// What was written is synced this often at least, so that a loss of power costs seconds.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// Commits that one round takes at most.
const COMMITS_PER_ROUND: usize = 4096;
/// A failed index is opened again at once, then after twice this long, and after twice as long each time, up to a second.
const RETRY_INDEX_AFTER: Duration = Duration::from_millis(25);

/// When the committer syncs, and tries a failed index again.
struct Pace {
    last_sync: Instant,
    /// The index's log has what was not synced yet.
    log_unsynced: bool,
    next_retry: Instant,
    retry_after: Duration,
    /// Moves of a batch that failed. The index's log may have them all the same, so that the copies must stay: the next batch
    /// has them again.
    tried: Vec<Move>,
    /// Moves that the index has, and whose copies no sync has made safe: the next batch takes them back.
    undone: Vec<Move>,
}

/// What came meanwhile, by kind.
#[derive(Default)]
struct Round {
    written: Vec<Framed>,
    failed: Vec<Framed>,
    errors: Vec<io::Error>,
    waiters: Vec<(oneshot::Sender<bool>, u64)>,
    lives: Vec<(Life, mpsc::SyncSender<bool>)>,
    moves: Vec<(Vec<Move>, Option<mpsc::SyncSender<bool>>)>,
    found: Vec<(Found, mpsc::SyncSender<bool>)>,
    stop: bool,
}

impl Round {
    fn of(commits: Vec<Commit>) -> Self {
        let mut round = Self::default();
        for commit in commits {
            match commit {
                Commit::Written(framed, Ok(())) => round.written.extend(framed),
                Commit::Written(framed, Err(error)) => {
                    round.errors.push(error);
                    round.failed.extend(framed);
                }
                Commit::Owed => {}
                Commit::Sync(waiter, failures) => round.waiters.push((waiter, failures)),
                Commit::Life(life, done) => round.lives.push((life, done)),
                Commit::Moved(moves, done) => round.moves.push((moves, Some(done))),
                Commit::Found(found, done) => round.found.push((found, done)),
                Commit::Stop => round.stop = true,
            }
        }
        round
    }
}

/// One round's writes.
struct Writes {
    batch: IndexBatch,
    /// Namespaces' numbers in it.
    numbers: usize,
    /// The index's log is to be synced.
    log: bool,
    /// The data is to be synced: for these segments.
    data: Option<HashSet<u32>>,
    /// Syncs of the data can be relied on just now.
    trusted: bool,
    /// Failed syncs of the data so far.
    failures: u64,
}

impl Store {
    /// The committer's life. Sleeps while there is nothing to write, nothing to sync, and nothing to try again.
    pub fn commit_forever(self: &Arc<Self>, commits: &mpsc::Receiver<Commit>) {
        let now = Instant::now();
        let mut pace = Pace {
            last_sync: now,
            log_unsynced: true,
            next_retry: now,
            retry_after: RETRY_INDEX_AFTER,
            tried: Vec::new(),
            undone: Vec::new(),
        };
        loop {
            let first = match self.wait(&pace) {
                Some(time) => commits.recv_timeout(time),
                None => commits.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            };
            let mut round: Vec<Commit> = match first {
                Ok(commit) => vec![commit],
                Err(mpsc::RecvTimeoutError::Timeout) => Vec::new(),
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            };
            round.extend(commits.try_iter().take(COMMITS_PER_ROUND));
            let round = Round::of(round);
            let stop = round.stop;
            self.commit(round, &mut pace);
            if stop {
                return self.refuse_rest(commits);
            }
        }
    }

    /// How long to wait for the next commit; `None`: there is nothing else to do.
    fn wait(&self, pace: &Pace) -> Option<Duration> {
        let state = self.state.lock();
        if state.health.index_closed {
            let tries = !state.health.left && state.health.index_given_up.is_none();
            return tries.then(|| pace.next_retry.saturating_duration_since(Instant::now()));
        }
        let due = pace.log_unsynced
            || !pace.undone.is_empty()
            || !state.owed.is_empty()
            || state.syncs() && !state.unsynced.is_empty();
        (due && !state.health.left).then(|| SYNC_EVERY.saturating_sub(pace.last_sync.elapsed()))
    }

    /// Tells the committer, and waits for its answer. Blocks; not for the committer itself.
    pub fn ask(&self, commit: impl FnOnce(mpsc::SyncSender<bool>) -> Commit) -> bool {
        let (send, receive) = mpsc::sync_channel(1);
        self.commits.send(commit(send)).is_ok() && receive.recv() == Ok(true)
    }

    /// Something is owed.
    pub fn wake_committer(&self) {
        let _ = self.commits.send(Commit::Owed);
    }

    /// One round.
    fn commit(self: &Arc<Self>, mut round: Round, pace: &mut Pace) {
        if !round.written.is_empty() {
            self.device_errors.store(0, Ordering::Release);
        }
        round.errors.iter().for_each(|error| self.write_failed(error));
        self.fail(std::mem::take(&mut round.failed));
        let closed = self.state.lock().health.index_closed;
        if closed && !self.reopen_index(pace, round.stop) || !self.write_deletions(pace) {
            return self.refuse_round(round);
        }
        if !pace.tried.is_empty() {
            round.moves.insert(0, (std::mem::take(&mut pace.tried), None));
        }
        let mut writes = self.writes(&round, pace, closed);
        if writes.batch.is_empty() && !writes.log {
            return self.settle(round, pace, &writes, true, true);
        }
        let (synced, indexed) = self.write_both(&mut writes, pace);
        if indexed.is_ok() {
            pace.retry_after = RETRY_INDEX_AFTER;
        }
        let (synced, indexed) = self.note_outcome(&writes, synced, indexed);
        self.settle(round, pace, &writes, synced, indexed);
    }

    /// Opens a failed index again, where it is time; false where it stays closed. One that turns out damaged does so until a restart:
    /// only a start builds it again.
    fn reopen_index(&self, pace: &mut Pace, now: bool) -> bool {
        let given_up = self.state.lock().health.index_given_up.is_some();
        if given_up || !now && Instant::now() < pace.next_retry {
            return false;
        }
        let opened = self.index.reopen();
        pace.retry_after = (pace.retry_after * 2).min(SYNC_EVERY);
        pace.next_retry = Instant::now() + pace.retry_after;
        match &opened {
            Ok(()) => {}
            Err(error) if error.is_environment() => {
                tracing::debug!(%error, path = %self.path.display(), "the index cannot be opened yet");
            }
            Err(damage) => self.give_index_up(damage),
        }
        opened.is_ok()
    }

    /// Writes what is owed beyond one batch; false where the index fails.
    fn write_deletions(&self, pace: &mut Pace) -> bool {
        loop {
            let mut batch = IndexBatch::default();
            {
                let mut state = self.state.lock();
                if state.owed.deletions() <= caps::NVME_DELETIONS_PER_BATCH {
                    return true;
                }
                let State { owed, extents, .. } = &mut *state;
                owed.begin(&mut batch, caps::NVME_DELETIONS_PER_BATCH, |digest| extents.get(digest).is_some());
            }
            add(&self.counters.index_written_bytes, batch.bytes());
            let written = self.index.write(batch, false);
            pace.log_unsynced = true;
            let mut state = self.state.lock();
            match written {
                Ok(()) => state.owed.written(false),
                Err(error) => {
                    state.owed.failed();
                    drop(state);
                    self.index_failed(&error);
                    return false;
                }
            }
        }
    }

    /// What a round writes. In this order, so that the last word on a block is the newest: what is owed, what was found, what
    /// moved, what was written.
    fn writes(&self, round: &Round, pace: &Pace, reopened: bool) -> Writes {
        let mut batch = IndexBatch::default();
        let mut state = self.state.lock();
        let buried = round.found.iter().flat_map(|(found, _)| state.take_found(found)).collect();
        let State { owed, extents, .. } = &mut *state;
        owed.begin(&mut batch, usize::MAX, |digest| extents.get(digest).is_some());
        let numbers = state.numbers.save(&mut batch);
        if reopened {
            batch.put_version();
        }
        for (found, _) in &round.found {
            state.put_found(found, &mut batch);
        }
        for moved in &pace.undone {
            if state.extents.get(moved.from.digest).is_some_and(|now| now.extent == moved.from.extent) {
                batch.put_block(moved.from.digest, &moved.before);
            }
        }
        for moved in round.moves.iter().flat_map(|(moves, _)| moves) {
            if state.extents.get(moved.from.digest).is_some_and(|now| now.extent == moved.from.extent) {
                batch.put_block(moved.from.digest, &moved.value);
            }
        }
        for (life, _) in &round.lives {
            batch.put_segment(life.segment, life.life, life.class);
            batch.delete_suspect(life.segment);
        }
        // The old places of what moved stay as they are until the copies are synced.
        let moves = !pace.undone.is_empty() || round.moves.iter().any(|(moves, _)| !moves.is_empty());
        let mut waits = moves || !round.waiters.is_empty() || !round.lives.is_empty() || reopened;
        for framed in &round.written {
            let pending = state.pending.get(framed.dirty.digest);
            match pending.is_some_and(|pending| pending.cancelled) {
                true => batch.delete_block(framed.dirty.digest),
                false => batch.put_block(framed.dirty.digest, &framed.value),
            }
            waits |= pending.is_some_and(|pending| !pending.waiters.is_empty());
        }
        let due = round.stop || pace.last_sync.elapsed() >= SYNC_EVERY;
        let trusted = state.syncs();
        let unsynced = trusted && !state.unsynced.is_empty();
        let log = (waits || due) && (unsynced || pace.log_unsynced || !batch.is_empty() || !pace.undone.is_empty());
        let data = (log && unsynced).then(|| state.begin_sync());
        let failures = state.failed_syncs;
        drop(state);
        self.bury_later(buried);
        Writes { batch, numbers, log, data, trusted, failures }
    }

    /// Writes the batch and syncs data and log, side by side.
    fn write_both(&self, writes: &mut Writes, pace: &mut Pace) -> (io::Result<()>, Result<(), IndexError>) {
        add(&self.counters.index_written_bytes, writes.batch.bytes());
        let (send, receive) = mpsc::sync_channel(1);
        if writes.data.is_some() {
            self.volume.sync(Box::new(move |result| drop(send.send(result))));
        }
        let indexed = self.index.write(std::mem::take(&mut writes.batch), writes.log);
        let synced = match writes.data.is_some() {
            true => receive.recv().unwrap_or_else(|_| Err(io::Error::other("the volume was closed"))),
            false => Ok(()),
        };
        if writes.log {
            add(&self.counters.syncs, 1);
            pace.last_sync = Instant::now();
        }
        pace.log_unsynced = match (&indexed, writes.log) {
            (Ok(()), log) => !log,
            (Err(_), _) => true,
        };
        (synced, indexed)
    }

    /// What became of the writes, for the volume. Whether the data is synced, and whether the index has the batch.
    fn note_outcome(
        self: &Arc<Self>,
        writes: &Writes,
        synced: io::Result<()>,
        indexed: Result<(), IndexError>,
    ) -> (bool, bool) {
        if let (Err(error), Some(covered)) = (&synced, &writes.data) {
            self.sync_failed(error, covered);
        }
        if let Err(error) = &indexed {
            self.state.lock().owed.failed();
            self.index_failed(error);
            return (synced.is_ok(), false);
        }
        let mut state = self.state.lock();
        state.owed.written(writes.log);
        state.numbers.saved(writes.numbers, writes.log);
        let opened = std::mem::take(&mut state.health.index_closed);
        drop(state);
        if opened {
            tracing::info!(path = %self.path.display(), "the index is open again");
            // It sleeps without a limit while the volume takes no writes.
            self.wake_flusher();
        }
        (synced.is_ok(), true)
    }

    /// Answers all who took part in a round.
    fn settle(&self, round: Round, pace: &mut Pace, writes: &Writes, synced: bool, indexed: bool) {
        let safe = synced && indexed && writes.trusted;
        if indexed {
            if writes.log {
                // The index's log says again where they are.
                let undone = std::mem::take(&mut pace.undone);
                self.drop_copies(undone.iter().map(|moved| moved.to.extent).collect());
            }
            let (there, held): (Vec<_>, Vec<_>) =
                round.moves.into_iter().partition(|(moves, _)| safe && writes.log || moves.is_empty());
            self.publish_moves(there);
            for (moves, done) in held {
                pace.undone.extend(moves);
                done.into_iter().for_each(|done| _ = done.send(false));
            }
            self.publish(round.written, safe && writes.log);
        } else {
            self.fail_tried(round.written);
            for (moves, done) in round.moves {
                pace.tried.extend(moves);
                done.into_iter().for_each(|done| _ = done.send(false));
            }
        }
        let forgets = self.state.lock().forgets_deletions;
        for (waiter, failures) in round.waiters {
            let _ = waiter.send(safe && failures == writes.failures && !forgets);
        }
        round.lives.into_iter().for_each(|(_, done)| _ = done.send(safe));
        round.found.into_iter().for_each(|(_, done)| _ = done.send(indexed));
        self.peers.cleaned.notify_waiters();
    }

    /// The index takes nothing: what was found is served, all else is answered with no.
    fn refuse_round(&self, round: Round) {
        let buried = {
            let mut state = self.state.lock();
            round.found.iter().flat_map(|(found, _)| state.take_found(found)).collect()
        };
        self.bury_later(buried);
        self.fail(round.written);
        round.waiters.into_iter().for_each(|(waiter, _)| _ = waiter.send(false));
        round.lives.into_iter().for_each(|(_, done)| _ = done.send(false));
        self.drop_moves(round.moves);
        round.found.into_iter().for_each(|(_, done)| _ = done.send(false));
        self.peers.cleaned.notify_waiters();
    }

    /// The committer ends: whoever still waits hears that nothing will come.
    fn refuse_rest(&self, commits: &mpsc::Receiver<Commit>) {
        self.refuse_round(Round::of(commits.try_iter().collect()));
        let waiting = self.state.lock().pending.take_waiters();
        waiting.into_iter().for_each(|waiter| _ = waiter.send(false));
    }

    /// The index did not take a batch.
    fn index_failed(&self, error: &IndexError) {
        add(&self.counters.index_failures, 1);
        self.state.lock().numbers.failed();
        self.close_index(error);
    }

    /// The index failed: it is closed, and opened again until that works.
    pub fn close_index(&self, error: &IndexError) {
        let mut state = self.state.lock();
        if !state.health.index_closed {
            tracing::error!(%error, path = %self.path.display(), "the index cannot be written; it is opened again until that works");
            state.health.index_closed = true;
        }
        drop(state);
        if error.is_no_space() {
            self.file_system_is_full();
        }
    }

    /// The index turned out damaged while the daemon runs.
    fn give_index_up(&self, damage: &IndexError) {
        tracing::error!(%damage, path = %self.path.display(), "the index is damaged; its blocks are read, and nothing is written: restart the daemon, which builds the index again from the blocks");
        let why =
            format!("{damage}; blocks are read but not written: restart the daemon, which builds the index again");
        self.state.lock().health.index_given_up = Some(why);
    }

    /// A write failed: it is counted, and the volume's health with it.
    pub fn write_failed(&self, error: &io::Error) {
        add(&self.counters.io_errors, 1);
        if is_no_space(error) {
            return self.file_system_is_full();
        }
        tracing::warn!(%error, path = %self.path.display(), "a write failed; its blocks stay in memory");
        self.note_device_error(error);
    }

    /// The device said no. Some errors say that it is gone; others are counted, and enough in a row say the same.
    pub fn note_device_error(&self, error: &io::Error) {
        // ENXIO, ENODEV, ESHUTDOWN.
        let gone = matches!(error.raw_os_error(), Some(6 | 19 | 108));
        let in_a_row = self.device_errors.fetch_add(1, Ordering::AcqRel) + 1;
        if gone || in_a_row >= caps::NVME_ERRORS_IN_A_ROW_MAX {
            self.leave(format!("{in_a_row} transfers in a row failed, the last with: {error}"));
        }
    }
}
