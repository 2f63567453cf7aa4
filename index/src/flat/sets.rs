//! Sets of holders, by their tags, in a word.
//!
//! Tags come in *windows* of 56: a word that begins with 0 is a window's number and a bit for each of its tags, so that who has all of a
//! chain is found by one AND a block. Fleets of up to 56 holders need nothing else. Of more windows, a word lists up to five tags; what is
//! more than that is in a cell (`cells.rs`).

use smallvec::SmallVec;

use crate::caps;

/// Tags in a window.
pub const WINDOW: u16 = if cfg!(shuttle) { 4 } else { 56 };
/// Windows of all tags.
pub const WINDOWS: usize = caps::HOLDERS_MAX.div_ceil(WINDOW as usize);
/// Tags that a word lists.
pub const LIST_MAX: usize = 5;

const MASK_BITS: u32 = 56;
const MASK: u64 = (1 << MASK_BITS) - 1;
const TAG_BITS: usize = 12;
const OTHER: u64 = 1 << 63;
const CELL: u64 = 1 << 62;
const ALL: u64 = 1 << 61;

/// Tags of one window: a bit for each, and the window's number above them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tags(pub u64);

impl Tags {
    pub fn one(tag: u16) -> Self {
        Self(1 << (tag % WINDOW) | u64::from(tag / WINDOW) << MASK_BITS)
    }

    /// All that a window has.
    pub fn of_window(window: usize, mask: u64) -> Self {
        Self(mask & MASK | (window as u64) << MASK_BITS)
    }

    pub fn window(self) -> usize {
        (self.0 >> MASK_BITS) as usize
    }

    pub fn mask(self) -> u64 {
        self.0 & MASK
    }

    pub fn is_empty(self) -> bool {
        self.mask() == 0
    }

    pub fn len(self) -> usize {
        self.mask().count_ones() as usize
    }

    pub fn is_beside(self, others: Self) -> bool {
        (self.0 ^ others.0) >> MASK_BITS == 0
    }

    /// Those of both, of one window; none where they are of two.
    pub fn and(self, others: Self) -> Self {
        let mask = if self.is_beside(others) { others.mask() } else { 0 };
        Self(self.0 & (mask | !MASK))
    }

    /// Those that are not among `others`, of the same window or none.
    pub fn but(self, others: Self) -> Self {
        let mask = if self.is_beside(others) { others.mask() } else { 0 };
        Self(self.0 & !mask)
    }

    /// Both, of one window.
    pub fn or(self, others: Self) -> Self {
        Self(self.0 | others.mask())
    }

    /// Each tag.
    pub fn each(self) -> impl Iterator<Item = u16> {
        let first = self.window() as u16 * WINDOW;
        let mut mask = self.mask();
        std::iter::from_fn(move || {
            let bit = (mask != 0).then(|| mask.trailing_zeros() as u16)?;
            mask &= mask - 1;
            Some(first + bit)
        })
    }
}

/// Tags of some windows, those of each once.
pub type Windows = SmallVec<[Tags; 4]>;

/// Tags more.
pub fn put(windows: &mut Windows, tags: Tags) {
    match windows.iter_mut().find(|known| known.is_beside(tags)) {
        Some(known) => *known = known.or(tags),
        None => windows.push(tags),
    }
}

/// The holders of a block, in a word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Set(pub u64);

/// What a word says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// These.
    Window(Tags),
    /// Some, in the word: [`Set::listed`].
    List,
    /// A cell with some windows.
    Some(u32),
    /// A cell with all windows.
    All(u32),
}

impl Set {
    pub const EMPTY: Self = Self(0);

    pub fn some(cell: u32) -> Self {
        Self(OTHER | CELL | u64::from(cell))
    }

    pub fn all(cell: u32) -> Self {
        Self(OTHER | CELL | ALL | u64::from(cell))
    }

    /// Tags of one window.
    pub fn window(tags: Tags) -> Self {
        if tags.is_empty() { Self::EMPTY } else { Self(tags.0) }
    }

    /// Of these windows where a word can say it.
    pub fn inline(windows: &[Tags]) -> Option<Self> {
        match windows {
            [] => Some(Self::EMPTY),
            [one] => Some(Self::window(*one)),
            some => {
                let count: usize = some.iter().map(|tags| tags.len()).sum();
                (count <= LIST_MAX).then(|| Self::list(some.iter().flat_map(|tags| tags.each())))
            }
        }
    }

    /// One to five tags; the last one fills what is left.
    fn list(tags: impl Iterator<Item = u16>) -> Self {
        let mut listed = [0; LIST_MAX];
        let mut last = 0;
        let mut tags = tags;
        for to in &mut listed {
            last = tags.next().unwrap_or(last);
            *to = last;
        }
        Self(
            listed
                .iter()
                .fold(OTHER, |word, tag| word & !MASK_OF_LIST | (word & MASK_OF_LIST) << TAG_BITS | u64::from(*tag)),
        )
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// True where the word says it all.
    pub fn is_inline(self) -> bool {
        self.0 & (OTHER | CELL) != OTHER | CELL
    }

    /// True where the word has tags of the window of `tags`, and no others; of a set that is not empty.
    pub fn is_window_of(self, tags: Tags) -> bool {
        (self.0 ^ tags.0) >> MASK_BITS == 0
    }

    pub fn kind(self) -> Kind {
        if self.0 & OTHER == 0 {
            Kind::Window(Tags(self.0))
        } else if self.0 & CELL == 0 {
            Kind::List
        } else if self.0 & ALL == 0 {
            Kind::Some(self.0 as u32)
        } else {
            Kind::All(self.0 as u32)
        }
    }

    /// The tags of a list, some more than once.
    pub fn listed(self) -> impl Iterator<Item = u16> {
        (0..LIST_MAX).map(move |at| (self.0 >> (TAG_BITS * at)) as u16 & ((1 << TAG_BITS) - 1))
    }
}

/// The bits of a list.
const MASK_OF_LIST: u64 = (1 << (TAG_BITS * LIST_MAX)) - 1;
