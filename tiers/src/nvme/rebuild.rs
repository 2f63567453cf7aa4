//! Finding blocks again from their frames: after the index was lost.

use std::sync::Arc;
use std::time::Duration;

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::{AlignedBytes, Lane, volume};

use super::extents::Entry;
use super::format::{Extent, IndexValue, PAGE, SegmentClass, SegmentHeader, event_name_of, life_of};
use super::state::State;
use super::store::Store;
use super::write::{Commit, Found};
use crate::block::Digest;

/// Bytes that one read of a scan takes: the headers of small frames come many at a time.
const WINDOW_BYTES: u64 = 64 << 10;
/// Index entries that are written together.
const BATCH_BLOCKS: usize = 4096;
/// What the index did not take is scanned again after this long.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

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
                if let Some(class) = self.scan(segment) {
                    let mut state = self.state.lock();
                    state.segments.scanned(segment, class);
                    // Only the end of the scan makes it 0, below.
                    state.health.rebuilding = state.segments.counts().unknown.max(1);
                }
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
            if self.is_stopping() || self.state.lock().health.left {
                return false;
            }
            if !self.state.lock().health.index_closed {
                return true;
            }
        }
    }

    fn end_rebuild(&self) {
        let mut state = self.state.lock();
        state.health.rebuilding = 0;
        state.forgets_deletions = false;
        let State { owed, buried, .. } = &mut *state;
        owed.unbury(buried.drain());
        tracing::info!(path = %self.path.display(), blocks = state.extents.len(), "the index is complete again");
        drop(state);
        self.wake_committer();
    }

    /// Finds the frames of one segment, from header to header; where a header is damaged, page by page until
    /// the next. Its class, once the index has all of them.
    fn scan(self: &Arc<Self>, segment: u32) -> Option<SegmentClass> {
        let pages = (self.header.segment_bytes / PAGE) as u32;
        let header = self.window(segment, 0, PAGE).and_then(|page| SegmentHeader::decode(&page).ok());
        let known = header.filter(|header| header.volume_id == self.header.volume_id && header.number == segment);
        // Without a header of its own, the life of the frames that follow each other from its start.
        let mut life = known.map(|header| header.life);
        let class = known.map_or(SegmentClass::Ordinary, |header| header.class);
        let mut found: Vec<(Entry, IndexValue)> = Vec::new();
        let mut page = 1;
        let mut window: Option<(u32, AlignedBytes)> = None;
        while page < pages {
            let inside = |from: u32, bytes: &AlignedBytes| {
                page >= from && u64::from(page - from) * PAGE + PAGE <= bytes.len() as u64
            };
            if !window.as_ref().is_some_and(|(from, bytes)| inside(*from, bytes)) {
                let bytes = WINDOW_BYTES.min(u64::from(pages - page) * PAGE);
                window = self.window(segment, page, bytes).map(|bytes| (page, bytes));
            }
            let Some((from, bytes)) = &window else {
                page += 1;
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
        self.tell_found(segment, life.unwrap_or(0), class, found).then_some(class)
    }

    /// Tells the committer what was found; true where the index has all of it.
    fn tell_found(&self, segment: u32, life: u64, class: SegmentClass, found: Vec<(Entry, IndexValue)>) -> bool {
        let mut taken = true;
        let mut found = found.into_iter().peekable();
        loop {
            let blocks: Vec<_> = found.by_ref().take(BATCH_BLOCKS).collect();
            let last = found.peek().is_none();
            // The segment itself only where the index has all blocks before.
            let part = Found { segment, life, class, blocks, last: last && taken };
            taken &= self.ask(|done| Commit::Found(part, done));
            if last {
                return taken;
            }
        }
    }

    fn window(&self, segment: u32, page: u32, bytes: u64) -> Option<AlignedBytes> {
        let offset = self.segment_at(segment) + u64::from(page) * PAGE;
        volume::read_now(&*self.volume, Lane::Prefetch, offset, bytes as usize).ok()
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
