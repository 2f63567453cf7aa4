//! Collecting garbage: packs go by age, or oldest first until so many bytes are left; never what a reference in the bucket names.
//!
//! One collector at a time holds the lease. The bucket is listed twice, and nothing of it is kept but a histogram: the first pass
//! tells how old what has to go is, the second deletes it. An acknowledgement rests only on objects that are younger than half the
//! grace period, and no object goes before all of it is over, so that what was acknowledged stays at least for the other half. How
//! old an object is, the store's own clock says, as of the beginning of the collection; the wall clock of this machine has no part
//! in it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::ObjectMeta;
use object_store::path::Path;
use tokio::time::Instant;

use super::ObjectTier;
use super::names::BlockName;
use super::references::References;
use crate::bucket::{Lease, LeaseError, LeaseTerm, Trouble};
use crate::caps;

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
        "the object store does not refuse a second create, or does not list what was just written, so two collectors could run at once, or miss a pin; garbage cannot be collected in it"
    )]
    NoLease,
    /// The lease ended, or another took it.
    #[error("the collector's lease ended before the collection did; the next collection deletes the rest")]
    LeaseLost,
    /// Without the store's time nothing can be told to be old.
    #[error("the object store does not say when objects were written; garbage cannot be collected in it")]
    NoTime,
    /// What was just acknowledged looks old.
    #[error(
        "the object store's clock was set ahead, so that new objects look old; garbage is not collected for an hour"
    )]
    ClockJumped,
    /// Not all of them can be heeded.
    #[error("there are {0} in the bucket, which is too many to heed; nothing is deleted until there are fewer")]
    TooManyReferences(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] Trouble),
}

impl From<LeaseError> for CollectError {
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Held(left_ms) => Self::Held(left_ms / 1000 + 1),
            LeaseError::Lost => Self::LeaseLost,
            LeaseError::NoTime => Self::NoTime,
            LeaseError::Store(trouble) => Self::Store(trouble),
        }
    }
}

/// A collector that was killed holds the next one up for so long; what it sent in its last moment has a minute to arrive.
const TERM: LeaseTerm = LeaseTerm { ms: 5 * 60 * 1000, margin_ms: 60 * 1000 };
/// Namespaces that are told apart in a report.
const NAMESPACES_TOLD: usize = 4096;
/// Deletions at once.
const DELETES_AT_ONCE: usize = 16;
/// Ages are told apart to this many milliseconds, up to so many steps: three years.
const AGE_STEP_MS: i64 = 3600 * 1000;
const AGE_STEPS: usize = 26_280;

type Report<'a> = &'a mut (dyn FnMut(&Collected) + Send);

impl ObjectTier {
    /// Collects. `report` is told how far it is, now and then.
    pub async fn collect(
        self: &Arc<Self>,
        rules: &CollectRules,
        report: &mut (dyn FnMut(&Collected) + Send),
    ) -> Result<Collected, CollectError> {
        let able = self.abilities.lock().is_some_and(|able| able.creates_once && able.lists_own_writes);
        if !able && !rules.dry_run {
            return Err(CollectError::NoLease);
        }
        let name = format!("{:032x}", self.next_id());
        crate::bucket::measure(&self.bucket, self.names.root(), &name, self.soon()).await?;
        if !rules.dry_run && self.bucket.clock.jumped_within(self.bucket.now(), caps::OBJECT_GRACE_MS as u64) {
            return Err(CollectError::ClockJumped);
        }
        let lease = match rules.dry_run {
            true => None,
            false => Some(Lease::take(&self.bucket, &self.collector_folder(), &name, TERM, self.soon()).await?),
        };
        let mut collection = Collection {
            tier: self,
            rules,
            lease,
            references: References::default(),
            collected: Collected::default(),
            batches: 0,
            is_unsure: false,
        };
        let outcome = collection.run(report).await;
        let Collection { lease, collected, is_unsure, .. } = collection;
        // A deletion of which nothing is known may still come: until its lease is over, nothing rests on what it is of.
        if let Some(lease) = lease.filter(|_| !is_unsure) {
            lease.end(&self.bucket, self.soon()).await;
        }
        outcome.map(|()| collected)
    }

    /// The lease of a collection, but for a dry run, is renewed where that is due.
    pub(super) async fn keep_lease(&self, lease: &mut Option<Lease>) -> Result<(), CollectError> {
        match lease {
            Some(lease) => Ok(lease.renew_if_due(&self.bucket, self.soon()).await?),
            None => Ok(()),
        }
    }

    fn soon(&self) -> Instant {
        Instant::now() + self.bucket.stall() * 4
    }
}

/// A listing of the whole of a folder, object by object.
pub(super) struct Listing {
    objects: BoxStream<'static, Result<ObjectMeta, Trouble>>,
    patience: Duration,
}

impl Listing {
    /// Of this folder.
    pub fn of(tier: &ObjectTier, folder: &Path) -> Self {
        Self { objects: tier.bucket.stream(folder), patience: tier.bucket.stall() * 4 }
    }

    /// The next object. A listing that breaks off is not taken up again: whoever needs all of it begins anew.
    pub async fn next(&mut self) -> Result<Option<ObjectMeta>, Trouble> {
        match tokio::time::timeout(self.patience, self.objects.next()).await {
            Ok(object) => object.transpose(),
            Err(_) => Err(Trouble::Failed(format!("a listing brought nothing within {:?}", self.patience))),
        }
    }
}

/// What became of a pack.
enum Fate {
    /// It went, or would.
    Gone,
    /// It is referred to.
    Referenced,
    /// It was written again since it was listed.
    Young,
    /// It cannot be told whether it may go, or it was not asked to.
    Kept(Trouble),
    /// A deletion was not answered, and may have been sent: it may still come.
    Unsure(Trouble),
}

/// A collection that is under way.
struct Collection<'a> {
    tier: &'a ObjectTier,
    rules: &'a CollectRules,
    /// None for a dry run.
    lease: Option<Lease>,
    references: References,
    collected: Collected,
    batches: u64,
    /// A deletion was not answered.
    is_unsure: bool,
}

impl Collection<'_> {
    async fn run(&mut self, report: Report<'_>) -> Result<(), CollectError> {
        let tier = self.tier;
        if let Some(lease) = &self.lease {
            tier.forget_doomed_before(lease.epoch()).await?;
        }
        let now_ms = tier.bucket.clock.earliest_ms(tier.bucket.now()).ok_or(CollectError::NoTime)?;
        self.references.read_new(tier, &mut self.lease).await?;
        let by_age = self.survey(now_ms, report).await?;
        self.collected.deleting = true;
        let Some(cutoff_ms) = cutoff_ms(self.rules, &by_age, now_ms) else { return Ok(()) };
        let mut listing = Listing::of(tier, &self.folder());
        loop {
            let batch = self.next_batch(&mut listing, cutoff_ms).await?;
            if batch.is_empty() {
                return Ok(());
            }
            self.delete_batch(&batch, cutoff_ms).await?;
            report(&self.collected);
        }
    }

    fn folder(&self) -> Path {
        let root = self.tier.names.root().clone();
        match &self.rules.namespace {
            Some(namespace) => root.join(format!("ns={namespace}")),
            None => root,
        }
    }

    async fn keep_lease(&mut self) -> Result<(), CollectError> {
        self.tier.keep_lease(&mut self.lease).await
    }

    /// The namespace of an object, where it is a pack that the rules are about.
    fn concerns(&self, object: &ObjectMeta) -> Option<String> {
        let (namespace, _) = self.tier.names.split(&object.location)?;
        (!self.rules.except.contains(&namespace)).then_some(namespace)
    }

    /// Counts what there is: bytes, by their age.
    async fn survey(&mut self, now_ms: i64, report: Report<'_>) -> Result<Vec<u64>, CollectError> {
        let mut by_age = vec![0u64; AGE_STEPS];
        let mut listing = Listing::of(self.tier, &self.folder());
        while let Some(object) = listing.next().await? {
            self.keep_lease().await?;
            let Some(namespace) = self.concerns(&object) else { continue };
            let found = &mut self.collected.found;
            let known = found.len() < NAMESPACES_TOLD || found.contains_key(&namespace);
            found.entry(if known { namespace } else { "(others)".into() }).or_default().add(object.size);
            if let Some(bytes) = by_age.get_mut(age_step(now_ms, &object)) {
                *bytes += object.size;
            }
            report(&self.collected);
        }
        Ok(by_age)
    }

    async fn next_batch(&mut self, listing: &mut Listing, cutoff_ms: i64) -> Result<Vec<ObjectMeta>, CollectError> {
        let mut batch = Vec::new();
        while batch.len() < caps::OBJECT_COLLECT_BATCH
            && let Some(object) = listing.next().await?
        {
            self.keep_lease().await?;
            if self.concerns(&object).is_some() && object.last_modified.timestamp_millis() <= cutoff_ms {
                batch.push(object);
            }
        }
        Ok(batch)
    }

    /// Says what is about to go, looks for references that came meanwhile, and deletes: see `doomed`.
    async fn delete_batch(&mut self, batch: &[ObjectMeta], cutoff_ms: i64) -> Result<(), CollectError> {
        self.keep_lease().await?;
        let Some(epoch) = self.lease.as_ref().map(Lease::epoch) else {
            return self.delete_doomed(batch, cutoff_ms).await;
        };
        self.batches += 1;
        let mark = self.tier.doom(epoch, self.batches, batch).await?;
        let outcome = match self.references.read_new(self.tier, &mut self.lease).await {
            Ok(()) => self.delete_doomed(batch, cutoff_ms).await,
            Err(error) => Err(error),
        };
        // What may still be deleted stays doomed until the lease is over.
        if !self.is_unsure {
            self.tier.bucket.delete(&mark, self.tier.soon()).await?;
        }
        outcome
    }

    async fn delete_doomed(&mut self, batch: &[ObjectMeta], cutoff_ms: i64) -> Result<(), CollectError> {
        let going: Vec<_> = batch.iter().map(|object| self.delete_one(object, cutoff_ms)).collect();
        let fates: Vec<_> = futures::stream::iter(going).buffered(DELETES_AT_ONCE).collect().await;
        let mut is_lost = false;
        for (object, fate) in batch.iter().zip(fates) {
            let count = match fate {
                Fate::Gone => &mut self.collected.deleted,
                Fate::Referenced => &mut self.collected.referenced,
                Fate::Young => continue,
                Fate::Unsure(Trouble::Fenced) => {
                    is_lost = true;
                    // The request may have been sent before.
                    self.is_unsure = true;
                    continue;
                }
                Fate::Unsure(trouble) => {
                    tracing::debug!(%trouble, pack = %object.location, "a pack may or may not have been deleted");
                    self.is_unsure = true;
                    &mut self.collected.failed
                }
                Fate::Kept(trouble) => {
                    tracing::debug!(%trouble, pack = %object.location, "a pack cannot be collected");
                    &mut self.collected.failed
                }
            };
            count.add(object.size);
        }
        if is_lost { Err(CollectError::LeaseLost) } else { Ok(()) }
    }

    async fn delete_one(&self, object: &ObjectMeta, cutoff_ms: i64) -> Fate {
        let tier = self.tier;
        if let Some((_, group)) = tier.names.split(&object.location)
            && let Some(blocks) = self.references.of(&group)
        {
            let footer = match tier.footer_of(object, tier.soon()).await {
                Ok(footer) => footer,
                Err(Trouble::NotFound) => return Fate::Gone,
                // What is in it cannot be told: it stays, for what refers to it may still be read.
                Err(trouble) => return Fate::Kept(trouble),
            };
            if footer.blocks.iter().any(|block| blocks.contains(&BlockName::of(&block.hash))) {
                return Fate::Referenced;
            }
        }
        let Some(lease) = &self.lease else { return Fate::Gone };
        // It may have been deleted and written again, under its name, since it was listed.
        match tier.bucket.head(&object.location, tier.soon()).await {
            Ok(meta) if meta.last_modified.timestamp_millis() > cutoff_ms => return Fate::Young,
            Ok(_) => {}
            Err(Trouble::NotFound) => return Fate::Gone,
            Err(trouble) => return Fate::Kept(trouble),
        }
        let left = Duration::from_millis(lease.left_ms(tier.bucket.now()));
        let deadline = tier.soon().min(Instant::now() + left);
        match tier.bucket.delete_while(&object.location, deadline, || lease.holds(tier.bucket.now())).await {
            Ok(()) => Fate::Gone,
            Err(trouble) => Fate::Unsure(trouble),
        }
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
