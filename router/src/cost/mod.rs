//! What a request will cost at each worker, and which worker gets it. Pure: time is told, chance is told, nothing waits.
//!
//! The expected time to first token at a worker is what stands before it there, the prefill of what is not cached, and the fetch of
//! what is cached elsewhere than in the engine:
//!
//! ```text
//! expected = prefill time (work ahead + tokens to compute) + fetch (each tier: latency + (bytes + bytes queued) / bandwidth)
//! ```
//!
//! Work ahead is counted exactly ([`Load`]); how fast a worker gets through it is learnt from its own answers ([`Speed`]); bandwidths
//! and latencies are those that each node measures. No weight is set by hand.

mod choose;
mod load;
mod speed;

pub use choose::{Choice, Choose, Overload, Why, choose};
pub use load::{Ended, Load, RequestId, WorkerLoad};
pub use speed::Speed;

use std::time::Duration;

/// What an engine brings from a second tier of its own takes this part of the time to compute it. It says nothing of how fast that is: copies
/// over a bus of 25 GB/s take a tenth to a twentieth of computing on current GPUs.
const HOST_SHARE: f64 = 0.1;

/// A tier that is not the engine's own memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Tier {
    /// The node's memory.
    Host,
    /// The node's disks.
    Nvme,
    /// The bucket of all.
    Object,
}

/// All of them, the fastest first.
pub const TIERS: [Tier; 3] = [Tier::Host, Tier::Nvme, Tier::Object];

/// How fast a tier is read, as its node measures it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct TierRate {
    /// 0: not measured yet.
    pub bytes_per_second: f64,
    /// From asking to having.
    pub latency_seconds: f64,
    /// Bytes that others wait for.
    pub queued_bytes: u64,
}

impl TierRate {
    /// What is believed of a tier that nobody has read yet: an SSD of the slower kind, a bucket in the same region. The first reads
    /// replace it.
    fn or_usual(self, tier: Tier) -> Self {
        if self.bytes_per_second > 0.0 {
            return self;
        }
        let (bytes_per_second, latency_seconds) = match tier {
            Tier::Host => (8e9, 20e-6),
            Tier::Nvme => (1.5e9, 200e-6),
            Tier::Object => (0.3e9, 30e-3),
        };
        Self { bytes_per_second, latency_seconds, ..self }
    }

    /// Seconds until `bytes` from this tier are there.
    fn seconds(self, tier: Tier, bytes: u64) -> f64 {
        if bytes == 0 {
            return 0.0;
        }
        let rate = self.or_usual(tier);
        rate.latency_seconds + (bytes + rate.queued_bytes) as f64 / rate.bytes_per_second
    }
}

/// How much of a prompt is where, as one worker would find it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cached {
    /// Tokens in the memory that the engine computes in.
    pub engine_tokens: u64,
    /// Tokens beyond those in a second tier of the engine's own, in the host's memory.
    pub engine_host_tokens: u64,
    /// Tokens that its node, or the bucket, has beyond those; and their bytes by tier, in the order of [`TIERS`].
    pub fetched_tokens: u64,
    /// ...
    pub fetched_bytes: [u64; 3],
    /// Of the tokens that are fetched, how many come from which tier.
    pub tier_tokens: [u64; 3],
}

impl Cached {
    /// All tokens that need not be computed.
    pub fn tokens(&self) -> u64 {
        self.engine_tokens + self.engine_host_tokens + self.fetched_tokens
    }
}

/// What one request would cost at one worker.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Terms {
    /// How much of the prompt is where.
    pub cached: Cached,
    /// Tokens that the worker has yet to compute before this request's.
    pub tokens_ahead: u64,
    /// Tokens of this request that it would compute.
    pub tokens_to_compute: u64,
    /// Sequences that it is decoding.
    pub decoding: u64,
    /// Seconds for the work ahead.
    pub queue_seconds: f64,
    /// Seconds for this request's own tokens.
    pub prefill_seconds: f64,
    /// Seconds for what is fetched.
    pub fetch_seconds: f64,
}

impl Terms {
    /// Of a prompt of `tokens`, at a worker under `load` whose speed is `speed`, on a node with these rates. What is slower to fetch than
    /// to compute is computed, as engines do where they are asked to.
    pub fn of(tokens: u64, cached: Cached, load: &WorkerLoad, speed: &Speed, rates: &[TierRate; 3]) -> Self {
        let fetch = |cached: &Cached| -> f64 {
            let tiers = TIERS.iter().zip(rates).zip(cached.fetched_bytes);
            tiers.map(|((tier, rate), bytes)| rate.seconds(*tier, bytes)).sum()
        };
        let (ahead, decoding) = (load.prefill_tokens, load.decoding);
        let queue_seconds = speed.seconds(ahead, decoding);
        let fetch = |cached: &Cached| {
            let computed = speed.seconds(ahead + cached.engine_host_tokens, decoding) - queue_seconds;
            fetch(cached) + computed * HOST_SHARE
        };
        let own = |cached: &Cached| {
            // The last token is computed in any case: its logits are the answer's first.
            let computed = tokens.saturating_sub(cached.tokens()).max(1);
            (computed, speed.seconds(ahead + computed, decoding) - queue_seconds)
        };
        let (computed, prefill_seconds) = own(&cached);
        let terms = Self {
            cached,
            tokens_ahead: ahead,
            tokens_to_compute: computed,
            decoding,
            queue_seconds,
            prefill_seconds,
            fetch_seconds: fetch(&cached),
        };
        if cached.fetched_tokens == 0 {
            return terms;
        }
        let Cached { engine_tokens, engine_host_tokens, .. } = cached;
        let without = Cached { engine_tokens, engine_host_tokens, ..Cached::default() };
        let (computed, prefill_seconds) = own(&without);
        let recomputed = Self {
            cached: without,
            tokens_to_compute: computed,
            prefill_seconds,
            fetch_seconds: fetch(&without),
            ..terms
        };
        if recomputed.expected() < terms.expected() { recomputed } else { terms }
    }

    /// Expected seconds to the first token.
    pub fn expected(&self) -> f64 {
        self.queue_seconds + self.prefill_seconds + self.fetch_seconds
    }

    /// The same, as a duration.
    pub fn expected_time(&self) -> Duration {
        Duration::try_from_secs_f64(self.expected()).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed() -> Speed {
        // 10,000 tokens a second.
        let mut speed = Speed::default();
        for tokens in [1000u64, 4000, 2000, 8000, 16_000, 500] {
            speed.learn_prefill(tokens, 0, Duration::from_micros(tokens * 100 + 10_000));
        }
        speed
    }

    #[test]
    fn what_is_cached_costs_nothing_and_what_is_fetched_costs_its_way() {
        let (speed, load) = (speed(), WorkerLoad::default());
        let rates = [
            TierRate { bytes_per_second: 1e9, latency_seconds: 0.001, queued_bytes: 0 },
            TierRate::default(),
            TierRate::default(),
        ];
        let of = |cached| Terms::of(10_000, cached, &load, &speed, &rates);
        let cold = of(Cached::default());
        assert!((cold.prefill_seconds - 1.0).abs() < 0.05, "{cold:?}");
        let half = of(Cached { engine_tokens: 5000, ..Cached::default() });
        assert!((cold.expected() - half.expected() - 0.5).abs() < 0.05, "{half:?}");
        let fetched = of(Cached { fetched_tokens: 5000, fetched_bytes: [100_000_000, 0, 0], ..Cached::default() });
        assert!((fetched.fetch_seconds - 0.101).abs() < 0.001, "{fetched:?}");
        let slow = of(Cached { fetched_tokens: 5000, fetched_bytes: [2_000_000_000, 0, 0], ..Cached::default() });
        assert_eq!(slow.fetch_seconds, 0.0, "two seconds to fetch, half a second to compute");
        assert_eq!(slow.expected(), cold.expected());
    }

    #[test]
    fn an_engines_second_tier_is_dearer_than_its_first_and_cheaper_than_nothing() {
        let (speed, load) = (speed(), WorkerLoad::default());
        let of = |cached| Terms::of(10_000, cached, &load, &speed, &[TierRate::default(); 3]).expected();
        let (nothing, device) = (of(Cached::default()), of(Cached { engine_tokens: 8000, ..Cached::default() }));
        let host = of(Cached { engine_host_tokens: 8000, ..Cached::default() });
        assert!(device < host && host < nothing, "{device} {host} {nothing}");
        assert!((host - device - 0.08).abs() < 0.01, "a tenth of 0.8 s");
    }

    #[test]
    fn a_queue_at_the_tier_and_at_the_worker_counts() {
        let speed = speed();
        let mut rates = [TierRate { bytes_per_second: 1e9, latency_seconds: 0.0, queued_bytes: 0 }; 3];
        let cached = Cached { fetched_tokens: 9000, fetched_bytes: [0, 100_000_000, 0], ..Cached::default() };
        let idle = Terms::of(10_000, cached, &WorkerLoad::default(), &speed, &rates);
        rates[1].queued_bytes = 200_000_000;
        let busy_disk = Terms::of(10_000, cached, &WorkerLoad::default(), &speed, &rates);
        assert!((busy_disk.expected() - idle.expected() - 0.2).abs() < 1e-6);
        let load = WorkerLoad { prefill_tokens: 20_000, ..WorkerLoad::default() };
        let behind = Terms::of(10_000, cached, &load, &speed, &rates);
        assert!((behind.expected() - busy_disk.expected() - 2.0).abs() < 0.1);
    }
}
