//! Segments: which part of a volume is written next, and which may be written anew. Pure.
//!
//! ```text
//!   Absent --grow--> Free --open--> Open --full--> Sealed --reclaim--> Emptied --no reader, no writer--> Free
//!   Unknown (the index was lost) --scanned--> Sealed or Free
//! ```

#![expect(clippy::indexing_slicing, reason = "segment numbers come from this module, or were checked against len()")]

use super::format::{Extent, PAGE, SegmentClass, generation};

/// Sealed segments that are looked at for the one with the least live bytes: the oldest of the oldest quarter.
const CANDIDATES: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// No disk space yet.
    Absent,
    Free,
    Open {
        class: SegmentClass,
        next_page: u32,
        sequence: u32,
    },
    Sealed {
        class: SegmentClass,
    },
    /// Its blocks are forgotten; transfers may still be under way.
    Emptied,
    /// Holds blocks that are yet to be found.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    state: State,
    life: u64,
    readers: u32,
    writers: u32,
}

/// A place for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where.
    pub extent: Extent,
    /// For the frame's header.
    pub generation: u64,
}

/// What a fresh segment needs before frames may go there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Which.
    pub segment: u32,
    /// Of the life that begins.
    pub life: u64,
    /// What it will hold.
    pub class: SegmentClass,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Segments {
    all: Vec<Segment>,
    pages: u32,
    /// Segments that may have disk space, whichever they are.
    allowed: usize,
    last_life: u64,
}

/// How many segments are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentCounts {
    /// With disk space.
    pub present: usize,
    /// That may be opened within the bound, with or without disk space yet.
    pub free: usize,
    /// Emptied, while reads or writes of what they held go on.
    pub emptied: usize,
    /// That will be free once those end, the free ones included.
    pub soon: usize,
    /// Full.
    pub sealed: usize,
    /// Yet to be scanned.
    pub unknown: usize,
}

impl Segments {
    /// `present` segments of `segment_bytes` that have disk space, of `allowed`.
    pub fn new(segment_bytes: u64, present: usize, allowed: usize) -> Self {
        let free = Segment { state: State::Free, life: 0, readers: 0, writers: 0 };
        let absent = Segment { state: State::Absent, ..free };
        let all = (0..present.max(allowed)).map(|at| if at < present { free } else { absent }).collect();
        Self { all, pages: (segment_bytes / PAGE) as u32, allowed, last_life: 0 }
    }

    /// Segments, absent ones included.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Pages of a segment that frames can use: the first holds its header.
    pub fn usable_pages(&self) -> u32 {
        self.pages - 1
    }

    /// What the index, or the segment's header, says of its last life. The blocks in it are there already.
    pub fn restore(&mut self, segment: u32, life: u64, class: SegmentClass, scanned: bool) {
        self.last_life = self.last_life.max(life);
        if let Some(known) = self.all.get_mut(segment as usize) {
            known.life = life;
            known.state = if scanned { State::Sealed { class } } else { State::Unknown };
        }
    }

    /// No life at or below this one is given. The start is the volume's secret: a client that knew a segment's life could
    /// put a block that holds a frame of its own making, for a scan to find.
    pub fn start_lives_after(&mut self, life: u64) {
        self.last_life = self.last_life.max(life);
    }

    /// A segment that was unknown is known now.
    pub fn scanned(&mut self, segment: u32, class: SegmentClass) {
        if let Some(known) = self.all.get_mut(segment as usize)
            && known.state == State::Unknown
        {
            known.state = State::Sealed { class };
        }
    }

    /// Segments yet to be scanned.
    pub fn unknown(&self) -> Vec<u32> {
        (0..self.all.len() as u32).filter(|at| self.all[*at as usize].state == State::Unknown).collect()
    }

    /// The life that a segment is in.
    pub fn life(&self, segment: u32) -> Option<u64> {
        self.all.get(segment as usize).map(|known| known.life)
    }

    /// True where the extent lies within one segment of this volume, behind its header.
    pub fn holds(&self, extent: &Extent) -> bool {
        let inside = extent.page >= 1 && extent.pages >= 1;
        let end = u64::from(extent.page) + u64::from(extent.pages);
        inside && (extent.segment as usize) < self.all.len() && end <= u64::from(self.pages)
    }

    /// A place for a frame of `pages` in the open segment of this class; `None`: open another. Counts a
    /// writer, until [`Self::end_write`].
    pub fn place(&mut self, class: SegmentClass, pages: u32, apart: bool) -> Option<Place> {
        let total = self.pages;
        let at = self.all.iter().position(|known| matches!(known.state, State::Open { class: c, .. } if c == class))?;
        let known = &mut self.all[at];
        let State::Open { next_page, sequence, .. } = &mut known.state else { return None };
        if *next_page + pages > total {
            known.state = State::Sealed { class };
            return None;
        }
        let extent = Extent { segment: at as u32, page: *next_page, pages, apart };
        let place = Place { extent, generation: generation(known.life, *sequence) };
        *next_page += pages;
        *sequence += 1;
        known.writers += 1;
        Some(place)
    }

    /// True while a segment of this class is open.
    pub fn has_open(&self, class: SegmentClass) -> bool {
        self.all.iter().any(|known| matches!(known.state, State::Open { class: c, .. } if c == class))
    }

    /// A write into the segment ended, one way or the other.
    pub fn end_write(&mut self, segment: u32) {
        let known = &mut self.all[segment as usize];
        known.writers -= 1;
        self.settle(segment);
    }

    /// A read of the segment begins: it is not written anew before it ends.
    pub fn begin_read(&mut self, segment: u32) {
        self.all[segment as usize].readers += 1;
    }

    /// A read ended.
    pub fn end_read(&mut self, segment: u32) {
        self.all[segment as usize].readers -= 1;
        self.settle(segment);
    }

    fn settle(&mut self, segment: u32) {
        let known = &mut self.all[segment as usize];
        if known.state == State::Emptied && known.readers == 0 && known.writers == 0 {
            known.state = State::Free;
        }
    }

    /// A segment that may be opened next within the bound; those with disk space first.
    pub fn next_free(&mut self, class: SegmentClass) -> Option<Opening> {
        if self.in_use() >= self.allowed {
            return None;
        }
        let is = |state: State| move |known: &Segment| known.state == state;
        let at = self.all.iter().position(is(State::Free)).or_else(|| self.all.iter().position(is(State::Absent)))?;
        Some(Opening { segment: at as u32, life: self.next_life(), class })
    }

    /// Segments that hold something, or may.
    fn in_use(&self) -> usize {
        self.all.iter().filter(|known| !matches!(known.state, State::Absent | State::Free)).count()
    }

    /// True where a segment holds nothing and has no disk space, as far as is known.
    pub fn is_absent(&self, segment: u32) -> bool {
        self.all.get(segment as usize).is_some_and(|known| known.state == State::Absent)
    }

    /// A life that no segment had before.
    pub fn next_life(&mut self) -> u64 {
        self.last_life += 1;
        self.last_life
    }

    /// The segment of `opening` is ready. One of its class that is open is sealed.
    pub fn open(&mut self, opening: Opening) {
        for known in &mut self.all {
            if matches!(known.state, State::Open { class, .. } if class == opening.class) {
                known.state = State::Sealed { class: opening.class };
            }
        }
        let known = &mut self.all[opening.segment as usize];
        known.life = opening.life;
        known.state = State::Open { class: opening.class, next_page: 1, sequence: 0 };
    }

    /// The opening failed after disk space was taken: the segment is free.
    pub fn opening_failed(&mut self, opening: Opening) {
        self.all[opening.segment as usize].state = State::Free;
    }

    /// The oldest sealed segments, oldest first, out of the oldest quarter. Pinned ones only where
    /// `unpinned` says that nothing in them is pinned any more.
    pub fn candidates(&self, unpinned: impl Fn(u32) -> bool) -> Vec<u32> {
        let mut sealed = self.all_candidates(unpinned);
        sealed.truncate(sealed.len().div_ceil(4).min(CANDIDATES));
        sealed
    }

    /// The same, out of all of them.
    pub fn all_candidates(&self, unpinned: impl Fn(u32) -> bool) -> Vec<u32> {
        let mut sealed: Vec<(u64, u32)> = (0u32..)
            .zip(&self.all)
            .filter(|(at, known)| match known.state {
                State::Sealed { class: SegmentClass::Ordinary } => known.writers == 0,
                State::Sealed { class: SegmentClass::Pinned } => known.writers == 0 && unpinned(*at),
                _ => false,
            })
            .map(|(at, known)| (known.life, at))
            .collect();
        sealed.sort_unstable();
        sealed.into_iter().map(|(_, at)| at).collect()
    }

    /// Segments that may hold blocks, the oldest first.
    pub fn oldest_first(&self) -> Vec<u32> {
        let holds = |(_, known): &(u32, &Segment)| !matches!(known.state, State::Absent | State::Free | State::Emptied);
        let mut used: Vec<(u64, u32)> =
            (0u32..).zip(&self.all).filter(holds).map(|(at, known)| (known.life, at)).collect();
        used.sort_unstable();
        used.into_iter().map(|(_, at)| at).collect()
    }

    /// How many segments the bound allows.
    pub fn allowed(&self) -> usize {
        self.allowed
    }

    /// The blocks of a sealed segment are forgotten: free as soon as nobody reads it.
    pub fn emptied(&mut self, segment: u32) {
        self.all[segment as usize].state = State::Emptied;
        self.settle(segment);
    }

    /// How many segments the bound allows, from now on.
    pub fn set_allowed(&mut self, allowed: usize) {
        let absent = Segment { state: State::Absent, life: 0, readers: 0, writers: 0 };
        self.allowed = allowed;
        if self.all.len() < allowed {
            self.all.resize(allowed, absent);
        }
    }

    /// How many segments with disk space are beyond the bound, and those of them that are free: to be given back.
    pub fn beyond_bound(&self) -> (usize, Vec<u32>) {
        let present = self.all.iter().filter(|known| known.state != State::Absent).count();
        let beyond = present.saturating_sub(self.allowed);
        let free = (0..self.all.len() as u32).rev().filter(|at| self.all[*at as usize].state == State::Free);
        (beyond, free.take(beyond).collect())
    }

    /// True where no write that began is still under way.
    pub fn is_written(&self, segment: u32) -> bool {
        self.all.get(segment as usize).is_none_or(|known| known.writers == 0)
    }

    /// A free segment's disk space was given back.
    pub fn given_back(&mut self, segment: u32) {
        self.all[segment as usize].state = State::Absent;
    }

    /// The open segments, and the first page of each that no frame has.
    pub fn tails(&self) -> Vec<(u32, u32)> {
        let open = |(at, known): (u32, &Segment)| match known.state {
            State::Open { next_page, .. } => Some((at, next_page)),
            _ => None,
        };
        (0..).zip(&self.all).filter_map(open).collect()
    }

    /// Where all begins anew: what was open is sealed.
    pub fn seal_all(&mut self) {
        for known in &mut self.all {
            if let State::Open { class, .. } = known.state {
                known.state = State::Sealed { class };
            }
        }
    }

    /// How many are in which state.
    pub fn counts(&self) -> SegmentCounts {
        let mut counts = SegmentCounts::default();
        let mut unused = 0;
        for known in &self.all {
            counts.present += usize::from(known.state != State::Absent);
            unused += usize::from(matches!(known.state, State::Free | State::Absent));
            counts.emptied += usize::from(known.state == State::Emptied);
            counts.sealed += usize::from(matches!(known.state, State::Sealed { .. }));
            counts.unknown += usize::from(known.state == State::Unknown);
        }
        let within_bound = |unused: usize| unused.min(self.allowed.saturating_sub(self.all.len() - unused));
        counts.free = within_bound(unused);
        counts.soon = within_bound(unused + counts.emptied);
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use SegmentClass::{Ordinary, Pinned};

    fn open_next(segments: &mut Segments, class: SegmentClass) -> Opening {
        let opening = segments.next_free(class).unwrap();
        segments.open(opening);
        opening
    }

    #[test]
    fn frames_are_laid_one_behind_the_other_and_never_over_the_end() {
        let mut segments = Segments::new(10 * PAGE, 0, 2);
        assert!(segments.place(Ordinary, 3, true).is_none(), "nothing is open");
        open_next(&mut segments, Ordinary);
        let pages: Vec<u32> = (0..3).map(|_| segments.place(Ordinary, 3, true).unwrap().extent.page).collect();
        assert_eq!(pages, [1, 4, 7]);
        assert!(segments.place(Pinned, 1, false).is_none(), "pinned blocks have segments of their own");
        assert!(segments.place(Ordinary, 1, false).is_none(), "full");
        let next = open_next(&mut segments, Ordinary);
        assert_eq!((next.segment, next.life), (1, 2));
        assert!(segments.next_free(Ordinary).is_none(), "the bound");
    }

    /// A segment is written anew only when no read and no write of its last life is under way.
    #[test]
    fn a_segment_waits_for_its_readers_and_writers() {
        let mut segments = Segments::new(10 * PAGE, 0, 4);
        let first = open_next(&mut segments, Ordinary).segment;
        segments.place(Ordinary, 9, true).unwrap();
        open_next(&mut segments, Ordinary);
        assert!(segments.candidates(|_| true).is_empty(), "a write is under way");
        segments.begin_read(first);
        segments.end_write(first);
        assert_eq!(segments.candidates(|_| true), [first]);
        segments.emptied(first);
        let free = |segments: &mut Segments| {
            (0..2).filter_map(|_| segments.next_free(Ordinary)).any(|opening| opening.segment == first)
        };
        assert!(!free(&mut segments), "somebody reads it");
        let counts = segments.counts();
        assert_eq!((counts.free, counts.emptied, counts.soon), (2, 1, 3), "but it is on its way");
        segments.end_read(first);
        assert!(free(&mut segments));
    }

    #[test]
    fn pinned_segments_are_passed_over_and_lives_never_repeat() {
        let mut segments = Segments::new(10 * PAGE, 0, 8);
        let pinned = open_next(&mut segments, Pinned).segment;
        let ordinary = open_next(&mut segments, Ordinary).segment;
        open_next(&mut segments, Pinned);
        open_next(&mut segments, Ordinary);
        assert_eq!(segments.candidates(|_| false), [ordinary]);
        assert_eq!(segments.candidates(|_| true), [pinned]);
        let mut later = Segments::new(10 * PAGE, 8, 8);
        later.restore(0, 99, Ordinary, true);
        assert!(later.next_free(Ordinary).unwrap().life > 99);
        later.restore(1, 5, Ordinary, false);
        assert_eq!(later.unknown(), [1]);
        later.scanned(1, Pinned);
        assert!(later.unknown().is_empty());
    }

    /// The bound is on disk space, whichever segments have it: the last ones are worth no less than the first.
    #[test]
    fn a_smaller_bound_gives_segments_back() {
        let mut segments = Segments::new(10 * PAGE, 5, 5);
        segments.restore(3, 7, Ordinary, true);
        segments.restore(4, 8, Ordinary, true);
        segments.set_allowed(2);
        assert_eq!(segments.beyond_bound(), (3, vec![2, 1, 0]));
        assert!(segments.next_free(Ordinary).is_none(), "two are in use");
        (0..3).for_each(|at| segments.given_back(at));
        assert_eq!((segments.beyond_bound(), segments.counts().free), ((0, vec![]), 0));
        segments.emptied(3);
        assert_eq!(segments.counts().free, 1);
        assert_eq!(segments.next_free(Ordinary).unwrap().segment, 3, "with disk space before those without");
        segments.set_allowed(1);
        assert_eq!(segments.beyond_bound(), (1, vec![3]));
        segments.given_back(3);
        assert_eq!(segments.counts().present, 1);
        assert!(!segments.holds(&Extent { segment: 1, page: 0, pages: 1, apart: false }), "the header's page");
        assert!(!segments.holds(&Extent { segment: 1, page: 9, pages: 2, apart: false }));
        assert!(segments.holds(&Extent { segment: 1, page: 9, pages: 1, apart: false }));
    }
}
