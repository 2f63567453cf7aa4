//! The store's own time: what it wrote on an object that was just written, and the time since boot that has passed since. Pure.
//!
//! Everything that says when an object was written is by the store's clock, so what is young, or over, is told by that clock alone.
//! A store says a time in whole seconds and after an unknown part of a request: what is known is that its clock is between two
//! times. Whoever decides takes the one that is worse for it.

use parking_lot::Mutex;

use crate::boot::BootTime;

/// Stores say when an object was written in whole seconds.
const RESOLUTION_MS: i64 = 1000;
/// One part in this many of the time that has passed may be wrong: twice what NTP slews a clock by at most.
const DRIFT_PARTS: i64 = 1000;
/// A measurement says no more than this long ago how late it was; then it is taken again before anything rests on it.
const FRESH_MS: u64 = 10 * 60 * 1000;
/// Servers of one store may differ by this much; a clock that is further ahead than it can be was set.
const JUMP_MS: i64 = 60 * 1000;

/// At `at`, by this machine's clock since boot, the store's clock was between the two.
#[derive(Clone, Copy)]
struct Measured {
    at: BootTime,
    earliest_ms: i64,
    latest_ms: i64,
}

impl Measured {
    fn later(self, now: BootTime) -> Self {
        let passed_ms = now.ms_since(self.at) as i64;
        let drift_ms = passed_ms / DRIFT_PARTS;
        Self {
            at: now,
            earliest_ms: self.earliest_ms + passed_ms - drift_ms,
            latest_ms: self.latest_ms + passed_ms + drift_ms,
        }
    }

    fn width_ms(&self) -> i64 {
        self.latest_ms - self.earliest_ms
    }
}

#[derive(Default)]
struct State {
    measured: Option<Measured>,
    /// When it was last found to be right.
    confirmed: BootTime,
    /// When it was last found to have been set ahead.
    jumped: Option<BootTime>,
}

/// See the head of this file.
#[derive(Default)]
pub struct StoreClock(Mutex<State>);

impl StoreClock {
    /// An object was written between `began` and `ended`, and says that this was at `written_ms`.
    pub fn note(&self, began: BootTime, ended: BootTime, written_ms: i64) {
        let latest_ms = written_ms + RESOLUTION_MS + ended.ms_since(began) as i64;
        let new = Measured { at: ended, earliest_ms: written_ms, latest_ms };
        let mut state = self.0.lock();
        let old = state.measured.map(|measured| measured.later(ended));
        state.measured = match old {
            Some(old) if old.earliest_ms <= new.latest_ms && new.earliest_ms <= old.latest_ms => {
                Some(if old.width_ms() <= new.width_ms() { old } else { new })
            }
            Some(old) => {
                if new.earliest_ms > old.latest_ms + JUMP_MS {
                    state.jumped = Some(ended);
                }
                Some(new)
            }
            None => Some(new),
        };
        state.confirmed = state.confirmed.max(ended);
    }

    /// It is at least this late there, in milliseconds since 1970; nothing where it was never measured.
    pub fn earliest_ms(&self, now: BootTime) -> Option<i64> {
        self.0.lock().measured.map(|measured| measured.later(now).earliest_ms)
    }

    /// It is at most this late there.
    pub fn latest_ms(&self, now: BootTime) -> Option<i64> {
        self.0.lock().measured.map(|measured| measured.later(now).latest_ms)
    }

    /// True where it was measured lately: it need not be measured again before something rests on it.
    pub fn is_fresh(&self, now: BootTime) -> bool {
        let state = self.0.lock();
        state.measured.is_some() && now.ms_since(state.confirmed) < FRESH_MS
    }

    /// True where it was found to have been set ahead within the last `ms`: what was written before then looks older than it is.
    pub fn jumped_within(&self, now: BootTime, ms: u64) -> bool {
        self.0.lock().jumped.is_some_and(|jumped| now.ms_since(jumped) < ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: i64 = 3600 * 1000;

    fn between(clock: &StoreClock, now: u64) -> (i64, i64) {
        (clock.earliest_ms(BootTime(now)).unwrap(), clock.latest_ms(BootTime(now)).unwrap())
    }

    #[test]
    fn the_time_is_known_as_well_as_it_was_measured() {
        let clock = StoreClock::default();
        assert_eq!((clock.earliest_ms(BootTime(0)), clock.latest_ms(BootTime(0))), (None, None));
        assert!(!clock.is_fresh(BootTime(0)));
        clock.note(BootTime(100), BootTime(400), 7_000_000);
        assert_eq!(between(&clock, 400), (7_000_000, 7_001_300), "at its end, or when it began and late in its second");
        assert_eq!(between(&clock, 10_400), (7_009_990, 7_011_310), "time passes, to a thousandth");
        // A request that took long says less, and takes nothing away.
        clock.note(BootTime(400), BootTime(10_400), 7_005_000);
        assert_eq!(between(&clock, 10_400), (7_009_990, 7_011_310));
        assert!(clock.is_fresh(BootTime(10_400)) && !clock.is_fresh(BootTime(10_400 + FRESH_MS)));
    }

    /// A store whose clock is set: what it says last holds, and that it was set ahead is remembered, for what was written before
    /// looks older than it is.
    #[test]
    fn a_clock_that_is_set_is_believed_and_noticed() {
        let clock = StoreClock::default();
        clock.note(BootTime(0), BootTime(0), 10 * HOUR_MS);
        clock.note(BootTime(1000), BootTime(1000), 9 * HOUR_MS);
        assert_eq!(between(&clock, 1000).0, 9 * HOUR_MS);
        assert!(!clock.jumped_within(BootTime(1000), 1000), "set back: things look younger, which costs nothing");
        clock.note(BootTime(2000), BootTime(2000), 11 * HOUR_MS);
        assert_eq!(between(&clock, 2000).0, 11 * HOUR_MS);
        assert!(clock.jumped_within(BootTime(2500), 1000) && !clock.jumped_within(BootTime(3000), 1000));
    }
}
