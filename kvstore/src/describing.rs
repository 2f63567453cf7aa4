//! Descriptions of blocks on their way from the clients that know them to the publisher of events. A channel that is bounded in calls
//! and in bytes: whoever describes never waits.

use std::sync::Arc;

use kvstore_tiers::SequenceHash;
use kvstore_tiers::host::{NamespaceId, RegisteredLayout};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::caps;

/// A block, as whoever puts it describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What engines go by.
    pub hash: SequenceHash,
    /// The block before it.
    pub parent: Option<SequenceHash>,
    /// Its tokens.
    pub tokens: Box<[u32]>,
    /// The layer group.
    pub group: u16,
    /// The adapter's name.
    pub adapter: Option<Arc<str>>,
}

/// Blocks of one layout's group, as a client describes them.
pub struct Descriptions {
    /// The layout.
    pub layout: Arc<RegisteredLayout>,
    /// The blocks.
    pub blocks: Vec<Description>,
}

impl Descriptions {
    /// KiB that they take while they wait, about.
    fn kib(&self) -> u32 {
        let bytes: usize = self.blocks.iter().map(|block| size_of::<Description>() + block.tokens.len() * 4).sum();
        bytes.div_ceil(1024) as u32
    }
}

/// Descriptions, and the bytes of the channel that they take until the publisher has them.
pub type Waiting = (Descriptions, OwnedSemaphorePermit);

/// The way to a publisher that runs.
#[derive(Clone)]
pub struct Describing {
    /// Whose blocks it publishes.
    pub namespace: NamespaceId,
    sender: mpsc::Sender<Waiting>,
    room_kib: Arc<Semaphore>,
}

impl Describing {
    /// The way to a publisher of this namespace's blocks, and its end.
    pub fn new(namespace: NamespaceId) -> (Self, mpsc::Receiver<Waiting>) {
        let (sender, receiver) = mpsc::channel(caps::DESCRIPTIONS_WAITING_MAX);
        let room_kib = Arc::new(Semaphore::new(caps::DESCRIPTIONS_WAITING_BYTES_MAX / 1024));
        (Self { namespace, sender, room_kib }, receiver)
    }

    /// Describes blocks that are stored, or are about to be. False where too many descriptions wait: then these are not published.
    pub fn describe(&self, descriptions: Descriptions) -> bool {
        let room = Arc::clone(&self.room_kib).try_acquire_many_owned(descriptions.kib());
        room.is_ok_and(|room| self.sender.try_send((descriptions, room)).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use kvstore_tiers::eviction::PolicyKind;
    use kvstore_tiers::host::{HostLimits, HostOptions, HostTier};
    use kvstore_tiers::{BlockKind, DimensionOrder, HugePages, LayerGroup, Layout, Shard};

    use super::*;

    /// 256 calls of 65,536 blocks of 16 tokens each were three GiB that waited for the publisher.
    #[test]
    fn what_waits_is_bounded_in_bytes() {
        let (describing, mut waiting) = Describing::new(NamespaceId(0));
        let layout = layout();
        let describe = |blocks: usize| {
            let hash = SequenceHash::new(&[1; 32]).unwrap();
            let block = Description { hash, parent: None, tokens: vec![7; 16].into(), group: 0, adapter: None };
            describing.describe(Descriptions { layout: Arc::clone(&layout), blocks: vec![block; blocks] })
        };
        let taken = (0..caps::DESCRIPTIONS_WAITING_MAX).take_while(|_| describe(65_536)).count();
        assert!((2..=8).contains(&taken), "{taken} calls wait");
        assert!(describe(1), "small ones fit");
        drop(waiting.try_recv().unwrap());
        assert!(describe(65_536), "there is room again");
        assert!(!describe(65_536));
    }

    fn layout() -> Arc<RegisteredLayout> {
        let limits = HostLimits { bytes: 64 << 20, high_watermark_percent: 99, low_watermark_percent: 98 };
        let (huge_pages, policy, bytes_ceiling) = (HugePages::Off, PolicyKind::Lru, limits.bytes);
        let options = HostOptions { limits, huge_pages, policy, seed: 1, epoch: 1, bytes_ceiling };
        let (kind, order) = (BlockKind::Attention, DimensionOrder::Opaque);
        let group = LayerGroup { kind, layers: 1, planes: 1, heads: 1, head_bytes: 256, order };
        let layout = Layout {
            model: b"described".to_vec(),
            weights_digest: Vec::new(),
            dtype: "bytes".into(),
            block_tokens: 16,
            groups: vec![group],
            shard: Shard { index: 0, count: 1 },
            extra: Vec::new(),
        };
        HostTier::new(options, &["default".to_owned()]).register_layout(NamespaceId(0), layout).unwrap()
    }
}
