//! The extent map: where each block of a volume lies, in memory, and how much each namespace has. Pure; seventy bytes a
//! block or so. Says in the change log what comes and leaves.
//!
//! Entries live in chunks, so that growth copies nothing; a hash table of their numbers finds them by
//! digest; each segment's entries form a list, so that reclaim needs neither a scan nor the index.

#![expect(clippy::indexing_slicing, reason = "numbers of entries and segments come from this module alone")]

use hashbrown::HashTable;

use std::sync::Arc;

use super::format::{Extent, PAGE};
use crate::block::Digest;
use crate::caps::NVME_SEGMENT_BYTES_MAX;
use crate::changes::{Change, ChangeLog, NamespaceTag};
use crate::tier::Tier;

const NONE: u32 = u32::MAX;
const CHUNK: usize = 4096;

/// What the map knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub digest: Digest,
    /// Its parent's; 0 for a root.
    pub parent_tag: u64,
    /// Where it lies.
    pub extent: Extent,
    /// Reads since it was written.
    pub hits: u8,
    /// Not to be dropped.
    pub pinned: bool,
    /// Whose: its number on this volume, 0 where an earlier build wrote it.
    pub namespace: u8,
    /// Second of this daemon's life when it was stored or asked for last.
    pub used: u32,
    /// What events name it; 0 where that is not known.
    pub name: u64,
}

/// 56 bytes.
#[derive(Clone, Copy)]
struct Stored {
    digest: [u64; 2],
    parent_tag: u64,
    name: u64,
    segment: u32,
    page: u16,
    pages: u16,
    next: u32,
    previous: u32,
    used: u32,
    hits: u8,
    namespace: u8,
    apart: bool,
    pinned: bool,
}

const _: () = assert!(size_of::<Stored>() == 56);
// A segment's first page is its header: neither a page's number nor a count of pages needs more than 16 bits.
const _: () = assert!(NVME_SEGMENT_BYTES_MAX / PAGE <= 1 << 16);
const EMPTY: Stored = Stored {
    digest: [0; 2],
    parent_tag: 0,
    name: 0,
    segment: 0,
    page: 0,
    pages: 0,
    next: NONE,
    previous: NONE,
    used: 0,
    hits: 0,
    namespace: 0,
    apart: false,
    pinned: false,
};

impl Stored {
    fn digest(&self) -> Digest {
        let [high, low] = self.digest;
        Digest(u128::from(high) << 64 | u128::from(low))
    }

    fn entry(&self) -> Entry {
        Entry {
            name: self.name,
            digest: self.digest(),
            parent_tag: self.parent_tag,
            extent: Extent {
                segment: self.segment,
                page: u32::from(self.page),
                pages: u32::from(self.pages),
                apart: self.apart,
            },
            hits: self.hits,
            pinned: self.pinned,
            namespace: self.namespace,
            used: self.used,
        }
    }
}

/// What of a segment is live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentUse {
    /// Blocks.
    pub blocks: u32,
    /// Their pages.
    pub pages: u32,
    /// Pages of those that are pinned.
    pub pinned_pages: u32,
}

#[derive(Clone)]
struct Lists {
    first: u32,
    in_use: SegmentUse,
    /// Pages of each namespace that has some: few have blocks in one segment.
    of_namespaces: Vec<(u8, u32)>,
}

impl Lists {
    const EMPTY: Self =
        Self { first: NONE, in_use: SegmentUse { blocks: 0, pages: 0, pinned_pages: 0 }, of_namespaces: Vec::new() };

    fn come(&mut self, namespace: u8, pages: u32) {
        self.in_use.blocks += 1;
        self.in_use.pages += pages;
        match self.of_namespaces.iter_mut().find(|(known, _)| *known == namespace) {
            Some((_, count)) => *count += pages,
            None => self.of_namespaces.push((namespace, pages)),
        }
    }

    fn leave(&mut self, namespace: u8, pages: u32) {
        self.in_use.blocks -= 1;
        self.in_use.pages -= pages;
        if let Some((_, count)) = self.of_namespaces.iter_mut().find(|(known, _)| *known == namespace) {
            *count -= pages;
        }
        self.of_namespaces.retain(|(_, count)| *count > 0);
    }
}

/// Where a walk over a segment's blocks goes on.
#[derive(Clone, Copy, Debug)]
pub struct Cursor(u32, Digest);

/// See the head of this file.
pub struct Extents {
    table: HashTable<u32>,
    chunks: Vec<Box<[Stored; CHUNK]>>,
    free: u32,
    segments: Vec<Lists>,
    blocks: usize,
    live_pages: u64,
    pinned_pages: u64,
    /// By namespace.
    pages_of: [u64; 256],
    /// By namespace, as events know them.
    tags_of: [NamespaceTag; 256],
    changes: Option<Arc<ChangeLog>>,
}

impl Default for Extents {
    fn default() -> Self {
        Self {
            table: HashTable::new(),
            chunks: Vec::new(),
            free: NONE,
            segments: Vec::new(),
            blocks: 0,
            live_pages: 0,
            pinned_pages: 0,
            pages_of: [0; 256],
            tags_of: [NamespaceTag(0); 256],
            changes: None,
        }
    }
}

impl Extents {
    fn at(&self, number: u32) -> &Stored {
        &self.chunks[number as usize / CHUNK][number as usize % CHUNK]
    }

    fn at_mut(&mut self, number: u32) -> &mut Stored {
        &mut self.chunks[number as usize / CHUNK][number as usize % CHUNK]
    }

    fn find(&self, digest: Digest) -> Option<u32> {
        self.table.find(digest.tag(), |number| self.at(*number).digest() == digest).copied()
    }

    /// What is known of a block.
    pub fn get(&self, digest: Digest) -> Option<Entry> {
        self.find(digest).map(|number| self.at(number).entry())
    }

    /// True where some block has this tag.
    pub fn has_tag(&self, tag: u64) -> bool {
        self.table.find(tag, |number| self.at(*number).digest().tag() == tag).is_some()
    }

    /// What comes and leaves from now on is said there.
    pub fn follow(&mut self, changes: Arc<ChangeLog>) {
        self.changes = Some(changes);
    }

    /// The namespace with this number is the one with this digest.
    pub fn name_namespace(&mut self, number: u8, digest: &[u8; 32]) {
        self.tags_of[usize::from(number)] = NamespaceTag::of(digest);
    }

    fn say(&self, entry: &Entry, stored: bool) {
        if let Some(changes) = &self.changes {
            let (name, namespace) = (entry.name, self.tags_of[usize::from(entry.namespace)]);
            changes.push(Change { name, namespace, tier: Tier::Nvme, stored });
        }
    }

    /// Names for events of the blocks of one namespace, and of those whose namespace is not known: from entry `from` on, of
    /// `most` entries; the entry to go on with, and `None` at the end.
    pub fn names(&self, namespace: NamespaceTag, from: u32, most: u32, out: &mut Vec<u64>) -> Option<u32> {
        let end = (self.chunks.len() * CHUNK) as u32;
        let until = end.min(from.saturating_add(most));
        for stored in (from..until).map(|number| self.at(number)) {
            let tag = self.tags_of[usize::from(stored.namespace)];
            if stored.name != 0 && (tag == namespace || tag.0 == 0) {
                out.push(stored.name);
            }
        }
        (until < end).then_some(until)
    }

    /// Puts a block where `entry` says; an earlier place of it is forgotten, and returned.
    pub fn insert(&mut self, entry: Entry) -> Option<Extent> {
        let before = self.take_out(entry.digest);
        if before.is_none() {
            self.say(&entry, true);
        }
        let number = self.take();
        let segment = entry.extent.segment as usize;
        if self.segments.len() <= segment {
            self.segments.resize(segment + 1, Lists::EMPTY);
        }
        let next = self.segments[segment].first;
        *self.at_mut(number) = Stored {
            digest: [(entry.digest.0 >> 64) as u64, entry.digest.0 as u64],
            parent_tag: entry.parent_tag,
            name: entry.name,
            segment: entry.extent.segment,
            page: entry.extent.page as u16,
            pages: entry.extent.pages as u16,
            next,
            previous: NONE,
            used: entry.used,
            hits: entry.hits,
            namespace: entry.namespace,
            apart: entry.extent.apart,
            pinned: entry.pinned,
        };
        if next != NONE {
            self.at_mut(next).previous = number;
        }
        let lists = &mut self.segments[segment];
        lists.first = number;
        lists.come(entry.namespace, entry.extent.pages);
        self.blocks += 1;
        self.live_pages += u64::from(entry.extent.pages);
        self.pages_of[usize::from(entry.namespace)] += u64::from(entry.extent.pages);
        if entry.pinned {
            self.count_pinned(&entry.extent, true);
        }
        let Self { table, chunks, .. } = self;
        table.insert_unique(entry.digest.tag(), number, |number| {
            chunks[*number as usize / CHUNK][*number as usize % CHUNK].digest().tag()
        });
        before.map(|entry| entry.extent)
    }

    fn take(&mut self) -> u32 {
        if self.free == NONE {
            let first = (self.chunks.len() * CHUNK) as u32;
            let mut chunk = Box::new([EMPTY; CHUNK]);
            for (at, stored) in chunk.iter_mut().enumerate() {
                stored.next = if at + 1 < CHUNK { first + at as u32 + 1 } else { NONE };
            }
            self.chunks.push(chunk);
            self.free = first;
        }
        let number = self.free;
        self.free = self.at(number).next;
        number
    }

    fn count_pinned(&mut self, extent: &Extent, more: bool) {
        let pages = &mut self.segments[extent.segment as usize].in_use.pinned_pages;
        if more {
            *pages += extent.pages;
            self.pinned_pages += u64::from(extent.pages);
        } else {
            *pages -= extent.pages;
            self.pinned_pages -= u64::from(extent.pages);
        }
    }

    /// Forgets a block.
    pub fn remove(&mut self, digest: Digest) -> Option<Entry> {
        let entry = self.take_out(digest)?;
        self.say(&entry, false);
        Some(entry)
    }

    fn take_out(&mut self, digest: Digest) -> Option<Entry> {
        let number = self.find(digest)?;
        let Self { table, chunks, .. } = self;
        let stored_at = |number: u32| &chunks[number as usize / CHUNK][number as usize % CHUNK];
        if let Ok(found) = table.find_entry(digest.tag(), |number| stored_at(*number).digest() == digest) {
            found.remove();
        }
        let stored = *self.at(number);
        let entry = stored.entry();
        if stored.pinned {
            self.count_pinned(&entry.extent, false);
        }
        if stored.previous == NONE {
            self.segments[stored.segment as usize].first = stored.next;
        } else {
            self.at_mut(stored.previous).next = stored.next;
        }
        if stored.next != NONE {
            self.at_mut(stored.next).previous = stored.previous;
        }
        self.segments[stored.segment as usize].leave(stored.namespace, u32::from(stored.pages));
        self.blocks -= 1;
        self.live_pages -= u64::from(stored.pages);
        self.pages_of[usize::from(stored.namespace)] -= u64::from(stored.pages);
        let free = self.free;
        *self.at_mut(number) = Stored { next: free, ..EMPTY };
        self.free = number;
        Some(entry)
    }

    /// A block was read.
    pub fn touch(&mut self, digest: Digest) {
        if let Some(number) = self.find(digest) {
            let stored = self.at_mut(number);
            stored.hits = stored.hits.saturating_add(1);
        }
    }

    /// A block was asked for at second `now`; true where it is here.
    pub fn mark_used(&mut self, digest: Digest, now: u32) -> bool {
        let found = self.find(digest);
        if let Some(number) = found {
            self.at_mut(number).used = now;
        }
        found.is_some()
    }

    /// What has this tag was used at `used` at least; then its parent's tag, where it was used before `since` until now.
    pub fn renew(&mut self, tag: u64, used: u32, since: u32) -> Option<u64> {
        let number = *self.table.find(tag, |number| self.at(*number).digest().tag() == tag)?;
        let stored = self.at_mut(number);
        let renewed = stored.used < since;
        if renewed {
            stored.used = used;
        }
        Some(stored.parent_tag).filter(|parent| renewed && *parent != 0)
    }

    /// Pages of a namespace's blocks, by its number on this volume.
    pub fn pages_of(&self, namespace: u8) -> u64 {
        self.pages_of[usize::from(namespace)]
    }

    /// Halves what is remembered of the reads of a segment's blocks.
    pub fn cool(&mut self, segment: u32) {
        let mut number = self.segments.get(segment as usize).map_or(NONE, |lists| lists.first);
        while number != NONE {
            let stored = self.at_mut(number);
            stored.hits /= 2;
            number = stored.next;
        }
    }

    /// A promise not to drop a block begins or ends; false where the block is not here.
    pub fn set_pinned(&mut self, digest: Digest, pinned: bool) -> bool {
        let Some(number) = self.find(digest) else { return false };
        let stored = self.at_mut(number);
        if stored.pinned != pinned {
            stored.pinned = pinned;
            let extent = stored.entry().extent;
            self.count_pinned(&extent, pinned);
        }
        true
    }

    /// The blocks of a segment.
    pub fn of_segment(&self, segment: u32) -> Vec<Entry> {
        let mut entries = Vec::new();
        self.walk(segment, None, usize::MAX, &mut entries);
        entries
    }

    /// The blocks of a segment, `most` at a time: from where an earlier call says on, `None` from the first. Where to go on, and
    /// `None` at the end; also where the place to go on from has been forgotten meanwhile.
    pub fn walk(&self, segment: u32, from: Option<Cursor>, most: usize, out: &mut Vec<Entry>) -> Option<Cursor> {
        let first = self.segments.get(segment as usize).map_or(NONE, |lists| lists.first);
        let mut number = match from {
            None => first,
            Some(Cursor(number, digest)) if self.find(digest) == Some(number) => number,
            Some(_) => NONE,
        };
        for _ in 0..most {
            if number == NONE {
                return None;
            }
            let stored = self.at(number);
            if stored.segment != segment {
                return None;
            }
            out.push(stored.entry());
            number = stored.next;
        }
        (number != NONE).then(|| Cursor(number, self.at(number).digest()))
    }

    /// True where a segment has blocks of this namespace.
    pub fn has_of(&self, segment: u32, namespace: u8) -> bool {
        let lists = self.segments.get(segment as usize);
        lists.is_some_and(|lists| lists.of_namespaces.iter().any(|(known, _)| *known == namespace))
    }

    /// Pages of a segment's blocks, each as often as its namespace says.
    pub fn weighed_pages(&self, segment: u32, weight: impl Fn(u8) -> u64) -> u64 {
        let lists = self.segments.get(segment as usize);
        let counts = lists.into_iter().flat_map(|lists| &lists.of_namespaces);
        counts.map(|(namespace, pages)| u64::from(*pages) * weight(*namespace)).sum()
    }

    /// What of a segment is live.
    pub fn segment_use(&self, segment: u32) -> SegmentUse {
        self.segments.get(segment as usize).map(|lists| lists.in_use).unwrap_or_default()
    }

    /// Blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Pages of all blocks, and of the pinned ones.
    pub fn pages(&self) -> (u64, u64) {
        (self.live_pages, self.pinned_pages)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Against a map, over many random steps: what is where, what is live, what is pinned.
    #[test]
    #[expect(clippy::too_many_lines, reason = "one model, step by step")]
    fn it_is_a_map() {
        let mut extents = Extents::default();
        let mut model: HashMap<u128, Entry> = HashMap::new();
        let mut random = 12345u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        for step in 0..200_000u64 {
            let name = u128::from(next(9000)).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_0C6A_1234_5677);
            let digest = Digest(name);
            match next(8) {
                0..4 => {
                    let extent = Extent {
                        segment: next(40) as u32,
                        page: step as u32 & 0xFFFF,
                        pages: 1 + next(9) as u32,
                        apart: step % 2 == 0,
                    };
                    let (pinned, namespace) = (next(10) == 0, next(3) as u8);
                    let entry =
                        Entry { digest, parent_tag: step, extent, hits: 0, pinned, namespace, used: 0, name: step };
                    let before = extents.insert(entry);
                    assert_eq!(before, model.insert(name, entry).map(|entry| entry.extent));
                }
                4..6 => assert_eq!(extents.remove(digest), model.remove(&name)),
                6 => {
                    extents.touch(digest);
                    if let Some(entry) = model.get_mut(&name) {
                        entry.hits = entry.hits.saturating_add(1);
                    }
                }
                _ => {
                    assert_eq!(extents.set_pinned(digest, step % 3 == 0), model.contains_key(&name));
                    if let Some(entry) = model.get_mut(&name) {
                        entry.pinned = step % 3 == 0;
                    }
                }
            }
            assert_eq!(extents.get(digest), model.get(&name).copied());
            assert_eq!(extents.has_tag(digest.tag()), model.contains_key(&name));
        }
        assert_eq!(extents.len(), model.len());
        let sum = |of: &dyn Fn(&Entry) -> bool| -> u64 {
            model.values().filter(|entry| of(entry)).map(|entry| u64::from(entry.extent.pages)).sum()
        };
        assert_eq!(extents.pages(), (sum(&|_| true), sum(&|entry| entry.pinned)));
        for namespace in 0..3 {
            assert_eq!(extents.pages_of(namespace), sum(&|entry| entry.namespace == namespace));
        }
        for segment in 0..40 {
            let mut listed = extents.of_segment(segment);
            let mut expected: Vec<Entry> =
                model.values().filter(|entry| entry.extent.segment == segment).copied().collect();
            listed.sort_by_key(|entry| entry.digest);
            expected.sort_by_key(|entry| entry.digest);
            assert_eq!(listed, expected);
            let pages = |pinned: bool| {
                let chosen = expected.iter().filter(|entry| entry.pinned || !pinned);
                chosen.map(|entry| entry.extent.pages).sum()
            };
            let in_use = SegmentUse { blocks: expected.len() as u32, pages: pages(false), pinned_pages: pages(true) };
            assert_eq!(extents.segment_use(segment), in_use);
            let weight = |namespace: u8| 10u64.pow(u32::from(namespace) * 3);
            let weighed: u64 =
                expected.iter().map(|entry| u64::from(entry.extent.pages) * weight(entry.namespace)).sum();
            assert_eq!(extents.weighed_pages(segment, weight), weighed);
            for namespace in 0..4 {
                let some = expected.iter().any(|entry| entry.namespace == namespace);
                assert_eq!(extents.has_of(segment, namespace), some);
            }
            let (mut walked, mut from) = (Vec::new(), None);
            loop {
                from = extents.walk(segment, from, 7, &mut walked);
                if from.is_none() {
                    break;
                }
            }
            assert_eq!(walked, extents.of_segment(segment));
        }
    }

    /// A walk that lets go of the lock between its steps must not go on in another segment's list.
    #[test]
    fn a_walk_ends_where_its_place_was_forgotten() {
        let mut extents = Extents::default();
        let entry = |name: u128, segment| Entry {
            digest: Digest(name),
            parent_tag: 0,
            extent: Extent { segment, page: 1, pages: 1, apart: false },
            hits: 0,
            pinned: false,
            namespace: 1,
            used: 0,
            name: 0,
        };
        (1..=4).for_each(|name| _ = extents.insert(entry(name, 0)));
        let mut walked = Vec::new();
        let from = extents.walk(0, None, 2, &mut walked);
        assert_eq!(walked.iter().map(|entry| entry.digest.0).collect::<Vec<_>>(), [4, 3]);
        extents.remove(Digest(2));
        extents.insert(entry(9, 7));
        assert!(extents.walk(0, from, 2, &mut walked).is_none());
        assert_eq!(walked.len(), 2, "{walked:?}");
    }
}
