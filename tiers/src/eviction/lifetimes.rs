//! Lifetimes: how long sessions of each class wait until they go on, learnt while running.
//!
//! A lifetime starts when a session is used and ends when it is used again (a hit), or when it is forgotten (censored: it might
//! have been used later). Counts of ends by class and age, and of lifetimes still open by class and start, give the Kaplan-Meier
//! hazard of each class at each age. From the hazards follows the Gittins index of a session of class c and age a,
//!   max over t of P(hit within t | age a) / E[time spent until then],
//! which is the hits per block and time that keeping one of its blocks can earn: the session with the least shrinks first.
//! (Gittins 1979 for the index; Beckmann, Chen, Cidon, "LHD", NSDI 2018 for hit density in caches.)
//!
//! Time is the caller's, in milliseconds: what a session waits for is a person or a tool, not other sessions' traffic.

#![expect(
    clippy::indexing_slicing,
    reason = "classes, bins and epochs are bounded by the constants below, which size the arrays"
)]

use std::sync::LazyLock;

use super::classes::CLASSES;

/// Epochs that are told apart: enough for ages from an eighth of a second to a year.
pub(super) const EPOCHS: usize = 250;
/// The newest epochs are so long.
const EPOCH_MS: u64 = 128;
/// Two neighbouring epochs become one when together they are no longer than their age by this, so that
/// an age is known to an eighth of itself.
const AGE_PER_EPOCH: u64 = 8;
/// The unit in which a lifetime's start is remembered: 32 bits of it last for eight years.
const TICK_MS: u64 = 64;
/// Age bins, two an octave, from 64 ms to three days.
const BINS: usize = 46;
const BINS_FROM_MS: u64 = 64;
/// A class's hazard starts from the hazard of all classes with the weight of this many lifetimes.
const PRIOR_LIFETIMES: f32 = 8.0;
/// And that of all classes from this hazard, for each half octave of age, which is LRU's order, with this weight.
const PRIOR_HAZARD: f32 = 0.1;
const PRIOR_OF_ALL: f32 = 10.0;
/// Shorter horizons than so many stays under LRU do not count: what left cannot come back for nothing.
const STAYS: f32 = 0.7;
/// The index is learnt anew after as many lifetimes began, more once many are known, ...
const LEARNING_STARTS: u32 = 64;
const LEARNING_STARTS_MAX: u32 = 512;
const KNOWN_PER_LEARNING: u32 = 64;
/// ... and what was learnt fades by this much each 64 of them: half of it is gone after some 4,000.
const FADE: f32 = 0.99;

/// An open lifetime.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Lifetime {
    pub(super) class: u8,
    pub(super) began_tick: u32,
}

type ByBin = [f32; BINS];

#[derive(Clone, Copy)]
struct Epoch {
    began_ms: u64,
    /// Where its counts and its sessions are kept: stays, while its rank among the epochs changes.
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
    now_ms: u64,
    /// How long LRU would keep a block that is not used again.
    stay_ms: f32,
    /// The epochs, oldest first.
    epochs: Vec<Epoch>,
    free_places: Vec<u8>,
    /// Lifetimes that began since the index was learnt, and before.
    starts: u32,
    known: u32,
    hits: Box<[ByBin; CLASSES]>,
    censored: Box<[ByBin; CLASSES]>,
    open: Box<[[u32; EPOCHS]; CLASSES]>,
    index: Box<[ByBin; CLASSES]>,
    /// A lifetime stands for so many: in a sample of a pool's sessions.
    each: u32,
}

fn bin_of(age_ms: u64) -> usize {
    let age = age_ms.max(BINS_FROM_MS);
    let octave = age.ilog2();
    let first = BINS_FROM_MS.ilog2();
    // The upper half of an octave starts at sqrt(2): 181/128.
    let upper = u64::from((age >> (octave - first)) * 128 / BINS_FROM_MS >= 181);
    ((u64::from(octave - first) * 2 + upper) as usize).min(BINS - 1)
}

fn bin_start(bin: usize) -> f32 {
    BINS_FROM_MS as f32 * 2f32.powf(bin as f32 / 2.0)
}

impl Lifetimes {
    pub(super) fn new(each: u32) -> Self {
        let mut epochs = Vec::with_capacity(EPOCHS);
        epochs.push(Epoch { began_ms: 0, place: 0 });
        Self {
            now_ms: 0,
            stay_ms: 0.0,
            epochs,
            free_places: (1..EPOCHS as u8).rev().collect(),
            starts: 0,
            known: 0,
            hits: Box::new([[0.0; BINS]; CLASSES]),
            censored: Box::new([[0.0; BINS]; CLASSES]),
            open: Box::new([[0; EPOCHS]; CLASSES]),
            index: Box::new([[0.0; BINS]; CLASSES]),
            each: each.max(1),
        }
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.now_ms
    }

    pub(super) fn set_stay(&mut self, stay_ms: f32) {
        self.stay_ms = stay_ms;
    }

    /// Takes over what another learnt.
    pub(super) fn copy_index(&mut self, other: &Self) {
        self.index.copy_from_slice(&*other.index);
        self.starts = 0;
    }

    pub(super) fn now_tick(&self) -> u32 {
        (self.now_ms / TICK_MS) as u32
    }

    /// Time passes. True when a new epoch began: then call [`Self::merge_one`] until it has nothing to do.
    pub(super) fn advance(&mut self, now_ms: u64) -> bool {
        self.now_ms = self.now_ms.max(now_ms);
        if self.now_ms - self.newest().began_ms < EPOCH_MS {
            return false;
        }
        // merge_one leaves a place free, always.
        let Some(place) = self.free_places.pop() else { return false };
        self.epochs.push(Epoch { began_ms: self.now_ms, place });
        true
    }

    /// Merges the oldest two neighbours that need no longer be told apart.
    pub(super) fn merge_one(&mut self) -> Option<Merge> {
        let now_ms = self.now_ms;
        let small =
            |three: &[Epoch]| (three[2].began_ms - three[0].began_ms) * AGE_PER_EPOCH <= now_ms - three[2].began_ms;
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

    /// True when the index table was learnt anew.
    pub(super) fn relearn_if_due(&mut self) -> bool {
        let due = self.starts >= (self.known / KNOWN_PER_LEARNING).clamp(LEARNING_STARTS, LEARNING_STARTS_MAX);
        if due {
            self.relearn();
            self.fade();
            self.known = self.known.saturating_add(self.starts);
            self.starts = 0;
        }
        due
    }

    pub(super) fn start(&mut self, class: u8) -> Lifetime {
        self.starts += self.each;
        let place = usize::from(self.newest().place);
        self.open[usize::from(class)][place] += self.each;
        Lifetime { class, began_tick: self.now_tick() }
    }

    /// One more with this class and start.
    pub(super) fn open(&mut self, life: Lifetime) {
        let place = self.place_of(life);
        self.open[usize::from(life.class)][place] += self.each;
    }

    /// The session was used again.
    pub(super) fn end_by_hit(&mut self, life: Lifetime) {
        let bin = bin_of(self.age(life));
        self.hits[usize::from(life.class)][bin] += self.each as f32;
        self.close(life);
    }

    /// The session is forgotten; whether it would have been used is not known.
    pub(super) fn end_unknown(&mut self, life: Lifetime) {
        let bin = bin_of(self.age(life));
        self.censored[usize::from(life.class)][bin] += self.each as f32;
        self.close(life);
    }

    /// It will not be used: known, not guessed.
    pub(super) fn end_never(&mut self, life: Lifetime) {
        self.censored[usize::from(life.class)][BINS - 1] += self.each as f32;
        self.close(life);
    }

    /// It never was a lifetime worth learning from.
    pub(super) fn close(&mut self, life: Lifetime) {
        let place = self.place_of(life);
        let open = &mut self.open[usize::from(life.class)][place];
        *open = open.saturating_sub(self.each);
    }

    /// The place of the epoch in which `life` began.
    pub(super) fn place_of(&self, life: Lifetime) -> usize {
        let began_tick = self.now_ms.saturating_sub(self.age(life)) / TICK_MS;
        let after = self.epochs.partition_point(|epoch| epoch.began_ms / TICK_MS <= began_tick);
        usize::from(self.epochs[after.saturating_sub(1)].place)
    }

    /// The places in use, each with the age of the middle of its epoch in milliseconds.
    pub(super) fn places(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let ends = self.epochs.iter().skip(1).map(|epoch| epoch.began_ms).chain([self.now_ms]);
        let middle =
            |(epoch, end_ms): (&Epoch, u64)| (usize::from(epoch.place), self.now_ms - (epoch.began_ms + end_ms) / 2);
        self.epochs.iter().zip(ends).map(middle)
    }

    /// The age of the epoch at `place` in milliseconds.
    pub(super) fn age_of_place(&self, place: usize) -> u64 {
        self.places().find(|(at, _)| *at == place).map_or(0, |(_, age)| age)
    }

    /// Hits per block and millisecond that keeping a block of `class` and `age` can earn. Before anything is
    /// learnt, and between equals, the older goes first.
    pub(super) fn worth(&self, class: usize, age_ms: u64) -> f32 {
        self.index[class][bin_of(age_ms)] + 1e-12 / (age_ms as f32 + 1.0)
    }

    pub(super) fn is_newest(&self, place: usize) -> bool {
        usize::from(self.newest().place) == place
    }

    fn newest(&self) -> Epoch {
        self.epochs[self.epochs.len() - 1]
    }

    /// In milliseconds.
    pub(super) fn age(&self, life: Lifetime) -> u64 {
        u64::from(self.now_tick().wrapping_sub(life.began_tick)) * TICK_MS
    }

    fn relearn(&mut self) {
        let at_risk = self.at_risk();
        let pooled: ByBin = std::array::from_fn(|bin| {
            let hits: f32 = self.hits.iter().map(|class| class[bin]).sum();
            (hits + PRIOR_OF_ALL * PRIOR_HAZARD) / (at_risk.iter().map(|class| class[bin]).sum::<f32>() + PRIOR_OF_ALL)
        });
        let least_ms = self.stay_ms * STAYS;
        let mut unseen = None;
        for class in 0..CLASSES {
            let hazard = std::array::from_fn(|bin| {
                let hits = self.hits[class][bin] + PRIOR_LIFETIMES * pooled[bin];
                (hits / (at_risk[class][bin] + PRIOR_LIFETIMES)).min(1.0)
            });
            // Classes of which nothing is known are all worth the same.
            self.index[class] = match at_risk[class].first() {
                Some(0.0) => *unseen.get_or_insert_with(|| gittins(&hazard, least_ms)),
                _ => gittins(&hazard, least_ms),
            };
        }
    }

    fn fade(&mut self) {
        let fade = FADE.powf(self.starts as f32 / LEARNING_STARTS as f32);
        for bins in self.hits.iter_mut().chain(self.censored.iter_mut()) {
            bins.iter_mut().for_each(|count| *count *= fade);
        }
    }

    /// Lifetimes of each class that reached each age; those that ended or stand in the middle of a
    /// bin count half there.
    fn at_risk(&self) -> Box<[ByBin; CLASSES]> {
        let mut at_risk = Box::new([[0.0; BINS]; CLASSES]);
        for class in 0..CLASSES {
            let mut leaving = self.censored[class];
            for (place, age_ms) in self.places() {
                leaving[bin_of(age_ms)] += self.open[class][place] as f32;
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

/// The Gittins index at the start of each bin, from the hazard of each bin, over horizons of `least_ms` and more.
fn gittins(hazard: &ByBin, least_ms: f32) -> ByBin {
    static WIDTHS: LazyLock<ByBin> = LazyLock::new(|| std::array::from_fn(|bin| bin_start(bin + 1) - bin_start(bin)));
    let widths = &*WIDTHS;
    std::array::from_fn(|from| {
        let (mut alive, mut hit, mut time, mut best) = (1.0f32, 0.0f32, 0.0f32, 0.0f32);
        for (bin, hazard) in hazard.iter().enumerate().take(BINS - 1).skip(from) {
            let ends = hazard * alive;
            time += widths[bin] * (alive - 0.5 * ends);
            hit += ends;
            alive -= ends;
            if time >= least_ms || bin == BINS - 2 {
                best = best.max(hit / time);
            }
        }
        best
    })
}
