//! How fast a tier is read, measured from the reads themselves: what a fetch from it will cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Older reads count half after so much time under load: a disk that slows down is believed within minutes, one slow read is not.
const HALF_LIFE: Duration = Duration::from_secs(30);

/// A tier's speed, as its reads of late were.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct ReadRate {
    /// Bytes a second, while there was something to read; 0: nothing was read yet.
    pub bytes_per_second: f64,
    /// Seconds from asking to having, of reads that met no other on their way.
    pub latency_seconds: f64,
    /// Bytes that are being waited for now.
    pub queued_bytes: u64,
}

#[derive(Default)]
struct State {
    in_flight: u32,
    queued_bytes: u64,
    /// Since when something is in flight, or was last added to `busy`.
    busy_since: Option<Instant>,
    /// Faded sums.
    busy: f64,
    bytes: f64,
    alone: f64,
    alone_seconds: f64,
}

impl State {
    fn pass_time(&mut self, now: Instant) {
        let Some(since) = self.busy_since else { return };
        let passed = now.saturating_duration_since(since).as_secs_f64();
        let keep = 0.5f64.powf(passed / HALF_LIFE.as_secs_f64());
        self.busy = self.busy * keep + passed;
        self.bytes *= keep;
        self.busy_since = (self.in_flight > 0).then_some(now);
    }
}

/// Watches the reads of one tier. Shared by `Arc`.
#[derive(Default)]
pub struct ReadMeter(Mutex<State>);

/// A read under way; one that is dropped failed, and counts for its time alone.
pub struct Reading {
    meter: Arc<ReadMeter>,
    bytes: u64,
    started: Instant,
    ended: Option<Instant>,
    alone: bool,
}

impl ReadMeter {
    /// A read of `bytes` begins.
    pub fn begin(self: &Arc<Self>, bytes: u64) -> Reading {
        self.begin_at(bytes, Instant::now())
    }

    fn begin_at(self: &Arc<Self>, bytes: u64, now: Instant) -> Reading {
        let mut state = self.0.lock();
        state.pass_time(now);
        state.in_flight += 1;
        state.queued_bytes += bytes;
        state.busy_since = Some(now);
        Reading { meter: Arc::clone(self), bytes, started: now, ended: None, alone: state.in_flight == 1 }
    }

    /// The rate by now.
    pub fn rate(&self) -> ReadRate {
        let state = self.0.lock();
        let per = |sum: f64, of: f64| if of > 0.0 { sum / of } else { 0.0 };
        ReadRate {
            bytes_per_second: per(state.bytes, state.busy),
            latency_seconds: per(state.alone_seconds, state.alone),
            queued_bytes: state.queued_bytes,
        }
    }
}

impl Reading {
    /// The bytes are there.
    pub fn done(self) {
        self.done_at(Instant::now());
    }

    fn done_at(mut self, now: Instant) {
        self.ended = Some(now);
        let mut state = self.meter.0.lock();
        state.pass_time(now);
        state.bytes += self.bytes as f64;
        if self.alone {
            // As many as fade away with a half-life of some twenty reads.
            state.alone = state.alone * 0.97 + 1.0;
            state.alone_seconds =
                state.alone_seconds * 0.97 + now.saturating_duration_since(self.started).as_secs_f64();
        }
        drop(state);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut state = self.meter.0.lock();
        state.pass_time(self.ended.unwrap_or_else(Instant::now));
        state.in_flight = state.in_flight.saturating_sub(1);
        state.queued_bytes = state.queued_bytes.saturating_sub(self.bytes);
        if state.in_flight == 0 {
            state.busy_since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_reads_share_the_time() {
        let (meter, start) = (Arc::new(ReadMeter::default()), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let first = meter.begin_at(1000, at(0));
        let second = meter.begin_at(1000, at(0));
        assert_eq!(meter.rate().queued_bytes, 2000);
        first.done_at(at(100));
        second.done_at(at(100));
        let rate = meter.rate();
        assert!((rate.bytes_per_second - 20_000.0).abs() < 500.0, "{rate:?}");
        assert!((rate.latency_seconds - 0.1).abs() < 0.001, "the first met nobody: {rate:?}");
        assert_eq!(rate.queued_bytes, 0);
    }

    #[test]
    fn idle_time_does_not_count_and_failures_do() {
        let (meter, start) = (Arc::new(ReadMeter::default()), Instant::now());
        assert_eq!(meter.rate(), ReadRate::default());
        meter.begin_at(1000, start).done_at(start + Duration::from_millis(10));
        meter.begin_at(1000, start + Duration::from_secs(50)).done_at(start + Duration::from_millis(50_010));
        let rate = meter.rate();
        assert!((rate.bytes_per_second - 100_000.0).abs() < 3_000.0, "{rate:?}");
        drop(meter.begin_at(1000, Instant::now()));
        assert_eq!(meter.rate().queued_bytes, 0);
    }
}
