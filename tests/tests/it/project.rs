//! What the project says of itself is true: the arrows between crates, the table of metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The arrows that ARCHITECTURE.md draws. A new one needs an ADR.
const ARROWS: [(&str, &[&str]); 17] = [
    ("kvstore-proto", &[]),
    ("kvstore-plane", &[]),
    ("kvstore-transfer", &["kvstore-plane"]),
    ("kvstore-plane-loom", &[]),
    ("kvstore-plane-shuttle", &[]),
    ("kvstore-bucket", &[]),
    ("kvstore-tiers", &["kvstore-bucket", "kvstore-plane", "kvstore-rocksdb", "kvstore-transfer"]),
    ("kvstore-checkpoint", &["kvstore-bucket"]),
    ("kvstore-client", &["kvstore-plane", "kvstore-proto"]),
    ("kvstore-python", &["kvstore-bucket", "kvstore-checkpoint", "kvstore-client"]),
    ("kvstore-chat", &[]),
    ("kvstore-index", &[]),
    ("kvstore-index-shuttle", &[]),
    ("kvstore-router", &["kvstore-chat", "kvstore-client", "kvstore-index", "kvstore-proto"]),
    ("kvstore", &["kvstore-checkpoint", "kvstore-client", "kvstore-plane", "kvstore-proto", "kvstore-tiers"]),
    (
        "kvstore-tests",
        &[
            "kvstore",
            "kvstore-chat",
            "kvstore-checkpoint",
            "kvstore-client",
            "kvstore-plane",
            "kvstore-proto",
            "kvstore-rocksdb",
            "kvstore-router",
            "kvstore-tiers",
            "kvstore-transfer",
        ],
    ),
    (
        "kvstore-benches",
        &[
            "kvstore",
            "kvstore-chat",
            "kvstore-client",
            "kvstore-plane",
            "kvstore-proto",
            "kvstore-router",
            "kvstore-tests",
            "kvstore-tiers",
            "kvstore-transfer",
        ],
    ),
];

#[test]
fn arrows_between_crates_point_one_way() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let metadata = cargo_metadata::MetadataCommand::new().manifest_path(manifest).no_deps().exec().unwrap();
    let found: BTreeMap<String, BTreeSet<String>> = metadata
        .packages
        .iter()
        .map(|package| {
            let inside = package.dependencies.iter().filter(|dependency| dependency.path.is_some());
            (package.name.to_string(), inside.map(|dependency| dependency.name.clone()).collect())
        })
        .collect();
    let drawn: BTreeMap<String, BTreeSet<String>> =
        ARROWS.iter().map(|(from, to)| (from.to_string(), to.iter().map(|to| to.to_string()).collect())).collect();
    assert_eq!(found, drawn, "found, and drawn");
}

#[test]
fn the_table_of_metrics_is_complete() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let table = std::fs::read_to_string(path).unwrap();
    let metrics = kvstore::status::metrics::all();
    for (name, kind, help) in &metrics {
        let row = format!("| `{name}` | {} | {help} |", kind.name());
        assert!(table.lines().any(|line| line == row), "docs/metrics.md has no line {row}");
    }
    let listed = table.lines().filter(|line| line.starts_with("| `kvstore_")).count();
    assert_eq!(listed, metrics.len(), "docs/metrics.md lists a metric that does not exist");
}

/// ARCHITECTURE.md named files that did not exist. A name without a folder is of a file that the text has just spoken of.
#[test]
fn files_that_the_architecture_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let names = text.split('`').skip(1).step_by(2);
    let in_a_folder = |name: &&str| {
        let first = name.split('/').next().unwrap_or_default();
        name.contains('/') && (root.join(first).is_dir() || name.ends_with(".rs"))
    };
    for name in names.filter(in_a_folder) {
        let found = ["", "router/src"].iter().any(|folder| root.join(folder).join(name).exists());
        assert!(found, "ARCHITECTURE.md names {name}, which does not exist");
    }
}

/// docs/contract.md names a test for each promise: each of them is there.
#[test]
fn the_tests_of_the_contract_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = std::fs::read_to_string(root.join("docs/contract.md")).unwrap();
    let mut named = 0;
    for name in text.split('`').filter(|name| name.contains("::")) {
        let (file, function) = name.split_once("::").unwrap();
        let folders = match file.split_once('/') {
            // A test beside the code that it tests, or of the crate's program.
            Some((krate, module)) => ["src", "tests"].map(|folder| format!("{krate}/{folder}/{module}.rs")).to_vec(),
            None => ["tests/tests/it", "kvstore/tests/it"].map(|folder| format!("{folder}/{file}.rs")).to_vec(),
        };
        let is_there = folders.iter().any(|file| {
            let source = std::fs::read_to_string(root.join(file));
            source.is_ok_and(|source| source.contains(&format!("fn {function}(")))
        });
        assert!(is_there, "docs/contract.md names {name}, which is no test");
        named += 1;
    }
    assert!(named > 50, "{named} tests are named");
}
