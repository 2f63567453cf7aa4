//! Reclaim: empties the sealed segment that is worth least, so that it can be written anew.
//!
//! Of the oldest segments the one with the least live value goes. Blocks that were read since they were
//! written move on, as far as a budget allows; pinned ones move into segments of their own, once. The rest
//! is forgotten: it is a cache. A block whose parent is nowhere any more leads nowhere: it counts nothing.
//! The budget bounds write amplification: with 15% of each segment moved, 1 / 0.85 = 1.18 bytes are written
//! for each that is admitted, however hot the blocks are.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::{AlignedBytes, Lane, volume};

use super::extents::Entry;
use super::format::{Extent, IndexValue, PAGE, SegmentClass, SegmentHeader, event_name_of};
use super::namespaces::Standings;
use super::state::add;
use super::store::Store;
use super::write::{Commit, Move};
use crate::block::Digest;
use crate::caps;

/// Candidates whose blocks are looked at one by one.
const LOOKED_AT: usize = 4;
/// Free segments that are kept ready: one to go on in, one for what moves while the next is emptied.
const FREE_SEGMENTS: usize = 2;
/// ... of this many: on a small volume one must do.
const SEGMENTS_PER_FREE: usize = 4;

/// Reads and writes of what an emptied segment held are waited for this long.
const EMPTIED_WITHIN: Duration = Duration::from_millis(250);

impl Store {
    /// Empties segments until a few are free, or nothing more can be emptied.
    pub fn make_room(self: &Arc<Self>) {
        if self.index.disk_bytes() > self.index.bytes_max() / 8 * 7 {
            // Dead entries of dropped blocks: merging sheds them.
            self.index.compact();
        }
        // Emptied segments that somebody reads for longer: others are needed in their place.
        let mut stuck = 0;
        loop {
            let (counts, wanted, blocks) = {
                let state = self.state.lock();
                // A small volume has few segments to spare.
                let wanted = (state.segments.allowed() / SEGMENTS_PER_FREE).clamp(1, FREE_SEGMENTS);
                (state.segments.counts(), wanted, state.extents.len() as u64)
            };
            stuck = counts.emptied.min(stuck);
            let enough = counts.soon >= wanted + stuck;
            if !(enough && blocks < self.blocks_max()) && self.reclaim() {
                continue;
            }
            if counts.free > 0 || counts.emptied == 0 {
                return;
            }
            if !self.await_emptied() {
                if !enough || !self.state.lock().health.takes_writes() {
                    return;
                }
                stuck = counts.emptied;
            }
        }
    }

    /// Waits until an emptied segment is free: what is to be zeroed in it is zeroed here, because nobody else would. False where
    /// that takes long.
    pub fn await_emptied(self: &Arc<Self>) -> bool {
        let until = Instant::now() + EMPTIED_WITHIN;
        let before = self.state.lock().segments.counts().emptied;
        loop {
            self.bury_queued();
            {
                let state = self.state.lock();
                if state.segments.counts().emptied < before {
                    return true;
                }
                if !state.health.takes_writes() || Instant::now() >= until {
                    return false;
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Blocks that the index has room for.
    fn blocks_max(&self) -> u64 {
        self.index.bytes_max() / caps::NVME_INDEX_BYTES_PER_BLOCK
    }

    /// Empties one segment; false where none can be.
    pub fn reclaim(self: &Arc<Self>) -> bool {
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
        if let Some((rank, victim)) = ranked.iter().copied().min_by_key(worth) {
            // What an older segment was spared for wears off: else it would stay for reads of long ago.
            for (_, older) in ranked.iter().filter(|(other, _)| *other < rank) {
                self.state.lock().extents.cool(*older);
            }
            if self.empty(victim) {
                return true;
            }
        }
        self.reclaim_around_pins()
    }

    /// Where what is pinned stands in the way: a segment with nothing pinned in it, or with little that can move together.
    fn reclaim_around_pins(self: &Arc<Self>) -> bool {
        let candidates = {
            let state = self.state.lock();
            let half = state.segments.usable_pages() / 2;
            let all = state.segments.all_candidates(|_| true).into_iter();
            let mut few: Vec<(u32, u32)> = all
                .map(|segment| (state.extents.segment_use(segment).pinned_pages, segment))
                .filter(|(pinned, _)| *pinned <= half)
                .collect();
            few.sort_by_key(|(pinned, _)| *pinned);
            few.truncate(LOOKED_AT);
            few
        };
        candidates.into_iter().any(|(_, segment)| {
            let takes_writes = self.state.lock().health.takes_writes();
            takes_writes && self.empty(segment)
        })
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
        let beyond = self.state.lock().segments.beyond_bound().0;
        let percent = if beyond > caps::NVME_BEYOND_MOVES_MAX { 0 } else { caps::NVME_REINSERT_PERCENT };
        let budget = self.header.segment_bytes / 100 * percent / PAGE;
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
        let mut moved: Vec<Move> = Vec::new();
        for (entry, class) in entries
            .iter()
            .filter(|entry| entry.pinned)
            .map(|entry| (entry, SegmentClass::Pinned))
            .chain(hot.into_iter().map(|entry| (entry, SegmentClass::Ordinary)))
        {
            match self.move_on(entry, class) {
                Moved::To { value, before } => {
                    let to = Entry { extent: value.extent, hits: entry.hits / 2, ..*entry };
                    moved.push(Move { from: *entry, to, value, before });
                }
                Moved::Damaged => self.quarantine(entry),
                Moved::Unread if class == SegmentClass::Ordinary => {}
                // What is pinned stays where it is, and the segment with it; so does all while the volume takes no writes.
                Moved::Unread | Moved::NoRoom
                    if class == SegmentClass::Pinned || !self.state.lock().health.takes_writes() =>
                {
                    self.drop_copies(moved.iter().map(|moved| moved.to.extent).collect());
                    return false;
                }
                Moved::Unread | Moved::NoRoom => break,
            }
        }
        self.leave_segment(victim, &entries, moved)
    }

    fn leave_segment(self: &Arc<Self>, victim: u32, entries: &[Entry], moved: Vec<Move>) -> bool {
        let moved_digests: HashSet<Digest> = moved.iter().map(|moved| moved.from.digest).collect();
        {
            let mut state = self.state.lock();
            let here = |entry: &&Entry| state.extents.get(entry.digest).filter(|now| now.extent == entry.extent);
            let dropped = entries.iter().filter(|entry| !moved_digests.contains(&entry.digest));
            let dropped: Vec<Entry> = dropped.filter_map(|entry| here(&entry)).collect();
            // Pinned while the segment was being emptied: it stays, and the segment with it.
            if dropped.iter().any(|now| now.pinned) {
                drop(state);
                self.drop_copies(moved.iter().map(|moved| moved.to.extent).collect());
                return false;
            }
            dropped.iter().for_each(|entry| _ = state.drop_block(entry.digest));
            add(&self.counters.dropped_blocks, dropped.len() as u64);
        }
        // With what was dropped, which is owed. What is deleted meanwhile, the committer hears of after this.
        // Where the index does not take it, the committer sees to the copies.
        if !self.ask(|done| Commit::Moved(moved, done)) {
            return false;
        }
        let life = self.state.lock().segments.next_life();
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
            self.write_failed(&error);
            tracing::warn!(%error, "an emptied segment keeps its header until it is opened again");
        }
    }

    /// Copies a frame to a new place. The write is over when this returns, and counts until the caller says so.
    fn move_on(self: &Arc<Self>, entry: &Entry, class: SegmentClass) -> Moved {
        let (header, mut pages) = match self.read_whole(entry, Lane::Background) {
            Ok(Some(frame)) => frame,
            Ok(None) => return Moved::Damaged,
            // It may be read the next time: see `read_whole`.
            Err(_) => return Moved::Unread,
        };
        let before = IndexValue {
            extent: entry.extent,
            generation: header.generation,
            header_crc32: FrameHeader::header_crc32(&pages),
            parent_tag: entry.parent_tag,
            namespace: entry.namespace,
            name: entry.name,
        };
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
        if let Err(error) = self.write_frame(place.extent, pages) {
            self.write_failed(&error);
            // Some of it may be there all the same.
            self.drop_copies(vec![place.extent]);
            return Moved::NoRoom;
        }
        let value = IndexValue {
            extent: place.extent,
            generation: place.generation,
            header_crc32: FrameHeader::header_crc32(&head),
            parent_tag: entry.parent_tag,
            namespace: entry.namespace,
            // An earlier build did not note it.
            name: if entry.name == 0 { event_name_of(&header.identity) } else { entry.name },
        };
        Moved::To { value, before }
    }

    fn write_frame(&self, extent: Extent, pages: AlignedBytes) -> std::io::Result<()> {
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
    To {
        value: IndexValue,
        before: IndexValue,
    },
    Damaged,
    /// The device did not give it.
    Unread,
    NoRoom,
}
