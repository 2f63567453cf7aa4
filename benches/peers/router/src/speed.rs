//! Events a second, look-ups beside events, and how long a look-up takes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use crate::peers::{self, Names, Peer, Scratch};
use crate::workload::Workload;

/// Medians by name.
#[derive(Default)]
pub struct Figures(BTreeMap<String, Vec<f64>>);

impl Figures {
    fn add(&mut self, name: String, value: f64) {
        self.0.entry(name).or_default().push(value);
    }

    fn median(&self, name: &str) -> f64 {
        let mut values = self.0.get(name).cloned().unwrap_or_default();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

fn quantile(times: &mut [u64], part: f64) -> f64 {
    times.sort_unstable();
    times.get((times.len() as f64 * part) as usize).copied().unwrap_or(0) as f64 / 1000.0
}

/// Look-ups of every prompt, one after the other: nanoseconds each.
fn look_up_all(peer: &dyn Peer, workload: &Workload, named: bool, times: &mut Vec<u64>) -> u64 {
    let mut scratch = Scratch::default();
    let mut sum = 0;
    for (tokens, names) in &workload.queries {
        let begun = Instant::now();
        let best = if named { peer.find_named(tokens, names, &mut scratch) } else { peer.find(tokens, &mut scratch) };
        times.push(begun.elapsed().as_nanos() as u64);
        sum += u64::from(best);
    }
    sum
}

pub fn run(blocks: &str, workload: &Workload, runtime: &Arc<Runtime>, rounds: usize) {
    let mut figures = Figures::default();
    for round in 0..rounds {
        for (kind, names) in [("router", Names::Router), ("opaque", Names::Opaque)] {
            applied(workload, runtime, kind, names, &mut figures);
            mixed(workload, runtime, kind, names, &mut figures);
        }
        paced(workload, runtime, &mut figures);
        eprintln!("round {} of {rounds}", round + 1);
    }
    for kind in ["router", "opaque"] {
        let target = if kind == "router" { 3.5 } else { 2.0 };
        for what in ["events_mblocks_s", "mixed_mblocks_s"] {
            let of = |peer: &str| figures.median(&format!("{kind}_{what}_{peer}"));
            let best = of("radix").max(of("positional"));
            println!("figure router.{blocks}_{kind}_{what}_of_best_peer {:.2} target >= {target}", of("ours") / best);
            for peer in ["ours", "radix", "positional"] {
                println!("figure router.{blocks}_{kind}_{what}_{peer} {:.2} target none", of(peer));
            }
        }
    }
    let ratios = [("idle_named_p99", 0.3), ("idle_p99", 0.8), ("paced_p50", 0.7), ("paced_p99", 0.4)];
    for (what, target) in ratios {
        let of = |peer: &str| figures.median(&format!("{what}_{peer}"));
        let best = of("radix").min(of("positional"));
        println!("figure router.{blocks}_lookup_{what}_of_best_peer {:.2} target <= {target}", of("ours") / best);
        for peer in ["ours", "radix", "positional"] {
            println!("figure router.{blocks}_lookup_{what}_us_{peer} {:.2} target none", of(peer));
        }
    }
}

/// All events, by one thread; then look-ups of all prompts, with nothing else going on.
fn applied(workload: &Workload, runtime: &Arc<Runtime>, kind: &str, names: Names, figures: &mut Figures) {
    let mut sums = Vec::new();
    for (peer, index, events) in peers::all(workload, runtime, names) {
        let begun = Instant::now();
        index.apply(events);
        let seconds = begun.elapsed().as_secs_f64();
        figures.add(format!("{kind}_events_mblocks_s_{peer}"), workload.event_blocks() as f64 / seconds / 1e6);
        if names == Names::Router {
            for (what, named) in [("idle_named_p99", true), ("idle_p99", false)] {
                let mut times = Vec::new();
                sums.push(look_up_all(&*index, workload, named, &mut times));
                figures.add(format!("{what}_{peer}"), quantile(&mut times, 0.99));
            }
        }
    }
    // They must agree: what is compared does the same.
    sums.dedup();
    assert!(sums.len() <= 1, "the indexes do not find the same: {sums:?}");
}

/// All events by one thread, all prompts by another, both as fast as they can; the time is until both are done.
fn mixed(workload: &Workload, runtime: &Arc<Runtime>, kind: &str, names: Names, figures: &mut Figures) {
    let blocks = workload.event_blocks() + workload.query_blocks();
    for (peer, index, events) in peers::all(workload, runtime, names) {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| index.apply(events));
            look_up_all(&*index, workload, false, &mut Vec::with_capacity(workload.queries.len()));
        });
        figures.add(format!("{kind}_mixed_mblocks_s_{peer}"), blocks as f64 / begun.elapsed().as_secs_f64() / 1e6);
    }
}

/// Block operations a second that events come with, which all keep up with.
const PACED_BLOCKS_S: f64 = 2e6;

/// Look-ups while events come at a steady pace.
fn paced(workload: &Workload, runtime: &Arc<Runtime>, figures: &mut Figures) {
    for (peer, index, events) in peers::all(workload, runtime, Names::Router) {
        let (stop, batches) = (AtomicBool::new(false), batches(events));
        let mut times = Vec::new();
        let behind = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let (index, stop, behind) = (&index, &stop, &behind);
            scope.spawn(move || {
                let begun = Instant::now();
                let mut blocks = 0;
                for (count, batch) in batches {
                    let due = Duration::from_secs_f64(blocks as f64 / PACED_BLOCKS_S);
                    match due.checked_sub(begun.elapsed()) {
                        Some(wait) => std::thread::sleep(wait),
                        None => _ = behind.fetch_add(1, Ordering::Relaxed),
                    }
                    blocks += count;
                    index.apply(batch);
                }
                stop.store(true, Ordering::Release);
            });
            while !stop.load(Ordering::Acquire) {
                look_up_all(&**index, workload, false, &mut times);
            }
        });
        figures.add(format!("paced_p50_{peer}"), quantile(&mut times, 0.5));
        figures.add(format!("paced_p99_{peer}"), quantile(&mut times, 0.99));
    }
}

/// Events in pieces of some, with the blocks of each.
fn batches(events: peers::Prepared) -> Vec<(usize, peers::Prepared)> {
    const EVENTS: usize = 16;
    match events {
        peers::Prepared::Ours(events) => pieces(events, EVENTS, |event| match event {
            peers::OurEvent::Store(_, names) | peers::OurEvent::Remove(_, names) => names.len(),
            peers::OurEvent::StoreOpaque(_, _, blocks) => blocks.len(),
            peers::OurEvent::RemoveOpaque(_, names) => names.len(),
        })
        .into_iter()
        .map(|(count, events)| (count, peers::Prepared::Ours(events)))
        .collect(),
        peers::Prepared::Theirs(events) => pieces(events, EVENTS, |event| match &event.event.data {
            dynamo_kv_router::protocols::KvCacheEventData::Stored(data) => data.blocks.len(),
            dynamo_kv_router::protocols::KvCacheEventData::Removed(data) => data.block_hashes.len(),
            dynamo_kv_router::protocols::KvCacheEventData::Cleared => 0,
        })
        .into_iter()
        .map(|(count, events)| (count, peers::Prepared::Theirs(events)))
        .collect(),
    }
}

fn pieces<T>(events: Vec<T>, each: usize, blocks: impl Fn(&T) -> usize) -> Vec<(usize, Vec<T>)> {
    let mut pieces: Vec<(usize, Vec<T>)> = Vec::new();
    for (at, event) in events.into_iter().enumerate() {
        if at % each == 0 {
            pieces.push((0, Vec::with_capacity(each)));
        }
        if let Some((count, piece)) = pieces.last_mut() {
            *count += blocks(&event);
            piece.push(event);
        }
    }
    pieces
}
