//! How fast a worker computes, learnt from what it answers.
//!
//! The time from sending a request to its first token is fitted, by least squares over what faded of the past, to `idle + tokens / rate`:
//! tokens ahead of it and its own. What a worker cannot show yet (all its requests were of one size) is taken from what is usual.

use std::time::Duration;

/// What is believed of a worker that has not answered yet.
const USUAL_TOKENS_PER_SECOND: f64 = 8000.0;
const USUAL_IDLE_SECONDS: f64 = 0.02;
const USUAL_SECONDS_PER_TOKEN_OUT: f64 = 0.02;
/// What an answer leaves of those before it: some fifty count.
const KEEP: f64 = 0.98;
/// How much the usual counts, in answers: little, and it fades.
const PRIOR: f64 = 0.5;

/// See the head of this file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    count: f64,
    tokens: f64,
    seconds: f64,
    tokens_tokens: f64,
    tokens_seconds: f64,
    token_out: f64,
    learnt: u64,
}

impl Default for Speed {
    fn default() -> Self {
        Self::usual(USUAL_IDLE_SECONDS, USUAL_TOKENS_PER_SECOND)
    }
}

impl Speed {
    /// A worker that is thought to answer after so many seconds, and to compute so many tokens a second, until it shows otherwise.
    pub fn usual(idle_seconds: f64, tokens_per_second: f64) -> Self {
        let mut speed = Self {
            count: 0.0,
            tokens: 0.0,
            seconds: 0.0,
            tokens_tokens: 0.0,
            tokens_seconds: 0.0,
            token_out: USUAL_SECONDS_PER_TOKEN_OUT,
            learnt: 0,
        };
        for tokens in [0.0, 4000.0] {
            speed.add(tokens, idle_seconds + tokens / tokens_per_second, PRIOR);
        }
        speed
    }

    fn add(&mut self, tokens: f64, seconds: f64, weight: f64) {
        self.count += weight;
        self.tokens += weight * tokens;
        self.seconds += weight * seconds;
        self.tokens_tokens += weight * tokens * tokens;
        self.tokens_seconds += weight * tokens * seconds;
    }

    /// A request whose own tokens, and those ahead of it, were `tokens` got its first token after `took`, while `decoding` others were
    /// decoded.
    pub fn learn_prefill(&mut self, tokens: u64, _decoding: u64, took: Duration) {
        for sum in
            [&mut self.count, &mut self.tokens, &mut self.seconds, &mut self.tokens_tokens, &mut self.tokens_seconds]
        {
            *sum *= KEEP;
        }
        // Long waits vary more: each counts by what it says of the rate.
        let weight = 1.0 / (1.0 + tokens as f64 / 8000.0);
        self.add(tokens as f64, took.as_secs_f64(), weight);
        self.learnt += 1;
    }

    /// A token came `after` the one before it.
    pub fn learn_token(&mut self, after: Duration) {
        self.token_out += (after.as_secs_f64() - self.token_out) * 0.02;
    }

    fn fit(&self) -> (f64, f64) {
        let count = self.count.max(1e-9);
        let (mean_tokens, mean_seconds) = (self.tokens / count, self.seconds / count);
        let variance = self.tokens_tokens / count - mean_tokens * mean_tokens;
        let covariance = self.tokens_seconds / count - mean_tokens * mean_seconds;
        let through_origin = mean_seconds / mean_tokens.max(1.0);
        let per_token = match variance > 1.0 && covariance > 0.0 {
            true => (covariance / variance).min(through_origin),
            // More work took less time: it says nothing but how fast it was on the whole.
            false => through_origin,
        };
        ((mean_seconds - per_token * mean_tokens).max(0.0), per_token)
    }

    /// Seconds until `tokens` are computed.
    pub fn seconds(&self, tokens: u64, _decoding: u64) -> f64 {
        let (idle, per_token) = self.fit();
        if tokens == 0 { 0.0 } else { idle + per_token * tokens as f64 }
    }

    /// Seconds that a prompt of no tokens would take.
    pub fn idle_seconds(&self) -> f64 {
        self.fit().0
    }

    /// Tokens of prompts a second.
    pub fn tokens_per_second(&self) -> f64 {
        1.0 / self.fit().1.max(1e-12)
    }

    /// Seconds from one token of an answer to the next.
    pub fn seconds_per_token_out(&self) -> f64 {
        self.token_out
    }

    /// Answers that it was learnt from.
    pub fn learnt(&self) -> u64 {
        self.learnt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn(speed: &mut Speed, rate: f64, idle: f64, rounds: u64) {
        for round in 0..rounds {
            let tokens = 500 + round * 2741 % 12_000;
            speed.learn_prefill(tokens, 0, Duration::from_secs_f64(idle + tokens as f64 / rate));
        }
    }

    #[test]
    fn a_rate_is_found_and_followed() {
        let mut speed = Speed::default();
        learn(&mut speed, 20_000.0, 0.05, 30);
        assert!((speed.tokens_per_second() / 20_000.0 - 1.0).abs() < 0.1, "{}", speed.tokens_per_second());
        assert!((speed.seconds(10_000, 0) - 0.55).abs() < 0.03);
        // It became slower: a hundred answers later that is what is believed.
        learn(&mut speed, 10_000.0, 0.05, 100);
        assert!((speed.tokens_per_second() / 10_000.0 - 1.0).abs() < 0.1, "{}", speed.tokens_per_second());
    }

    #[test]
    fn what_says_nothing_does_no_harm() {
        let mut speed = Speed::default();
        for _ in 0..100 {
            speed.learn_prefill(4000, 0, Duration::from_millis(400));
        }
        let seconds = speed.seconds(4000, 0);
        assert!((seconds - 0.4).abs() < 0.02, "{seconds}");
        for _ in 0..100 {
            speed.learn_prefill(1, 0, Duration::from_secs(1));
            speed.learn_prefill(10_000, 0, Duration::from_millis(1));
        }
        assert!(speed.seconds(10_000, 0) >= speed.seconds(10, 0), "more work never takes less time");
        assert!(speed.tokens_per_second().is_finite() && speed.tokens_per_second() > 0.0);
        assert_eq!(Speed::default().seconds(0, 0), 0.0);
    }
}
