//! Snapshots that version 1 wrote stay readable: a stored sample (`tests/compat/snapshot_v1`), byte by byte, and what it must become.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod models;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvstore_checkpoint::codec::{self, Tried};
use kvstore_checkpoint::digest::Digest;
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::restore::{restore, verify};
use kvstore_checkpoint::save::{SaveOptions, save};
use kvstore_checkpoint::store::Store;
use models::{content, noise, safetensors};
use object_store::local::LocalFileSystem;

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/compat/snapshot_v1")
}

/// Chunks of all three kinds: as they are, lz4, byte planes. A tensor in two chunks would make the sample large; a million zeros do not.
fn write_folder(folder: &Path) {
    fs::create_dir_all(folder.join("deep")).unwrap();
    let halves: Vec<u8> = noise(1, 2000).into_iter().flat_map(|byte| [byte, 0x3c + byte % 3]).collect();
    let tensors = [("zeros", vec![0; 9 << 20]), ("halves", halves), ("noise", noise(2, 1000)), ("empty", Vec::new())];
    fs::write(folder.join("model.safetensors"), safetensors(&tensors, "version 1")).unwrap();
    fs::write(folder.join("deep/config.json"), "{\"one\": 1}".repeat(100)).unwrap();
    fs::write(folder.join("empty"), "").unwrap();
}

fn store(at: &Path) -> Store {
    Store::of(Arc::new(LocalFileSystem::new_with_prefix(at).unwrap()))
}

/// Writes the sample where it is missing and KVSTORE_WRITE_SAMPLES is set: once for each version.
async fn write_sample(folder: &Path) {
    if sample().exists() || std::env::var_os("KVSTORE_WRITE_SAMPLES").is_none() {
        return;
    }
    fs::create_dir_all(sample()).unwrap();
    let options = SaveOptions {
        name: Some("sample".into()),
        facts: BTreeMap::from([("dtype".into(), "bf16".into())]),
        writer: "kvstore 0.1.0".into(),
        now_ms: 1_796_000_000_000,
        ..SaveOptions::default()
    };
    let commit = save(&store(&sample()), folder, options, &Arc::default()).await.unwrap();
    assert_eq!(commit.totals.files, 3);
    for left in ["intents", "probe"] {
        let _ = fs::remove_dir_all(sample().join("snapshots/v1").join(left));
    }
}

fn objects() -> BTreeMap<String, Vec<u8>> {
    content(&sample()).into_iter().map(|(path, (bytes, _))| (path, bytes)).collect()
}

#[tokio::test]
async fn snapshots_of_version_1_are_read() {
    let at = tempfile::tempdir().unwrap();
    let folder = at.path().join("folder");
    write_folder(&folder);
    write_sample(&folder).await;
    let store = store(&sample());
    let commit = store.snapshot(&store.resolve("sample").await.unwrap()).await.unwrap();
    assert_eq!((commit.created_ms, commit.writer.as_str()), (1_796_000_000_000, "kvstore 0.1.0"));
    assert_eq!(commit.facts["dtype"], "bf16");
    assert!(verify(&store, &commit, &Arc::default()).await.unwrap().wrong.is_empty());
    restore(&store, &commit, &at.path().join("to"), &Arc::default()).await.unwrap();
    assert_eq!(content(&at.path().join("to")), content(&folder));
}

/// What was read is written as it was: another way needs another version.
#[tokio::test]
async fn version_1_is_written_as_it_was() {
    let objects = objects();
    let read = |end: &str| objects.iter().find(|(path, _)| path.ends_with(end)).unwrap().1;
    let commit = Commit::decode(read("/COMMIT")).unwrap();
    assert_eq!(&commit.encode().unwrap(), read("/COMMIT"));
    let rank = kvstore_checkpoint::manifest::Rank::decode(read("/rank-00000")).unwrap();
    assert_eq!(&rank.encode().unwrap(), read("/rank-00000"));
    assert_eq!(Digest::of(read("/rank-00000")), commit.ranks.0[0].digest);
    let mut kinds = std::collections::BTreeSet::new();
    for (path, stored) in objects.iter().filter(|(path, _)| path.contains("/chunks/")) {
        let name: Digest = path.rsplit('/').next().unwrap().parse().unwrap();
        let plain = codec::decode(&stored.clone().into(), name).unwrap();
        let (kind, element) = (stored[stored.len() - 24], stored[stored.len() - 23]);
        kinds.insert(kind);
        if kind == 0 {
            assert_eq!(codec::encode(plain.to_vec(), Tried::Nothing), stored);
        }
        assert_eq!(kind == 2, element > 0);
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
}
