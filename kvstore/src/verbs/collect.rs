//! Collect: deletes garbage from the bucket, by an operator's rules or by the configuration's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_proto::v1;
use kvstore_tiers::object::{CollectError, CollectRules, Collected, PackCount};
use tokio::sync::mpsc;
use tonic::Status;

use crate::config::{Config, NamespacePolicy};
use crate::daemon::Daemon;
use crate::{caps, wire};

/// The least time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(100);

/// The rules of a request.
pub fn rules(request: v1::CollectRequest) -> Result<CollectRules, Status> {
    let v1::CollectRequest { older_than_ms, keep_bytes, namespace, dry_run } = request;
    if older_than_ms.is_none() && keep_bytes.is_none() && !dry_run {
        return Err(wire::invalid("older_than_ms", "neither this nor keep_bytes is set: set one of them, or dry_run"));
    }
    let namespace = (!namespace.is_empty()).then_some(namespace);
    Ok(CollectRules { older_than_ms, keep_bytes, namespace, except: Vec::new(), dry_run })
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
            tracing::info!(packs, bytes, dry_run = rules.dry_run, "collected garbage in the bucket");
            Ok(progress(&collected, true))
        }
        Err(error @ CollectError::Held(_)) => Err(Status::resource_exhausted(error.to_string())),
        Err(error @ CollectError::NoLease) => Err(Status::failed_precondition(error.to_string())),
        Err(error) => Err(Status::unavailable(error.to_string())),
    };
    // Who collects next waits for this one's end, and that not for its listener.
    let _ = reports.send_timeout(answer, caps::REPORT_STALL).await;
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
        let Some(tier) = &daemon.object else { continue };
        for rules in configured_rules(&daemon.config()) {
            let namespace = rules.namespace.clone().unwrap_or_else(|| "all others".into());
            match tier.collect(&rules, &mut |_| {}).await {
                Ok(collected) if collected.deleted.packs > 0 => {
                    let (packs, bytes) = (collected.deleted.packs, collected.deleted.bytes);
                    tracing::info!(namespace, packs, bytes, "collected garbage in the bucket");
                }
                Ok(_) | Err(CollectError::Held(_)) => {}
                Err(error) => {
                    tracing::warn!(namespace, %error, "cannot collect garbage in the bucket; trying again in an hour");
                }
            }
        }
    }
}

/// What goes, as configured: first of the namespaces with rules of their own, then of all others together. What a namespace's
/// own rules leave open holds as for all; what is unused for its ttl goes from its nodes, and what is older from the bucket.
pub fn configured_rules(config: &Config) -> Vec<CollectRules> {
    let Some(object) = &config.object else { return Vec::new() };
    let ms = |age: Duration| age.as_millis() as u64;
    let own = |policy: &NamespacePolicy| policy.keep_age.or(policy.ttl).is_some() || policy.keep_bytes.is_some();
    let except: Vec<String> =
        config.policies.iter().filter(|(_, policy)| own(policy)).map(|(name, _)| name.clone()).collect();
    let of_one = |name: &String| {
        let policy = config.policies.get(name).copied().unwrap_or_default();
        let older_than_ms = policy.keep_age.or(policy.ttl).or(object.keep_age).map(ms);
        CollectRules {
            older_than_ms,
            keep_bytes: policy.keep_bytes,
            namespace: Some(name.clone()),
            ..CollectRules::default()
        }
    };
    let mut rules: Vec<CollectRules> = except.iter().map(of_one).collect();
    if object.keep_age.is_some() || object.keep_bytes.is_some() {
        let (older_than_ms, keep_bytes) = (object.keep_age.map(ms), object.keep_bytes);
        rules.push(CollectRules { older_than_ms, keep_bytes, except, ..CollectRules::default() });
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RawConfig;

    #[test]
    fn namespaces_with_rules_of_their_own_are_left_to_those() {
        let listen = |name: &str| format!("[[listen]]\naddress = \"unix:/tmp/{name}.sock\"\nnamespace = \"{name}\"\n");
        let text = format!(
            "[object]\nurl = \"file:///tmp/kvstore-none\"\nkeep_age = \"30days\"\nkeep_bytes = \"1TiB\"\n{}{}{}\
             [[namespace]]\nname = \"a\"\nkeep_bytes = \"1GiB\"\n[[namespace]]\nname = \"b\"\nttl = \"1h\"\n\
             [[namespace]]\nname = \"c\"\nupload = \"all\"\n",
            listen("a"),
            listen("b"),
            listen("c")
        );
        let rules = configured_rules(&RawConfig::parse("test", &text).unwrap().check().unwrap());
        let hours = |hours: u64| Some(hours * 3_600_000);
        let of = |namespace: &str, older_than_ms, keep_bytes| CollectRules {
            older_than_ms,
            keep_bytes,
            namespace: Some(namespace.into()),
            ..CollectRules::default()
        };
        let except = vec!["a".to_owned(), "b".to_owned()];
        let rest =
            CollectRules { older_than_ms: hours(720), keep_bytes: Some(1 << 40), except, ..CollectRules::default() };
        assert_eq!(rules, [of("a", hours(720), Some(1 << 30)), of("b", hours(1), None), rest]);
        let none = RawConfig::parse("test", "[object]\nurl = \"file:///tmp/kvstore-none\"\n").unwrap().check().unwrap();
        assert!(configured_rules(&none).is_empty());
    }
}
