//! The Host tier without a daemon around it: what tests and benchmarks of tiers put their blocks into.

use std::sync::Arc;

use kvstore::replay;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::host::{
    BeginFill, BlockFill, FillRequest, HostLimits, HostOptions, HostTier, LeasedBlock, Leasing, NamespaceId,
    RegisteredLayout,
};
use kvstore_tiers::slots::{FlightSource, Priority, Urgency};
use kvstore_tiers::{Block, BlockKind, BootTime, DimensionOrder, HugePages, LayerGroup, Layout, Shard};

use crate::tier::{hash, now};

/// The layout of blocks of so many bytes and layers, of one group and one shard.
pub fn layout(model: &str, block_bytes: u32, layers: u32) -> Layout {
    let order = if layers > 1 { DimensionOrder::LayerOpaque } else { DimensionOrder::Opaque };
    let head_bytes = block_bytes / layers;
    let group = LayerGroup { kind: BlockKind::Attention, layers, planes: 1, heads: 1, head_bytes, order };
    Layout {
        model: model.into(),
        weights_digest: Vec::new(),
        dtype: "bytes".into(),
        block_tokens: 1,
        groups: vec![group],
        shard: Shard { index: 0, count: 1 },
        extra: Vec::new(),
    }
}

/// Memory, and one layout.
pub struct Memory {
    /// Memory.
    pub host: Arc<HostTier>,
    /// Of all blocks.
    pub layout: Arc<RegisteredLayout>,
}

impl Memory {
    /// An empty memory of so many bytes, for blocks of so many bytes and layers.
    pub fn new(host_bytes: u64, block_bytes: u32, layers: u32) -> Self {
        let limits = HostLimits { bytes: host_bytes, high_watermark_percent: 99, low_watermark_percent: 98 };
        let options = HostOptions {
            limits,
            huge_pages: HugePages::Off,
            policy: PolicyKind::Lru,
            seed: 1,
            epoch: 1,
            bytes_ceiling: limits.bytes,
        };
        let host = HostTier::new(options, &["default".into()]);
        let layout = Self::register(&host, "tiers", block_bytes, layers);
        Self { host, layout }
    }

    /// One more layout.
    pub fn register(host: &HostTier, model: &str, block_bytes: u32, layers: u32) -> Arc<RegisteredLayout> {
        host.register_layout(NamespaceId(0), layout(model, block_bytes, layers)).unwrap()
    }

    /// Block `id`.
    pub fn block(&self, id: u64) -> Block {
        Block { layout: Arc::clone(&self.layout), group: 0, hash: hash(id) }
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        self.layout.groups[0].block_bytes as u32
    }

    /// The right to fill block `id`, as a client or a lower tier has it; `None` where there is no room, or it is there.
    pub fn reserve(&self, id: u64, parent: Option<u64>, source: FlightSource) -> Option<BlockFill> {
        let urgency = Urgency { source, priority: Priority::Demand, deadline: BootTime(u64::MAX) };
        let (layout, parent, length) = (&*self.layout, parent.map(hash), self.block_bytes());
        let request = FillRequest { layout, group: 0, hash: hash(id), parent, length, urgency };
        loop {
            match self.host.begin_fill(&request, now()) {
                BeginFill::Fill(fill, ahead) => {
                    ahead.into_iter().for_each(|plan| self.host.drop_plan(plan));
                    return Some(fill);
                }
                BeginFill::NeedsSlab(plan) => self.host.make_slab(plan).unwrap(),
                _ => return None,
            }
        }
    }

    /// Asks for the slab of block `id`, and does not make it.
    pub fn plan_and_drop(&self, id: u64) {
        let urgency =
            Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline: BootTime(u64::MAX) };
        let (layout, length) = (&*self.layout, self.block_bytes());
        let request = FillRequest { layout, group: 0, hash: hash(id), parent: None, length, urgency };
        match self.host.begin_fill(&request, now()) {
            BeginFill::NeedsSlab(plan) => self.host.drop_plan(plan),
            _ => panic!("there is a slab already"),
        }
    }

    /// Puts block `id`, whose content its number says; leased, with the checksums of its sections.
    pub fn put(&self, id: u64, parent: Option<u64>) -> Option<(LeasedBlock, Vec<u32>)> {
        let mut fill = self.reserve(id, parent, FlightSource::Writer)?;
        fill.append(&replay::content(id, self.block_bytes() as usize), now()).unwrap();
        let sums = fill.section_sums();
        Some((fill.commit_leased(true).1?, sums))
    }

    /// The block, where it is in memory; every byte of it is checked.
    pub fn get(&self, id: u64) -> bool {
        let leased = self.host.lease_run(&self.layout, 0, &[hash(id)], now()).pop();
        match leased {
            Some(Leasing::Leased(block)) => {
                self.check(id, &block);
                true
            }
            _ => false,
        }
    }

    /// Fails where a byte of block `id` is wrong.
    pub fn check(&self, id: u64, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.block_bytes() as usize, "block {id}");
        assert_eq!(replay::wrong_bytes(id, bytes), 0, "WRONG BYTES in block {id}");
    }

    /// Takes blocks out of memory; copies below stay.
    pub fn forget(&self, ids: impl IntoIterator<Item = u64>) {
        let hashes: Vec<_> = ids.into_iter().map(hash).collect();
        self.host.delete(&self.layout, 0, &hashes);
    }
}
