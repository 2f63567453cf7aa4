//! The table: from a block's name to the set of its holders.

use std::hint::black_box;
use std::sync::OnceLock;

use smallvec::SmallVec;

use super::cells::{Cells, Seen};
use super::{READ, WRITE};
use crate::caps;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

const SLOTS: usize = 7;
const BUCKETS: usize = caps::SEGMENT_BUCKETS;
/// A segment is split when it has so many blocks: about nine in ten slots, as beyond blocks lie far from where they belong. Names are
/// spread so evenly that all segments would split at the same moment: they differ by a tenth.
fn fullness(segment: usize, depth: u32) -> u32 {
    let spread = mixed(segment as u64 ^ u64::from(depth) << 32) as f64 / u64::MAX as f64;
    ((BUCKETS * SLOTS) as f64 * (0.86 + 0.08 * spread)) as u32
}

/// Spreads names, which engines may choose badly, over all bits. A bijection: no two names become one.
pub fn mixed(name: u64) -> u64 {
    let mut key = name ^ 0x9E37_79B9_7F4A_7C15;
    key = (key ^ key >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    key = (key ^ key >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    key ^ key >> 31
}

/// The holders of a block, in a word: how many (3 bits), then up to five tags of 12 bits; or a cell's kind and number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Set(pub u64);

/// Tags in a word.
pub const INLINE_MAX: usize = 5;
const LIST: u64 = 6;
const BITS: u64 = 7;

/// What a word says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// So many tags, in the word.
    Inline(usize),
    /// A cell that lists some tens.
    List(u32),
    /// A cell with a bit for each tag.
    Bits(u32),
}

impl Set {
    pub const EMPTY: Self = Self(0);

    pub fn one(tag: u16) -> Self {
        Self::EMPTY.and(tag)
    }

    pub fn list(cell: u32) -> Self {
        Self(LIST | u64::from(cell) << 4)
    }

    pub fn bits(cell: u32) -> Self {
        Self(BITS | u64::from(cell) << 4)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn kind(self) -> Kind {
        match self.0 & 7 {
            LIST => Kind::List((self.0 >> 4) as u32),
            BITS => Kind::Bits((self.0 >> 4) as u32),
            count => Kind::Inline(count as usize),
        }
    }

    /// The tags in the word, where they are.
    pub fn inline(self) -> impl Iterator<Item = u16> {
        let count = if let Kind::Inline(count) = self.kind() { count } else { 0 };
        (0..count).map(move |at| (self.0 >> (4 + 12 * at) & 0xFFF) as u16)
    }

    /// One tag more, in the word.
    pub fn and(self, tag: u16) -> Self {
        let count = self.0 & 7;
        Self((self.0 & !7) | (count + 1) | u64::from(tag) << (4 + 12 * count))
    }

    /// These tags, in the word.
    pub fn of(tags: impl Iterator<Item = u16>) -> Self {
        tags.fold(Self::EMPTY, Self::and)
    }
}

/// Two cache lines side by side, which come from memory together: seven names and what is said of the bucket, then each name's holders.
#[repr(align(128))]
struct Bucket([AtomicU64; 16]);

/// Of what is said of the bucket: blocks that belong here or before, and lie behind (eight bits) ...
const BEHIND: u64 = 0xFF;
/// ... by slot, whether somebody looked its block up since the hand passed it last ...
const LOOKED: u32 = 8;
/// ... and whether somebody did so between the two times before.
const LOOKED_BEFORE: u32 = 16;

impl Bucket {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    fn key(&self, slot: usize) -> Option<&AtomicU64> {
        self.0.get(slot)
    }

    fn set(&self, slot: usize) -> Option<&AtomicU64> {
        self.0.get(SLOTS + 1 + slot)
    }

    /// The slots, as bits, whose name is `key`: without a branch for each, which no processor could foretell.
    fn named(&self, key: u64) -> u32 {
        let [a, b, c, d, e, f, g, ..] = &self.0;
        let is = |(at, name): (u32, &AtomicU64)| u32::from(name.load(READ) == key) << at;
        (0..).zip([a, b, c, d, e, f, g]).map(is).fold(0, |named, bit| named | bit)
    }

    /// The slots, as bits, that hold nothing.
    fn vacant(&self) -> u32 {
        let [_, _, _, _, _, _, _, _, a, b, c, d, e, f, g, _] = &self.0;
        let is = |(at, set): (u32, &AtomicU64)| u32::from(set.load(Ordering::Relaxed) == 0) << at;
        (0..).zip([a, b, c, d, e, f, g]).map(is).fold(0, |vacant, bit| vacant | bit)
    }

    fn said(&self) -> &AtomicU64 {
        let [_, _, _, _, _, _, _, said, ..] = &self.0;
        said
    }

    fn overflows(&self) -> bool {
        self.said().load(READ) & BEHIND > 0
    }

    /// A reader found a block.
    fn look(&self, slot: usize) {
        let bit = 1 << (LOOKED as usize + slot);
        if self.said().load(Ordering::Relaxed) & bit == 0 {
            self.said().fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn was_looked(&self, slot: usize) -> bool {
        let bits = 1 << (LOOKED as usize + slot) | 1 << (LOOKED_BEFORE as usize + slot);
        self.said().load(Ordering::Relaxed) & bits != 0
    }

    /// The hand passes a slot: what was looked up before the last time is forgotten.
    fn pass(&self, slot: usize) {
        let (now, before) = (1u64 << (LOOKED as usize + slot), 1u64 << (LOOKED_BEFORE as usize + slot));
        let was = self.said().fetch_and(!(now | before), Ordering::Relaxed);
        if was & now != 0 {
            self.said().fetch_or(before, Ordering::Relaxed);
        }
    }
}

struct Segment {
    buckets: [Bucket; BUCKETS],
    /// Leading bits that all names in it have in common.
    depth: AtomicU32,
    used: AtomicU32,
    /// It is split at so many blocks.
    full: AtomicU32,
    hand: AtomicU32,
}

impl Segment {
    fn new(at: usize, depth: u32) -> Self {
        Self {
            buckets: std::array::from_fn(|_| Bucket::new()),
            depth: AtomicU32::new(depth),
            used: AtomicU32::new(0),
            full: AtomicU32::new(fullness(at, depth)),
            hand: AtomicU32::new(0),
        }
    }

    const BYTES: u64 = size_of::<Self>() as u64;

    /// A block more, or fewer. There is one writer: nothing is locked for it.
    fn count(&self, more: bool) {
        let used = self.used.load(Ordering::Relaxed);
        self.used.store(if more { used + 1 } else { used.saturating_sub(1) }, Ordering::Relaxed);
    }

    /// Counts a block that lies `distance` buckets behind its own, or no longer does. A count that is full stays: readers look on
    /// in vain.
    fn count_overflow(&self, home: usize, distance: usize, more: bool) {
        for behind in 0..distance {
            let Some(bucket) = self.buckets.get((home + behind) % BUCKETS) else { return };
            match (bucket.said().load(Ordering::Relaxed) & BEHIND, more) {
                (BEHIND, _) | (0, false) => {}
                (_, true) => _ = bucket.said().fetch_add(1, WRITE),
                (_, false) => _ = bucket.said().fetch_sub(1, WRITE),
            }
        }
    }
}

/// Where a block is, and what was said of it when the writer looked.
#[derive(Clone, Copy, Debug)]
pub struct At {
    segment: usize,
    bucket: usize,
    slot: usize,
    key: u64,
    set: Set,
}

impl At {
    /// Its holders.
    pub fn set(&self) -> Set {
        self.set
    }

    /// Its name, mixed.
    pub fn key(&self) -> u64 {
        self.key
    }

    fn home(&self) -> usize {
        self.key as usize % BUCKETS
    }
}

/// A slot for a block.
#[derive(Clone, Copy, Debug)]
pub struct Vacant {
    bucket: usize,
    slot: usize,
    key: u64,
    distance: usize,
}

/// What [`Table::look_for`] found.
pub enum Place {
    Found(At),
    Vacant(Vacant),
    /// Neither it nor room for it.
    Nowhere,
}

fn vacant_in(segment: &Segment, key: u64) -> Option<Vacant> {
    let home = key as usize % BUCKETS;
    (0..=caps::PROBES_MAX).find_map(|distance| {
        let bucket = (home + distance) % BUCKETS;
        let slots = segment.buckets.get(bucket)?.vacant();
        (slots != 0).then_some(Vacant { bucket, slot: slots.trailing_zeros() as usize, key, distance })
    })
}

/// What came of an insertion.
pub enum Insert {
    Done,
    /// The segment is full: split it, then try again.
    NeedsSplit,
    /// It is full, and the table as large as it may be: this one may go instead.
    Full(Option<At>),
}

/// See the head of this file.
pub struct Table {
    /// By the leading bits of a name: its segment.
    directory: Box<[AtomicU32]>,
    bits: u32,
    segments: Box<[OnceLock<Box<Segment>>]>,
    made: AtomicU32,
}

impl Table {
    pub fn new(bytes_max: u64) -> Self {
        let most = (bytes_max / (Segment::BYTES + 48)).max(1) as usize;
        let most = if cfg!(shuttle) { most.min(4) } else { most };
        // Four times as fine as there are segments: names are spread evenly, but not that evenly.
        let bits = (most.next_power_of_two().trailing_zeros() + 2).min(caps::DIRECTORY_BITS);
        let table = Self {
            directory: (0..1 << bits).map(|_| AtomicU32::new(0)).collect(),
            bits,
            segments: (0..most.min(1 << bits)).map(|_| OnceLock::new()).collect(),
            made: AtomicU32::new(0),
        };
        table.make(0);
        table
    }

    fn make(&self, depth: u32) -> Option<usize> {
        let at = self.made.load(Ordering::Relaxed) as usize;
        self.segments.get(at)?.set(Box::new(Segment::new(at, depth))).ok()?;
        self.made.store(at as u32 + 1, WRITE);
        Some(at)
    }

    /// Segments that there are.
    pub fn segments(&self) -> usize {
        self.made.load(READ) as usize
    }

    pub fn bytes(&self) -> u64 {
        self.segments() as u64 * Segment::BYTES + self.fixed_bytes()
    }

    pub fn bytes_max(&self) -> u64 {
        self.segments.len() as u64 * Segment::BYTES + self.fixed_bytes()
    }

    fn fixed_bytes(&self) -> u64 {
        self.directory.len() as u64 * 4 + self.segments.len() as u64 * size_of::<OnceLock<Box<Segment>>>() as u64
    }

    /// Where a name belongs. What is looked for there may have moved since, if there was a split.
    pub fn home(&self, key: u64) -> Option<Home<'_>> {
        let place = (key >> (64 - self.bits)) as usize;
        let at = self.directory.get(place)?.load(READ) as usize;
        let segment: &Segment = self.segments.get(at)?.get()?;
        Some(Home { segment, at, key })
    }

    /// Where some names belong, their buckets on their way from memory side by side.
    pub fn homes(&self, keys: impl Iterator<Item = u64>) -> Homes<'_> {
        // Two short loops: the shorter each is, the more of its loads the processor has under way at once.
        let homes: Homes<'_> = keys.filter_map(|key| self.home(key)).collect();
        black_box(homes.iter().fold(0, |loaded, home| loaded ^ home.load()));
        homes
    }

    // ------------------------------------------------------------------------------- the writer

    /// Where a block is.
    pub fn find(&self, key: u64) -> Option<At> {
        self.find_at(&self.home(key)?)
    }

    /// The same, of one whose home is known.
    pub fn find_at(&self, home: &Home<'_>) -> Option<At> {
        match self.look_for(home) {
            Place::Found(at) => Some(at),
            _ => None,
        }
    }

    /// Where a block is, or where it would go.
    pub fn look_for(&self, home: &Home<'_>) -> Place {
        let Home { segment, at, key } = *home;
        let home = key as usize % BUCKETS;
        let mut vacant = None;
        let mut may_be = true;
        for distance in 0..=caps::PROBES_MAX {
            let bucket = (home + distance) % BUCKETS;
            let Some(words) = segment.buckets.get(bucket) else { break };
            let mut named = if may_be { words.named(key) } else { 0 };
            while named != 0 {
                let slot = named.trailing_zeros() as usize;
                let set = words.set(slot).map_or(Set::EMPTY, |set| Set(set.load(Ordering::Relaxed)));
                if !set.is_empty() {
                    return Place::Found(At { segment: at, bucket, slot, key, set });
                }
                named &= named - 1;
            }
            if vacant.is_none() {
                let slots = words.vacant();
                let slot = slots.trailing_zeros() as usize;
                vacant = (slots != 0).then_some(Vacant { bucket, slot, key, distance });
            }
            may_be = may_be && words.overflows();
            if !may_be && vacant.is_some() {
                break;
            }
        }
        vacant.map_or(Place::Nowhere, Place::Vacant)
    }

    /// Puts a block that is not there, where [`Self::look_for`] said.
    pub fn insert(&self, key: u64, set: Set, place: &Place) -> Insert {
        let Some(Home { segment, at, .. }) = self.home(key) else { return Insert::Full(None) };
        let can_split = segment.depth.load(Ordering::Relaxed) < self.bits && self.segments() < self.segments.len();
        if can_split && segment.used.load(Ordering::Relaxed) >= segment.full.load(Ordering::Relaxed) {
            return Insert::NeedsSplit;
        }
        match place {
            Place::Vacant(vacant) => {
                self.fill(segment, vacant, set);
                Insert::Done
            }
            _ if can_split => Insert::NeedsSplit,
            _ => Insert::Full(self.victim(at, segment, key)),
        }
    }

    fn fill(&self, segment: &Segment, vacant: &Vacant, set: Set) {
        let Vacant { bucket, slot, key, distance } = *vacant;
        // Before it can be found: whoever does not find it looks no further than this says.
        segment.count_overflow(key as usize % BUCKETS, distance, true);
        if let Some(words) = segment.buckets.get(bucket)
            && let (Some(name), Some(holders)) = (words.key(slot), words.set(slot))
        {
            name.store(key, WRITE);
            holders.store(set.0, WRITE);
            segment.count(true);
        }
    }

    /// One of those that are in the way of `key`, that nobody looked up since the hand passed it twice: with each that goes the hand
    /// moves on by one slot of the segment.
    fn victim(&self, at: usize, segment: &Segment, key: u64) -> Option<At> {
        let hand = segment.hand.fetch_add(1, Ordering::Relaxed) as usize;
        if let Some(bucket) = segment.buckets.get(hand / SLOTS % BUCKETS) {
            bucket.pass(hand % SLOTS);
        }
        let home = key as usize % BUCKETS;
        let slots = (caps::PROBES_MAX + 1) * SLOTS;
        let mut chosen = None;
        for step in 0..slots {
            let place = (hand + step) % slots;
            let (bucket, slot) = ((home + place / SLOTS) % BUCKETS, place % SLOTS);
            let words = segment.buckets.get(bucket)?;
            let (name, set) = (words.key(slot)?.load(Ordering::Relaxed), Set(words.set(slot)?.load(Ordering::Relaxed)));
            let is_looked = words.was_looked(slot);
            if chosen.is_none() || !is_looked {
                chosen = Some(At { segment: at, bucket, slot, key: name, set });
            }
            if !is_looked {
                break;
            }
        }
        chosen
    }

    /// Other holders for a block.
    pub fn write(&self, at: At, set: Set) {
        if let Some(word) = self.words(&at).and_then(|words| words.set(at.slot)) {
            word.store(set.0, WRITE);
        }
    }

    fn words(&self, at: &At) -> Option<&Bucket> {
        self.segments.get(at.segment)?.get()?.buckets.get(at.bucket)
    }

    /// True where the block is where it was, with the holders that it had.
    pub fn is_still(&self, at: &At) -> bool {
        let word =
            |of: fn(&Bucket, usize) -> Option<&AtomicU64>| Some(of(self.words(at)?, at.slot)?.load(Ordering::Relaxed));
        word(Bucket::key) == Some(at.key) && word(Bucket::set) == Some(at.set.0)
    }

    /// The block has no holder any more.
    pub fn clear(&self, at: At) {
        self.write(at, Set::EMPTY);
        let Some(segment) = self.segments.get(at.segment).and_then(OnceLock::get) else { return };
        let distance = (at.bucket + BUCKETS - at.home()) % BUCKETS;
        segment.count_overflow(at.home(), distance, false);
        segment.count(false);
    }

    /// The blocks of a segment.
    pub fn of_segment(&self, at: usize) -> Vec<At> {
        let Some(segment) = self.segments.get(at).and_then(OnceLock::get) else { return Vec::new() };
        let mut blocks = Vec::with_capacity(segment.used.load(Ordering::Relaxed) as usize);
        for (bucket, words) in segment.buckets.iter().enumerate() {
            for slot in 0..SLOTS {
                let (Some(name), Some(holders)) = (words.key(slot), words.set(slot)) else { continue };
                let set = Set(holders.load(Ordering::Relaxed));
                if !set.is_empty() {
                    blocks.push(At { segment: at, bucket, slot, key: name.load(Ordering::Relaxed), set });
                }
            }
        }
        blocks
    }

    /// The segment of a name.
    pub fn place_of(&self, key: u64) -> Option<usize> {
        self.home(key).map(|home| home.at)
    }

    /// Half of a segment's names get one of their own. Readers that look in the old one meanwhile miss some blocks.
    pub fn split(&self, key: u64) {
        let Some(Home { segment, at, .. }) = self.home(key) else { return };
        let depth = segment.depth.load(Ordering::Relaxed);
        let Some(new) = self.make(depth + 1) else { return };
        let Some(upper) = self.segments.get(new).and_then(OnceLock::get) else { return };
        let moves = |key: u64| key >> (63 - depth) & 1 == 1;
        let moving: Vec<At> = self.of_segment(at).into_iter().filter(|block| moves(block.key)).collect();
        for block in &moving {
            // Half as full, the same windows: there is room.
            if let Some(vacant) = vacant_in(upper, block.key) {
                self.fill(upper, &vacant, block.set);
            }
        }
        segment.full.store(fullness(at, depth + 1), Ordering::Relaxed);
        segment.depth.store(depth + 1, Ordering::Relaxed);
        let first = (key >> (63 - depth) | 1) << (self.bits - depth - 1);
        let mask = (1usize << self.bits) - 1;
        let first = first as usize & mask;
        for place in self.directory.iter().skip(first).take(1 << (self.bits - depth - 1)) {
            place.store(new as u32, WRITE);
        }
        moving.into_iter().for_each(|block| self.clear(block));
    }

    // ------------------------------------------------------------------------------- readers

    /// One look at a block's holders: `None` where it has none, or changes all the time.
    pub fn look<T>(&self, home: &Home<'_>, mut of: impl FnMut(Set) -> Option<T>) -> Option<T> {
        let Home { segment, key, .. } = *home;
        let home = key as usize % BUCKETS;
        for distance in 0..=caps::PROBES_MAX {
            let bucket = (home + distance) % BUCKETS;
            let words = segment.buckets.get(bucket)?;
            let mut named = words.named(key);
            while named != 0 {
                let slot = named.trailing_zeros() as usize;
                named &= named - 1;
                let (name, holders) = (words.key(slot)?, words.set(slot)?);
                for _ in 0..caps::READ_TRIES {
                    let set = Set(holders.load(READ));
                    if set.is_empty() || name.load(READ) != key {
                        break;
                    }
                    if let Some(seen) = of(set)
                        && (matches!(set.kind(), Kind::Inline(_)) || holders.load(READ) == set.0)
                    {
                        words.look(slot);
                        return Some(seen);
                    }
                }
            }
            if !words.overflows() {
                return None;
            }
        }
        None
    }

    /// Who has a block now; nobody, where it changes all the time.
    pub fn seen(&self, home: &Home<'_>, cells: &Cells) -> Option<Seen> {
        self.look(home, |set| cells.seen(set, home.key))
    }

    /// Which of `tags`, 64 at most, have a block: a bit for each, in their order.
    pub fn which(&self, home: &Home<'_>, cells: &Cells, tags: &[u16]) -> u64 {
        self.look(home, |set| cells.which(set, home.key, tags)).unwrap_or(0)
    }
}

/// Where a name belongs.
#[derive(Clone, Copy)]
pub struct Home<'a> {
    segment: &'a Segment,
    at: usize,
    key: u64,
}

/// Some of them, on the stack.
pub type Homes<'a> = SmallVec<[Home<'a>; 32]>;

impl Home<'_> {
    /// The name, mixed.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Loads both lines of the bucket, so that they are near when they are needed.
    fn load(&self) -> u64 {
        let bucket = self.segment.buckets.get(self.key as usize % BUCKETS);
        bucket.map_or(0, |bucket| {
            let set = bucket.set(SLOTS - 1).map_or(0, |set| set.load(Ordering::Relaxed));
            bucket.said().load(Ordering::Relaxed) ^ set
        })
    }
}
