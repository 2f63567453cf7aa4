//! A store in memory that ends after so many requests, is slow at random, or has damaged objects.

use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// See the head of this file.
#[derive(Debug)]
pub struct Faulty {
    inner: InMemory,
    /// Requests until it ends; negative once it has. Everything is refused then, as for a process that is gone.
    left: AtomicI64,
    chance: AtomicU64,
    /// Of so many creates, the first one's reply is lost; 0: of none.
    loses_one_in: AtomicU64,
    puts: AtomicU64,
    /// Commits that were sent, and did not arrive yet; `None`: they arrive.
    held: Mutex<Option<Vec<(Path, PutPayload)>>>,
}

impl Faulty {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: InMemory::new(),
            left: AtomicI64::new(i64::MAX),
            chance: AtomicU64::new(0),
            loses_one_in: AtomicU64::new(0),
            puts: AtomicU64::new(0),
            held: Mutex::new(None),
        })
    }

    /// Commits are on their way from now on, and fail for whoever sends them.
    pub fn hold_commits(&self) {
        *self.held.lock().unwrap() = Some(Vec::new());
    }

    /// What was sent arrives, as far as it is not there.
    pub async fn let_commits_arrive(&self) {
        let held = self.held.lock().unwrap().take().unwrap();
        for (location, payload) in held {
            self.inner.put(&location, payload).await.unwrap();
        }
    }

    pub fn end_after(&self, requests: i64) {
        self.left.store(requests, Ordering::SeqCst);
    }

    pub fn has_ended(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }

    pub fn mend(&self) {
        self.end_after(i64::MAX);
        self.lose_replies(0);
    }

    /// Of so many creates, one is done and answered with an error from now on.
    pub fn lose_replies(&self, one_in: u64) {
        self.loses_one_in.store(one_in, Ordering::SeqCst);
    }

    /// Takes away all objects below a prefix.
    pub async fn forget(&self, prefix: &str) {
        let all: Vec<ObjectMeta> = self.inner.list(Some(&Path::from(prefix))).try_collect().await.unwrap();
        for meta in all {
            self.inner.delete(&meta.location).await.unwrap();
        }
    }

    /// Requests take up to a millisecond from now on.
    pub fn slow(&self, seed: u64) {
        self.chance.store(seed << 1 | 1, Ordering::SeqCst);
    }

    async fn may_pass(&self) -> Result<()> {
        let chance = self.chance.load(Ordering::SeqCst);
        if chance > 0 {
            let next = chance.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F) | 1;
            self.chance.store(next, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_micros(next >> 54)).await;
        }
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            left if left > 0 => Ok(()),
            // What is refused so is not tried again.
            _ => Err(Error::PermissionDenied { path: "ended".into(), source: "the test ended it".into() }),
        }
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("faulty")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.may_pass().await?;
        if location.filename() == Some("COMMIT")
            && let Some(held) = &mut *self.held.lock().unwrap()
        {
            held.push((location.clone(), payload));
            return Err(Error::Generic { store: "faulty", source: "no answer".into() });
        }
        let put = self.inner.put_opts(location, payload, opts).await;
        let one_in = self.loses_one_in.load(Ordering::SeqCst);
        if one_in > 0 && self.puts.fetch_add(1, Ordering::SeqCst).is_multiple_of(one_in) {
            return Err(Error::Generic { store: "faulty", source: "the reply was lost".into() });
        }
        put
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.may_pass().await?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            left if left > 0 => self.inner.delete_stream(locations),
            _ => {
                let ended = || Error::PermissionDenied { path: "ended".into(), source: "the test ended it".into() };
                Box::pin(futures::stream::once(async move { Err(ended()) }))
            }
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            left if left > 0 => self.inner.list(prefix),
            _ => {
                let ended = || Error::PermissionDenied { path: "ended".into(), source: "the test ended it".into() };
                Box::pin(futures::stream::once(async move { Err(ended()) }))
            }
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// What a store may have made of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Cut,
    Empty,
    Foreign,
    /// One bit of the bytes.
    Bit,
    Gone,
}

pub const DAMAGES: [Damage; 5] = [Damage::Cut, Damage::Empty, Damage::Foreign, Damage::Bit, Damage::Gone];

impl Damage {
    /// A save that looks at an object's end alone sees it.
    pub fn shows_in_the_footer(self) -> bool {
        self != Self::Bit
    }
}

/// All objects.
pub async fn names(memory: &InMemory) -> Vec<String> {
    let all: Vec<ObjectMeta> = memory.list(None).try_collect().await.unwrap();
    all.into_iter().map(|meta| meta.location.to_string()).collect()
}

/// Damages the largest chunk: its name.
pub async fn hurt_a_chunk(memory: &InMemory, damage: Damage) -> String {
    let prefix = Path::from("snapshots/v1/chunks");
    let all: Vec<ObjectMeta> = memory.list(Some(&prefix)).try_collect().await.unwrap();
    let largest = all.into_iter().max_by_key(|meta| meta.size).unwrap().location;
    let mut bytes = memory.get(&largest).await.unwrap().bytes().await.unwrap().to_vec();
    match damage {
        Damage::Cut => bytes.truncate(bytes.len() / 2),
        Damage::Empty => bytes.clear(),
        Damage::Foreign => bytes = b"<html>not found</html>".repeat(10),
        Damage::Bit => bytes[1000] ^= 4,
        Damage::Gone => {}
    }
    match damage {
        Damage::Gone => memory.delete(&largest).await.unwrap(),
        _ => drop(memory.put(&largest, bytes.into()).await.unwrap()),
    }
    largest.filename().unwrap().to_owned()
}
