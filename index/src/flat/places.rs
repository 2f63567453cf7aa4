//! Where blocks may be, for readers: in the order of a chain, those that come next on their way from memory.

use crate::READ;
use crate::flat::cells::Cells;
use crate::flat::sets::{Tags, Windows};
use crate::flat::table::Table;
use crate::flat::unit::Unit;
use crate::sync::AtomicU32;

/// Blocks that are loaded at once.
const STEP: usize = 8;
/// Of so many the lines are on their way at first.
const FIRST: usize = 6;
/// Most prompts share no more than a block with others, and are not looked at beyond the next.
const MOST: usize = 2;

impl Table {
    /// Where some blocks may be, in their order: a few at first, then, where somebody has those, those of the next steps on their way from memory.
    #[inline(always)]
    pub fn places<I: Iterator<Item = u64>>(&self, keys: I) -> Places<'_, I> {
        let (directory, shift) = self.directory();
        let note = self.notes();
        let (step, at) = ([None; STEP], STEP - FIRST);
        let mut places =
            Places { table: self, directory, shift, note, keys, now: step, later: step, at, goes_on: false };
        for place in at..STEP {
            let next = places.load();
            if let Some(to) = places.now.get_mut(place) {
                *to = next;
            }
        }
        places
    }
}

/// See [`Table::places`].
pub struct Places<'a, I> {
    table: &'a Table,
    directory: &'a [AtomicU32],
    shift: u32,
    note: bool,
    keys: I,
    now: [Option<Place<'a>>; STEP],
    later: [Option<Place<'a>>; STEP],
    /// In `now`, the next one.
    at: usize,
    goes_on: bool,
}

impl<'a, I: Iterator<Item = u64>> Places<'a, I> {
    #[inline(always)]
    fn load(&mut self) -> Option<Place<'a>> {
        let key = self.keys.next()?;
        let at = self.directory.get((key >> 1 >> self.shift) as usize)?.load(READ);
        let unit = self.table.unit(at)?;
        unit.prefetch(key);
        Some(Place { unit, key })
    }

    /// The next step's lines are on their way.
    #[inline(always)]
    fn load_step(&mut self) {
        for place in 0..STEP {
            let next = self.load();
            if let Some(to) = self.later.get_mut(place) {
                *to = next;
            }
        }
    }

    /// There are more that somebody has: so may be many.
    #[cold]
    fn go_on(&mut self) {
        self.goes_on = true;
        self.load_step();
    }

    #[inline(always)]
    fn next(&mut self) -> Option<Place<'a>> {
        if self.at == STEP {
            self.now = self.later;
            self.load_step();
            self.at = 0;
        }
        if !self.goes_on && self.at == STEP - FIRST + MOST {
            self.go_on();
        }
        let next = (*self.now.get(self.at)?)?;
        self.at += 1;
        Some(next)
    }

    /// The next one but some.
    #[inline(always)]
    fn half_way(&self) -> Option<Place<'a>> {
        let at = self.at + STEP / 2;
        *self.now.get(at).or_else(|| self.later.get(at - STEP))?
    }

    /// Who has the next block now: nobody, where it changes all the time. `None` at the end.
    pub fn windows(&mut self, cells: &Cells) -> Option<Windows> {
        let place = self.next()?;
        Some(place.unit.look(place.key, self.note, |set| cells.windows(set, place.key)).unwrap_or_default())
    }

    /// Which of `tags` have the next block now.
    #[inline(always)]
    pub fn among(&mut self, cells: &Cells, tags: Tags) -> Option<Tags> {
        let place = self.next()?;
        Some(match place.unit.glance(place.key, self.note) {
            Some(set) if set.is_window_of(tags) => Tags(set.0 & tags.0),
            _ => place.among(self.note, cells, tags),
        })
    }

    /// The same of the tags of several windows: of each those that have it, into `left`.
    #[inline(always)]
    pub fn among_all(&mut self, cells: &Cells, open: &[Tags], left: &mut [u64]) -> Option<()> {
        let place = self.next()?;
        // By now its lines have come: its cell comes next.
        if let Some(later) = self.half_way() {
            cells.prefetch(later.unit.peek(later.key));
        }
        let seen = place.unit.look(place.key, self.note, |set| cells.among_all(set, place.key, open, left));
        if seen.is_none() {
            left.iter_mut().for_each(|left| *left = 0);
        }
        Some(())
    }
}

/// Where a block may be.
#[derive(Clone, Copy)]
struct Place<'a> {
    unit: &'a Unit,
    key: u64,
}

impl Place<'_> {
    #[inline(never)]
    fn among(&self, note: bool, cells: &Cells, tags: Tags) -> Tags {
        let seen = self.unit.look(self.key, note, |set| cells.among(set, self.key, tags));
        seen.unwrap_or(tags.but(tags))
    }
}
