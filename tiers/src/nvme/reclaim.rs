//! Reclaim: empties the sealed segment that is worth least, so that it can be written anew.
//!
//! Of the oldest segments the one with the least live value goes. Blocks that were read since they were
//! written move on, as far as a budget allows; pinned ones move into segments of their own, once. The rest
//! is forgotten: it is a cache. A block whose parent is nowhere any more leads nowhere: it counts nothing.
//! The budget bounds write amplification: with 15% of each segment moved, 1 / 0.85 = 1.18 bytes are written
//! for each that is admitted, however hot the blocks are.

use std::collections::HashSet;
use std::sync::Arc;

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::{AlignedBytes, Lane, volume};

use super::extents::Entry;
use super::format::{IndexValue, PAGE, SegmentClass, SegmentHeader, event_name_of};
use super::index::IndexBatch;
use super::namespaces::Standings;
use super::read::read_frame;
use super::store::{State, Store, add};
use crate::block::Digest;
use crate::caps;

/// Candidates whose blocks are looked at one by one.
const LOOKED_AT: usize = 4;
/// Free segments that are kept ready: one to go on in, one for what moves while the next is emptied.
const FREE_SEGMENTS: usize = 2;

impl Store {
    /// Empties segments until a few are free, or nothing more can be emptied.
    pub fn make_room(self: &Arc<Self>) {
        if self.index.disk_bytes() > self.index.bytes_max() / 8 * 7 {
            // Dead entries of dropped blocks: merging sheds them.
            self.index.compact();
        }
        loop {
            let (free, blocks) = {
                let state = self.state.lock();
                (state.segments.counts().free, state.extents.len() as u64)
            };
            if free >= FREE_SEGMENTS && blocks < self.blocks_max() {
                return;
            }
            // At the very least one segment must stay free for what moves.
            if free == 0 || !self.reclaim() {
                return;
            }
        }
    }

    /// Blocks that the index has room for.
    fn blocks_max(&self) -> u64 {
        self.index.bytes_max() / caps::NVME_INDEX_BYTES_PER_BLOCK
    }

    fn reclaim(self: &Arc<Self>) -> bool {
        let standings = self.standings();
        let candidates = {
            let state = self.state.lock();
            let unpinned = |segment| state.extents.segment_use(segment).pinned_pages == 0;
            // Where somebody has more than its share, what it has may be young.
            if standings.contested {
                state.segments.all_candidates(unpinned)
            } else {
                state.segments.candidates(unpinned)
            }
        };
        // A look at every block of every candidate would cost more than it saves: those with the fewest live pages.
        let mut ranked: Vec<(usize, u32)> = candidates.into_iter().enumerate().collect();
        let count = ranked.len() as u64;
        ranked.sort_by_cached_key(|(_, segment)| {
            let extents = &self.state.lock().extents;
            match standings.contested {
                true => extents.weighed_pages(*segment, |namespace| standings.of(namespace)),
                false => u64::from(extents.segment_use(*segment).pages),
            }
        });
        ranked.truncate(LOOKED_AT);
        let worth = |(rank, segment): &(usize, u32)| self.worth(*segment, *rank as u64, count, &standings);
        let Some((rank, victim)) = ranked.iter().copied().min_by_key(worth) else { return false };
        // What an older segment was spared for wears off: else it would stay for reads of long ago.
        for (_, older) in ranked.iter().filter(|(other, _)| *other < rank) {
            self.state.lock().extents.cool(*older);
        }
        self.empty(victim)
    }

    /// What would be lost or moved with a segment: twice the pages of what was read and would move; those of the
    /// rest, the less the older the segment is; none of what leads nowhere. What namespaces have beyond their shares counts less.
    fn worth(&self, segment: u32, rank: u64, count: u64, standings: &Standings) -> u64 {
        let (entries, orphans) = self.entries_and_orphans(segment);
        let weight = |entry: &Entry| match entry {
            _ if orphans.contains(&entry.digest) => 0,
            Entry { pinned: true, .. } => 4 * count,
            Entry { hits: 1.., .. } => 2 * count,
            _ => count + rank,
        };
        let pages = |entry: &Entry| standings.of(entry.namespace) * u64::from(entry.extent.pages);
        entries.iter().map(|entry| weight(entry) * pages(entry)).sum()
    }

    /// The blocks of a segment, and those of them whose parents are on no volume and on their way to none.
    fn entries_and_orphans(&self, segment: u32) -> (Vec<Entry>, HashSet<Digest>) {
        let entries = self.state.lock().extents.of_segment(segment);
        let mut orphans = HashSet::new();
        for entry in entries.iter().filter(|entry| entry.parent_tag != 0 && !entry.pinned) {
            if !self.peers.has_tag(self.header.seed, entry.parent_tag) {
                orphans.insert(entry.digest);
            }
        }
        (entries, orphans)
    }

    /// Moves what must or should stay out of a sealed segment, and forgets the rest.
    pub fn empty(self: &Arc<Self>, victim: u32) -> bool {
        let (entries, orphans) = self.entries_and_orphans(victim);
        let standings = self.standings();
        let budget = self.header.segment_bytes / 100 * caps::NVME_REINSERT_PERCENT / PAGE;
        let mut hot: Vec<&Entry> = entries
            .iter()
            .filter(|entry| entry.hits > 0 || standings.spares(entry.namespace))
            .filter(|entry| !entry.pinned && !orphans.contains(&entry.digest))
            .collect();
        // Of equals the earlier one first: it may be the other's parent, without which that leads nowhere.
        hot.sort_by_key(|entry| {
            (std::cmp::Reverse(u64::from(entry.hits) * standings.of(entry.namespace)), entry.extent.page)
        });
        let mut pages = 0;
        hot.retain(|entry| {
            pages += u64::from(entry.extent.pages);
            pages <= budget
        });
        let mut batch = IndexBatch::default();
        let mut moved: Vec<(Entry, Entry)> = Vec::new();
        for (entry, class) in entries
            .iter()
            .filter(|entry| entry.pinned)
            .map(|entry| (entry, SegmentClass::Pinned))
            .chain(hot.into_iter().map(|entry| (entry, SegmentClass::Ordinary)))
        {
            match self.move_on(entry, class) {
                Moved::To(value) => {
                    batch.put_block(entry.digest, &value);
                    moved.push((*entry, Entry { extent: value.extent, hits: entry.hits / 2, ..*entry }));
                }
                Moved::Damaged => self.quarantine(entry),
                // What is pinned stays where it is, and the segment with it.
                Moved::NoRoom if class == SegmentClass::Pinned => return self.abandon(moved),
                Moved::NoRoom => break,
            }
        }
        self.leave_segment(victim, &entries, moved, batch)
    }

    /// The segment could not be emptied: what has moved so far may stay in both places.
    fn abandon(&self, moved: Vec<(Entry, Entry)>) -> bool {
        let mut state = self.state.lock();
        for (_, to) in moved {
            state.segments.end_write(to.extent.segment);
        }
        false
    }

    fn leave_segment(
        self: &Arc<Self>,
        victim: u32,
        entries: &[Entry],
        moved: Vec<(Entry, Entry)>,
        mut batch: IndexBatch,
    ) -> bool {
        let moved_digests: HashSet<Digest> = moved.iter().map(|(from, _)| from.digest).collect();
        let dropped: Vec<&Entry> = entries.iter().filter(|entry| !moved_digests.contains(&entry.digest)).collect();
        dropped.iter().for_each(|entry| batch.delete_block(entry.digest));
        {
            let mut state = self.state.lock();
            let still = |entry: &&Entry| state.extents.get(entry.digest).filter(|now| now.extent == entry.extent);
            // Pinned while the segment was being emptied: it stays, and the segment with it.
            if dropped.iter().filter_map(still).any(|now| now.pinned) {
                drop(state);
                return self.abandon(moved);
            }
            let gone: Vec<Digest> = dropped.iter().filter_map(still).map(|now| now.digest).collect();
            for digest in gone {
                state.extents.remove(digest);
                add(&self.counters.dropped_blocks, 1);
            }
        }
        if let Err(error) = self.index.write(batch, false) {
            tracing::error!(%error, "the index cannot be written");
            self.close_index();
            return self.abandon(moved);
        }
        let mut late = Vec::new();
        let mut state = self.state.lock();
        let State { extents, segments, pins, .. } = &mut *state;
        for (from, to) in moved {
            segments.end_write(to.extent.segment);
            // Deleted, or put anew, meanwhile: the copy is dead.
            match extents.get(from.digest) {
                Some(now) if now.extent == from.extent => {
                    extents.insert(Entry { pinned: pins.holds(from.digest), ..to });
                    add(&self.counters.reinserted_blocks, 1);
                    add(&self.counters.reinserted_bytes, to.extent.bytes());
                }
                Some(_) => {}
                None => {
                    segments.begin_read(to.extent.segment);
                    late.push((from.digest, to.extent));
                }
            }
        }
        let life = segments.next_life();
        drop(state);
        self.deleted(&late);
        // Until it is opened again, a scan must not find in it what has left, and may have been deleted since.
        self.write_header(victim, life, SegmentClass::Ordinary);
        self.state.lock().segments.emptied(victim);
        add(&self.counters.reclaimed_segments, 1);
        true
    }

    fn write_header(&self, number: u32, life: u64, class: SegmentClass) {
        let header = SegmentHeader { volume_id: self.header.volume_id, number, life, class };
        add(&self.counters.device_written_bytes, PAGE);
        let page = AlignedBytes::of(&[&header.encode()]);
        if let Err(error) = volume::write_now(&*self.volume, self.segment_at(number), page) {
            tracing::warn!(%error, "an emptied segment keeps its header until it is opened again");
        }
    }

    /// Copies a frame to a new place. The write is over when this returns, and counts until the caller says so.
    fn move_on(self: &Arc<Self>, entry: &Entry, class: SegmentClass) -> Moved {
        let Ok(frame) = read_frame(self, entry, Lane::Writeback) else { return Moved::Damaged };
        let Some((header, mut pages)) = frame else { return Moved::Damaged };
        // Only segments that are ready: opening one may lead back here.
        let place = {
            let mut state = self.state.lock();
            if !state.health.takes_writes() {
                return Moved::NoRoom;
            }
            state.segments.place(class, entry.extent.pages, entry.extent.apart)
        };
        let place = match place.map_or_else(|| self.place_in_reserve(class, entry), Some) {
            Some(place) => place,
            None => return Moved::NoRoom,
        };
        let head = header.rebind(place.generation).encode();
        pages.iter_mut().zip(&head).for_each(|(to, from)| *to = *from);
        if self.write_frame(place.extent, pages).is_err() {
            self.state.lock().segments.end_write(place.extent.segment);
            return Moved::NoRoom;
        }
        Moved::To(IndexValue {
            extent: place.extent,
            generation: place.generation,
            header_crc32: FrameHeader::header_crc32(&head),
            parent_tag: entry.parent_tag,
            namespace: entry.namespace,
            // An earlier build did not note it.
            name: if entry.name == 0 { event_name_of(&header.identity) } else { entry.name },
        })
    }

    fn write_frame(&self, extent: super::format::Extent, pages: AlignedBytes) -> std::io::Result<()> {
        self.state.lock().unsynced.insert(extent.segment);
        add(&self.counters.device_written_bytes, pages.len() as u64);
        volume::write_now(&*self.volume, self.offset_of(&extent), pages)
    }

    fn place_in_reserve(self: &Arc<Self>, class: SegmentClass, entry: &Entry) -> Option<super::segments::Place> {
        self.open_reserve(class).ok()?;
        self.state.lock().segments.place(class, entry.extent.pages, entry.extent.apart)
    }
}

enum Moved {
    To(IndexValue),
    Damaged,
    NoRoom,
}
