//! Ghosts: what a policy remembers of blocks that it evicted. A set-associative table of four-byte
//! records; a full set forgets its oldest. Fingerprints may collide (one look-up of a new block in four thousand):
//! a ghost informs a guess, it never names bytes.

#![expect(
    clippy::indexing_slicing,
    reason = "set numbers are reduced modulo the number of sets, ways are positions in a set"
)]

use super::lifetimes::Lifetime;

/// Records in a set: one cache line.
const WAYS: usize = 16;
const FINGERPRINT_BITS: u32 = 16;
const TIME_BITS: u32 = 9;

/// Fingerprint (16 bits), present (1), kind (2), tail (1), touches (3), time of the last touch (9).
#[derive(Clone, Copy, Default)]
struct Record(u32);

impl Record {
    fn present(self) -> bool {
        self.0 >> 15 & 1 == 1
    }

    fn fingerprint(self) -> u32 {
        self.0 >> 16
    }

    fn time(self) -> u32 {
        self.0 & ((1 << TIME_BITS) - 1)
    }
}

/// The ghosts of one pool.
#[derive(Default)]
pub(super) struct Ghosts {
    sets: Vec<[Record; WAYS]>,
    /// A record's unit of time is `1 << time_shift` ticks: 9 bits of it, 32 capacities, reach past any ghost's age.
    time_shift: u32,
}

impl Ghosts {
    /// Room for about `records`, in a pool of `capacity_ticks`; an empty table; a table that is right to a quarter
    /// stays. Returns what is forgotten.
    pub(super) fn resize(&mut self, records: usize, capacity_ticks: u32, now_tick: u32) -> Vec<Lifetime> {
        let sets = (records / WAYS).max(4);
        let have = self.sets.len();
        if (have - have / 4..=have + have / 4).contains(&sets) && have > 0 {
            return Vec::new();
        }
        let records = self.sets.iter().flatten().filter(|record| record.present());
        let forgotten = records.map(|record| self.life(*record, now_tick)).collect();
        self.sets = vec![[Record::default(); WAYS]; sets];
        self.time_shift = (capacity_ticks / 16).max(1).ilog2();
        forgotten
    }

    /// Remembers an evicted block. Returns its lifetime as remembered (its time is rounded), and the
    /// ghost that made room.
    pub(super) fn insert(
        &mut self,
        key_hash: u64,
        life: Lifetime,
        now_tick: u32,
    ) -> Option<(Lifetime, Option<Lifetime>)> {
        let (set, fingerprint) = self.place(key_hash)?;
        let time = life.last_tick >> self.time_shift & ((1 << TIME_BITS) - 1);
        let kind = u32::from(life.class / 8);
        let tail = u32::from(life.class.is_multiple_of(8));
        let touches = u32::from(life.touches.min(7));
        let record = Record(fingerprint << 16 | 1 << 15 | kind << 13 | tail << 12 | touches << 9 | time);
        let now = now_tick >> self.time_shift;
        let ways = &mut self.sets[set];
        let at = ways.iter().position(|record| !record.present()).unwrap_or_else(|| {
            let age = |way: &usize| now.wrapping_sub(ways[*way].time()) & ((1 << TIME_BITS) - 1);
            (0..WAYS).max_by_key(age).unwrap_or(0)
        });
        let old = std::mem::replace(&mut ways[at], record);
        Some((self.life(record, now_tick), old.present().then(|| self.life(old, now_tick))))
    }

    /// Takes out the ghost of a block that comes back.
    pub(super) fn take(&mut self, key_hash: u64, now_tick: u32) -> Option<Lifetime> {
        let (set, fingerprint) = self.place(key_hash)?;
        let matches = |record: &&mut Record| record.present() && record.fingerprint() == fingerprint;
        let record = std::mem::take(self.sets[set].iter_mut().find(matches)?);
        Some(self.life(record, now_tick))
    }

    /// How often a block was read before it was evicted, where that is remembered.
    pub(super) fn touches_of(&self, key_hash: u64) -> Option<u8> {
        let (set, fingerprint) = self.place(key_hash)?;
        let record = self.sets[set].iter().find(|record| record.present() && record.fingerprint() == fingerprint)?;
        Some((record.0 >> 9 & 7) as u8)
    }

    fn life(&self, record: Record, now_tick: u32) -> Lifetime {
        let touches = (record.0 >> 9 & 7) as u8;
        let tail = record.0 >> 12 & 1 == 1;
        let class = (record.0 >> 13 & 3) as u8 * 8 + if tail { 0 } else { touches.max(1) };
        let age = (now_tick >> self.time_shift).wrapping_sub(record.time()) & ((1 << TIME_BITS) - 1);
        let last_tick = (now_tick >> self.time_shift).wrapping_sub(age) << self.time_shift;
        Lifetime { class, touches, last_tick }
    }

    fn place(&self, key_hash: u64) -> Option<(usize, u32)> {
        let sets = self.sets.len() as u64;
        let set = ((u128::from(key_hash) * u128::from(sets)) >> 64) as usize;
        (sets > 0).then_some((set, key_hash as u32 & ((1 << FINGERPRINT_BITS) - 1)))
    }
}
