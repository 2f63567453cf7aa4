//! The in-memory index: bytes a block, and nanoseconds a block to look a prefix up in process.

use std::sync::Arc;
use std::time::Instant;

use kvstore_plane::{KeyTable, SequenceHash, SlotEntry, SlotKey};
use kvstore_tiers::BlockKind;
use kvstore_tiers::BootTime;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::slots::{
    FlightSource, Incoming, NoReaders, Presence, Priority, Publish, Reserve, SlabMemory, Slots, Urgency,
};
use kvstore_transfer::{SharedMemory, Writers};

use crate::figure::{self, median};

/// Slots of a slab: as many as blocks of 4 KiB has a slab of 64 MiB.
const SLOTS: usize = 15_872;
const PREFIX: usize = 256;

/// A directory without slots: what the index costs, without the blocks.
struct Directory(Vec<SlotEntry>);

impl SlabMemory for Directory {
    fn directory(&self) -> &[SlotEntry] {
        &self.0
    }
}

/// Block `at` of chain `chain`.
fn hash(chain: u64, at: u64) -> SequenceHash {
    let bytes = kvstore::replay::sequence_hash(chain << 20 | at);
    SequenceHash::new(&bytes).unwrap_or_else(|_| unreachable!("32 bytes are a hash"))
}

/// A key table's memory, as the daemon has it.
fn table(blocks: usize) -> std::io::Result<SharedMemory> {
    SharedMemory::create(c"kvstore-table", KeyTable::bytes_for(blocks as u64), Writers::Daemon)
}

/// Slots that hold `blocks` blocks in chains of 256.
fn filled(blocks: usize) -> anyhow::Result<Slots<Directory>> {
    let mut slots = Slots::new(0x5EED, PolicyKind::Sessions, Box::new(table(blocks)?), Arc::new(NoReaders));
    let pool = slots.pool(4096, SLOTS as u32);
    let mut made = 0;
    while made < blocks {
        let count = SLOTS.min(blocks - made);
        let directory = (0..count).map(|_| SlotEntry::free()).collect();
        anyhow::ensure!(slots.add_slab(pool, Directory(directory)).is_some(), "no more slabs");
        made += count;
    }
    let urgency = Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline: BootTime(u64::MAX) };
    for block in 0..blocks as u64 {
        let (chain, at) = (block / PREFIX as u64, block % PREFIX as u64);
        let parent = at.checked_sub(1).map(|before| hash(chain, before));
        let key = SlotKey { layout: 0, group: 0, hash: hash(chain, at) };
        let incoming = Incoming { key, kind: BlockKind::Attention, parent, pool };
        let Reserve::Reserved(ticket) = slots.reserve(&incoming, urgency, BootTime(0)) else {
            anyhow::bail!("block {block} found no slot");
        };
        let published = slots.publish(ticket, 4096, 0, at + 1 == PREFIX as u64);
        anyhow::ensure!(published == Publish::Published, "block {block} was not published");
    }
    Ok(slots)
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Nanoseconds a block of looking up whole prefixes, in an order that no cache foresees.
fn lookup_ns(slots: &Slots<Directory>, blocks: usize, rounds: usize) -> anyhow::Result<f64> {
    let chains = (blocks / PREFIX) as u64;
    let lookups = 2000u64;
    let prefixes: Vec<Vec<SequenceHash>> = (0..lookups)
        .map(|lookup| {
            let chain = lookup.wrapping_mul(0x9E37_79B9_7F4A_7C15) % chains;
            (0..PREFIX as u64).map(|at| hash(chain, at)).collect()
        })
        .collect();
    let mut out = Vec::with_capacity(PREFIX);
    let mut nanoseconds = Vec::new();
    for _ in 0..rounds {
        let started = Instant::now();
        for prefix in &prefixes {
            out.clear();
            slots.presence_of_run(0, 0, prefix, &mut out);
            anyhow::ensure!(out.iter().all(|presence| *presence == Presence::Resident), "a block is missing");
        }
        nanoseconds.push(started.elapsed().as_nanos() as f64 / (lookups as usize * PREFIX) as f64);
    }
    Ok(median(nanoseconds))
}

/// Lets the allocator give back what growing left behind: jemalloc does so in ten seconds, while it is used.
fn settle() {
    for _ in 0..120 {
        std::hint::black_box(vec![1u8; 1 << 20]);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Measures the group.
pub fn measure(rounds: usize) -> anyhow::Result<()> {
    // The large one first: before it, this process has used hardly any memory.
    let before = resident_bytes();
    let large = filled(1_000_000)?;
    settle();
    let after = resident_bytes();
    let bytes = after.saturating_sub(before) as f64;
    let large_ns = lookup_ns(&large, 1_000_000, rounds)?;
    let small_ns = lookup_ns(&filled(10_000)?, 10_000, rounds)?;
    figure::print("index", "bytes_per_block", bytes / large.len() as f64, "<= 128");
    figure::print("index", "rss_mib_1e6_blocks", after as f64 / (1 << 20) as f64, "<= 300");
    figure::print("index", "lookup_ns_1e4", small_ns, "<= 30");
    figure::print("index", "lookup_ns_1e6", large_ns, "<= 100");
    Ok(())
}
