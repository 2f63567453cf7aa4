//! Holders: who they are, and the tags by which sets name them.
//!
//! A tag belongs to one holder from when it is given out until that holder leaves, or loses all its blocks; then it is dead until no
//! set has it. A reader notes the generation before it looks at any set: tags that were given out later mean nothing to it.

use std::collections::HashMap;

use super::{READ, WRITE};
use crate::caps;
use crate::sync::{AtomicU64, Mutex, Ordering, fence};

/// A place that blocks lie in, as the index numbers them; no number is given twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct HolderId(pub u32);

/// Tags that are dead, and segments in which they may be still.
struct Dead {
    tag: u16,
    left: usize,
}

struct State {
    tags: HashMap<HolderId, u16>,
    free: Vec<u16>,
    dead: Vec<Dead>,
    last: u32,
}

/// See the head of this file.
pub struct Holders {
    /// By tag: the holder's number and one (upper half), and the generation in which it got the tag; 0 for none.
    owners: Box<[AtomicU64]>,
    generation: AtomicU64,
    /// By tag: twice as often as it lost blocks, and one more while it loses some.
    losses: Box<[AtomicU64]>,
    state: Mutex<State>,
}

impl Holders {
    pub fn new() -> Self {
        let free = (0..caps::HOLDERS_MAX as u16).rev().collect();
        Self {
            owners: (0..caps::HOLDERS_MAX).map(|_| AtomicU64::new(0)).collect(),
            generation: AtomicU64::new(0),
            losses: (0..caps::HOLDERS_MAX).map(|_| AtomicU64::new(0)).collect(),
            state: Mutex::new(State { tags: HashMap::new(), free, dead: Vec::new(), last: 0 }),
        }
    }

    pub fn bytes(&self) -> u64 {
        // Owners and losses, and each tag's places in the map and on the lists.
        (caps::HOLDERS_MAX * (8 + 8 + 16 + 16)) as u64
    }

    /// A holder begins to lose blocks, or is done with it: called around each change. What a reader put together of several looks holds where
    /// this was even before, and the same after: then it lost nothing meanwhile.
    pub fn note_loss(&self, tag: u16) {
        if let Some(losses) = self.losses.get(usize::from(tag)) {
            // There is one writer.
            losses.store(losses.load(Ordering::Relaxed) + 1, WRITE);
            fence(Ordering::Release);
        }
    }

    /// See [`Self::note_loss`].
    pub fn losses(&self, tag: u16) -> u64 {
        self.losses.get(usize::from(tag)).map_or(0, |losses| losses.load(READ))
    }

    /// What a reader notes first.
    pub fn generation(&self) -> u64 {
        self.generation.load(READ)
    }

    /// Whose tag it is, for a reader that began in generation `seen`.
    pub fn holder(&self, tag: u16, seen: u64) -> Option<HolderId> {
        let owner = self.owners.get(usize::from(tag))?.load(READ);
        let (holder, given) = ((owner >> 32) as u32, owner as u32);
        // Generations wrap after four thousand million restarts: the difference tells.
        let known = (seen as u32).wrapping_sub(given) < 1 << 31;
        (holder > 0 && known).then(|| HolderId(holder - 1))
    }

    /// The tag that a holder has now.
    pub fn tag(&self, holder: HolderId) -> Option<u16> {
        self.state.lock().tags.get(&holder).copied()
    }

    pub fn add(&self) -> Option<HolderId> {
        let mut state = self.state.lock();
        let tag = state.free.pop()?;
        let holder = HolderId(state.last);
        state.last += 1;
        self.give(&mut state, holder, tag);
        Some(holder)
    }

    fn give(&self, state: &mut State, holder: HolderId, tag: u16) {
        state.tags.insert(holder, tag);
        let generation = self.generation.load(Ordering::Relaxed) + 1;
        if let Some(owner) = self.owners.get(usize::from(tag)) {
            owner.store(u64::from(holder.0 + 1) << 32 | u64::from(generation as u32), WRITE);
        }
        self.generation.store(generation, WRITE);
    }

    fn bury(&self, state: &mut State, tag: u16, segments: usize) {
        if let Some(owner) = self.owners.get(usize::from(tag)) {
            owner.store(0, WRITE);
        }
        state.dead.push(Dead { tag, left: segments });
    }

    /// Another tag for a holder, whose old one is dead from now on; false where none is free: sweep, and ask again.
    pub fn retag(&self, holder: HolderId, segments: usize) -> bool {
        let mut state = self.state.lock();
        if let Some(old) = state.tags.remove(&holder) {
            self.bury(&mut state, old, segments);
        }
        let Some(tag) = state.free.pop() else { return false };
        self.give(&mut state, holder, tag);
        true
    }

    /// The holder is no more.
    pub fn remove(&self, holder: HolderId, segments: usize) {
        let mut state = self.state.lock();
        if let Some(tag) = state.tags.remove(&holder) {
            self.bury(&mut state, tag, segments);
        }
    }

    /// True where tags wait for a sweep.
    pub fn has_dead(&self) -> bool {
        !self.state.lock().dead.is_empty()
    }

    /// True for each tag that is dead.
    pub fn dead(&self) -> impl Fn(u16) -> bool + use<> {
        let mut bits = [0u64; caps::HOLDERS_MAX.div_ceil(64)];
        for dead in &self.state.lock().dead {
            if let Some(word) = bits.get_mut(usize::from(dead.tag) / 64) {
                *word |= 1 << (dead.tag % 64);
            }
        }
        move |tag| bits.get(usize::from(tag) / 64).is_some_and(|word| word >> (tag % 64) & 1 == 1)
    }

    /// There is one segment more to sweep; no dead tag is in it, but a sweep passes it.
    pub fn segment_made(&self) {
        self.state.lock().dead.iter_mut().for_each(|dead| dead.left += 1);
    }

    /// The next segment has no dead tag any more.
    pub fn segment_swept(&self) {
        let mut state = self.state.lock();
        let State { free, dead, .. } = &mut *state;
        dead.retain_mut(|dead| {
            dead.left = dead.left.saturating_sub(1);
            if dead.left == 0 {
                free.push(dead.tag);
            }
            dead.left > 0
        });
    }
}
