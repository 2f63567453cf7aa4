//! Memory and disk without a daemon around them: what tests of faults need to see and to break.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_tiers::below::Ask;
use kvstore_tiers::host::{BeginFill, FillRequest, HostTier, Leasing, RegisteredLayout};
use kvstore_tiers::nvme::{BegunWrite, NvmeEngine, NvmeOptions, NvmeTier, OpenError};
use kvstore_tiers::slots::{Delete, FlightSource, Priority, Publish, Urgency};
use kvstore_tiers::stack::{Asked, Policy, Promotion, Stack, Window};
use kvstore_tiers::{BlockRef, BootTime, Run, SequenceHash, Tier, TierSet};
use kvstore_transfer::volume::Faults;

use crate::memory::Memory;

/// Both tiers, and one layout.
pub struct Tiers {
    /// Memory.
    pub host: Arc<HostTier>,
    /// Disk.
    pub nvme: Arc<NvmeTier>,
    /// Both.
    pub stack: Arc<Stack>,
    /// Of all blocks.
    pub layout: Arc<RegisteredLayout>,
    block_bytes: u32,
    runtime: tokio::runtime::Runtime,
}

/// How they are made.
#[derive(Clone)]
pub struct TierOptions {
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Bytes of memory.
    pub host_bytes: u64,
    /// Bytes of disk.
    pub nvme_bytes: u64,
    /// Bytes of that for the index; `None`: as configured by default.
    pub index_bytes: Option<u64>,
    /// Folders of further disks, of the same size.
    pub more_folders: Vec<std::path::PathBuf>,
    /// Faults of the disk.
    pub faults: Option<Arc<Faults>>,
    /// How the disk is driven.
    pub engine: NvmeEngine,
    /// Layers of a block.
    pub layers: u32,
}

impl Default for TierOptions {
    fn default() -> Self {
        let block_bytes = 100_000;
        let (host_bytes, nvme_bytes) = (32 << 20, 64 << 20);
        Self {
            block_bytes,
            host_bytes,
            nvme_bytes,
            index_bytes: None,
            more_folders: Vec::new(),
            faults: None,
            engine: NvmeEngine::Auto,
            layers: 1,
        }
    }
}

/// What a read came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Got {
    /// The block, from memory.
    Memory(Vec<u8>),
    /// The block, from disk.
    Disk(Vec<u8>),
    /// Nowhere.
    Miss,
}

impl Got {
    /// The block, wherever it was.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Memory(bytes) | Self::Disk(bytes) => Some(bytes),
            Self::Miss => None,
        }
    }
}

/// The time that tiers are told.
pub fn now() -> BootTime {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    BootTime(time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000)
}

/// The name of block `id`.
pub fn hash(id: u64) -> SequenceHash {
    SequenceHash::new(&replay::sequence_hash(id)).unwrap()
}

/// What a kill -9 would leave of a folder at this moment: what the kernel has been told to write. The files are copied one after the
/// other while the tier goes on: what says how far an index was written is taken first, so that it never says more than the copy has.
pub fn as_killed(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mark = std::fs::read(folder.join("mark"));
    let copied = std::process::Command::new("cp")
        .args(["-r", "--sparse=always", "--no-target-directory"])
        .args([folder, copy.path()])
        .status();
    assert!(copied.unwrap().success(), "{} cannot be copied", folder.display());
    if let Ok(mark) = mark {
        std::fs::write(copy.path().join("mark"), mark).unwrap();
    }
    copy
}

impl Tiers {
    /// Opens the disk's folder, with an empty memory.
    pub fn open(folder: &Path, options: &TierOptions) -> Result<Self, OpenError> {
        let Memory { host, layout } = Memory::new(options.host_bytes, options.block_bytes, options.layers);
        let nvme = NvmeOptions {
            paths: std::iter::once(folder.to_owned()).chain(options.more_folders.iter().cloned()).collect(),
            bytes: options.nvme_bytes,
            index_bytes: options.index_bytes,
            dirty_bytes: options.host_bytes / 4,
            engine: options.engine,
            boot_id: [7; 16],
            now: now(),
            faults: options.faults.clone(),
        };
        let nvme = NvmeTier::open(&nvme, &host)?;
        let stack = Stack::new(&host, [(Tier::Nvme, Arc::clone(&nvme) as _)], now);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        Ok(Self { host, nvme, stack, layout, block_bytes: options.block_bytes, runtime })
    }

    /// Block `id`, as both tiers name it.
    pub fn block(&self, id: u64) -> BlockRef<'_> {
        BlockRef { layout: &self.layout, group: 0, hash: hash(id) }
    }

    /// Asks the tiers below memory about blocks.
    pub fn ask(&self, hashes: &[SequenceHash], ask: Ask) -> Vec<TierSet> {
        self.stack.below(&Run { layout: &self.layout, group: 0, hashes }, ask)
    }

    /// Puts block `id` into memory; false where there is no room.
    pub fn put_in_memory(&self, id: u64) -> bool {
        self.put_content_in_memory(id, None, &replay::content(id, self.block_bytes as usize))
    }

    /// The same, as the block after `parent`.
    pub fn put_after(&self, id: u64, parent: Option<u64>) -> bool {
        self.put_content_in_memory(id, parent, &replay::content(id, self.block_bytes as usize))
    }

    fn put_content_in_memory(&self, id: u64, parent: Option<u64>, content: &[u8]) -> bool {
        let urgency =
            Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline: BootTime(u64::MAX) };
        let request = FillRequest {
            layout: &self.layout,
            group: 0,
            hash: hash(id),
            parent: parent.map(hash),
            length: self.block_bytes,
            urgency,
        };
        loop {
            match self.host.begin_fill(&request, now()) {
                BeginFill::Fill(mut fill, ahead) => {
                    ahead.into_iter().for_each(|plan| self.host.drop_plan(plan));
                    fill.append(content, now()).unwrap();
                    return fill.commit(true) == Publish::Published;
                }
                BeginFill::NeedsSlab(plan) => self.host.make_slab(plan).unwrap(),
                BeginFill::Resident => return true,
                BeginFill::InFlight | BeginFill::Wait | BeginFill::Busy | BeginFill::Outranked => return false,
            }
        }
    }

    /// Puts `content` as block `id`, like [`Self::put`].
    pub fn put_bytes(&self, id: u64, content: &[u8], local: bool) -> bool {
        self.put_content_in_memory(id, None, content) && self.write_back(id, None, local)
    }

    /// Puts blocks, each the parent of the next; true once all are LOCAL.
    pub fn put_chain(&self, ids: std::ops::Range<u64>) -> bool {
        ids.clone().all(|id| {
            let parent = (id > ids.start).then(|| id - 1);
            let content = replay::content(id, self.block_bytes as usize);
            self.put_content_in_memory(id, parent, &content) && self.write_back(id, parent, true)
        })
    }

    fn write_back(&self, id: u64, parent: Option<u64>, local: bool) -> bool {
        match self.nvme.begin_write(&self.block(id), parent.map(hash), Vec::new(), local) {
            BegunWrite::Queued(Some(waiting)) => waiting.blocking_recv().unwrap_or(false),
            BegunWrite::Queued(None) => true,
            BegunWrite::Refused => false,
        }
    }

    /// Puts block `id`; true once it is LOCAL, where that was asked for, else once it is on its way.
    pub fn put(&self, id: u64, local: bool) -> bool {
        while !self.nvme.has_dirty_room() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.put_in_memory(id) && self.write_back(id, None, local)
    }

    /// Reads block `id`; every byte that comes is checked to be the right one.
    pub fn get(&self, id: u64) -> Got {
        let check = |bytes: &[u8]| {
            assert_eq!(bytes.len(), self.block_bytes as usize, "block {id}");
            assert_eq!(replay::wrong_bytes(id, bytes), 0, "WRONG BYTES in block {id}");
            bytes.to_vec()
        };
        let mut leased = self.host.lease_run(&self.layout, 0, &[hash(id)], now());
        if let Some(Leasing::Leased(block)) = leased.pop() {
            return Got::Memory(check(&block));
        }
        match self.bring(id, Priority::Demand) {
            Leasing::Leased(block) => Got::Disk(check(&block)),
            Leasing::Miss => Got::Miss,
            Leasing::InFlight => panic!("block {id} neither came nor missed within a minute"),
        }
    }

    /// Brings block `id` into memory, for a minute at most.
    pub fn bring(&self, id: u64, priority: Priority) -> Leasing {
        let (stack, layout) = (Arc::clone(&self.stack), Arc::clone(&self.layout));
        self.runtime.block_on(async {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
            Promotion { stack, layout, group: 0, priority, deadline }.bring(hash(id)).await
        })
    }

    /// Brings blocks into memory in order, `ahead` of them at once, as a call does. How many did not come.
    pub fn bring_all(&self, ids: std::ops::Range<u64>, ahead: usize) -> usize {
        let (stack, layout) = (Arc::clone(&self.stack), Arc::clone(&self.layout));
        self.runtime.block_on(async {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
            let promotion = Promotion { stack, layout, group: 0, priority: Priority::Demand, deadline };
            let asked = ids.enumerate().map(|(index, id)| Asked { index, hash: hash(id), known: None });
            let policy = Policy { ahead, ends_outranked: false, ends_full: false };
            let mut window = Window::new(&promotion, policy, asked);
            let mut missing = 0;
            while let Some((_, _, leasing)) = window.next().await {
                missing += usize::from(!matches!(leasing, Leasing::Leased(_)));
            }
            missing
        })
    }

    /// Waits until nothing is dirty.
    pub fn settle(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.nvme.dirty_bytes() > 0 {
            assert!(Instant::now() < until, "dirty blocks are never written: {:?}", self.nvme.status());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the (only) volume is in this state.
    pub fn until_state(&self, state: &str) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.nvme.status().volumes[0].state != state {
            assert!(Instant::now() < until, "never {state}: {:?}", self.nvme.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What a delete, or a pin, waits for: true where all that was done before would be there after a crash.
    pub fn sync(&self) -> bool {
        let waiting = self.nvme.sync();
        // Each is waited for.
        let synced: Vec<bool> = waiting.into_iter().map(|synced| synced.blocking_recv() == Ok(true)).collect();
        synced.into_iter().all(|synced| synced)
    }

    /// Tries to sync until that works.
    pub fn until_synced(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while !self.sync() {
            assert!(Instant::now() < until, "never synced: {:?}", self.nvme.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Deletes block `id` from both tiers: what became of it on disk.
    pub fn delete(&self, id: u64) -> Delete {
        let outcome = self.nvme.delete(&self.layout, 0, &[hash(id)]).remove(0);
        self.host.delete(&self.layout, 0, &[hash(id)]);
        outcome
    }

    /// True where block `id` is on disk.
    pub fn is_on_disk(&self, id: u64) -> bool {
        self.nvme.presence(&self.layout, 0, &[hash(id)]) == [true]
    }

    /// Puts block `id` until it is LOCAL.
    pub fn put_until_local(&self, id: u64) {
        let until = Instant::now() + Duration::from_secs(60);
        while !self.put(id, true) {
            assert!(Instant::now() < until, "block {id} is never LOCAL: {:?}", self.nvme.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Writes what waits, and lets go of the folder.
    pub fn close(self) {
        self.nvme.close();
    }
}
