//! What a pin or a look-up's ticket has taken in the tiers while its caller has no answer yet.
//!
//! A call may end before its answer: it fails, its deadline passes, or its client goes. Nobody then knows the hold's name, so that
//! nobody could end it. Dropped without an answer, this value gives back what was taken in every tier.

use std::sync::Arc;

use kvstore_tiers::host::{Held, HoldError, HoldId, HoldKind, NamespaceId, RegisteredLayout};
use kvstore_tiers::object::Trouble;
use kvstore_tiers::{BootTime, SequenceHash};
use tokio::sync::oneshot;

use crate::daemon::{Daemon, random_hold_id};

/// See the head of this file.
pub struct Taken<'a> {
    daemon: &'a Daemon,
    namespace: NamespaceId,
    id: HoldId,
    kind: HoldKind,
    /// Told once the call is answered. Dropped before, it ends the reference in the bucket.
    reference: Option<oneshot::Sender<()>>,
    answered: bool,
}

impl<'a> Taken<'a> {
    /// Nothing yet, under a new name.
    pub fn nothing(daemon: &'a Daemon, namespace: NamespaceId, kind: HoldKind) -> Self {
        Self { daemon, namespace, id: random_hold_id(), kind, reference: None, answered: false }
    }

    /// The name of what is taken: the tiers below know it by the same one.
    pub fn id(&self) -> HoldId {
        self.id
    }

    /// Takes blocks in memory.
    pub fn in_memory(
        &mut self,
        runs: &[(&RegisteredLayout, u16, &[SequenceHash])],
        expires: BootTime,
    ) -> Result<Held, HoldError> {
        self.daemon.host.hold(self.namespace, self.id, self.kind, runs, expires)
    }

    /// Tells the bucket. The request is not cut off when the call ends before it: the store may have it already. What it then
    /// made is ended.
    pub async fn in_bucket(
        &mut self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
        ttl_ms: u64,
    ) -> Result<(), Trouble> {
        let stopped = || Trouble::Failed("the daemon is stopping".into());
        let Some(object) = self.daemon.object.clone() else { return Ok(()) };
        let permit = Arc::clone(&self.daemon.references).acquire_owned().await.map_err(|_| stopped())?;
        let (answer, answered) = oneshot::channel();
        let (done, outcome) = oneshot::channel();
        self.reference = Some(answer);
        let (id, layout, hashes) = (self.id.0, Arc::clone(layout), hashes.to_vec());
        let references = Arc::clone(&self.daemon.references);
        tokio::spawn(async move {
            let referred = object.refer(id, &layout, group, &hashes, ttl_ms).await;
            drop((permit, hashes));
            let _ = done.send(referred);
            if answered.await.is_err()
                && let Ok(permit) = references.acquire_owned().await
            {
                object.end_reference(id, permit);
            }
        });
        outcome.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// The caller is about to hear of it: it stays until its time, or until the caller ends it.
    pub fn keep(mut self) -> HoldId {
        self.answered = true;
        self.reference.take().into_iter().for_each(|reference| _ = reference.send(()));
        self.id
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        self.daemon.host.release_hold(self.namespace, self.id, self.kind);
        self.daemon.nvme.iter().for_each(|nvme| _ = nvme.unpin(self.id.0));
    }
}
