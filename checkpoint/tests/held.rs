//! Snapshots that a process holds: in sealed memory of its own, and in the node's cache.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod models;

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_checkpoint::cache::{Cache, CacheError, Kept};
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::progress::Progress;
use kvstore_checkpoint::save::{Compress, SaveOptions, save, save_all};
use kvstore_checkpoint::source::{Made, Sources};
use kvstore_checkpoint::store::Store;
use kvstore_checkpoint::{caps, memory, restore};
use models::{content, noise, write_model};
use object_store::memory::InMemory;

async fn saved(store: &Store, folder: &Path) -> Commit {
    save(store, folder, SaveOptions::default(), &Arc::default()).await.unwrap()
}

/// Snapshots of folders of one file of so many bytes each.
async fn of_bytes(store: &Store, at: &Path, bytes: &[usize]) -> Vec<Commit> {
    let mut all = Vec::new();
    for (seed, bytes) in bytes.iter().enumerate() {
        let folder = at.join(format!("of-{seed}"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("file"), noise(seed as u32, *bytes)).unwrap();
        all.push(saved(store, &folder).await);
    }
    all
}

async fn held(cache: &Cache, store: &Store, commit: &Commit) -> Result<(Kept, u64), CacheError> {
    let progress = Arc::new(Progress::default());
    let kept = cache.hold(store, commit, false, &progress).await?;
    Ok((kept, Progress::read(&progress.moved)))
}

#[tokio::test]
async fn files_in_memory_are_whole_and_sealed() {
    let at = tempfile::tempdir().unwrap();
    write_model(at.path(), 1, "note");
    let store = Store::of(Arc::new(InMemory::new()));
    let commit = saved(&store, at.path()).await;
    let progress = Arc::new(Progress::default());
    let held = memory::restore(&store, &commit, |_| true, &progress).await.unwrap();
    assert_eq!(Progress::read(&progress.done), commit.totals.bytes);
    let wanted = content(at.path());
    assert_eq!(held.len(), wanted.len());
    for one in held {
        let (bytes, runs) = &wanted[&one.file.path];
        assert_eq!(one.file.executable, *runs);
        let mut file = File::from(one.memory);
        let mut found = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut found).unwrap();
        assert_eq!(&found, bytes, "{}", one.file.path);
        let error = std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::PERM.raw_os_error()));
        assert!(file.set_len(1 << 30).is_err());
        assert!(bytes.is_empty() || file.set_len(0).is_err());
    }
    let some = memory::restore(&store, &commit, |path| path == "config.json", &Arc::default()).await.unwrap();
    assert_eq!(some.iter().map(|one| one.file.path.as_str()).collect::<Vec<_>>(), ["config.json"]);
}

#[tokio::test]
async fn more_files_than_a_process_holds_open_are_refused() {
    let at = tempfile::tempdir().unwrap();
    (0..=caps::MEMORY_FILES_MAX).for_each(|name| fs::write(at.path().join(name.to_string()), "x").unwrap());
    let store = Store::of(Arc::new(InMemory::new()));
    let commit = saved(&store, at.path()).await;
    let error = memory::restore(&store, &commit, |_| true, &Arc::default()).await.unwrap_err().to_string();
    assert!(error.contains("513 files, and at most 512"), "{error}");
}

/// What one restores, the others get: once, and all of them the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_snapshot_is_restored_once_into_a_cache() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "note");
    let store = Store::of(Arc::new(InMemory::new()));
    let commit = saved(&store, &folder).await;
    let cache = Cache::open(&at.path().join("cache"), 100 << 20).unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (cache, store, commit) = (cache.clone(), store.clone(), commit.clone());
            tokio::spawn(async move { held(&cache, &store, &commit).await.unwrap() })
        })
        .collect();
    let (mut moved, mut all) = (Vec::new(), Vec::new());
    for task in tasks {
        let (kept, bytes) = task.await.unwrap();
        moved.push(bytes);
        all.push(kept);
    }
    assert_eq!(moved.iter().filter(|bytes| **bytes > 0).count(), 1, "{moved:?}");
    assert_eq!(content(&all[0].folder), content(&folder));
    let mode = fs::metadata(all[0].folder.join("config.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o400, "nobody writes to it by mistake");
    assert!(cache.ls().unwrap()[0].is_used && !cache.remove(&commit.id).unwrap(), "it is in use");
    all.clear();
    assert!(!cache.ls().unwrap()[0].is_used && cache.remove(&commit.id).unwrap());
    assert_eq!(cache.ls().unwrap(), []);
    assert_eq!(fs::read_dir(at.path().join("cache")).unwrap().count(), 1, "the lock of the whole");
}

#[tokio::test]
async fn what_was_used_longest_ago_makes_room_and_what_is_used_stays() {
    let at = tempfile::tempdir().unwrap();
    let store = Store::of(Arc::new(InMemory::new()));
    let all = of_bytes(&store, at.path(), &[1000, 1000, 1000, 2000, 5000]).await;
    let cache = Cache::open(&at.path().join("cache"), 3500).unwrap();
    let ids = || {
        let mut ids: Vec<_> = cache.ls().unwrap().into_iter().map(|entry| entry.id).collect();
        ids.sort_unstable();
        ids
    };
    let of = |which: &[usize]| {
        let mut ids: Vec<_> = which.iter().map(|at| all[*at].id.clone()).collect();
        ids.sort_unstable();
        ids
    };
    for commit in &all[..3] {
        held(&cache, &store, commit).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The first is asked for again: the second is now the oldest.
    let (first, moved) = held(&cache, &store, &all[0]).await.unwrap();
    assert_eq!(moved, 0);
    held(&cache, &store, &all[3]).await.unwrap();
    assert_eq!(ids(), of(&[0, 3]));
    let error = held(&cache, &store, &all[4]).await.unwrap_err();
    assert!(matches!(error, CacheError::TooLarge { needed: 5000, bound: 3500, .. }), "{error}");
    let (third, _) = held(&cache, &store, &all[3]).await.unwrap();
    let error = held(&cache, &store, &all[1]).await.unwrap_err();
    assert!(matches!(error, CacheError::Full { used: 3000, .. }), "{error}");
    assert_eq!(content(&third.folder)["file"].0.len(), 2000);
    drop(first);
    held(&cache, &store, &all[1]).await.unwrap();
    assert_eq!(ids(), of(&[1, 3]));
}

/// A cache once made room for what a commit says, and restored what its files are.
#[tokio::test]
async fn a_commit_that_says_fewer_bytes_than_it_has_is_refused() {
    let at = tempfile::tempdir().unwrap();
    let store = Store::of(Arc::new(InMemory::new()));
    let all = of_bytes(&store, at.path(), &[1000, 5000]).await;
    let cache = Cache::open(&at.path().join("cache"), 2000).unwrap();
    held(&cache, &store, &all[0]).await.unwrap();
    let mut lies = all[1].clone();
    lies.totals.bytes = 1900;
    let error = held(&cache, &store, &lies).await.unwrap_err().to_string();
    assert!(error.contains("says 1 files of 1900 bytes") && error.contains("has 1 of 5000"), "{error}");
    assert!(
        cache.ls().unwrap().iter().any(|entry| entry.id == all[0].id && entry.is_whole),
        "nothing made room for it"
    );
    assert!(memory::restore(&store, &lies, |_| true, &Arc::default()).await.is_err());
}

#[tokio::test]
async fn a_folder_of_others_is_no_cache() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("cache");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let error = Cache::open(&folder, 1).unwrap_err().to_string();
    assert!(error.contains("others may write to it"), "{error}");
    std::os::unix::fs::symlink(at.path(), at.path().join("link")).unwrap();
    let error = Cache::open(&at.path().join("link"), 1).unwrap_err().to_string();
    assert!(error.contains("no folder"), "{error}");
    fs::write(at.path().join("file"), "").unwrap();
    assert!(Cache::open(&at.path().join("file"), 1).is_err());
}

/// A flipped bit, a file that was cut, and one that is gone are found when asked for, and only they are read again.
#[tokio::test]
async fn what_a_cache_has_is_checked_when_asked_for() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "note");
    let store = Store::of(Arc::new(InMemory::new()));
    let commit = saved(&store, &folder).await;
    let cache = Cache::open(&at.path().join("cache"), 100 << 20).unwrap();
    let (kept, _) = held(&cache, &store, &commit).await.unwrap();
    let there = kept.folder.join("config.json");
    let hurts: [fn(&Path); 3] = [
        |path| fs::write(path, "x}").unwrap(),
        |path| fs::write(path, "").unwrap(),
        |path| fs::remove_file(path).unwrap(),
    ];
    fs::set_permissions(&there, fs::Permissions::from_mode(0o600)).unwrap();
    hurts[0](&there);
    let error = cache.hold(&store, &commit, true, &Arc::default()).await.unwrap_err();
    assert!(matches!(error, CacheError::Damaged(_)), "{error}");
    drop(kept);
    for hurt in hurts {
        let _ = fs::set_permissions(&there, fs::Permissions::from_mode(0o600));
        hurt(&there);
        let progress = Arc::new(Progress::default());
        let kept = cache.hold(&store, &commit, true, &progress).await.unwrap();
        assert_eq!(content(&kept.folder), content(&folder));
        assert!(Progress::read(&progress.moved) < 100, "the rest is there");
        let moved = Arc::new(Progress::default());
        cache.hold(&store, &commit, true, &moved).await.unwrap();
        assert_eq!((Progress::read(&moved.moved), Progress::read(&moved.found)), (0, commit.totals.bytes));
    }
}

/// A check that finds damage moves the snapshot away first. Once it removed files before that, and failed in between: what was left
/// counted as whole.
#[tokio::test]
async fn a_check_that_breaks_off_leaves_no_snapshot_that_counts_as_whole() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "note");
    let store = Store::of(Arc::new(InMemory::new()));
    let commit = saved(&store, &folder).await;
    let cache = Cache::open(&at.path().join("cache"), 100 << 20).unwrap();
    let (kept, _) = held(&cache, &store, &commit).await.unwrap();
    let (there, path) = (kept.folder.clone(), kept.folder.join("config.json"));
    drop(kept);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "x}").unwrap();
    // What an earlier check left.
    let left = at.path().join(format!("cache/{0}.{0}.partial", commit.id));
    fs::create_dir(&left).unwrap();
    fs::write(left.join("config.json"), "stale").unwrap();
    fs::set_permissions(left.join("config.json"), fs::Permissions::from_mode(0o400)).unwrap();
    let checked = cache.hold(&store, &commit, true, &Arc::default()).await;
    drop(checked);
    let (kept, _) = held(&cache, &store, &commit).await.unwrap();
    assert_eq!(content(&kept.folder), content(&folder));
    drop(kept);
    // One that ended between its steps: nothing is there yet, and its files are read-only.
    fs::rename(&there, &left).unwrap();
    let (kept, moved) = held(&cache, &store, &commit).await.unwrap();
    assert_eq!((content(&kept.folder), moved), (content(&folder), 0));
}

/// A process that restores into a cache is killed at some moment: another one goes on, and gets all of it.
#[test]
fn a_restore_into_a_cache_that_was_killed_is_gone_on_with() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if let Ok(id) = std::env::var("KVSTORE_TEST_HOLD") {
        let (store, cache) = opened(Path::new(&std::env::var("KVSTORE_TEST_AT").unwrap()));
        runtime.block_on(async {
            let commit = store.snapshot(&id).await.unwrap();
            let _kept = held(&cache, &store, &commit).await.unwrap();
            std::future::pending::<()>().await;
        });
    }
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    fs::create_dir(&folder).unwrap();
    (0..4).for_each(|seed| fs::write(folder.join(format!("{seed}")), noise(seed, 12 << 20)).unwrap());
    fs::create_dir(at.path().join("store")).unwrap();
    let (store, cache) = opened(at.path());
    let commit = runtime.block_on(saved(&store, &folder));
    for wait_ms in [0, 20, 60, 120, 200, 400] {
        let name = "a_restore_into_a_cache_that_was_killed_is_gone_on_with";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact"])
            .env("KVSTORE_TEST_HOLD", &commit.id)
            .env("KVSTORE_TEST_AT", at.path())
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while cache.ls().unwrap().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(wait_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        let cached = at.path().join("cache").join(&commit.id);
        assert!(!cached.exists() || content(&cached) == content(&folder), "it is there whole, or not at all");
        let (kept, _) = runtime.block_on(held(&cache, &store, &commit)).unwrap();
        assert_eq!(content(&kept.folder), content(&folder));
        drop(kept);
        assert!(cache.remove(&commit.id).unwrap());
    }
}

fn opened(at: &Path) -> (Store, Cache) {
    let store = object_store::local::LocalFileSystem::new_with_prefix(at.join("store")).unwrap();
    (Store::of(Arc::new(store)), Cache::open(&at.join("cache"), 1 << 30).unwrap())
}

#[tokio::test]
async fn what_is_in_memory_is_saved_as_files_are() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("model");
    write_model(&folder, 1, "note");
    let store = Store::of(Arc::new(InMemory::new()));
    let whole = saved(&store, &folder).await;
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let made = |path: &str| Made { path: path.into(), content: Arc::new(bytes.clone()) };
    let sources = Sources {
        folder: Some(folder.clone()),
        without: vec![".safetensors".into()],
        made: vec![made("model.safetensors")],
    };
    let progress = Arc::new(Progress::default());
    let options = SaveOptions { compress: Compress::Nothing, ..SaveOptions::default() };
    let commit = save_all(&store, sources, options, &progress).await.unwrap();
    assert_eq!(Progress::read(&progress.moved), 0, "all of it is there");
    assert_eq!(commit.totals, whole.totals);
    let to = at.path().join("to");
    restore::restore(&store, &commit, &to, &Arc::default()).await.unwrap();
    assert_eq!(content(&to), content(&folder));
    for path in ["../x", "", "config.json"] {
        let sources = Sources { folder: Some(folder.clone()), made: vec![made(path)], ..Sources::default() };
        let error = save_all(&store, sources, SaveOptions::default(), &Arc::default()).await.unwrap_err();
        assert!(error.to_string().contains("path") || error.to_string().contains("twice"), "{error}");
    }
}
