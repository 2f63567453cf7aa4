//! Requests to the store: one that fails is made again, with jitter and within a budget, until its deadline; a store that fails
//! again and again is left alone for a while.
//!
//! What a caller sees of a request: its answer, or one [`Trouble`]. A body is read by the caller, within the try.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio::time::error::Elapsed;

use super::clock::StoreClock;
use super::swap::{Answered, Swap};
use crate::boot::BootTime;
use crate::caps;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// There is no such object.
    #[error("the object does not exist")]
    NotFound,
    /// There is one already, or another writer is at it just now.
    #[error("the object already exists")]
    Exists,
    /// The store does not do this.
    #[error("the store does not support this request: {0}")]
    Unsupported(String),
    /// Credentials or rights.
    #[error("the store refuses the request: {0}")]
    Denied(String),
    /// The store failed, or did not answer in time, each time.
    #[error("{0}")]
    Failed(String),
    /// The store failed often: it is left alone for a moment.
    #[error("the store failed several times and gets no requests for a moment: {0}")]
    Away(String),
    /// What it answered is not what was stored.
    #[error("the store's answer is damaged: {0}")]
    Damaged(String),
    /// The object ends before what was asked for does: it was cut, and stays so, however often it is asked for.
    #[error("the object has {bytes} bytes, but {needed} were expected")]
    Cut {
        /// What it has.
        bytes: u64,
        /// What it was to have at least.
        needed: u64,
    },
    /// Whoever asked has no right to it any more.
    #[error("the lease that this request needs is over")]
    Fenced,
}

impl Trouble {
    fn of(error: Error) -> Self {
        match error {
            Error::NotFound { .. } => Self::NotFound,
            Error::AlreadyExists { .. } | Error::Precondition { .. } => Self::Exists,
            Error::NotSupported { .. } | Error::NotImplemented { .. } => Self::Unsupported(error.to_string()),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Self::Denied(error.to_string()),
            other => Self::Failed(short(&other)),
        }
    }

    /// True where the same request may succeed a moment later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::Away(_) | Self::Damaged(_))
    }
}

/// True where a ranged read may have failed because the object has nothing there: a server says 416; other stores have no number.
fn may_be_cut(error: &Error, answered: Answered) -> bool {
    const RANGE_NOT_SATISFIABLE: u16 = 416;
    let says_so = matches!(answered, Answered::NoHttp | Answered::Status(RANGE_NOT_SATISFIABLE));
    says_so && matches!(error, Error::Generic { .. })
}

/// An error in one line, its causes included: what a client prints of a failed request can be a page of XML.
fn short(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(300).collect()
}

/// What requests came to.
#[derive(Debug, Default)]
pub struct RequestCounts {
    /// Requests, retries included.
    pub requests: AtomicU64,
    /// Of those, retries.
    pub retries: AtomicU64,
    /// Tries that failed.
    pub failures: AtomicU64,
}

/// Makes a request (a future, built anew for each try) until it is answered, the deadline has come, or it has failed too often.
/// A macro, for the future may borrow what the caller changes between tries.
#[macro_export]
macro_rules! retried {
    ($bucket:expr, $deadline:expr, $bytes:expr, $request:expr) => {{
        let mut tries = $bucket.tries($deadline, $bytes);
        loop {
            let until = match tries.begin() {
                Ok(until) => until,
                Err(trouble) => break Err(trouble),
            };
            let answer = tokio::time::timeout_at(until, $request).await;
            if let Some(answer) = tries.end(answer).await {
                break answer;
            }
        }
    }};
}

/// See [`Bucket::tries`].
pub struct Tries<'a> {
    bucket: &'a Bucket,
    deadline: Instant,
    each: Duration,
    tries: u32,
}

impl Tries<'_> {
    /// A try begins: until when it has to be answered.
    pub fn begin(&mut self) -> Result<Instant, Trouble> {
        self.bucket.may_pass()?;
        self.bucket.counts.requests.fetch_add(1, Ordering::Relaxed);
        Ok(self.deadline.min(Instant::now() + self.each))
    }

    /// It ended: what the request came to, or nothing, where it is to be made again now.
    pub async fn end<T>(&mut self, answer: Result<Result<T, Trouble>, Elapsed>) -> Option<Result<T, Trouble>> {
        let late = |_| Trouble::Failed(format!("the store did not answer within {:?}, or by the deadline", self.each));
        let trouble = match answer.map_err(late).flatten() {
            Err(trouble) if trouble.is_passing() => trouble,
            answer => {
                // A refusal is an answer, too.
                self.bucket.succeeded();
                return Some(answer);
            }
        };
        self.bucket.failed(&trouble);
        self.tries += 1;
        let pause = self.bucket.backoff(self.tries);
        let late = Instant::now() + pause >= self.deadline;
        if late || self.tries >= caps::OBJECT_TRIES_MAX || !self.bucket.take_retry() {
            return Some(Err(trouble));
        }
        self.bucket.counts.retries.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(pause).await;
        None
    }
}

/// A store, and how it has been lately.
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    stall: Duration,
    now: fn() -> BootTime,
    /// What requests came to.
    pub counts: RequestCounts,
    /// The store's own time.
    pub clock: StoreClock,
    /// Retries that may be made now, times 100.
    budget: AtomicI64,
    in_a_row: AtomicU32,
    /// Until when it is left alone, and why.
    away: Mutex<Option<(Instant, String)>>,
    salt: AtomicU64,
}

impl Bucket {
    /// A store that nothing is known of.
    pub fn new(store: Arc<dyn ObjectStore>, stall: Duration, now: fn() -> BootTime) -> Self {
        Self {
            store,
            stall,
            now,
            clock: StoreClock::default(),
            counts: RequestCounts::default(),
            budget: AtomicI64::new(caps::OBJECT_RETRIES_SAVED as i64 * 100),
            in_a_row: AtomicU32::new(0),
            away: Mutex::new(None),
            salt: AtomicU64::new(0),
        }
    }

    /// The time, by this machine's clock since boot.
    pub fn now(&self) -> BootTime {
        (self.now)()
    }

    /// Why the store is left alone now, if it is.
    pub fn away(&self) -> Option<String> {
        let away = self.away.lock();
        away.as_ref().map(|(_, why)| why.clone())
    }

    /// How long a request may bring nothing.
    pub fn stall(&self) -> Duration {
        self.stall
    }

    /// True while no request would be made.
    pub fn is_away(&self) -> bool {
        self.away.lock().as_ref().is_some_and(|(until, _)| Instant::now() < *until)
    }

    /// One may pass once the time is over, and the next after as long again.
    fn may_pass(&self) -> Result<(), Trouble> {
        let mut away = self.away.lock();
        match away.as_mut() {
            Some((until, why)) if Instant::now() < *until => Err(Trouble::Away(why.clone())),
            Some((until, _)) => {
                *until = Instant::now() + Duration::from_millis(caps::OBJECT_AWAY_MS);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn succeeded(&self) {
        let saved = self.budget.load(Ordering::Relaxed);
        if saved < caps::OBJECT_RETRIES_SAVED as i64 * 100 {
            self.budget.fetch_add(caps::OBJECT_RETRY_PERCENT as i64, Ordering::Relaxed);
        }
        if self.in_a_row.swap(0, Ordering::Relaxed) >= caps::OBJECT_FAILURES_IN_A_ROW_MAX
            && self.away.lock().take().is_some()
        {
            tracing::info!("the object store answers again");
        }
    }

    fn failed(&self, trouble: &Trouble) {
        self.counts.failures.fetch_add(1, Ordering::Relaxed);
        if matches!(trouble, Trouble::Damaged(_)) {
            // It answers: some damaged packs must not make the sound ones misses.
            return;
        }
        if self.in_a_row.fetch_add(1, Ordering::Relaxed) + 1 < caps::OBJECT_FAILURES_IN_A_ROW_MAX {
            return;
        }
        let mut away = self.away.lock();
        if away.is_none() {
            tracing::warn!(%trouble, "the object store does not answer; until it does, its blocks are misses and uploads wait");
        }
        let until = Instant::now() + Duration::from_millis(caps::OBJECT_AWAY_MS);
        *away = Some((until, trouble.to_string()));
    }

    fn take_retry(&self) -> bool {
        let taken =
            self.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| (left >= 100).then(|| left - 100));
        taken.is_ok()
    }

    /// How long to wait before the try after `tries`: between half and all of the doubled time.
    pub fn backoff(&self, tries: u32) -> Duration {
        let whole = (caps::OBJECT_BACKOFF_MS << tries.min(10)).min(caps::OBJECT_BACKOFF_MS_MAX);
        let salt = self.salt.fetch_add(1, Ordering::Relaxed) ^ u64::from(std::process::id()) << 32;
        let random = xxhash_rust::xxh3::xxh3_64(&salt.to_le_bytes());
        Duration::from_millis(whole / 2 + random % (whole / 2 + 1))
    }

    /// The time of one try: that of a stall, and of `bytes` at 2 MB/s.
    pub fn time_of_try(&self, bytes: u64) -> Duration {
        self.stall + Duration::from_millis(bytes / 2000)
    }

    /// The tries of one request of so many bytes: see [`retried`].
    pub fn tries(&self, deadline: Instant, bytes: u64) -> Tries<'_> {
        Tries { bucket: self, deadline, each: self.time_of_try(bytes), tries: 0 }
    }

    /// One try of a create-only PUT.
    pub async fn create(&self, location: &Path, payload: PutPayload) -> Result<(), Trouble> {
        let put = self.store.put_opts(location, payload, PutMode::Create.into()).await;
        put.map(drop).map_err(Trouble::of)
    }

    /// One try of a PUT under a condition.
    pub async fn put(&self, location: &Path, payload: PutPayload, mode: PutMode) -> Result<Option<String>, Trouble> {
        let put = self.store.put_opts(location, payload, mode.into()).await;
        put.map(|put| put.e_tag).map_err(Trouble::of)
    }

    /// One try of a PUT of `sent`, instead of which `swap` arrives.
    pub(super) async fn create_swapped(&self, location: &Path, sent: PutPayload, swap: Swap) -> Result<(), Trouble> {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        let mut options = PutOptions::from(PutMode::Create);
        options.extensions.insert(swap);
        self.store.put_opts(location, sent, options).await.map(drop).map_err(Trouble::of)
    }

    /// One try of a GET; the body has yet to be read. An object that ends before the range does is [`Trouble::Cut`], which is an
    /// answer, and no failure of the store.
    pub async fn get(&self, location: &Path, range: Range<u64>) -> Result<GetResult, Trouble> {
        let mut options = GetOptions { range: Some(range.clone().into()), ..GetOptions::default() };
        let seen = Swap::default();
        options.extensions.insert(seen.clone());
        let (bytes, got) = match self.store.get_opts(location, options).await {
            Ok(got) => (got.meta.size, Ok(got)),
            Err(error) if may_be_cut(&error, seen.answered()) => {
                (self.head_once_more(location).await?, Err(Trouble::of(error)))
            }
            Err(error) => return Err(Trouble::of(error)),
        };
        match bytes < range.end {
            true => Err(Trouble::Cut { bytes, needed: range.end }),
            false => got,
        }
    }

    /// How long an object is: asked within another request.
    async fn head_once_more(&self, location: &Path) -> Result<u64, Trouble> {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        self.head_once(location).await.map(|meta| meta.size)
    }

    /// A part of an object, whole, and the object's size; a body of another length is damaged.
    pub async fn read(
        &self,
        location: &Path,
        range: Range<u64>,
        deadline: Instant,
    ) -> Result<(Bytes, ObjectMeta), Trouble> {
        let bytes = range.end - range.start;
        retried!(self, deadline, bytes, self.read_once(location, range.clone()))
    }

    /// One try of the same.
    pub async fn read_once(&self, location: &Path, range: Range<u64>) -> Result<(Bytes, ObjectMeta), Trouble> {
        let bytes = range.end - range.start;
        let got = self.get(location, range).await?;
        let meta = got.meta.clone();
        let body = got.bytes().await.map_err(Trouble::of)?;
        if body.len() as u64 == bytes {
            Ok((body, meta))
        } else {
            Err(Trouble::Damaged(format!("the body has {} bytes instead of {bytes}", body.len())))
        }
    }

    /// An object, whole, where it has at most `bytes_max`.
    pub async fn read_all(
        &self,
        location: &Path,
        bytes_max: u64,
        deadline: Instant,
    ) -> Result<(Bytes, ObjectMeta), Trouble> {
        retried!(self, deadline, bytes_max, self.read_all_once(location, bytes_max))
    }

    async fn read_all_once(&self, location: &Path, bytes_max: u64) -> Result<(Bytes, ObjectMeta), Trouble> {
        let got = self.store.get_opts(location, GetOptions::default()).await.map_err(Trouble::of)?;
        let meta = got.meta.clone();
        if meta.size > bytes_max {
            return Err(Trouble::Unsupported(format!("{location} has {} bytes, which is too many", meta.size)));
        }
        let body = got.bytes().await.map_err(Trouble::of)?;
        if body.len() as u64 == meta.size {
            Ok((body, meta))
        } else {
            Err(Trouble::Damaged(format!("the body has {} bytes instead of {}", body.len(), meta.size)))
        }
    }

    /// What the store knows of an object.
    pub async fn head(&self, location: &Path, deadline: Instant) -> Result<ObjectMeta, Trouble> {
        retried!(self, deadline, 0, self.head_once(location))
    }

    /// One try of the same.
    pub async fn head_once(&self, location: &Path) -> Result<ObjectMeta, Trouble> {
        self.store.head(location).await.map_err(Trouble::of)
    }

    /// Objects below `prefix`, at most so many.
    pub async fn list(&self, prefix: &Path, most: usize, deadline: Instant) -> Result<Vec<ObjectMeta>, Trouble> {
        retried!(self, deadline, 0, self.list_once(prefix, most))
    }

    /// All objects below `prefix`, as they are listed. Not repeated where it fails: whoever reads it begins anew.
    pub fn stream(&self, prefix: &Path) -> BoxStream<'static, Result<ObjectMeta, Trouble>> {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        self.store.list(Some(prefix)).map_err(Trouble::of).boxed()
    }

    async fn list_once(&self, prefix: &Path, most: usize) -> Result<Vec<ObjectMeta>, Trouble> {
        let mut found = Vec::new();
        let mut objects = self.store.list(Some(prefix));
        while found.len() < most
            && let Some(object) = objects.try_next().await.map_err(Trouble::of)?
        {
            found.push(object);
        }
        Ok(found)
    }

    /// Deletes an object; one that is not there is deleted.
    pub async fn delete(&self, location: &Path, deadline: Instant) -> Result<(), Trouble> {
        self.delete_while(location, deadline, || true).await
    }

    /// The same, as long as `may` says so: asked each time before a byte of the request may leave, so that whoever slept through
    /// the end of its right deletes nothing when it wakes.
    pub async fn delete_while(
        &self,
        location: &Path,
        deadline: Instant,
        may: impl Fn() -> bool,
    ) -> Result<(), Trouble> {
        let delete = async || match fenced(&may, self.store.delete(location)).await {
            Some(deleted) => deleted.map_err(Trouble::of),
            None => Err(Trouble::Fenced),
        };
        match retried!(self, deadline, 0, delete()) {
            Err(Trouble::NotFound) => Ok(()),
            other => other,
        }
    }
}

/// Goes on with `future` as long as `may` says so.
async fn fenced<F: Future>(may: impl Fn() -> bool, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    std::future::poll_fn(|context| match may() {
        true => future.as_mut().poll(context).map(Some),
        false => std::task::Poll::Ready(None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A few damaged packs that were read at once made the whole store count as away for a second.
    #[test]
    fn damaged_bodies_are_no_absence() {
        let bucket =
            Bucket::new(Arc::new(object_store::memory::InMemory::new()), Duration::from_secs(1), BootTime::default);
        (0..100).for_each(|_| bucket.failed(&Trouble::Damaged("a flipped byte".into())));
        assert!(!bucket.is_away());
        (0..caps::OBJECT_FAILURES_IN_A_ROW_MAX).for_each(|_| bucket.failed(&Trouble::Failed("500".into())));
        assert!(bucket.is_away());
    }
}
