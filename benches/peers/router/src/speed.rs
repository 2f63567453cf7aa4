//! Events a second, look-ups beside events, and how long a look-up takes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use crate::peers::{self, KINDS, Names, PEERS, Peer, Scratch};
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

/// Prints a figure, if it was measured.
fn figure(name: &str, value: f64, target: &str) {
    if !value.is_nan() {
        println!("figure router.{name} {value:.2} target {target}");
    }
}

fn quantile(times: &mut [u64], part: f64) -> f64 {
    times.sort_unstable();
    times.get((times.len() as f64 * part) as usize).copied().unwrap_or(0) as f64 / 1000.0
}

fn look_up(peer: &dyn Peer, tokens: &[u64], names: &[u64], named: bool, scratch: &mut Scratch) -> u32 {
    if named { peer.find_named(tokens, names, scratch) } else { peer.find(tokens, scratch) }
}

/// Look-ups of every prompt, one after the other: nanoseconds each.
fn look_up_all(peer: &dyn Peer, workload: &Workload, named: bool, times: &mut Vec<u64>) -> u64 {
    let mut scratch = Scratch::default();
    let mut sum = 0;
    for (tokens, names) in &workload.queries {
        let begun = Instant::now();
        let best = look_up(peer, tokens, names, named, &mut scratch);
        times.push(begun.elapsed().as_nanos() as u64);
        sum += u64::from(best);
    }
    sum
}

/// Where a look-up knows the names, and where it works them out.
const LOOKS: [(&str, bool, f64); 2] = [("named", true, 0.5), ("hashed", false, 0.8)];

/// What is measured: all kinds of names, parts and peers, or those that are named.
pub struct Only<'a>(Vec<&'a str>);

impl<'a> Only<'a> {
    pub fn of(names: &'a str) -> Self {
        Self(names.split(',').filter(|name| !name.is_empty()).collect())
    }

    fn has<const N: usize>(&self, all: [&str; N], name: &str) -> bool {
        self.0.contains(&name) || !all.iter().any(|one| self.0.contains(one))
    }

    fn peers(&self) -> impl Iterator<Item = &'static str> {
        PEERS.into_iter().filter(|peer| self.has(PEERS, peer))
    }
}

pub fn run(setting: &str, workload: &Workload, runtime: &Arc<Runtime>, rounds: usize, only: &Only<'_>) {
    let mut figures = Figures::default();
    let part = |name| only.has(["events", "mixed", "paced"], name);
    for round in 0..rounds {
        for (kind, names) in KINDS.into_iter().filter(|(kind, _)| only.has(KINDS.map(|(kind, _)| kind), kind)) {
            if part("events") {
                applied(workload, runtime, kind, names, &mut figures, only);
            }
            if part("mixed") {
                mixed(workload, runtime, kind, names, &mut figures, only);
            }
            if part("paced") {
                paced(workload, runtime, kind, names, &mut figures, only);
            }
        }
        eprintln!("round {} of {rounds}", round + 1);
    }
    for (kind, names) in KINDS {
        let target = if kind == "router" { 3 } else { 2 };
        for what in ["events_mblocks_s", "mixed_mblocks_s"] {
            let of = |peer: &str| figures.median(&format!("{kind}_{what}_{peer}"));
            let best = of("radix").max(of("positional"));
            figure(&format!("{setting}_{kind}_{what}_of_best_peer"), of("ours") / best, &format!(">= {target}"));
            for peer in PEERS {
                figure(&format!("{setting}_{kind}_{what}_{peer}"), of(peer), "none");
            }
        }
        for (look, _, target) in LOOKS {
            for what in ["idle_p50", "idle_p99", "paced_p50", "paced_p99"] {
                let of = |peer: &str| figures.median(&format!("{kind}_{look}_{what}_{peer}"));
                let best = of("radix").min(of("positional"));
                let name = format!("{setting}_{kind}_lookup_{look}_{what}");
                figure(&format!("{name}_of_best_peer"), of("ours") / best, &format!("<= {target}"));
                for peer in PEERS.into_iter().filter(|peer| peers::finds(peer, names)) {
                    figure(&format!("{name}_us_{peer}"), of(peer), "none");
                }
            }
        }
    }
}

/// All events, by one thread; then look-ups of all prompts, with nothing else going on.
fn applied(
    workload: &Workload,
    runtime: &Arc<Runtime>,
    kind: &str,
    names: Names,
    figures: &mut Figures,
    only: &Only<'_>,
) {
    let mut sums = Vec::new();
    for peer in only.peers() {
        let (index, events) = peers::prepared(peer, workload, runtime, names);
        let begun = Instant::now();
        index.apply(events);
        let seconds = begun.elapsed().as_secs_f64();
        figures.add(format!("{kind}_events_mblocks_s_{peer}"), workload.event_blocks() as f64 / seconds / 1e6);
        for (look, named, _) in LOOKS.into_iter().filter(|_| peers::finds(peer, names)) {
            let mut times = Vec::new();
            sums.push((look_up_all(&*index, workload, named, &mut times), peer, look));
            figures.add(format!("{kind}_{look}_idle_p50_{peer}"), quantile(&mut times, 0.5));
            figures.add(format!("{kind}_{look}_idle_p99_{peer}"), quantile(&mut times, 0.99));
        }
    }
    // They must agree: what is compared does the same.
    assert!(sums.iter().all(|(sum, ..)| *sum == sums[0].0), "the indexes do not find the same: {sums:?}");
}

/// All events by one thread, all prompts by another, both as fast as they can; the time is until both are done.
fn mixed(
    workload: &Workload,
    runtime: &Arc<Runtime>,
    kind: &str,
    names: Names,
    figures: &mut Figures,
    only: &Only<'_>,
) {
    let blocks = workload.event_blocks() + workload.query_blocks();
    for peer in only.peers() {
        let (index, events) = peers::prepared(peer, workload, runtime, names);
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
/// So many of them are waited for.
const PACED_BLOCKS: usize = 3_000_000;

/// Look-ups while events come at a steady pace, each prompt once by its names and once by its tokens.
fn paced(
    workload: &Workload,
    runtime: &Arc<Runtime>,
    kind: &str,
    names: Names,
    figures: &mut Figures,
    only: &Only<'_>,
) {
    for peer in only.peers().filter(|peer| peers::finds(peer, names)) {
        let (index, events) = peers::prepared(peer, workload, runtime, names);
        let (stop, batches) = (AtomicBool::new(false), batches(events));
        let mut times = LOOKS.map(|_| Vec::new());
        std::thread::scope(|scope| {
            let (index, stop) = (&index, &stop);
            scope.spawn(move || {
                let begun = Instant::now();
                let mut blocks = 0;
                for (count, batch) in batches {
                    let due = Duration::from_secs_f64(blocks as f64 / PACED_BLOCKS_S);
                    if let Some(wait) = due.checked_sub(begun.elapsed()) {
                        std::thread::sleep(wait);
                    }
                    blocks += count;
                    if blocks > PACED_BLOCKS {
                        break;
                    }
                    index.apply(batch);
                }
                stop.store(true, Ordering::Release);
            });
            let mut scratch = Scratch::default();
            // By turns: a prompt that was just looked up is near.
            for (at, (tokens, names)) in workload.queries.iter().cycle().enumerate() {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                let look = (at + at / workload.queries.len()) % LOOKS.len();
                let begun = Instant::now();
                look_up(&**index, tokens, names, LOOKS[look].1, &mut scratch);
                times[look].push(begun.elapsed().as_nanos() as u64);
            }
        });
        for ((look, ..), mut times) in LOOKS.into_iter().zip(times) {
            figures.add(format!("{kind}_{look}_paced_p50_{peer}"), quantile(&mut times, 0.5));
            figures.add(format!("{kind}_{look}_paced_p99_{peer}"), quantile(&mut times, 0.99));
        }
    }
}

/// Events in pieces of some, with the blocks of each.
fn batches(events: peers::Prepared) -> Vec<(usize, peers::Prepared)> {
    const EVENTS: usize = 16;
    match events {
        peers::Prepared::Ours(events) => pieces(events, EVENTS, |event| match event {
            peers::OurEvent::Store(_, _, names) => names.len(),
            peers::OurEvent::Remove(_, names) => names.len(),
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
