//! Descriptions of blocks on their way from the clients that know them to the publisher of events. A bounded channel: whoever
//! describes never waits.

use std::sync::Arc;

use kvstore_tiers::SequenceHash;
use kvstore_tiers::host::{NamespaceId, RegisteredLayout};
use tokio::sync::mpsc;

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

/// The way to a publisher that runs.
#[derive(Clone)]
pub struct Describing {
    /// Whose blocks it publishes.
    pub namespace: NamespaceId,
    sender: mpsc::Sender<Descriptions>,
}

impl Describing {
    /// The way to a publisher of this namespace's blocks, and its end.
    pub fn new(namespace: NamespaceId) -> (Self, mpsc::Receiver<Descriptions>) {
        let (sender, receiver) = mpsc::channel(caps::DESCRIPTIONS_WAITING_MAX);
        (Self { namespace, sender }, receiver)
    }

    /// Describes blocks that are stored, or are about to be. False where too many descriptions wait: then these are not published.
    pub fn describe(&self, descriptions: Descriptions) -> bool {
        self.sender.try_send(descriptions).is_ok()
    }
}
