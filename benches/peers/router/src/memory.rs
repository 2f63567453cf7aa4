//! Bytes: of memory that the process has, by the kernel's account, not as anybody says.

use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Runtime;

use crate::peers::{self, KINDS, Names, Ours, Peer, Prepared, Scratch};
use crate::workload::{Event, Workload};

/// Resident bytes of this process.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).map_or(0, |pages| pages * 4096)
}

const WORKERS: usize = 1000;
const CHAIN: u64 = 250;
/// Pairs of a block and a worker.
const PAIRS: u64 = 10_000_000;

/// The chain `number`: a part that one in ten others shares, and a part of its own.
fn chain(number: u64) -> (Vec<u64>, Vec<u64>) {
    let tokens: Vec<u64> = (0..CHAIN)
        .map(|at| {
            let of = if at < 10 { number % 4000 + 1 } else { number + 10_000_000 };
            (of * 1000 + at).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        })
        .collect();
    let mut names = Vec::new();
    kvstore_index::names::chain_names(&tokens, &mut names);
    (tokens, names)
}

fn stored(number: u64) -> Event {
    let (tokens, names) = chain(number);
    Event::Stored { worker: number as usize % WORKERS, parent: None, start: 0, names, tokens }
}

fn removed(number: u64) -> Event {
    let (_, mut names) = chain(number);
    names.reverse();
    // The shared part stays: others may have it.
    names.truncate(CHAIN as usize - 10);
    Event::Removed { worker: number as usize % WORKERS, names }
}

pub fn run(runtime: &Arc<Runtime>) {
    for (kind, names, target) in [("router", Names::Router, 48), ("opaque", Names::Opaque, 80)] {
        let before = resident();
        let ours = Ours::new(WORKERS, names, 8 << 30);
        let mut worst = 0.0f64;
        for number in 0..PAIRS / CHAIN {
            ours.apply(ours.prepare(&[stored(number)], names));
            let pairs = (number + 1) * CHAIN;
            if pairs > PAIRS / 2 {
                worst = worst.max(resident().saturating_sub(before) as f64 / pairs as f64);
            }
        }
        println!("figure router.{kind}_bytes_a_pair_at_worst_from_5m_to_10m {worst:.1} target <= {target}");
        println!("figure router.{kind}_bytes_a_pair {:.1} target none", (resident() - before) as f64 / PAIRS as f64);
        if names == Names::Router {
            latency(&ours);
            long(&ours);
            churn("ours", before, |number| {
                ours.apply(ours.prepare(&[removed(number), stored(number + PAIRS / CHAIN)], names));
            });
        }
    }
    let before = resident();
    let theirs = peers::radix_tree(runtime);
    for number in 0..PAIRS / CHAIN {
        theirs.apply(peers::prepare_theirs(&[stored(number)], Names::Router));
    }
    println!("figure router.router_bytes_a_pair_radix {:.1} target none", (resident() - before) as f64 / PAIRS as f64);
    churn("radix", before, |number| {
        theirs.apply(peers::prepare_theirs(&[removed(number), stored(number + PAIRS / CHAIN)], Names::Router));
    });
}

fn latency(ours: &Ours) {
    let mut scratch = Scratch::default();
    let mut times: Vec<u64> = (0..20_000u64)
        .map(|at| {
            let (tokens, names) = chain(at * 7919 % (PAIRS / CHAIN));
            let begun = Instant::now();
            assert_eq!(ours.find_named(&tokens, &names, &mut scratch), CHAIN as u32);
            begun.elapsed().as_nanos() as u64
        })
        .collect();
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100] as f64 / 1000.0;
    println!("figure router.lookup_of_1000_workers_and_10m_pairs_p99_us {p99:.1} target <= 20");
}

/// Blocks of a long prompt: two million tokens in blocks of 64, or half a million in blocks of 16.
const LONG: u64 = 30_000;

/// An agent's session of 30,000 blocks among all that, which grew by 200 with each turn: its beginning lies everywhere, some of it on one worker
/// in ten, and all of it on three.
fn long(ours: &Ours) {
    let tokens: Vec<u64> = (0..LONG).map(|at| (at + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93)).collect();
    let mut names = Vec::new();
    kvstore_index::names::chain_names(&tokens, &mut names);
    for worker in 0..WORKERS {
        let blocks = match worker {
            0..3 => LONG as usize,
            _ if worker % 10 == 0 => 300 + worker * 20,
            _ => 300,
        };
        for start in (0..blocks).step_by(200) {
            let turn = start..(start + 200).min(blocks);
            let parent = start.checked_sub(1).map(|last| names[last]);
            let (names, tokens) = (names[turn.clone()].to_vec(), tokens[turn].to_vec());
            let event = Event::Stored { worker, parent, start: start as u32, names, tokens };
            ours.apply(ours.prepare(&[event], Names::Router));
        }
    }
    let mut scratch = Scratch::default();
    for (look, named, target) in [("named", true, "<= 60"), ("hashed", false, "none")] {
        let mut times: Vec<u64> = (0..201u64)
            .map(|at| {
                // Whatever else is looked up meanwhile.
                let (others, named_others) = chain(at * 7919 % (PAIRS / CHAIN));
                ours.find_named(&others, &named_others, &mut scratch);
                let begun = Instant::now();
                let best = if named {
                    ours.find_named(&tokens, &names, &mut scratch)
                } else {
                    ours.find(&tokens, &mut scratch)
                };
                let nanoseconds = begun.elapsed().as_nanos() as u64;
                assert_eq!(best, LONG as u32);
                nanoseconds
            })
            .collect();
        times.sort_unstable();
        let median = times[times.len() / 2] as f64 / 1000.0;
        println!("figure router.lookup_of_30000_blocks_of_1000_workers_{look}_us {median:.1} target {target}");
    }
    for worker in 0..WORKERS {
        let event = Event::Removed { worker, names: names.iter().rev().copied().collect() };
        ours.apply(ours.prepare(&[event], Names::Router));
    }
}

/// What one peer takes for what is there after a trace: bytes a pair of a block and a worker.
pub fn of_trace(workload: &Workload, kind: &str, peer: &str, runtime: &Arc<Runtime>) -> f64 {
    let Some((_, names)) = KINDS.into_iter().find(|(known, _)| *known == kind) else { return f64::NAN };
    let before = resident();
    let ours = Ours::new(workload.workers, names, 1 << 30);
    let prepare = |event: &Event| -> Prepared {
        let event = std::slice::from_ref(event);
        if peer == "ours" { ours.prepare(event, names) } else { peers::prepare_theirs(event, names) }
    };
    let other: Option<Box<dyn Peer>> = match peer {
        "radix" => Some(Box::new(peers::radix_tree(runtime))),
        "positional" => Some(Box::new(peers::positional(runtime))),
        _ => None,
    };
    let index: &dyn Peer = other.as_deref().unwrap_or(&ours);
    workload.events.iter().for_each(|event| index.apply(prepare(event)));
    resident().saturating_sub(before) as f64 / workload.pairs as f64
}

/// A day of churn at constant population: each hour a quarter of all chains leaves, and as many come.
fn churn(peer: &str, before: usize, mut replace: impl FnMut(u64)) {
    let chains = PAIRS / CHAIN;
    let (mut number, mut first) = (0, 0.0);
    for hour in 0..24 {
        for _ in 0..chains / 4 {
            replace(number);
            number += 1;
        }
        let bytes = (resident() - before) as f64;
        if hour == 0 {
            first = bytes;
        }
        if hour == 23 {
            let target = if peer == "ours" { "<= 1.05" } else { "none" };
            println!(
                "figure router.bytes_after_a_day_of_churn_of_first_hour_{peer} {:.3} target {target}",
                bytes / first
            );
        }
    }
}
