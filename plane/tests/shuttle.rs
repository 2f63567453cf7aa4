//! Interleavings of whole operations, under shuttle: readers that look up, lease, read and release, against a daemon that
//! evicts and refills the same slots and moves them in the key table.
//!
//! `cargo nextest run -p kvstore-plane-shuttle`; the package `plane/shuttle` compiles this crate with `cfg(shuttle)`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use kvstore_plane_shuttle::{
    Completion, HeapTable, KeyTable, LeaseWords, RecordHead, RingReader, RingView, RingWriter, SequenceHash, SlotEntry,
    SlotKey, SlotRef, SlotState, TableMemory, TableView, TouchRing, announce, fall_asleep, must_kick, wake_up,
    withdrawn,
};
use shuttle::rand::Rng;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;

const SLOTS: usize = 2;
const READERS: usize = 2;
const KEYS: u64 = 3;
const SEED: u64 = 7;

fn key(id: u64) -> SlotKey {
    SlotKey { layout: 1, group: 0, hash: SequenceHash::new(&id.to_le_bytes()).unwrap() }
}

fn slot(at: usize) -> SlotRef {
    SlotRef { slab: 0, slot: at as u32 }
}

struct Words(std::sync::Arc<HeapTable>);

impl TableMemory for Words {
    fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }
}

struct Shared {
    table: std::sync::Arc<HeapTable>,
    entries: [SlotEntry; SLOTS],
    /// The slots' bytes: the id of the key that they belong to, twice.
    bytes: [[AtomicU64; 2]; SLOTS],
    used: [AtomicU64; READERS],
    words: [[AtomicU64; 1]; READERS],
}

impl Shared {
    fn leases(&self, reader: usize) -> LeaseWords<'_> {
        LeaseWords::new(&self.used[reader], &self.words[reader])
    }

    /// One look-up, lease, read and release.
    fn read(&self, reader: usize, id: u64) -> bool {
        let (key, leases) = (key(id), self.leases(reader));
        let view = TableView::new(self.table.words());
        let find = || view.find(key.table_hash(SEED), |slot| self.entries[slot.slot as usize].is_key(&key));
        let Some(found) = find() else { return false };
        leases.use_words(1);
        leases.name(0, found);
        announce();
        let record = self.entries[found.slot as usize].read();
        let hit = record.is_some_and(|record| record.key == key);
        if hit {
            for byte in &self.bytes[found.slot as usize] {
                assert_eq!(byte.load(Ordering::Relaxed), id, "a byte of another key");
                thread::yield_now();
            }
        }
        leases.clear(0);
        hit
    }

    fn is_named(&self, wanted: SlotRef) -> bool {
        (0..READERS).any(|reader| self.leases(reader).named().any(|slot| slot == wanted))
    }

    fn fill(&self, table: &mut KeyTable, at: usize, id: u64) {
        let entry = &self.entries[at];
        entry.reserve(&key(id), 1);
        table.insert(key(id).table_hash(SEED), slot(at), |_| 0).unwrap();
        for byte in &self.bytes[at] {
            byte.store(id, Ordering::Relaxed);
        }
        entry.publish(16, id as u32);
    }
}

fn run(readers_look: usize) {
    let table = std::sync::Arc::new(HeapTable::new(64));
    let pair = || [AtomicU64::new(0), AtomicU64::new(0)];
    let shared = Arc::new(Shared {
        table: std::sync::Arc::clone(&table),
        entries: [SlotEntry::free(), SlotEntry::free()],
        bytes: [pair(), pair()],
        used: pair(),
        words: [[AtomicU64::new(0)], [AtomicU64::new(0)]],
    });
    let mut writer = KeyTable::new(Box::new(Words(table)));
    let mut held: [u64; SLOTS] = [0, 1];
    (0..SLOTS).for_each(|at| shared.fill(&mut writer, at, held[at]));
    let readers: Vec<_> = (0..READERS)
        .map(|reader| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for _ in 0..readers_look {
                    let id = shuttle::rand::thread_rng().gen_range(0..KEYS);
                    shared.read(reader, id);
                }
            })
        })
        .collect();
    for _ in 0..4 {
        let at = shuttle::rand::thread_rng().gen_range(0..SLOTS);
        let entry = &shared.entries[at];
        entry.suspend();
        withdrawn();
        if shared.is_named(slot(at)) {
            entry.restore();
            continue;
        }
        entry.withdraw(SlotState::Doomed);
        assert!(writer.remove(key(held[at]).table_hash(SEED), slot(at)));
        entry.withdraw(SlotState::Free);
        let next = (0..KEYS).find(|id| !held.contains(id)).unwrap();
        held[at] = next;
        shared.fill(&mut writer, at, next);
    }
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    // Quiet again, every block is found.
    assert!(held.iter().all(|id| shared.read(0, *id)));
}

#[test]
fn readers_race_eviction_and_see_no_byte_of_another_key() {
    shuttle::check_random(|| run(3), 20_000);
    shuttle::check_pct(|| run(3), 5_000, 3);
}

/// Commands and sleep: every record comes through a small ring, however the two sides fall asleep.
#[test]
fn a_ring_with_sleepers_loses_no_record() {
    struct Channel {
        words: Vec<AtomicU64>,
        written: AtomicU64,
        read: AtomicU64,
        sleeps: AtomicU64,
        kicked: Mutex<bool>,
        kick: Condvar,
    }
    impl Channel {
        fn view(&self) -> RingView<'_> {
            RingView { words: &self.words, written: &self.written, read: &self.read }
        }
    }
    let once = || {
        let words = (0..16).map(|_| AtomicU64::new(0)).collect();
        let channel = Arc::new(Channel {
            words,
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
            kicked: Mutex::new(false),
            kick: Condvar::new(),
        });
        let submitting = Arc::clone(&channel);
        let submitter = thread::spawn(move || {
            let mut writer = RingWriter::new();
            for tag in 0..6 {
                let (kind, payload) = Completion::Stored { status: tag as u32, level: 1 }.encode();
                let head = RecordHead { kind, tag };
                while writer.push(&submitting.view(), head, &payload).unwrap() != kvstore_plane_shuttle::Push::Written {
                    thread::yield_now();
                }
                if must_kick(&submitting.sleeps) {
                    *submitting.kicked.lock().unwrap() = true;
                    submitting.kick.notify_one();
                }
            }
        });
        let (mut reader, mut payload) = (RingReader::new(), Vec::new());
        for tag in 0..6 {
            let head = loop {
                if let Some(head) = reader.pop(&channel.view(), &mut payload).unwrap() {
                    break head;
                }
                fall_asleep(&channel.sleeps);
                if !reader.has_record(&channel.view()) {
                    let mut kicked = channel.kicked.lock().unwrap();
                    while !*kicked {
                        kicked = channel.kick.wait(kicked).unwrap();
                    }
                    *kicked = false;
                }
                wake_up(&channel.sleeps);
            };
            assert_eq!(head.tag, tag);
            let stored = Completion::decode(head.kind, &payload).unwrap();
            assert_eq!(stored, Completion::Stored { status: tag as u32, level: 1 });
        }
        submitter.join().unwrap();
    };
    shuttle::check_random(once, 5_000);
}

/// Touches are lossy, and never made up: what the daemon takes was written by the client at some time.
#[test]
fn touches_are_lost_but_not_made_up() {
    let once = || {
        let ring = Arc::new((AtomicU64::new(0), [const { 0u64 }; 4].map(AtomicU64::new)));
        let writing = Arc::clone(&ring);
        let writer = thread::spawn(move || {
            let touches = TouchRing::new(&writing.0, &writing.1);
            for request in 0..4u32 {
                touches.push((0..3).map(|at| SlotRef { slab: 1, slot: request * 3 + at + 1 }));
            }
        });
        let touches = TouchRing::new(&ring.0, &ring.1);
        let (mut seen, mut taken) = (0, 0);
        for _ in 0..4 {
            let touched = touches.take(&mut seen, |slot| assert!(slot.slab == 1 && (1..=12).contains(&slot.slot)));
            taken += touched.taken + touched.lost;
            thread::yield_now();
        }
        writer.join().unwrap();
        let touched = touches.take(&mut seen, |_| {});
        assert!((4..=12).contains(&(taken + touched.taken + touched.lost)));
    };
    shuttle::check_random(once, 5_000);
}
