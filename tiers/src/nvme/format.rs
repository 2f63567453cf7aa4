//! What a volume's file and its index hold, byte by byte: `docs/design/volume.md` draws it. Pure.

use kvstore_transfer::frame::{FRAME_ALIGN, FrameIdentity};

use crate::caps::NVME_SEGMENT_BYTES_MAX;

/// The version of volume headers, segment headers and index values that this build writes and reads.
pub const VOLUME_VERSION: u16 = 1;
/// Where the segments start: before them are the two copies of the header, and room.
pub const SEGMENTS_AT: u64 = 64 << 10;
/// Bytes of a page.
pub const PAGE: u64 = FRAME_ALIGN as u64;
const VOLUME_MAGIC: &[u8; 8] = b"KVVOLUM\n";
const SEGMENT_MAGIC: &[u8; 8] = b"KVSEGMT\n";
/// Bits of a frame's generation that count frames within one life of their segment.
const SEQUENCE_BITS: u32 = 24;

/// Bytes that are no header of ours, or a damaged one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FormatError {
    /// Something else.
    #[error("{0} has the wrong magic")]
    Magic(&'static str),
    /// Written by another version.
    #[error("{0} has version {1}, which is unknown: this build reads version {VOLUME_VERSION}")]
    Version(&'static str, u16),
    /// Flipped, torn or cut off.
    #[error("{0} does not match its checksum")]
    Checksum(&'static str),
}

/// What events name the block that a frame holds.
pub fn event_name_of(identity: &FrameIdentity) -> u64 {
    let seed = kvstore_plane::name_seed(&identity.namespace_digest, &identity.layout_digest, identity.group);
    let (hash, len) = &identity.hash;
    kvstore_plane::event_name(seed, hash.get(..usize::from(*len)).unwrap_or_default())
}

/// The generation of the `sequence`th frame in a segment's `life`.
pub fn generation(life: u64, sequence: u32) -> u64 {
    life << SEQUENCE_BITS | u64::from(sequence)
}

/// The life in which a frame was written.
pub fn life_of(generation: u64) -> u64 {
    generation >> SEQUENCE_BITS
}

/// The first page of a volume's file, and the second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeHeader {
    /// Random: tells a volume from every other.
    pub volume_id: [u8; 16],
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Seeds the digests; random.
    pub seed: u64,
}

impl VolumeHeader {
    /// One page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = start(VOLUME_MAGIC);
        page.extend_from_slice(&self.volume_id);
        page.extend_from_slice(&self.segment_bytes.to_le_bytes());
        page.extend_from_slice(&self.seed.to_le_bytes());
        finish(page)
    }

    /// Reads and checks one.
    pub fn decode(page: &[u8]) -> Result<Self, FormatError> {
        let mut fields = check(page, VOLUME_MAGIC, "the volume header", 32)?;
        let header = Self { volume_id: fields.take(), segment_bytes: fields.u64(), seed: fields.u64() };
        let known = (PAGE * 2..=NVME_SEGMENT_BYTES_MAX).contains(&header.segment_bytes);
        known.then_some(header).ok_or(FormatError::Checksum("the volume header"))
    }
}

/// What the blocks of a segment have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentClass {
    /// Reclaimed in turn.
    Ordinary,
    /// Holds pinned blocks: passed over while it does.
    Pinned,
}

/// The first page of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// The volume's.
    pub volume_id: [u8; 16],
    /// Its place on the volume.
    pub number: u32,
    /// Counts the times that any segment of the volume was opened: frames of earlier lives do not count.
    pub life: u64,
    /// What it holds.
    pub class: SegmentClass,
}

impl SegmentHeader {
    /// One page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = start(SEGMENT_MAGIC);
        page.extend_from_slice(&self.volume_id);
        page.extend_from_slice(&self.life.to_le_bytes());
        page.extend_from_slice(&self.number.to_le_bytes());
        page.extend_from_slice(&u32::from(self.class == SegmentClass::Pinned).to_le_bytes());
        finish(page)
    }

    /// Reads and checks one.
    pub fn decode(page: &[u8]) -> Result<Self, FormatError> {
        let mut fields = check(page, SEGMENT_MAGIC, "the segment header", 32)?;
        let (volume_id, life, number) = (fields.take(), fields.u64(), fields.u32());
        let class = if fields.u32() == 1 { SegmentClass::Pinned } else { SegmentClass::Ordinary };
        Ok(Self { volume_id, number, life, class })
    }
}

/// Where a block is, as the index says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexValue {
    /// Its place.
    pub extent: Extent,
    /// As in its frame.
    pub generation: u64,
    /// Checksum of its frame's header.
    pub header_crc32: u32,
    /// Names the parent; 0 for a root.
    pub parent_tag: u64,
    /// The namespace's number on this volume; 0 where it is not known.
    pub namespace: u8,
    /// What events name the block; 0 where it is not known.
    pub name: u64,
}

/// A run of pages of one segment that a frame fills.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The segment.
    pub segment: u32,
    /// The first page, counted in the segment.
    pub page: u32,
    /// How many.
    pub pages: u32,
    /// The payload starts on a page of its own, behind one page of header.
    pub apart: bool,
}

impl Extent {
    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE
    }
}

/// The version of index values that this build writes; it reads version 1 as well.
const INDEX_VALUE_VERSION: u8 = 2;
/// Bytes of an index value.
pub const INDEX_VALUE_BYTES: usize = 44;
/// Bytes of one of version 1, which has no name for events.
const INDEX_VALUE_V1_BYTES: usize = 36;

impl IndexValue {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(INDEX_VALUE_BYTES);
        // Version, codec (0 plain), flags, namespace.
        out.extend_from_slice(&[INDEX_VALUE_VERSION, 0, u8::from(self.extent.apart), self.namespace]);
        out.extend_from_slice(&self.extent.segment.to_le_bytes());
        out.extend_from_slice(&self.extent.page.to_le_bytes());
        out.extend_from_slice(&self.extent.pages.to_le_bytes());
        out.extend_from_slice(&self.header_crc32.to_le_bytes());
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.parent_tag.to_le_bytes());
        out.extend_from_slice(&self.name.to_le_bytes());
        out
    }

    /// Reads one.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let name = "an index value";
        let mut fields = Fields(bytes);
        let [version, codec, flags, namespace] = fields.take();
        let length = match version {
            1 => INDEX_VALUE_V1_BYTES,
            INDEX_VALUE_VERSION => INDEX_VALUE_BYTES,
            _ => return Err(FormatError::Version(name, u16::from(version))),
        };
        if bytes.len() != length || codec != 0 {
            return Err(FormatError::Checksum(name));
        }
        let (segment, page, pages) = (fields.u32(), fields.u32(), fields.u32());
        let extent = Extent { segment, page, pages, apart: flags & 1 == 1 };
        let (header_crc32, generation, parent_tag) = (fields.u32(), fields.u64(), fields.u64());
        let name = if version == 1 { 0 } else { fields.u64() };
        Ok(Self { extent, header_crc32, generation, parent_tag, namespace, name })
    }
}

fn start(magic: &[u8; 8]) -> Vec<u8> {
    let mut page = Vec::with_capacity(FRAME_ALIGN);
    page.extend_from_slice(magic);
    page.extend_from_slice(&VOLUME_VERSION.to_le_bytes());
    page.extend_from_slice(&[0; 6]);
    page
}

fn finish(mut page: Vec<u8>) -> Vec<u8> {
    let crc = kvstore_transfer::crc32(&page);
    page.extend_from_slice(&crc.to_le_bytes());
    page.resize(FRAME_ALIGN, 0);
    page
}

fn check<'a>(page: &'a [u8], magic: &[u8; 8], name: &'static str, bytes: usize) -> Result<Fields<'a>, FormatError> {
    let mut fields = Fields(page);
    if &fields.take::<8>() != magic {
        return Err(FormatError::Magic(name));
    }
    let version = u16::from_le_bytes(fields.take());
    if version != VOLUME_VERSION {
        return Err(FormatError::Version(name, version));
    }
    let _zero: [u8; 6] = fields.take();
    let covered = page.get(..16 + bytes).ok_or(FormatError::Checksum(name))?;
    let sum = page.get(16 + bytes..20 + bytes).and_then(|sum| sum.try_into().ok()).map(u32::from_le_bytes);
    if sum != Some(kvstore_transfer::crc32(covered)) {
        return Err(FormatError::Checksum(name));
    }
    Ok(fields)
}

/// Reads fields from the front; beyond the end all is zero (lengths are checked before).
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_and_no_flipped_bit_does() {
        let volume = VolumeHeader { volume_id: [7; 16], segment_bytes: 64 << 20, seed: 42 };
        let segment = SegmentHeader { volume_id: [7; 16], number: 3, life: 1 << 33, class: SegmentClass::Pinned };
        assert_eq!(VolumeHeader::decode(&volume.encode()), Ok(volume));
        assert_eq!(SegmentHeader::decode(&segment.encode()), Ok(segment));
        for bit in 0..(16 + 32 + 4) * 8 {
            let (mut v, mut s) = (volume.encode(), segment.encode());
            v[bit / 8] ^= 1 << (bit % 8);
            s[bit / 8] ^= 1 << (bit % 8);
            assert!(VolumeHeader::decode(&v).is_err(), "bit {bit}");
            assert!(SegmentHeader::decode(&s).is_err(), "bit {bit}");
        }
        assert!(VolumeHeader::decode(&[]).is_err());
        assert!(VolumeHeader::decode(&volume.encode()[..40]).is_err());
    }

    #[test]
    fn index_values_come_back_and_unknown_versions_are_refused_by_name() {
        let extent = Extent { segment: 9, page: 17, pages: 257, apart: true };
        let value = IndexValue {
            extent,
            generation: generation(77, 3),
            header_crc32: 5,
            parent_tag: u64::MAX,
            namespace: 200,
            name: 9,
        };
        assert_eq!(IndexValue::decode(&value.encode()), Ok(value));
        assert_eq!(life_of(value.generation), 77);
        let mut newer = value.encode();
        newer[0] = 9;
        assert_eq!(IndexValue::decode(&newer), Err(FormatError::Version("an index value", 9)));
        assert!(IndexValue::decode(&value.encode()[..30]).is_err());
    }
}
