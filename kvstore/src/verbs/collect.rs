//! Collect: garbage in the bucket goes, by an operator's rules or by the configuration's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_proto::v1;
use kvstore_tiers::object::{CollectError, CollectRules, Collected, PackCount};
use tokio::sync::mpsc;
use tonic::Status;

use crate::daemon::Daemon;
use crate::{caps, wire};

/// The least time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(100);

/// The rules of a request.
pub fn rules(request: v1::CollectRequest) -> Result<CollectRules, Status> {
    let v1::CollectRequest { older_than_ms, keep_bytes, namespace, dry_run } = request;
    if older_than_ms.is_none() && keep_bytes.is_none() && !dry_run {
        return Err(wire::invalid("older_than_ms", "is missing, and so is keep_bytes: say what may go, or dry_run"));
    }
    let namespace = (!namespace.is_empty()).then_some(namespace);
    Ok(CollectRules { older_than_ms, keep_bytes, namespace, dry_run })
}

/// Collects, and reports. Goes on where nobody listens any more.
pub async fn collect(
    daemon: Arc<Daemon>,
    rules: CollectRules,
    reports: mpsc::Sender<Result<v1::CollectProgress, Status>>,
) {
    let Some(object) = &daemon.object else {
        let _ = reports.send(Err(Status::failed_precondition("this daemon has no object store: set object.url"))).await;
        return;
    };
    let mut last = Instant::now();
    let mut report = |collected: &Collected| {
        if last.elapsed() >= REPORT_EVERY {
            last = Instant::now();
            // A slow listener misses reports.
            let _ = reports.try_send(Ok(progress(collected, false)));
        }
    };
    let outcome = object.collect(&rules, &mut report).await;
    let answer = match outcome {
        Ok(collected) => {
            let (packs, bytes) = (collected.deleted.packs, collected.deleted.bytes);
            tracing::info!(packs, bytes, dry_run = rules.dry_run, "garbage of the bucket was collected");
            Ok(progress(&collected, true))
        }
        Err(error @ CollectError::Held(_)) => Err(Status::resource_exhausted(format!("busy: {error}"))),
        Err(error @ CollectError::NoLease) => Err(Status::failed_precondition(error.to_string())),
        Err(error) => Err(Status::unavailable(error.to_string())),
    };
    let _ = reports.send(answer).await;
}

fn progress(collected: &Collected, done: bool) -> v1::CollectProgress {
    let count = |count: &PackCount| v1::PackCount { packs: count.packs, bytes: count.bytes };
    v1::CollectProgress {
        found: collected.found.iter().map(|(namespace, found)| (namespace.clone(), count(found))).collect(),
        deleted: Some(count(&collected.deleted)),
        referenced: Some(count(&collected.referenced)),
        failed: Some(count(&collected.failed)),
        deleting: collected.deleting,
        done,
    }
}

/// Collects as the configuration says, until the runtime ends. Daemons that share a bucket take turns by the lease.
pub async fn collect_forever(daemon: Arc<Daemon>) {
    loop {
        tokio::time::sleep(caps::COLLECT_EVERY).await;
        let config = daemon.config();
        let (Some(object), Some(tier)) = (&config.object, &daemon.object) else { continue };
        let rules = CollectRules {
            older_than_ms: object.keep_age.map(|age| age.as_millis() as u64),
            keep_bytes: object.keep_bytes,
            ..CollectRules::default()
        };
        if rules == CollectRules::default() {
            continue;
        }
        match tier.collect(&rules, &mut |_| {}).await {
            Ok(collected) if collected.deleted.packs > 0 => {
                let (packs, bytes) = (collected.deleted.packs, collected.deleted.bytes);
                tracing::info!(packs, bytes, "garbage of the bucket was collected");
            }
            Ok(_) | Err(CollectError::Held(_)) => {}
            Err(error) => tracing::warn!(%error, "garbage of the bucket was not collected; trying again in an hour"),
        }
    }
}
