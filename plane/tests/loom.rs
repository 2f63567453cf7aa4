//! The fences, under loom: every order that the memory model allows, of a reader against an eviction, of a ring's two
//! sides, and of going to sleep against new work.
//!
//! `cargo nextest run -p kvstore-plane-loom`; the package `plane/loom` compiles this crate with `cfg(loom)`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use kvstore_plane_loom::{
    LeaseWords, RecordHead, RingReader, RingView, RingWriter, SequenceHash, SlotEntry, SlotKey, SlotRef, SlotState,
    announce, fall_asleep, must_kick, wake_up, withdrawn,
};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;

const SLOT: SlotRef = SlotRef { slab: 0, slot: 0 };

fn key(id: u8) -> SlotKey {
    SlotKey { layout: 1, group: 0, hash: SequenceHash::new(&[id]).unwrap() }
}

/// One slot, its bytes, and one reader's lease word.
struct Shared {
    entry: SlotEntry,
    bytes: UnsafeCell<u8>,
    used: AtomicU64,
    words: [AtomicU64; 1],
}

// SAFETY: loom's cell reports every unsynchronized access: that is the test.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    /// Block 1 is readable.
    fn new() -> Arc<Self> {
        let shared = Self {
            entry: SlotEntry::free(),
            bytes: UnsafeCell::new(1),
            used: AtomicU64::new(0),
            words: [AtomicU64::new(0)],
        };
        shared.entry.reserve(&key(1), 1);
        shared.entry.publish(1, 1);
        Arc::new(shared)
    }

    fn leases(&self) -> LeaseWords<'_> {
        LeaseWords::new(&self.used, &self.words)
    }

    fn read(&self, fenced: bool) {
        self.leases().use_words(1);
        self.leases().name(0, SLOT);
        if fenced {
            announce();
        }
        if let Some(record) = self.entry.read() {
            // SAFETY: the lease; loom checks.
            let byte = self.bytes.with(|byte| unsafe { *byte });
            assert_eq!(record.key, key(byte), "a byte of another key");
            assert_eq!(record.crc32, u32::from(byte));
        }
        self.leases().clear(0);
    }

    /// The daemon evicts block 1 and puts block 2 into its slot, unless the slot is read.
    fn replace(&self) {
        self.entry.suspend();
        withdrawn();
        if self.leases().named().any(|slot| slot == SLOT) {
            return self.entry.restore();
        }
        self.entry.withdraw(SlotState::Free);
        self.entry.reserve(&key(2), 1);
        // SAFETY: nobody names the slot; loom checks.
        self.bytes.with_mut(|byte| unsafe { *byte = 2 });
        self.entry.publish(1, 2);
    }
}

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

#[test]
fn a_reader_never_sees_a_byte_of_another_key() {
    model(|| {
        let shared = Shared::new();
        let reader = Arc::clone(&shared);
        let reading = thread::spawn(move || reader.read(true));
        shared.replace();
        reading.join().unwrap();
    });
}

/// The same without the reader's fence must fail: the test above proves something.
#[test]
#[should_panic]
fn without_the_readers_fence_it_does() {
    model(|| {
        let shared = Shared::new();
        let reader = Arc::clone(&shared);
        let reading = thread::spawn(move || reader.read(false));
        shared.replace();
        reading.join().unwrap();
    });
}

/// Two slots and one lease word, which names them in turn.
struct Reused {
    slots: [(SlotEntry, UnsafeCell<u8>); 2],
    used: AtomicU64,
    words: [AtomicU64; 1],
}

// SAFETY: loom's cell reports every unsynchronized access: that is the test.
unsafe impl Sync for Reused {}
// SAFETY: as above.
unsafe impl Send for Reused {}

fn slot(at: u32) -> SlotRef {
    SlotRef { slab: 0, slot: at }
}

impl Reused {
    /// Block 1 is readable in the first slot, block 2 in the second.
    fn new() -> Arc<Self> {
        let filled = |id: u8| {
            let entry = SlotEntry::free();
            entry.reserve(&key(id), 1);
            entry.publish(1, u32::from(id));
            (entry, UnsafeCell::new(id))
        };
        let reused = Self { slots: [filled(1), filled(2)], used: AtomicU64::new(0), words: [AtomicU64::new(0)] };
        reused.leases().use_words(1);
        Arc::new(reused)
    }

    fn leases(&self) -> LeaseWords<'_> {
        LeaseWords::new(&self.used, &self.words)
    }

    /// Reads what is in a slot that the word names.
    fn read(&self, at: u32) {
        announce();
        let (entry, byte) = &self.slots[at as usize];
        if let Some(record) = entry.read() {
            // SAFETY: the lease; loom checks.
            let byte = byte.with(|byte| unsafe { *byte });
            assert_eq!(record.key, key(byte), "a byte of another key");
        }
    }

    /// The daemon evicts what is in a slot and puts block 3 there, unless the slot is read.
    fn replace(&self, at: u32) {
        let (entry, byte) = &self.slots[at as usize];
        entry.suspend();
        withdrawn();
        if self.leases().named().any(|named| named == slot(at)) {
            return entry.restore();
        }
        entry.withdraw(SlotState::Free);
        entry.reserve(&key(3), 1);
        // SAFETY: nobody names the slot; loom checks.
        byte.with_mut(|byte| unsafe { *byte = 3 });
        entry.publish(1, 3);
    }
}

/// A word names a slot, is cleared, and names another. A daemon that sees only the second name must not refill the first slot under
/// the reader: with a plain store of the second name nothing orders the reads of the first slot before its refill.
#[test]
fn a_word_that_names_another_slot_has_ended_its_first_lease() {
    model(|| {
        let shared = Reused::new();
        let reader = Arc::clone(&shared);
        let reading = thread::spawn(move || {
            reader.leases().name(0, slot(0));
            reader.read(0);
            reader.leases().clear(0);
            reader.leases().name(0, slot(1));
            reader.read(1);
        });
        shared.replace(0);
        reading.join().unwrap();
    });
}

/// The same with a second name that is stored as it was, Relaxed, must fail: the test above proves something.
#[test]
#[should_panic]
fn a_second_name_that_is_stored_plainly_has_not() {
    model(|| {
        let shared = Reused::new();
        let reader = Arc::clone(&shared);
        let reading = thread::spawn(move || {
            reader.leases().name(0, slot(0));
            reader.read(0);
            reader.leases().clear(0);
            reader.words[0].store(1 << 63 | slot(1).to_word(), Ordering::Relaxed);
        });
        shared.replace(0);
        reading.join().unwrap();
    });
}

/// A word names the same slot twice, while the daemon withdraws its block and looks: whichever of the two names it sees, or none, no
/// byte is read that is another's.
#[test]
fn a_word_that_names_its_slot_again_is_seen() {
    model(|| {
        let shared = Reused::new();
        let reader = Arc::clone(&shared);
        let reading = thread::spawn(move || {
            for _ in 0..2 {
                reader.leases().name(0, slot(0));
                reader.read(0);
                reader.leases().clear(0);
            }
        });
        shared.replace(0);
        reading.join().unwrap();
    });
}

/// Two threads of a client use one word in turn, as its list of free words hands it on.
#[test]
fn a_word_that_another_thread_uses_next_has_ended_its_first_lease() {
    model(|| {
        let shared = Reused::new();
        let free = Arc::new(loom::sync::Mutex::new(true));
        let use_word = |at: u32| {
            let (shared, free) = (Arc::clone(&shared), Arc::clone(&free));
            thread::spawn(move || {
                // Whoever finds the word taken does without.
                if !std::mem::replace(&mut *free.lock().unwrap(), false) {
                    return;
                }
                shared.leases().name(0, slot(at));
                shared.read(at);
                shared.leases().clear(0);
                *free.lock().unwrap() = true;
            })
        };
        let readers = [use_word(0), use_word(1)];
        shared.replace(0);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
}

/// A block whose eviction was taken back is the same block: who held it before still does.
#[test]
fn a_restored_block_is_readable_and_right() {
    model(|| {
        let shared = Shared::new();
        shared.leases().use_words(1);
        shared.leases().name(0, SLOT);
        announce();
        let before = shared.entry.read().unwrap();
        let daemon = Arc::clone(&shared);
        let replacing = thread::spawn(move || daemon.replace());
        // SAFETY: the lease; loom checks.
        shared.bytes.with(|byte| assert_eq!(unsafe { *byte }, 1));
        replacing.join().unwrap();
        let after = shared.entry.read().unwrap();
        assert_eq!((after.key, after.crc32), (before.key, before.crc32));
        assert!(after.generation > before.generation);
    });
}

#[test]
fn records_cross_a_ring_whole_and_in_order() {
    model(|| {
        struct Memory {
            words: Vec<AtomicU64>,
            written: AtomicU64,
            read: AtomicU64,
        }
        impl Memory {
            fn view(&self) -> RingView<'_> {
                RingView { words: &self.words, written: &self.written, read: &self.read }
            }
        }
        let words = (0..16).map(|_| AtomicU64::new(0)).collect();
        let memory = Arc::new(Memory { words, written: AtomicU64::new(0), read: AtomicU64::new(0) });
        let writing = Arc::clone(&memory);
        let writer = thread::spawn(move || {
            let mut writer = RingWriter::new();
            for tag in 1..=2u64 {
                let payload = vec![tag as u8; 9];
                let head = RecordHead { kind: 7, tag };
                while writer.push(&writing.view(), head, &payload).unwrap() != kvstore_plane_loom::Push::Written {
                    thread::yield_now();
                }
            }
        });
        let (mut reader, mut payload) = (RingReader::new(), Vec::new());
        for tag in 1..=2u64 {
            let head = loop {
                match reader.pop(&memory.view(), &mut payload).unwrap() {
                    Some(head) => break head,
                    None => thread::yield_now(),
                }
            };
            assert_eq!((head, payload.as_slice()), (RecordHead { kind: 7, tag }, [tag as u8; 9].as_slice()));
        }
        writer.join().unwrap();
    });
}

/// Work that comes while the other side falls asleep is seen by it, or kicks it.
#[test]
fn no_wake_up_is_lost() {
    model(|| {
        let shared = Arc::new((AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false)));
        let submitting = Arc::clone(&shared);
        let submitter = thread::spawn(move || {
            let (work, sleeps, kicked) = &*submitting;
            work.store(1, Ordering::Release);
            if must_kick(sleeps) {
                kicked.store(true, Ordering::Release);
            }
        });
        let (work, sleeps, kicked) = &*shared;
        fall_asleep(sleeps);
        let seen = work.load(Ordering::Acquire) == 1;
        if seen {
            wake_up(sleeps);
        }
        submitter.join().unwrap();
        assert!(seen || kicked.load(Ordering::Acquire), "asleep, with work waiting and no kick");
    });
}
