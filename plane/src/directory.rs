//! The slot directory: one 64-byte entry per slot, one cache line each, read by other processes without
//! a lock.
//!
//! The generation orders everything. Even: the entry describes readable bytes. Odd: it does not. A reader
//! loads the generation, loads the fields, and loads the generation again; only two equal even loads make
//! a record. Every field is an atomic, so that a torn read is a value that is thrown away, not a data race.
//! One writer (the daemon, under its lock) changes an entry; all others only read.

use crate::key::{SequenceHash, SlotKey};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// Bytes of an entry.
pub const SLOT_ENTRY_BYTES: usize = 64;

/// What a slot is being used for. Kept in the entry for a daemon that adopts the slab; clients look at
/// the generation alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotState {
    /// Nothing in it.
    Free,
    /// Reserved: a writer or a promotion fills it.
    Filling,
    /// Published: readable.
    Resident,
    /// No longer found by its key; freed once its last lease or its writer has gone.
    Doomed,
}

impl SlotState {
    fn from_bits(bits: u32) -> Self {
        match bits & 3 {
            0 => Self::Free,
            1 => Self::Filling,
            2 => Self::Resident,
            _ => Self::Doomed,
        }
    }

    fn bits(self) -> u32 {
        match self {
            Self::Free => 0,
            Self::Filling => 1,
            Self::Resident => 2,
            Self::Doomed => 3,
        }
    }
}

/// What an entry says of a readable block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotRecord {
    /// Its key.
    pub key: SlotKey,
    /// Bytes of the block, from the start of the slot.
    pub length: u32,
    /// CRC-32 (IEEE) of those bytes.
    pub crc32: u32,
    /// The generation under which this was read.
    pub generation: u64,
}

/// One slot's entry. `docs/design/slab.md` draws it byte by byte.
#[repr(C, align(64))]
pub struct SlotEntry {
    generation: AtomicU64,
    hash: [AtomicU64; 4],
    layout: AtomicU32,
    /// Group in bits 0..16, length of the hash in 16..24, kind in 24..32.
    group_and_hash_len: AtomicU32,
    length: AtomicU32,
    crc32: AtomicU32,
    /// Leases held through the daemon.
    leases: AtomicU32,
    /// State in bits 0..2, copies in lower tiers in 2..7, being demoted in 7, pins in 8..32.
    state: AtomicU32,
}

#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(size_of::<SlotEntry>() == SLOT_ENTRY_BYTES);

impl SlotEntry {
    /// A free entry, as a fresh directory is filled with.
    pub fn free() -> Self {
        Self {
            generation: AtomicU64::new(1),
            hash: [0; 4].map(AtomicU64::new),
            layout: AtomicU32::new(0),
            group_and_hash_len: AtomicU32::new(0),
            length: AtomicU32::new(0),
            crc32: AtomicU32::new(0),
            leases: AtomicU32::new(0),
            state: AtomicU32::new(0),
        }
    }

    /// Reads the entry as another process would. `None` while it is not readable, or when it changed
    /// under the read: look again, or ask the daemon.
    pub fn read(&self) -> Option<SlotRecord> {
        let generation = self.generation.load(Ordering::Acquire);
        if generation % 2 == 1 {
            return None;
        }
        let record = SlotRecord {
            key: self.key(),
            length: self.length.load(Ordering::Relaxed),
            crc32: self.crc32.load(Ordering::Relaxed),
            generation,
        };
        fence(Ordering::Acquire);
        (self.generation.load(Ordering::Relaxed) == generation).then_some(record)
    }

    /// True when a readable block lies here under `key`. For the daemon, under its lock.
    pub fn is_key(&self, key: &SlotKey) -> bool {
        self.key() == *key
    }

    /// True where the entry seems to be `key`'s: one word of its hash, its group and its layout. What a reader looks at before it names
    /// the slot; [`Self::read`] then tells.
    pub fn seems(&self, key: &SlotKey) -> bool {
        let [word, ..] = key.hash.words();
        let [first, ..] = &self.hash;
        let group = self.group_and_hash_len.load(Ordering::Relaxed) as u16;
        first.load(Ordering::Relaxed) == word && group == key.group && self.layout.load(Ordering::Relaxed) == key.layout
    }

    /// The key, as the daemon reads it under its lock.
    pub fn key(&self) -> SlotKey {
        let packed = self.group_and_hash_len.load(Ordering::Relaxed);
        let words = [0, 1, 2, 3].map(|word: usize| self.hash.get(word).map_or(0, |w| w.load(Ordering::Relaxed)));
        SlotKey {
            layout: self.layout.load(Ordering::Relaxed),
            group: packed as u16,
            hash: SequenceHash::from_words(words, (packed >> 16) as u8),
        }
    }

    /// The current generation.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Daemon: takes a free slot for `key`. The entry stays unreadable, under a new generation.
    pub fn reserve(&self, key: &SlotKey, kind: u8) -> u64 {
        let generation = self.generation.load(Ordering::Relaxed) + 2;
        debug_assert_eq!(generation % 2, 1);
        self.generation.store(generation, Ordering::Relaxed);
        fence(Ordering::Release);
        for (to, word) in self.hash.iter().zip(key.hash.words()) {
            to.store(word, Ordering::Relaxed);
        }
        self.layout.store(key.layout, Ordering::Relaxed);
        let hash_len = key.hash.byte_len() as u32;
        self.group_and_hash_len.store(u32::from(key.group) | hash_len << 16 | u32::from(kind) << 24, Ordering::Relaxed);
        self.set_state(SlotState::Filling);
        generation
    }

    /// Daemon: the bytes are complete; makes them readable.
    pub fn publish(&self, length: u32, crc32: u32) {
        self.length.store(length, Ordering::Relaxed);
        self.crc32.store(crc32, Ordering::Relaxed);
        self.set_state(SlotState::Resident);
        let generation = self.generation.load(Ordering::Relaxed);
        debug_assert_eq!(generation % 2, 1);
        self.generation.store(generation + 1, Ordering::Release);
    }

    /// Daemon: makes a readable entry unreadable for a while, whatever else it says staying as it is. Fence
    /// ([`crate::withdrawn`]), look who names the slot, then [`Self::restore`] or [`Self::withdraw`].
    pub fn suspend(&self) {
        let generation = self.generation.load(Ordering::Relaxed);
        debug_assert_eq!(generation % 2, 0);
        self.generation.store(generation + 1, Ordering::Relaxed);
    }

    /// Daemon: makes a suspended entry readable again, under a new generation: its bytes are the same.
    pub fn restore(&self) {
        let generation = self.generation.load(Ordering::Relaxed);
        debug_assert_eq!(generation % 2, 1);
        self.generation.store(generation + 1, Ordering::Release);
    }

    /// Daemon: makes the entry unreadable, where it was readable, and sets its state. Whoever refills the
    /// slot must then look for readers: fence, and scan their leases.
    pub fn withdraw(&self, state: SlotState) {
        let generation = self.generation.load(Ordering::Relaxed);
        if generation.is_multiple_of(2) {
            self.generation.store(generation + 1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
        self.set_state(state);
    }

    /// Bytes of the published block.
    pub fn length(&self) -> u32 {
        self.length.load(Ordering::Relaxed)
    }

    /// CRC-32 of the published block.
    pub fn crc32(&self) -> u32 {
        self.crc32.load(Ordering::Relaxed)
    }

    /// The kind given at [`Self::reserve`].
    pub fn kind(&self) -> u8 {
        (self.group_and_hash_len.load(Ordering::Relaxed) >> 24) as u8
    }

    /// What the slot is used for.
    pub fn state(&self) -> SlotState {
        SlotState::from_bits(self.state.load(Ordering::Relaxed))
    }

    fn set_state(&self, state: SlotState) {
        // Copies and pins belong to a resident block: another state starts without.
        let others = if state == SlotState::Resident { self.state.load(Ordering::Relaxed) & !3 } else { 0 };
        self.state.store(others | state.bits(), Ordering::Relaxed);
    }

    /// Lower tiers that hold a copy of the block: bit 0 Nvme, bit 1 Object.
    pub fn copies(&self) -> u8 {
        (self.state.load(Ordering::Relaxed) >> 2 & 0x1F) as u8
    }

    /// Daemon: sets the lower tiers that hold a copy.
    pub fn set_copies(&self, copies: u8) {
        let others = self.state.load(Ordering::Relaxed) & !(0x1F << 2);
        self.state.store(others | u32::from(copies & 0x1F) << 2, Ordering::Relaxed);
    }

    /// True while a copy is being made in a lower tier.
    pub fn is_demoting(&self) -> bool {
        self.state.load(Ordering::Relaxed) >> 7 & 1 == 1
    }

    /// Daemon: a copy is being made, or no longer is.
    pub fn set_demoting(&self, demoting: bool) {
        let others = self.state.load(Ordering::Relaxed) & !(1 << 7);
        self.state.store(others | u32::from(demoting) << 7, Ordering::Relaxed);
    }

    /// The next entry of the daemon's list of free slots, while this one is free.
    pub fn next_free(&self) -> u32 {
        self.length.load(Ordering::Relaxed)
    }

    /// Daemon: see [`Self::next_free`].
    pub fn set_next_free(&self, next: u32) {
        self.length.store(next, Ordering::Relaxed);
    }

    /// Pins on the block.
    pub fn pins(&self) -> u32 {
        self.state.load(Ordering::Relaxed) >> 8
    }

    /// Daemon: sets the number of pins (24 bits).
    pub fn set_pins(&self, pins: u32) {
        let others = self.state.load(Ordering::Relaxed) & 0xFF;
        self.state.store(others | pins << 8, Ordering::Relaxed);
    }

    /// Leases held through the daemon.
    pub fn leases(&self) -> u32 {
        self.leases.load(Ordering::Relaxed)
    }

    /// Daemon: sets the number of leases.
    pub fn set_leases(&self, leases: u32) {
        self.leases.store(leases, Ordering::Relaxed);
    }
}
