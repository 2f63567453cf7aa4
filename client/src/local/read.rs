//! Reading without the daemon: find a slot in the key table, name it in a lease word, fence, and see that the slot's entry
//! still holds the block. `docs/design/local-plane.md` has the proof.

use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use arc_swap::Guard;
use kvstore_plane::{NO_HASH, SequenceHash, SlotEntry, SlotKey, SlotRef, TableView, announce};
use smallvec::SmallVec;

use super::attachment::{Attachment, Slabs, WordPool};
use super::mapping::MappedSlab;
use super::{Name, page_full};
use crate::Error;

/// Keys whose cache lines are loaded side by side, and that one fence serves.
const SIDE_BY_SIDE: usize = 64;
/// An entry that changes under the look is looked at again this often; then the daemon is asked.
const LOOKS: usize = 3;
/// Up to so many keys are leased with less room on the stack.
const FEW: usize = 4;

/// One leased block.
#[derive(Clone, Copy)]
struct Held {
    word: u32,
    length: u32,
    start: NonNull<u8>,
}

/// Blocks of a prefix that stay as they are until this is dropped.
pub struct Leases {
    attachment: Arc<Attachment>,
    /// The slabs that the blocks are in.
    slabs: SmallVec<[Arc<MappedSlab>; 1]>,
    held: SmallVec<[Held; 4]>,
}

// SAFETY: the pointers are into slabs that the value keeps mapped, at bytes that nobody writes while the words name them.
unsafe impl Send for Leases {}
// SAFETY: as above; a shared reference only reads.
unsafe impl Sync for Leases {}

impl Leases {
    /// Blocks.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// True without any.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The bytes of block `at` of the prefix.
    ///
    /// # Panics
    /// In a child of the process that leased them: the memory is the parent's.
    pub fn get(&self, at: usize) -> Option<&[u8]> {
        assert!(self.attachment.is_ours(), "blocks that were leased before a fork cannot be read in the child");
        // SAFETY: find() checked that the bytes are inside the slot; the lease keeps them as they are.
        self.held.get(at).map(|held| unsafe { std::slice::from_raw_parts(held.start.as_ptr(), held.length as usize) })
    }

    /// Each block.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).filter_map(|at| self.get(at))
    }

    /// Adds the blocks that follow.
    pub(super) fn join(&mut self, mut more: Self) {
        self.slabs.append(&mut more.slabs);
        self.held.append(&mut more.held);
    }

    /// The blocks one by one, each with a lease of its own.
    pub fn into_blocks(mut self) -> Vec<LeasedBlock> {
        let held = std::mem::take(&mut self.held);
        let batch = Arc::new(self);
        held.into_iter().map(|held| LeasedBlock { batch: Arc::clone(&batch), held }).collect()
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.attachment.release(&self.held);
    }
}

/// One block that stays as it is until this is dropped.
pub struct LeasedBlock {
    batch: Arc<Leases>,
    held: Held,
}

// SAFETY: see Leases.
unsafe impl Send for LeasedBlock {}
// SAFETY: see Leases.
unsafe impl Sync for LeasedBlock {}

impl LeasedBlock {
    /// The file that it is in, and where. `None` where the client does not keep files.
    pub(super) fn place(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.batch.slabs.iter().find_map(|slab| slab.place(self.held.start))
    }
}

impl Deref for LeasedBlock {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        assert!(self.batch.attachment.is_ours(), "blocks that were leased before a fork cannot be read in the child");
        // SAFETY: see Leases::get; the batch keeps the slab mapped.
        unsafe { std::slice::from_raw_parts(self.held.start.as_ptr(), self.held.length as usize) }
    }
}

impl AsRef<[u8]> for LeasedBlock {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for LeasedBlock {
    fn drop(&mut self) {
        self.batch.attachment.release(&[self.held]);
    }
}

/// What a look at one entry says.
enum Look {
    Held(Held),
    /// Not there.
    Absent,
    /// It changes, or its slab is not mapped yet.
    Unsure,
}

impl Attachment {
    fn release(&self, held: &[Held]) {
        if held.is_empty() || !self.is_ours() {
            return;
        }
        let page = self.view().leases();
        let mut pool = self.words.lock();
        // For the eviction policy, the leaf first; the lock makes this the only thread that does.
        self.view().touches().push(held.iter().rev().filter_map(|held| page.slot_of(held.word as usize)));
        for held in held {
            page.clear(held.word as usize);
            pool.free.push(held.word);
        }
    }

    /// Takes `count` lease words, or fewer where the page is nearly full.
    fn take_words(&self, count: usize, into: &mut [u32]) -> usize {
        let mut pool = self.words.lock();
        let mut taken = 0;
        for place in into.iter_mut().take(count) {
            let Some(word) = pool.free.pop().or_else(|| self.fresh_word(&mut pool)) else { break };
            *place = word;
            taken += 1;
        }
        taken
    }

    /// Blocks that this process has leased through it.
    pub(super) fn leased(&self) -> usize {
        let pool = self.words.lock();
        pool.used as usize - pool.free.len()
    }

    fn fresh_word(&self, pool: &mut WordPool) -> Option<u32> {
        let (leases, word) = (self.view().leases(), pool.used);
        if word as usize >= leases.capacity() {
            return None;
        }
        pool.used += 1;
        leases.use_words(pool.used as usize);
        Some(word)
    }

    /// How many leading blocks of a prefix are in memory: a look, nothing is kept.
    pub(crate) fn resident_run(&self, layout: u32, group: u16, hashes: &[SequenceHash]) -> usize {
        let (slabs, table, seed) = (self.slabs.load(), self.table(), self.seed());
        let mut table_hashes = [0u64; SIDE_BY_SIDE];
        let mut run = 0;
        for hashes in hashes.chunks(SIDE_BY_SIDE) {
            for (to, hash) in table_hashes.iter_mut().zip(hashes) {
                *to = SlotKey { layout, group, hash: *hash }.table_hash(seed);
                table.prefetch(*to);
            }
            for table_hash in table_hashes.iter().take(hashes.len()) {
                if let Some(candidate) = table.hint(*table_hash).and_then(|slot| candidate(&slabs, slot)) {
                    kvstore_plane::prefetch(candidate.entry);
                }
            }
            for (hash, table_hash) in hashes.iter().zip(table_hashes) {
                let key = SlotKey { layout, group, hash: *hash };
                let is_key = |slot| {
                    let record = candidate(&slabs, slot).and_then(|candidate| candidate.entry.read());
                    record.is_some_and(|record| record.key == key)
                };
                if table.find(table_hash, is_key).is_none() {
                    return run;
                }
                run += 1;
            }
        }
        run
    }

    /// Leases the leading blocks of a prefix that are in memory. Fewer where one is not, or cannot be told without the
    /// daemon; an error where the lease page is full before the first.
    pub(crate) fn lease_run(self: &Arc<Self>, layout: u32, group: u16, names: &[impl Name]) -> Result<Leases, Error> {
        // A few blocks are not worth the room of many.
        if names.len() <= FEW {
            self.lease_run_by::<FEW>(layout, group, names)
        } else {
            self.lease_run_by::<SIDE_BY_SIDE>(layout, group, names)
        }
    }

    fn lease_run_by<const N: usize>(
        self: &Arc<Self>,
        layout: u32,
        group: u16,
        names: &[impl Name],
    ) -> Result<Leases, Error> {
        let held = SmallVec::with_capacity(names.len());
        let mut leases = Leases { attachment: Arc::clone(self), slabs: SmallVec::new(), held };
        let mut words = [0u32; N];
        let mut chunk = [NO_HASH; N];
        for names in names.chunks(N) {
            for (hash, name) in chunk.iter_mut().zip(names) {
                *hash = name.hash()?;
            }
            let chunk = chunk.get(..names.len()).unwrap_or_default();
            let taken = self.take_words(chunk.len(), &mut words);
            let words = words.get(..taken).unwrap_or_default();
            if words.is_empty() && leases.is_empty() {
                return Err(page_full());
            }
            let before = leases.held.len();
            let whole = self.lease_chunk::<N>(layout, group, chunk, words, &mut leases);
            let unused = words.get(leases.held.len() - before..).unwrap_or_default();
            if !unused.is_empty() {
                let page = self.view().leases();
                unused.iter().for_each(|word| page.clear(*word as usize));
                self.words.lock().free.extend(unused);
            }
            if !whole {
                break;
            }
        }
        Ok(leases)
    }

    /// Leases blocks of `chunk` with one word each; true where all of them were leased.
    fn lease_chunk<const N: usize>(
        &self,
        layout: u32,
        group: u16,
        chunk: &[SequenceHash],
        words: &[u32],
        leases: &mut Leases,
    ) -> bool {
        let slabs = self.slabs.load();
        let (table, seed, page) = (self.table(), self.seed(), self.view().leases());
        let key_of = |hash: &SequenceHash| SlotKey { layout, group, hash: *hash };
        let mut table_hashes = [0u64; N];
        for (to, hash) in table_hashes.iter_mut().zip(chunk) {
            *to = key_of(hash).table_hash(seed);
            table.prefetch(*to);
        }
        let mut candidates = [None; N];
        for (to, table_hash) in candidates.iter_mut().zip(&table_hashes).take(chunk.len()) {
            *to = table.hint(*table_hash).and_then(|slot| candidate(&slabs, slot));
            if let Some(candidate) = to {
                kvstore_plane::prefetch(candidate.entry);
            }
        }
        let mut named = 0;
        for (((hash, table_hash), to), word) in chunk.iter().zip(&table_hashes).zip(&mut candidates).zip(words) {
            let key = key_of(hash);
            if !to.is_some_and(|candidate| candidate.entry.seems(&key)) {
                // The hint was another's: the table has the same fingerprint further on, or nothing.
                *to = find(&table, *table_hash, &slabs, &key);
            }
            let Some(candidate) = to else { break };
            page.name(*word as usize, candidate.slot);
            named += 1;
        }
        announce();
        for (((hash, table_hash), candidate), word) in
            chunk.iter().zip(&table_hashes).zip(candidates.iter().take(named).flatten()).zip(words)
        {
            let key = key_of(hash);
            let held = match confirm(candidate, &key, *word, leases) {
                Look::Unsure => self.look_again(&key, *table_hash, *word, leases),
                Look::Held(held) => Some(held),
                Look::Absent => None,
            };
            let Some(held) = held else { return false };
            leases.held.push(held);
        }
        named == chunk.len() && named == words.len()
    }

    /// A block that is on its way out, or came back, or lies in a slab that was announced just now.
    #[cold]
    fn look_again(&self, key: &SlotKey, table_hash: u64, word: u32, leases: &mut Leases) -> Option<Held> {
        for _ in 1..LOOKS {
            self.receive();
            let slabs = self.slabs.load();
            let candidate = find(&self.table(), table_hash, &slabs, key)?;
            self.view().leases().name(word as usize, candidate.slot);
            announce();
            match confirm(&candidate, key, word, leases) {
                Look::Held(held) => return Some(held),
                Look::Absent => return None,
                Look::Unsure => {}
            }
        }
        None
    }
}

/// Where a block may be.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    slot: SlotRef,
    slab: &'a Arc<MappedSlab>,
    entry: &'a SlotEntry,
}

fn candidate(slabs: &Guard<Arc<Slabs>>, slot: SlotRef) -> Option<Candidate<'_>> {
    let slab = slabs.get(slot.slab as usize)?.as_ref()?;
    Some(Candidate { slot, slab, entry: slab.directory().get(slot.slot as usize)? })
}

fn find<'a>(
    table: &TableView<'_>,
    table_hash: u64,
    slabs: &'a Guard<Arc<Slabs>>,
    key: &SlotKey,
) -> Option<Candidate<'a>> {
    let seems = |slot| candidate(slabs, slot).is_some_and(|candidate| candidate.entry.seems(key));
    candidate(slabs, table.find(table_hash, seems)?)
}

/// Whether the slot, which a word names by now, holds the block.
fn confirm(candidate: &Candidate<'_>, key: &SlotKey, word: u32, leases: &mut Leases) -> Look {
    let Candidate { slot, slab, entry } = candidate;
    let Some(record) = entry.read() else { return Look::Unsure };
    if record.key != *key {
        return Look::Absent;
    }
    let Some(start) = slab.slot(slot.slot, record.length) else { return Look::Absent };
    if !leases.slabs.iter().rev().any(|known| Arc::ptr_eq(known, slab)) {
        leases.slabs.push(Arc::clone(slab));
    }
    Look::Held(Held { word, length: record.length, start })
}
