//! An engine, simulated step by step: continuous batching with chunked prefill, prefix caching in its own memory, and a store on its node
//! that keeps what leaves it.
//!
//! A step computes a chunk of prompts, first come first served, and a token of each answer under way. Its time is the arithmetic's and the
//! memory's, from an H100's published figures and the model's shape; what differs from engine to engine and from step to step is not known
//! to routers.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;

/// Tokens of a block: the trace's.
pub const BLOCK_TOKENS: u64 = 512;
/// Tokens of prompts that one step computes at most, vLLM's default for online serving.
const CHUNK_TOKENS: u64 = 8192;
/// Sequences at once.
const SEQUENCES_MAX: usize = 256;

/// The machine and the model.
#[derive(Clone, Copy)]
pub struct Machine {
    /// Seconds of a step that does nothing but read the weights.
    pub step_seconds: f64,
    /// Seconds of a prompt's token.
    pub token_seconds: f64,
    /// Seconds more for each thousand tokens before it: attention.
    pub token_seconds_per_thousand: f64,
    /// Seconds of a step for each token in memory that its answers attend to.
    pub held_token_seconds: f64,
    /// Blocks in the engine's memory.
    pub engine_blocks: usize,
    /// Blocks in the node's memory.
    pub host_blocks: usize,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Bytes a second from there.
    pub host_bytes_per_second: f64,
    /// Seconds from asking to having.
    pub host_latency_seconds: f64,
}

/// H100 SXM (989 TFLOP/s of bfloat16, 3.35 TB/s, 80 GB; NVIDIA's data sheet) at half of its arithmetic, with Llama 3.1 8B: 16 GB of weights, 32
/// layers, 8 KV heads of 128; PCIe 5.0 x16 to 256 GB of the node's memory.
pub const H100_LLAMA_8B: Machine = Machine {
    step_seconds: 16e9 / 3.35e12 + 1.5e-3,
    token_seconds: 2.0 * 8e9 / (0.5 * 989e12),
    // 4 FLOP for each of 4,096 dimensions of 32 layers and each token before.
    token_seconds_per_thousand: 4.0 * 4096.0 * 32.0 * 1000.0 / (0.5 * 989e12),
    held_token_seconds: KV_BYTES_PER_TOKEN / 3.35e12,
    engine_blocks: (52e9 / (KV_BYTES_PER_TOKEN * BLOCK_TOKENS as f64)) as usize,
    host_blocks: (256e9 / (KV_BYTES_PER_TOKEN * BLOCK_TOKENS as f64)) as usize,
    block_bytes: (KV_BYTES_PER_TOKEN * BLOCK_TOKENS as f64) as u64,
    host_bytes_per_second: 40e9,
    host_latency_seconds: 1e-3,
};
/// Keys and values, 32 layers, 8 heads, 128 dimensions, 2 bytes.
const KV_BYTES_PER_TOKEN: f64 = 2.0 * 32.0 * 8.0 * 128.0 * 2.0;

/// A request of the trace.
#[derive(Clone)]
pub struct Request {
    pub blocks: Rc<[u64]>,
    pub tokens: u64,
    pub answer: u64,
}

/// Least recently used out first; blocks in use stay.
#[derive(Default)]
pub struct Lru {
    used: HashMap<u64, (u64, u32)>,
    order: BTreeMap<u64, u64>,
    clock: u64,
}

impl Lru {
    pub fn has(&self, block: u64) -> bool {
        self.used.contains_key(&block)
    }

    fn len(&self) -> usize {
        self.used.len()
    }

    /// Uses a block, keeping it where `keeps`.
    fn touch(&mut self, block: u64, keeps: bool) {
        self.clock += 1;
        let entry = self.used.entry(block).or_insert((0, 0));
        self.order.remove(&entry.0);
        entry.0 = self.clock;
        entry.1 += u32::from(keeps);
        if entry.1 == 0 {
            self.order.insert(self.clock, block);
        }
    }

    fn release(&mut self, block: u64) {
        if let Some(entry) = self.used.get_mut(&block) {
            entry.1 = entry.1.saturating_sub(1);
            if entry.1 == 0 {
                self.order.insert(entry.0, block);
            }
        }
    }

    fn evict(&mut self) -> Option<u64> {
        let (_, block) = self.order.pop_first()?;
        self.used.remove(&block);
        Some(block)
    }
}

struct Sequence {
    request: usize,
    blocks: Rc<[u64]>,
    /// Blocks of its own, without a name: the prompt's rest and the answer.
    own_blocks: usize,
    tokens: u64,
    answer: u64,
    /// Tokens that are computed, or fetched.
    done: u64,
    /// When what is fetched is there.
    ready: f64,
}

/// What came of a step.
pub enum Event {
    /// A request has its first token.
    First(usize),
    /// A request is over.
    Done(usize),
}

/// See the head of this file.
pub struct Engine {
    pub machine: Machine,
    /// How much slower it is than it should be.
    pub slowness: f64,
    pub memory: Lru,
    pub host: Lru,
    /// Not begun.
    waiting: VecDeque<(usize, Request)>,
    prefilling: VecDeque<Sequence>,
    /// Answers under way, by the step at which they end.
    decoding: BTreeSet<(u64, usize)>,
    sequences: HashMap<usize, Sequence>,
    held_tokens: u64,
    own_blocks: usize,
    step: u64,
    host_busy_until: f64,
    random: u64,
    noise: f64,
    pub busy_seconds: f64,
    pub computed_tokens: u64,
}

impl Engine {
    pub fn new(machine: Machine, slowness: f64, noise: f64, seed: u64) -> Self {
        Self {
            machine,
            slowness,
            memory: Lru::default(),
            host: Lru::default(),
            waiting: VecDeque::new(),
            prefilling: VecDeque::new(),
            decoding: BTreeSet::new(),
            sequences: HashMap::new(),
            held_tokens: 0,
            own_blocks: 0,
            step: 0,
            host_busy_until: 0.0,
            random: seed | 1,
            noise,
            busy_seconds: 0.0,
            computed_tokens: 0,
        }
    }

    pub fn push(&mut self, at: usize, request: Request) {
        self.waiting.push_back((at, request));
    }

    /// Leading blocks in the engine's memory, and how many of those that follow are in the node's.
    pub fn cached(&self, blocks: &[u64]) -> (usize, usize) {
        let engine = blocks.iter().take_while(|block| self.memory.has(**block)).count();
        let here = |block: &&u64| self.memory.has(**block) || self.host.has(**block);
        (engine, blocks.iter().skip(engine).take_while(here).count())
    }

    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Makes room for `blocks` more in the engine's memory; what leaves stays in the node's. False where there is none.
    fn make_room(&mut self, blocks: usize) -> bool {
        while self.memory.len() + self.own_blocks + blocks > self.machine.engine_blocks {
            let Some(left) = self.memory.evict() else { return false };
            self.keep_on_node(left);
        }
        true
    }

    fn keep_on_node(&mut self, block: u64) {
        self.host.touch(block, false);
        while self.host.len() > self.machine.host_blocks {
            self.host.evict();
        }
    }

    /// Begins what waits, as far as there is room.
    fn admit(&mut self, now: f64) {
        while self.prefilling.len() + self.decoding.len() < SEQUENCES_MAX {
            let Some((request, asked)) = self.waiting.front().cloned() else { return };
            let (in_engine, on_node) = self.cached(&asked.blocks);
            let own = (asked.tokens + asked.answer).div_ceil(BLOCK_TOKENS) as usize
                - asked.blocks.len().min((asked.tokens / BLOCK_TOKENS) as usize);
            // What it needs and is not there yet; what is there must stay.
            asked.blocks.iter().take(in_engine).for_each(|block| self.memory.touch(*block, true));
            if !self.make_room(asked.blocks.len() - in_engine + own) {
                asked.blocks.iter().take(in_engine).for_each(|block| self.memory.release(*block));
                return;
            }
            asked.blocks.iter().skip(in_engine).for_each(|block| self.memory.touch(*block, true));
            asked.blocks.iter().skip(in_engine).take(on_node).for_each(|block| self.host.touch(*block, false));
            self.waiting.pop_front();
            self.own_blocks += own;
            let mut ready = now;
            if on_node > 0 {
                let bytes = on_node as u64 * self.machine.block_bytes;
                let start = self.host_busy_until.max(now);
                self.host_busy_until = start + bytes as f64 / self.machine.host_bytes_per_second;
                ready = self.host_busy_until + self.machine.host_latency_seconds;
            }
            let cached = (in_engine + on_node) as u64 * BLOCK_TOKENS;
            self.prefilling.push_back(Sequence {
                request,
                blocks: Rc::clone(&asked.blocks),
                own_blocks: own,
                tokens: asked.tokens,
                answer: asked.answer,
                done: cached.min(asked.tokens - 1),
                ready,
            });
        }
    }

    /// Does a step that begins at `now`; when it ends. `None` where there is nothing to do.
    pub fn step(&mut self, now: f64, events: &mut Vec<Event>) -> Option<f64> {
        self.admit(now);
        if self.prefilling.is_empty() && self.decoding.is_empty() {
            return None;
        }
        let mut left = CHUNK_TOKENS.saturating_sub(self.decoding.len() as u64);
        let mut seconds = self.machine.step_seconds + self.held_tokens as f64 * self.machine.held_token_seconds;
        let mut first_tokens = Vec::new();
        for (at, sequence) in self.prefilling.iter_mut().enumerate() {
            if left == 0 {
                break;
            }
            if sequence.ready > now {
                continue;
            }
            let chunk = left.min(sequence.tokens - sequence.done);
            let before = (sequence.done + chunk / 2) as f64 / 1000.0;
            let token = self.machine.token_seconds + self.machine.token_seconds_per_thousand * before;
            seconds += chunk as f64 * token;
            sequence.done += chunk;
            left -= chunk;
            self.computed_tokens += chunk;
            if sequence.done == sequence.tokens {
                first_tokens.push(at);
            }
        }
        let noise = 1.0 + self.noise * (2.0 * self.chance() - 1.0);
        let seconds = seconds * self.slowness * noise;
        self.busy_seconds += seconds;
        self.step += 1;
        self.held_tokens += self.decoding.len() as u64;
        for at in first_tokens.into_iter().rev() {
            let Some(sequence) = self.prefilling.remove(at) else { continue };
            events.push(Event::First(sequence.request));
            self.held_tokens += sequence.tokens;
            self.decoding.insert((self.step + sequence.answer.max(1), sequence.request));
            self.sequences.insert(sequence.request, sequence);
        }
        while let Some((at, request)) = self.decoding.first().copied().filter(|(at, _)| *at <= self.step) {
            self.decoding.remove(&(at, request));
            if let Some(sequence) = self.sequences.remove(&request) {
                self.held_tokens = self.held_tokens.saturating_sub(sequence.tokens + sequence.answer.max(1));
                self.own_blocks -= sequence.own_blocks;
                // The prefix's end leaves first.
                sequence.blocks.iter().rev().for_each(|block| self.memory.release(*block));
            }
            events.push(Event::Done(request));
        }
        let waits_for_fetch = left == CHUNK_TOKENS && self.decoding.is_empty();
        Some(now + if waits_for_fetch { 1e-3 } else { seconds })
    }
}
