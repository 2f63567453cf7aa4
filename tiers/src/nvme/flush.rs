//! The flusher: finds places for the frames of dirty blocks and queues their writes. Opens segments, and has
//! others emptied where none is free. Waits for no sync but its segments' own and, to get within
//! a smaller bound, one of what lies beyond it. Sleeps while there is nothing to write.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::volume::{self, Direction, IoMemories, IoMemory, Transfer};
use kvstore_transfer::{AlignedBytes, Lane, SectionSums};
use parking_lot::MutexGuard;
use tokio::sync::oneshot;

use super::format::{Extent, IndexValue, PAGE, SegmentClass, SegmentHeader, event_name_of};
use super::segments::Place;
use super::state::{State, add};
use super::store::Store;
use super::write::{Commit, Dirty, Framed, Life, NoPlace, answer, is_no_space};

/// Small frames are written together up to this many bytes.
const RUN_BYTES_MAX: usize = 1 << 20;
/// A volume that is closed waits for its last writes for so long: a disk that hangs is not waited for.
const LAST_WRITES_WITHIN: Duration = Duration::from_secs(5);
/// Between two attempts to use a full file system.
const RETRY_EVERY: Duration = Duration::from_millis(500);

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
        self.await_writes();
        let _ = self.commits.send(Commit::Stop);
    }

    /// What the device has yet to write is committed before the committer stops: it ends with a stop.
    fn await_writes(&self) {
        let until = Instant::now() + LAST_WRITES_WITHIN;
        while !self.state.lock().pending.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn next_items(self: &Arc<Self>) -> Option<Vec<Dirty>> {
        let is_small = |dirty: &Dirty| u64::from(dirty.block.length()) < FrameHeader::APART_FROM_BYTES;
        let mut queue = self.queue.lock();
        loop {
            while !queue.buried.is_empty() {
                MutexGuard::unlocked(&mut queue, || self.bury_queued());
            }
            let has_chores = !queue.unburied.is_empty() || self.has_chores();
            if has_chores && Instant::now() >= queue.chores_at && !self.is_stopping() {
                queue.chores_at = Instant::now() + RETRY_EVERY;
                return Some(Vec::new());
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
            if has_chores {
                self.queue_changed.wait_for(&mut queue, RETRY_EVERY);
            } else {
                self.queue_changed.wait(&mut queue);
            }
        }
    }

    /// Has the flusher look at what changed: it may sleep without a limit.
    pub fn wake_flusher(&self) {
        // Whoever is about to sleep holds the lock: it has slept, or sees what changed.
        drop(self.queue.lock());
        self.queue_changed.notify_all();
    }

    /// There is something to do beside writing blocks.
    fn has_chores(&self) -> bool {
        let state = self.state.lock();
        let health = &state.health;
        !health.left && (health.no_space || health.no_room || self.is_beyond_bound(&state))
    }

    fn is_beyond_bound(&self, state: &State) -> bool {
        !state.health.keeps_space && state.health.takes_writes() && state.segments.beyond_bound().0 > 0
    }

    /// What is done beside writing blocks: disk use goes down to the bound, a full file system and failed zeroing are tried again.
    fn housekeeping(self: &Arc<Self>) {
        {
            let mut queue = self.queue.lock();
            let unburied = std::mem::take(&mut queue.unburied);
            queue.buried.extend(unburied);
        }
        self.retry_space();
        self.keep_to_bound();
        self.retry_room();
    }

    /// Empties the segments that are worth least, whichever those are, until the others are within the bound.
    fn keep_to_bound(self: &Arc<Self>) {
        loop {
            let ((beyond, free), emptied) = {
                let state = self.state.lock();
                if !self.is_beyond_bound(&state) {
                    return;
                }
                (state.segments.beyond_bound(), state.segments.counts().emptied)
            };
            if self.is_stopping() {
                return;
            }
            let missing = beyond.saturating_sub(free.len());
            // What moved out of a segment is safe elsewhere before its disk space goes.
            if !free.is_empty() && !self.is_synced() || free.into_iter().any(|segment| !self.give_back(segment)) {
                return;
            }
            let going_on = match missing {
                0 => true,
                _ if missing <= emptied => self.await_emptied(),
                _ => self.reclaim(),
            };
            if !going_on {
                return;
            }
        }
    }

    /// Has all that was done before synced; true where it is.
    fn is_synced(&self) -> bool {
        let (send, receive) = oneshot::channel();
        let failures = self.state.lock().failed_syncs;
        self.commits.send(Commit::Sync(send, failures)).is_ok() && receive.blocking_recv() == Ok(true)
    }

    fn give_back(&self, segment: u32) -> bool {
        let punched = self.volume.file().punch(self.segment_at(segment), self.header.segment_bytes);
        let mut state = self.state.lock();
        if let Err(error) = punched {
            tracing::warn!(%error, path = %self.path.display(), "disk space beyond nvme.bytes cannot be given back to the file system");
            state.health.keeps_space = true;
            return false;
        }
        state.segments.given_back(segment);
        state.owed.give_back(segment);
        drop(state);
        self.wake_committer();
        true
    }

    /// Whether the file system has room again: a segment's worth of it.
    fn retry_space(&self) {
        let (next, is_absent) = {
            let mut state = self.state.lock();
            if !state.health.no_space {
                return;
            }
            let next = state.segments.next_free(SegmentClass::Ordinary);
            (next, next.is_some_and(|next| state.segments.is_absent(next.segment)))
        };
        // A try that fails would take, for a moment, what the index lives on.
        let wanted = self.index.reserve_lacks() + if is_absent { self.header.segment_bytes } else { 0 };
        if self.volume.file().room().is_ok_and(|room| room < wanted) {
            return;
        }
        // The index first: what it takes is what makes room. Where all of the bound has its disk space, no more is needed.
        if !self.index.take_reserve() {
            return;
        }
        let room = next.is_none_or(|next| self.allocate(next.segment).is_ok());
        if room {
            let mut state = self.state.lock();
            next.into_iter().for_each(|next| state.segments.opening_failed(next));
            state.health.no_space = false;
            tracing::info!(path = %self.path.display(), "the file system has room again; blocks are written again");
        }
    }

    /// Whether a segment can be freed again.
    fn retry_room(self: &Arc<Self>) {
        let tries = {
            let state = self.state.lock();
            state.health.no_room && state.health.takes_writes()
        };
        if tries {
            self.make_room();
            let mut state = self.state.lock();
            state.health.no_room = state.segments.counts().free == 0;
        }
    }

    fn write_items(self: &Arc<Self>, items: Vec<Dirty>) {
        let mut run = Run::default();
        for mut dirty in items {
            let Some(header) = header_of(&mut dirty) else {
                self.refuse(dirty, &NoPlace::Unreadable);
                continue;
            };
            let apart = header.payload_bytes() >= FrameHeader::APART_FROM_BYTES;
            let pages = (header.frame_bytes() / PAGE) as u32;
            let pinned = self.state.lock().pins.holds(dirty.digest);
            let class = if pinned { SegmentClass::Pinned } else { SegmentClass::Ordinary };
            self.keep_within_bound(&dirty.identity.namespace_digest, header.frame_bytes());
            let place = match self.place(class, pages, apart) {
                Ok(place) => place,
                Err(problem) => {
                    self.refuse(dirty, &problem);
                    continue;
                }
            };
            let head = header.rebind(place.generation).encode();
            let namespace = self.state.lock().namespace_number(&dirty.identity.namespace_digest);
            let value = IndexValue {
                extent: place.extent,
                generation: place.generation,
                header_crc32: FrameHeader::header_crc32(&head),
                parent_tag: dirty.parent_tag,
                namespace,
                name: event_name_of(&dirty.identity),
            };
            let Some(bytes) = dirty.block.bytes() else {
                self.state.lock().segments.end_write(place.extent.segment);
                self.refuse(dirty, &NoPlace::Unreadable);
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
        while let Err(back) = self.volume.submit(Lane::Background, transfer) {
            transfer = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A block will not be written.
    pub fn refuse(&self, dirty: Dirty, problem: &NoPlace) {
        match problem {
            NoPlace::Io(error) => tracing::warn!(%error, "a block was not written"),
            NoPlace::TooLarge => self.note_too_large(&dirty),
            NoPlace::NoRoom => self.note_no_room(),
            NoPlace::Unreadable | NoPlace::NoWrites => {}
        }
        add(&self.counters.refused_blocks, 1);
        let pending = self.state.lock().pending.remove(dirty.digest);
        drop(dirty);
        answer(pending, false);
        self.peers.cleaned.notify_waiters();
    }

    /// Said once: blocks of this size never go to this volume.
    fn note_too_large(&self, dirty: &Dirty) {
        let bytes = u64::from(dirty.block.length());
        let mut state = self.state.lock();
        let first = state.health.too_large.is_none();
        state.health.too_large = Some(state.health.too_large.map_or(bytes, |known| known.min(bytes)));
        drop(state);
        if first {
            tracing::warn!(
                path = %self.path.display(), bytes, most = self.block_bytes_max(),
                "a block is too large for a segment of this volume: it stays in memory alone, and so do all of its size"
            );
        }
    }

    /// Said once, until there is room again.
    fn note_no_room(&self) {
        let mut state = self.state.lock();
        if state.health.rebuilding > 0 || std::mem::replace(&mut state.health.no_room, true) {
            return;
        }
        let reason = state.no_room_reason(self.header.segment_bytes);
        drop(state);
        tracing::warn!(path = %self.path.display(), reason, "the volume takes no blocks for now");
    }

    /// Bytes of the largest block that fits a segment.
    pub fn block_bytes_max(&self) -> u64 {
        // The segment's header, and the frame's.
        self.header.segment_bytes - 2 * PAGE
    }

    /// A place for a frame; opens segments, and empties others, as needed.
    pub fn place(self: &Arc<Self>, class: SegmentClass, pages: u32, apart: bool) -> Result<Place, NoPlace> {
        loop {
            {
                let mut state = self.state.lock();
                if !state.health.takes_writes() {
                    return Err(NoPlace::NoWrites);
                }
                if pages > state.segments.usable_pages() {
                    return Err(NoPlace::TooLarge);
                }
                if let Some(place) = state.segments.place(class, pages, apart) {
                    state.unsynced.insert(place.extent.segment);
                    state.health.no_room = false;
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
        // Also where there was disk space: what an earlier life did not use was given back.
        self.allocate(opening.segment).map_err(|error| self.no_space(error))?;
        let opened = self.start_life(opening, offset);
        let mut state = self.state.lock();
        match opened {
            Ok(()) => {
                state.suspects.remove(&opening.segment);
                if state.unread.remove(&opening.segment) && state.unread.is_empty() && state.health.rebuilding == 0 {
                    state.unbury_all();
                }
                state.segments.open(opening);
            }
            Err(_) => state.segments.opening_failed(opening),
        }
        opened
    }

    /// Takes the disk space of a segment that holds nothing. A part of it, which a full file system may have given, is given back.
    fn allocate(&self, segment: u32) -> io::Result<()> {
        let (offset, bytes) = (self.segment_at(segment), self.header.segment_bytes);
        let is_absent = self.state.lock().segments.is_absent(segment);
        self.volume.file().allocate(offset, bytes).inspect_err(|_| {
            if is_absent {
                let _ = self.volume.file().punch(offset, bytes);
            }
        })
    }

    /// What the segment held is gone for good before it is written anew: blocks that moved out of it are
    /// synced, and the index knows that a new life began.
    fn start_life(self: &Arc<Self>, opening: super::segments::Opening, offset: u64) -> Result<(), NoPlace> {
        let super::segments::Opening { segment, life, class } = opening;
        self.state.lock().owed.begin_life(segment);
        if !self.ask(|done| Commit::Life(Life { segment, life, class }, done)) {
            return Err(NoPlace::NoWrites);
        }
        let header = SegmentHeader { volume_id: self.header.volume_id, number: segment, life, class };
        add(&self.counters.device_written_bytes, PAGE);
        volume::write_now(&*self.volume, offset, AlignedBytes::of(&[&header.encode()]))
            .map_err(|error| self.no_space(error))
    }

    /// Zeroes what is to be zeroed.
    pub fn bury_queued(self: &Arc<Self>) {
        loop {
            let next = self.queue.lock().buried.pop_front();
            let Some(extent) = next else { return };
            if !self.bury(extent) {
                self.queue.lock().unburied.push(extent);
            }
        }
    }

    /// Zeroes the first page of a frame, so that no later scan finds a block that was deleted. Whoever deleted it
    /// began a read of its segment, which ends here: the segment is not written anew before the page is. False where the volume
    /// takes no writes at all: then the read goes on.
    fn bury(self: &Arc<Self>, extent: Extent) -> bool {
        {
            let mut state = self.state.lock();
            if state.health.left {
                state.segments.end_read(extent.segment);
                return true;
            }
            if state.health.read_only {
                return false;
            }
        }
        let store = Arc::clone(self);
        let mut transfer = Box::new(Transfer {
            direction: Direction::Write,
            offset: self.offset_of(&extent),
            memories: IoMemories::pages(AlignedBytes::zeroed(PAGE as usize)),
            tag: 0,
            done: Box::new(move |result, _| {
                if let Err(error) = result {
                    // It is tried again twice a second: only counted, so that one bad page does not cost the volume.
                    add(&store.counters.io_errors, 1);
                    tracing::debug!(%error, "the header of a deleted block cannot be zeroed yet");
                    store.queue.lock().unburied.push(extent);
                    store.queue_changed.notify_one();
                } else {
                    store.state.lock().segments.end_read(extent.segment);
                }
            }),
        });
        add(&self.counters.device_written_bytes, PAGE);
        while let Err(back) = self.volume.submit(Lane::Background, transfer) {
            transfer = back;
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    fn no_space(&self, error: io::Error) -> NoPlace {
        if !is_no_space(&error) {
            add(&self.counters.io_errors, 1);
            self.note_device_error(&error);
            return NoPlace::Io(error);
        }
        self.file_system_is_full();
        NoPlace::NoWrites
    }

    pub fn file_system_is_full(&self) {
        let mut state = self.state.lock();
        if !state.health.no_space {
            tracing::warn!(path = %self.path.display(), "the file system is full; until it has room, blocks are read but not written");
            state.health.no_space = true;
            drop(state);
            self.wake_flusher();
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
