//! A block's name, and the proof that bytes are its own: what every tier below memory goes by. Pure.
//!
//! A block is named by its namespace, its layout, its layer group and its sequence hash. Tiers name it shorter, by a [`Digest`]
//! under a seed of their own; what is stored says the whole name, and [`Wanted`] compares it before anybody sees the bytes.

use std::sync::Arc;

use kvstore_plane::{SequenceHash, SlotKey};
use kvstore_transfer::frame::FrameIdentity;
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

use crate::host::{RegisteredLayout, section_bytes};
use crate::layout::BlockKind;

/// One block, by its whole name.
#[derive(Clone, Copy)]
pub struct BlockRef<'a> {
    /// The layout.
    pub layout: &'a Arc<RegisteredLayout>,
    /// The layer group.
    pub group: u16,
    /// Its sequence hash.
    pub hash: SequenceHash,
}

impl BlockRef<'_> {
    /// What memory calls it.
    pub fn key(&self) -> SlotKey {
        SlotKey { layout: self.layout.ordinal, group: self.group, hash: self.hash }
    }

    /// What a tier with this seed calls it.
    pub fn digest(&self, seed: u64) -> Digest {
        Digest::of(seed, &self.layout.namespace_digest, &self.layout.digest, self.group, &self.hash)
    }

    /// What its frame says of it. `None` where the layout has no such group.
    pub fn identity(&self, parent: Option<SequenceHash>) -> Option<FrameIdentity> {
        Some(FrameIdentity {
            namespace_digest: self.layout.namespace_digest,
            layout_digest: self.layout.digest,
            group: self.group,
            kind: self.layout.group(u32::from(self.group))?.group.kind.number(),
            hash: padded(&self.hash),
            parent: parent.map_or(([0; 32], 0), |parent| padded(&parent)),
        })
    }

    /// Bytes of the sections of its frame.
    pub fn section_bytes(&self) -> u32 {
        let group = self.layout.group(u32::from(self.group));
        group.map_or(1, |group| section_bytes(&group.group, group.block_bytes))
    }

    /// True for a piece of a snapshot.
    pub fn is_chunk(&self) -> bool {
        self.layout.is_of_chunks(self.group)
    }

    /// The same block, to keep.
    pub fn owned(&self) -> Block {
        Block { layout: Arc::clone(self.layout), group: self.group, hash: self.hash }
    }
}

/// A [`BlockRef`] that owns its parts.
#[derive(Clone)]
pub struct Block {
    /// The layout.
    pub layout: Arc<RegisteredLayout>,
    /// The layer group.
    pub group: u16,
    /// Its sequence hash.
    pub hash: SequenceHash,
}

impl Block {
    /// The same block, borrowed.
    pub fn as_ref(&self) -> BlockRef<'_> {
        BlockRef { layout: &self.layout, group: self.group, hash: self.hash }
    }
}

/// Blocks of one layer group, in the order of their chain.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// The layout.
    pub layout: &'a Arc<RegisteredLayout>,
    /// The layer group.
    pub group: u16,
    /// Their sequence hashes.
    pub hashes: &'a [SequenceHash],
}

impl<'a> Run<'a> {
    /// Each of them.
    pub fn blocks(&self) -> impl Iterator<Item = BlockRef<'a>> + use<'a> {
        let Self { layout, group, hashes } = *self;
        hashes.iter().map(move |hash| BlockRef { layout, group, hash: *hash })
    }

    /// The same run, to keep.
    pub fn owned(&self) -> OwnedRun {
        OwnedRun { layout: Arc::clone(self.layout), group: self.group, hashes: self.hashes.to_vec() }
    }

    /// What a tier with this seed calls them.
    pub fn digests(&self, seed: u64) -> Vec<Digest> {
        self.blocks().map(|block| block.digest(seed)).collect()
    }
}

/// A [`Run`] that owns its parts.
#[derive(Clone)]
pub struct OwnedRun {
    /// The layout.
    pub layout: Arc<RegisteredLayout>,
    /// The layer group.
    pub group: u16,
    /// Their sequence hashes.
    pub hashes: Vec<SequenceHash>,
}

impl OwnedRun {
    /// The same run, borrowed.
    pub fn as_ref(&self) -> Run<'_> {
        Run { layout: &self.layout, group: self.group, hashes: &self.hashes }
    }
}

/// What a frame must say to be a block's.
#[derive(Clone, Copy)]
pub struct Wanted {
    identity: FrameIdentity,
    /// Bytes of a block, or the most where they vary.
    pub block_bytes: u64,
    /// Blocks of its kind may be shorter.
    pub varies: bool,
}

impl Wanted {
    /// Of this block. `None` where the layout has no such group.
    pub fn of(block: &BlockRef<'_>) -> Option<Self> {
        let group = block.layout.group(u32::from(block.group))?;
        let varies = group.group.kind.varies_in_length();
        Some(Self { identity: block.identity(None)?, block_bytes: group.block_bytes, varies })
    }

    /// True where a frame with this identity and as many bytes of payload is the block's; whatever its parent is.
    pub fn is(&self, identity: &FrameIdentity, block_bytes: u64) -> bool {
        let length = if self.varies { block_bytes <= self.block_bytes } else { block_bytes == self.block_bytes };
        length && self.identity == FrameIdentity { parent: self.identity.parent, ..*identity }
    }
}

/// Names a block in one tier: seeded XXH3-128 of namespace digest, layout digest, group, and hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Digest(pub u128);

impl Digest {
    /// Of the block `hash` in `group` of this layout and namespace.
    pub fn of(seed: u64, namespace: &[u8; 32], layout: &[u8; 32], group: u16, hash: &SequenceHash) -> Self {
        let (bytes, len) = padded(hash);
        Self::of_parts(seed, namespace, layout, group, &bytes, len)
    }

    fn of_parts(seed: u64, namespace: &[u8; 32], layout: &[u8; 32], group: u16, hash: &[u8; 32], len: u8) -> Self {
        let mut all = [0u8; 99];
        let parts: [&[u8]; 5] = [namespace, layout, &group.to_le_bytes(), &[len], hash];
        let bytes = parts.into_iter().flatten();
        all.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Self(xxh3_128_with_seed(&all, seed))
    }

    /// Of the block that a frame says it holds.
    pub fn of_frame(seed: u64, identity: &FrameIdentity) -> Self {
        let (hash, len) = identity.hash;
        Self::of_parts(seed, &identity.namespace_digest, &identity.layout_digest, identity.group, &hash, len)
    }

    /// The tag of a frame's parent; 0 for a root, and for kinds that can be read without their parents: only blocks of full
    /// attention are lost with theirs.
    pub fn parent_tag(seed: u64, identity: &FrameIdentity) -> u64 {
        match identity.parent {
            (_, 0) => 0,
            _ if identity.kind != BlockKind::Attention.number() => 0,
            (hash, len) => {
                Self::of_parts(seed, &identity.namespace_digest, &identity.layout_digest, identity.group, &hash, len)
                    .tag()
            }
        }
    }

    /// What draws the block to a volume: it goes to the one where this is greatest (rendezvous hashing).
    pub fn weight(self, volume_id: &[u8; 16]) -> u64 {
        xxh3_64_with_seed(volume_id, self.tag())
    }

    /// Half of it, by which children name their parent; never 0.
    pub fn tag(self) -> u64 {
        (self.0 as u64).max(1)
    }
}

/// A block's name in counts and samples: the same for all groups of a layout, which come and go together.
pub fn block_name(layout: &RegisteredLayout, hash: &SequenceHash) -> u64 {
    let seed = |digest: &[u8; 32]| digest.first_chunk().map_or(0, |front| u64::from_le_bytes(*front));
    let seed = seed(&layout.digest) ^ seed(&layout.namespace_digest).rotate_left(1);
    SlotKey { layout: 0, group: 0, hash: *hash }.table_hash(seed)
}

/// A hash, zero-padded, and its length: as frames hold it.
pub fn padded(hash: &SequenceHash) -> ([u8; 32], u8) {
    (hash.padded(), hash.byte_len() as u8)
}

/// The hash that [`padded`] made; `None` for none.
pub fn unpadded((bytes, len): &([u8; 32], u8)) -> Option<SequenceHash> {
    bytes.get(..usize::from(*len)).and_then(|bytes| SequenceHash::new(bytes).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_differ_in_every_part() {
        let hash = |bytes: &[u8]| SequenceHash::new(bytes).unwrap();
        let digest = |seed, n: u8, l: u8, group, name: &[u8]| Digest::of(seed, &[n; 32], &[l; 32], group, &hash(name));
        let base = digest(1, 1, 1, 1, b"a");
        for other in [
            digest(2, 1, 1, 1, b"a"),
            digest(1, 2, 1, 1, b"a"),
            digest(1, 1, 2, 1, b"a"),
            digest(1, 1, 1, 2, b"a"),
            digest(1, 1, 1, 1, b"a\0"),
        ] {
            assert_ne!(base, other);
        }
        let identity = FrameIdentity {
            namespace_digest: [1; 32],
            layout_digest: [1; 32],
            group: 1,
            kind: BlockKind::Attention.number(),
            hash: padded(&hash(b"a")),
            parent: padded(&hash(b"b")),
        };
        assert_eq!(Digest::of_frame(1, &identity), base);
        assert_eq!(Digest::parent_tag(1, &identity), digest(1, 1, 1, 1, b"b").tag());
        let window = FrameIdentity { kind: BlockKind::SlidingWindow { tokens: 1 }.number(), ..identity };
        assert_eq!(Digest::parent_tag(1, &window), 0, "it can be read without its parent");
        assert_eq!((unpadded(&identity.parent), unpadded(&([0; 32], 0))), (Some(hash(b"b")), None));
    }

    #[test]
    fn a_frame_is_wanted_where_every_part_of_its_name_is_the_same() {
        let identity = FrameIdentity {
            namespace_digest: [1; 32],
            layout_digest: [2; 32],
            group: 3,
            kind: 1,
            hash: ([4; 32], 32),
            parent: ([5; 32], 32),
        };
        let wanted =
            Wanted { identity: FrameIdentity { parent: ([0; 32], 0), ..identity }, block_bytes: 100, varies: false };
        assert!(wanted.is(&identity, 100) && !wanted.is(&identity, 99), "whatever its parent is");
        assert!(
            Wanted { varies: true, ..wanted }.is(&identity, 99)
                && !Wanted { varies: true, ..wanted }.is(&identity, 101)
        );
        for other in [
            FrameIdentity { namespace_digest: [9; 32], ..identity },
            FrameIdentity { layout_digest: [9; 32], ..identity },
            FrameIdentity { group: 9, ..identity },
            FrameIdentity { kind: 9, ..identity },
            FrameIdentity { hash: ([4; 32], 31), ..identity },
        ] {
            assert!(!wanted.is(&other, 100), "{other:?}");
        }
    }
}
