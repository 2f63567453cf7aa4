//! The Object tier without a daemon around it, over a store that can be held up, looked into and made older.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use kvstore::replay;
use kvstore_tiers::host::{BeginFill, FillRequest, HostTier, LeasedBlock, RegisteredLayout};
use kvstore_tiers::object::{ObjectLimits, ObjectOptions, ObjectTier, Offer, Offered, Opened, Verify};
use kvstore_tiers::slots::{FlightSource, Priority, Urgency};
use kvstore_tiers::{BootTime, SequenceHash};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::memory::Memory;
use crate::tier::{hash, now};

/// A request to a [`FakeStore`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// A PUT.
    Put,
    /// A GET.
    Get,
    /// A HEAD.
    Head,
    /// A listing.
    List,
    /// A DELETE.
    Delete,
}

type Hook = Arc<dyn Fn(Request, &Path) -> BoxFuture<'static, ()> + Send + Sync>;

/// A store in memory. What is done before each request, and how old its objects say that they are, a test says.
#[derive(Clone, Default)]
pub struct FakeStore {
    inner: Arc<InMemory>,
    ahead_ms: Arc<AtomicI64>,
    older_ms: Arc<Mutex<HashMap<Path, i64>>>,
    hook: Arc<Mutex<Option<Hook>>>,
    requests: Arc<Mutex<HashMap<String, u64>>>,
}

impl std::fmt::Debug for FakeStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeStore")
    }
}

impl std::fmt::Display for FakeStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeStore")
    }
}

impl FakeStore {
    /// Its clock is ahead of this machine's by so much, from now on, and so is what its objects say.
    pub fn set_clock_ahead(&self, ms: i64) {
        self.ahead_ms.store(ms, Ordering::Relaxed);
    }

    /// An object says that it was written so much earlier.
    pub fn make_older(&self, location: &Path, ms: i64) {
        self.older_ms.lock().insert(location.clone(), ms);
    }

    /// What is done before each request, from now on.
    pub fn before_each(&self, hook: impl Fn(Request, &Path) -> BoxFuture<'static, ()> + Send + Sync + 'static) {
        *self.hook.lock() = Some(Arc::new(hook));
    }

    /// Nothing more.
    pub fn before_none(&self) {
        *self.hook.lock() = None;
    }

    /// Requests of this kind so far.
    pub fn requests(&self, kind: Request) -> u64 {
        self.requests.lock().get(&format!("{kind:?}")).copied().unwrap_or_default()
    }

    /// Names below the root that contain this.
    pub async fn names(&self, part: &str) -> Vec<Path> {
        let all: Vec<ObjectMeta> = self.inner.list(None).try_collect().await.unwrap();
        all.into_iter().map(|object| object.location).filter(|name| name.as_ref().contains(part)).collect()
    }

    /// All packs.
    pub async fn packs(&self) -> Vec<Path> {
        self.names("/ns=").await
    }

    /// Writes an object, whatever is there.
    pub async fn write(&self, location: &Path, bytes: Vec<u8>) {
        self.inner.put(location, bytes.into()).await.unwrap();
        self.older_ms.lock().remove(location);
    }

    /// Reads one.
    pub async fn read(&self, location: &Path) -> Vec<u8> {
        self.inner.get(location).await.unwrap().bytes().await.unwrap().to_vec()
    }

    async fn begin(&self, request: Request, location: &Path) {
        *self.requests.lock().entry(format!("{request:?}")).or_default() += 1;
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook(request, location).await;
        }
    }

    fn aged(&self, mut meta: ObjectMeta) -> ObjectMeta {
        let older_ms = self.older_ms.lock().get(&meta.location).copied().unwrap_or_default();
        meta.last_modified += TimeDelta::milliseconds(self.ahead_ms.load(Ordering::Relaxed) - older_ms);
        meta
    }
}

#[async_trait::async_trait]
impl ObjectStore for FakeStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.begin(Request::Put, location).await;
        let put = self.inner.put_opts(location, payload, options).await?;
        self.older_ms.lock().remove(location);
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.begin(if options.head { Request::Head } else { Request::Get }, location).await;
        let mut got = self.inner.get_opts(location, options).await?;
        got.meta = self.aged(got.meta);
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        let delete = move |location: Result<Path>| {
            let store = store.clone();
            async move {
                let location = location?;
                store.begin(Request::Delete, &location).await;
                store.inner.delete(&location).await?;
                Ok(location)
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, prefix) = (self.clone(), prefix.cloned().unwrap_or_default());
        let aged = self.clone();
        let listing = async move {
            store.begin(Request::List, &prefix).await;
            store.inner.list(Some(&prefix))
        };
        futures::stream::once(listing).flatten().map_ok(move |meta| aged.aged(meta)).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Memory over a [`FakeStore`], and one layout.
pub struct ObjectTiers {
    /// Memory.
    pub host: Arc<HostTier>,
    /// The bucket.
    pub object: Arc<ObjectTier>,
    /// Of all blocks.
    pub layout: Arc<RegisteredLayout>,
    block_bytes: u32,
}

/// How they are made.
#[derive(Clone)]
pub struct ObjectTierOptions {
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Each tier has another.
    pub seed: u64,
    /// The clock since boot.
    pub clock: fn() -> BootTime,
    /// The folder of the upload log.
    pub log_folder: Option<PathBuf>,
    /// A request that brings nothing for this long is made anew.
    pub stall: Duration,
    /// When an upload is read back.
    pub verify: Verify,
}

impl Default for ObjectTierOptions {
    fn default() -> Self {
        Self {
            block_bytes: 5000,
            seed: 1,
            clock: now,
            log_folder: None,
            stall: Duration::from_secs(2),
            verify: Verify::Probe,
        }
    }
}

impl ObjectTiers {
    /// Opens them, and waits for the probe.
    pub async fn open(store: &FakeStore, options: &ObjectTierOptions) -> Self {
        let bytes = 64 << 20;
        let Memory { host, layout } = Memory::new(bytes, options.block_bytes, 1);
        let opened = Opened { store: Arc::new(store.clone()), prefix: Path::from("p") };
        let object = ObjectOptions {
            opened,
            namespaces: vec!["default".to_owned()],
            limits: ObjectLimits { upload_bytes: bytes, backlog_bytes: bytes },
            verify: options.verify,
            stall: options.stall,
            log_folder: options.log_folder.clone(),
            seed: options.seed,
            clock: options.clock,
        };
        let object = ObjectTier::open(object, &host, None).unwrap();
        let tiers = Self { host, object, layout, block_bytes: options.block_bytes };
        let begun = Instant::now();
        while tiers.object.status().state != "SERVING" {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", tiers.object.status());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tiers
    }

    /// Puts block `id` into memory, and leases it.
    pub fn block(&self, id: u64, parent: Option<u64>) -> LeasedBlock {
        let deadline = BootTime(u64::MAX);
        let urgency = Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline };
        let (layout, parent) = (&*self.layout, parent.map(hash));
        let length = self.block_bytes;
        let request = FillRequest { layout, group: 0, hash: hash(id), parent, length, urgency };
        loop {
            match self.host.begin_fill(&request, now()) {
                BeginFill::Fill(mut fill, ahead) => {
                    ahead.into_iter().for_each(|plan| self.host.drop_plan(plan));
                    fill.append(&replay::content(id, length as usize), now()).unwrap();
                    return fill.commit_leased(true).1.unwrap();
                }
                BeginFill::NeedsSlab(plan) => self.host.make_slab(plan).unwrap(),
                BeginFill::Resident => {
                    let key = kvstore_tiers::SlotKey { layout: layout.ordinal, group: 0, hash: hash(id) };
                    return self.host.lease_quietly(layout.namespace, &key).unwrap();
                }
                _ => panic!("no room for block {id}"),
            }
        }
    }

    /// Offers block `id` to the bucket; where it is to be durable, what is told once it is, or is not.
    pub fn offer(&self, id: u64, parent: Option<u64>, durable: bool) -> Option<oneshot::Receiver<bool>> {
        let block = self.block(id, parent);
        let (layout, parent) = (Arc::clone(&self.layout), parent.map(hash));
        let offer = Offer { layout, group: 0, hash: hash(id), parent, block, sums: vec![], durable, has_waited: false };
        match self.object.offer(offer) {
            Offered::Accepted(told) => told,
            Offered::Full => panic!("block {id} is not taken"),
        }
    }

    /// Puts blocks, each the parent of the next. Which of them are acknowledged as DURABLE.
    pub async fn put_durable(&self, ids: Range<u64>) -> Vec<bool> {
        let told: Vec<_> =
            ids.clone().map(|id| self.offer(id, (id > ids.start).then(|| id - 1), true).unwrap()).collect();
        self.object.flush();
        futures::future::join_all(told).await.into_iter().map(|told| told == Ok(true)).collect()
    }

    /// The names of blocks.
    pub fn hashes(&self, ids: Range<u64>) -> Vec<SequenceHash> {
        ids.map(hash).collect()
    }

    /// Which of these blocks are in the bucket, looked for now.
    pub async fn find(&self, ids: Range<u64>) -> Vec<bool> {
        let hashes = self.hashes(ids);
        if let Some(searching) = self.object.search(&self.layout, 0, &hashes, now()) {
            searching.ended().await;
        }
        self.object.presence(&self.layout, 0, &hashes)
    }
}
