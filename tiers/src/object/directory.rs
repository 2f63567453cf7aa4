//! What this daemon knows of the bucket: which blocks are in which pack, and for which names nothing was found lately. Pure.
//!
//! Soft state within a bound: what is forgotten is found again by listing. A pack that nobody asked for since the last round is
//! forgotten first.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use object_store::path::Path;
use parking_lot::Mutex;

use super::proof::Proof;
use crate::block::Digest;
use crate::caps::{OBJECT_ABSENT_MAX, OBJECT_DIRECTORY_BLOCKS_MAX};
use crate::changes::{Change, ChangeLog, NamespaceTag};
use crate::clock::BootTime;
use crate::tier::Tier;

/// An object of the bucket, and the blocks in it.
#[derive(Debug)]
pub struct Pack {
    /// Its name.
    pub location: Path,
    /// Its bytes.
    pub bytes: u64,
    /// When it was written, by the store's clock, in milliseconds since 1970.
    pub written_ms: i64,
    /// Its blocks, in order.
    pub blocks: Box<[Packed]>,
    /// Whose it is.
    pub namespace: NamespaceTag,
    asked: AtomicBool,
    proof: Mutex<Proof>,
}

/// A block in a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packed {
    /// Its name.
    pub digest: Digest,
    /// Where its frame starts in the object.
    pub offset: u64,
    /// Bytes of its frame.
    pub frame_bytes: u64,
    /// What events name it.
    pub name: u64,
}

impl Pack {
    /// A pack of these blocks.
    pub fn new(location: Path, bytes: u64, written_ms: i64, blocks: Vec<Packed>, namespace: NamespaceTag) -> Arc<Self> {
        let blocks = blocks.into();
        let (asked, proof) = (AtomicBool::new(false), Mutex::new(Proof::None));
        Arc::new(Self { location, bytes, written_ms, blocks, namespace, asked, proof })
    }

    /// What this daemon knows of its bytes.
    pub(super) fn proof(&self) -> Proof {
        *self.proof.lock()
    }

    /// ... from now on.
    pub(super) fn set_proof(&self, proof: Proof) {
        *self.proof.lock() = proof;
    }
}

/// Where a block is.
#[derive(Clone, Debug)]
pub struct Place {
    /// The object.
    pub pack: Arc<Pack>,
    /// Which of its blocks.
    pub at: u32,
}

impl Place {
    /// The block in its pack.
    pub fn packed(&self) -> Option<Packed> {
        self.pack.blocks.get(self.at as usize).copied()
    }
}

/// See the head of this file.
#[derive(Default)]
pub struct Directory {
    blocks: HashMap<Digest, Place>,
    packs: VecDeque<Arc<Pack>>,
    absent: HashMap<Digest, BootTime>,
    /// Blocks that are damaged, by where.
    damaged: HashSet<(u64, Digest)>,
    changes: Option<Arc<ChangeLog>>,
}

impl Directory {
    /// One that says in the log what comes and leaves.
    pub fn with_changes(changes: Arc<ChangeLog>) -> Self {
        Self { changes: Some(changes), ..Self::default() }
    }

    fn say(&self, pack: &Pack, block: &Packed, stored: bool) {
        if let Some(changes) = &self.changes {
            let (name, namespace) = (block.name, pack.namespace);
            changes.push(Change { name, namespace, tier: Tier::Object, stored });
        }
    }

    /// The namespace's packs of which it is known what is in them.
    pub fn packs_of(&self, namespace: NamespaceTag) -> Vec<Arc<Pack>> {
        self.packs.iter().filter(|pack| pack.namespace == namespace).cloned().collect()
    }

    /// Names for events of those blocks of a pack that are known to be in the bucket.
    pub fn names_in(&self, pack: &Pack, out: &mut Vec<u64>) {
        out.extend(pack.blocks.iter().filter(|block| self.blocks.contains_key(&block.digest)).map(|block| block.name));
    }

    /// Where a block is, as far as is known.
    pub fn get(&self, digest: Digest) -> Option<&Place> {
        let place = self.blocks.get(&digest)?;
        place.pack.asked.store(true, Ordering::Relaxed);
        Some(place)
    }

    /// True where a block is known to be in the bucket.
    pub fn has(&self, digest: Digest) -> bool {
        self.get(digest).is_some()
    }

    /// Blocks that are known.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Adds a pack; its blocks are found there from now on.
    pub fn insert(&mut self, pack: &Arc<Pack>) {
        for (block, at) in pack.blocks.iter().zip(0u32..) {
            if self.damaged.contains(&(place_of(pack), block.digest)) {
                continue;
            }
            self.absent.remove(&block.digest);
            if self.blocks.insert(block.digest, Place { pack: Arc::clone(pack), at }).is_none() {
                self.say(pack, block, true);
            }
        }
        self.packs.push_back(Arc::clone(pack));
        while self.blocks.len() > OBJECT_DIRECTORY_BLOCKS_MAX || self.packs.len() > OBJECT_DIRECTORY_BLOCKS_MAX {
            let Some(oldest) = self.packs.pop_front() else { break };
            if oldest.asked.swap(false, Ordering::Relaxed) && !Arc::ptr_eq(&oldest, pack) {
                self.packs.push_back(oldest);
            } else {
                self.forget_blocks(&oldest);
            }
        }
    }

    fn forget_blocks(&mut self, pack: &Arc<Pack>) {
        for block in &pack.blocks {
            if self.blocks.get(&block.digest).is_some_and(|place| Arc::ptr_eq(&place.pack, pack)) {
                self.blocks.remove(&block.digest);
                self.say(pack, block, false);
            }
        }
    }

    /// A pack is gone, or is not what it was thought to be.
    pub fn remove(&mut self, pack: &Arc<Pack>) {
        self.forget_blocks(pack);
        self.packs.retain(|known| !Arc::ptr_eq(known, pack));
    }

    /// One block of a pack is damaged: it is not looked for there again; the others may be sound, and so may other copies.
    pub fn note_damaged(&mut self, pack: &Arc<Pack>, digest: Digest) {
        if self.damaged.len() >= OBJECT_ABSENT_MAX {
            self.damaged.clear();
        }
        self.damaged.insert((place_of(pack), digest));
        if self.blocks.get(&digest).is_some_and(|place| Arc::ptr_eq(&place.pack, pack))
            && let Some(block) = self.blocks.remove(&digest).and_then(|place| place.packed())
        {
            self.say(pack, &block, false);
        }
    }

    /// No pack begins with this block, as of now.
    pub fn note_absent(&mut self, digest: Digest, until: BootTime) {
        if self.absent.len() >= OBJECT_ABSENT_MAX {
            self.absent.clear();
        }
        self.absent.insert(digest, until);
    }

    /// It is not known any more whether a pack begins with this block.
    pub fn forget_absence(&mut self, digest: Digest) {
        self.absent.remove(&digest);
    }

    /// True where it was found lately that no pack begins with this block.
    pub fn is_absent(&self, digest: Digest, now: BootTime) -> bool {
        self.absent.get(&digest).is_some_and(|until| now < *until)
    }
}

fn place_of(pack: &Pack) -> u64 {
    xxhash_rust::xxh3::xxh3_64(pack.location.as_ref().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(first: u128, blocks: u128) -> Arc<Pack> {
        let packed = |at| Packed { digest: Digest(first + at), offset: at as u64 * 4096, frame_bytes: 4096, name: 1 };
        Pack::new(Path::from(format!("{first}")), 0, 0, (0..blocks).map(packed).collect(), NamespaceTag(1))
    }

    #[test]
    fn a_block_is_where_its_newest_pack_is() {
        let mut directory = Directory::default();
        let (old, new) = (pack(1, 4), pack(3, 4));
        directory.insert(&old);
        directory.insert(&new);
        assert_eq!(directory.get(Digest(2)).unwrap().at, 1);
        assert_eq!(directory.get(Digest(3)).unwrap().pack.location, new.location);
        directory.remove(&old);
        assert!(!directory.has(Digest(1)) && directory.has(Digest(3)), "what the newer pack has stays");
        directory.note_damaged(&new, Digest(3));
        assert!(!directory.has(Digest(3)) && directory.has(Digest(4)));
        directory.insert(&new);
        assert!(!directory.has(Digest(3)), "still damaged");
        directory.insert(&old);
        assert!(directory.has(Digest(3)), "the other copy");
    }

    #[test]
    fn what_nobody_asks_for_is_forgotten_first() {
        let mut directory = Directory::default();
        let per_pack = OBJECT_DIRECTORY_BLOCKS_MAX as u128 / 4;
        for at in 0..4 {
            directory.insert(&pack(1 + at * per_pack, per_pack));
        }
        assert!(directory.has(Digest(1)));
        directory.insert(&pack(1 + 4 * per_pack, per_pack));
        assert_eq!(directory.len(), OBJECT_DIRECTORY_BLOCKS_MAX);
        assert!(directory.has(Digest(1)) && !directory.has(Digest(1 + per_pack)));
    }

    #[test]
    fn absence_is_remembered_for_a_while() {
        let mut directory = Directory::default();
        directory.note_absent(Digest(1), BootTime(100));
        assert!(directory.is_absent(Digest(1), BootTime(99)) && !directory.is_absent(Digest(1), BootTime(100)));
        directory.insert(&pack(1, 1));
        assert!(!directory.is_absent(Digest(1), BootTime(0)), "it was stored since");
    }
}
