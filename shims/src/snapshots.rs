//! Snapshots, as Python sees them: each verb twice, one that waits and tells how far it is, one that is awaited. What a verb is asked, and
//! what it answers, is JSON; the package's classes are made of it in Python.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use kvstore_bucket::ObjectUrl;
use kvstore_checkpoint::collect::{self, CollectRules, Collected};
use kvstore_checkpoint::copy::{self, Between};
use kvstore_checkpoint::manifest::Commit;
use kvstore_checkpoint::progress::Progress as Counts;
use kvstore_checkpoint::remove::{self, names_of};
use kvstore_checkpoint::save::{self, Compress, SaveOptions};
use kvstore_checkpoint::source::{Made, Sources};
use kvstore_checkpoint::store::Store;
use kvstore_checkpoint::{describe, diff, restore};
use kvstore_client::v1::{PrewarmProgress, PrewarmSnapshotRequest, PrewarmTier};
use kvstore_client::{Chunks, Client, Error};
use pyo3::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::contents;
use crate::errors::{raise, snapshots as of};
use crate::heap;
use crate::near::DaemonChunks;
use crate::restored::{self, Hold, Restored};
use crate::runtime::{SNAPSHOTS, awaitable_on, wait_and_tell};

/// How far a call is: read while it runs.
#[pyclass(frozen, module = "kvstore")]
#[derive(Default)]
pub struct Progress(pub(crate) Arc<Counts>);

#[pymethods]
impl Progress {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Bytes in all, and of those done, found to be there, and moved to or from the store.
    fn read(&self) -> (u64, u64, u64, u64) {
        let read = |counter: &AtomicU64| Counts::read(counter);
        (read(&self.0.total), read(&self.0.done), read(&self.0.found), read(&self.0.moved))
    }
}

/// A verb, and what it is asked.
#[derive(Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
enum Call {
    Prewarm {
        snapshot: String,
        tier: String,
        keep_ms: u64,
        deadline_ms: u64,
    },
    Ls,
    Inspect {
        snapshot: String,
        tensors: bool,
    },
    Verify {
        snapshot: String,
    },
    Diff {
        first: String,
        second: String,
    },
    Tag {
        snapshot: String,
        name: String,
    },
    Rm {
        snapshot: String,
    },
    Gc {
        keep_last: usize,
        dry_run: bool,
    },
    Restore {
        snapshot: String,
        to: PathBuf,
        facts: BTreeMap<String, String>,
        allow: Vec<String>,
    },
    Save {
        folder: Option<PathBuf>,
        without: Vec<String>,
        name: Option<String>,
        facts: BTreeMap<String, String>,
        /// None: what suits the store.
        compress: Option<bool>,
    },
    Upload {
        snapshot: String,
        /// Of the other store.
        url: String,
        options: Vec<(String, String)>,
        compress: Option<bool>,
    },
}

/// A store of snapshots.
#[pyclass(frozen, module = "kvstore")]
pub struct Snapshots {
    store: Store,
    /// Its disks are faster than a compressor.
    is_local: bool,
    daemon: Option<Arc<Daemon>>,
}

/// The daemon that is asked for chunks first: its address, and what there is of it once it answers.
struct Daemon {
    address: String,
    chunks: OnceCell<Arc<Chunks>>,
}

impl Daemon {
    /// Its chunks; `None` while it does not answer.
    async fn chunks(&self) -> Option<Arc<Chunks>> {
        let made = self.chunks.get_or_try_init(|| async {
            Ok::<_, Error>(Arc::new(Chunks::new(Client::connect_to_map(&self.address).await?)))
        });
        made.await.ok().cloned()
    }
}

/// The store, whose chunks come from a daemon where it has them.
async fn with_daemon(store: Store, daemon: Option<Arc<Daemon>>) -> (Store, Option<Arc<Chunks>>) {
    let Some(daemon) = daemon else { return (store, None) };
    match daemon.chunks().await {
        Some(chunks) => (store.with_near(Arc::new(DaemonChunks(Arc::clone(&chunks)))), Some(chunks)),
        None => (store, None),
    }
}

fn prewarm_tier(name: &str) -> Result<PrewarmTier, Error> {
    match name {
        "memory" => Ok(PrewarmTier::PrewarmMemory),
        "disk" => Ok(PrewarmTier::PrewarmDisk),
        name => Err(Error::Invalid(format!("tier: {name:?} is not valid; use \"memory\" or \"disk\""))),
    }
}

fn parse<T: serde::de::DeserializeOwned>(asked: &str) -> Result<T, Error> {
    // What was asked is not told again: a store's options may be secrets.
    serde_json::from_str(asked).map_err(|error| Error::Invalid(error.to_string()))
}

/// What is compressed: by default, what goes to a store that is slower than the compressor.
fn compression(asked: Option<bool>, is_folder: bool) -> Compress {
    if asked.unwrap_or(!is_folder) { Compress::Auto } else { Compress::Nothing }
}

/// The snapshot that is asked for.
pub async fn commit(store: &Store, asked: &str) -> Result<Commit, Error> {
    let id = store.resolve(asked).await.map_err(of::store)?;
    store.snapshot(&id).await.map_err(of::store)
}

/// The bytes of a call, beside its answer.
fn moved(progress: &Counts, verb: &'static str) -> [(&'static str, Value); 2] {
    [("found_bytes", json!(Counts::read(&progress.found))), (verb, json!(Counts::read(&progress.moved)))]
}

/// Has the daemon bring a snapshot, and tells how far it is.
async fn prewarm(
    daemon: Option<Arc<Daemon>>,
    request: PrewarmSnapshotRequest,
    progress: &Counts,
) -> Result<Value, Error> {
    let daemon = daemon.ok_or_else(|| Error::Invalid("no daemon is named; give daemon= to the store".into()))?;
    let report = |step: &PrewarmProgress| {
        let counts = [
            (&progress.total, step.total_bytes),
            (&progress.done, step.done_bytes),
            (&progress.found, step.found_bytes),
            (&progress.moved, step.read_bytes),
        ];
        counts.iter().for_each(|(counter, bytes)| counter.store(*bytes, Ordering::Relaxed));
    };
    let done = Client::connect(&daemon.address).await?.prewarm_snapshot(request, report).await?;
    let pins: Vec<String> =
        done.pins.iter().map(|pin| pin.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    Ok(json!({
        "id": done.id, "bytes": done.total_bytes, "found_bytes": done.found_bytes, "read_bytes": done.read_bytes, "pins": pins,
    }))
}

/// Copies a snapshot into another store.
async fn upload(
    from: &Store,
    asked: &str,
    url: ObjectUrl,
    compress: Option<bool>,
    progress: &Arc<Counts>,
) -> Result<Value, Error> {
    let compress = compression(compress, url.url.starts_with("file:"));
    let to = Store::open(&url).map_err(of::store)?;
    let between = Between { from, to: &to };
    let (id, is_name) = between.from.resolve_named(asked).await.map_err(of::store)?;
    let copied = copy::copy(between, &id, is_name.then_some(asked), compress, progress).await;
    let _ = tokio::task::spawn_blocking(heap::give_back).await;
    let commit = copied.map_err(of::save)?;
    let names = names_of(&between.to.names().await.map_err(of::store)?, &id);
    Ok(describe::with(describe::snapshot(&commit, &names), moved(progress, "written_bytes")))
}

async fn answer(
    store: Store,
    is_local: bool,
    daemon: Option<Arc<Daemon>>,
    call: Call,
    made: Vec<Made>,
    progress: Arc<Counts>,
) -> Result<String, Error> {
    let answer = match call {
        Call::Prewarm { snapshot, tier, keep_ms, deadline_ms } => {
            let request = PrewarmSnapshotRequest { snapshot, tier: prewarm_tier(&tier)?.into(), deadline_ms, keep_ms };
            prewarm(daemon, request, &progress).await?
        }
        Call::Ls => {
            let (names, all) = futures::try_join!(store.names(), store.list()).map_err(of::store)?;
            describe::list(&names, &all)
        }
        Call::Inspect { snapshot, tensors } => {
            let commit = commit(&store, &snapshot).await?;
            let (names, files) = futures::try_join!(store.names(), store.files(&commit)).map_err(of::store)?;
            describe::inspected(&commit, &names_of(&names, &commit.id), &files, tensors)
        }
        Call::Verify { snapshot } => {
            let commit = commit(&store, &snapshot).await?;
            let checked = restore::verify(&store, &commit, &progress).await.map_err(of::store)?;
            describe::checked(&commit, &checked)
        }
        Call::Diff { first, second } => {
            let (first, second) = (commit(&store, &first).await?, commit(&store, &second).await?);
            let found = diff::diff(&store, &first, &second).await.map_err(of::store)?;
            describe::differences(&first, &second, &found)
        }
        Call::Tag { snapshot, name } => {
            let commit = commit(&store, &snapshot).await?;
            store.let_mean(&name, Some(&commit.id)).await.map_err(of::store)?;
            json!({"id": commit.id, "name": name})
        }
        Call::Rm { snapshot } => {
            remove::remove(&store, &snapshot).await.map_err(of::remove)?;
            json!({"removed": snapshot})
        }
        Call::Gc { keep_last, dry_run } => {
            let collected = Collected::default();
            let rules = CollectRules { keep_last, dry_run };
            collect::collect(&store, rules, &collected).await.map_err(of::collect)?;
            describe::collected(&collected, dry_run)
        }
        Call::Restore { snapshot, to, facts, allow } => {
            let commit = commit(&store, &snapshot).await?;
            restore::check_facts(&commit, &facts, &allow).map_err(of::restore)?;
            let (store, _) = with_daemon(store, daemon).await;
            restore::restore(&store, &commit, &to, &progress).await.map_err(of::restore)?;
            let answer = json!({"id": commit.id, "folder": to, "bytes": commit.totals.bytes});
            describe::with(answer, moved(&progress, "read_bytes"))
        }
        Call::Save { folder, without, name, facts, compress } => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let options = SaveOptions {
                name: name.clone(),
                facts,
                compress: compression(compress, is_local),
                writer: format!("kvstore {} (Python)", env!("CARGO_PKG_VERSION")),
                now_ms: now.as_millis() as i64,
            };
            let sources = Sources { folder, without, made };
            let saved = save::save_all(&store, sources, options, &progress).await;
            let _ = tokio::task::spawn_blocking(heap::give_back).await;
            let commit = saved.map_err(of::save)?;
            let answer = describe::snapshot(&commit, &name.into_iter().collect::<Vec<_>>());
            describe::with(answer, moved(&progress, "written_bytes"))
        }
        Call::Upload { snapshot, url, options, compress } => {
            upload(&store, &snapshot, ObjectUrl { url, options }, compress, &progress).await?
        }
    };
    Ok(answer.to_string())
}

impl Snapshots {
    fn answer(
        &self,
        call: Call,
        made: Vec<Made>,
        progress: &Progress,
    ) -> impl Future<Output = Result<String, Error>> + Send + 'static {
        answer(self.store.clone(), self.is_local, self.daemon.clone(), call, made, Arc::clone(&progress.0))
    }

    fn held(&self, hold: Hold, progress: &Progress) -> impl Future<Output = Result<Restored, Error>> + Send + 'static {
        let (store, daemon, progress) = (self.store.clone(), self.daemon.clone(), Arc::clone(&progress.0));
        async move {
            let (store, chunks) = with_daemon(store, daemon).await;
            restored::hold(store, chunks, hold, progress).await
        }
    }
}

#[pymethods]
impl Snapshots {
    #[new]
    fn new(url: String, options: Vec<(String, String)>, daemon: Option<String>) -> PyResult<Self> {
        let is_local = url.starts_with("file:");
        let store = Store::open(&ObjectUrl { url, options }).map_err(of::store).map_err(raise)?;
        let daemon = daemon.map(|address| Arc::new(Daemon { address, chunks: OnceCell::new() }));
        Ok(Self { store, is_local, daemon })
    }

    /// A verb. `made`: contents that are saved, see contents.rs. `tell` is called ten times a second while it runs.
    fn call(
        &self,
        py: Python<'_>,
        asked: &str,
        made: Vec<Bound<'_, PyAny>>,
        progress: &Progress,
        tell: Option<Bound<'_, PyAny>>,
    ) -> PyResult<String> {
        let (call, made) = (parse(asked).map_err(raise)?, contents::all(&made)?);
        let answer = self.answer(call, made, progress);
        wait_and_tell(py, answer, tell.as_ref())
    }

    /// The same, awaited.
    fn call_async<'py>(
        &self,
        py: Python<'py>,
        asked: &str,
        made: Vec<Bound<'_, PyAny>>,
        progress: &Progress,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (call, made) = (parse(asked).map_err(raise)?, contents::all(&made)?);
        let answer = self.answer(call, made, progress);
        awaitable_on(&SNAPSHOTS, py, answer, |py, answer| Ok(answer.into_pyobject(py)?.into_any().unbind()))
    }

    /// A snapshot in memory, or in a cache: see restored.rs.
    fn hold(
        &self,
        py: Python<'_>,
        asked: &str,
        progress: &Progress,
        tell: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Restored> {
        let held = self.held(parse(asked).map_err(raise)?, progress);
        wait_and_tell(py, held, tell.as_ref())
    }

    /// The same, awaited.
    fn hold_async<'py>(&self, py: Python<'py>, asked: &str, progress: &Progress) -> PyResult<Bound<'py, PyAny>> {
        let held = self.held(parse(asked).map_err(raise)?, progress);
        awaitable_on(&SNAPSHOTS, py, held, |py, held| Ok(Py::new(py, held)?.into_any()))
    }
}
