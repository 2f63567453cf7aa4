//! The indexes that are compared, behind one face.

use std::sync::Arc;

use dynamo_kv_router::indexer::concurrent_radix_tree_compressed::ConcurrentRadixTreeCompressed;
use dynamo_kv_router::indexer::positional::PositionalIndexer;
use dynamo_kv_router::indexer::{SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
};
use kvstore_index::{HolderId, Match, PrefixIndex};
use tokio::runtime::Runtime;

use crate::workload::{Event, Workload};

/// How engines name blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// As the router would.
    Router,
    /// By hashes of their own.
    Opaque,
}

impl Names {
    pub fn of(self, name: u64) -> u64 {
        match self {
            Self::Router => name,
            Self::Opaque => !name.rotate_left(23) ^ 0x5555,
        }
    }
}

/// An index under test. Events are prepared outside of what is timed.
pub trait Peer: Send + Sync {
    /// Applies all prepared events; returns once they are done.
    fn apply(&self, events: Prepared);
    /// Blocks that the best worker has of a prompt. `tokens`: hashes of its blocks' tokens.
    fn find(&self, tokens: &[u64], scratch: &mut Scratch) -> u32;
    /// The same with the names worked out before.
    fn find_named(&self, tokens: &[u64], names: &[u64], scratch: &mut Scratch) -> u32;
}

#[derive(Default)]
pub struct Scratch {
    matches: Vec<Match>,
    sequence: Vec<LocalBlockHash>,
}

pub enum Prepared {
    Ours(Vec<OurEvent>),
    Theirs(Vec<RouterEvent>),
}

pub enum OurEvent {
    Store(HolderId, Option<u64>, Vec<u64>),
    StoreOpaque(HolderId, Option<u64>, Vec<(u64, u64)>),
    Remove(HolderId, Vec<u64>),
    RemoveOpaque(HolderId, Vec<u64>),
}

pub struct Ours {
    pub index: PrefixIndex,
    pub holders: Vec<HolderId>,
}

impl Ours {
    pub fn new(workers: usize, names: Names, bytes: u64) -> Self {
        let index = match names {
            Names::Router => PrefixIndex::new(bytes),
            Names::Opaque => PrefixIndex::with_opaque_names(bytes),
        };
        let holders = (0..workers).filter_map(|_| index.add_holder().ok()).collect();
        Self { index, holders }
    }

    pub fn prepare(&self, events: &[Event], names: Names) -> Prepared {
        let of = |event: &Event| match (event, names) {
            (Event::Stored { worker, parent, names, .. }, Names::Router) => {
                OurEvent::Store(self.holders[*worker], *parent, names.clone())
            }
            (Event::Removed { worker, names }, Names::Router) => OurEvent::Remove(self.holders[*worker], names.clone()),
            (Event::Stored { worker, parent, names: blocks, tokens, .. }, Names::Opaque) => {
                let blocks = blocks.iter().map(|name| names.of(*name)).zip(tokens.iter().copied()).collect();
                OurEvent::StoreOpaque(self.holders[*worker], parent.map(|parent| names.of(parent)), blocks)
            }
            (Event::Removed { worker, names: blocks }, Names::Opaque) => {
                let blocks = blocks.iter().map(|name| names.of(*name)).collect();
                OurEvent::RemoveOpaque(self.holders[*worker], blocks)
            }
        };
        Prepared::Ours(events.iter().map(of).collect())
    }
}

impl Peer for Ours {
    fn apply(&self, events: Prepared) {
        let Prepared::Ours(events) = events else { return };
        for event in events {
            match event {
                OurEvent::Store(holder, parent, names) => self.index.store_behind(holder, parent, &names),
                OurEvent::Remove(holder, names) => self.index.remove(holder, &names),
                OurEvent::StoreOpaque(holder, parent, blocks) => {
                    assert!(self.index.store_opaque(holder, 1, parent, &blocks).is_ok(), "a parent is not known");
                }
                OurEvent::RemoveOpaque(holder, names) => self.index.remove_opaque(holder, 1, &names),
            }
        }
    }

    fn find(&self, tokens: &[u64], scratch: &mut Scratch) -> u32 {
        self.index.find_tokens(tokens, &mut scratch.matches);
        scratch.matches.first().map_or(0, |best| best.blocks)
    }

    fn find_named(&self, _tokens: &[u64], names: &[u64], scratch: &mut Scratch) -> u32 {
        self.index.find(names, &mut scratch.matches);
        scratch.matches.first().map_or(0, |best| best.blocks)
    }
}

/// One of Dynamo's, with one thread that applies events, as it is deployed.
pub struct Theirs<T: SyncIndexer> {
    pool: ThreadPoolIndexer<T>,
    runtime: Arc<Runtime>,
}

pub fn radix_tree(runtime: &Arc<Runtime>) -> Theirs<ConcurrentRadixTreeCompressed> {
    let pool = ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), 1, 32);
    Theirs { pool, runtime: Arc::clone(runtime) }
}

/// With the jump that its own README and defaults have.
pub fn positional(runtime: &Arc<Runtime>) -> Theirs<PositionalIndexer> {
    let pool = ThreadPoolIndexer::new(PositionalIndexer::new(32), 1, 32);
    Theirs { pool, runtime: Arc::clone(runtime) }
}

pub fn prepare_theirs(events: &[Event], names: Names) -> Prepared {
    let of = |(at, event): (usize, &Event)| {
        let (worker, data) = match event {
            Event::Stored { worker, parent, start, names: blocks, tokens } => {
                let block = |(name, tokens): (&u64, &u64)| KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(names.of(*name)),
                    tokens_hash: LocalBlockHash(*tokens),
                    mm_extra_info: None,
                };
                let data = KvCacheStoreData {
                    parent_hash: parent.map(|parent| ExternalSequenceBlockHash(names.of(parent))),
                    start_position: Some(*start),
                    blocks: blocks.iter().zip(tokens).map(block).collect(),
                };
                (*worker, KvCacheEventData::Stored(data))
            }
            Event::Removed { worker, names: blocks } => {
                let block_hashes = blocks.iter().map(|name| ExternalSequenceBlockHash(names.of(*name))).collect();
                (*worker, KvCacheEventData::Removed(KvCacheRemoveData { block_hashes }))
            }
        };
        RouterEvent::new(worker as u64, KvCacheEvent { event_id: at as u64, data, dp_rank: 0 })
    };
    Prepared::Theirs(events.iter().enumerate().map(of).collect())
}

impl<T: SyncIndexer> Peer for Theirs<T> {
    fn apply(&self, events: Prepared) {
        let Prepared::Theirs(events) = events else { return };
        for event in events {
            let _ = self.pool.enqueue_event(event);
        }
        let _ = self.runtime.block_on(self.pool.flush_and_wait());
    }

    fn find(&self, tokens: &[u64], scratch: &mut Scratch) -> u32 {
        scratch.sequence.clear();
        scratch.sequence.extend(tokens.iter().map(|tokens| LocalBlockHash(*tokens)));
        let found = self.pool.backend().find_matches(&scratch.sequence, false);
        found.scores.values().copied().max().unwrap_or(0)
    }

    fn find_named(&self, tokens: &[u64], _names: &[u64], scratch: &mut Scratch) -> u32 {
        self.find(tokens, scratch)
    }
}

/// How engines name blocks.
pub const KINDS: [(&str, Names); 2] = [("router", Names::Router), ("opaque", Names::Opaque)];
/// What is compared.
pub const PEERS: [&str; 3] = ["ours", "radix", "positional"];

/// Whether a peer finds what was stored: the positional index takes hashes for names that it would have computed itself.
pub fn finds(peer: &str, names: Names) -> bool {
    peer != "positional" || names == Names::Router
}

/// A peer, new and empty, and the events as it takes them.
pub fn prepared(peer: &str, workload: &Workload, runtime: &Arc<Runtime>, names: Names) -> (Box<dyn Peer>, Prepared) {
    match peer {
        "ours" => {
            let ours = Ours::new(workload.workers, names, 1 << 30);
            let events = ours.prepare(&workload.events, names);
            (Box::new(ours), events)
        }
        "radix" => (Box::new(radix_tree(runtime)), prepare_theirs(&workload.events, names)),
        _ => (Box::new(positional(runtime)), prepare_theirs(&workload.events, names)),
    }
}
