//! What a fleet's engines say and what its router asks, worked out from a trace beforehand.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::path::Path;

use anyhow::Context;
use kvstore_index::names::chain_names;

/// One thing that an engine says.
pub enum Event {
    /// It stored these blocks behind `parent`: places in `names` and `tokens`.
    Stored { worker: usize, parent: Option<u64>, start: u32, names: Vec<u64>, tokens: Vec<u64> },
    /// These left.
    Removed { worker: usize, names: Vec<u64> },
}

impl Event {
    /// Blocks that it is about.
    pub fn blocks(&self) -> usize {
        match self {
            Self::Stored { names, .. } | Self::Removed { names, .. } => names.len(),
        }
    }
}

/// See the head of this file.
pub struct Workload {
    pub workers: usize,
    pub events: Vec<Event>,
    /// Prompts: hashes of their blocks' tokens, and their names.
    pub queries: Vec<(Vec<u64>, Vec<u64>)>,
    /// Pairs of a block and a worker that there are after all events.
    pub pairs: usize,
}

/// Names are spread evenly as they are.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0 << 8 | u64::from(*byte));
    }

    fn write_u64(&mut self, name: u64) {
        self.0 = name;
    }
}

/// An engine's cache: the least recently used block goes, of one request the last one first.
struct Cache {
    capacity: usize,
    used: HashMap<u64, u64, BuildHasherDefault<AsIs>>,
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl Cache {
    fn use_all(&mut self, names: &[u64]) -> Vec<u64> {
        for name in names.iter().rev() {
            self.clock += 1;
            self.used.insert(*name, self.clock);
            self.order.push_back((*name, self.clock));
        }
        let mut gone = Vec::new();
        while self.used.len() > self.capacity {
            let Some((name, at)) = self.order.pop_front() else { break };
            if self.used.get(&name) == Some(&at) {
                self.used.remove(&name);
                gone.push(name);
            }
        }
        gone
    }
}

fn mixed(number: u64) -> u64 {
    let mut key = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    key = (key ^ key >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (key ^ key >> 27).wrapping_mul(0x94D0_49BB_1331_11EB)
}

/// The blocks of each request of a trace: of the conversation trace (a line of JSON each), or of the agents' (four numbers each: when, which
/// request it goes on, how many blocks of that it begins with, and how many are its own).
fn requests(trace: &Path) -> anyhow::Result<Vec<Vec<u64>>> {
    let text = std::fs::read_to_string(trace).with_context(|| format!("cannot read {}", trace.display()))?;
    let mut requests: Vec<Vec<u64>> = Vec::new();
    let mut blocks = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if trace.extension().is_some_and(|kind| kind == "csv") {
            let numbers: Vec<i64> = line.split(',').map(str::parse).collect::<Result<_, _>>()?;
            let [_, parent, shared, own] = numbers[..] else { anyhow::bail!("{line:?} has no four numbers") };
            let parent = usize::try_from(parent).ok().and_then(|parent| requests.get(parent));
            let mut ids: Vec<u64> = parent.into_iter().flatten().take(shared as usize).copied().collect();
            ids.extend((0..own as u64).map(|at| blocks + at));
            blocks += own as u64;
            requests.push(ids);
            continue;
        }
        let line: serde_json::Value = serde_json::from_str(line)?;
        let ids = line["hash_ids"].as_array().context("a line of the trace has no hash_ids")?;
        requests.push(ids.iter().filter_map(serde_json::Value::as_u64).collect());
    }
    Ok(requests)
}

impl Workload {
    /// Of a trace, for so many engines with so many blocks each; each request goes where most of its prefix is, or to the next. The
    /// trace's blocks are cut into `parts`, and its requests made by `copies` tenants at once, who share nothing.
    pub fn read(trace: &Path, workers: usize, capacity: usize, parts: u64, copies: u64) -> anyhow::Result<Self> {
        let new = |_| Cache { capacity, used: HashMap::default(), order: VecDeque::new(), clock: 0 };
        let mut caches: Vec<Cache> = (0..workers).map(new).collect();
        let (mut events, mut queries) = (Vec::new(), Vec::new());
        let requests = requests(trace)?;
        let all = requests.iter().flat_map(|ids| (0..copies).map(move |copy| (ids, copy)));
        for (at, (ids, copy)) in all.enumerate() {
            let part = |id: &u64| {
                let first = (copy << 40 | *id) * parts;
                (first..first + parts).map(mixed)
            };
            let tokens: Vec<u64> = ids.iter().flat_map(part).collect();
            let mut names = Vec::new();
            chain_names(&tokens, &mut names);
            let held = |cache: &Cache| names.iter().take_while(|name| cache.used.contains_key(name)).count();
            let best = (0..workers)
                .max_by_key(|worker| (held(&caches[*worker]), (*worker + workers - at % workers) % workers));
            // One in four goes elsewhere, as under load.
            let worker = if at % 4 == 0 { at / 4 % workers } else { best.unwrap_or(0) };
            let start = held(&caches[worker]);
            let gone = caches[worker].use_all(&names);
            if start < names.len() {
                events.push(Event::Stored {
                    worker,
                    parent: start.checked_sub(1).map(|last| names[last]),
                    start: start as u32,
                    names: names[start..].to_vec(),
                    tokens: tokens[start..].to_vec(),
                });
            }
            if !gone.is_empty() {
                events.push(Event::Removed { worker, names: gone });
            }
            queries.push((tokens, names));
        }
        let pairs = caches.iter().map(|cache| cache.used.len()).sum();
        Ok(Self { workers, events, queries, pairs })
    }

    /// Blocks of all events.
    pub fn event_blocks(&self) -> usize {
        self.events.iter().map(Event::blocks).sum()
    }

    /// Blocks of all queries.
    pub fn query_blocks(&self) -> usize {
        self.queries.iter().map(|(tokens, _)| tokens.len()).sum()
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} engines; {} events of {} blocks; {} prompts of {} blocks; {} pairs at the end",
            self.workers,
            self.events.len(),
            self.event_blocks(),
            self.queries.len(),
            self.query_blocks(),
            self.pairs
        )
    }
}
