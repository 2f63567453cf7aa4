//! Opens the tiers as the configuration says, and tells them what it says of namespaces.

use std::sync::Arc;

use kvstore_checkpoint::store::StoreError;
use kvstore_tiers::host::{HostOptions, HostTier, NamespaceLimits, namespace_digest};
use kvstore_tiers::nvme::{NvmeNamespace, NvmeOptions, NvmeTier, OpenError};
use kvstore_tiers::object::{ObjectOptions, ObjectTier, OpenObjectError};

use crate::config::{self, Config, NamespacePolicy, NvmeConfig, ObjectConfig};
use crate::{clock, random};

/// Why a daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A disk.
    #[error(transparent)]
    Nvme(#[from] OpenError),
    /// The object store.
    #[error("cannot open the object store of object.url")]
    Object(#[from] OpenObjectError),
    /// The store of snapshots.
    #[error("cannot open the object store of snapshots.url")]
    Snapshots(#[from] StoreError),
}

/// The tiers of a daemon.
pub struct OpenTiers {
    pub(crate) host: Arc<HostTier>,
    pub(crate) nvme: Option<Arc<NvmeTier>>,
    pub(crate) object: Option<Arc<ObjectTier>>,
}

/// Opens them, in the current runtime. Reads the indexes of the disks: takes a second or so a million blocks.
pub fn open_tiers(config: &Config, namespaces: &[String], epoch: u64) -> Result<OpenTiers, StartError> {
    let options = HostOptions {
        limits: config.host,
        huge_pages: config.huge_pages,
        policy: config.eviction,
        seed: random::random_u128() as u64,
        epoch,
        bytes_ceiling: config::memory_bytes(),
    };
    let host = HostTier::new(options, namespaces);
    host.set_ready_bytes(config.host_ready_bytes);
    host.set_namespace_limits(host_limits(config, namespaces));
    let nvme = match &config.nvme {
        Some(nvme) => Some(NvmeTier::open(&nvme_options(nvme), &host)?),
        None => None,
    };
    if let Some(nvme) = &nvme {
        nvme.set_namespaces(nvme_namespaces(config));
    }
    let object = match &config.object {
        Some(object) => Some(open_object(object, config, namespaces, &host, nvme.as_ref())?),
        None => None,
    };
    Ok(OpenTiers { host, nvme, object })
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
        verify: object.verify,
        stall: object.stall,
        log_folder: config.nvme.as_ref().and_then(|nvme| nvme.paths.first().cloned()),
        seed: random::random_u128() as u64,
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

/// What each namespace may have of the memory, in their order.
pub fn host_limits(config: &Config, namespaces: &[String]) -> impl Iterator<Item = NamespaceLimits> {
    namespaces.iter().map(|name| config.host_limits_of(name))
}

/// What each namespace may have of the disks.
pub fn nvme_namespaces(config: &Config) -> Vec<NvmeNamespace> {
    let of = |(name, policy): (&String, &NamespacePolicy)| NvmeNamespace {
        digest: namespace_digest(name),
        bytes: policy.nvme_bytes,
        ttl_ms: policy.ttl.map(|ttl| ttl.as_millis() as u64),
    };
    config.policies.iter().map(of).collect()
}
