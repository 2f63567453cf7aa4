//! What differs between two snapshots, by file and by tensor.

use std::collections::BTreeMap;

use crate::digest::Digest;
use crate::manifest::{Commit, File};
use crate::store::{Store, StoreError};
use crate::tensors::Tensor;

/// How one thing differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// It is only in the second.
    Added,
    /// It is only in the first.
    Removed,
    /// It is in both, and has other bytes, another type or shape.
    Changed,
}

/// A file or a tensor that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The file.
    pub file: String,
    /// The tensor; none: what of the file is outside of tensors.
    pub tensor: Option<String>,
    /// How.
    pub change: Change,
    /// Its bytes: in the second, where it is there.
    pub bytes: u64,
}

/// What differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// By file and tensor.
    pub all: Vec<Difference>,
    /// Bytes of the second one's chunks that the first has, too.
    pub shared_bytes: u64,
    /// Bytes of those that it has not.
    pub new_bytes: u64,
}

async fn files(store: &Store, commit: &Commit) -> Result<BTreeMap<String, File>, StoreError> {
    let mut all = BTreeMap::new();
    for name in &commit.ranks.0 {
        for file in store.rank(&commit.id, *name).await?.files.0 {
            all.insert(file.path.clone(), file);
        }
    }
    Ok(all)
}

fn tensors(file: Option<&File>) -> BTreeMap<&str, (&Tensor, Vec<Digest>)> {
    let of = |file: &'_ File, tensor: &Tensor| file.chunks_of(tensor.start, tensor.end).collect::<Vec<Digest>>();
    let all = file.into_iter().flat_map(|file| file.tensors.0.iter().map(move |tensor| (file, tensor)));
    all.map(|(file, tensor)| (tensor.name.as_str(), (tensor, of(file, tensor)))).collect()
}

/// Chunks of a file that no tensor has.
fn outside(file: &File) -> (u64, Vec<Digest>) {
    let (mut at, mut bytes, mut chunks) = (0, 0, Vec::new());
    for extent in &file.extents.0 {
        let (from, to) = (at, at + extent.bytes);
        at = to;
        if !file.tensors.0.iter().any(|tensor| tensor.start <= from && to <= tensor.end && tensor.start < tensor.end) {
            bytes += extent.bytes;
            chunks.push(extent.chunk);
        }
    }
    (bytes, chunks)
}

/// What the second has otherwise than the first.
pub async fn diff(store: &Store, first: &Commit, second: &Commit) -> Result<Differences, StoreError> {
    let (old, new) = (files(store, first).await?, files(store, second).await?);
    let mut found = Differences::default();
    let old_chunks: std::collections::HashSet<Digest> =
        old.values().flat_map(|file| file.extents.0.iter().map(|extent| extent.chunk)).collect();
    let mut seen = std::collections::HashSet::new();
    for extent in new.values().flat_map(|file| &file.extents.0).filter(|extent| seen.insert(extent.chunk)) {
        match old_chunks.contains(&extent.chunk) {
            true => found.shared_bytes += extent.bytes,
            false => found.new_bytes += extent.bytes,
        }
    }
    let mut paths: Vec<&String> = old.keys().chain(new.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    for path in paths {
        let (before, after) = (old.get(path), new.get(path));
        of_file(path, before, after, &mut found.all);
    }
    Ok(found)
}

fn of_file(path: &str, before: Option<&File>, after: Option<&File>, all: &mut Vec<Difference>) {
    let mut push = |tensor: Option<&str>, change: Change, bytes: u64| {
        all.push(Difference { file: path.to_owned(), tensor: tensor.map(str::to_owned), change, bytes });
    };
    match (before, after) {
        (Some(before), None) => return push(None, Change::Removed, before.bytes),
        (None, Some(after)) => return push(None, Change::Added, after.bytes),
        (Some(before), Some(after)) => {
            let ((_, old), (bytes, new)) = (outside(before), outside(after));
            if old != new {
                push(None, Change::Changed, bytes);
            }
        }
        (None, None) => return,
    }
    let (old, new) = (tensors(before), tensors(after));
    let mut names: Vec<&str> = old.keys().chain(new.keys()).copied().collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        match (old.get(name), new.get(name)) {
            (Some((tensor, _)), None) => push(Some(name), Change::Removed, tensor.end - tensor.start),
            (None, Some((tensor, _))) => push(Some(name), Change::Added, tensor.end - tensor.start),
            (Some((before, old)), Some((after, new))) => {
                if old != new || before.dtype != after.dtype || before.shape != after.shape {
                    push(Some(name), Change::Changed, after.end - after.start);
                }
            }
            (None, None) => {}
        }
    }
}
