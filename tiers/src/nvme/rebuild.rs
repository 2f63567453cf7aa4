//! Finding blocks again from their frames: after the index was lost, and after a sync failed.

use std::collections::HashSet;
use std::sync::Arc;

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::{AlignedBytes, Lane, volume};

use super::NvmeOptions;
use super::extents::Entry;
use super::format::{Extent, IndexValue, PAGE, SegmentClass, SegmentHeader, event_name_of, life_of};
use super::index::IndexBatch;
use super::read::read_frame;
use super::store::{Store, add};
use crate::block::Digest;

/// Bytes that one read of a scan takes: the headers of small frames come many at a time.
const WINDOW_BYTES: u64 = 64 << 10;
/// Index entries that are written together.
const BATCH_BLOCKS: usize = 4096;

impl Store {
    /// Scans every segment whose blocks are unknown. What is found is served as it is found.
    pub fn rebuild(self: &Arc<Self>, options: &NvmeOptions) {
        let unknown = self.state.lock().segments.unknown();
        if unknown.is_empty() {
            return;
        }
        let mut batch = IndexBatch::default();
        for (id, record) in self.state.lock().pins.records(&options.boot_id, options.now) {
            batch.put_pin(id, &record);
        }
        if let Err(error) = self.index.write(batch, false) {
            tracing::error!(%error, "pins cannot be written to the index; they are kept in memory only");
        }
        for segment in unknown {
            if self.is_stopping() {
                return;
            }
            let class = self.scan(segment);
            let mut state = self.state.lock();
            state.segments.scanned(segment, class);
            state.health.rebuilding = state.health.rebuilding.saturating_sub(1);
        }
        let mut state = self.state.lock();
        state.health.rebuilding = 0;
        state.health.reason = None;
        tracing::info!(path = %self.path.display(), blocks = state.extents.len(), "the index is complete again");
    }

    /// Finds the frames of one segment, from header to header; where a header is damaged, page by page until
    /// the next.
    fn scan(self: &Arc<Self>, segment: u32) -> SegmentClass {
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
        self.take_found(segment, life.unwrap_or(0), class, found);
        class
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

    fn take_found(&self, segment: u32, life: u64, class: SegmentClass, found: Vec<(Entry, IndexValue)>) {
        let mut batch = IndexBatch::default();
        batch.put_segment(segment, life, class);
        for found in found.chunks(BATCH_BLOCKS) {
            let mut state = self.state.lock();
            state.segments.restore(segment, life, class, false);
            state.numbers.save(&mut batch);
            for (entry, value) in found {
                // The same block twice: it moved. The later copy counts, in the map and in the index.
                let newer = state.extents.get(entry.digest).is_none_or(|known| {
                    state.segments.life(known.extent.segment).unwrap_or(0) < life || known.extent.segment == segment
                });
                if newer && !state.pending.get(entry.digest).is_some_and(|pending| pending.cancelled) {
                    let pinned = state.pins.holds(entry.digest);
                    state.extents.insert(Entry { pinned, ..*entry });
                    batch.put_block(entry.digest, value);
                }
            }
            drop(state);
            if let Err(error) = self.index.write(std::mem::take(&mut batch), false) {
                tracing::warn!(%error, "blocks that were found are served, but cannot be written to the index yet");
            }
        }
        if !batch.is_empty()
            && let Err(error) = self.index.write(batch, false)
        {
            tracing::warn!(%error, "a scanned segment cannot be written to the index yet");
        }
    }

    /// After a failed sync: reads back what was written since the last good one, past the page cache, and
    /// forgets what does not verify. Then writing goes on, in fresh segments.
    pub fn check_unsynced(self: &Arc<Self>) {
        let suspects: HashSet<u32> = self.state.lock().unsynced.clone();
        let mut lost = 0u64;
        for segment in suspects {
            let entries = self.state.lock().extents.of_segment(segment);
            for entry in entries {
                if self.is_stopping() {
                    return;
                }
                if self.begin_read(entry.digest).is_some_and(|now| {
                    let sound = matches!(read_frame(self, &now, Lane::Prefetch), Ok(Some(_)));
                    self.end_read(&now);
                    !sound
                }) {
                    lost += 1;
                    add(&self.counters.corrupt_blocks, 1);
                    self.forget(&entry);
                }
            }
        }
        let mut state = self.state.lock();
        state.unsynced.clear();
        state.health.checking = false;
        if !state.health.read_only {
            state.health.reason = None;
        }
        drop(state);
        tracing::warn!(path = %self.path.display(), lost, "the blocks written before the failed sync have been checked");
    }
}
