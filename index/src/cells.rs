//! Sets of holders: in the word where they are few, in a cell that lists some tens, in a cell with a bit for each.
//!
//! A cell says whose it is, and has a version that is odd while it changes (a seqlock): a reader that sees another version after
//! than before, or another's name, looks again. Cells are given out again at once; whoever reads one that is another block's by then
//! sees that by its name, or by the block's word, which was changed first.

use std::sync::OnceLock;

use super::READ;
use super::table::{INLINE_MAX, Kind, Set};
use crate::caps::CELLS_PER_CHUNK;
use crate::sync::{AtomicU32, AtomicU64, Mutex, Ordering, fence};

/// Tags in a list: four a word.
pub const LIST_MAX: usize = 24;
const LIST_WORDS: usize = 2 + LIST_MAX / 4;
/// A set that shrinks below this many goes back from bits to a list: half, so that one that goes up and down stays.
const LIST_AGAIN: usize = LIST_MAX / 2;
const BIT_WORDS: usize = 64;

/// What a reader saw of a set. On the stack: a look-up allocates for no block.
#[expect(clippy::large_enum_variant, reason = "on the stack, and not kept")]
pub enum Seen {
    /// These, so many.
    Few([u16; LIST_MAX], usize),
    /// A bit for each.
    Many([u64; BIT_WORDS]),
}

impl Seen {
    /// The tags.
    pub fn each(&self, mut tell: impl FnMut(u16)) {
        match self {
            Self::Few(few, count) => few.iter().take(*count).for_each(|tag| tell(*tag)),
            Self::Many(bits) => {
                for (at, word) in bits.iter().enumerate() {
                    let mut word = *word;
                    while word != 0 {
                        tell((at * 64) as u16 + word.trailing_zeros() as u16);
                        word &= word - 1;
                    }
                }
            }
        }
    }

    pub fn has(&self, tag: u16) -> bool {
        match self {
            Self::Few(tags, count) => tags.iter().take(*count).any(|known| *known == tag),
            Self::Many(bits) => bit(bits, tag),
        }
    }
}

fn bit(bits: &[u64; BIT_WORDS], tag: u16) -> bool {
    bits.get(usize::from(tag) / 64).is_some_and(|word| word >> (tag % 64) & 1 == 1)
}

/// Cells of one size.
struct Pool {
    words: usize,
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    made: AtomicU32,
    free: Mutex<Vec<u32>>,
}

impl Pool {
    fn new(words: usize, bytes_max: u64) -> Self {
        let most = (bytes_max / (words * 8 * CELLS_PER_CHUNK) as u64).max(1) as usize;
        let chunks = (0..most).map(|_| OnceLock::new()).collect();
        Self { words, chunks, made: AtomicU32::new(0), free: Mutex::new(Vec::new()) }
    }

    fn chunk_bytes(&self) -> u64 {
        // The cells, and their places on the list of free ones.
        (self.words * 8 * CELLS_PER_CHUNK + 4 * CELLS_PER_CHUNK) as u64
    }

    fn bytes(&self) -> u64 {
        u64::from(self.made.load(Ordering::Relaxed)) * self.chunk_bytes()
    }

    fn bytes_max(&self) -> u64 {
        self.chunks.len() as u64 * self.chunk_bytes()
    }

    fn take(&self) -> Option<u32> {
        let mut free = self.free.lock();
        if free.is_empty() {
            let made = self.made.load(Ordering::Relaxed);
            let chunk = (0..self.words * CELLS_PER_CHUNK).map(|_| AtomicU64::new(0)).collect();
            self.chunks.get(made as usize)?.set(chunk).ok()?;
            self.made.store(made + 1, Ordering::Relaxed);
            let first = made * CELLS_PER_CHUNK as u32;
            free.reserve_exact(CELLS_PER_CHUNK * (made as usize + 1));
            free.extend((first..first + CELLS_PER_CHUNK as u32).rev());
        }
        free.pop()
    }

    fn give_back(&self, cell: u32) {
        self.free.lock().push(cell);
    }

    fn cell(&self, cell: u32) -> Option<&[AtomicU64]> {
        let (chunk, at) = (cell as usize / CELLS_PER_CHUNK, cell as usize % CELLS_PER_CHUNK);
        self.chunks.get(chunk)?.get()?.get(at * self.words..(at + 1) * self.words)
    }

    /// The writer's change of a cell. Words: version and count, the block's name, and what it says.
    fn change(&self, cell: u32, key: u64, count: usize, body: impl Iterator<Item = u64>) {
        let Some([head, name, rest @ ..]) = self.cell(cell) else { return };
        let version = (head.load(Ordering::Relaxed) >> 16) + 1;
        head.store(version << 16 | count as u64, Ordering::Relaxed);
        fence(Ordering::Release);
        name.store(key, Ordering::Relaxed);
        rest.iter().zip(body).for_each(|(to, word)| to.store(word, Ordering::Relaxed));
        head.store((version + 1) << 16 | count as u64, Ordering::Release);
    }

    /// A reader's look at some bits of one: see [`Cells::which`].
    fn which(&self, cell: u32, key: u64, tags: &[u16]) -> Option<u64> {
        let [head, name, rest @ ..] = self.cell(cell)? else { return None };
        let before = head.load(READ);
        let owner = name.load(Ordering::Relaxed);
        let bit = |tag: &u16| {
            rest.get(usize::from(*tag) / 64).map_or(0, |word| word.load(Ordering::Relaxed) >> (tag % 64) & 1)
        };
        let mask = tags.iter().rev().fold(0, |mask, tag| mask << 1 | bit(tag));
        fence(Ordering::Acquire);
        let still = head.load(Ordering::Relaxed) == before && before >> 16 & 1 == 0;
        (still && owner == key).then_some(mask)
    }

    /// A reader's look at one: its count, and its words.
    fn read(&self, cell: u32, key: u64, body: &mut [u64]) -> Option<usize> {
        let [head, name, rest @ ..] = self.cell(cell)? else { return None };
        let before = head.load(READ);
        let owner = name.load(Ordering::Relaxed);
        body.iter_mut().zip(rest).for_each(|(to, word)| *to = word.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let still = head.load(Ordering::Relaxed) == before && before >> 16 & 1 == 0;
        (still && owner == key).then_some((before & 0xFFFF) as usize)
    }
}

/// See the head of this file.
pub struct Cells {
    lists: Pool,
    bits: Pool,
}

impl Cells {
    /// Cells that take so many bytes at most.
    pub fn new(bytes_max: u64) -> Self {
        Self { lists: Pool::new(LIST_WORDS, bytes_max / 2), bits: Pool::new(2 + BIT_WORDS, bytes_max / 2) }
    }

    pub fn bytes(&self) -> u64 {
        self.lists.bytes() + self.bits.bytes()
    }

    pub fn bytes_max(&self) -> u64 {
        self.lists.bytes_max() + self.bits.bytes_max()
    }

    /// What a reader sees of a set now; `None`: it changes, look again.
    pub fn seen(&self, set: Set, key: u64) -> Option<Seen> {
        match set.kind() {
            Kind::Inline(count) => {
                let mut tags = [0; LIST_MAX];
                tags.iter_mut().zip(set.inline()).for_each(|(to, tag)| *to = tag);
                Some(Seen::Few(tags, count))
            }
            Kind::List(cell) => {
                let mut words = [0; LIST_MAX / 4];
                let count = self.lists.read(cell, key, &mut words)?;
                let mut tags = [0; LIST_MAX];
                for (at, tag) in tags.iter_mut().enumerate() {
                    *tag = (words.get(at / 4)? >> (16 * (at % 4))) as u16;
                }
                Some(Seen::Few(tags, count.min(LIST_MAX)))
            }
            Kind::Bits(cell) => {
                let mut words = [0; BIT_WORDS];
                self.bits.read(cell, key, &mut words)?;
                Some(Seen::Many(words))
            }
        }
    }

    /// Which of `tags`, 64 at most, are in a set now: a bit for each; `None`: it changes, look again.
    pub fn which(&self, set: Set, key: u64, tags: &[u16]) -> Option<u64> {
        let mask =
            |has: &dyn Fn(u16) -> bool| tags.iter().rev().fold(0u64, |mask, tag| mask << 1 | u64::from(has(*tag)));
        match set.kind() {
            Kind::Inline(_) => Some(mask(&|tag| set.inline().any(|known| known == tag))),
            Kind::List(_) => {
                let seen = self.seen(set, key)?;
                Some(mask(&|tag| seen.has(tag)))
            }
            Kind::Bits(cell) => self.bits.which(cell, key, tags),
        }
    }

    /// The tags of a set, for the writer.
    fn tags(&self, set: Set, key: u64) -> Vec<u16> {
        match self.seen(set, key) {
            Some(Seen::Few(tags, count)) => tags.iter().take(count).copied().collect(),
            Some(Seen::Many(bits)) => (0..(BIT_WORDS * 64) as u16).filter(|tag| bit(&bits, *tag)).collect(),
            None => Vec::new(),
        }
    }

    /// The set as it is to be with these tags, in the smallest place that fits; `had` is given back where another is better.
    fn put(&self, had: Set, key: u64, tags: &[u16]) -> Option<Set> {
        let bits = || {
            let mut words = [0u64; BIT_WORDS];
            for tag in tags {
                if let Some(word) = words.get_mut(usize::from(*tag) / 64) {
                    *word |= 1 << (tag % 64);
                }
            }
            words
        };
        let list = || tags.chunks(4).map(|four| four.iter().rev().fold(0, |word, tag| word << 16 | u64::from(*tag)));
        let set = match (had.kind(), tags.len()) {
            (_, 0) => Set::EMPTY,
            (Kind::Inline(_), ..=INLINE_MAX) => Set::of(tags.iter().copied()),
            // One that shrinks stays in its cell for a while.
            (Kind::List(_) | Kind::Bits(_), ..INLINE_MAX) => Set::of(tags.iter().copied()),
            (Kind::List(cell), ..=LIST_MAX) => {
                self.lists.change(cell, key, tags.len(), list());
                return Some(had);
            }
            (Kind::Bits(cell), LIST_AGAIN..) => {
                self.bits.change(cell, key, tags.len(), bits().into_iter());
                return Some(had);
            }
            (_, ..=LIST_MAX) => {
                let cell = self.lists.take()?;
                self.lists.change(cell, key, tags.len(), list());
                Set::list(cell)
            }
            _ => {
                let cell = self.bits.take()?;
                self.bits.change(cell, key, tags.len(), bits().into_iter());
                Set::bits(cell)
            }
        };
        self.give_back(had);
        Some(set)
    }

    fn give_back(&self, set: Set) {
        match set.kind() {
            Kind::List(cell) => self.lists.give_back(cell),
            Kind::Bits(cell) => self.bits.give_back(cell),
            Kind::Inline(_) => {}
        }
    }

    /// The tags of a set, for the writer.
    pub fn each(&self, set: Set, key: u64) -> Vec<u16> {
        self.tags(set, key)
    }

    /// A block's set with one tag more, and whether it is new to it; `None` where there is no cell for it.
    pub fn with(&self, set: Set, key: u64, tag: u16) -> Option<(Set, bool)> {
        if let Kind::Inline(count) = set.kind() {
            if set.inline().any(|known| known == tag) {
                return Some((set, false));
            }
            if count < INLINE_MAX {
                return Some((set.and(tag), true));
            }
        }
        let mut tags = self.tags(set, key);
        if tags.contains(&tag) {
            return Some((set, false));
        }
        tags.push(tag);
        self.put(set, key, &tags).map(|set| (set, true))
    }

    /// A block's set without those that `keep` does not name, and how many those were.
    pub fn only(&self, set: Set, key: u64, keep: impl Fn(u16) -> bool) -> (Set, u64) {
        if let Kind::Inline(count) = set.kind() {
            let kept = Set::of(set.inline().filter(|tag| keep(*tag)));
            let left = if let Kind::Inline(left) = kept.kind() { left } else { 0 };
            return (kept, (count - left) as u64);
        }
        let mut tags = self.tags(set, key);
        let before = tags.len();
        tags.retain(|tag| keep(*tag));
        if tags.len() == before {
            return (set, 0);
        }
        // A list in place of bits may find no cell: then the bits stay, with fewer of them set.
        let gone = (before - tags.len()) as u64;
        match self.put(set, key, &tags) {
            Some(set) => (set, gone),
            None => (self.in_place(set, key, &tags), gone),
        }
    }

    fn in_place(&self, set: Set, key: u64, tags: &[u16]) -> Set {
        if let Kind::Bits(cell) = set.kind() {
            let mut words = [0u64; BIT_WORDS];
            for tag in tags {
                if let Some(word) = words.get_mut(usize::from(*tag) / 64) {
                    *word |= 1 << (tag % 64);
                }
            }
            self.bits.change(cell, key, tags.len(), words.into_iter());
        }
        set
    }

    /// Nobody has the block any more: how many had it.
    pub fn give_up(&self, set: Set, key: u64) -> u64 {
        let count = match set.kind() {
            Kind::Inline(count) => count,
            _ => self.tags(set, key).len(),
        };
        self.give_back(set);
        count as u64
    }
}
