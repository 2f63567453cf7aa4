//! What there is to say of snapshots, as JSON: the same in the command line's answers and in Python's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::cache::Entry;
use crate::collect::Collected;
use crate::diff::{Change, Differences};
use crate::manifest::{Commit, File};
use crate::remove::names_of;
use crate::restore::Checked;
use crate::store::{NameHistory, StoreError};

/// An object, and these fields.
pub fn with<'a>(object: Value, fields: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    let mut all = match object {
        Value::Object(all) => all,
        _ => Map::new(),
    };
    all.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
    Value::Object(all)
}

/// A time of a manifest, for people.
pub fn when(ms: i64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(ms.max(0) as u64)).to_string()
}

/// A snapshot.
pub fn snapshot(commit: &Commit, names: &[String]) -> Value {
    json!({
        "id": commit.id, "names": names, "created": when(commit.created_ms), "source": commit.source, "writer": commit.writer,
        "facts": commit.facts, "ranks": commit.ranks.0.len(), "files": commit.totals.files, "tensors": commit.totals.tensors,
        "bytes": commit.totals.bytes, "chunks": commit.totals.chunks, "chunk_bytes": commit.totals.chunk_bytes,
    })
}

/// All snapshots of a store.
pub fn list(names: &[NameHistory], all: &[Result<Commit, (String, StoreError)>]) -> Value {
    let read = all.iter().flatten().map(|commit| snapshot(commit, &names_of(names, &commit.id)));
    let failed = all.iter().filter_map(|one| one.as_ref().err());
    let failed = failed.map(|(id, why)| json!({"id": id, "error": why.to_string()}));
    json!({"snapshots": read.collect::<Vec<_>>(), "unreadable": failed.collect::<Vec<_>>()})
}

/// A file of a snapshot.
pub fn file(file: &File, with_tensors: bool) -> Value {
    let chunks = file.extents.0.iter();
    let chunks = chunks.map(|extent| json!({"bytes": extent.bytes, "chunk": extent.chunk.to_string()}));
    let row = json!({
        "path": file.path, "bytes": file.bytes, "executable": file.executable, "chunks": chunks.collect::<Vec<_>>(),
    });
    with(row, with_tensors.then(|| ("tensors", json!(file.tensors.0))))
}

/// A snapshot, and what it is made of.
pub fn inspected(commit: &Commit, names: &[String], files: &[File], with_tensors: bool) -> Value {
    let files = files.iter().map(|one| file(one, with_tensors)).collect();
    with(snapshot(commit, names), [("files", files)])
}

/// What a check found.
pub fn checked(commit: &Commit, checked: &Checked) -> Value {
    let wrong = checked.wrong.iter().map(|(chunk, why)| json!({"chunk": chunk.to_string(), "error": why.to_string()}));
    json!({"id": commit.id, "sound": checked.sound, "wrong": wrong.collect::<Vec<_>>()})
}

/// How something differs, in a word.
pub fn change(change: Change) -> &'static str {
    match change {
        Change::Added => "added",
        Change::Removed => "removed",
        Change::Changed => "changed",
    }
}

/// What differs between two snapshots.
pub fn differences(first: &Commit, second: &Commit, found: &Differences) -> Value {
    let rows = found
        .all
        .iter()
        .map(|one| json!({"file": one.file, "tensor": one.tensor, "change": change(one.change), "bytes": one.bytes}));
    json!({
        "first": first.id, "second": second.id, "differences": rows.collect::<Vec<_>>(), "shared_bytes": found.shared_bytes,
        "new_bytes": found.new_bytes,
    })
}

/// What a collection came to.
pub fn collected(collected: &Collected, dry_run: bool) -> Value {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    json!({
        "dry_run": dry_run, "snapshots": read(&collected.snapshots), "gone_snapshots": read(&collected.gone_snapshots),
        "chunks": read(&collected.chunks), "gone_chunks": read(&collected.gone_chunks),
        "gone_bytes": read(&collected.gone_bytes), "failed": read(&collected.failed),
    })
}

/// What a cache holds of a snapshot.
pub fn cached(entry: &Entry) -> Value {
    let used_at = humantime::format_rfc3339_seconds(entry.used_at).to_string();
    json!({
        "id": entry.id, "bytes": entry.bytes, "is_whole": entry.is_whole, "is_used": entry.is_used, "used_at": used_at,
    })
}
