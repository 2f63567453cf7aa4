//! Routing itself, by simulation: the conversation trace, eight engines, four routers.
//!
//! Time is the trace's, pressed together until round-robin keeps the engines busy for the asked part of it. Engines differ by up to 30% from
//! each other, and their steps by as much again; no router is told. All routers see the same exact index.

#![expect(clippy::indexing_slicing, reason = "workers and requests are numbered here")]

mod engine;
mod overhead;

pub use overhead::{CORPUS, write_tokenizer};

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use kvstore_router::cost::{Cached, Choose, Load, RequestId, Speed, Terms, TierRate, choose};

use crate::figure::{self, median};
use engine::{BLOCK_TOKENS, Engine, Event, H100_LLAMA_8B, Machine, Request};

const WORKERS: usize = 8;
const SEEDS: [u64; 5] = [11, 22, 33, 44, 55];
const NOISE: f64 = 0.3;

/// A router.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Router {
    RoundRobin,
    /// Fewest requests under way.
    LeastLoaded,
    /// Dynamo 1.6.1's default cost: `prefill blocks + decode blocks`, where prefill blocks are those of all requests without a first token and this
    /// one's, less what overlaps (1 for a block in the engine, 0.75 in the node's memory), and decode blocks those of all requests under way. (Source:
    /// `lib/kv-router/src/scheduling/selector/reference.rs` and `config.rs` of that release.)
    Dynamo,
    Kvstore,
}

/// What became of a trace.
struct Outcome {
    /// Seconds to the first token, sorted.
    first_tokens: Vec<f64>,
    /// The part of the time that the engines were busy.
    busy: f64,
    computed_tokens: u64,
}

impl Outcome {
    fn mean(&self) -> f64 {
        self.first_tokens.iter().sum::<f64>() / self.first_tokens.len().max(1) as f64
    }

    fn p99(&self) -> f64 {
        self.first_tokens.get(self.first_tokens.len() * 99 / 100).copied().unwrap_or(f64::NAN)
    }
}

/// What a router keeps.
struct State {
    router: Router,
    turn: usize,
    load: Load<usize>,
    speeds: Vec<Speed>,
    random: u64,
    prefill: [u64; WORKERS],
    decode: [u64; WORKERS],
}

impl State {
    fn choose(&mut self, engines: &[Engine], request: &Request) -> (usize, u64) {
        let cached: Vec<(u64, u64)> = engines
            .iter()
            .map(|engine| {
                let (engine, node) = engine.cached(&request.blocks);
                (engine as u64 * BLOCK_TOKENS, node as u64 * BLOCK_TOKENS)
            })
            .collect();
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let chance = (self.random >> 11) as f64 / (1u64 << 53) as f64;
        let at = match self.router {
            Router::RoundRobin => {
                self.turn += 1;
                self.turn % WORKERS
            }
            Router::LeastLoaded => {
                let start = (chance * WORKERS as f64) as usize;
                let turned = (0..WORKERS).map(|at| (at + start) % WORKERS);
                turned.min_by_key(|at| self.load.of(*at).requests()).unwrap_or_default()
            }
            Router::Dynamo => {
                let blocks = |tokens: u64| tokens as f64 / BLOCK_TOKENS as f64;
                let cost = |at: usize| {
                    let (engine, node) = cached[at];
                    let prefill = blocks(self.prefill[at] + request.tokens);
                    let overlap = blocks(engine) + 0.75 * blocks(node);
                    (prefill - overlap).max(0.0) + self.decode[at] as f64 + blocks(request.tokens)
                };
                let start = (chance * WORKERS as f64) as usize;
                let turned = (0..WORKERS).map(|at| (at + start) % WORKERS);
                turned.min_by(|a, b| cost(*a).total_cmp(&cost(*b))).unwrap_or_default()
            }
            Router::Kvstore => {
                let rate = |machine: &Machine| TierRate {
                    bytes_per_second: machine.host_bytes_per_second,
                    latency_seconds: machine.host_latency_seconds,
                    queued_bytes: 0,
                };
                let candidates: Vec<(Terms, u64, bool)> = (0..WORKERS)
                    .map(|at| {
                        let (engine_tokens, fetched_tokens) = cached[at];
                        let machine = &engines[at].machine;
                        let bytes = fetched_tokens / BLOCK_TOKENS * machine.block_bytes;
                        let cached =
                            Cached { engine_tokens, fetched_tokens, fetched_bytes: [bytes, 0, 0], ..Cached::default() };
                        let load = self.load.of(at);
                        let rates = [rate(machine), TierRate::default(), TierRate::default()];
                        let terms = Terms::of(request.tokens, cached, &load, &self.speeds[at], &rates);
                        (terms, load.requests(), false)
                    })
                    .collect();
                let how = Choose { requests_max: u64::MAX, seconds_max: f64::MAX, ..Choose::default() };
                choose(&how, &candidates, chance).and_then(Result::ok).map_or(0, |choice| choice.at)
            }
        };
        let (engine, node) = cached[at];
        (at, request.tokens.saturating_sub(engine + node).max(1))
    }
}

/// Runs a trace: arrival times in seconds, in order.
#[expect(clippy::too_many_lines, reason = "one loop of events, in their order")]
fn run(router: Router, trace: &[(f64, Request)], scale: f64, seed: u64) -> Outcome {
    let mut random = seed;
    let mut chance = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut engines: Vec<Engine> = (0..WORKERS as u64)
        .map(|at| Engine::new(H100_LLAMA_8B, 1.0 + NOISE * (2.0 * chance() - 1.0), NOISE, seed * 1000 + at))
        .collect();
    let mut state = State {
        router,
        turn: 0,
        load: Load::default(),
        speeds: vec![Speed::default(); WORKERS],
        random: seed,
        prefill: [0; WORKERS],
        decode: [0; WORKERS],
    };
    let forever = Duration::MAX;
    let mut sent: Vec<Option<(f64, usize, u64, RequestId)>> = vec![None; trace.len()];
    let mut first_tokens = Vec::with_capacity(trace.len());
    // When each engine's next step begins; in nanoseconds, so that times have an order.
    let mut due: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut asleep = [true; WORKERS];
    let nanos = |seconds: f64| (seconds * 1e9) as u64;
    let (mut next, mut now, mut events) = (0, 0.0, Vec::new());
    // Events of a step come when it ends.
    let mut ending: Vec<Vec<Event>> = (0..WORKERS).map(|_| Vec::new()).collect();
    loop {
        let arrival = trace.get(next).map(|(at, _)| at * scale);
        let step = due.peek().map(|Reverse((at, _))| *at as f64 / 1e9);
        match (arrival, step) {
            (None, None) => break,
            (Some(at), step) if step.is_none_or(|step| at <= step) => {
                now = at;
                let Some((_, request)) = trace.get(next) else { break };
                let (worker, computes) = state.choose(&engines, request);
                let time = Duration::from_secs_f64(now);
                let id = state.load.add(worker, request.tokens, computes, time, forever);
                state.prefill[worker] += computes;
                state.decode[worker] += request.tokens.div_ceil(BLOCK_TOKENS);
                sent[next] = Some((now, worker, computes, id));
                engines[worker].push(next, request.clone());
                if std::mem::take(&mut asleep[worker]) {
                    due.push(Reverse((nanos(now), worker)));
                }
                next += 1;
            }
            _ => {
                let Some(Reverse((at, worker))) = due.pop() else { break };
                now = at as f64 / 1e9;
                for event in ending[worker].drain(..) {
                    let time = Duration::from_secs_f64(now);
                    match event {
                        Event::First(request) => {
                            let Some((at, _, computes, id)) = sent[request] else { continue };
                            first_tokens.push(now - at);
                            state.prefill[worker] -= computes;
                            if let Some(ended) = state.load.first_token(id, time) {
                                state.speeds[worker].learn_prefill(ended.work, ended.decoding, ended.took);
                            }
                        }
                        Event::Done(request) => {
                            let Some((_, _, _, id)) = sent[request] else { continue };
                            state.load.free(id);
                            state.decode[worker] -= trace[request].1.tokens.div_ceil(BLOCK_TOKENS);
                        }
                    }
                }
                match engines[worker].step(now, &mut events) {
                    Some(until) => {
                        ending[worker].append(&mut events);
                        due.push(Reverse((nanos(until).max(at + 1), worker)));
                    }
                    None => asleep[worker] = true,
                }
            }
        }
    }
    first_tokens.sort_by(f64::total_cmp);
    let busy = engines.iter().map(|engine| engine.busy_seconds).sum::<f64>() / (WORKERS as f64 * now.max(1e-9));
    Outcome { first_tokens, busy, computed_tokens: engines.iter().map(|engine| engine.computed_tokens).sum() }
}

/// How much the trace is pressed together for round-robin to keep the engines busy for `load` of the time.
fn scale_for(trace: &[(f64, Request)], load: f64) -> f64 {
    let (mut low, mut high) = (0.01, 4.0);
    for _ in 0..12 {
        let middle = f64::sqrt(low * high);
        if run(Router::RoundRobin, trace, middle, 1).busy > load { low = middle } else { high = middle }
    }
    f64::sqrt(low * high)
}

/// The trace's arrivals, lengths and whole blocks: those alone can be found again.
fn read(path: &Path) -> anyhow::Result<Vec<(f64, Request)>> {
    let mut trace = Vec::new();
    for line in std::fs::read_to_string(path)?.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        let number = |field: &str| line[field].as_f64().with_context(|| format!("a request without {field}"));
        let (tokens, answer) = (number("input_length")? as u64, number("output_length")? as u64);
        let blocks = line["hash_ids"].as_array().context("a request without hash_ids")?;
        let blocks =
            blocks.iter().filter_map(serde_json::Value::as_u64).take((tokens / BLOCK_TOKENS) as usize).collect();
        trace.push((number("timestamp")? / 1000.0, Request { blocks, tokens: tokens.max(1), answer }));
    }
    Ok(trace)
}

/// Measures the group.
pub fn measure(path: &Path, rounds: usize) -> anyhow::Result<()> {
    let trace = read(path)?;
    anyhow::ensure!(!trace.is_empty(), "the trace has no lengths of prompts");
    for load in [50, 70] {
        let scale = scale_for(&trace, f64::from(load) / 100.0);
        let (mut means, mut worst_mean, mut worst_p99) = (Vec::new(), 0.0f64, 0.0f64);
        for seed in SEEDS {
            let ours = run(Router::Kvstore, &trace, scale, seed);
            let others = [Router::RoundRobin, Router::LeastLoaded, Router::Dynamo]
                .map(|router| (router, run(router, &trace, scale, seed)));
            let best = |of: fn(&Outcome) -> f64| others.iter().map(|(_, outcome)| of(outcome)).fold(f64::MAX, f64::min);
            let (mean, p99) = (ours.mean() / best(Outcome::mean), ours.p99() / best(Outcome::p99));
            println!(
                "load {load}% seed {seed}: mean {:.3} s, p99 {:.2} s, busy {:.2}, computed {} M tokens",
                ours.mean(),
                ours.p99(),
                ours.busy,
                ours.computed_tokens / 1_000_000
            );
            for (router, outcome) in &others {
                println!(
                    "  {router:?}: mean {:.3} s, p99 {:.2} s, busy {:.2}, computed {} M tokens",
                    outcome.mean(),
                    outcome.p99(),
                    outcome.busy,
                    outcome.computed_tokens / 1_000_000
                );
            }
            means.push(mean);
            worst_mean = worst_mean.max(mean);
            worst_p99 = worst_p99.max(p99);
        }
        if load == 70 {
            figure::print("routing", "ttft_mean_of_the_best_other_at_70", median(means), "<= 0.9");
            figure::print("routing", "ttft_mean_worst_seed_at_70", worst_mean, "< 1");
            figure::print("routing", "ttft_p99_worst_seed_at_70", worst_p99, "< 1");
        } else {
            figure::note("routing", &format!("ttft_mean_of_the_best_other_at_{load}"), median(means));
            figure::note("routing", &format!("ttft_p99_worst_seed_at_{load}"), worst_p99);
        }
    }
    overhead::measure(rounds)
}
