//! Ghosts: what the policy remembers of sessions whose blocks are not in the pool, under the first block that a session lacks when it
//! comes back. A set-associative table; a full set forgets its oldest. Fingerprints may collide (one look-up of a new block in a
//! hundred million): a ghost informs a guess, it never names bytes.

#![expect(
    clippy::indexing_slicing,
    reason = "set numbers are reduced modulo the number of sets, ways are positions in a set"
)]

use super::session::Session;

/// Records in a set, whose fingerprints lie together.
const WAYS: usize = 8;

#[derive(Clone, Copy, Default)]
struct Set {
    /// 0: nothing is there.
    fingerprints: [u32; WAYS],
    sessions: [Session; WAYS],
}

/// The ghosts of one pool.
#[derive(Default)]
pub(super) struct Ghosts {
    sets: Vec<Set>,
    /// By set, a byte of each fingerprint. Nearly every look-up is in vain, and ends here: a quarter of a MiB for a million blocks, which
    /// stays in a core's own cache, where the sets would be a miss for each block stored.
    tags: Vec<[u8; WAYS]>,
}

/// True where a byte of `tags` is `tag`; sometimes also where none is.
fn may_have(tags: [u8; WAYS], tag: u8) -> bool {
    let differ = u64::from_le_bytes(tags) ^ u64::from_le_bytes([tag; WAYS]);
    let (ones, tops) = (u64::from_le_bytes([1; WAYS]), u64::from_le_bytes([0x80; WAYS]));
    differ.wrapping_sub(ones) & !differ & tops != 0
}

/// 0: nothing is there.
fn tag_of(fingerprint: u32) -> u8 {
    ((fingerprint >> 24) as u8).max(1)
}

impl Ghosts {
    /// Room for about `records`; an empty table; a table that is right to a quarter stays. What is forgotten goes to `forget`.
    pub(super) fn resize(&mut self, records: usize, mut forget: impl FnMut(Session)) {
        let sets = (records / WAYS).max(4);
        let have = self.sets.len();
        if (have - have / 4..=have + have / 4).contains(&sets) && have > 0 {
            return;
        }
        for set in &self.sets {
            let there = set.fingerprints.iter().zip(&set.sessions).filter(|(fingerprint, _)| **fingerprint != 0);
            there.for_each(|(_, session)| forget(*session));
        }
        self.sets = vec![Set::default(); sets];
        self.tags = vec![[0; WAYS]; sets];
    }

    /// This block will be looked for soon.
    pub(super) fn prefetch(&self, key_hash: u64) {
        if let Some(tags) = self.tags.get(self.place(key_hash).0) {
            kvstore_plane::prefetch(tags);
        }
    }

    /// Remembers a session. Returns the one that made room.
    pub(super) fn insert(&mut self, key_hash: u64, session: Session) -> Option<Session> {
        let (number, fingerprint) = self.place(key_hash);
        let Some(set) = self.sets.get_mut(number) else { return Some(session) };
        let free = |of: &u32| *of == 0 || *of == fingerprint;
        let at = set.fingerprints.iter().position(free).unwrap_or_else(|| {
            let began = |way: &usize| set.sessions[*way].life.began_tick;
            (0..WAYS).min_by_key(began).unwrap_or(0)
        });
        self.tags[number][at] = tag_of(fingerprint);
        let before = std::mem::replace(&mut set.fingerprints[at], fingerprint);
        let old = std::mem::replace(&mut set.sessions[at], session);
        (before != 0).then_some(old)
    }

    /// What is remembered under this block.
    pub(super) fn find(&self, key_hash: u64) -> Option<Session> {
        let (number, fingerprint) = self.place(key_hash);
        self.tags.get(number).filter(|tags| may_have(**tags, tag_of(fingerprint)))?;
        let set = self.sets.get(number)?;
        Some(set.sessions[set.fingerprints.iter().position(|of| *of == fingerprint)?])
    }

    /// Takes out what is remembered under this block.
    pub(super) fn take(&mut self, key_hash: u64) -> Option<Session> {
        let (number, fingerprint) = self.place(key_hash);
        let set = self.sets.get_mut(number)?;
        let at = set.fingerprints.iter().position(|of| *of == fingerprint)?;
        set.fingerprints[at] = 0;
        self.tags[number][at] = 0;
        Some(set.sessions[at])
    }

    fn place(&self, key_hash: u64) -> (usize, u32) {
        let set = (u128::from(key_hash) * self.sets.len() as u128) >> 64;
        (set as usize, (key_hash as u32).max(1))
    }
}
