//! The daemon's state: what all calls share. Knows no listener, no request and no reply.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvstore_checkpoint::store::Store;
use kvstore_tiers::Tier;
use kvstore_tiers::below::Below;
use kvstore_tiers::host::{HostTier, NamespaceId};
use kvstore_tiers::nvme::NvmeTier;
use kvstore_tiers::object::ObjectTier;
use kvstore_tiers::stack::Stack;
use tokio::sync::{Semaphore, watch};

use crate::accesses::Accesses;
use crate::calls::Calls;
use crate::config::{self, Change, Config, ConfigError};
use crate::data_calls::DataCalls;
use crate::describing::Describing;
use crate::log::LogControl;
use crate::open::{self, OpenTiers, StartError};
use crate::prefetches::Prefetches;
use crate::prewarms::Prewarms;
use crate::sources::{InForce, Sources};
use crate::telemetry::Traffic;
use crate::{caps, clock, copy_rate, descriptors};

pub use crate::calls::InFlight;
pub use crate::random::random_hold_id;

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
    /// Snapshots, where the daemon knows any.
    pub snapshots: Option<Store>,
    /// Snapshots on their way into memory or onto the disk.
    pub prewarms: Arc<Prewarms>,
    /// What was asked for lately, in part.
    pub accesses: Accesses,
    /// Memory and the tiers below it: what moves between them.
    pub stack: Arc<Stack>,
    /// Calls in flight.
    pub calls: Arc<Calls>,
    /// Put and get calls that may still start.
    pub data_calls: Arc<DataCalls>,
    /// Blocks that gets may still lease.
    pub leasable: Arc<Semaphore>,
    /// Verifications that may still start.
    pub verifications: Arc<Semaphore>,
    /// Verifications of snapshots that may still start.
    pub snapshot_verifications: Arc<Semaphore>,
    /// Collections of the bucket's garbage that may still start.
    pub collections: Arc<Semaphore>,
    /// Routers that may still follow.
    pub watches: Arc<Semaphore>,
    /// When this process started.
    pub started: Instant,
    /// Grows with every start.
    pub epoch: u64,
    in_force: InForce,
    namespaces: Vec<String>,
    log: LogControl,
    stopping: watch::Sender<bool>,
    describing: OnceLock<Describing>,
    copy_rate: OnceLock<f64>,
}

impl Daemon {
    /// A daemon that serves nobody yet, in the current runtime. Reads the indexes of its disks: takes a second or so a million
    /// blocks.
    pub fn new(config: Config, sources: Sources, log: LogControl) -> Result<Arc<Self>, StartError> {
        let namespaces = config.namespaces();
        let epoch = clock::now().0;
        let OpenTiers { host, nvme, object } = open::open_tiers(&config, &namespaces, epoch)?;
        if let Err(error) = host.keep_ready(memory_to_spare) {
            tracing::warn!(%error, "there is no thread that makes memory ready ahead of need");
        }
        let snapshots = config.snapshots.as_ref().map(|snapshots| Store::open(&snapshots.url)).transpose()?;
        let disk = nvme.clone().map(|nvme| (Tier::Nvme, nvme as Arc<dyn Below>));
        let bucket = object.clone().map(|object| (Tier::Object, object as Arc<dyn Below>));
        let stack = Stack::new(&host, disk.into_iter().chain(bucket), clock::now);
        stack.set_rules(config.admission_rules(&namespaces));
        Ok(Arc::new(Self {
            host,
            nvme,
            object,
            traffic: Traffic::default(),
            prefetches: Prefetches::default(),
            snapshots,
            prewarms: Arc::default(),
            accesses: Accesses::default(),
            stack,
            calls: Arc::default(),
            data_calls: DataCalls::new(namespaces.len()),
            leasable: Arc::new(Semaphore::new(caps::LEASED_BLOCKS_MAX)),
            verifications: Arc::new(Semaphore::new(caps::VERIFICATIONS_MAX)),
            snapshot_verifications: Arc::new(Semaphore::new(caps::SNAPSHOT_VERIFICATIONS_MAX)),
            collections: Arc::new(Semaphore::new(caps::COLLECTIONS_MAX)),
            watches: Arc::new(Semaphore::new(caps::WATCHES_MAX)),
            started: Instant::now(),
            epoch,
            in_force: InForce::new(config, sources),
            namespaces,
            log,
            stopping: watch::Sender::new(false),
            describing: OnceLock::new(),
            copy_rate: OnceLock::new(),
        }))
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.in_force.config()
    }

    /// The same, as TOML, without secrets.
    pub fn config_toml(&self) -> String {
        self.in_force.toml()
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
        self.in_force.reload(|new| self.apply(new))
    }

    /// Changes keys that may change live: all or nothing.
    pub fn set_config(&self, values: &[(String, String)]) -> Result<Vec<Change>, ConfigError> {
        self.in_force.set(values, |new| self.apply(new))
    }

    fn apply(&self, new: &Config) -> Result<(), ConfigError> {
        if let (Some(tier), Some(nvme)) = (&self.nvme, &new.nvme) {
            tier.check_bytes(nvme.bytes).map_err(|refused| config::invalid("nvme.bytes", refused.to_string()))?;
        }
        self.host.set_ready_bytes(new.host_ready_bytes);
        self.host.set_limits(new.host);
        self.host.set_namespace_limits(open::host_limits(new, &self.namespaces));
        if let (Some(tier), Some(nvme)) = (&self.nvme, &new.nvme) {
            tier.set_limits(nvme.bytes, nvme.dirty_bytes);
            tier.set_namespaces(open::nvme_namespaces(new));
        }
        self.stack.set_rules(new.admission_rules(&self.namespaces));
        if let (Some(tier), Some(object)) = (&self.object, &new.object) {
            tier.set_limits(object.limits);
        }
        self.log.set_level(&new.log_level);
        // Smaller bounds are reached in the background.
        self.calls.wake();
        Ok(())
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
        *self.copy_rate.get_or_init(copy_rate::measure)
    }

    /// Counts a call as in flight; `None` while draining.
    pub fn enter(&self) -> Option<InFlight> {
        self.calls.enter()
    }

    /// True once new work is refused.
    pub fn is_draining(&self) -> bool {
        self.calls.is_draining()
    }

    /// Refuses new work and waits up to `deadline` for what is in flight. What is left then.
    pub async fn drain(&self, deadline: Duration) -> u64 {
        self.calls.drain(deadline).await
    }
}

/// Bytes that may be made ready for blocks to come. None where descriptors are scarce: each piece of memory takes one.
fn memory_to_spare() -> u64 {
    if descriptors::are_scarce() { 0 } else { config::memory_to_spare() }
}
