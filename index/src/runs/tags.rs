//! Sets of tags that a look-up keeps: a word for each 64, and a word that says which of them count.
//! Where there are few holders, sets have few words: a short look-up would take longer to write the zeros of all than for the rest.

use crate::caps;

/// Words for all tags that there may be ...
pub const ALL: usize = caps::HOLDERS_MAX.div_ceil(64);
/// ... and for those of a small fleet.
pub const FEW: usize = if ALL < 4 { ALL } else { 4 };
const _: () = assert!(ALL <= 64);

/// See the head of this file.
#[derive(Clone, Copy)]
pub struct TagSet<const WORDS: usize> {
    /// Words that have tags. What the others say means nothing.
    some: u64,
    words: [u64; WORDS],
}

impl<const WORDS: usize> TagSet<WORDS> {
    pub const EMPTY: Self = Self { some: 0, words: [0; WORDS] };

    #[inline(always)]
    pub fn clear(&mut self) {
        self.some = 0;
    }

    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.some == 0
    }

    /// A tag that there is no word for is nobody's that a reader knows.
    #[inline(always)]
    pub fn put(&mut self, tag: u16) {
        let at = usize::from(tag / 64);
        if let Some(word) = self.words.get_mut(at) {
            let known = if self.some >> at & 1 == 1 { *word } else { 0 };
            *word = known | 1 << (tag % 64);
            self.some |= 1 << at;
        }
    }

    #[inline(always)]
    fn word(&self, at: usize) -> u64 {
        if self.some >> at & 1 == 1 { self.words.get(at).copied().unwrap_or(0) } else { 0 }
    }

    #[inline(always)]
    pub fn has(&self, tag: u16) -> bool {
        self.word(usize::from(tag / 64)) >> (tag % 64) & 1 == 1
    }

    /// Those that are in neither of two others.
    #[inline(always)]
    pub fn each_but(&self, one: &Self, other: &Self, mut tell: impl FnMut(u16)) {
        let mut some = self.some;
        while some != 0 {
            let at = some.trailing_zeros() as usize;
            some &= some - 1;
            let mut word = self.word(at) & !one.word(at) & !other.word(at);
            while word != 0 {
                tell(at as u16 * 64 + word.trailing_zeros() as u16);
                word &= word - 1;
            }
        }
    }

    #[inline(always)]
    pub fn each(&self, tell: impl FnMut(u16)) {
        self.each_but(&Self::EMPTY, &Self::EMPTY, tell);
    }
}
