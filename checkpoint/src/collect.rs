//! Collecting garbage: chunks and manifests that no snapshot needs, and snapshots that only old meanings of names have.
//!
//! A collection and a save exclude each other: a save writes its intent and then looks for the collector's lease, a collector takes the lease
//! and then looks for intents, so that whichever comes second sees the other. Within a collection thus nothing is written that it could
//! take, and a chunk that a save found stays until the save is over. A save that was killed holds collections up for a day at most.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use kvstore_bucket::{Lease, LeaseError, LeaseTerm, Trouble};
use object_store::ObjectMeta;
use object_store::path::Path;

use crate::caps;
use crate::digest::Digest;
use crate::fill::blocking;
use crate::store::{NameHistory, Store, StoreError, new_id};

/// A collector that was killed holds saves up for so long; what it sent in its last moment has a minute to arrive.
const TERM: LeaseTerm = LeaseTerm { ms: 5 * 60 * 1000, margin_ms: 60 * 1000 };
/// Deletions at once.
const DELETES_AT_ONCE: usize = 16;

/// What is to go.
#[derive(Clone, Copy, Debug)]
pub struct CollectRules {
    /// Snapshots that each name keeps: what it means, and meant before.
    pub keep_last: usize,
    /// Nothing goes: what would is only counted.
    pub dry_run: bool,
}

/// How far a collection is, and at its end what it came to.
#[derive(Debug, Default)]
pub struct Collected {
    /// Snapshots that stay.
    pub snapshots: AtomicU64,
    /// Snapshots that went.
    pub gone_snapshots: AtomicU64,
    /// Chunks that stay.
    pub chunks: AtomicU64,
    /// Chunks that went, or would have.
    pub gone_chunks: AtomicU64,
    /// Their bytes in the store.
    pub gone_bytes: AtomicU64,
    /// What could not be deleted.
    pub failed: AtomicU64,
}

/// Why nothing was collected, or not all.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// Somebody else collects.
    #[error("another collector holds the lease for up to {0} more s; try again after that")]
    Held(u64),
    /// A save is under way.
    #[error("a save is under way, or was killed within the last day ({0}); collect again once it is over")]
    Saving(String),
    /// The lease ended, or another took it.
    #[error("the collector's lease ended before the collection did; the next collection takes the rest")]
    LeaseLost,
    /// Too much to heed.
    #[error("the snapshots have more than {0} chunks, which is more than this build collects beside")]
    TooManyChunks(usize),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<LeaseError> for CollectError {
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Held(left_ms) => Self::Held(left_ms / 1000 + 1),
            LeaseError::Lost => Self::LeaseLost,
            LeaseError::NoTime => Self::Store(StoreError::NoTime),
            LeaseError::Store(cause) => {
                Self::Store(StoreError::Request { what: "the collector's lease was asked for".into(), cause })
            }
        }
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// Collects garbage.
pub async fn collect(store: &Store, rules: CollectRules, collected: &Collected) -> Result<(), CollectError> {
    let holder = new_id()?;
    store.prove(&holder).await?;
    let taken = Lease::take(&store.bucket, &store.collector(), &holder, TERM, store.deadline()).await;
    let mut lease = taken?;
    let done = with_lease(store, rules, collected, &mut lease).await;
    lease.end(&store.bucket, store.deadline()).await;
    done
}

async fn with_lease(
    store: &Store,
    rules: CollectRules,
    collected: &Collected,
    lease: &mut Lease,
) -> Result<(), CollectError> {
    refuse_beside_saves(store).await?;
    let names = store.names().await?;
    let (ids, others) = store.ids().await?;
    let (gone, mut marked) = (not_kept(&names, rules.keep_last), HashSet::new());
    for id in &ids {
        if gone.contains(id) {
            add(&collected.gone_snapshots, 1);
            if !rules.dry_run {
                store.remove(id).await?;
            }
            continue;
        }
        add(&collected.snapshots, 1);
        mark(store, id, &mut marked).await?;
        lease.renew_if_due(&store.bucket, store.deadline()).await?;
    }
    // What is below an id without a commit was left behind, or is of a snapshot that went.
    let mut left: Vec<ObjectMeta> = others;
    if !rules.dry_run {
        left = store.ids().await?.1;
    }
    sweep(store, rules, collected, lease, left, &marked).await?;
    if let Some(folder) = store.folder.clone().filter(|_| !rules.dry_run) {
        // Nobody who may still write has been at it for so long.
        let age = Duration::from_millis(caps::SAVE_MS_MAX);
        let removed = blocking(move || kvstore_bucket::remove_staged(&folder, age)).await;
        if removed.is_err() {
            add(&collected.failed, 1);
        }
    }
    Ok(())
}

/// Intents that are old belong to saves that were killed; they go.
async fn refuse_beside_saves(store: &Store) -> Result<(), CollectError> {
    let now_ms = store.bucket.clock.earliest_ms(store.bucket.now()).ok_or(StoreError::NoTime)?;
    for intent in store.saves().await? {
        let age_ms = now_ms - intent.last_modified.timestamp_millis();
        let name = intent.location.filename().unwrap_or_default().to_owned();
        if age_ms < caps::SAVE_MS_MAX as i64 {
            return Err(CollectError::Saving(name));
        }
        store.end_save(&name).await;
    }
    Ok(())
}

/// Snapshots that some name meant, and none means or keeps any more.
fn not_kept(names: &[NameHistory], keep_last: usize) -> BTreeSet<String> {
    let (mut named, mut kept) = (BTreeSet::new(), BTreeSet::new());
    for history in names {
        named.extend(history.meanings.iter().filter_map(|(_, meaning)| meaning.id.clone()));
        // A name that was taken away keeps nothing.
        if history.now().is_some() {
            let mut of_name: Vec<String> = Vec::new();
            for id in history.meanings.iter().filter_map(|(_, meaning)| meaning.id.clone()) {
                if !of_name.contains(&id) && of_name.len() < keep_last.max(1) {
                    of_name.push(id);
                }
            }
            kept.extend(of_name);
        }
    }
    named.difference(&kept).cloned().collect()
}

async fn mark(store: &Store, id: &str, marked: &mut HashSet<Digest>) -> Result<(), CollectError> {
    let commit = store.snapshot(id).await?;
    for name in &commit.ranks.0 {
        let rank = store.rank(id, *name).await?;
        marked.extend(rank.files.0.iter().flat_map(|file| file.extents.0.iter().map(|extent| extent.chunk)));
        if marked.len() > caps::MARKED_MAX {
            return Err(CollectError::TooManyChunks(caps::MARKED_MAX));
        }
    }
    Ok(())
}

async fn sweep(
    store: &Store,
    rules: CollectRules,
    collected: &Collected,
    lease: &mut Lease,
    left: Vec<ObjectMeta>,
    marked: &HashSet<Digest>,
) -> Result<(), CollectError> {
    let mut batch: Vec<Path> = left.into_iter().map(|meta| meta.location).collect();
    let mut objects = store.bucket.stream(&store.chunks());
    loop {
        let next = objects.next().await.transpose();
        let failed = |cause: Trouble| StoreError::Request { what: "chunks were listed".into(), cause };
        let object = next.map_err(failed)?;
        let is_over = object.is_none();
        if let Some(object) = object {
            match Store::chunk_of(&object) {
                Some(name) if marked.contains(&name) => add(&collected.chunks, 1),
                // What is no chunk is not ours to delete.
                None => {}
                Some(_) => {
                    add(&collected.gone_chunks, 1);
                    add(&collected.gone_bytes, object.size);
                    batch.push(object.location);
                }
            }
        }
        if rules.dry_run {
            batch.clear();
        } else if batch.len() >= 256 || is_over {
            lease.renew_if_due(&store.bucket, store.deadline()).await?;
            delete(store, collected, lease, std::mem::take(&mut batch)).await?;
        }
        if is_over {
            return Ok(());
        }
    }
}

async fn delete(store: &Store, collected: &Collected, lease: &Lease, batch: Vec<Path>) -> Result<(), CollectError> {
    let bucket = &store.bucket;
    let each = batch.into_iter().map(|location| async move {
        bucket.delete_while(&location, store.deadline(), || lease.holds(bucket.now())).await
    });
    let mut answers = futures::stream::iter(each).buffer_unordered(DELETES_AT_ONCE);
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(()) => {}
            Err(Trouble::Fenced) => return Err(CollectError::LeaseLost),
            Err(_) => add(&collected.failed, 1),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Named;

    #[test]
    fn names_keep_what_they_mean_and_meant_last() {
        let id = |digit: char| digit.to_string().repeat(32);
        let history = |name: &str, meanings: &[Option<char>]| {
            let numbers = (1..=meanings.len() as u64).rev();
            let meanings = meanings.iter().map(|meaning| Named { id: meaning.map(id) });
            NameHistory { name: name.into(), meanings: numbers.zip(meanings).collect() }
        };
        let names = [
            history("a", &[Some('3'), Some('2'), Some('1')]),
            history("b", &[Some('1')]),
            history("gone", &[None, Some('4'), Some('3')]),
        ];
        let gone = |keep: usize| not_kept(&names, keep).into_iter().collect::<Vec<_>>();
        assert_eq!(gone(1), [id('2'), id('4')]);
        assert_eq!(gone(2), [id('4')]);
    }
}
