//! What there is to say and to do about snapshots, as messages: the work is `kvstore_checkpoint`'s.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvstore_checkpoint::collect::{self, CollectError, CollectRules, Collected};
use kvstore_checkpoint::describe;
use kvstore_checkpoint::diff;
use kvstore_checkpoint::manifest::{Commit, File};
use kvstore_checkpoint::progress::Progress;
use kvstore_checkpoint::remove::{self, RemoveError, names_of};
use kvstore_checkpoint::restore;
use kvstore_checkpoint::store::{Store, StoreError};
use kvstore_proto::{chunks, v1};
use kvstore_tiers::below::Ask;
use kvstore_tiers::host::{NamespaceId, RegisteredLayout};
use kvstore_tiers::{Run, SequenceHash, Tier};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use crate::daemon::Daemon;
use crate::{caps, wire};

/// The least time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(100);

/// The daemon's store.
pub fn store(daemon: &Daemon) -> Result<&Store, Status> {
    daemon.snapshots.as_ref().ok_or_else(|| {
        Status::failed_precondition("this daemon knows no snapshots: set snapshots.url in its configuration")
    })
}

/// Why the store did not do it.
pub fn refused(error: &StoreError) -> Status {
    let message = error.to_string();
    match error {
        StoreError::NoSuch(_) => Status::not_found(message),
        StoreError::Ambiguous(_) | StoreError::Name(_) => Status::invalid_argument(message),
        StoreError::Lost { .. } | StoreError::Manifest { .. } | StoreError::Chunk { .. } | StoreError::Digest(_) => {
            Status::data_loss(message)
        }
        StoreError::Unable(_) | StoreError::NoTime | StoreError::TooMany { .. } => Status::failed_precondition(message),
        StoreError::Collecting(_) => Status::resource_exhausted(message),
        StoreError::Open(_) | StoreError::Request { .. } | StoreError::MayAppear { .. } | StoreError::Stopped(_) => {
            Status::unavailable(message)
        }
    }
}

/// The snapshot that is asked for.
pub async fn commit(store: &Store, asked: &str) -> Result<Commit, Status> {
    let id = store.resolve(asked).await.map_err(|error| refused(&error))?;
    store.snapshot(&id).await.map_err(|error| refused(&error))
}

/// Chunks of one layout, each once.
pub struct ChunkRun {
    /// The layout.
    pub layout: Arc<RegisteredLayout>,
    /// The chunks' names ...
    pub hashes: Vec<SequenceHash>,
    /// ... and bytes.
    pub bytes: Vec<u64>,
}

/// The distinct chunks of files, by layout. Registers the layouts.
pub fn chunk_runs(daemon: &Daemon, namespace: NamespaceId, files: &[File]) -> Result<Vec<ChunkRun>, Status> {
    let mut runs: Vec<(usize, ChunkRun)> = Vec::new();
    let mut seen = HashSet::new();
    for extent in files.iter().flat_map(|file| &file.extents.0) {
        if !seen.insert(extent.chunk) {
            continue;
        }
        let class = chunks::class_of(extent.bytes)
            .ok_or_else(|| Status::data_loss(format!("the snapshot has a chunk of {} bytes", extent.bytes)))?;
        let at = match runs.iter().position(|(known, _)| *known == class) {
            Some(at) => at,
            None => {
                let layout = chunks::CLASSES.get(class).map(|most| chunks::layout(*most));
                let layout = daemon.host.register_layout(namespace, wire::layout(layout)?);
                let layout = layout.map_err(wire::register_error)?;
                runs.push((class, ChunkRun { layout, hashes: Vec::new(), bytes: Vec::new() }));
                runs.len() - 1
            }
        };
        let hash = SequenceHash::new(&extent.chunk.0).map_err(|error| Status::internal(error.to_string()))?;
        if let Some((_, run)) = runs.get_mut(at) {
            run.hashes.push(hash);
            run.bytes.push(extent.bytes);
        }
    }
    Ok(runs.into_iter().map(|(_, run)| run).collect())
}

fn info(commit: &Commit, names: Vec<String>, residency: Option<v1::SnapshotResidency>) -> v1::SnapshotInfo {
    let totals = commit.totals;
    v1::SnapshotInfo {
        id: commit.id.clone(),
        names,
        created_ms: commit.created_ms,
        writer: commit.writer.clone(),
        source: commit.source.clone(),
        facts: commit.facts.clone().into_iter().collect(),
        files: totals.files,
        bytes: totals.bytes,
        chunks: totals.chunks,
        chunk_bytes: totals.chunk_bytes,
        tensors: totals.tensors,
        residency,
    }
}

fn residency(daemon: &Daemon, namespace: NamespaceId, files: &[File]) -> Result<v1::SnapshotResidency, Status> {
    let mut found = v1::SnapshotResidency::default();
    for run in chunk_runs(daemon, namespace, files)? {
        let tiers = daemon.stack.residency(&Run { layout: &run.layout, group: 0, hashes: &run.hashes }, Ask::Look);
        for (tiers, bytes) in tiers.into_iter().zip(run.bytes) {
            found.memory_bytes += if tiers.has(Tier::Host) { bytes } else { 0 };
            found.disk_bytes += if tiers.has(Tier::Nvme) { bytes } else { 0 };
        }
    }
    Ok(found)
}

/// All snapshots.
pub async fn list(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &v1::ListSnapshotsRequest,
) -> Result<v1::ListSnapshotsResponse, Status> {
    let store = store(daemon)?;
    let (names, all) = tokio::try_join!(store.names(), store.list()).map_err(|error| refused(&error))?;
    let mut answer = v1::ListSnapshotsResponse::default();
    for one in all {
        match one {
            Ok(commit) => {
                let read = match request.with_residency {
                    true => Some(store.files(&commit).await),
                    false => None,
                };
                let residency = match read {
                    Some(Err(error)) => {
                        answer.unreadable.push(v1::UnreadableSnapshot { id: commit.id, error: error.to_string() });
                        continue;
                    }
                    Some(Ok(files)) => Some(residency(daemon, namespace, &files)?),
                    None => None,
                };
                answer.snapshots.push(info(&commit, names_of(&names, &commit.id), residency));
            }
            Err((id, error)) => {
                answer.unreadable.push(v1::UnreadableSnapshot { id, error: error.to_string() });
            }
        }
    }
    Ok(answer)
}

/// What a snapshot is made of.
pub async fn inspect(
    daemon: &Daemon,
    namespace: NamespaceId,
    request: &v1::InspectSnapshotRequest,
) -> Result<v1::InspectSnapshotResponse, Status> {
    let store = store(daemon)?;
    let commit = commit(store, &request.snapshot).await?;
    let (names, files) = tokio::try_join!(store.names(), store.files(&commit)).map_err(|error| refused(&error))?;
    let residency = residency(daemon, namespace, &files)?;
    let tensors = |file: &File| {
        let tensors = file.tensors.0.iter().filter(|_| request.with_tensors);
        let each = tensors.map(|tensor| v1::SnapshotTensor {
            name: tensor.name.clone(),
            dtype: tensor.dtype.clone(),
            shape: tensor.shape.clone(),
            bytes: tensor.end - tensor.start,
        });
        each.collect()
    };
    let each = files.iter().map(|file| v1::SnapshotFile {
        path: file.path.clone(),
        bytes: file.bytes,
        executable: file.executable,
        chunks: file.extents.0.len() as u64,
        tensors: tensors(file),
    });
    let snapshot = Some(info(&commit, names_of(&names, &commit.id), Some(residency)));
    Ok(v1::InspectSnapshotResponse { snapshot, files: each.collect() })
}

/// Verifies a snapshot where it lies, and reports. Ends where nobody listens, the daemon drains, or it takes too long.
pub async fn verify(
    daemon: &Daemon,
    store: Store,
    commit: Commit,
    reports: mpsc::Sender<Result<v1::SnapshotProgress, Status>>,
) {
    let progress = Arc::new(Progress::default());
    let report = || v1::SnapshotProgress {
        total_bytes: Progress::read(&progress.total),
        done_bytes: Progress::read(&progress.done),
        ..v1::SnapshotProgress::default()
    };
    let work = restore::verify(&store, &commit, &progress);
    tokio::pin!(work);
    let until = Instant::now() + Duration::from_millis(caps::PREWARM_MS_MAX);
    let checked = loop {
        tokio::select! {
            checked = &mut work => break checked.map_err(|error| refused(&error)),
            () = reports.closed() => return,
            () = tokio::time::sleep(REPORT_EVERY) => {
                if daemon.is_draining() {
                    break Err(wire::draining());
                }
                if Instant::now() >= until {
                    break Err(Status::deadline_exceeded("the snapshot is too large to be verified in one call"));
                }
                // A slow listener misses reports.
                let _ = reports.try_send(Ok(report()));
            }
        }
    };
    let answer = checked.map(|checked| v1::SnapshotProgress {
        done: true,
        sound_chunks: checked.sound,
        damaged: checked.wrong.iter().map(|(_, why)| why.to_string()).collect(),
        ..report()
    });
    let _ = reports.send_timeout(answer, caps::REPORT_STALL).await;
}

/// What differs.
pub async fn diff(daemon: &Daemon, request: &v1::DiffSnapshotsRequest) -> Result<v1::DiffSnapshotsResponse, Status> {
    let store = store(daemon)?;
    let (first, second) = tokio::try_join!(commit(store, &request.first), commit(store, &request.second))?;
    let found = diff::diff(store, &first, &second).await.map_err(|error| refused(&error))?;
    let each = found.all.into_iter().map(|one| v1::SnapshotDifference {
        file: one.file,
        tensor: one.tensor.unwrap_or_default(),
        change: describe::change(one.change).to_owned(),
        bytes: one.bytes,
    });
    Ok(v1::DiffSnapshotsResponse {
        first_id: first.id,
        second_id: second.id,
        differences: each.collect(),
        shared_bytes: found.shared_bytes,
        new_bytes: found.new_bytes,
    })
}

/// Names a snapshot.
pub async fn tag(daemon: &Daemon, request: &v1::TagSnapshotRequest) -> Result<v1::TagSnapshotResponse, Status> {
    let store = store(daemon)?;
    let commit = commit(store, &request.snapshot).await?;
    store.let_mean(&request.name, Some(&commit.id)).await.map_err(|error| refused(&error))?;
    Ok(v1::TagSnapshotResponse { id: commit.id })
}

/// Takes a name away, or a snapshot.
pub async fn remove(
    daemon: &Daemon,
    request: &v1::RemoveSnapshotRequest,
) -> Result<v1::RemoveSnapshotResponse, Status> {
    match remove::remove(store(daemon)?, &request.snapshot).await {
        Ok(()) => Ok(v1::RemoveSnapshotResponse {}),
        Err(error @ RemoveError::Named { .. }) => Err(Status::failed_precondition(error.to_string())),
        Err(RemoveError::Store(error)) => Err(refused(&error)),
    }
}

/// Collects garbage.
pub async fn collect(
    daemon: &Daemon,
    request: &v1::CollectSnapshotsRequest,
) -> Result<v1::CollectSnapshotsResponse, Status> {
    let collected = Collected::default();
    let rules = CollectRules { keep_last: request.keep_last.max(1) as usize, dry_run: request.dry_run };
    collect::collect(store(daemon)?, rules, &collected).await.map_err(|error| match &error {
        CollectError::Held(_) | CollectError::Saving(_) => Status::resource_exhausted(error.to_string()),
        CollectError::LeaseLost => Status::unavailable(error.to_string()),
        CollectError::TooManyChunks(_) => Status::failed_precondition(error.to_string()),
        CollectError::Store(error) => refused(error),
    })?;
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Ok(v1::CollectSnapshotsResponse {
        kept_snapshots: read(&collected.snapshots),
        kept_chunks: read(&collected.chunks),
        deleted_snapshots: read(&collected.gone_snapshots),
        deleted_chunks: read(&collected.gone_chunks),
        deleted_bytes: read(&collected.gone_bytes),
        failed: read(&collected.failed),
    })
}
