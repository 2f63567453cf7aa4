//! The publisher: publishes events about blocks over ZeroMQ, in the format of vLLM's own KV events. Routers that follow engines can then
//! follow this node's tiers, too: `CPU_PINNED` is its memory, `DISK` its disks, `EXTERNAL` the bucket.
//!
//! Such routers name a block by its tokens, which only the client that stores the block knows. So clients describe blocks (`DescribeBlocks`), and blocks
//! without a description are not published.

mod described;
mod sockets;

use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use kvstore_tiers::below::Ask;
use kvstore_tiers::changes::{Change, NamespaceTag};
use kvstore_tiers::host::{RegisteredLayout, namespace_digest};
use kvstore_tiers::{BlockKind, Run, SequenceHash, Tier};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::caps;
use crate::config::PublisherConfig;
use crate::connections::Places;
use crate::daemon::Daemon;
use crate::describing::{Describing, Descriptions, Waiting};

use described::{Described, News};
use sockets::{Published, SocketKind};

/// A publisher that runs.
pub struct Publisher {
    /// Where it publishes and replays.
    pub endpoints: Vec<String>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Starts to publish, to at most so many connections of each socket.
pub async fn start(daemon: &Arc<Daemon>, config: &PublisherConfig, places: usize) -> anyhow::Result<Publisher> {
    let namespace = daemon.namespace(&config.namespace).context("the namespace is not configured")?;
    let published = Published::new(config.topic.clone());
    let (mut endpoints, mut tasks) = (Vec::new(), Vec::new());
    let wanted = [(Some(&config.events), SocketKind::Publish), (config.replay.as_ref(), SocketKind::Replay)];
    for (endpoint, kind) in wanted.into_iter().filter_map(|(endpoint, kind)| Some((endpoint?, kind))) {
        let bound = sockets::bind(endpoint).await;
        let bound = bound.with_context(|| {
            format!(
                "cannot publish events on {endpoint}: choose another with --set events.publish=... or events.replay=..."
            )
        })?;
        endpoints.push(bound.endpoint());
        tasks.push(tokio::spawn(sockets::serve(bound, Arc::clone(&published), kind, Places::new(places))));
    }
    let (describing, receiver) = Describing::new(namespace);
    daemon.set_describing(describing);
    let follower = Follower {
        daemon: Arc::clone(daemon),
        tag: NamespaceTag::of(&namespace_digest(&config.namespace)),
        described: Described::new(config.bytes),
        layouts: Vec::new(),
        published,
        hash_bytes: config.hash_bytes,
    };
    tasks.push(tokio::spawn(follower.follow(receiver)));
    Ok(Publisher { endpoints, tasks })
}

struct Follower {
    daemon: Arc<Daemon>,
    tag: NamespaceTag,
    described: Described,
    /// Layouts of blocks that were described.
    layouts: Vec<Arc<RegisteredLayout>>,
    published: Arc<Published>,
    hash_bytes: bool,
}

impl Follower {
    async fn follow(mut self, mut descriptions: mpsc::Receiver<Waiting>) {
        let log = Arc::clone(self.daemon.host.changes());
        let mut next = log.follow();
        let mut changes: Vec<Change> = Vec::new();
        loop {
            let mut news = Vec::new();
            tokio::select! {
                biased;
                batch = descriptions.recv() => match batch {
                    Some((batch, _room)) => self.describe(&batch, &mut news),
                    None => return,
                },
                () = log.wait(next) => {
                    tokio::time::sleep(caps::WATCH_GATHER).await;
                    changes.clear();
                    match log.read(next, caps::WATCH_CHANGES_PER_MESSAGE, &mut changes) {
                        Ok(read) => {
                            next = read;
                            let ours = changes.iter().filter(|change| change.namespace == self.tag || change.namespace.0 == 0);
                            for change in ours {
                                news.extend(self.described.change(change.name, change.tier, change.stored));
                            }
                        }
                        Err(_) => {
                            // More happened than is kept: others start anew.
                            self.described.forget_places();
                            self.published.publish(payload(&[Event::AllBlocksCleared]));
                            next = log.follow();
                            tracing::warn!("the publisher missed events, so it told its followers to forget this node's blocks");
                        }
                    }
                }
            }
            self.publish(&news);
        }
    }

    /// Blocks that are there already are told at once; what happens meanwhile comes with the next changes.
    fn describe(&mut self, batch: &Descriptions, news: &mut Vec<News>) {
        let layout = &batch.layout;
        if !self.layouts.iter().any(|known| known.digest == layout.digest) {
            self.layouts.push(Arc::clone(layout));
        }
        let Some(group) = batch.blocks.first().map(|block| block.group) else { return };
        let hashes: Vec<SequenceHash> = batch.blocks.iter().map(|block| block.hash).collect();
        let places = self.daemon.stack.residency(&Run { layout, group, hashes: &hashes }, Ask::Look);
        let Some(seed) = layout.group(u32::from(group)).map(|group| group.name_seed) else { return };
        for (block, tiers) in batch.blocks.iter().zip(places) {
            let name = block.hash.event_name(seed);
            self.described.describe(name, block.clone(), news);
            for tier in tiers.iter() {
                news.extend(self.described.change(name, tier, true));
            }
        }
        metrics::gauge!("kvstore_described_blocks").set(self.described.len() as f64);
    }

    fn hash(&self, hash: &SequenceHash) -> Hash {
        let bytes = hash.to_vec();
        if self.hash_bytes {
            return Hash::Bytes(bytes);
        }
        let mut last = [0u8; 8];
        last.iter_mut().rev().zip(bytes.iter().rev()).for_each(|(to, from)| *to = *from);
        Hash::Number(u64::from_be_bytes(last))
    }

    fn publish(&self, news: &[News]) {
        for part in news.chunks(caps::EVENTS_PER_MESSAGE_MAX) {
            let events: Vec<Event> = part.iter().map(|news| self.event(news)).collect();
            self.published.publish(payload(&events));
            metrics::counter!("kvstore_published_events_total").increment(events.len() as u64);
        }
    }

    fn event(&self, news: &News) -> Event {
        let medium = match news.tier {
            Tier::Host => "CPU_PINNED",
            Tier::Nvme => "DISK",
            Tier::Object => "EXTERNAL",
        };
        let block = &news.block;
        let (block_hashes, group_idx) = (vec![self.hash(&block.hash)], u32::from(block.group));
        if !news.stored {
            return Event::BlockRemoved { block_hashes, medium, group_idx };
        }
        let group = self.layouts.iter().rev().find_map(|layout| layout.group(group_idx));
        let (kv_cache_spec_kind, kv_cache_spec_sliding_window) = match group.map(|group| group.group.kind) {
            Some(BlockKind::SlidingWindow { tokens }) => ("sliding_window", Some(tokens)),
            Some(BlockKind::RecurrentState) => ("mamba", None),
            _ => ("full_attention", None),
        };
        Event::BlockStored {
            block_hashes,
            parent_block_hash: block.parent.as_ref().map(|parent| self.hash(parent)),
            token_ids: block.tokens.to_vec(),
            block_size: block.tokens.len() as u32,
            lora_id: None,
            medium,
            lora_name: block.adapter.as_deref().map(str::to_owned),
            group_idx,
            kv_cache_spec_kind,
            kv_cache_spec_sliding_window,
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Hash {
    Number(u64),
    #[serde(serialize_with = "as_bytes")]
    Bytes(Vec<u8>),
}

fn as_bytes<S: serde::Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// In vLLM's words. (Source: `vllm/distributed/kv_events.py` of 0.33.)
#[derive(Serialize)]
#[serde(tag = "type")]
enum Event {
    BlockStored {
        block_hashes: Vec<Hash>,
        parent_block_hash: Option<Hash>,
        token_ids: Vec<u32>,
        block_size: u32,
        lora_id: Option<u32>,
        medium: &'static str,
        lora_name: Option<String>,
        group_idx: u32,
        kv_cache_spec_kind: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        kv_cache_spec_sliding_window: Option<u32>,
    },
    BlockRemoved {
        block_hashes: Vec<Hash>,
        medium: &'static str,
        group_idx: u32,
    },
    AllBlocksCleared,
}

fn payload(events: &[Event]) -> Bytes {
    let time =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    let mut out = Vec::new();
    let mut serializer = rmp_serde::Serializer::new(&mut out).with_struct_map();
    match (time, events, 0u32).serialize(&mut serializer) {
        Ok(()) => out.into(),
        // Numbers, texts and bytes always serialize.
        Err(error) => {
            tracing::error!(%error, "cannot encode events");
            Bytes::new()
        }
    }
}
