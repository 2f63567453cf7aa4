//! The flusher: finds places for the frames of dirty blocks and queues their writes. Opens segments, and has
//! others emptied where none is free. Never waits for a sync but its segments' own.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::volume::{self, Direction, IoMemories, IoMemory, Transfer};
use kvstore_transfer::{AlignedBytes, Lane, SectionSums};
use parking_lot::MutexGuard;

use super::format::{Extent, IndexValue, PAGE, SegmentClass, SegmentHeader, event_name_of};
use super::index::IndexBatch;
use super::segments::Place;
use super::store::{Store, add};
use super::write::{Commit, Dirty, Framed, NoPlace, answer, is_no_space};

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
            state.segments.opening_failed(next);
            state.health.no_space = false;
            state.health.reason = None;
            tracing::info!(path = %self.path.display(), "the file system has room again; blocks are written again");
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
        // Also where there was disk space: what an earlier life did not use was given back.
        self.volume.file().allocate(offset, self.header.segment_bytes).map_err(|error| self.no_space(error))?;
        let opened = self.start_life(opening, offset);
        let mut state = self.state.lock();
        match opened {
            Ok(()) => state.segments.open(opening),
            Err(_) => state.segments.opening_failed(opening),
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

    fn no_space(&self, error: io::Error) -> NoPlace {
        if !is_no_space(&error) {
            add(&self.counters.io_errors, 1);
            return NoPlace::Io(error);
        }
        self.file_system_is_full();
        NoPlace::NoSpace
    }

    pub fn file_system_is_full(&self) {
        let mut state = self.state.lock();
        if !state.health.no_space {
            tracing::warn!(path = %self.path.display(), "the file system is full; until it has room, blocks are read but not written");
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
