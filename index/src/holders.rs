//! Holders: who they are, and the tags by which sets name them.
//!
//! A tag belongs to one holder from when it is given out until that holder leaves, or loses all its blocks; then it is dead until no
//! set has it. A reader notes the generation before it looks at any set: tags that were given out later mean nothing to it.

use std::collections::VecDeque;

use crate::apart::Apart;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use crate::{READ, WRITE, caps};

/// A place that blocks lie in, as the index numbers them; no number is given twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct HolderId(pub u32);

/// Of a number, the member's place among the members.
const PLACE_BITS: u32 = 12;

impl HolderId {
    fn place(self) -> usize {
        self.0 as usize & ((1 << PLACE_BITS) - 1)
    }
}

/// What readers know of a tag.
struct Owner {
    /// The holder's number and one (upper half), and the generation in which it got the tag; 0 for none.
    holder: AtomicU64,
    /// The number of the last loss that concerned it.
    loss: AtomicU64,
}

/// What readers see.
pub struct Owners {
    of: Box<[Owner]>,
    generation: AtomicU64,
    /// No tag that was given out is as large.
    tags: AtomicU32,
    /// How often blocks were lost.
    losses: Apart<AtomicU64>,
}

impl Owners {
    pub fn new() -> Self {
        let owner = |_| Owner { holder: AtomicU64::new(0), loss: AtomicU64::new(0) };
        let of = (0..caps::HOLDERS_MAX).map(owner).collect();
        Self { of, generation: AtomicU64::new(0), tags: AtomicU32::new(0), losses: Apart(AtomicU64::new(0)) }
    }

    pub fn bytes(&self) -> u64 {
        // Owners, and each tag's places among members and on lists.
        (caps::HOLDERS_MAX * (size_of::<Owner>() + size_of::<Member>() + 16)) as u64
    }

    /// What a reader notes first, and again before it looks once more: [`Self::lost_since`].
    pub fn losses(&self) -> u64 {
        self.losses.load(READ)
    }

    /// True where the tag's holder may have lost blocks since [`Self::losses`] said `seen`: what a reader put together of several looks
    /// holds where it did not.
    pub fn lost_since(&self, tag: u16, seen: u64) -> bool {
        self.of.get(usize::from(tag)).is_none_or(|owner| owner.loss.load(Ordering::Relaxed) > seen)
    }

    /// Holders lose blocks: all that `lose` takes away is of `tags`. One at a time.
    pub fn lose(&self, tags: impl Iterator<Item = u16>, lose: impl FnOnce()) {
        let number = self.losses.load(Ordering::Relaxed) + 1;
        for owner in tags.filter_map(|tag| self.of.get(usize::from(tag))) {
            owner.loss.store(number, Ordering::Relaxed);
        }
        // Whoever sees anything that is written from now on sees that, too.
        fence(Ordering::Release);
        lose();
        self.losses.store(number, WRITE);
    }

    /// What a reader notes first.
    pub fn generation(&self) -> u64 {
        self.generation.load(READ)
    }

    /// Of a reader that noted the generation before: no tag that means anything to it is as large.
    pub fn tags(&self) -> u32 {
        self.tags.load(Ordering::Relaxed)
    }

    /// Whose tag it is, for a reader that began in generation `seen`.
    pub fn holder(&self, tag: u16, seen: u64) -> Option<HolderId> {
        let owner = self.of.get(usize::from(tag))?.holder.load(READ);
        let (holder, given) = ((owner >> 32) as u32, owner as u32);
        // Generations wrap after four thousand million restarts: the difference tells.
        let known = (seen as u32).wrapping_sub(given) < 1 << 31;
        (holder > 0 && known).then(|| HolderId(holder - 1))
    }

    fn give(&self, holder: HolderId, tag: u16) {
        let generation = self.generation.load(Ordering::Relaxed) + 1;
        if let Some(owner) = self.of.get(usize::from(tag)) {
            owner.holder.store(u64::from(holder.0 + 1) << 32 | u64::from(generation as u32), WRITE);
        }
        self.tags.store(self.tags().max(u32::from(tag) + 1), Ordering::Relaxed);
        self.generation.store(generation, WRITE);
    }

    fn bury(&self, tag: u16) {
        if let Some(owner) = self.of.get(usize::from(tag)) {
            owner.holder.store(0, WRITE);
        }
    }
}

/// One of up to as many as there may be.
#[derive(Clone, Copy)]
struct Member {
    holder: HolderId,
    tag: Option<u16>,
}

/// A tag that is dead, and how many units may have it still.
struct Dead {
    tag: u16,
    left: usize,
}

/// What the writer knows.
pub struct Holders {
    /// By the holder's place.
    members: Vec<Member>,
    /// Places that nobody has, the longest unused one first.
    places: VecDeque<u16>,
    free: Vec<u16>,
    dead: Vec<Dead>,
}

impl Holders {
    pub fn new() -> Self {
        let count = caps::HOLDERS_MAX as u16;
        Self {
            members: (0..u32::from(count)).map(|place| Member { holder: HolderId(place), tag: None }).collect(),
            places: (0..count).collect(),
            free: (0..count).rev().collect(),
            dead: Vec::new(),
        }
    }

    fn member(&mut self, holder: HolderId) -> Option<&mut Member> {
        self.members.get_mut(holder.place()).filter(|member| member.holder == holder)
    }

    /// The tag that a holder has now.
    pub fn tag(&self, holder: HolderId) -> Option<u16> {
        self.members.get(holder.place()).filter(|member| member.holder == holder)?.tag
    }

    /// A holder more; `None`: there are as many as there may be, or every free tag waits for a sweep.
    pub fn add(&mut self, owners: &Owners) -> Option<HolderId> {
        let tag = *self.free.last()?;
        let place = self.places.pop_front()?;
        self.free.pop();
        let member = self.members.get_mut(usize::from(place))?;
        member.tag = Some(tag);
        owners.give(member.holder, tag);
        Some(member.holder)
    }

    fn bury(&mut self, owners: &Owners, tag: u16, units: usize) {
        owners.bury(tag);
        self.dead.push(Dead { tag, left: units });
    }

    /// Another tag for a holder, whose old one is dead from now on; false where none is free: sweep, and ask again.
    pub fn retag(&mut self, owners: &Owners, holder: HolderId, units: usize) -> bool {
        let Some(old) = self.member(holder).map(|member| member.tag.take()) else { return true };
        if let Some(old) = old {
            self.bury(owners, old, units);
        }
        let Some(tag) = self.free.pop() else { return false };
        owners.give(holder, tag);
        if let Some(member) = self.member(holder) {
            member.tag = Some(tag);
        }
        true
    }

    /// The holder is no more.
    pub fn remove(&mut self, owners: &Owners, holder: HolderId, units: usize) {
        let Some(member) = self.member(holder) else { return };
        let tag = member.tag.take();
        // Whoever has the place next has another number.
        member.holder = HolderId(holder.0.wrapping_add(1 << PLACE_BITS));
        self.places.push_back(holder.place() as u16);
        if let Some(tag) = tag {
            self.bury(owners, tag, units);
        }
    }

    /// True where tags wait for a sweep.
    pub fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// The tags that are dead.
    pub fn dead(&self) -> impl Iterator<Item = u16> {
        self.dead.iter().map(|dead| dead.tag)
    }

    /// There are more units to sweep; no dead tag is in them, but a sweep passes them.
    pub fn units_made(&mut self, units: usize) {
        self.dead.iter_mut().for_each(|dead| dead.left += units);
    }

    /// The next unit has no dead tag any more.
    pub fn unit_swept(&mut self) {
        let Self { free, dead, .. } = self;
        dead.retain_mut(|dead| {
            dead.left = dead.left.saturating_sub(1);
            if dead.left == 0 {
                free.push(dead.tag);
            }
            dead.left > 0
        });
    }
}
