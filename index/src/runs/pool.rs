//! Memory of one kind of thing: slabs that come one at a time, of one budget for all kinds, and what is free of them.

use std::sync::OnceLock;

use crate::apart::Apart;
use crate::prefetch::prefetch;
use crate::slab::{HUGE_BYTES, Slab};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::{READ, WRITE, caps};

/// Bytes that slabs may still take. The writer's.
pub struct Budget {
    most: u64,
    used: AtomicU64,
}

impl Budget {
    pub fn new(most: u64) -> Self {
        Self { most, used: AtomicU64::new(0) }
    }

    pub fn most(&self) -> u64 {
        self.most
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub fn has(&self, bytes: u64) -> bool {
        self.used() + bytes <= self.most
    }

    pub fn take(&self, bytes: u64) -> bool {
        let has = self.has(bytes);
        if has {
            self.used.store(self.used() + bytes, Ordering::Relaxed);
        }
        has
    }

    /// Bytes of a slab: a huge page, where there is room for some.
    pub fn slab_bytes(&self) -> u64 {
        if self.most < caps::HUGE_SLABS_FROM_BYTES { caps::SLAB_BYTES_MIN } else { HUGE_BYTES as u64 }
    }
}

/// What a pool has: the free ones are linked by a word of their own.
pub trait Linked {
    fn link(&self) -> &AtomicU32;
}

/// See the head of this file. Its things are numbered from 1; 0 is none.
pub struct Pool<T> {
    slabs: Box<[OnceLock<Slab<T>>]>,
    /// Things of a slab: so many bits of a number.
    bits: u32,
    counts: Apart<Counts>,
}

struct Counts {
    made: AtomicU32,
    free: AtomicU32,
    free_count: AtomicU32,
}

#[cfg(all(target_os = "linux", not(shuttle)))]
pub trait Zeroed: zerocopy::FromZeros {}
#[cfg(all(target_os = "linux", not(shuttle)))]
impl<T: zerocopy::FromZeros> Zeroed for T {}
#[cfg(any(not(target_os = "linux"), shuttle))]
pub trait Zeroed: Default {}
#[cfg(any(not(target_os = "linux"), shuttle))]
impl<T: Default> Zeroed for T {}

impl<T: Linked + Zeroed> Pool<T> {
    /// With its first slab, so that no kind of thing is without memory where others took all.
    pub fn new(budget: &Budget) -> Self {
        let pool = Self::empty(budget);
        if let Some(first) = pool.slabs.first().filter(|_| budget.take(budget.slab_bytes())) {
            first.get_or_init(|| Slab::new(1 << pool.bits));
        }
        pool
    }

    /// Of what may not be needed at all.
    pub fn empty(budget: &Budget) -> Self {
        let of_slab = budget.slab_bytes() / size_of::<T>() as u64;
        let bits = if cfg!(shuttle) { 3 } else { of_slab.ilog2() };
        let slabs = (budget.most() / budget.slab_bytes()).min(1 << (caps::NUMBER_BITS - bits));
        let slabs = (0..slabs).map(|_| OnceLock::new()).collect();
        let none = || AtomicU32::new(0);
        let counts = Counts { made: AtomicU32::new(1), free: none(), free_count: none() };
        Self { slabs, bits, counts: Apart(counts) }
    }

    /// Numbers that were given out, or may be without another slab.
    pub fn made(&self) -> u32 {
        self.counts.made.load(READ)
    }

    #[inline(always)]
    pub fn get(&self, number: u32) -> Option<&T> {
        self.slabs.get((number >> self.bits) as usize)?.get()?.get(number as usize & ((1 << self.bits) - 1))
    }

    /// True where so many more can be taken. There are slabs of more things than that.
    pub fn has(&self, count: u32, budget: &Budget) -> bool {
        let of_slab = self.made() & ((1 << self.bits) - 1);
        let left = if of_slab == 0 { 0 } else { (1 << self.bits) - of_slab };
        let is_there = self.counts.free_count.load(Ordering::Relaxed) + left >= count;
        is_there || (((self.made() >> self.bits) as usize) < self.slabs.len() && budget.has(budget.slab_bytes()))
    }

    pub fn take(&self, budget: &Budget) -> Option<u32> {
        let free = self.counts.free.load(Ordering::Relaxed);
        if let Some(thing) = self.get(free).filter(|_| free != 0) {
            let next = thing.link().load(Ordering::Relaxed);
            self.counts.free.store(next, Ordering::Relaxed);
            // It says which one is free after it.
            if let Some(next) = self.get(next) {
                prefetch(next);
            }
            self.counts.free_count.store(self.counts.free_count.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
            return Some(free);
        }
        let next = self.made();
        let slab = self.slabs.get((next >> self.bits) as usize)?;
        if slab.get().is_none() {
            if !budget.take(budget.slab_bytes()) {
                return None;
            }
            slab.get_or_init(|| Slab::new(1 << self.bits));
        }
        self.counts.made.store(next + 1, WRITE);
        Some(next)
    }

    pub fn give_back(&self, number: u32) {
        let Some(thing) = self.get(number) else { return };
        thing.link().store(self.counts.free.load(Ordering::Relaxed), Ordering::Relaxed);
        self.counts.free.store(number, Ordering::Relaxed);
        self.counts.free_count.store(self.counts.free_count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// What is there beside the slabs.
    pub fn fixed_bytes(&self) -> u64 {
        (self.slabs.len() * size_of::<OnceLock<Slab<T>>>()) as u64
    }
}
