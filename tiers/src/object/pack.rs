//! Packs: what an object of the bucket holds, byte by byte: `docs/design/object.md` draws it. Pure.
//!
//! A pack is some blocks of one chain, each in its frame, and a footer that says where they lie. The frames check themselves;
//! the footer says nothing that a reader has to believe before it has read a frame.

use kvstore_plane::SequenceHash;
use kvstore_transfer::crc32;
use kvstore_transfer::frame::FRAME_ALIGN;

use crate::caps::OBJECT_PACK_BLOCKS_MAX;

/// The version of packs that this build writes, and the only one that it reads.
pub const PACK_VERSION: u16 = 1;
/// Bytes of a footer at most: it is read in one go.
pub const FOOTER_BYTES_MAX: u64 = OBJECT_PACK_BLOCKS_MAX as u64 * ENTRY_BYTES as u64 + TAIL_BYTES as u64;
const MAGIC: &[u8; 8] = b"KVPACK1\n";
const ENTRY_BYTES: usize = 64;
/// Behind the entries: identity (32 + 32 + 2), writer (16), counts (2 + 4 + 2), magic (8), checksum (4), room (2).
const TAIL_BYTES: usize = 104;

/// A block in a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackedBlock {
    /// Its name.
    pub hash: SequenceHash,
    /// Where its frame starts in the object.
    pub offset: u64,
    /// Bytes of its frame.
    pub frame_bytes: u64,
}

/// The end of a pack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Footer {
    /// BLAKE3 of the namespace's name.
    pub namespace_digest: [u8; 32],
    /// The layout's digest.
    pub layout_digest: [u8; 32],
    /// The layer group in the layout.
    pub group: u16,
    /// Who wrote it, at which try of which pack: tells a writer its own object from another's.
    pub nonce: [u8; 16],
    /// The blocks, in the order of their chain.
    pub blocks: Vec<PackedBlock>,
}

/// Bytes that are no pack of ours, or a damaged one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PackError {
    /// Cut off, or something else.
    #[error("this is not a kvstore pack: it has no footer at its end")]
    Magic,
    /// Written by another version.
    #[error("pack version {0} is unknown: this build reads version {PACK_VERSION}")]
    Version(u16),
    /// Flipped or torn.
    #[error("the pack's footer does not match its checksum")]
    Checksum,
    /// Offsets and lengths that contradict each other.
    #[error("the pack's footer contradicts itself")]
    Contradiction,
    /// More bytes of it are needed: so many, from the end.
    #[error("the pack's footer has {0} bytes, which is too many")]
    Longer(u64),
}

/// Bytes of the footer of a pack of so many blocks.
pub fn footer_bytes(blocks: usize) -> u64 {
    (blocks * ENTRY_BYTES + TAIL_BYTES) as u64
}

impl Footer {
    /// The footer's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.blocks.len() * ENTRY_BYTES + TAIL_BYTES);
        for block in &self.blocks {
            let start = out.len();
            let hash = block.hash.to_vec();
            out.push(hash.len() as u8);
            out.extend_from_slice(&hash);
            out.resize(start + 40, 0);
            out.extend_from_slice(&block.offset.to_le_bytes());
            out.extend_from_slice(&block.frame_bytes.to_le_bytes());
            out.resize(start + ENTRY_BYTES, 0);
        }
        out.extend_from_slice(&self.namespace_digest);
        out.extend_from_slice(&self.layout_digest);
        out.extend_from_slice(&self.group.to_le_bytes());
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&PACK_VERSION.to_le_bytes());
        out.extend_from_slice(&(self.blocks.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(MAGIC);
        let sum = crc32(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads the footer of an object of `object_bytes` from its last bytes.
    pub fn decode(last: &[u8], object_bytes: u64) -> Result<Self, PackError> {
        let tail_at = last.len().checked_sub(TAIL_BYTES).ok_or(PackError::Magic)?;
        let mut tail = Fields(last.get(tail_at..).unwrap_or_default());
        let (namespace_digest, layout_digest) = (tail.take()?, tail.take()?);
        let (group, nonce) = (u16::from_le_bytes(tail.take()?), tail.take()?);
        let (version, count) = (u16::from_le_bytes(tail.take()?), u32::from_le_bytes(tail.take()?));
        let _room: [u8; 4] = tail.take()?;
        if &tail.take::<8>()? != MAGIC {
            return Err(PackError::Magic);
        }
        if version != PACK_VERSION {
            return Err(PackError::Version(version));
        }
        if count == 0 || count as usize > OBJECT_PACK_BLOCKS_MAX {
            return Err(PackError::Contradiction);
        }
        let footer_bytes = count as usize * ENTRY_BYTES + TAIL_BYTES;
        let Some(at) = last.len().checked_sub(footer_bytes) else {
            return Err(PackError::Longer(footer_bytes as u64));
        };
        let covered = last.get(at..last.len() - 4).unwrap_or_default();
        if crc32(covered) != u32::from_le_bytes(tail.take()?) {
            return Err(PackError::Checksum);
        }
        let frames = object_bytes.checked_sub(footer_bytes as u64).ok_or(PackError::Contradiction)?;
        let mut blocks = Vec::with_capacity(count as usize);
        let mut end = 0u64;
        for entry in covered.chunks_exact(ENTRY_BYTES).take(count as usize) {
            let block = decode_entry(entry)?;
            if block.offset != end || block.frame_bytes == 0 || !block.frame_bytes.is_multiple_of(FRAME_ALIGN as u64) {
                return Err(PackError::Contradiction);
            }
            end = end.checked_add(block.frame_bytes).ok_or(PackError::Contradiction)?;
            blocks.push(block);
        }
        if end != frames {
            return Err(PackError::Contradiction);
        }
        Ok(Self { namespace_digest, layout_digest, group, nonce, blocks })
    }
}

fn decode_entry(entry: &[u8]) -> Result<PackedBlock, PackError> {
    let mut fields = Fields(entry);
    let [length] = fields.take()?;
    let hash: [u8; 32] = fields.take()?;
    let _room: [u8; 7] = fields.take()?;
    let hash = hash.get(..usize::from(length)).and_then(|hash| SequenceHash::new(hash).ok());
    let (offset, frame_bytes) = (u64::from_le_bytes(fields.take()?), u64::from_le_bytes(fields.take()?));
    Ok(PackedBlock { hash: hash.ok_or(PackError::Contradiction)?, offset, frame_bytes })
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], PackError> {
        let (field, rest) = self.0.split_first_chunk().ok_or(PackError::Magic)?;
        self.0 = rest;
        Ok(*field)
    }
}

/// Whether a new pack begins with this block, wherever its chain is cut otherwise: about one block in `blocks_per_pack` says
/// so by its own name. A reader that knows a chain thus knows where packs of it begin, and asks for all of them at once.
pub fn begins_pack(hash: &SequenceHash, blocks_per_pack: u64) -> bool {
    // Hashed once more: an engine's names may be anything, counters included.
    xxhash_rust::xxh3::xxh3_64(&hash.to_vec()).is_multiple_of(blocks_per_pack.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn footer(blocks: usize) -> (Footer, u64) {
        let block = |at: usize| PackedBlock {
            hash: SequenceHash::new(&(at as u64 + 1).to_be_bytes()).unwrap(),
            offset: at as u64 * 8192,
            frame_bytes: 8192,
        };
        let blocks: Vec<_> = (0..blocks).map(block).collect();
        let frames = blocks.len() as u64 * 8192;
        (Footer { namespace_digest: [1; 32], layout_digest: [2; 32], group: 3, nonce: [4; 16], blocks }, frames)
    }

    #[test]
    fn a_footer_is_read_from_the_end_of_its_object() {
        for count in [1, 2, OBJECT_PACK_BLOCKS_MAX] {
            let (footer, frames) = footer(count);
            let bytes = footer.encode();
            let object_bytes = frames + bytes.len() as u64;
            assert_eq!(Footer::decode(&bytes, object_bytes).unwrap(), footer);
            let more = [&[9u8; 100][..], &bytes].concat();
            assert_eq!(Footer::decode(&more, object_bytes).unwrap(), footer);
            let short = Footer::decode(&bytes[ENTRY_BYTES..], object_bytes);
            assert_eq!(short, Err(PackError::Longer(bytes.len() as u64)));
            assert_eq!(Footer::decode(&bytes, object_bytes + 4096), Err(PackError::Contradiction));
        }
        let (largest, _) = footer(OBJECT_PACK_BLOCKS_MAX);
        assert_eq!(largest.encode().len() as u64, FOOTER_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn a_damaged_footer_is_refused(at in 0usize..232, bit in 0u8..8) {
            let (footer, frames) = footer(2);
            let mut bytes = footer.encode();
            let object_bytes = frames + bytes.len() as u64;
            bytes[at] ^= 1 << bit;
            prop_assert!(Footer::decode(&bytes, object_bytes).is_err());
        }

        #[test]
        fn any_bytes_are_a_footer_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400), size in any::<u64>()) {
            let _ = Footer::decode(&bytes, size);
        }
    }

    #[test]
    fn about_one_block_in_many_begins_a_pack() {
        let begins =
            (0..100_000u64).filter(|at| begins_pack(&SequenceHash::new(&at.to_be_bytes()).unwrap(), 16)).count();
        assert!((5500..7000).contains(&begins), "{begins}");
    }
}
