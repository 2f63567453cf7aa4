//! Sets of holders that a word cannot say: a cell with some windows of tags, or one with all.
//!
//! A cell says whose it is, and has a version that is odd while it changes hands (a seqlock): a reader that sees another version after
//! than before, or another's name, looks again. Cells are given out again at once; whoever reads one that is another block's by then
//! sees that by its name, or by the block's word, which was changed first. A tag more or less of a window that is there is one store.

use std::sync::OnceLock;

use crate::caps::CELLS_PER_CHUNK;
use crate::flat::sets::{Kind, LIST_MAX, Set, Tags, WINDOWS, Windows, put};
use crate::prefetch::prefetch;
use crate::sync::{AtomicU32, AtomicU64, Mutex, Ordering, fence};
use crate::{READ, WRITE};

/// Windows in a cell that has some.
const SOME: usize = 6;
/// A set that shrinks to this many windows goes back from all to some: half, so that one that goes up and down stays.
const SOME_AGAIN: usize = SOME / 2;
/// Version and name.
const HEAD: usize = 2;

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

    /// What a cell says, for the writer.
    fn body(&self, cell: u32) -> &[AtomicU64] {
        self.cell(cell).and_then(|cell| cell.get(HEAD..)).unwrap_or_default()
    }

    /// The writer fills a cell, for the block `key`.
    fn fill(&self, cell: u32, key: u64, mut body: impl FnMut(usize) -> u64) {
        let Some([version, name, rest @ ..]) = self.cell(cell) else { return };
        let before = version.load(Ordering::Relaxed);
        version.store(before + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        name.store(key, Ordering::Relaxed);
        rest.iter().enumerate().for_each(|(at, to)| to.store(body(at), Ordering::Relaxed));
        version.store(before + 2, WRITE);
    }

    /// A reader's look at one: `None` where it changes hands, or is another's.
    fn read<T>(&self, cell: u32, key: u64, read: impl FnOnce(&[AtomicU64]) -> T) -> Option<T> {
        let [version, name, rest @ ..] = self.cell(cell)? else { return None };
        let before = version.load(READ);
        let owner = name.load(Ordering::Relaxed);
        let seen = read(rest);
        fence(Ordering::Acquire);
        let still = version.load(Ordering::Relaxed) == before && before.is_multiple_of(2);
        (still && owner == key).then_some(seen)
    }
}

/// The windows of a cell that have tags.
fn windows_of(body: &[AtomicU64]) -> Windows {
    body.iter().map(|word| Tags(word.load(READ))).filter(|tags| !tags.is_empty()).collect()
}

/// The word of a cell with `tags`'s window.
fn beside(body: &[AtomicU64], tags: Tags) -> Option<&AtomicU64> {
    body.iter().find(|word| {
        let known = Tags(word.load(Ordering::Relaxed));
        !known.is_empty() && known.is_beside(tags)
    })
}

/// See the head of this file.
pub struct Cells {
    some: Pool,
    all: Pool,
}

impl Cells {
    /// Cells that take so many bytes at most.
    pub fn new(bytes_max: u64) -> Self {
        Self { some: Pool::new(HEAD + SOME, bytes_max / 2), all: Pool::new(HEAD + WINDOWS, bytes_max / 2) }
    }

    pub fn bytes(&self) -> u64 {
        self.some.bytes() + self.all.bytes()
    }

    pub fn bytes_max(&self) -> u64 {
        self.some.bytes_max() + self.all.bytes_max()
    }

    /// All tags of a set; `None`: it changes, look again. The writer's are always there.
    pub fn windows(&self, set: Set, key: u64) -> Option<Windows> {
        match set.kind() {
            Kind::Window(tags) => Some(Some(tags).into_iter().filter(|tags| !tags.is_empty()).collect()),
            Kind::List => {
                let mut windows = Windows::new();
                set.listed().for_each(|tag| put(&mut windows, Tags::one(tag)));
                Some(windows)
            }
            Kind::Some(cell) => self.some.read(cell, key, windows_of),
            Kind::All(cell) => self.all.read(cell, key, windows_of),
        }
    }

    /// Those of `tags` that are in a set; `None`: it changes, look again.
    pub fn among(&self, set: Set, key: u64, tags: Tags) -> Option<Tags> {
        let none = tags.but(tags);
        match set.kind() {
            Kind::Window(known) => Some(tags.and(known)),
            Kind::List => {
                let known = set.listed().map(Tags::one).filter(|one| one.is_beside(tags));
                Some(tags.and(known.fold(none, Tags::or)))
            }
            Kind::Some(cell) => self.some.read(cell, key, |body| {
                let all = body.iter().map(|word| tags.and(Tags(word.load(READ))));
                all.fold(none, Tags::or)
            }),
            Kind::All(cell) => self
                .all
                .read(cell, key, |body| body.get(tags.window()).map_or(none, |word| tags.and(Tags(word.load(READ))))),
        }
    }

    /// Of each window of `open`, which of its tags are in a set, into `left`; `None`: it changes, look again.
    #[inline(always)]
    pub fn among_all(&self, set: Set, key: u64, open: &[Tags], left: &mut [u64]) -> Option<()> {
        left.iter_mut().for_each(|left| *left = 0);
        let mut keep = |known: Tags| {
            for (left, open) in left.iter_mut().zip(open) {
                *left |= if open.is_beside(known) { open.0 & known.mask() } else { 0 };
            }
        };
        match set.kind() {
            Kind::Window(known) => keep(known),
            Kind::List => set.listed().map(Tags::one).for_each(keep),
            Kind::Some(cell) => {
                self.some.read(cell, key, |body| body.iter().for_each(|word| keep(Tags(word.load(READ)))))?;
            }
            Kind::All(cell) => self.all.read(cell, key, |body| {
                let words = open.iter().filter_map(|tags| body.get(tags.window()));
                words.for_each(|word| keep(Tags(word.load(READ))));
            })?,
        }
        Some(())
    }

    /// The cell of a set is on its way from memory.
    pub fn prefetch(&self, set: Set) {
        let cell = match set.kind() {
            Kind::Some(cell) => self.some.cell(cell),
            Kind::All(cell) => self.all.cell(cell),
            Kind::Window(_) | Kind::List => None,
        };
        // The head, and the first windows; a cell may lie in two lines.
        if let Some([version, .., last]) = cell.and_then(|cell| cell.get(..HEAD + SOME)) {
            prefetch(version);
            prefetch(last);
        }
    }

    fn written(&self, set: Set, key: u64) -> Windows {
        self.windows(set, key).unwrap_or_default()
    }

    /// The set of these windows, in the smallest place that fits; `had` is given back where it is another.
    fn place(&self, had: Set, key: u64, windows: &[Tags]) -> Option<Set> {
        let set = match Set::inline(windows) {
            Some(set) => set,
            None if windows.len() <= SOME => {
                let cell = self.some.take()?;
                self.some.fill(cell, key, |at| windows.get(at).map_or(0, |tags| tags.0));
                Set::some(cell)
            }
            None => {
                let cell = self.all.take()?;
                let of = |window: usize| windows.iter().find(|tags| tags.window() == window);
                self.all.fill(cell, key, |at| of(at).copied().unwrap_or(Tags::of_window(at, 0)).0);
                Set::all(cell)
            }
        };
        self.give_back(had);
        Some(set)
    }

    fn give_back(&self, set: Set) {
        match set.kind() {
            Kind::Some(cell) => self.some.give_back(cell),
            Kind::All(cell) => self.all.give_back(cell),
            Kind::Window(_) | Kind::List => {}
        }
    }

    /// A block's set with a tag more, and whether it is new to it; `None` where there is no cell for it.
    #[inline(always)]
    pub fn with(&self, set: Set, key: u64, one: Tags) -> Option<(Set, bool)> {
        if set.is_window_of(one) {
            return Some((Set(set.0 | one.0), set.0 & one.mask() == 0));
        }
        self.with_elsewhere(set, key, one)
    }

    fn with_elsewhere(&self, set: Set, key: u64, one: Tags) -> Option<(Set, bool)> {
        let add = |word: &AtomicU64| {
            let known = Tags(word.load(Ordering::Relaxed));
            word.store(known.or(one).0, WRITE);
            (set, known.and(one).is_empty())
        };
        match set.kind() {
            Kind::Some(cell) => {
                let body = self.some.body(cell);
                if let Some(word) = beside(body, one) {
                    return Some(add(word));
                }
                if let Some(word) = body.iter().find(|word| Tags(word.load(Ordering::Relaxed)).is_empty()) {
                    word.store(one.0, WRITE);
                    return Some((set, true));
                }
            }
            Kind::All(cell) => return self.all.body(cell).get(one.window()).map(add),
            Kind::Window(_) | Kind::List => {}
        }
        let mut windows = self.written(set, key);
        let before: usize = windows.iter().map(|tags| tags.len()).sum();
        put(&mut windows, one);
        if windows.iter().map(|tags| tags.len()).sum::<usize>() == before {
            return Some((set, false));
        }
        self.place(set, key, &windows).map(|set| (set, true))
    }

    /// A block's set without a tag, and 1 if it had it.
    #[inline(always)]
    pub fn without_one(&self, set: Set, key: u64, one: Tags) -> (Set, u64) {
        if set.is_window_of(one) {
            let left = Tags(set.0).but(one);
            return (Set::window(left), u64::from(left.0 != set.0));
        }
        self.without(set, key, |tags| if tags.is_beside(one) { one } else { tags.but(tags) })
    }

    /// A block's set without those of `gone` that it has, and how many those are. `gone`: of each window, its tags.
    #[inline(always)]
    pub fn without(&self, set: Set, key: u64, gone: impl Fn(Tags) -> Tags) -> (Set, u64) {
        if let Kind::Window(tags) = set.kind() {
            let left = tags.but(gone(tags));
            return (Set::window(left), (tags.len() - left.len()) as u64);
        }
        self.without_some(set, key, gone)
    }

    fn without_some(&self, set: Set, key: u64, gone: impl Fn(Tags) -> Tags) -> (Set, u64) {
        let mut windows = self.written(set, key);
        let mut count = 0;
        for tags in &mut windows {
            let left = tags.but(gone(*tags));
            count += tags.len() - left.len();
            *tags = left;
        }
        if count == 0 {
            return (set, 0);
        }
        windows.retain(|tags| !tags.is_empty());
        let left: usize = windows.iter().map(|tags| tags.len()).sum();
        // One that shrinks stays in its cell for a while.
        let stays = match set.kind() {
            Kind::Some(_) => left >= LIST_MAX && windows.len() > 1,
            Kind::All(_) => windows.len() > SOME_AGAIN,
            Kind::Window(_) | Kind::List => false,
        };
        // A smaller cell may not be there: then the larger one stays.
        let smaller = if stays { None } else { self.place(set, key, &windows) };
        (smaller.unwrap_or_else(|| self.in_place(set, &windows)), count as u64)
    }

    /// The same cell with fewer tags.
    fn in_place(&self, set: Set, windows: &[Tags]) -> Set {
        let body = match set.kind() {
            Kind::Some(cell) => self.some.body(cell),
            Kind::All(cell) => self.all.body(cell),
            Kind::Window(_) | Kind::List => return set,
        };
        for word in body {
            let known = Tags(word.load(Ordering::Relaxed));
            let left = windows.iter().find(|tags| tags.is_beside(known)).copied().unwrap_or(known.but(known));
            if left != known && !known.is_empty() {
                word.store(left.0, WRITE);
            }
        }
        set
    }

    /// Nobody has the block any more.
    pub fn give_up(&self, set: Set) {
        self.give_back(set);
    }
}
