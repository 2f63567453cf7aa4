//! Where blocks may be, for readers: in the order of a chain, those that come next on their way from memory.

use crate::READ;
use crate::cells::Cells;
use crate::sets::{Tags, Windows};
use crate::sync::AtomicU32;
use crate::table::{AHEAD, Table};
use crate::unit::Unit;

impl Table {
    /// Where some blocks may be, in their order, those of the next [`AHEAD`] on their way from memory: of `ahead` at first, and of one more
    /// with each.
    #[inline(always)]
    pub fn places<I: Iterator<Item = u64>>(&self, keys: I, ahead: usize) -> Places<'_, I> {
        let (directory, shift) = self.directory();
        let note = self.notes();
        let mut places = Places { table: self, directory, shift, note, keys, ring: [None; AHEAD], next: 0, loaded: 0 };
        for _ in 0..ahead {
            places.load();
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
    ring: [Option<Place<'a>>; AHEAD],
    next: usize,
    loaded: usize,
}

impl<'a, I: Iterator<Item = u64>> Places<'a, I> {
    #[inline(always)]
    fn load(&mut self) {
        let place = self.keys.next().and_then(|key| {
            let at = self.directory.get((key >> 1 >> self.shift) as usize)?.load(READ);
            let unit = self.table.unit(at)?;
            unit.prefetch(key);
            Some(Place { unit, key })
        });
        if let Some(to) = self.ring.get_mut(self.loaded % AHEAD) {
            *to = place;
        }
        self.loaded += 1;
    }

    #[cold]
    fn load_more(&mut self) {
        self.load();
    }

    #[inline(always)]
    fn next(&mut self) -> Option<Place<'a>> {
        let next = (*self.ring.get(self.next % AHEAD)?)?;
        self.next += 1;
        self.load();
        if self.loaded < self.next + AHEAD {
            self.load_more();
        }
        Some(next)
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
        // By now the lines of the one half-way have come: its cell comes next.
        if let Some(Some(later)) = self.ring.get((self.next + AHEAD / 2) % AHEAD) {
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
