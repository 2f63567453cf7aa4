//! Collecting garbage: packs go by age, or oldest first until so many bytes are left; never what a reference in the bucket names.
//!
//! One collector at a time holds the lease, a chain of create-only objects `collector/<n>`. The bucket is listed twice, and
//! nothing of it is kept but a histogram: the first pass tells how old what has to go is, the second deletes it. An acknowledgement
//! rests only on objects that are younger than half the grace period, and no object goes before all of it is over, so that what was
//! acknowledged stays at least for the other half.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kvstore_plane::SequenceHash;
use object_store::path::Path;
use object_store::{ObjectMeta, PutPayload};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::ObjectTier;
use super::names::{BlockName, GroupNames};
use super::probe::now_ms;
use super::requests::{Trouble, retried};
use crate::caps;
use crate::host::RegisteredLayout;

/// What is to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CollectRules {
    /// Packs that are older than this go, in milliseconds.
    pub older_than_ms: Option<u64>,
    /// The oldest packs go until no more bytes than this are left.
    pub keep_bytes: Option<u64>,
    /// In this namespace alone; it need not be one of this daemon's.
    pub namespace: Option<String>,
    /// Not in these: they have rules of their own.
    pub except: Vec<String>,
    /// Nothing goes: what would is only counted.
    pub dry_run: bool,
}

/// Packs, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackCount {
    /// How many.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl PackCount {
    fn add(&mut self, bytes: u64) {
        self.packs += 1;
        self.bytes += bytes;
    }
}

/// How far a collection is, and at its end what it came to.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    /// What there was, by namespace.
    pub found: BTreeMap<String, PackCount>,
    /// What went, or would have.
    pub deleted: PackCount,
    /// What would have gone, but is referred to.
    pub referenced: PackCount,
    /// What could not be deleted.
    pub failed: PackCount,
    /// Deletions are under way, or over.
    pub deleting: bool,
}

/// Why nothing was collected, or not all.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// Somebody else collects.
    #[error("another collector holds the lease for {0} more s; try again after that")]
    Held(u64),
    /// The store cannot keep two collectors apart.
    #[error(
        "the object store does not refuse a second create, so two collectors could run at once; garbage cannot be collected in it"
    )]
    NoLease,
    /// It took longer than the lease.
    #[error("the collector's lease is about to end; the next collection deletes the rest")]
    TooLong,
    /// The store.
    #[error(transparent)]
    Store(#[from] Trouble),
}

#[derive(Serialize, Deserialize)]
struct Lease {
    holder: String,
    expires_ms: i64,
}

/// A promise in the bucket that blocks stay: a pin's.
#[derive(Serialize, Deserialize)]
struct Reference {
    version: u32,
    /// By the store's clock.
    expires_ms: i64,
    /// Below the root: namespace, layout, group.
    folder: String,
    blocks: Vec<String>,
}

/// A lease lasts so long ...
const LEASE_MS: i64 = 10 * 60 * 1000;
/// ... and its holder stops this much before.
const LEASE_MARGIN: Duration = Duration::from_secs(60);
/// Namespaces that are told apart in a report.
const NAMESPACES_TOLD: usize = 4096;
/// Bytes of a reference, or of a lease, at most: 65,536 names of 35 bytes.
const REFERENCE_BYTES_MAX: u64 = 4 << 20;
/// Deletions at once.
const DELETES_AT_ONCE: usize = 16;
/// Ages are told apart to this many milliseconds, up to so many steps: three years.
const AGE_STEP_MS: i64 = 3600 * 1000;
const AGE_STEPS: usize = 26_280;
/// References that are read at most: as many pins as a namespace may have.
const REFERENCES_MAX: usize = caps::HOLDS_MAX;

/// What is referred to, by group.
type Referenced = HashMap<Path, HashSet<BlockName>>;

impl ObjectTier {
    fn store_now_ms(&self) -> i64 {
        now_ms() + self.clock_ahead_ms.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Collects. `report` is told how far it is, now and then.
    pub async fn collect(
        self: &Arc<Self>,
        rules: &CollectRules,
        report: &mut (dyn FnMut(&Collected) + Send),
    ) -> Result<Collected, CollectError> {
        let until = Instant::now() + Duration::from_millis(LEASE_MS as u64) - LEASE_MARGIN;
        let lease = if rules.dry_run { None } else { Some(self.take_collector_lease().await?) };
        let collected = self.collect_under_lease(rules, until, report).await;
        if let Some(lease) = lease {
            self.end_collector_lease(lease).await;
        }
        collected
    }

    async fn collect_under_lease(
        self: &Arc<Self>,
        rules: &CollectRules,
        until: Instant,
        report: &mut (dyn FnMut(&Collected) + Send),
    ) -> Result<Collected, CollectError> {
        let listed_ms = self.store_now_ms();
        let mut collected = Collected::default();
        let referenced = self.references(listed_ms, until).await?;
        let mut by_age = vec![0u64; AGE_STEPS];
        let folder = match &rules.namespace {
            Some(namespace) => self.names.root().clone().join(format!("ns={namespace}")),
            None => self.names.root().clone(),
        };
        let mut objects = self.bucket.stream(&folder);
        while let Some(object) = next_object(&mut objects, until).await? {
            let Some((namespace, _)) = self.names.split(&object.location) else { continue };
            if rules.except.contains(&namespace) {
                continue;
            }
            let known = collected.found.len() < NAMESPACES_TOLD || collected.found.contains_key(&namespace);
            collected.found.entry(if known { namespace } else { "(others)".into() }).or_default().add(object.size);
            if let Some(bytes) = by_age.get_mut(age_step(listed_ms, &object)) {
                *bytes += object.size;
            }
            report(&collected);
        }
        collected.deleting = true;
        let Some(cutoff_ms) = cutoff_ms(rules, &by_age, listed_ms) else { return Ok(collected) };
        let mut objects = self.bucket.stream(&folder);
        loop {
            let mut batch = Vec::new();
            while batch.len() < DELETES_AT_ONCE
                && let Some(object) = next_object(&mut objects, until).await?
            {
                let namespace = self.names.split(&object.location).map(|(namespace, _)| namespace);
                let is_pack = namespace.is_some_and(|namespace| !rules.except.contains(&namespace));
                if is_pack && object.last_modified.timestamp_millis() <= cutoff_ms {
                    batch.push(object);
                }
            }
            if batch.is_empty() {
                return Ok(collected);
            }
            let going = batch.iter().map(|object| self.collect_one(object, &referenced, rules.dry_run, until));
            for (object, outcome) in batch.iter().zip(futures::future::join_all(going).await) {
                let count = match outcome {
                    Ok(true) => &mut collected.deleted,
                    Ok(false) => &mut collected.referenced,
                    Err(trouble) => {
                        tracing::debug!(%trouble, pack = %object.location, "a pack cannot be collected");
                        &mut collected.failed
                    }
                };
                count.add(object.size);
            }
            report(&collected);
        }
    }

    /// True where the pack went, or would; false where it is referred to.
    async fn collect_one(
        &self,
        object: &ObjectMeta,
        referenced: &Referenced,
        dry_run: bool,
        until: Instant,
    ) -> Result<bool, Trouble> {
        if let Some((_, folder)) = self.names.split(&object.location)
            && let Some(blocks) = referenced.get(&folder)
        {
            let footer = match self.footer_of(object, until).await {
                Ok(footer) => footer,
                Err(Trouble::NotFound) => return Ok(true),
                // What is in it cannot be told: it stays, for what refers to it may still be read.
                Err(trouble) => return Err(trouble),
            };
            if footer.blocks.iter().any(|block| blocks.contains(&BlockName::of(&block.hash))) {
                return Ok(false);
            }
        }
        if !dry_run {
            self.bucket.delete(&object.location, until).await?;
        }
        Ok(true)
    }

    // ------------------------------------------------------------------------------- the lease

    async fn take_collector_lease(&self) -> Result<Path, CollectError> {
        if self.abilities.lock().is_none_or(|abilities| !abilities.creates_once) {
            return Err(CollectError::NoLease);
        }
        let deadline = Instant::now() + self.bucket.stall() * 4;
        let folder = self.names.root().clone().join("collector");
        let taken = self.bucket.list(&folder, caps::OBJECT_BRANCHES_MAX, deadline).await?;
        let number = |location: &Path| location.filename()?.parse::<u64>().ok();
        let last = taken.iter().filter_map(|object| Some((number(&object.location)?, object))).max_by_key(|(n, _)| *n);
        if let Some((_, object)) = last {
            let (bytes, _) =
                self.bucket.read(&object.location, 0..object.size.min(REFERENCE_BYTES_MAX), deadline).await?;
            let left =
                serde_json::from_slice::<Lease>(&bytes).map_or(0, |lease| lease.expires_ms - self.store_now_ms());
            if left > 0 {
                return Err(CollectError::Held(left as u64 / 1000 + 1));
            }
        }
        let next = last.map_or(1, |(number, _)| number + 1);
        let location = folder.clone().join(format!("{next:020}"));
        let holder = format!("{:032x}", self.next_id());
        let lease = Lease { holder, expires_ms: self.store_now_ms() + LEASE_MS };
        let body = serde_json::to_vec(&lease).unwrap_or_default();
        let payload = || PutPayload::from(body.clone());
        match retried!(self.bucket, deadline, 0, self.bucket.create(&location, payload())) {
            Ok(()) => {}
            Err(Trouble::Exists) => {
                // Another was faster; or an own try's answer was lost.
                let (there, _) = self.bucket.read(&location, 0..body.len() as u64, deadline).await?;
                if there != body {
                    return Err(CollectError::Held(LEASE_MS as u64 / 1000));
                }
            }
            Err(trouble) => return Err(trouble.into()),
        }
        for object in taken {
            // Leases that ended; the highest stays, so that numbers only rise.
            let _ = self.bucket.delete(&object.location, deadline).await;
        }
        Ok(location)
    }

    /// Overwritten as ended, not deleted: its number must not be taken again.
    async fn end_collector_lease(&self, location: Path) {
        let deadline = Instant::now() + self.bucket.stall() * 2;
        let body = serde_json::to_vec(&Lease { holder: String::new(), expires_ms: 0 }).unwrap_or_default();
        let overwrite = object_store::PutMode::Overwrite;
        let payload = || PutPayload::from(body.clone());
        let ended = retried!(self.bucket, deadline, 0, self.bucket.put(&location, payload(), overwrite.clone()));
        if let Err(trouble) = ended {
            tracing::debug!(%trouble, "the collector's lease could not be ended early; it ends at its time");
        }
    }

    // ------------------------------------------------------------------------------- references

    /// Blocks stay in the bucket for `ttl_ms`, whatever a collector wants: told to the bucket under the name `id`.
    pub async fn refer(
        &self,
        id: u128,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hashes: &[SequenceHash],
        ttl_ms: u64,
    ) -> Result<(), Trouble> {
        let folder = self.names.group(layout, group).below(self.names.root());
        let reference = Reference {
            version: 1,
            expires_ms: self.store_now_ms() + ttl_ms as i64,
            folder,
            blocks: hashes.iter().map(|hash| BlockName::of(hash).to_string()).collect(),
        };
        let body = serde_json::to_vec(&reference).map_err(|error| Trouble::Failed(error.to_string()))?;
        let deadline = Instant::now() + self.bucket.stall() * 4;
        let (location, mode) = (self.reference_at(id), object_store::PutMode::Overwrite);
        let payload = || PutPayload::from(body.clone());
        let put =
            retried!(self.bucket, deadline, body.len() as u64, self.bucket.put(&location, payload(), mode.clone()));
        put.map(drop)
    }

    /// Ends a reference before its time, in the background. Where that fails, it ends by its time.
    pub fn end_reference(self: &Arc<Self>, id: u128) {
        let tier = Arc::clone(self);
        self.runtime.spawn(async move {
            let deadline = Instant::now() + tier.bucket.stall() * 4;
            if let Err(trouble) = tier.bucket.delete(&tier.reference_at(id), deadline).await {
                tracing::debug!(%trouble, "a reference in the bucket could not be ended early; it ends at its time");
            }
        });
    }

    fn reference_at(&self, id: u128) -> Path {
        self.names.root().clone().join("refs").join(format!("{id:032x}"))
    }

    /// What is referred to now. References whose time is over are deleted.
    async fn references(&self, now_ms: i64, until: Instant) -> Result<Referenced, Trouble> {
        let mut referenced = Referenced::new();
        let folder = self.names.root().clone().join("refs");
        for object in self.bucket.list(&folder, REFERENCES_MAX, until).await? {
            if object.size > REFERENCE_BYTES_MAX {
                return Err(Trouble::Damaged(format!(
                    "the reference {} has {} bytes, which is too many",
                    object.location, object.size
                )));
            }
            let (bytes, _) = match self.bucket.read(&object.location, 0..object.size, until).await {
                Err(Trouble::NotFound) => continue,
                read => read?,
            };
            // One that cannot be read may protect anything: better nothing is collected.
            let reference: Reference = serde_json::from_slice(&bytes).map_err(|error| {
                Trouble::Damaged(format!("the reference {} cannot be read: {error}", object.location))
            })?;
            if reference.version != 1 {
                let problem = format!(
                    "the reference {} has version {}, which this build does not know",
                    object.location, reference.version
                );
                return Err(Trouble::Unsupported(problem));
            }
            if reference.expires_ms <= now_ms {
                let _ = self.bucket.delete(&object.location, until).await;
                continue;
            }
            let group = GroupNames::at(self.names.root(), &reference.folder);
            let blocks = reference.blocks.iter().filter_map(|block| BlockName::parse(block));
            referenced.entry(group).or_default().extend(blocks);
        }
        Ok(referenced)
    }
}

async fn next_object(
    objects: &mut futures::stream::BoxStream<'_, Result<ObjectMeta, Trouble>>,
    until: Instant,
) -> Result<Option<ObjectMeta>, CollectError> {
    match tokio::time::timeout_at(until, objects.next()).await {
        Ok(object) => Ok(object.transpose()?),
        Err(_) => Err(CollectError::TooLong),
    }
}

fn age_step(now_ms: i64, object: &ObjectMeta) -> usize {
    let age_ms = now_ms.saturating_sub(object.last_modified.timestamp_millis()).max(0);
    ((age_ms / AGE_STEP_MS) as usize).min(AGE_STEPS - 1)
}

/// What was written then or before has to go; `None`: nothing has.
fn cutoff_ms(rules: &CollectRules, by_age: &[u64], now_ms: i64) -> Option<i64> {
    let by_time = rules.older_than_ms.map(|age_ms| now_ms.saturating_sub(age_ms as i64));
    let by_bytes = rules.keep_bytes.and_then(|keep| {
        let mut kept = 0u64;
        let step = by_age.iter().position(|bytes| {
            kept += bytes;
            kept > keep
        })?;
        // That step goes whole: what is left is within the bound.
        Some(now_ms - step as i64 * AGE_STEP_MS)
    });
    let cutoff = by_time.into_iter().chain(by_bytes).max()?;
    Some(cutoff.min(now_ms - caps::OBJECT_GRACE_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_until_what_is_left_fits_and_nothing_within_its_grace() {
        let now = 1_000 * AGE_STEP_MS;
        let mut by_age = vec![0; AGE_STEPS];
        (by_age[0], by_age[2], by_age[10]) = (100, 50, 25);
        let keep =
            |bytes| cutoff_ms(&CollectRules { keep_bytes: Some(bytes), ..CollectRules::default() }, &by_age, now);
        assert_eq!(keep(175), None);
        assert_eq!(keep(174), Some(now - 10 * AGE_STEP_MS));
        assert_eq!(keep(149), Some(now - 2 * AGE_STEP_MS));
        assert_eq!(keep(0), Some(now - caps::OBJECT_GRACE_MS), "not what was written within the grace period");
        let age = |older_than_ms| {
            cutoff_ms(&CollectRules { older_than_ms: Some(older_than_ms), ..CollectRules::default() }, &by_age, now)
        };
        assert_eq!(age(5 * AGE_STEP_MS as u64), Some(now - 5 * AGE_STEP_MS));
        assert_eq!(age(0), Some(now - caps::OBJECT_GRACE_MS));
        assert_eq!(cutoff_ms(&CollectRules::default(), &by_age, now), None);
    }
}
