//! A snapshot that this process holds: its files in sealed memory of its own, in the node's cache, or in the memory of the node's daemon.
//! Python maps them. The descriptors,
//! or the hold on the cache, go with the object: each mapping of a cached file has it.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use kvstore_checkpoint::cache::{Cache, Kept};
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::memory::{self, Held};
use kvstore_checkpoint::progress::Progress;
use kvstore_checkpoint::restore::check_facts;
use kvstore_checkpoint::store::Store;
use kvstore_checkpoint::{describe, restore::RestoreError};
use kvstore_client::{Chunks, Error};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde::Deserialize;

use crate::errors::{raise, snapshots as of};
use crate::exported::view;
use crate::heap;
use crate::near::Leased;

/// What is to be held, and where.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    snapshot: String,
    facts: BTreeMap<String, String>,
    allow: Vec<String>,
    /// A folder and its bound; none: memory of this process alone.
    cache: Option<(PathBuf, u64)>,
    /// What the cache has is verified again.
    check: bool,
    /// Paths, and folders that end with `/`; none: all files. Only of memory: a cache has whole snapshots.
    wanted: Option<Vec<String>>,
    /// Tensors are wanted, and no files with tensors: they may stay where the daemon has them.
    as_tensors: bool,
}

enum Place {
    Memory(Vec<Held>),
    Cache(Kept),
    /// Files with tensors in the daemon's memory, and all others in memory of this process.
    Daemon(Leased, Vec<Held>),
}

/// See the head of this file.
#[pyclass(frozen, module = "kvstore")]
pub struct Restored {
    commit: Commit,
    place: Place,
}

fn is_wanted(path: &str, wanted: Option<&Vec<String>>) -> bool {
    let is_it = |one: &String| one == path || (one.ends_with('/') && path.starts_with(one.as_str()));
    wanted.is_none_or(|wanted| wanted.iter().any(is_it))
}

/// Holds a snapshot. `chunks`: those of this node's daemon, if it is asked.
pub async fn hold(
    store: Store,
    chunks: Option<Arc<Chunks>>,
    hold: Hold,
    progress: Arc<Progress>,
) -> Result<Restored, Error> {
    let held = place(store, chunks, hold, progress).await;
    // On no thread that others wait for.
    let _ = tokio::task::spawn_blocking(heap::give_back).await;
    held
}

async fn place(
    store: Store,
    chunks: Option<Arc<Chunks>>,
    hold: Hold,
    progress: Arc<Progress>,
) -> Result<Restored, Error> {
    let commit = crate::snapshots::commit(&store, &hold.snapshot).await?;
    check_facts(&commit, &hold.facts, &hold.allow).map_err(of::restore)?;
    let place = match hold.cache {
        Some((folder, bytes)) => {
            let cache = Cache::open(&folder, bytes).map_err(of::cache)?;
            Place::Cache(cache.hold(&store, &commit, hold.check, &progress).await.map_err(of::cache)?)
        }
        None => {
            let wanted = |path: &str| is_wanted(path, hold.wanted.as_ref());
            if let Some(chunks) = chunks.filter(|_| hold.as_tensors) {
                let mut files = store.files(&commit).await.map_err(of::store)?;
                files.retain(|file| wanted(&file.path));
                let (with_tensors, others): (Vec<_>, Vec<_>) =
                    files.into_iter().partition(|file| !file.tensors.0.is_empty());
                if let Some(leased) = Leased::new(chunks, &with_tensors, hold.check, &progress).await {
                    let paths: HashSet<String> = others.into_iter().map(|file| file.path).collect();
                    let others = memory::restore(&store, &commit, |path| paths.contains(path), &Arc::default()).await;
                    let place = Place::Daemon(leased, others.map_err(of::restore)?);
                    return Ok(Restored { commit, place });
                }
            }
            let held = memory::restore(&store, &commit, wanted, &progress).await;
            Place::Memory(held.map_err(|error: RestoreError| of::restore(error))?)
        }
    };
    Ok(Restored { commit, place })
}

impl Restored {
    fn of_daemon(&self) -> PyResult<&Leased> {
        match &self.place {
            Place::Daemon(leased, _) => Ok(leased),
            _ => Err(raise(Error::Invalid("the snapshot is not in the daemon's memory".into()))),
        }
    }
}

#[pymethods]
impl Restored {
    /// The snapshot, as `ls` shows it.
    fn describe(&self) -> String {
        describe::snapshot(&self.commit, &[]).to_string()
    }

    /// The folder in the cache; None: it is in memory.
    fn folder(&self) -> Option<PathBuf> {
        match &self.place {
            Place::Cache(kept) => Some(kept.folder.clone()),
            Place::Memory(_) | Place::Daemon(..) => None,
        }
    }

    /// The files whose tensors are in the daemon's memory: path and bytes.
    fn leased(&self) -> Vec<(String, u64)> {
        match &self.place {
            Place::Daemon(leased, _) => leased.files(),
            _ => Vec::new(),
        }
    }

    /// A copy of a part of such a file.
    fn read<'py>(&self, py: Python<'py>, path: &str, start: u64, end: u64) -> PyResult<Bound<'py, PyBytes>> {
        let read = self.of_daemon()?.read(path, start, end).map_err(raise)?;
        Ok(PyBytes::new(py, &read))
    }

    /// A part of such a file, as memory of this process's own that is mapped where it can be. It may be written to.
    fn region<'py>(&self, py: Python<'py>, path: &str, start: u64, end: u64) -> PyResult<Bound<'py, PyAny>> {
        let region = self.of_daemon()?.region(path, start, end).map_err(raise)?;
        view(py, region)
    }

    /// The files in memory: path, bytes, whether it may be run, and the descriptor, which is open while this lives.
    fn memory(&self) -> Vec<(String, u64, bool, i32)> {
        match &self.place {
            Place::Memory(all) | Place::Daemon(_, all) => {
                let one = |held: &Held| {
                    (held.file.path.clone(), held.file.bytes, held.file.executable, held.memory.as_raw_fd())
                };
                all.iter().map(one).collect()
            }
            Place::Cache(_) => Vec::new(),
        }
    }
}

/// What a cache holds, as JSON.
#[pyfunction]
pub fn cache_ls(py: Python<'_>, folder: PathBuf) -> PyResult<String> {
    let all = py.detach(|| Cache::open(&folder, 0).and_then(|cache| cache.ls()));
    let all = all.map_err(of::cache).map_err(raise)?;
    Ok(serde_json::Value::from_iter(all.iter().map(describe::cached)).to_string())
}

/// Removes a snapshot from a cache; false where a process uses it.
#[pyfunction]
pub fn cache_rm(py: Python<'_>, folder: PathBuf, id: &str) -> PyResult<bool> {
    if !kvstore_checkpoint::manifest::is_id(id) {
        return Err(raise(Error::Invalid(format!("{id:?} is not a snapshot's id of 32 hexadecimal digits"))));
    }
    let removed = py.detach(|| Cache::open(&folder, 0).and_then(|cache| cache.remove(id)));
    removed.map_err(of::cache).map_err(raise)
}
