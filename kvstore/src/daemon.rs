//! The daemon's state and its background work: it ticks, reloads and drains. This file does not know the wire types.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use kvstore_tiers::host::{HoldId, HostOptions, HostTier, NamespaceId, NamespaceLimits, namespace_digest};
use kvstore_tiers::nvme::{NvmeNamespace, NvmeOptions, NvmeTier, OpenError};
use kvstore_tiers::object::{ObjectOptions, ObjectTier, OpenObjectError};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};

use crate::accesses::Accesses;
use crate::admission::Admitter;
use crate::caps;
use crate::clock;
use crate::config::{self, Change, Config, ConfigError, NamespacePolicy, NvmeConfig, ObjectConfig, RawConfig, Uploads};
use crate::publisher::Describing;
use crate::telemetry::{LogControl, Traffic};
use crate::verbs::prefetch::Prefetches;

/// Everything that calls share.
pub struct Daemon {
    /// Blocks in memory.
    pub host: Arc<HostTier>,
    /// Blocks on disk, where there is such a tier.
    pub nvme: Option<Arc<NvmeTier>>,
    /// Blocks in a bucket, where there is such a tier.
    pub object: Option<Arc<ObjectTier>>,
    /// What happened since the start.
    pub traffic: Traffic,
    /// Prefetches under way.
    pub prefetches: Prefetches,
    /// What was asked for lately, in part.
    pub accesses: Accesses,
    /// What goes to disk.
    pub admitter: Admitter,
    /// Put and get calls that may still start.
    pub data_calls: Arc<Semaphore>,
    /// Blocks that gets may still lease.
    pub leasable: Arc<Semaphore>,
    /// Verifications that may still start.
    pub verifications: Arc<Semaphore>,
    /// Collections of the bucket's garbage that may still start.
    pub collections: Arc<Semaphore>,
    /// Routers that may still follow.
    pub watches: Arc<Semaphore>,
    /// When this process started.
    pub started: Instant,
    /// Grows with every start.
    pub epoch: u64,
    config: ArcSwap<Config>,
    sources: Mutex<Sources>,
    namespaces: Vec<String>,
    draining: AtomicBool,
    in_flight: AtomicU64,
    idle: Notify,
    log: LogControl,
    stopping: watch::Sender<bool>,
    describing: OnceLock<Describing>,
    copy_rate: OnceLock<f64>,
}

/// Where the configuration comes from, to read it again.
pub struct Sources {
    /// The file.
    pub file: Option<PathBuf>,
    /// `--set` flags.
    pub settings: Vec<String>,
    /// `--listen` flags.
    pub listen: Vec<String>,
    /// What is in force, as written.
    pub raw: RawConfig,
}

impl Sources {
    /// Reads file, environment and flags anew.
    pub fn read(&self) -> Result<RawConfig, ConfigError> {
        let mut raw = config::load_raw(self.file.as_deref(), std::env::vars(), &self.settings)?;
        if !self.listen.is_empty() {
            raw.listen_on(&self.listen);
        }
        Ok(raw)
    }
}

/// Keeps a call counted as in flight.
pub struct InFlight(Arc<Daemon>);

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl Daemon {
    /// A daemon that serves nobody yet, in the current runtime. Reads the indexes of its disks: takes a second or so a million
    /// blocks.
    pub fn new(config: Config, sources: Sources, log: LogControl) -> Result<Arc<Self>, StartError> {
        let namespaces = config.namespaces();
        let epoch = clock::now().0;
        let seed = random_u128() as u64;
        let options = HostOptions {
            limits: config.host,
            huge_pages: config.huge_pages,
            policy: config.eviction,
            seed,
            epoch,
            bytes_ceiling: config::memory_bytes(),
        };
        let host = HostTier::new(options, &namespaces);
        host.set_namespace_limits(limits_of(&config, &namespaces));
        let nvme = match &config.nvme {
            Some(nvme) => Some(NvmeTier::open(&nvme_options(nvme), &host)?),
            None => None,
        };
        if let Some(nvme) = &nvme {
            nvme.set_namespaces(nvme_namespaces(&config));
        }
        let object = match &config.object {
            Some(object) => Some(open_object(object, &config, &namespaces, &host, nvme.as_ref())?),
            None => None,
        };
        Ok(Arc::new(Self {
            host,
            nvme,
            object,
            traffic: Traffic::default(),
            prefetches: Prefetches::default(),
            accesses: Accesses::default(),
            admitter: Admitter::new(&config, &namespaces, clock::now()),
            data_calls: Arc::new(Semaphore::new(caps::DATA_CALLS_MAX)),
            leasable: Arc::new(Semaphore::new(caps::LEASED_BLOCKS_MAX)),
            verifications: Arc::new(Semaphore::new(caps::VERIFICATIONS_MAX)),
            collections: Arc::new(Semaphore::new(caps::COLLECTIONS_MAX)),
            watches: Arc::new(Semaphore::new(caps::WATCHES_MAX)),
            started: Instant::now(),
            epoch,
            config: ArcSwap::from_pointee(config),
            sources: Mutex::new(sources),
            namespaces,
            draining: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
            idle: Notify::new(),
            log,
            stopping: watch::Sender::new(false),
            describing: OnceLock::new(),
            copy_rate: OnceLock::new(),
        }))
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// The same, as TOML, without secrets.
    pub fn config_toml(&self) -> String {
        self.sources.lock().raw.without_secrets().to_toml()
    }

    /// Which blocks of this namespace go to the bucket.
    pub fn uploads_of(&self, namespace: NamespaceId) -> Uploads {
        let name = self.namespaces.get(namespace.0).filter(|_| self.object.is_some());
        name.map_or(Uploads::Asked, |name| self.config().uploads_of(name))
    }

    /// The namespaces' names, in the order of their numbers.
    pub fn namespaces(&self) -> &[String] {
        &self.namespaces
    }

    /// The namespace with this name.
    pub fn namespace(&self, name: &str) -> Option<NamespaceId> {
        self.namespaces.iter().position(|known| known == name).map(NamespaceId)
    }

    /// Reads the configuration's sources again and applies what may change live: all or nothing.
    pub fn reload(&self) -> Result<Vec<Change>, ConfigError> {
        let mut sources = self.sources.lock();
        let raw = sources.read()?;
        self.apply(&mut sources, raw)
    }

    /// Changes keys that may change live: all or nothing.
    pub fn set_config(&self, values: &[(String, String)]) -> Result<Vec<Change>, ConfigError> {
        let mut sources = self.sources.lock();
        let mut raw = sources.raw.clone();
        for (key, value) in values {
            raw.set(key, value)?;
        }
        self.apply(&mut sources, raw)
    }

    fn apply(&self, sources: &mut Sources, raw: RawConfig) -> Result<Vec<Change>, ConfigError> {
        let new = raw.check()?;
        let changes = config::changes(&self.config.load(), &new)?;
        if let (Some(tier), Some(nvme)) = (&self.nvme, &new.nvme) {
            tier.check_bytes(nvme.bytes).map_err(|refused| config::invalid("nvme.bytes", refused.to_string()))?;
        }
        self.host.set_limits(new.host);
        self.host.set_namespace_limits(limits_of(&new, &self.namespaces));
        if let (Some(tier), Some(nvme)) = (&self.nvme, &new.nvme) {
            tier.set_limits(nvme.bytes, nvme.dirty_bytes);
            tier.set_namespaces(nvme_namespaces(&new));
        }
        self.admitter.set(&new, &self.namespaces, clock::now());
        if let (Some(tier), Some(object)) = (&self.object, &new.object) {
            tier.set_limits(object.limits);
        }
        self.log.set_level(&new.log_level);
        self.config.store(Arc::new(new));
        sources.raw = raw;
        for change in &changes {
            tracing::info!(key = change.key, from = change.from, to = change.to, "configuration changed");
        }
        Ok(changes)
    }

    /// Turns true when those who follow the daemon's blocks are to be sent away.
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Sends away those who follow.
    pub fn end_watches(&self) {
        self.stopping.send_replace(true);
    }

    /// Where blocks are described, where events are published.
    pub fn describing(&self) -> Option<&Describing> {
        self.describing.get()
    }

    /// Events are published from now on.
    pub fn set_describing(&self, describing: Describing) {
        let _ = self.describing.set(describing);
    }

    /// Bytes a second that one thread copies in memory: measured at the first call, for some 20 ms.
    pub fn copy_rate(&self) -> f64 {
        *self.copy_rate.get_or_init(|| {
            let from = vec![1u8; caps::COPY_MEASURED_BYTES];
            let mut to = vec![0u8; caps::COPY_MEASURED_BYTES];
            let copy = |_| {
                let started = Instant::now();
                to.copy_from_slice(std::hint::black_box(&from));
                std::hint::black_box(&to);
                started.elapsed()
            };
            let fastest = (0..4).map(copy).min().unwrap_or_default();
            from.len() as f64 / fastest.as_secs_f64().max(1e-9)
        })
    }

    /// Counts a call as in flight; `None` while draining.
    pub fn enter(self: &Arc<Self>) -> Option<InFlight> {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        let guard = InFlight(Arc::clone(self));
        (!self.is_draining()).then_some(guard)
    }

    /// True once new work is refused.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Refuses new work and waits up to `deadline` for what is in flight. What is left then.
    pub async fn drain(&self, deadline: Duration) -> u64 {
        if !self.draining.swap(true, Ordering::AcqRel) {
            tracing::info!("the daemon is draining: it refuses new calls");
        }
        let wait = async {
            loop {
                let idle = self.idle.notified();
                tokio::pin!(idle);
                idle.as_mut().enable();
                if self.in_flight.load(Ordering::Acquire) == 0 {
                    return;
                }
                idle.await;
            }
        };
        let _ = tokio::time::timeout(deadline, wait).await;
        self.in_flight.load(Ordering::Acquire)
    }

    /// Background work, until the runtime ends.
    pub async fn tick_forever(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(caps::TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let daemon = Arc::clone(&self);
            // Shrinking unmaps slabs, which takes milliseconds each.
            let tick = move || {
                daemon.host.tick(clock::now());
                daemon.nvme.iter().for_each(|nvme| nvme.tick(clock::now()));
                daemon.object.iter().for_each(|object| object.tick());
            };
            if let Err(error) = tokio::task::spawn_blocking(tick).await {
                tracing::error!(%error, "the background work of the tiers failed; trying again");
            }
            self.prefetches.forget_old(clock::now());
        }
    }
}

/// What each namespace may have of the memory, in their order.
fn limits_of(config: &Config, namespaces: &[String]) -> impl Iterator<Item = NamespaceLimits> {
    namespaces.iter().map(|name| config.host_limits_of(name))
}

/// What each namespace may have of the disks.
fn nvme_namespaces(config: &Config) -> Vec<NvmeNamespace> {
    let of = |(name, policy): (&String, &NamespacePolicy)| NvmeNamespace {
        digest: namespace_digest(name),
        bytes: policy.nvme_bytes,
        ttl_ms: policy.ttl.map(|ttl| ttl.as_millis() as u64),
    };
    config.policies.iter().map(of).collect()
}

/// Why a daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A disk.
    #[error(transparent)]
    Nvme(#[from] OpenError),
    /// The object store.
    #[error("cannot open the object store of object.url")]
    Object(#[from] OpenObjectError),
}

fn open_object(
    object: &ObjectConfig,
    config: &Config,
    namespaces: &[String],
    host: &Arc<HostTier>,
    nvme: Option<&Arc<NvmeTier>>,
) -> Result<Arc<ObjectTier>, OpenObjectError> {
    let options = ObjectOptions {
        opened: object.url.open()?,
        namespaces: namespaces.to_vec(),
        limits: object.limits,
        stall: object.stall,
        log_folder: config.nvme.as_ref().and_then(|nvme| nvme.paths.first().cloned()),
        seed: random_u128() as u64,
        clock: clock::now,
    };
    ObjectTier::open(options, host, nvme)
}

/// What the Nvme tier is made with.
pub fn nvme_options(config: &NvmeConfig) -> NvmeOptions {
    NvmeOptions {
        paths: config.paths.clone(),
        bytes: config.bytes,
        index_bytes: config.index_bytes,
        dirty_bytes: config.dirty_bytes,
        engine: config.engine,
        boot_id: config::boot_id(),
        now: clock::now(),
        faults: None,
    }
}

/// A name that another client cannot guess.
pub fn random_hold_id() -> HoldId {
    HoldId(random_u128())
}

/// SipHash under a key from the system's random source, of a counter: distinct, and not to be guessed.
fn random_u128() -> u128 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    u128::from(KEY.hash_one((count, 0u8))) << 64 | u128::from(KEY.hash_one((count, 1u8)))
}
