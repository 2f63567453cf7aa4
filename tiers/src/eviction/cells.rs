//! Cells: the runs of a class that were last used in an epoch, and the order in which cells give up blocks. Owns which run is in
//! which cell; asks [`Lifetimes`] what a cell is worth.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::classes::{CLASSES, CLASSES_OF_SESSIONS, ORPHAN};
use super::lifetimes::{EPOCHS, Lifetime, Lifetimes};
use super::links::Lists;

/// The order of cells is worked out anew after this fraction of the pool was evicted.
const REORDERS_PER_CAPACITY: usize = 64;
/// And after so long: ages change.
const REORDER_MS: u64 = 1000;
const CANDIDATES_MAX: usize = CLASSES * EPOCHS;

/// A cell and what its blocks were worth when the order was worked out.
struct Candidate {
    worth: f32,
    cell: u32,
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Candidate {}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Candidate {
    /// The least worth is the greatest candidate.
    fn cmp(&self, other: &Self) -> Ordering {
        other.worth.total_cmp(&self.worth).then(other.cell.cmp(&self.cell))
    }
}

/// See the head of this file.
pub(super) struct Cells {
    lists: Lists,
    order: BinaryHeap<Candidate>,
    /// Evictions until the order is worked out anew.
    good_for: usize,
    ordered_ms: u64,
    /// Classes in use: other kinds than attention are rare.
    classes: usize,
}

/// Hits per block and time.
pub(super) fn worth(lifetimes: &Lifetimes, class: usize, age_ms: u64) -> f32 {
    if class == usize::from(ORPHAN) { -1.0 } else { lifetimes.worth(class, age_ms) }
}

fn cell_of(class: usize, place: usize) -> u32 {
    (class * EPOCHS + place) as u32
}

impl Cells {
    pub(super) fn new() -> Self {
        Self {
            lists: Lists::new((CLASSES * EPOCHS) as u32),
            order: BinaryHeap::with_capacity(CANDIDATES_MAX),
            good_for: 0,
            ordered_ms: 0,
            classes: CLASSES_OF_SESSIONS,
        }
    }

    /// Makes room for this run.
    pub(super) fn ensure(&mut self, run: u32) {
        self.lists.ensure(run);
    }

    pub(super) fn has(&self, run: u32) -> bool {
        self.lists.is_linked(run)
    }

    pub(super) fn unlink(&mut self, run: u32) {
        self.lists.unlink(run);
    }

    /// Puts a run into the cell of what its end is.
    pub(super) fn link(&mut self, run: u32, life: Lifetime, lifetimes: &Lifetimes) {
        if self.lists.is_linked(run) {
            return;
        }
        let (class, place) = (usize::from(life.class), lifetimes.place_of(life));
        let cell = cell_of(class, place);
        if class >= self.classes {
            self.classes = CLASSES;
        }
        let was_empty = self.lists.back(cell).is_none();
        // What was used just now is the youngest of its cell. What becomes a candidate later goes next.
        if lifetimes.is_newest(place) {
            self.lists.push_front(cell, run);
        } else {
            self.lists.push_back(cell, run);
        }
        if was_empty {
            self.put_in_order(cell, worth(lifetimes, class, lifetimes.age_of_place(place)));
        }
    }

    fn put_in_order(&mut self, cell: u32, worth: f32) {
        if self.order.len() >= CANDIDATES_MAX {
            self.good_for = 0;
        }
        if self.good_for > 0 {
            self.order.push(Candidate { worth, cell });
        }
    }

    /// Time passed: neighbouring epochs become one.
    pub(super) fn merge(&mut self, lifetimes: &mut Lifetimes) {
        while let Some(merge) = lifetimes.merge_one() {
            for class in 0..self.classes {
                let (from, into) = (cell_of(class, merge.from), cell_of(class, merge.into));
                if self.lists.back(from).is_some() {
                    let was_empty = self.lists.back(into).is_none();
                    self.lists.prepend(into, from);
                    if was_empty {
                        self.put_in_order(into, worth(lifetimes, class, lifetimes.age_of_place(merge.into)));
                    }
                }
            }
        }
    }

    /// The order is no longer right.
    pub(super) fn spoil(&mut self) {
        self.good_for = 0;
    }

    /// A block was evicted.
    pub(super) fn count_eviction(&mut self) {
        self.good_for = self.good_for.saturating_sub(1);
    }

    fn reorder(&mut self, lifetimes: &Lifetimes, capacity: usize) {
        self.order.clear();
        for (place, age_ms) in lifetimes.places() {
            for class in 0..self.classes {
                let cell = cell_of(class, place);
                if self.lists.back(cell).is_some() {
                    self.order.push(Candidate { worth: worth(lifetimes, class, age_ms), cell });
                }
            }
        }
        self.good_for = (capacity / REORDERS_PER_CAPACITY).max(8);
        self.ordered_ms = lifetimes.now_ms();
    }

    /// The run that should shrink next, of those that may, with what its end is worth.
    pub(super) fn least(
        &mut self,
        lifetimes: &Lifetimes,
        capacity: usize,
        may_shrink: impl Fn(u32) -> bool,
    ) -> Option<(u32, f32)> {
        let mut fresh = self.good_for == 0 || lifetimes.now_ms() >= self.ordered_ms + REORDER_MS;
        if fresh {
            self.reorder(lifetimes, capacity);
        }
        loop {
            while let Some(best) = self.order.peek() {
                match self.lists.back(best.cell) {
                    Some(run) if may_shrink(run) => return Some((run, best.worth)),
                    Some(run) => {
                        self.lists.unlink(run);
                    }
                    None => {
                        self.order.pop();
                    }
                }
            }
            if fresh {
                return None;
            }
            self.reorder(lifetimes, capacity);
            fresh = true;
        }
    }
}
