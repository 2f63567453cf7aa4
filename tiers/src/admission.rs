//! Admission: which blocks are worth a write. Pure; time is an argument.
//!
//! Most blocks of most workloads are never asked for again. Where the configuration says so, only blocks that were asked for by a
//! second request are written; how often names were asked for is counted in a sketch (Cormode and Muthukrishnan's count-min, with
//! conservative updates), which forgets by halving, as in TinyLFU (Einziger, Friedman, Manes, 2017). And a budget bounds the bytes
//! a day that a drive is to take: as it runs short, only blocks go that save the most computing for each byte, which is how often
//! they are asked for, times what it costs to compute them again: the more, the more tokens they attend to.

use crate::clock::BootTime;

/// Which blocks of a namespace are copied to a tier, beside those that somebody demands there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Admission {
    /// None.
    Asked,
    /// Those that enough requests asked for: two, unless configured.
    Reused,
    /// Those that leave memory, when they do: write-back.
    Evicted,
    /// Every block that is stored: write-through.
    #[default]
    All,
}

impl Admission {
    /// As the configuration writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Reused => "reused",
            Self::Evicted => "evicted",
            Self::All => "all",
        }
    }
}

impl std::str::FromStr for Admission {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::Asked, Self::Reused, Self::Evicted, Self::All];
        let known = all.into_iter().find(|admission| admission.name() == name);
        known.ok_or_else(|| format!("{name:?} is not \"asked\", \"reused\", \"evicted\" or \"all\""))
    }
}

/// Counters of a row: 1 MiB a row. Names beyond a few hundred thousand between two halvings are told apart less well, and a few
/// blocks more are written.
const ROW: usize = 1 << 20;
const ROWS: usize = 2;
/// Names are counted this often before all counts are halved.
const HALVED_AFTER: u32 = 4 * ROW as u32;
/// A budget may be saved up for an hour.
const SAVED_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * 3_600_000;

/// How often names were asked for, about. Counts up to 255.
pub struct Frequencies {
    counts: Vec<u8>,
    counted: u32,
}

impl Default for Frequencies {
    fn default() -> Self {
        Self { counts: vec![0; ROW * ROWS], counted: 0 }
    }
}

impl Frequencies {
    fn places(name: u64) -> [usize; ROWS] {
        [(name as usize) % ROW, ROW + (name.rotate_left(32).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as usize % ROW]
    }

    /// How often the name was asked for; names that share counters with others may show more.
    pub fn of(&self, name: u64) -> u8 {
        Self::places(name).into_iter().filter_map(|at| self.counts.get(at).copied()).min().unwrap_or(0)
    }

    /// It is asked for once more.
    pub fn count(&mut self, name: u64) {
        let least = self.of(name);
        for at in Self::places(name) {
            if let Some(count) = self.counts.get_mut(at).filter(|count| **count == least) {
                *count = count.saturating_add(1);
            }
        }
        self.counted += 1;
        if self.counted >= HALVED_AFTER {
            self.counted /= 2;
            self.counts.iter_mut().for_each(|count| *count /= 2);
        }
    }
}

/// Tokens at which attention costs as much as all else: the cost of a token is 2 FLOPs a parameter, and 4 a layer, a unit of
/// width and a token that it attends to, which for an 8B model (32 layers, 4096 wide) is as much at 30,000.
const ATTENTION_TOKENS: f64 = 32_768.0;
/// Names whose depth is remembered: four bytes each.
const DEPTHS: usize = 1 << 18;

/// How many blocks precede a name in its prompt, as far as it was asked for lately; a name may push out another.
pub struct Depths(Vec<u32>);

impl Default for Depths {
    fn default() -> Self {
        Self(vec![0; DEPTHS])
    }
}

impl Depths {
    fn place(name: u64) -> (usize, u32) {
        ((name >> 16) as usize % DEPTHS, (name & 0xFFFF) as u32)
    }

    /// The name stands behind `blocks` others.
    pub fn note(&mut self, name: u64, blocks: usize) {
        let (at, tag) = Self::place(name);
        if let Some(place) = self.0.get_mut(at) {
            *place = tag << 16 | blocks.min(0xFFFF) as u32;
        }
    }

    /// See [`Self::note`]; 0 where it is not known.
    pub fn of(&self, name: u64) -> u32 {
        let (at, tag) = Self::place(name);
        self.0.get(at).filter(|place| **place >> 16 == tag).map_or(0, |place| place & 0xFFFF)
    }
}

/// What it costs to compute a block again, in tokens that attend to nothing.
pub fn recompute_cost(block_tokens: u32, blocks_before: u32) -> f64 {
    let tokens = f64::from(block_tokens);
    tokens * (1.0 + (f64::from(blocks_before) + 0.5) * tokens / ATTENTION_TOKENS)
}

/// Which blocks are worth a write while a budget is short: by what a byte of them saves, against what is usual.
#[derive(Debug, Default)]
pub struct Worth {
    usual: f64,
    seen: u32,
}

/// Values that the usual one is an average of, the later the more.
const USUAL_OF: u32 = 1024;
/// With this part of the budget left, every block goes; with less, the least valuable stay out.
const AMPLE: f64 = 0.25;
/// With nothing left, a block must be worth this many times the usual.
const STRICTEST: f64 = 4.0;

impl Worth {
    /// True where a block whose bytes save `value` each is worth a write, with `left` of the budget.
    pub fn admits(&mut self, value: f64, left: f64) -> bool {
        self.seen = (self.seen + 1).min(USUAL_OF);
        self.usual += (value - self.usual) / f64::from(self.seen);
        left >= AMPLE || value >= self.usual * STRICTEST * (AMPLE - left.max(0.0)) / AMPLE
    }
}

/// Bytes a day that may be written; what is not used is saved for an hour.
#[derive(Debug)]
pub struct WriteBudget {
    bytes_per_day: Option<u64>,
    left: f64,
    at: BootTime,
}

impl WriteBudget {
    /// A budget, with an hour's worth saved; `None`: no bound.
    pub fn new(bytes_per_day: Option<u64>, now: BootTime) -> Self {
        let mut budget = Self { bytes_per_day: None, left: 0.0, at: now };
        budget.set(bytes_per_day, now);
        budget
    }

    /// Another budget from now on.
    pub fn set(&mut self, bytes_per_day: Option<u64>, now: BootTime) {
        if self.bytes_per_day != bytes_per_day {
            self.bytes_per_day = bytes_per_day;
            self.left = bytes_per_day.map_or(0.0, |bytes| bytes as f64 * SAVED_MS as f64 / DAY_MS as f64);
            self.at = now;
        }
    }

    /// How much is left, of the most that is saved: 1 without a bound, less than 0 on credit.
    pub fn left(&mut self, now: BootTime) -> f64 {
        let Some(per_day) = self.bytes_per_day else { return 1.0 };
        self.earn(per_day, now);
        self.left / (per_day as f64 * SAVED_MS as f64 / DAY_MS as f64).max(1.0)
    }

    fn earn(&mut self, per_day: u64, now: BootTime) {
        let rate = per_day as f64 / DAY_MS as f64;
        let earned = now.ms_since(self.at) as f64 * rate;
        self.left = (self.left + earned).min(rate * SAVED_MS as f64);
        self.at = now;
    }

    /// True where these bytes may be written; then they count.
    pub fn take(&mut self, bytes: u64, now: BootTime) -> bool {
        let Some(per_day) = self.bytes_per_day else { return true };
        self.earn(per_day, now);
        // A block may be larger than what can be saved: it is then written on credit.
        let may = self.left > 0.0;
        if may {
            self.left -= bytes as f64;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_counted_and_forgotten() {
        let mut frequencies = Frequencies::default();
        let spread = |at: u64| at.wrapping_mul(0x2545_F491_4F6C_DD1D) ^ at << 13;
        (0..100_000).for_each(|at| frequencies.count(spread(at)));
        (0..1000).for_each(|at| frequencies.count(spread(at)));
        assert!((0..1000).all(|at| frequencies.of(spread(at)) >= 2), "never fewer than were counted");
        let overcounted = (1000..100_000).filter(|at| frequencies.of(spread(*at)) > 1).count();
        assert!(overcounted < 2000, "{overcounted}");
        (0..HALVED_AFTER).for_each(|_| frequencies.count(7));
        assert_eq!(frequencies.of(spread(5000)), 0);
    }

    #[test]
    fn depths_are_remembered_for_a_while_and_never_made_up() {
        let mut depths = Depths::default();
        let name = |at: u64| (at + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (0..1000).for_each(|at| depths.note(name(at), at as usize));
        let right = (0..1000).filter(|at| depths.of(name(*at)) == *at as u32).count();
        assert!(right > 990, "{right}");
        assert_eq!((1000..2000).map(|at| depths.of(name(at))).filter(|depth| *depth > 0).count(), 0);
        assert!(recompute_cost(16, 4000) > 2.9 * recompute_cost(16, 0));
    }

    /// A tenth of the blocks is worth ten times the rest; the budget is for a fifth of all. First come, first served would
    /// write a fifth of those.
    #[test]
    fn a_short_budget_goes_to_what_saves_most() {
        let (mut budget, mut worth) = (WriteBudget::new(Some(24 * 3_600_000), BootTime(0)), Worth::default());
        let (mut dear, mut cheap, mut bytes) = (0, 0, 0);
        for at in 0..200_000u64 {
            let now = BootTime(at * 20);
            let value = if at % 10 == 3 { 10.0 } else { 1.0 };
            if worth.admits(value, budget.left(now)) && budget.take(100, now) {
                bytes += 100;
                if value > 1.0 { dear += 1 } else { cheap += 1 }
            }
        }
        assert!(dear > 19_500, "{dear} of 20,000 that save most, {cheap} of the rest");
        assert!(cheap > 5_000, "what is left of the budget is used: {cheap}");
        assert!(bytes <= 200_000 * 20 + 3_600_000, "{bytes}");
    }

    #[test]
    fn a_budget_is_kept_over_a_day() {
        let mut budget = WriteBudget::new(Some(24_000), BootTime(0));
        let written: u64 =
            (0..24 * 3600).filter(|second| budget.take(100, BootTime(second * 1000))).count() as u64 * 100;
        assert!((24_000..=25_200).contains(&written), "{written}");
        assert!(WriteBudget::new(None, BootTime(0)).take(u64::MAX, BootTime(0)));
        budget.set(Some(0), BootTime(0));
        assert!(!budget.take(1, BootTime(1_000_000)));
    }
}
