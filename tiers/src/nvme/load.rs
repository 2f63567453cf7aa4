//! The start of a volume: what its index says goes into memory. What a damaged index lost is marked, to be found again from the
//! frames; an index that cannot be written just now is read, and opened to be written later.

use kvstore_transfer::{AlignedBytes, Lane, volume};

use super::NvmeOptions;
use super::batch::{IndexBatch, IndexItem};
use super::extents::Entry;
use super::format::{IndexValue, PAGE, SegmentClass, SegmentHeader, life_of};
use super::index::{IndexError, IndexFound};
use super::state::{State, add};
use super::store::{OpenError, Store};

/// What was read of the index.
#[derive(Default)]
struct Loaded {
    /// Entries that a new life of their segment has fenced off.
    stale: IndexBatch,
    stale_blocks: u64,
}

impl Store {
    /// Reads the index into memory. Where it is damaged, it is begun anew, with what could be read of it, and what has to be scanned
    /// is marked. Where it cannot be read, the volume has left.
    pub fn take_index(&self, found: IndexFound, present: usize, options: &NvmeOptions) {
        let mut loaded = Loaded::default();
        let read = self.load(options, &mut loaded);
        add(&self.counters.stale_blocks, loaded.stale_blocks);
        self.state.lock().extents.follow(std::sync::Arc::clone(&self.peers.changes));
        match (found, read) {
            (IndexFound::Unread(error), _) => return self.leave_unread(error),
            (IndexFound::Damaged(damage), _) => self.prepare_rebuild(&damage, present, options),
            (_, Err(error)) if error.is_environment() => return self.leave_unread(error),
            (_, Err(damage)) => self.prepare_rebuild(&damage, present, options),
            (IndexFound::Closed(error), Ok(())) => {
                self.index.close();
                self.close_index(&error);
            }
            (IndexFound::Whole, Ok(())) => {
                if !loaded.stale.is_empty()
                    && let Err(error) = self.index.write(loaded.stale, false)
                {
                    tracing::warn!(%error, "stale entries cannot be removed from the index");
                }
            }
        }
        if self.index.is_on_reserve() {
            self.file_system_is_full();
        }
        self.find_unknown(present);
    }

    /// The index cannot be read, and may be whole: what the volume has is left alone, for a start at which it can.
    fn leave_unread(&self, error: IndexError) {
        self.index.close();
        let why = OpenError::IndexUnread(error).to_string();
        {
            let mut state = self.state.lock();
            state.health.index_closed = true;
            state.health.index_given_up = Some(why.clone());
        }
        self.leave(why);
    }

    /// Reads the index. What could be read before an error is kept.
    fn load(&self, options: &NvmeOptions, loaded: &mut Loaded) -> Result<(), IndexError> {
        let mut state = self.state.lock();
        let State { extents, segments, pins, numbers, suspects, buried, unsynced, .. } = &mut *state;
        let mut result = self.index.load(b's', |item| {
            if let IndexItem::Segment(segment, life, class) = item {
                segments.restore(segment, life, class, true);
                // The life before this one may have ended between its writes and their sync, and the index's log has them.
                unsynced.insert(segment);
            }
        });
        result = result.and(self.index.load(b'p', |item| {
            if let IndexItem::Pin(id, record) = item {
                pins.restore(id, record, &options.boot_id, options.now);
            }
        }));
        result = result.and(self.index.load(b'n', |item| {
            if let IndexItem::Namespace(number, digest) = item {
                numbers.restore(number, digest);
                extents.name_namespace(number, &digest);
            }
        }));
        result = result.and(self.index.load(b't', |item| {
            if let IndexItem::Suspect(segment) = item {
                suspects.insert(segment);
            }
        }));
        result = result.and(self.index.load(b'd', |item| {
            if let IndexItem::Buried(digest) = item {
                buried.insert(digest);
            }
        }));
        result.and(self.index.load(b'b', |item| {
            let IndexItem::Block(digest, value) = item else { return };
            // Fenced off: the segment has begun another life since.
            let current = segments.life(value.extent.segment) == Some(life_of(value.generation));
            if !current || !segments.holds(&value.extent) {
                loaded.stale.delete_block(digest);
                loaded.stale_blocks += 1;
                return;
            }
            let pinned = pins.holds(digest);
            let IndexValue { extent, parent_tag, namespace, name, .. } = value;
            extents.insert(Entry { digest, parent_tag, extent, hits: 0, pinned, namespace, used: 0, name });
        }))
    }

    /// The index is damaged: starts it anew and marks what has to be scanned. What could be read of it is written again.
    fn prepare_rebuild(&self, damage: &IndexError, present: usize, options: &NvmeOptions) {
        tracing::error!(%damage, path = %self.path.display(), "the index is damaged; the blocks that it still names are served, and a scan finds the others");
        add(&self.counters.index_rebuilds, 1);
        let mut kept = IndexBatch::default();
        {
            let mut state = self.state.lock();
            state.health.reason = Some(format!("{damage}; a scan is finding the blocks again"));
            state.numbers.save_again();
            for (id, record) in state.pins.records(&options.boot_id, options.now) {
                kept.put_pin(id, &record);
            }
            state.suspects.iter().for_each(|segment| kept.put_suspect(*segment));
            state.buried.iter().for_each(|digest| kept.put_buried(*digest));
        }
        // The index has all that is kept before it has anything else: none of it is owed.
        if let Err(error) = self.index.recreate(kept) {
            self.close_index(&error);
        }
        for segment in 0..present as u32 {
            self.mark_unknown(segment);
        }
    }

    /// Segments of which the index knows nothing, and which hold something all the same: it was being built again when an earlier
    /// daemon ended. They are to be scanned.
    fn find_unknown(&self, present: usize) {
        for segment in 0..present as u32 {
            let absent = self.state.lock().segments.is_absent(segment);
            if absent && self.first_page(segment).is_none_or(|page| page.iter().any(|byte| *byte != 0)) {
                self.mark_unknown(segment);
            }
        }
        let mut state = self.state.lock();
        state.health.rebuilding = state.segments.unknown().len();
        if state.health.rebuilding == 0 {
            let State { owed, buried, .. } = &mut *state;
            owed.unbury(buried.drain());
        }
    }

    fn first_page(&self, segment: u32) -> Option<AlignedBytes> {
        volume::read_now(&*self.volume, Lane::Prefetch, self.segment_at(segment), PAGE as usize).ok()
    }

    fn mark_unknown(&self, segment: u32) {
        let header = self.first_page(segment).and_then(|page| SegmentHeader::decode(&page).ok());
        let ours = header.filter(|header| header.volume_id == self.header.volume_id && header.number == segment);
        let mut state = self.state.lock();
        let known = state.segments.life(segment).unwrap_or(0);
        // Where its header is damaged, what the index knew; where that is nothing, the frames in it say: see rebuild::scan.
        let (life, class) = ours.map_or((known, SegmentClass::Ordinary), |header| (header.life, header.class));
        if life != known {
            // What the index names there has left: its newer entries are among what it lost.
            for entry in state.extents.of_segment(segment) {
                state.extents.remove(entry.digest);
            }
        }
        state.segments.restore(segment, life, class, false);
    }
}
