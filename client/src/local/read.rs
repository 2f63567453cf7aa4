//! Reading without the daemon: find a slot in the key table, name it in a lease word, fence, and see that the slot's entry
//! still holds the block. `docs/design/local-plane.md` has the proof.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use arc_swap::Guard;
use kvstore_plane::{NO_HASH, SequenceHash, SlotEntry, SlotKey, SlotRef, announce};

use super::Name;
use super::attachment::{Attachment, Slabs, WordPool};
use super::mapping::MappedSlab;
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
    /// The slabs that the blocks are in: mostly one.
    slab: Option<Arc<MappedSlab>>,
    slabs: Vec<Arc<MappedSlab>>,
    held: Vec<Held>,
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
        self.slabs.extend(more.slab.take());
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
        let leases = self.view().leases();
        held.iter().for_each(|held| leases.clear(held.word as usize));
        self.words.lock().free.extend(held.iter().map(|held| held.word));
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
            self.load_side_by_side(&slabs, layout, group, hashes, &mut table_hashes);
            for (hash, table_hash) in hashes.iter().zip(table_hashes) {
                let key = SlotKey { layout, group, hash: *hash };
                debug_assert_eq!(table_hash, key.table_hash(seed));
                let found = table.find(table_hash, |slot| {
                    entry(&slabs, slot).and_then(SlotEntry::read).is_some_and(|record| record.key == key)
                });
                if found.is_none() {
                    return run;
                }
                run += 1;
            }
        }
        run
    }

    fn load_side_by_side(
        &self,
        slabs: &Guard<Arc<Slabs>>,
        layout: u32,
        group: u16,
        hashes: &[SequenceHash],
        into: &mut [u64],
    ) {
        let (table, seed) = (self.table(), self.seed());
        for (to, hash) in into.iter_mut().zip(hashes) {
            *to = SlotKey { layout, group, hash: *hash }.table_hash(seed);
            table.prefetch(*to);
        }
        for hash in into.iter().take(hashes.len()) {
            if let Some(entry) = table.hint(*hash).and_then(|slot| entry(slabs, slot)) {
                kvstore_plane::prefetch(entry);
            }
        }
    }

    /// Leases the leading blocks of a prefix that are in memory. Fewer where one is not, or cannot be told without the
    /// daemon; an error where the lease page is full before the first.
    pub(crate) fn lease_run(
        self: &Arc<Self>,
        layout: u32,
        group: u16,
        names: &[impl Name],
    ) -> Result<Leases, Error> {
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
        let held = Vec::with_capacity(names.len());
        let mut leases = Leases { attachment: Arc::clone(self), slab: None, slabs: Vec::new(), held };
        let mut words = [0u32; N];
        let mut chunk = [NO_HASH; N];
        let mut table_hashes = [0u64; N];
        for names in names.chunks(N) {
            for (hash, name) in chunk.iter_mut().zip(names) {
                *hash = name.hash()?;
            }
            let chunk = chunk.get(..names.len()).unwrap_or_default();
            let taken = self.take_words(chunk.len(), &mut words);
            let words = words.get(..taken).unwrap_or_default();
            if words.is_empty() && leases.is_empty() {
                return Err(Error::Busy(format!(
                    "this process reads {} blocks at once, the most one may: drop some leases",
                    kvstore_plane::caps::LEASES_PER_CLIENT
                )));
            }
            let before = leases.held.len();
            let whole = self.lease_chunk(layout, group, chunk, words, &mut table_hashes, &mut leases);
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
        self.touch(&leases);
        Ok(leases)
    }

    /// Leases blocks of `chunk` with one word each; true where all of them were leased.
    fn lease_chunk<const N: usize>(
        &self,
        layout: u32,
        group: u16,
        chunk: &[SequenceHash],
        words: &[u32],
        table_hashes: &mut [u64; N],
        leases: &mut Leases,
    ) -> bool {
        let mut slabs = self.slabs.load();
        self.load_side_by_side(&slabs, layout, group, chunk, table_hashes);
        let (table, page) = (self.table(), self.view().leases());
        let mut found = [None; N];
        let mut named = 0;
        for (((hash, table_hash), word), found) in chunk.iter().zip(&*table_hashes).zip(words).zip(&mut found) {
            let key = SlotKey { layout, group, hash: *hash };
            *found = table.find(*table_hash, |slot| entry(&slabs, slot).is_some_and(|entry| entry.seems(&key)));
            let Some(slot) = *found else { break };
            page.name(*word as usize, slot);
            named += 1;
        }
        announce();
        for (((hash, table_hash), word), slot) in
            chunk.iter().zip(&*table_hashes).zip(words).zip(found.iter().take(named).flatten())
        {
            let key = SlotKey { layout, group, hash: *hash };
            let mut look = confirm(&slabs, *slot, &key, *word, leases);
            for _ in 1..LOOKS {
                if !matches!(look, Look::Unsure) {
                    break;
                }
                // It is on its way out, or came back, or lies in a slab that was announced just now.
                self.receive();
                slabs = self.slabs.load();
                let again = table.find(*table_hash, |slot| entry(&slabs, slot).is_some_and(|e| e.seems(&key)));
                let Some(slot) = again else { break };
                page.name(*word as usize, slot);
                announce();
                look = confirm(&slabs, slot, &key, *word, leases);
            }
            match look {
                Look::Held(held) => leases.held.push(held),
                Look::Absent | Look::Unsure => return false,
            }
        }
        named == chunk.len()
    }

    /// Tells the eviction policy, some time.
    fn touch(&self, leases: &Leases) {
        if leases.is_empty() {
            return;
        }
        let _touching = self.touching.lock();
        let page = self.view().leases();
        let slots = leases.held.iter().rev().filter_map(|held| page.slot_of(held.word as usize));
        self.view().touches().push(slots);
    }
}

fn entry(slabs: &Guard<Arc<Slabs>>, slot: SlotRef) -> Option<&SlotEntry> {
    slabs.get(slot.slab as usize)?.as_ref()?.directory().get(slot.slot as usize)
}

/// Whether the slot, which a word names by now, holds the block.
fn confirm(slabs: &Guard<Arc<Slabs>>, slot: SlotRef, key: &SlotKey, word: u32, leases: &mut Leases) -> Look {
    let Some(slab) = slabs.get(slot.slab as usize).and_then(Option::as_ref) else { return Look::Unsure };
    let Some(record) = slab.directory().get(slot.slot as usize).and_then(SlotEntry::read) else { return Look::Unsure };
    if record.key != *key {
        return Look::Absent;
    }
    let Some(start) = slab.slot(slot.slot, record.length) else { return Look::Absent };
    match &leases.slab {
        Some(known) if Arc::ptr_eq(known, slab) => {}
        None => leases.slab = Some(Arc::clone(slab)),
        Some(_) if leases.slabs.iter().any(|known| Arc::ptr_eq(known, slab)) => {}
        Some(_) => leases.slabs.push(Arc::clone(slab)),
    }
    Look::Held(Held { word, length: record.length, start })
}
