//! Leases: one holder at a time, by create-only objects with rising numbers in a folder, and the store's time.
//!
//! The object with the highest number says who holds the lease and until when. It is taken, renewed and ended by creating the next
//! number; the store lets one create win. The highest is never deleted, so numbers only rise, and whoever created a number that is
//! not the highest (it had listed long ago) holds nothing. The number with which a holder began is its epoch: a later holder has
//! a higher one.
//!
//! A holder stops by its own clock since boot, counted from before it wrote, a margin before others may think it over; they go by
//! the store's time, in the doubt by the earlier. What a holder sends in the last moment must arrive within the margin.

use object_store::PutPayload;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::requests::{Bucket, Trouble};
use crate::boot::BootTime;
use crate::retried;

/// Numbers of a folder that are looked through: those of the last holders, where deleting them failed.
const NUMBERS_MAX: usize = 4096;
/// Bytes of a record at most.
const RECORD_BYTES_MAX: u64 = 4096;
/// How often the highest is looked for again, where it is another one each time.
const LOOKS_MAX: usize = 8;

/// For how long a lease is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseTerm {
    /// Others wait this long from its last renewal ...
    pub ms: u64,
    /// ... and its holder stops this much before.
    pub margin_ms: u64,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Another holds it, for so many milliseconds more.
    #[error("another holds the lease for {0} ms more")]
    Held(u64),
    /// It is over, or another was faster.
    #[error("the lease is lost")]
    Lost,
    /// How late it is there was never measured.
    #[error("the store's time is not known")]
    NoTime,
    /// The store.
    #[error(transparent)]
    Store(#[from] Trouble),
}

#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
struct Record {
    /// The first builds did not write it.
    #[serde(default = "version")]
    version: u32,
    holder: String,
    /// By the store's clock.
    expires_ms: i64,
    #[serde(default)]
    epoch: u64,
}

/// The version that is written, and the one that is read.
const fn version() -> u32 {
    1
}

/// What the highest number of a folder says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    number: u64,
    /// The number with which its holder began.
    pub epoch: u64,
    /// Until when it is held, by the store's clock.
    pub expires_ms: i64,
}

impl Standing {
    /// Milliseconds until it is over for sure.
    pub fn left_ms(&self, bucket: &Bucket) -> Option<u64> {
        let now_ms = bucket.clock.earliest_ms(bucket.now())?;
        Some(self.expires_ms.saturating_sub(now_ms).max(0) as u64)
    }
}

/// A lease that is held.
pub struct Lease {
    folder: Path,
    holder: String,
    term: LeaseTerm,
    epoch: u64,
    number: u64,
    until: BootTime,
}

impl Lease {
    /// Takes the lease of `folder`, where it is over or was never taken. `holder` names nobody else, nor this one again.
    pub async fn take(
        bucket: &Bucket,
        folder: &Path,
        holder: &str,
        term: LeaseTerm,
        deadline: Instant,
    ) -> Result<Self, LeaseError> {
        let last = standing(bucket, folder, deadline).await?;
        if let Some(last) = last {
            let left_ms = last.left_ms(bucket).ok_or(LeaseError::NoTime)?;
            if left_ms > 0 {
                return Err(LeaseError::Held(left_ms));
            }
        }
        let number = last.map_or(1, |last| last.number + 1);
        let mut lease = Self {
            folder: folder.clone(),
            holder: holder.to_owned(),
            term,
            epoch: number,
            number: number - 1,
            until: BootTime(0),
        };
        match lease.write_next(bucket, deadline).await {
            Err(LeaseError::Lost) => Err(LeaseError::Held(term.ms)),
            other => other.map(|()| lease),
        }
    }

    /// Rises from holder to holder.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// True while its holder may act.
    pub fn holds(&self, now: BootTime) -> bool {
        now < self.until
    }

    /// For how long its holder may act.
    pub fn left_ms(&self, now: BootTime) -> u64 {
        self.until.ms_since(now)
    }

    /// Renews it, where half of its time is over.
    pub async fn renew_if_due(&mut self, bucket: &Bucket, deadline: Instant) -> Result<(), LeaseError> {
        let now = bucket.now();
        if !self.holds(now) {
            return Err(LeaseError::Lost);
        }
        if self.left_ms(now) > (self.term.ms - self.term.margin_ms) / 2 {
            return Ok(());
        }
        self.write_next(bucket, deadline).await
    }

    /// Ends it early. Where that fails, it ends by its time.
    pub async fn end(mut self, bucket: &Bucket, deadline: Instant) {
        let record = Record { version: version(), holder: self.holder.clone(), expires_ms: 0, epoch: self.epoch };
        if let Err(error) = self.create(bucket, &record, deadline).await {
            tracing::debug!(%error, folder = %self.folder, "a lease could not be ended early; it ends at its time");
        }
    }

    async fn write_next(&mut self, bucket: &Bucket, deadline: Instant) -> Result<(), LeaseError> {
        let now = bucket.now();
        let expires_ms = bucket.clock.latest_ms(now).ok_or(LeaseError::NoTime)? + self.term.ms as i64;
        let record = Record { version: version(), holder: self.holder.clone(), expires_ms, epoch: self.epoch };
        self.create(bucket, &record, deadline).await?;
        self.until = now.plus_ms(self.term.ms - self.term.margin_ms);
        Ok(())
    }

    /// Creates the next number, and looks whether it is the highest.
    async fn create(&mut self, bucket: &Bucket, record: &Record, deadline: Instant) -> Result<(), LeaseError> {
        let number = self.number + 1;
        let location = location(&self.folder, number);
        let body = serde_json::to_vec(record).map_err(|error| Trouble::Failed(error.to_string()))?;
        let payload = || PutPayload::from(body.clone());
        match retried!(bucket, deadline, 0, bucket.create(&location, payload())) {
            Ok(()) => {}
            Err(Trouble::Exists) => {
                // Another was faster; or an own try's answer was lost.
                match bucket.read_all(&location, RECORD_BYTES_MAX, deadline).await {
                    Ok((there, _)) if there == body => {}
                    Ok(_) | Err(Trouble::NotFound) => return Err(LeaseError::Lost),
                    Err(trouble) => return Err(trouble.into()),
                }
            }
            Err(trouble) => return Err(trouble.into()),
        }
        let numbers = numbers(bucket, &self.folder, deadline).await?;
        if numbers.iter().max() != Some(&number) {
            // Those before it were deleted already, or it could not have been created.
            let _ = bucket.delete(&location, deadline).await;
            return Err(LeaseError::Lost);
        }
        self.number = number;
        for old in numbers.into_iter().filter(|old| *old < number) {
            let _ = bucket.delete(&self::location(&self.folder, old), deadline).await;
        }
        Ok(())
    }
}

/// Who has the lease of `folder`; nothing where it was never taken.
pub async fn standing(bucket: &Bucket, folder: &Path, deadline: Instant) -> Result<Option<Standing>, Trouble> {
    for _ in 0..LOOKS_MAX {
        let Some(number) = numbers(bucket, folder, deadline).await?.into_iter().max() else { return Ok(None) };
        let location = location(folder, number);
        let bytes = match bucket.read_all(&location, RECORD_BYTES_MAX, deadline).await {
            // A higher one came, and this one went.
            Err(Trouble::NotFound) => continue,
            read => read?.0,
        };
        // One that cannot be read may be held.
        let record: Record = serde_json::from_slice(&bytes)
            .map_err(|error| Trouble::Unsupported(format!("the lease {location} cannot be read: {error}")))?;
        if record.version != version() {
            let problem =
                format!("the lease {location} has version {}, which this build does not know", record.version);
            return Err(Trouble::Unsupported(problem));
        }
        let epoch = if record.epoch == 0 { number } else { record.epoch };
        return Ok(Some(Standing { number, epoch, expires_ms: record.expires_ms }));
    }
    Err(Trouble::Failed(format!("the lease of {folder} changes hands all the time")))
}

fn location(folder: &Path, number: u64) -> Path {
    folder.clone().join(format!("{number:020}"))
}

async fn numbers(bucket: &Bucket, folder: &Path, deadline: Instant) -> Result<Vec<u64>, Trouble> {
    let listed = bucket.list(folder, NUMBERS_MAX, deadline).await?;
    if listed.len() >= NUMBERS_MAX {
        // The highest may be behind.
        return Err(Trouble::Unsupported(format!("there are {NUMBERS_MAX} objects in {folder}, which is too many")));
    }
    Ok(listed.iter().filter_map(|object| object.location.filename()?.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use object_store::memory::InMemory;

    use super::*;

    const TERM: LeaseTerm = LeaseTerm { ms: 1000, margin_ms: 200 };

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn bucket(store: &Arc<InMemory>, now: fn() -> BootTime) -> Bucket {
        let bucket = Bucket::new(Arc::clone(store) as Arc<_>, Duration::from_secs(1), now);
        bucket.clock.note(now(), now(), 1_000_000);
        bucket
    }

    /// Time is an argument: nobody sleeps, and a holder that slept through its term knows it.
    #[tokio::test]
    async fn one_holds_it_until_it_is_over_and_epochs_rise() {
        static NOW: AtomicU64 = AtomicU64::new(0);
        let now: fn() -> BootTime = || BootTime(NOW.load(Ordering::Relaxed));
        let (store, folder) = (Arc::new(InMemory::new()), Path::from("leases"));
        let bucket = bucket(&store, now);
        let mut first = Lease::take(&bucket, &folder, "a", TERM, soon()).await.unwrap();
        let held = Lease::take(&bucket, &folder, "b", TERM, soon()).await;
        assert!(matches!(held, Err(LeaseError::Held(1000..=2100))), "until its end, as far as can be told");
        NOW.store(500, Ordering::Relaxed);
        first.renew_if_due(&bucket, soon()).await.unwrap();
        NOW.store(1299, Ordering::Relaxed);
        assert!(first.holds(now()), "renewed");
        NOW.store(1300, Ordering::Relaxed);
        assert!(!first.holds(now()), "a margin before others take it");
        assert!(matches!(first.renew_if_due(&bucket, soon()).await, Err(LeaseError::Lost)));
        assert!(matches!(Lease::take(&bucket, &folder, "b", TERM, soon()).await, Err(LeaseError::Held(_))));
        NOW.store(2600, Ordering::Relaxed);
        let second = Lease::take(&bucket, &folder, "b", TERM, soon()).await.unwrap();
        assert!(second.epoch() > first.epoch() && second.holds(now()));
        second.end(&bucket, soon()).await;
        let third = Lease::take(&bucket, &folder, "c", TERM, soon()).await.unwrap();
        assert_eq!(numbers(&bucket, &folder, soon()).await.unwrap(), [third.epoch()], "the others are cleaned up");
    }

    /// Two collectors at once: one had listed the lease when it was over, and slept, while others took it, ended it and cleaned
    /// up. The number that it then created was free again.
    #[tokio::test]
    async fn a_number_that_is_free_again_is_no_lease() {
        let (store, folder) = (Arc::new(InMemory::new()), Path::from("leases"));
        let bucket = bucket(&store, BootTime::default);
        let mut slow = Lease {
            folder: folder.clone(),
            holder: "slow".into(),
            term: TERM,
            epoch: 1,
            number: 0,
            until: BootTime(0),
        };
        Lease::take(&bucket, &folder, "a", TERM, soon()).await.unwrap().end(&bucket, soon()).await;
        let holder = Lease::take(&bucket, &folder, "b", TERM, soon()).await.unwrap();
        assert!(matches!(slow.write_next(&bucket, soon()).await, Err(LeaseError::Lost)));
        assert!(!slow.holds(bucket.now()) && holder.holds(bucket.now()));
        assert_eq!(standing(&bucket, &folder, soon()).await.unwrap().unwrap().epoch, holder.epoch());
    }

    #[tokio::test]
    async fn a_lease_that_cannot_be_read_is_not_over() {
        let (store, folder) = (Arc::new(InMemory::new()), Path::from("leases"));
        let bucket = bucket(&store, BootTime::default);
        let location = location(&folder, 7);
        bucket.create(&location, PutPayload::from("{\"holder\":")).await.unwrap();
        let taken = Lease::take(&bucket, &folder, "a", TERM, soon()).await;
        assert!(matches!(&taken, Err(LeaseError::Store(Trouble::Unsupported(why))) if why.contains("leases/")));
    }

    /// A record as version 1 writes it, which later builds must read; the first builds' without a version, too. One of a later version
    /// may be held.
    #[tokio::test]
    async fn lease_version_1() {
        let record = Record { version: 1, holder: "me".into(), expires_ms: 12_345, epoch: 6 };
        let sample = r#"{"version":1,"holder":"me","expires_ms":12345,"epoch":6}"#;
        assert_eq!(serde_json::to_string(&record).unwrap(), sample, "it is written differently now");
        assert_eq!(serde_json::from_str::<Record>(sample).unwrap(), record);
        let early = r#"{"holder":"me","expires_ms":12345,"epoch":6}"#;
        assert_eq!(serde_json::from_str::<Record>(early).unwrap(), record);
        let (store, folder) = (Arc::new(InMemory::new()), Path::from("leases"));
        let bucket = bucket(&store, BootTime::default);
        let later = PutPayload::from(sample.replace(":1,", ":2,"));
        bucket.create(&location(&folder, 7), later).await.unwrap();
        let taken = Lease::take(&bucket, &folder, "a", TERM, soon()).await;
        assert!(matches!(&taken, Err(LeaseError::Store(Trouble::Unsupported(why))) if why.contains("version 2")));
    }
}
