//! Snapshots that go from one store into another, and stores that are nearer.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod faulty;
mod models;

use std::path::Path;
use std::sync::Arc;

use faulty::Faulty;
use kvstore_checkpoint::collect::{CollectError, CollectRules, Collected, collect};
use kvstore_checkpoint::copy::{Between, copy};
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::progress::Progress;
use kvstore_checkpoint::restore::{restore, verify};
use kvstore_checkpoint::save::{Compress, SaveError, SaveOptions, save};
use kvstore_checkpoint::store::{Store, StoreError};
use models::{content, write_model};
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;

fn memory() -> (Arc<InMemory>, Store) {
    let memory = Arc::new(InMemory::new());
    (Arc::clone(&memory), Store::of(memory))
}

async fn saved(store: &Store, folder: &Path, name: Option<&str>) -> Result<Commit, SaveError> {
    let options = SaveOptions { name: name.map(str::to_owned), now_ms: 1, ..SaveOptions::default() };
    save(store, folder, SaveOptions { compress: Compress::Nothing, ..options }, &Arc::default()).await
}

async fn copied(from: &Store, to: &Store, id: &str, name: Option<&str>) -> Result<u64, SaveError> {
    let progress = Arc::new(Progress::default());
    copy(Between { from, to }, id, name, Compress::Auto, &progress).await?;
    assert_eq!(Progress::read(&progress.done), Progress::read(&progress.total), "it tells how far it is");
    Ok(Progress::read(&progress.moved))
}

async fn manifests(memory: &InMemory) -> Vec<(String, bytes::Bytes)> {
    let mut all = Vec::new();
    for name in faulty::names(memory).await.into_iter().filter(|name| name.contains("/snap/")) {
        all.push((name.clone(), memory.get(&name.into()).await.unwrap().bytes().await.unwrap()));
    }
    all.sort();
    all
}

#[tokio::test]
async fn a_copy_is_the_same_snapshot_and_moves_what_is_not_there() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    let ((near, local), (far, durable)) = (memory(), memory());
    write_model(&folder, 1, "note");
    let first = saved(&local, &folder, Some("m")).await.unwrap();
    assert!(copied(&local, &durable, &first.id, Some("m")).await.unwrap() > 0);
    assert_eq!(manifests(&near).await, manifests(&far).await);
    assert_eq!(durable.resolve("m").await.unwrap(), first.id);
    restore(&durable, &first, &at.path().join("first"), &Arc::default()).await.unwrap();
    assert_eq!(content(&at.path().join("first")), content(&folder));
    assert_eq!(copied(&local, &durable, &first.id, Some("n")).await.unwrap(), 0, "it is there");
    assert_eq!(durable.resolve("n").await.unwrap(), first.id);
    // One tensor differs: it alone goes.
    write_model(&folder, 7, "note");
    let second = saved(&local, &folder, None).await.unwrap();
    let moved = copied(&local, &durable, &second.id, None).await.unwrap();
    assert!((1..45_000).contains(&moved), "{moved}");
    assert!(verify(&durable, &second, &Arc::default()).await.unwrap().wrong.is_empty());
    assert_eq!(local.resolve_named("m").await.unwrap(), (first.id.clone(), true));
    assert_eq!(local.resolve_named(&first.id[..8]).await.unwrap(), (first.id.clone(), false));
}

/// One flipped bit on the node's disk never becomes a durable snapshot.
#[tokio::test]
async fn what_is_damaged_is_not_copied() {
    let at = tempfile::tempdir().unwrap();
    write_model(&at.path().join("model"), 1, "note");
    for damage in faulty::DAMAGES {
        let ((near, local), (_, durable)) = (memory(), memory());
        let commit = saved(&local, &at.path().join("model"), Some("m")).await.unwrap();
        faulty::hurt_a_chunk(&near, damage).await;
        let error = copied(&local, &durable, &commit.id, Some("m")).await.unwrap_err();
        assert!(
            matches!(error, SaveError::Store(StoreError::Chunk { .. } | StoreError::Lost { .. })),
            "{damage:?}: {error}"
        );
        assert!(durable.list().await.unwrap().is_empty() && durable.names().await.unwrap().is_empty(), "{damage:?}");
        // Nothing is left that would keep a collection waiting.
        collect(&durable, CollectRules { keep_last: 1, dry_run: false }, &Collected::default()).await.unwrap();
        // The folder is saved once more, and the copy then has all.
        if damage.shows_in_the_footer() {
            saved(&local, &at.path().join("model"), None).await.unwrap();
            copied(&local, &durable, &commit.id, Some("m")).await.unwrap();
            assert!(verify(&durable, &commit, &Arc::default()).await.unwrap().wrong.is_empty());
        }
    }
}

/// A copy that ends after any of its requests leaves nothing that is listed, or all of it; the same call goes on.
#[tokio::test]
async fn a_copy_that_ends_anywhere_is_gone_on_with() {
    let at = tempfile::tempdir().unwrap();
    write_model(&at.path().join("model"), 1, "note");
    let (_, local) = memory();
    let commit = saved(&local, &at.path().join("model"), Some("m")).await.unwrap();
    let mut seen = [0, 0];
    for ends_after in 0.. {
        let faulty = Faulty::new();
        faulty.end_after(ends_after);
        let ended = copied(&local, &Store::of(faulty.clone()), &commit.id, Some("m")).await;
        let is_over = !faulty.has_ended();
        faulty.mend();
        let durable = Store::of(faulty.clone());
        let is_there = durable.snapshot(&commit.id).await.is_ok();
        assert!(ended.is_err() || is_there, "what was answered is there");
        if is_there {
            assert!(verify(&durable, &commit, &Arc::default()).await.unwrap().wrong.is_empty());
        }
        seen[usize::from(is_there)] += 1;
        copied(&local, &durable, &commit.id, Some("m")).await.unwrap();
        assert_eq!(durable.resolve("m").await.unwrap(), commit.id);
        assert!(verify(&durable, &commit, &Arc::default()).await.unwrap().wrong.is_empty());
        if is_over {
            break;
        }
    }
    assert!(seen[0] > 10 && seen[1] > 0, "{seen:?}");
}

/// Chunks come from the store that is nearer, and from the other one where the nearer one is damaged or lacks them.
#[tokio::test]
async fn a_nearer_store_is_read_first_and_not_believed() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "note");
    for damage in [None].into_iter().chain(faulty::DAMAGES.map(Some)) {
        let ((near, local), (_, durable)) = (memory(), memory());
        let commit = saved(&local, &folder, Some("m")).await.unwrap();
        copied(&local, &durable, &commit.id, Some("m")).await.unwrap();
        if let Some(damage) = damage {
            faulty::hurt_a_chunk(&near, damage).await;
        }
        let (to, progress) = (at.path().join(format!("{damage:?}")), Arc::new(Progress::default()));
        restore(&durable.with_near(Arc::new(local)), &commit, &to, &progress).await.unwrap();
        assert_eq!(content(&to), content(&folder), "{damage:?}");
        assert_eq!(Progress::read(&progress.moved) > 0, damage.is_some(), "{damage:?}");
    }
}

/// An upload found the snapshot there, under no name, and gave it one, while a collection was about to take it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_that_finds_all_there_and_a_collection_exclude_each_other() {
    let at = tempfile::tempdir().unwrap();
    write_model(&at.path().join("model"), 1, "note");
    let (_, local) = memory();
    let old = saved(&local, &at.path().join("model"), None).await.unwrap();
    write_model(&at.path().join("model"), 2, "note");
    let new = saved(&local, &at.path().join("model"), None).await.unwrap();
    let mut copies = 0;
    for round in 0..200_u64 {
        let faulty = Faulty::new();
        let store = Store::of(faulty.clone());
        copied(&local, &store, &old.id, Some("m")).await.unwrap();
        copied(&local, &store, &new.id, Some("m")).await.unwrap();
        faulty.slow(round);
        let (copier, from, id) = (Store::of(faulty.clone()), local.clone(), old.id.clone());
        let copying = tokio::spawn(async move { copied(&from, &copier, &id, Some("m")).await });
        let collector = Store::of(faulty.clone());
        let rules = CollectRules { keep_last: 1, dry_run: false };
        let collecting = tokio::spawn(async move { collect(&collector, rules, &Collected::default()).await });
        let (copying, _) = (copying.await.unwrap(), collecting.await.unwrap());
        if copying.is_ok() {
            copies += 1;
            assert_eq!(store.resolve("m").await.unwrap(), old.id);
            let commit = store.snapshot(&old.id).await.unwrap();
            assert!(verify(&store, &commit, &Arc::default()).await.unwrap().wrong.is_empty(), "round {round}");
        }
    }
    assert!(copies > 0);
}

/// The request for a commit that failed may arrive later. Its intent once went with the failed save: a collection then took the chunks,
/// and the snapshot that appeared after that had none.
#[tokio::test]
async fn a_commit_that_may_arrive_late_keeps_its_chunks() {
    let at = tempfile::tempdir().unwrap();
    write_model(&at.path().join("model"), 1, "note");
    let (_, local) = memory();
    let commit = saved(&local, &at.path().join("model"), None).await.unwrap();
    for is_copy in [false, true] {
        let faulty = Faulty::new();
        let store = Store::of(faulty.clone());
        faulty.hold_commits();
        let failed = match is_copy {
            false => saved(&store, &at.path().join("model"), None).await.map(drop),
            true => copied(&local, &store, &commit.id, None).await.map(drop),
        };
        assert!(matches!(failed, Err(SaveError::Store(StoreError::MayAppear { .. }))), "{failed:?}");
        let rules = CollectRules { keep_last: 1, dry_run: false };
        let collected = collect(&store, rules, &Collected::default()).await;
        assert!(matches!(collected, Err(CollectError::Saving(_))), "{collected:?}");
        faulty.let_commits_arrive().await;
        let [Ok(arrived)] = &store.list().await.unwrap()[..] else { panic!("it is not listed") };
        assert!(verify(&store, arrived, &Arc::default()).await.unwrap().wrong.is_empty());
    }
}
