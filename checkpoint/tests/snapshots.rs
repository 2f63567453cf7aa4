//! Snapshots in stores that work, fail, lie, and end in the middle.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod faulty;
mod models;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use faulty::Faulty;
use kvstore_checkpoint::collect::{CollectError, CollectRules, Collected, collect};
use kvstore_checkpoint::diff::{Change, diff};
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::progress::Progress;
use kvstore_checkpoint::restore::{RestoreError, check_facts, restore, verify};
use kvstore_checkpoint::save::{Compress, SaveError, SaveOptions, save};
use kvstore_checkpoint::store::{Store, StoreError};
use models::{content, noise, write_model};
use object_store::memory::InMemory;

fn options(name: Option<&str>) -> SaveOptions {
    SaveOptions { name: name.map(str::to_owned), writer: "test".into(), now_ms: 1, ..SaveOptions::default() }
}

async fn saved(store: &Store, folder: &Path, name: Option<&str>) -> Result<(Commit, u64), SaveError> {
    let progress = Arc::new(Progress::default());
    let commit = save(store, folder, options(name), &progress).await?;
    Ok((commit, Progress::read(&progress.moved)))
}

async fn restored(store: &Store, asked: &str, to: &Path) -> Result<Arc<Progress>, RestoreError> {
    let commit = store.snapshot(&store.resolve(asked).await?).await?;
    let progress = Arc::new(Progress::default());
    restore(store, &commit, to, &progress).await?;
    Ok(progress)
}

async fn collected(store: &Store, keep_last: usize) -> Result<Collected, CollectError> {
    let collected = Collected::default();
    collect(store, CollectRules { keep_last, dry_run: false }, &collected).await?;
    Ok(collected)
}

fn memory() -> (Arc<InMemory>, Store) {
    let memory = Arc::new(InMemory::new());
    (Arc::clone(&memory), Store::of(memory))
}

#[tokio::test]
async fn a_folder_comes_back_as_it_was() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "first");
    // As a hub's cache has its files.
    fs::rename(folder.join("config.json"), at.path().join("blob")).unwrap();
    symlink("../blob", folder.join("config.json")).unwrap();
    let (_, store) = memory();
    for compress in [Compress::Auto, Compress::Nothing] {
        let progress = Arc::new(Progress::default());
        let asked = SaveOptions { compress, ..options(Some("model")) };
        let commit = save(&store, &folder, asked, &progress).await.unwrap();
        assert_eq!((commit.totals.files, commit.totals.tensors), (4, 4));
        let to = at.path().join(format!("{compress:?}"));
        let progress = restored(&store, "model", &to).await.unwrap();
        assert_eq!(content(&to), content(&folder));
        assert_eq!(Progress::read(&progress.done), commit.totals.bytes);
        assert!(matches!(restored(&store, "model", &to).await, Err(RestoreError::Exists(_))));
        assert_eq!(restored(&store, &commit.id[..8], &at.path().join(&commit.id)).await.map(drop).ok(), Some(()));
    }
    assert!(matches!(
        restored(&store, "other", &at.path().join("x")).await,
        Err(RestoreError::Store(StoreError::NoSuch(_)))
    ));
}

/// Two saves of one model with other metadata wrote all of it twice, where chunks were cut by file.
#[tokio::test]
async fn a_second_save_writes_what_changed() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "first");
    let (_, store) = memory();
    let (first, all) = saved(&store, &folder, Some("m")).await.unwrap();
    assert!(all > 9 << 20);
    let (_, again) = saved(&store, &folder, Some("m")).await.unwrap();
    assert_eq!(again, 0, "nothing changed");
    write_model(&folder, 1, "a longer note than the first, so that every tensor lies elsewhere");
    let (noted, moved) = saved(&store, &folder, None).await.unwrap();
    assert!(moved < 1000, "the header alone: {moved}");
    write_model(&folder, 7, "first");
    let (changed, moved) = saved(&store, &folder, None).await.unwrap();
    assert!((40_000..42_000).contains(&moved), "one tensor: {moved}");
    let found = diff(&store, &first, &changed).await.unwrap();
    let tensors: Vec<_> = found.all.iter().map(|one| (one.tensor.as_deref(), one.change, one.bytes)).collect();
    assert_eq!(tensors, [(Some("a"), Change::Changed, 40_000)]);
    assert_eq!(found.new_bytes, 40_000);
    let found = diff(&store, &first, &noted).await.unwrap();
    assert_eq!(found.all.iter().map(|one| one.tensor.clone()).collect::<Vec<_>>(), [None]);
}

#[tokio::test]
async fn what_no_snapshot_can_hold_is_refused_by_name() {
    let at = tempfile::tempdir().unwrap();
    let (_, store) = memory();
    let says = async |folder: &Path, what: &str| {
        let error = saved(&store, folder, None).await.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    says(&at.path().join("nowhere"), "nowhere").await;
    let folder = at.path().join("folder");
    fs::create_dir(&folder).unwrap();
    symlink("/nowhere/at/all", folder.join("dangling")).unwrap();
    says(&folder, "dangling").await;
    fs::remove_file(folder.join("dangling")).unwrap();
    symlink(at.path(), folder.join("loop")).unwrap();
    says(&folder, "a link to a folder").await;
    fs::remove_file(folder.join("loop")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket")).unwrap();
    says(&folder, "neither a file nor a folder").await;
    fs::remove_file(folder.join("socket")).unwrap();
    for name in ["", "a/b", "..", "ä", &"0".repeat(32)] {
        let error = saved(&store, &folder, Some(name)).await.unwrap_err().to_string();
        assert!(error.contains("cannot be a name"), "{error}");
    }
    assert!(store.list().await.unwrap().is_empty(), "nothing of these was saved");
    assert_eq!(saved(&store, &folder, None).await.unwrap().0.totals.files, 0, "an empty folder can be");
}

#[tokio::test]
async fn facts_are_asked_for() {
    let at = tempfile::tempdir().unwrap();
    let (_, store) = memory();
    let facts = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let asked = SaveOptions { facts: facts(&[("dtype", "bf16")]), ..options(None) };
    let commit = save(&store, at.path(), asked, &Arc::default()).await.unwrap();
    assert!(check_facts(&commit, &facts(&[("dtype", "bf16")]), &[]).is_ok());
    let error = check_facts(&commit, &facts(&[("dtype", "f16")]), &[]).unwrap_err().to_string();
    assert!(error.contains("dtype is \"bf16\"") && error.contains("--allow dtype"), "{error}");
    // A fact that no reader takes made a snapshot that could not be read.
    let long = "x".repeat(5000);
    let asked = SaveOptions { facts: facts(&[("dtype", &long)]), ..options(None) };
    let error = save(&store, at.path(), asked, &Arc::default()).await.unwrap_err().to_string();
    assert!(error.contains("a fact has more than 4096 bytes"), "{error}");
    assert_eq!(store.list().await.unwrap().len(), 1);
    let error = check_facts(&commit, &facts(&[("gpu", "h200")]), &[]).unwrap_err().to_string();
    assert!(error.contains("gpu is not known"), "{error}");
    assert!(check_facts(&commit, &facts(&[("gpu", "h200")]), &["gpu".into()]).is_ok());
}

#[tokio::test]
async fn garbage_goes_and_nothing_else() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    let (memory, store) = memory();
    for seed in 1..=3 {
        write_model(&folder, seed, "note");
        saved(&store, &folder, Some("m")).await.unwrap();
    }
    write_model(&folder, 9, "note");
    let (unnamed, _) = saved(&store, &folder, None).await.unwrap();
    let dry = Collected::default();
    collect(&store, CollectRules { keep_last: 1, dry_run: true }, &dry).await.unwrap();
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((read(&dry.gone_snapshots), read(&dry.snapshots)), (2, 2));
    assert_eq!(store.list().await.unwrap().len(), 4, "nothing went");
    let done = collected(&store, 2).await.unwrap();
    assert_eq!((read(&done.gone_snapshots), read(&done.gone_chunks), read(&done.snapshots)), (1, 1, 3));
    let done = collected(&store, 1).await.unwrap();
    assert_eq!((read(&done.gone_snapshots), read(&done.gone_chunks)), (1, 1));
    for snapshot in ["m", unnamed.id.as_str()] {
        let to = at.path().join(format!("to-{snapshot}"));
        restored(&store, snapshot, &to).await.unwrap();
    }
    store.let_mean("m", None).await.unwrap();
    store.remove(&unnamed.id).await.unwrap();
    collected(&store, 1).await.unwrap();
    let left = faulty::names(&memory).await;
    let is_of_snapshots = |name: &&String| name.contains("/chunks/") || name.contains("/snap/");
    assert_eq!(left.iter().filter(is_of_snapshots).count(), 0, "{left:?}");
}

/// A chunk that was cut, overwritten or flipped is found by a check and by a restore, and mended by a save.
#[tokio::test]
async fn damage_is_found_before_anything_is_ready_and_mended() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "note");
    for damage in faulty::DAMAGES {
        let (memory, store) = memory();
        let (commit, _) = saved(&store, &folder, Some("m")).await.unwrap();
        let hurt = faulty::hurt_a_chunk(&memory, damage).await;
        let checked = verify(&store, &commit, &Arc::default()).await.unwrap();
        assert_eq!(checked.wrong.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>(), [hurt], "{damage:?}");
        let to = at.path().join(format!("{damage:?}"));
        assert!(restored(&store, "m", &to).await.is_err());
        assert!(!to.exists(), "nothing is there that is not whole");
        let is_mended = damage.shows_in_the_footer();
        saved(&store, &folder, Some("m")).await.unwrap();
        let checked = verify(&store, &commit, &Arc::default()).await.unwrap();
        assert_eq!(checked.wrong.is_empty(), is_mended, "{damage:?}");
        if is_mended {
            restored(&store, "m", &to).await.unwrap();
            assert_eq!(content(&to), content(&folder));
        }
    }
}

/// A save that ends after any of its requests leaves the old snapshot or the new one under its name, and a collection leaves no rest.
#[tokio::test]
async fn a_save_that_ends_anywhere_leaves_the_old_or_the_new() {
    let at = tempfile::tempdir().unwrap();
    let (old, new) = (at.path().join("old"), at.path().join("new"));
    write_model(&old, 1, "old");
    write_model(&new, 2, "new");
    let mut seen = [0, 0];
    for ends_after in 0.. {
        let faulty = Faulty::new();
        let store = Store::of(faulty.clone());
        saved(&store, &old, Some("m")).await.unwrap();
        faulty.end_after(ends_after);
        let ended = saved(&Store::of(faulty.clone()), &new, Some("m")).await;
        let is_over = !faulty.has_ended();
        faulty.mend();
        let store = Store::of(faulty.clone());
        let to = at.path().join(format!("after-{ends_after}"));
        restored(&store, "m", &to).await.unwrap();
        let is_new = content(&to) == content(&new);
        assert!(is_new || content(&to) == content(&old));
        assert!(ended.is_err() || is_new, "what was answered is there");
        seen[usize::from(is_new)] += 1;
        // Its intent may be left behind: then a collection says so, and takes nothing.
        match collected(&store, 1).await {
            Ok(_) | Err(CollectError::Saving(_)) => {}
            Err(other) => panic!("{other}"),
        }
        fs::remove_dir_all(&to).unwrap();
        restored(&store, "m", &to).await.unwrap();
        if is_over {
            break;
        }
    }
    assert!(seen[0] > 10 && seen[1] > 0, "{seen:?}");
}

/// A collection that ends after any of its requests leaves every snapshot that it was to keep.
#[tokio::test]
async fn a_collection_that_ends_anywhere_takes_nothing_that_is_needed() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    for ends_after in 0.. {
        let faulty = Faulty::new();
        let store = Store::of(faulty.clone());
        for seed in 1..=3 {
            write_model(&folder, seed, "note");
            saved(&store, &folder, Some("m")).await.unwrap();
        }
        faulty.end_after(ends_after);
        let _ = collected(&Store::of(faulty.clone()), 1).await;
        let is_over = !faulty.has_ended();
        faulty.mend();
        let store = Store::of(faulty.clone());
        let to = at.path().join(format!("after-{ends_after}"));
        restored(&store, "m", &to).await.unwrap();
        assert_eq!(content(&to), content(&folder));
        for one in store.list().await.unwrap() {
            let commit = one.unwrap();
            let checked = verify(&store, &commit, &Arc::default()).await;
            assert!(checked.is_ok_and(|checked| checked.wrong.is_empty()), "what is listed is whole");
        }
        if is_over {
            break;
        }
    }
}

/// A save and a collection at once: one gives up, or they come one after the other. No snapshot lacks a chunk.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn saves_and_collections_exclude_each_other() {
    let at = tempfile::tempdir().unwrap();
    let folders: Vec<_> = (0..2)
        .map(|at_seed| {
            let folder = at.path().join(format!("{at_seed}"));
            fs::create_dir(&folder).unwrap();
            // They share a chunk that a collection would take between them.
            fs::write(folder.join("shared"), noise(5, 1000)).unwrap();
            fs::write(folder.join("own"), noise(at_seed, 1000)).unwrap();
            folder
        })
        .collect();
    let (mut saves, mut collections) = (0, 0);
    for round in 0..500_u64 {
        let faulty = Faulty::new();
        faulty.slow(round);
        let store = Store::of(faulty.clone());
        let (first, _) = saved(&store, &folders[0], None).await.unwrap();
        store.remove(&first.id).await.unwrap();
        let (saver, collector) = (Store::of(faulty.clone()), Store::of(faulty.clone()));
        let folder = folders[1].clone();
        let saving = tokio::spawn(async move { saved(&saver, &folder, Some("m")).await });
        let collecting = tokio::spawn(async move { collected(&collector, 1).await });
        let (saving, collecting) = (saving.await.unwrap(), collecting.await.unwrap());
        collections += usize::from(collecting.is_ok());
        match saving {
            Ok((commit, _)) => {
                saves += 1;
                let checked = verify(&store, &commit, &Arc::default()).await.unwrap();
                assert!(checked.wrong.is_empty(), "round {round}: {:?}", checked.wrong);
            }
            Err(SaveError::Store(StoreError::Collecting(_))) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert!(saves > 0 && collections > 0, "{saves} {collections}");
}

/// What a restore that broke off has is not read again, and is not believed either.
/// Its intent once kept collections waiting for a day.
#[tokio::test]
async fn a_save_that_is_cancelled_keeps_no_collection_waiting() {
    let at = tempfile::tempdir().unwrap();
    (0..8).for_each(|seed| fs::write(at.path().join(format!("{seed}")), noise(seed, 12 << 20)).unwrap());
    let (memory, store) = memory();
    let intents = async || faulty::names(&memory).await.iter().filter(|name| name.contains("/intents/")).count();
    let begun = async {
        while intents().await == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        () = begun => {}
        saved = saved(&store, at.path(), None) => panic!("it was done at once: {saved:?}"),
    }
    for _ in 0..6000 {
        if intents().await == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    collected(&store, 1).await.unwrap();
}

#[tokio::test]
async fn a_restore_goes_on_where_it_broke_off() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "note");
    // More than are under way at once: some are there before it breaks off.
    (0..40).for_each(|name| fs::write(folder.join(format!("many-{name:02}")), noise(name, 1000)).unwrap());
    let faulty = Faulty::new();
    let store = Store::of(faulty.clone());
    let (commit, _) = saved(&store, &folder, Some("m")).await.unwrap();
    let to = at.path().join("to");
    faulty.end_after(40);
    assert!(restored(&Store::of(faulty.clone()), "m", &to).await.is_err());
    assert!(!to.exists());
    faulty.mend();
    // Somebody changed a byte of what was there, and left a file.
    let partial = at.path().join(format!("to.{}.partial", commit.id));
    fs::write(partial.join("stray"), "x").unwrap();
    let there = content(&partial);
    let is_right = |name: &&String| name.starts_with("many") && there[*name] == content(&folder)[*name];
    let hurt = partial.join(there.keys().find(is_right).unwrap());
    let mut bytes = fs::read(&hurt).unwrap();
    bytes[7] ^= 1;
    fs::write(&hurt, bytes).unwrap();
    let progress = restored(&Store::of(faulty.clone()), "m", &to).await.unwrap();
    assert_eq!(content(&to), content(&folder));
    assert!(Progress::read(&progress.found) > 0 && Progress::read(&progress.moved) > 0);
    assert!(!partial.exists());
}
