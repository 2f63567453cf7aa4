//! Chunks of snapshots that the daemon of this node has in memory or on its disk.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use kvstore_proto::chunks;
use tokio::sync::OnceCell;

use crate::{Client, Error, GetOutcome, GroupRef, LeasedBlock};

/// Where a restore looks for chunks before it asks the object store. What is found is what the daemon verified when it stored it;
/// whoever needs to be sure compares its digest.
pub struct Chunks {
    client: Client,
    groups: [OnceCell<GroupRef>; chunks::CLASSES.len()],
    /// The daemon does not answer, or knows no chunks: it is not asked again.
    is_away: AtomicBool,
}

impl Chunks {
    /// Those of a daemon. Asks nothing yet.
    pub fn new(client: Client) -> Self {
        Self { client, groups: Default::default(), is_away: AtomicBool::new(false) }
    }

    /// The layer group of chunks with so many bytes.
    async fn group(&self, bytes: u64) -> Result<&GroupRef, Error> {
        let no_chunk = || Error::Invalid(format!("no chunk has {bytes} bytes"));
        let class = chunks::class_of(bytes).ok_or_else(no_chunk)?;
        let (group, most) = self.groups.get(class).zip(chunks::CLASSES.get(class)).ok_or_else(no_chunk)?;
        group.get_or_try_init(|| async { Ok(self.client.register_layout(chunks::layout(*most)).await?.group(0)) }).await
    }

    /// A chunk's bytes, where the daemon has them: in shared memory, on its own node. `None` where it has not, or is away.
    pub async fn get(&self, name: [u8; 32], bytes: u64) -> Option<Bytes> {
        if self.is_away.load(Ordering::Relaxed) {
            return None;
        }
        match self.try_get(name, bytes).await {
            Ok(found) => found.filter(|found| found.len() as u64 == bytes),
            Err(Error::Unavailable(_) | Error::Unsupported(_) | Error::Address(_)) => {
                self.is_away.store(true, Ordering::Relaxed);
                None
            }
            // The lease page is full, too much is under way, or this one is damaged: the store has it.
            Err(_) => None,
        }
    }

    async fn try_get(&self, name: [u8; 32], bytes: u64) -> Result<Option<Bytes>, Error> {
        let (group, hashes) = (self.group(bytes).await?, [Bytes::copy_from_slice(&name)]);
        if self.client.is_local() {
            let leased = self.client.leases(group, &hashes).await?.into_blocks().into_iter().next();
            return Ok(leased.map(Bytes::from_owner));
        }
        let found = self.client.get(group, &hashes).await?.into_iter().next();
        Ok(match found {
            Some(GetOutcome::Hit(bytes)) => Some(bytes),
            _ => None,
        })
    }

    /// A chunk, leased in place: it stays as it is until this is dropped. Over the local plane only.
    pub async fn lease(&self, name: [u8; 32], bytes: u64) -> Result<Option<LeasedBlock>, Error> {
        let (group, hashes) = (self.group(bytes).await?, [Bytes::copy_from_slice(&name)]);
        let leased = self.client.leases(group, &hashes).await?.into_blocks().into_iter().next();
        Ok(leased.filter(|leased| leased.len() as u64 == bytes))
    }

    /// Has the daemon forget a chunk that is damaged.
    pub async fn forget(&self, name: [u8; 32], bytes: u64) -> Result<(), Error> {
        let group = self.group(bytes).await?;
        self.client.delete(group, &[Bytes::copy_from_slice(&name)]).await?;
        Ok(())
    }
}
