//! The litmus test of reading without the daemon: two processes share slots, one evicts and refills them as fast as it can,
//! the other leases and reads. A hundred million reads, and no byte of another key. The same without the reader's fence must
//! find some, or the test proves nothing.

use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_plane::{LeaseWords, SequenceHash, SlotEntry, SlotKey, SlotRef, SlotState, announce, withdrawn};
use kvstore_transfer::{SharedMemory, Writers};

/// Few, so that reader and writer meet.
const SLOTS: usize = 4;
const READS: u64 = 100_000_000;
/// Words of a slot's bytes.
const SLOT_WORDS: usize = 8;

const STOP: usize = 0;
const READ: usize = 8;
const WRONG: usize = 16;
const HITS: usize = 24;
const USED: usize = 32;
const LEASES: usize = 64;
const ENTRIES: usize = 128;
const BYTES: usize = 512;
const REGION_BYTES: u64 = 8192;

fn key(id: u64) -> SlotKey {
    SlotKey { layout: 1, group: 0, hash: SequenceHash::new(&id.to_le_bytes()).unwrap() }
}

fn id_of(key: &SlotKey) -> u64 {
    u64::from_le_bytes(key.hash.to_vec().try_into().unwrap())
}

struct Region<'a>(&'a [AtomicU64]);

impl Region<'_> {
    fn leases(&self) -> LeaseWords<'_> {
        LeaseWords::new(&self.0[USED], &self.0[LEASES..LEASES + 1])
    }

    fn entries(&self) -> &[SlotEntry] {
        let words = &self.0[ENTRIES..ENTRIES + SLOTS * 8];
        // SAFETY: 64-byte aligned (the region is page-aligned), of SlotEntry's size, and atomics alone, like SlotEntry.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), SLOTS) }
    }

    fn bytes(&self, slot: usize) -> &[AtomicU64] {
        &self.0[BYTES + slot * SLOT_WORDS..BYTES + (slot + 1) * SLOT_WORDS]
    }

    /// Reads until told to stop, or `reads` are done.
    fn read(&self, reads: u64, fenced: bool) {
        self.leases().use_words(1);
        let (mut wrong, mut hits) = (0u64, 0u64);
        for read in 0..reads {
            let slot = read as usize % SLOTS;
            self.leases().name(0, SlotRef { slab: 0, slot: slot as u32 });
            if fenced {
                announce();
            }
            if let Some(record) = self.entries()[slot].read() {
                hits += 1;
                let id = id_of(&record.key);
                let right = self.bytes(slot).iter().all(|word| word.load(Ordering::Relaxed) == id);
                wrong += u64::from(!right || record.crc32 != id as u32);
            }
            self.leases().clear(0);
            if read % 4096 == 0 {
                self.0[READ].store(read, Ordering::Relaxed);
                self.0[WRONG].store(wrong, Ordering::Relaxed);
                if self.0[STOP].load(Ordering::Relaxed) == 1 {
                    break;
                }
            }
        }
        self.0[HITS].store(hits, Ordering::Relaxed);
        self.0[WRONG].store(wrong, Ordering::Relaxed);
    }

    /// Evicts and refills `slot` with block `id`, unless it is read.
    fn replace(&self, slot: usize, id: u64) -> bool {
        let entry = &self.entries()[slot];
        entry.suspend();
        withdrawn();
        if self.leases().named().any(|named| named.slot as usize == slot) {
            entry.restore();
            return false;
        }
        entry.withdraw(SlotState::Free);
        entry.reserve(&key(id), 1);
        self.bytes(slot).iter().for_each(|word| word.store(id, Ordering::Relaxed));
        entry.publish(SLOT_WORDS as u32 * 8, id as u32);
        true
    }
}

/// The reading process: not a test of its own.
#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn reader() {
    let Ok(path) = std::env::var("LITMUS_REGION") else { return };
    let fenced = std::env::var("LITMUS_FENCED").unwrap() == "1";
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    let flags = rustix::mm::MapFlags::SHARED;
    let len = REGION_BYTES as usize;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file.as_fd(), 0) }.unwrap();
    // SAFETY: mapped until the process ends, page-aligned, and atomics.
    let words = unsafe { std::slice::from_raw_parts(base.cast::<AtomicU64>(), len / 8) };
    Region(words).read(READS, fenced);
}

fn spawn_reader(region: &SharedMemory, fenced: bool) -> Child {
    let path = format!("/proc/{}/fd/{}", std::process::id(), region.as_fd().as_raw_fd());
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "litmus::reader", "--ignored"])
        .env("LITMUS_REGION", path)
        .env("LITMUS_FENCED", if fenced { "1" } else { "0" })
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

/// Races until the reader is done or, with `until_wrong`, has seen a wrong byte. Reads, hits, wrong ones, evictions.
fn race(fenced: bool, until_wrong: bool) -> (u64, u64, u64, u64) {
    let memory = SharedMemory::create(c"kvstore-litmus", REGION_BYTES, Writers::Anyone).unwrap();
    let region = Region(memory.words());
    for (slot, entry) in region.entries().iter().enumerate() {
        // A fresh region is zero: even, as if readable. Made odd before the first use, as a slab's directory is.
        assert_eq!(entry.generation(), 0);
        entry.suspend();
        entry.reserve(&key(slot as u64), 1);
        region.bytes(slot).iter().for_each(|word| word.store(slot as u64, Ordering::Relaxed));
        entry.publish(SLOT_WORDS as u32 * 8, slot as u32);
    }
    let mut reader = spawn_reader(&memory, fenced);
    let (mut id, mut evictions) = (SLOTS as u64, 0u64);
    loop {
        for slot in 0..SLOTS {
            id += 1;
            evictions += u64::from(region.replace(slot, id));
        }
        if id % 4096 < SLOTS as u64 {
            if reader.try_wait().unwrap().is_some() {
                break;
            }
            if until_wrong && region.0[WRONG].load(Ordering::Relaxed) > 0 {
                region.0[STOP].store(1, Ordering::Relaxed);
                break;
            }
        }
    }
    let status = reader.wait().unwrap();
    assert!(status.success(), "the reader failed: {status}");
    let word = |at: usize| region.0[at].load(Ordering::Relaxed);
    (word(READ), word(HITS), word(WRONG), evictions)
}

#[test]
fn a_hundred_million_reads_race_eviction_and_see_no_byte_of_another_key() {
    let (reads, hits, wrong, evictions) = race(true, false);
    println!("{reads} reads, {hits} hits, {evictions} evictions, {wrong} wrong");
    assert_eq!(wrong, 0, "of {hits} hits while {evictions} blocks were evicted");
    assert!(reads > READS - 5000 && hits > READS / 100, "{reads} reads, {hits} hits: no race");
    assert!(evictions > 100_000, "{evictions} evictions: no race");
}

#[test]
fn without_the_fence_some_are_wrong() {
    let (reads, hits, wrong, evictions) = race(false, true);
    println!("{reads} reads, {hits} hits, {evictions} evictions, {wrong} wrong");
    // A machine whose processor orders stores before later loads by itself, or one core, would not need the fence.
    if cfg!(target_arch = "x86_64") && std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 1) {
        assert!(wrong > 0, "{reads} reads and {hits} hits without the fence were all right: the test proves nothing");
    }
}
