//! Finding blocks again from their frames: after the index was lost.

use std::sync::Arc;
use std::time::Duration;

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::{AlignedBytes, Lane, volume};

use super::extents::Entry;
use super::format::{Extent, IndexValue, PAGE, SegmentClass, SegmentHeader, event_name_of, life_of};
use super::state::add;
use super::store::Store;
use super::write::{Commit, Found};
use crate::block::Digest;

/// Bytes that one read of a scan takes: the headers of small frames come many at a time.
const WINDOW_BYTES: u64 = 64 << 10;
/// Index entries that are written together.
const BATCH_BLOCKS: usize = 4096;
/// What the index did not take is scanned again after this long.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
/// A segment that could not be read in full is scanned so many times; then the next start does it.
const READ_PASSES: u32 = 3;
/// Reads of a segment that may fail before the rest of it is left to the next scan: each may take seconds.
const FAILED_READS_MAX: u32 = 16;

/// What came of the scan of a segment.
enum Scanned {
    /// The index has all of it.
    Whole(SegmentClass),
    /// The index did not take it.
    NotTaken,
    /// Something of it could not be read. What could be is served.
    Unread(SegmentClass),
}

impl Store {
    /// Scans every segment whose blocks are unknown. What is found is served as it is found. A segment stays unknown until the index
    /// has all that was found in it, so that a later start scans it again: those that it does not take are scanned again, up to
    /// `passes_max` times.
    pub fn rebuild(self: &Arc<Self>, passes_max: u32) {
        for pass in 0..passes_max {
            let unknown = self.state.lock().segments.unknown();
            for segment in unknown {
                if self.is_stopping() {
                    return;
                }
                let scanned = self.scan(segment);
                let mut state = self.state.lock();
                match scanned {
                    Scanned::Whole(class) => state.segments.scanned(segment, class),
                    Scanned::Unread(class) if pass + 1 >= READ_PASSES => {
                        tracing::error!(path = %self.path.display(), segment, "a segment cannot be read in full: blocks in it are not found before a restart");
                        state.unread.insert(segment);
                        state.segments.scanned(segment, class);
                    }
                    Scanned::Unread(_) | Scanned::NotTaken => {}
                }
                // Only the end of the scan makes it 0, below.
                state.health.rebuilding = state.segments.counts().unknown.max(1);
            }
            if self.state.lock().segments.counts().unknown == 0 {
                return self.end_rebuild();
            }
            if pass == 0 {
                tracing::warn!(path = %self.path.display(), "blocks that were found are served, but cannot be written to the index yet");
            }
            if !self.await_index() {
                return;
            }
        }
    }

    /// Waits until the index may take something again; false where the volume ends before.
    fn await_index(&self) -> bool {
        loop {
            std::thread::sleep(AGAIN_AFTER);
            if self.is_stopping() {
                return false;
            }
            let state = self.state.lock();
            if state.health.left || state.health.index_given_up.is_some() {
                return false;
            }
            if !state.health.index_closed {
                return true;
            }
        }
    }

    fn end_rebuild(&self) {
        let mut state = self.state.lock();
        state.health.rebuilding = 0;
        if state.unread.is_empty() {
            state.unbury_all();
        }
        tracing::info!(path = %self.path.display(), blocks = state.extents.len(), "the index is complete again");
        drop(state);
        self.wake_committer();
    }

    /// Finds the frames of one segment, from header to header; where a header is damaged, page by page until
    /// the next.
    fn scan(self: &Arc<Self>, segment: u32) -> Scanned {
        let pages = (self.header.segment_bytes / PAGE) as u32;
        let mut failed = 0;
        let first = self.window(segment, 0, PAGE, &mut failed);
        if failed > 0 {
            // Nothing says which of its frames are of its life.
            return Scanned::Unread(SegmentClass::Ordinary);
        }
        let header = first.and_then(|page| SegmentHeader::decode(&page).ok());
        let known = header.filter(|header| header.volume_id == self.header.volume_id && header.number == segment);
        // Without a header of its own, the life of the frames that follow each other from its start.
        let mut life = known.map(|header| header.life);
        let class = known.map_or(SegmentClass::Ordinary, |header| header.class);
        let mut found: Vec<(Entry, IndexValue)> = Vec::new();
        let mut page = 1;
        let mut window: Option<(u32, AlignedBytes)> = None;
        while page < pages {
            let failed_before = failed;
            let inside = |from: u32, bytes: &AlignedBytes| {
                page >= from && u64::from(page - from) * PAGE + PAGE <= bytes.len() as u64
            };
            if !window.as_ref().is_some_and(|(from, bytes)| inside(*from, bytes)) {
                // Where something could not be read, page by page.
                let most = if failed == 0 { WINDOW_BYTES } else { PAGE };
                let bytes = most.min(u64::from(pages - page) * PAGE);
                window = self.window(segment, page, bytes, &mut failed).map(|bytes| (page, bytes));
            }
            let Some((from, bytes)) = &window else {
                if failed > FAILED_READS_MAX {
                    break;
                }
                page += u32::from(failed_before > 0 || failed == 0);
                continue;
            };
            let at = (u64::from(page - from) * PAGE) as usize;
            let frame = bytes.get(at..).and_then(|bytes| FrameHeader::decode(bytes).ok());
            let Some(frame) = frame else {
                if known.is_none() {
                    // Nothing vouches for what lies further on: it may be the inside of a block.
                    break;
                }
                page += 1;
                continue;
            };
            let frame_pages = (frame.frame_bytes() / PAGE) as u32;
            let apart = frame.payload_bytes() >= FrameHeader::APART_FROM_BYTES;
            let extent = Extent { segment, page, pages: frame_pages, apart };
            let frame_life = life_of(frame.generation);
            life = life.or(Some(frame_life));
            if life == Some(frame_life) && page + frame_pages <= pages {
                found.push(self.found(&frame, extent, bytes.get(at..).unwrap_or_default()));
                page += frame_pages;
            } else {
                page += 1;
            }
        }
        // A segment that is not in the index is scanned at the next start.
        let taken = self.tell_found(segment, life.unwrap_or(0), class, found, failed == 0);
        match (failed, taken) {
            (0, true) => Scanned::Whole(class),
            (_, false) => Scanned::NotTaken,
            _ => Scanned::Unread(class),
        }
    }

    /// Tells the committer what was found; true where the index has all of it.
    fn tell_found(
        &self,
        segment: u32,
        life: u64,
        class: SegmentClass,
        found: Vec<(Entry, IndexValue)>,
        whole: bool,
    ) -> bool {
        let mut taken = true;
        let mut found = found.into_iter().peekable();
        loop {
            let blocks: Vec<_> = found.by_ref().take(BATCH_BLOCKS).collect();
            let last = found.peek().is_none();
            // The segment itself only where the index has all blocks before.
            let part = Found { segment, life, class, blocks, last: last && taken && whole };
            taken &= self.ask(|done| Commit::Found(part, done));
            if last {
                return taken;
            }
        }
    }

    /// Pages of a segment; `None`, and one more in `failed`, where they cannot be read just now.
    fn window(&self, segment: u32, page: u32, bytes: u64, failed: &mut u32) -> Option<AlignedBytes> {
        let offset = self.segment_at(segment) + u64::from(page) * PAGE;
        match volume::read_now(&*self.volume, Lane::Prefetch, offset, bytes as usize) {
            Ok(bytes) => Some(bytes),
            // A file that was cut off has nothing there.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => None,
            Err(error) => {
                add(&self.counters.io_errors, 1);
                *failed += 1;
                tracing::warn!(%error, path = %self.path.display(), segment, page, "a part of a segment cannot be scanned for now");
                if *failed == 1 {
                    self.note_device_error(&error);
                }
                None
            }
        }
    }

    fn found(&self, frame: &FrameHeader, extent: Extent, encoded: &[u8]) -> (Entry, IndexValue) {
        let digest = Digest::of_frame(self.header.seed, &frame.identity);
        let parent_tag = Digest::parent_tag(self.header.seed, &frame.identity);
        let header_crc32 = FrameHeader::header_crc32(encoded);
        let (namespace, used) = {
            let mut state = self.state.lock();
            (state.namespace_number(&frame.identity.namespace_digest), state.second)
        };
        let name = event_name_of(&frame.identity);
        let entry = Entry { digest, parent_tag, extent, hits: 0, pinned: false, namespace, used, name };
        (entry, IndexValue { extent, generation: frame.generation, header_crc32, parent_tag, namespace, name })
    }
}
