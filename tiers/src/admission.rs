//! Admission to disk: which blocks are worth a write. Pure; time is an argument.
//!
//! Most blocks of most workloads are never asked for again. Where the configuration says so, only blocks that were asked for by a
//! second request are written; how often names were asked for is counted in a sketch (Cormode and Muthukrishnan's count-min, with
//! conservative updates), which forgets by halving, as in TinyLFU (Einziger, Friedman, Manes, 2017). And a budget bounds the bytes
//! a day that a drive is to take.

use crate::clock::BootTime;

/// Which blocks are written to disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Admission {
    /// Every block that is stored.
    #[default]
    All,
    /// Those that were asked for by two requests.
    Reused,
}

impl Admission {
    /// As the configuration writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Reused => "reused",
        }
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

    /// True where these bytes may be written; then they count.
    pub fn take(&mut self, bytes: u64, now: BootTime) -> bool {
        let Some(per_day) = self.bytes_per_day else { return true };
        let rate = per_day as f64 / DAY_MS as f64;
        let earned = now.ms_since(self.at) as f64 * rate;
        self.left = (self.left + earned).min(rate * SAVED_MS as f64);
        self.at = now;
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
