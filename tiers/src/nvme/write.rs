//! Writing: blocks from memory onto the volume, and what is known of them into the index.
//!
//! Two threads a volume. The *flusher* takes dirty blocks, finds places for their frames and queues the
//! writes; where there is no free segment it empties one first. The *committer* takes what was written,
//! puts it into the index and the map, and answers those who wait for LOCAL: all that came meanwhile with
//! one sync of the data and one of the index's log, side by side (group commit).
//!
//! Order: frame, index, map. A frame without an index entry is an orphan that the next life of its segment
//! buries; an entry whose frame did not make it to the platter does not verify and is a miss.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use kvstore_transfer::frame::{FrameHeader, FrameIdentity};
use kvstore_transfer::volume::{self, Direction, IoMemories, IoMemory, Transfer};
use kvstore_transfer::{AlignedBytes, Lane, SectionSums};
use parking_lot::MutexGuard;
use tokio::sync::oneshot;

use super::extents::Entry;
use super::format::{Digest, Extent, IndexValue, PAGE, SegmentClass, SegmentHeader};
use super::index::{IndexBatch, IndexError};
use super::segments::Place;
use super::store::{State, Store, add};
use crate::caps;
use crate::host::DemotingBlock;

/// Small frames are written together up to this many bytes.
const RUN_BYTES_MAX: usize = 1 << 20;
/// What was written is synced this often at least, so that a loss of power costs seconds.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// Commits that one round takes at most.
const COMMITS_PER_ROUND: usize = 4096;
/// Between two attempts to use a full file system.
const RETRY_EVERY: Duration = Duration::from_millis(500);
/// A failed index is opened again after this long, then after twice as long each time, up to a second.
const RETRY_INDEX_AFTER: Duration = Duration::from_millis(25);
/// Times that a volume may fail to sync and be checked again before it stays read-only.
const SYNC_FAILURES_MAX: u64 = 3;

/// Counts a block and its bytes as dirty while it lives.
pub(super) struct DirtyBytes {
    of: Arc<DirtyCount>,
    bytes: u64,
}

/// What waits to be written, of all volumes.
#[derive(Default)]
pub(super) struct DirtyCount {
    pub bytes: AtomicU64,
    pub blocks: AtomicU64,
}

impl DirtyBytes {
    pub fn new(of: &Arc<DirtyCount>, bytes: u64) -> Self {
        of.bytes.fetch_add(bytes, Ordering::AcqRel);
        of.blocks.fetch_add(1, Ordering::AcqRel);
        Self { of: Arc::clone(of), bytes }
    }
}

impl Drop for DirtyBytes {
    fn drop(&mut self) {
        self.of.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.of.blocks.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A block that is to be written.
pub(super) struct Dirty {
    pub digest: Digest,
    pub parent_tag: u64,
    pub identity: FrameIdentity,
    pub section_bytes: u32,
    /// The sections' checksums, where the put took them; else they are taken here.
    pub sums: Vec<u32>,
    pub block: DemotingBlock,
    pub _bytes: DirtyBytes,
}

/// Who waits for a block on its way.
#[derive(Default)]
pub(super) struct Pending {
    /// It was deleted meanwhile.
    pub cancelled: bool,
    /// Told true once it is LOCAL, false once it will not be.
    pub waiters: Vec<oneshot::Sender<bool>>,
}

/// The blocks on their way to a volume.
#[derive(Default)]
pub(super) struct PendingBlocks {
    by_digest: HashMap<Digest, Pending>,
    tags: HashSet<u64>,
}

impl PendingBlocks {
    pub fn insert(&mut self, digest: Digest, pending: Pending) {
        self.tags.insert(digest.tag());
        self.by_digest.insert(digest, pending);
    }

    pub fn remove(&mut self, digest: Digest) -> Option<Pending> {
        self.tags.remove(&digest.tag());
        self.by_digest.remove(&digest)
    }

    pub fn get_mut(&mut self, digest: Digest) -> Option<&mut Pending> {
        self.by_digest.get_mut(&digest)
    }

    pub fn get(&self, digest: Digest) -> Option<&Pending> {
        self.by_digest.get(&digest)
    }

    pub fn has_tag(&self, tag: u64) -> bool {
        self.tags.contains(&tag)
    }
}

/// Dirty blocks, oldest first, and the places of deleted ones, whose headers are to be zeroed.
#[derive(Default)]
pub(super) struct WriteQueue {
    pub items: VecDeque<Dirty>,
    pub buried: VecDeque<Extent>,
}

/// A frame that was queued for the device.
pub(super) struct Framed {
    dirty: Dirty,
    value: IndexValue,
}

/// What the committer is told.
pub(super) enum Commit {
    /// A write ended.
    Written(Vec<Framed>, io::Result<()>),
    /// Blocks are gone from the map.
    Deleted(Vec<Digest>),
    /// Everything before is to be synced; then the answer.
    Sync(oneshot::Sender<bool>),
    /// A pin began.
    Pinned(u128, Vec<u8>),
    /// A pin ended.
    Unpinned(u128),
    /// No more will come.
    Stop,
}

/// Why a frame found no place.
#[derive(Debug)]
pub(super) enum NoPlace {
    /// Too large, or all segments are in use or pinned.
    NoRoom,
    /// The file system is full.
    NoSpace,
    /// The device failed.
    Io(io::Error),
    /// The index failed.
    Index(IndexError),
}

// ------------------------------------------------------------------------------------------ flusher

impl Store {
    /// The flusher's life.
    pub fn flush_forever(self: &Arc<Self>) {
        while let Some(items) = self.next_items() {
            if items.is_empty() {
                self.housekeeping();
            } else {
                self.write_items(items);
            }
        }
        let _ = self.commits.send(Commit::Stop);
    }

    fn next_items(self: &Arc<Self>) -> Option<Vec<Dirty>> {
        let is_small = |dirty: &Dirty| u64::from(dirty.block.length()) < FrameHeader::APART_FROM_BYTES;
        let mut queue = self.queue.lock();
        loop {
            while let Some(extent) = queue.buried.pop_front() {
                MutexGuard::unlocked(&mut queue, || self.bury(extent));
            }
            if let Some(first) = queue.items.pop_front() {
                let mut bytes = first.block.length() as usize;
                let small = is_small(&first);
                let mut items = vec![first];
                while small && bytes < RUN_BYTES_MAX && queue.items.front().is_some_and(is_small) {
                    let Some(next) = queue.items.pop_front() else { break };
                    bytes += next.block.length() as usize;
                    items.push(next);
                }
                return Some(items);
            }
            if self.is_stopping() {
                return None;
            }
            if self.queue_changed.wait_for(&mut queue, RETRY_EVERY).timed_out() {
                return Some(Vec::new());
            }
        }
    }

    /// Nothing is to be written: gives back what is beyond the bound, tries a full file system again.
    fn housekeeping(self: &Arc<Self>) {
        self.retry_space();
        loop {
            let (free, sealed) = self.state.lock().segments.beyond_bound();
            let done = free.is_empty() && sealed.is_none();
            if done || self.is_stopping() || free.into_iter().any(|segment| !self.give_back(segment)) {
                return;
            }
            if sealed.is_some_and(|segment| !self.empty(segment)) {
                return;
            }
        }
    }

    fn give_back(&self, segment: u32) -> bool {
        let punched = self.volume.file().punch(self.segment_at(segment), self.header.segment_bytes);
        if let Err(error) = punched {
            tracing::warn!(%error, "disk space beyond the bound cannot be given back");
            return false;
        }
        self.state.lock().segments.given_back(segment);
        let mut batch = IndexBatch::default();
        batch.delete_segment(segment);
        self.index.write(batch, false).is_ok()
    }

    /// Whether the file system has room again: a segment's worth of it.
    fn retry_space(&self) {
        if !self.state.lock().health.no_space {
            return;
        }
        let next = self.state.lock().segments.next_free(SegmentClass::Ordinary);
        let Some(next) = next else { return };
        let room = self.volume.file().allocate(self.segment_at(next.segment), self.header.segment_bytes);
        if room.is_ok() {
            let mut state = self.state.lock();
            state.segments.opening_failed(next, true);
            state.health.no_space = false;
            state.health.reason = None;
            tracing::info!(path = %self.path.display(), "the file system has room again: writing goes on");
        }
    }

    fn write_items(self: &Arc<Self>, items: Vec<Dirty>) {
        let mut run = Run::default();
        for mut dirty in items {
            let Some(header) = header_of(&mut dirty) else {
                self.refuse(dirty, &NoPlace::NoRoom);
                continue;
            };
            let apart = header.payload_bytes() >= FrameHeader::APART_FROM_BYTES;
            let pages = (header.frame_bytes() / PAGE) as u32;
            let pinned = self.state.lock().pins.holds(dirty.digest);
            let class = if pinned { SegmentClass::Pinned } else { SegmentClass::Ordinary };
            let place = match self.place(class, pages, apart) {
                Ok(place) => place,
                Err(problem) => {
                    self.refuse(dirty, &problem);
                    continue;
                }
            };
            let head = header.rebind(place.generation).encode();
            let value = IndexValue {
                extent: place.extent,
                generation: place.generation,
                header_crc32: FrameHeader::header_crc32(&head),
                parent_tag: dirty.parent_tag,
            };
            let Some(bytes) = dirty.block.bytes() else {
                self.state.lock().segments.end_write(place.extent.segment);
                self.refuse(dirty, &NoPlace::NoRoom);
                continue;
            };
            let offset = self.offset_of(&place.extent);
            if apart {
                let head = IoMemory::Pages(AlignedBytes::of(&[&head]));
                let memories = IoMemories { head, body: Some(IoMemory::Slot(bytes)) };
                self.queue_write(offset, memories, vec![Framed { dirty, value }]);
                continue;
            }
            if run.end != offset {
                self.queue_run(std::mem::take(&mut run));
                run.offset = offset;
            }
            run.end = offset + place.extent.bytes();
            run.bytes.extend_from_slice(&head);
            run.bytes.extend_from_slice(&bytes);
            run.bytes.resize(run.bytes.len().next_multiple_of(PAGE as usize), 0);
            run.framed.push(Framed { dirty, value });
        }
        self.queue_run(run);
    }

    fn queue_run(self: &Arc<Self>, run: Run) {
        if !run.framed.is_empty() {
            self.queue_write(run.offset, IoMemories::pages(AlignedBytes::of(&[&run.bytes])), run.framed);
        }
    }

    fn queue_write(self: &Arc<Self>, offset: u64, memories: IoMemories, framed: Vec<Framed>) {
        let store = Arc::clone(self);
        let mut transfer = Box::new(Transfer {
            direction: Direction::Write,
            offset,
            memories,
            tag: 0,
            done: Box::new(move |result, memories| {
                // The slot's bytes first, then (in the committer) the block that keeps them.
                drop(memories);
                let _ = store.commits.send(Commit::Written(framed, result));
            }),
        });
        add(&self.counters.device_written_bytes, transfer.bytes());
        // A full lane empties at the speed of the device, and there is nothing else to do meanwhile.
        while let Err(back) = self.volume.submit(Lane::Writeback, transfer) {
            transfer = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A block will not be written.
    pub fn refuse(&self, dirty: Dirty, problem: &NoPlace) {
        if let NoPlace::Io(error) = problem {
            tracing::warn!(%error, "a block was not written");
        }
        if let NoPlace::Index(error) = problem {
            tracing::warn!(%error, "a block was not written");
        }
        add(&self.counters.refused_blocks, 1);
        let pending = self.state.lock().pending.remove(dirty.digest);
        drop(dirty);
        answer(pending, false);
        self.peers.cleaned.notify_waiters();
    }

    /// A place for a frame; opens segments, and empties others, as needed.
    pub fn place(self: &Arc<Self>, class: SegmentClass, pages: u32, apart: bool) -> Result<Place, NoPlace> {
        loop {
            {
                let mut state = self.state.lock();
                if !state.health.takes_writes() {
                    return Err(if state.health.no_space { NoPlace::NoSpace } else { NoPlace::NoRoom });
                }
                if pages > state.segments.usable_pages() {
                    return Err(NoPlace::NoRoom);
                }
                if let Some(place) = state.segments.place(class, pages, apart) {
                    state.unsynced.insert(place.extent.segment);
                    return Ok(place);
                }
            }
            self.open_segment(class)?;
        }
    }

    fn open_segment(self: &Arc<Self>, class: SegmentClass) -> Result<(), NoPlace> {
        self.make_room();
        // Making room may have opened one for what moved.
        if self.state.lock().segments.has_open(class) {
            return Ok(());
        }
        self.open_reserve(class)
    }

    /// Opens a free segment without making room first.
    pub fn open_reserve(self: &Arc<Self>, class: SegmentClass) -> Result<(), NoPlace> {
        let opening = self.state.lock().segments.next_free(class).ok_or(NoPlace::NoRoom)?;
        let offset = self.segment_at(opening.segment);
        if opening.absent {
            self.volume.file().allocate(offset, self.header.segment_bytes).map_err(|error| self.no_space(error))?;
        }
        let opened = self.start_life(opening, offset);
        let mut state = self.state.lock();
        match opened {
            Ok(()) => state.segments.open(opening),
            Err(_) => state.segments.opening_failed(opening, true),
        }
        drop(state);
        opened.inspect_err(|problem| {
            if let NoPlace::Index(_) = problem {
                self.close_index();
            }
        })
    }

    /// What the segment held is gone for good before it is written anew: blocks that moved out of it are
    /// synced, and the index knows that a new life began.
    fn start_life(self: &Arc<Self>, opening: super::segments::Opening, offset: u64) -> Result<(), NoPlace> {
        let mut batch = IndexBatch::default();
        batch.put_segment(opening.segment, opening.life, opening.class);
        if !self.sync_both(batch, true)? {
            return Err(NoPlace::NoRoom);
        }
        let header = SegmentHeader {
            volume_id: self.header.volume_id,
            number: opening.segment,
            life: opening.life,
            class: opening.class,
        };
        add(&self.counters.device_written_bytes, PAGE);
        volume::write_now(&*self.volume, offset, AlignedBytes::of(&[&header.encode()]))
            .map_err(|error| self.no_space(error))
    }

    fn no_space(&self, error: io::Error) -> NoPlace {
        if !is_no_space(&error) {
            add(&self.counters.io_errors, 1);
            return NoPlace::Io(error);
        }
        self.file_system_is_full();
        NoPlace::NoSpace
    }

    fn file_system_is_full(&self) {
        let mut state = self.state.lock();
        if !state.health.no_space {
            tracing::warn!(path = %self.path.display(), "the file system is full: blocks are read, not written, until there is room");
            state.health.no_space = true;
            state.health.reason = Some("the file system is full".into());
        }
    }
}

/// Small frames that are written in one piece.
#[derive(Default)]
struct Run {
    offset: u64,
    end: u64,
    bytes: Vec<u8>,
    framed: Vec<Framed>,
}

/// The header of a block's frame, its generation yet to be set. Takes the sections' checksums where the
/// put did not.
fn header_of(dirty: &mut Dirty) -> Option<FrameHeader> {
    let length = u64::from(dirty.block.length());
    if u64::from(dirty.section_bytes) >= length {
        // One section: its checksum is the block's, as it was when the block was put.
        dirty.sums = vec![dirty.block.crc32()];
    } else if dirty.sums.is_empty() {
        let mut sums = SectionSums::new(dirty.section_bytes as usize);
        sums.update(&dirty.block.bytes()?);
        // What lies in memory must still be what was put.
        if sums.crc32() != dirty.block.crc32() {
            return None;
        }
        dirty.sums = sums.sections();
    }
    FrameHeader::of_sums(dirty.identity, 0, length, dirty.section_bytes, &dirty.sums)
}

pub(super) fn is_no_space(error: &io::Error) -> bool {
    // ENOSPC and EDQUOT.
    matches!(error.raw_os_error(), Some(28 | 122))
}

fn answer(pending: Option<Pending>, local: bool) {
    for waiter in pending.into_iter().flat_map(|pending| pending.waiters) {
        // Whoever waited may have left.
        let _ = waiter.send(local);
    }
}

// ---------------------------------------------------------------------------------------- committer

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
        {
            let state = self.state.lock();
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
                self.publish(written, local && wanted);
                sync_waiters.into_iter().for_each(|waiter| _ = waiter.send(local));
            }
            Err(problem) => {
                if let NoPlace::Index(error) = &problem {
                    tracing::error!(%error, "the index takes no writes");
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
    fn sync_both(self: &Arc<Self>, batch: IndexBatch, sync: bool) -> Result<bool, NoPlace> {
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
                cancelled.push((dirty.digest, value.extent));
                ended.push((dirty, pending, false));
                continue;
            }
            let pinned = state.pins.holds(dirty.digest);
            let entry =
                Entry { digest: dirty.digest, parent_tag: dirty.parent_tag, extent: value.extent, hits: 0, pinned };
            state.extents.insert(entry);
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
        if !cancelled.is_empty() {
            let digests = cancelled.iter().map(|(digest, _)| *digest).collect();
            let _ = self.commits.send(Commit::Deleted(digests));
        }
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
        tracing::warn!(%error, path = %self.path.display(), "a write failed: its blocks stay in memory");
        self.note_device_error(error);
    }

    /// After a failed sync nothing that was written since the last one can be trusted to be on the platter, and
    /// the sync is not tried again: a second one may succeed with the data gone. What was written since is read
    /// back past the page cache; what does not verify is forgotten; writing goes on in fresh segments.
    fn sync_failed(self: &Arc<Self>, error: &io::Error) {
        add(&self.counters.sync_failures, 1);
        let failures = self.counters.sync_failures.load(Ordering::Relaxed);
        tracing::error!(%error, path = %self.path.display(), "a sync failed: what was written since the last one is checked");
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
            tracing::error!(%error, "what was written since cannot be checked: the volume stays read-only");
        }
    }

    /// The index failed: it is closed, and opened again until that works.
    pub fn close_index(&self) {
        let mut state = self.state.lock();
        state.health.index_closed = true;
        state.health.reason = Some("the index takes no writes; it is being opened again".into());
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
            Err(error) => tracing::warn!(%error, "the index does not open yet"),
        }
    }

    /// Zeroes the first page of a frame, so that no later scan finds a block that was deleted. Whoever deleted it
    /// began a read of its segment, which ends here: the segment is not written anew before the page is.
    fn bury(self: &Arc<Self>, extent: Extent) {
        if !self.state.lock().health.takes_writes() {
            return self.state.lock().segments.end_read(extent.segment);
        }
        let store = Arc::clone(self);
        let mut transfer = Box::new(Transfer {
            direction: Direction::Write,
            offset: self.offset_of(&extent),
            memories: IoMemories::pages(AlignedBytes::zeroed(PAGE as usize)),
            tag: 0,
            done: Box::new(move |_, _| store.state.lock().segments.end_read(extent.segment)),
        });
        add(&self.counters.device_written_bytes, PAGE);
        while let Err(back) = self.volume.submit(Lane::Writeback, transfer) {
            transfer = back;
            std::thread::sleep(Duration::from_millis(1));
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
