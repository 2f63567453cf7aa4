//! The Object tier: blocks in a bucket, that outlive the node and are shared by all nodes.
//!
//! Blocks lie in packs under names that any node computes ([`names`]), and are found by listing; no node asks another. What this
//! one knows of the bucket is soft state within a bound. Blocks come from the Host tier, or from the Nvme tier by way of it, and
//! are read into it, each checked before anyone sees it. Nothing in here waits on the caller's thread: requests are made by tasks
//! of the runtime that the tier was opened in. `docs/design/object.md` has the formats and the arithmetic.

mod below;
mod collect;
mod delete;
mod directory;
mod doomed;
mod held;
mod keep;
mod log;
mod logged;
pub mod names;
pub mod pack;
mod proof;
mod read;
mod references;
mod search;
#[cfg(test)]
mod tests;
mod upload;
mod write;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvstore_plane::SequenceHash;
use kvstore_transfer::frame::FrameHeader;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;

use crate::block::{BlockRef, Digest};
use crate::bucket::Bucket;
use crate::caps;
use crate::changes::NamespaceTag;
use crate::clock::BootTime;
use crate::host::{HostTier, RegisteredLayout};
use crate::layout::BlockKind;
use crate::meter::{ReadMeter, ReadRate};
use crate::nvme::NvmeTier;
use crate::stack::Stack;
use crate::tier::Tier;

use directory::{Directory, Packed};
use pack::PackedBlock;

pub use directory::Pack;
use held::HeldBytes;
use logged::Logged;
use names::Names;
use proof::Resting;
use references::Unfinished;
use upload::Uploads;

pub use crate::bucket::{Abilities, ObjectUrl, OpenStoreError, Opened, Trouble};
pub use collect::{CollectError, CollectRules, Collected, PackCount};
pub use upload::{Offer, Offered};

/// What may change while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ObjectLimits {
    /// Bytes of blocks that leases keep in memory until they are uploaded.
    pub upload_bytes: u64,
    /// Bytes of blocks that may wait to be uploaded, on disk for the most part.
    pub backlog_bytes: u64,
}

/// When an upload is read back before it is acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Verify {
    /// Where the store was not seen to refuse a body that does not match its checksum.
    #[default]
    Probe,
    /// Whatever the store does.
    Always,
    /// Never: an operator knows that the store compares, or does without.
    Never,
}

impl Verify {
    /// Whether uploads are read back, and why, in plain words; `checks`: what the probe saw, if it has ended.
    fn reads_back(self, checks: Option<bool>) -> (bool, &'static str) {
        match (self, checks) {
            (Self::Always, _) => (true, "every upload is read back, because object.verify is \"always\""),
            (Self::Never, _) => (false, "uploads are not read back, because object.verify is \"never\""),
            (Self::Probe, None) => (true, "every upload is read back until the store has been probed"),
            (Self::Probe, Some(true)) => (false, "the store checks each upload: the probe saw it refuse a damaged one"),
            (Self::Probe, Some(false)) => (
                true,
                "every upload is read back, because the probe saw the store take a damaged one, or give no clear answer",
            ),
        }
    }
}

/// What the tier is made with.
#[derive(Clone)]
pub struct ObjectOptions {
    /// The store.
    pub opened: Opened,
    /// Namespaces, by their number.
    pub namespaces: Vec<String>,
    /// Bounds.
    pub limits: ObjectLimits,
    /// When an upload is read back.
    pub verify: Verify,
    /// A request that brings nothing for this long is made anew.
    pub stall: Duration,
    /// The folder of the upload log; without, what is not uploaded when the daemon ends is not uploaded.
    pub log_folder: Option<PathBuf>,
    /// Secret, and another one with each start.
    pub seed: u64,
    /// The clock.
    pub clock: fn() -> BootTime,
}

/// Why the tier cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenObjectError {
    /// The upload log.
    #[error("cannot open the upload log in {folder}: {cause}")]
    Log {
        /// Where.
        folder: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] OpenStoreError),
}

/// Counts since the start.
#[derive(Debug, Default)]
struct Counts {
    written_packs: AtomicU64,
    written_blocks: AtomicU64,
    written_bytes: AtomicU64,
    read_blocks: AtomicU64,
    read_bytes: AtomicU64,
    corrupt_blocks: AtomicU64,
    refused_blocks: AtomicU64,
    lost_blocks: AtomicU64,
}

/// The tier at one moment. Counts are since the daemon started.
#[derive(Clone, Debug, Default)]
pub struct ObjectStatus {
    /// PROBING, SERVING or AWAY.
    pub state: &'static str,
    /// Why it does not serve, where it does not.
    pub reason: String,
    /// What the probe found; nothing before it ended.
    pub abilities: Option<Abilities>,
    /// How uploads are confirmed, in plain words.
    pub confirmed: &'static str,
    /// Blocks of which it is known where they are.
    pub known_blocks: u64,
    /// Blocks that wait to be uploaded ...
    pub backlog_blocks: u64,
    /// ... their bytes ...
    pub backlog_bytes: u64,
    /// ... the bound ...
    pub backlog_bytes_max: u64,
    /// ... and for how long the oldest has waited, in milliseconds.
    pub backlog_age_ms: u64,
    /// Bytes that uploads keep in memory.
    pub leased_bytes: u64,
    /// Packs being written.
    pub writes: u64,
    /// Reads under way.
    pub reads: u64,
    /// Packs written.
    pub written_packs: u64,
    /// Blocks in them.
    pub written_blocks: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Blocks read.
    pub read_blocks: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Blocks that were damaged, however often they were read.
    pub corrupt_blocks: u64,
    /// Blocks that were not taken, because too many wait.
    pub refused_blocks: u64,
    /// Blocks that were gone before they could be uploaded.
    pub lost_blocks: u64,
    /// Requests to the store.
    pub requests: u64,
    /// Of those, repeated ones.
    pub retries: u64,
    /// Those that failed.
    pub failures: u64,
    /// Times that the upload log could not be written or synced.
    pub log_failures: u64,
}

struct State {
    directory: Directory,
    searches: HashMap<Digest, watch::Receiver<()>>,
}

/// See the head of this file.
pub struct ObjectTier {
    /// Itself, for tasks.
    this: Weak<Self>,
    bucket: Bucket,
    names: Names,
    verify: Verify,
    host: Arc<HostTier>,
    nvme: Option<Arc<NvmeTier>>,
    /// The faster tiers, from which blocks come.
    above: Arc<Stack>,
    state: Mutex<State>,
    uploads: Mutex<Uploads>,
    /// Blocks whose acknowledgement waits until the pack that has them is proven, by the pack.
    proving: Mutex<HashMap<usize, Vec<Resting>>>,
    limits: Mutex<ObjectLimits>,
    log: Option<Logged>,
    leased_bytes: Arc<AtomicU64>,
    counts: Counts,
    meter: Arc<ReadMeter>,
    abilities: Mutex<Option<Abilities>>,
    refused: Mutex<Option<String>>,
    reads: Arc<Semaphore>,
    prefetch_reads: Arc<Semaphore>,
    proofs: Semaphore,
    /// References that may still be written or ended.
    referring: Arc<Semaphore>,
    /// References that are being written.
    unfinished_references: Mutex<HashMap<u128, Unfinished>>,
    /// Bytes that are checked, or read back ...
    checked_bytes: HeldBytes,
    /// ... and those of packs that are written again without some of their blocks.
    rewritten_bytes: HeldBytes,
    /// Listings of all deletions.
    deletion_listings: Semaphore,
    /// An upload ended.
    uploaded: Notify,
    /// There is something to upload.
    work: Notify,
    stopping: AtomicBool,
    namespaces: Vec<String>,
    seed: u64,
    ids: AtomicU64,
    clock: fn() -> BootTime,
    runtime: Handle,
}

impl ObjectTier {
    /// Opens the tier in the current runtime. Ready at once: the store is probed in the background, and what an earlier daemon
    /// left to be uploaded goes on.
    pub fn open(
        options: ObjectOptions,
        host: &Arc<HostTier>,
        nvme: Option<&Arc<NvmeTier>>,
    ) -> Result<Arc<Self>, OpenObjectError> {
        host.set_has_below();
        let log = match options.log_folder {
            Some(folder) => {
                let opened = Logged::open(&folder, options.clock);
                Some(opened.map_err(|cause| OpenObjectError::Log { folder, cause })?)
            }
            None => None,
        };
        let tier = Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            bucket: Bucket::new(options.opened.store, options.stall, options.clock),
            names: Names::new(&options.opened.prefix, &options.namespaces),
            verify: options.verify,
            host: Arc::clone(host),
            nvme: nvme.cloned(),
            above: Stack::new(host, nvme.map(|nvme| (Tier::Nvme, Arc::clone(nvme) as _)), options.clock),
            state: Mutex::new(State {
                directory: Directory::with_changes(Arc::clone(host.changes())),
                searches: HashMap::new(),
            }),
            uploads: Mutex::default(),
            proving: Mutex::default(),
            limits: Mutex::new(options.limits),
            log,
            leased_bytes: Arc::default(),
            counts: Counts::default(),
            meter: Arc::default(),
            abilities: Mutex::new(None),
            refused: Mutex::new(None),
            reads: Arc::new(Semaphore::new(caps::OBJECT_READS_MAX)),
            prefetch_reads: Arc::new(Semaphore::new(caps::OBJECT_PREFETCH_READS_MAX)),
            proofs: Semaphore::new(caps::OBJECT_PROOFS_MAX),
            referring: Arc::new(Semaphore::new(caps::OBJECT_REFERRING_MAX)),
            unfinished_references: Mutex::default(),
            checked_bytes: HeldBytes::new(caps::OBJECT_CHECKED_BYTES_MAX),
            deletion_listings: Semaphore::new(caps::OBJECT_SEARCHES_EVERYWHERE_MAX),
            rewritten_bytes: HeldBytes::new(caps::OBJECT_REWRITTEN_BYTES_MAX),
            uploaded: Notify::new(),
            work: Notify::new(),
            stopping: AtomicBool::new(false),
            namespaces: options.namespaces,
            seed: options.seed,
            ids: AtomicU64::new(0),
            clock: options.clock,
            runtime: Handle::current(),
        });
        let register = |namespace: &str, layout: &crate::Layout| {
            let at = tier.namespaces.iter().position(|name| name == namespace)?;
            tier.host.register_layout(crate::host::NamespaceId(at), layout.clone()).ok()
        };
        tier.resume(register);
        for _ in 0..caps::OBJECT_WRITES_MAX {
            tier.runtime.spawn(Arc::clone(&tier).work_forever());
        }
        tier.runtime.spawn(Arc::clone(&tier).probe_until_answered());
        Ok(tier)
    }

    /// The store is probed until it answers, and what it lacks is said in plain words.
    async fn probe_until_answered(self: Arc<Self>) {
        let mut tries = 0;
        while !self.stopping.load(Ordering::Acquire) {
            let name = format!("{:032x}", self.next_id());
            let deadline = Instant::now() + self.bucket.stall() * 4;
            match crate::bucket::probe(&self.bucket, self.names.root(), &name, deadline).await {
                Ok(abilities) => {
                    let does_what_is_needed = abilities.reads_own_writes && abilities.creates_once;
                    for lack in abilities.lacks() {
                        match does_what_is_needed {
                            true => tracing::info!("the object store has a limitation: {lack}"),
                            false => tracing::warn!("the object store has a limitation: {lack}"),
                        }
                    }
                    tracing::info!(root = %self.names.root(), "the object store answers; the probe has tried reads, creates and updates");
                    tracing::info!("uploads: {}", self.verify.reads_back(Some(abilities.checks_uploads)).1);
                    *self.abilities.lock() = Some(abilities);
                    *self.refused.lock() = None;
                    return;
                }
                Err(trouble) => {
                    tries += 1;
                    if tries == 1 {
                        tracing::warn!(%trouble, "the object store cannot be used yet; the daemon keeps trying");
                    }
                    *self.refused.lock() = Some(trouble.to_string());
                    tokio::time::sleep(self.bucket.backoff(tries.max(4))).await;
                }
            }
        }
    }

    /// True while the store answers, as far as is known.
    pub fn answers(&self) -> bool {
        !self.bucket.is_away() && self.abilities.lock().is_some()
    }

    /// Whether what was uploaded is read back before it is acknowledged.
    fn reads_back(&self) -> bool {
        let checks = self.abilities.lock().map(|abilities| abilities.checks_uploads);
        self.verify.reads_back(checks).0
    }

    /// Why DURABLE puts are refused, if they are: the store was not probed yet, or does not show what was written.
    pub fn refuses_durable(&self) -> Option<String> {
        match *self.abilities.lock() {
            Some(abilities) if abilities.reads_own_writes => None,
            Some(_) => Some("the object store does not show writes at once".into()),
            None => {
                let why = self.refused.lock().clone();
                Some(why.unwrap_or_else(|| "the object store is being probed".into()))
            }
        }
    }

    fn digest(&self, layout: &RegisteredLayout, group: u16, hash: &SequenceHash) -> Digest {
        Digest::of(self.seed, &layout.namespace_digest, &layout.digest, group, hash)
    }

    fn packed(&self, layout: &RegisteredLayout, group: u16, block: &PackedBlock) -> Packed {
        let PackedBlock { hash, offset, frame_bytes } = *block;
        let seed = layout.group(u32::from(group)).map_or(0, |group| group.name_seed);
        Packed { digest: self.digest(layout, group, &hash), offset, frame_bytes, name: hash.event_name(seed) }
    }

    /// How fast the bucket is read.
    pub fn read_rate(&self) -> ReadRate {
        self.meter.rate()
    }

    /// The namespace's packs of which it is known what is in them.
    pub fn packs_of(&self, namespace: NamespaceTag) -> Vec<Arc<Pack>> {
        self.state.lock().directory.packs_of(namespace)
    }

    /// Names for events of those blocks of a pack that are known to be in the bucket.
    pub fn names_in(&self, pack: &Pack, out: &mut Vec<u64>) {
        self.state.lock().directory.names_in(pack, out);
    }

    /// A name that no other daemon makes, nor this one again.
    fn next_id(&self) -> u128 {
        let count = self.ids.fetch_add(1, Ordering::Relaxed);
        xxhash_rust::xxh3::xxh3_128_with_seed(&count.to_le_bytes(), self.seed)
    }

    /// Bytes of a frame of a group whose blocks are all of one size.
    fn frame_bytes(&self, layout: &Arc<RegisteredLayout>, group: u16) -> Option<u64> {
        let group_of = layout.group(u32::from(group))?;
        if group_of.group.kind.varies_in_length() || group_of.group.kind != BlockKind::Attention {
            return None;
        }
        let any = BlockRef { layout, group, hash: SequenceHash::new(&[0]).ok()? };
        let (identity, sections) = (any.identity(None)?, any.section_bytes());
        let count = group_of.block_bytes.div_ceil(u64::from(sections));
        let header = FrameHeader::of_sums(identity, 0, group_of.block_bytes, sections, &vec![0; count as usize])?;
        Some(header.frame_bytes())
    }

    /// Which blocks of a chain are known to be in the bucket. All of them absent while the store does not answer.
    pub fn presence(&self, layout: &RegisteredLayout, group: u16, hashes: &[SequenceHash]) -> Vec<bool> {
        if self.bucket.is_away() {
            return vec![false; hashes.len()];
        }
        let digests: Vec<Digest> = hashes.iter().map(|hash| self.digest(layout, group, hash)).collect();
        let state = self.state.lock();
        digests.into_iter().map(|digest| state.directory.has(digest)).collect()
    }

    /// Resolves after the next upload ended: for those that wait for room.
    pub fn uploaded(&self) -> tokio::sync::futures::Notified<'_> {
        self.uploaded.notified()
    }

    /// Changes what may change while it runs.
    pub fn set_limits(&self, limits: ObjectLimits) {
        *self.limits.lock() = limits;
    }

    /// Uploads what may be uploaded within `within`; the rest is in the log.
    pub async fn close(&self, within: Duration) {
        let until = Instant::now() + within;
        loop {
            let uploaded = self.uploaded();
            tokio::pin!(uploaded);
            uploaded.as_mut().enable();
            self.close_open();
            if self.uploads.lock().blocks() == 0 || self.bucket.is_away() {
                break;
            }
            if tokio::time::timeout_at(until, uploaded).await.is_err() {
                break;
            }
        }
        self.stopping.store(true, Ordering::Release);
        self.work.notify_waiters();
        self.sync_log_or_say();
    }

    /// The tier at this moment.
    pub fn status(&self) -> ObjectStatus {
        let abilities = *self.abilities.lock();
        let away = self.bucket.away().or_else(|| self.refused.lock().clone());
        let state = match (&away, abilities) {
            (Some(_), _) => "AWAY",
            (None, None) => "PROBING",
            (None, Some(_)) => "SERVING",
        };
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (counts, requests) = (&self.counts, &self.bucket.counts);
        let known_blocks = self.state.lock().directory.len() as u64;
        let backlog_bytes_max = self.limits.lock().backlog_bytes;
        let uploads = self.uploads.lock();
        let age = uploads.oldest().map_or(Duration::ZERO, |oldest| oldest.elapsed());
        ObjectStatus {
            state,
            reason: away.unwrap_or_default(),
            confirmed: self.verify.reads_back(abilities.map(|abilities| abilities.checks_uploads)).1,
            abilities,
            known_blocks,
            backlog_blocks: uploads.blocks() as u64,
            backlog_bytes: uploads.bytes,
            backlog_bytes_max,
            backlog_age_ms: age.as_millis() as u64,
            leased_bytes: get(&self.leased_bytes),
            writes: uploads.under_way as u64,
            reads: (caps::OBJECT_READS_MAX - self.reads.available_permits()) as u64,
            written_packs: get(&counts.written_packs),
            written_blocks: get(&counts.written_blocks),
            written_bytes: get(&counts.written_bytes),
            read_blocks: get(&counts.read_blocks),
            read_bytes: get(&counts.read_bytes),
            corrupt_blocks: get(&counts.corrupt_blocks),
            refused_blocks: get(&counts.refused_blocks),
            lost_blocks: get(&counts.lost_blocks),
            requests: get(&requests.requests),
            retries: get(&requests.retries),
            failures: get(&requests.failures),
            log_failures: self.log.as_ref().map_or(0, Logged::failures),
        }
    }
}
