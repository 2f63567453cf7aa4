//! Lifetimes: how long blocks of each class wait until they are read again, learnt while running.
//!
//! A lifetime starts when a block is touched and ends when it is touched again (a hit), or when it is
//! forgotten (censored: it might have been read later). Counts of ends by class and age, and of
//! lifetimes still open by class and start, give the Kaplan-Meier hazard of each class at each age.
//! From the hazards follows the Gittins index of a block of class c and age a,
//!   max over t of P(hit within t | age a) / E[room-time spent until then],
//! which is the hits per block-time that keeping it can earn: the block with the least leaves first.
//! (Gittins 1979 for the index; Beckmann, Chen, Cidon, "LHD", NSDI 2018 for hit density in caches.)
//!
//! Time is counted in accesses to the pool, so that nothing depends on how fast a trace is played.

#![expect(
    clippy::indexing_slicing,
    reason = "classes, bins and epochs are bounded by the constants below, which size the arrays"
)]

use std::sync::LazyLock;

use super::EvictionKind;

/// Classes of one kind: the tail of a request, then 1, 2, ... 7 or more touches.
pub(super) const CLASSES_PER_KIND: usize = 8;
pub(super) const CLASSES: usize = CLASSES_PER_KIND * EvictionKind::COUNT;
/// Epochs that are told apart: enough for ages from a 64th of the capacity to a thousand capacities.
pub(super) const EPOCHS: usize = 128;
/// The newest epochs are this fraction of the pool's capacity long.
const EPOCHS_PER_CAPACITY: u64 = 64;
/// Two neighbouring epochs become one when together they are no longer than their age by this, so that
/// an age is known to an eighth of itself.
const AGE_PER_EPOCH: u64 = 8;
/// Accesses in a tick, the unit in which a block remembers its last touch: 32 bits of ticks last
/// for 2.7e11 accesses, and a block that sleeps through a wrap merely looks young once.
pub(super) const TICK_ACCESSES: u64 = 64;
/// Age bins, two an octave, from 64 accesses.
const BINS: usize = 56;
/// A class's hazard starts from the hazard of all classes with the weight of this many lifetimes.
const PRIOR_LIFETIMES: f32 = 20.0;
/// What was learnt fades by this much each half capacity of accesses: half of it is gone after
/// about seventeen capacities.
const FADE: f32 = 0.98;

/// Where only a sample of the accesses is seen, an epoch has this many of them at least, ...
const SAMPLED_PER_EPOCH: u64 = 64;
/// ... it is learnt after this many, ...
const SAMPLED_PER_LEARNING: u64 = 1024;
/// ... and the prior weighs so many times as much, for each lifetime stands for several that were not seen.
const SAMPLED_PRIOR: f32 = 8.0;

/// An open lifetime.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lifetime {
    pub(super) class: u8,
    /// Touches so far, saturating.
    pub(super) touches: u8,
    pub(super) last_tick: u32,
}

type ByBin = [f32; BINS];

#[derive(Clone, Copy)]
struct Epoch {
    /// In accesses.
    start: u64,
    /// Where its counts and its blocks are kept: stays, while its rank among the epochs changes.
    place: u8,
}

/// Two epochs became one: what was kept at `from` belongs to `into`, the older of them.
#[derive(Clone, Copy)]
pub(super) struct Merge {
    pub(super) from: usize,
    pub(super) into: usize,
}

/// The statistics and the index table of one pool.
pub(super) struct Lifetimes {
    accesses: u64,
    capacity: u64,
    /// For how many accesses, and lifetimes, one counts: more than one where only a sample is seen.
    one_in: u64,
    /// The epochs, oldest first.
    epochs: Vec<Epoch>,
    free_places: Vec<u8>,
    relearnt_at: u64,
    hits: Box<[ByBin; CLASSES]>,
    censored: Box<[ByBin; CLASSES]>,
    open: Box<[[u32; EPOCHS]; CLASSES]>,
    index: Box<[ByBin; CLASSES]>,
}

fn bin_of(age: u64) -> usize {
    let age = age.max(64);
    let octave = age.ilog2();
    // The upper half of an octave starts at sqrt(2): 181/128.
    let upper = u64::from((age >> (octave - 6)) * 128 / 64 >= 181);
    ((u64::from(octave - 6) * 2 + upper) as usize).min(BINS - 1)
}

fn bin_start(bin: usize) -> f32 {
    64.0 * 2f32.powf(bin as f32 / 2.0)
}

impl Lifetimes {
    /// For a pool of about `capacity_blocks`, of whose accesses one in `one_in` is seen.
    pub(super) fn new(capacity_blocks: usize, one_in: u64) -> Self {
        Self {
            accesses: 0,
            capacity: capacity_blocks.max(1) as u64,
            one_in: one_in.max(1),
            epochs: vec![Epoch { start: 0, place: 0 }],
            free_places: (1..EPOCHS as u8).rev().collect(),
            relearnt_at: 0,
            hits: Box::new([[0.0; BINS]; CLASSES]),
            censored: Box::new([[0.0; BINS]; CLASSES]),
            open: Box::new([[0; EPOCHS]; CLASSES]),
            index: Box::new([[0.0; BINS]; CLASSES]),
        }
    }

    pub(super) fn set_capacity(&mut self, blocks: usize) {
        self.capacity = blocks.max(1) as u64;
    }

    pub(super) fn now_tick(&self) -> u32 {
        (self.accesses / TICK_ACCESSES) as u32
    }

    /// One access. True when a new epoch began: then call [`Self::merge_one`] until it has nothing to do.
    pub(super) fn advance(&mut self) -> bool {
        self.accesses += self.one_in;
        let seen = if self.one_in == 1 { 1 } else { SAMPLED_PER_EPOCH * self.one_in };
        let length = (self.capacity / EPOCHS_PER_CAPACITY).max(seen);
        if self.accesses - self.newest().start < length {
            return false;
        }
        // merge_one leaves a place free, always.
        let Some(place) = self.free_places.pop() else { return false };
        self.epochs.push(Epoch { start: self.accesses, place });
        true
    }

    /// Merges the oldest two neighbours that need no longer be told apart.
    pub(super) fn merge_one(&mut self) -> Option<Merge> {
        let accesses = self.accesses;
        let small = |three: &[Epoch]| (three[2].start - three[0].start) * AGE_PER_EPOCH <= accesses - three[2].start;
        let at = match self.epochs.windows(3).position(small) {
            Some(at) => at,
            None if self.free_places.is_empty() => 0,
            None => return None,
        };
        let gone = self.epochs.remove(at + 1);
        self.free_places.push(gone.place);
        let merge = Merge { from: usize::from(gone.place), into: usize::from(self.epochs[at].place) };
        for class in self.open.iter_mut() {
            class[merge.into] += std::mem::take(&mut class[merge.from]);
        }
        Some(merge)
    }

    /// True once every half capacity of accesses, when the index table was learnt anew.
    pub(super) fn relearn_if_due(&mut self) -> bool {
        let seen = if self.one_in == 1 { 512 } else { SAMPLED_PER_LEARNING * self.one_in };
        let due = self.accesses - self.relearnt_at >= (self.capacity / 2).max(seen);
        if due {
            self.relearnt_at = self.accesses;
            self.relearn();
        }
        due
    }

    pub(super) fn start(&mut self, class: u8, touches: u8) -> Lifetime {
        let place = usize::from(self.newest().place);
        self.open[usize::from(class)][place] += 1;
        Lifetime { class, touches, last_tick: self.now_tick() }
    }

    /// A lifetime goes on under a rounded time.
    pub(super) fn reopen(&mut self, life: Lifetime) {
        let place = self.place_of(life);
        self.open[usize::from(life.class)][place] += 1;
    }

    /// The block was read again.
    pub(super) fn end_by_hit(&mut self, life: Lifetime) {
        let bin = bin_of(self.age(life));
        self.hits[usize::from(life.class)][bin] += self.one_in as f32;
        self.close(life);
    }

    /// The block is forgotten; whether it would have been read is not known.
    pub(super) fn end_unknown(&mut self, life: Lifetime) {
        let bin = bin_of(self.age(life));
        self.censored[usize::from(life.class)][bin] += self.one_in as f32;
        self.close(life);
    }

    /// It never was a lifetime worth learning from: refreshed, deleted, or given another class.
    pub(super) fn close(&mut self, life: Lifetime) {
        let place = self.place_of(life);
        let open = &mut self.open[usize::from(life.class)][place];
        *open = open.saturating_sub(1);
    }

    /// The place of the epoch in which `life` began.
    pub(super) fn place_of(&self, life: Lifetime) -> usize {
        let began_tick = self.accesses.saturating_sub(self.age(life)) / TICK_ACCESSES;
        let after = self.epochs.partition_point(|epoch| epoch.start / TICK_ACCESSES <= began_tick);
        usize::from(self.epochs[after.saturating_sub(1)].place)
    }

    /// The places in use, each with the age of its epoch in accesses.
    pub(super) fn places(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.epochs.iter().map(|epoch| (usize::from(epoch.place), self.accesses - epoch.start))
    }

    /// The age of the epoch at `place` in accesses.
    pub(super) fn age_of_place(&self, place: usize) -> u64 {
        self.places().find(|(at, _)| *at == place).map_or(0, |(_, age)| age)
    }

    /// Hits per block and access that keeping a block of `class` and `age` can earn. Before anything is
    /// learnt, and between equals, the older goes first.
    pub(super) fn worth(&self, class: usize, age: u64) -> f32 {
        self.index[class][bin_of(age)] + 1e-9 / (age as f32 + 1.0)
    }

    pub(super) fn is_newest(&self, place: usize) -> bool {
        usize::from(self.newest().place) == place
    }

    fn newest(&self) -> Epoch {
        self.epochs[self.epochs.len() - 1]
    }

    fn age(&self, life: Lifetime) -> u64 {
        u64::from(self.now_tick().wrapping_sub(life.last_tick)) * TICK_ACCESSES
    }

    fn relearn(&mut self) {
        let at_risk = self.at_risk();
        let pooled: Vec<f32> = (0..BINS)
            .map(|bin| {
                let hits: f32 = self.hits.iter().map(|class| class[bin]).sum();
                hits / (at_risk.iter().map(|class| class[bin]).sum::<f32>() + 1.0)
            })
            .collect();
        let prior = if self.one_in == 1 { PRIOR_LIFETIMES } else { PRIOR_LIFETIMES * SAMPLED_PRIOR };
        let mut unseen = None;
        for class in 0..CLASSES {
            let hazard = std::array::from_fn(|bin| {
                let hits = self.hits[class][bin] + prior * pooled[bin];
                (hits / (at_risk[class][bin] + prior)).min(1.0)
            });
            // Classes of which nothing is known are all worth the same.
            self.index[class] = match at_risk[class].first() {
                Some(0.0) => *unseen.get_or_insert_with(|| gittins(&hazard)),
                _ => gittins(&hazard),
            };
        }
        for bins in self.hits.iter_mut().chain(self.censored.iter_mut()) {
            bins.iter_mut().for_each(|count| *count *= FADE);
        }
    }

    /// Lifetimes of each class that reached each age; those that ended or stand in the middle of a
    /// bin count half there.
    fn at_risk(&self) -> Box<[ByBin; CLASSES]> {
        let mut at_risk = Box::new([[0.0; BINS]; CLASSES]);
        for class in 0..CLASSES {
            let mut leaving = self.censored[class];
            for epoch in &self.epochs {
                let count = self.open[class][usize::from(epoch.place)];
                leaving[bin_of(self.accesses - epoch.start)] += count as f32 * self.one_in as f32;
            }
            let mut longer = 0.0;
            for bin in (0..BINS).rev() {
                let hits = self.hits[class][bin];
                at_risk[class][bin] = longer + hits + 0.5 * leaving[bin];
                longer += hits + leaving[bin];
            }
        }
        at_risk
    }
}

/// The Gittins index at the start of each bin, from the hazard of each bin.
fn gittins(hazard: &ByBin) -> ByBin {
    static WIDTHS: LazyLock<ByBin> = LazyLock::new(|| std::array::from_fn(|bin| bin_start(bin + 1) - bin_start(bin)));
    let widths = &*WIDTHS;
    std::array::from_fn(|from| {
        let (mut alive, mut hit, mut time, mut best) = (1.0f32, 0.0f32, 0.0f32, 0.0f32);
        for (bin, hazard) in hazard.iter().enumerate().take(BINS - 1).skip(from) {
            let ends = hazard * alive;
            time += widths[bin] * (alive - 0.5 * ends);
            hit += ends;
            alive -= ends;
            best = best.max(hit / time);
        }
        best
    })
}
