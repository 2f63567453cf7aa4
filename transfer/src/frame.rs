//! Frames: a block as it is stored, on a volume, in an object or on its way between daemons.
//!
//! A frame says everything about its block: identity, length, codec, generation, and a checksum for each
//! section (a run of layers), so that an index can be rebuilt from frames alone and a part can be used
//! before the rest has come. `docs/design/frame.md` draws it byte by byte. Encoding and decoding touch
//! memory alone.

use crc32fast::Hasher;

use crate::sums::behind;

/// The version that this build writes, and the only one that it reads.
pub const FRAME_VERSION: u16 = 1;
/// Sections of a frame at most: a checksum for each of 128 runs of layers keeps the header in a page.
pub const SECTIONS_MAX: usize = 128;
/// Frames start and end on this boundary, that of direct I/O.
pub const FRAME_ALIGN: usize = 4096;
const MAGIC: &[u8; 8] = b"KVFRAME\n";
const FIXED_BYTES: usize = 232;
/// From this payload on, the payload starts on a boundary of its own and can be written from a slot
/// without a copy; smaller ones follow the header at once.
const ALIGNED_PAYLOAD_BYTES: u64 = 64 << 10;

/// How the payload is coded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    /// As it was put.
    Plain,
}

/// Whose bytes they are. Opaque to this crate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameIdentity {
    /// BLAKE3 of the namespace's name.
    pub namespace_digest: [u8; 32],
    /// The layout's digest.
    pub layout_digest: [u8; 32],
    /// The layer group in the layout.
    pub group: u16,
    /// The block kind's number.
    pub kind: u8,
    /// The sequence hash, zero-padded, and how many of its bytes count.
    pub hash: ([u8; 32], u8),
    /// The parent's sequence hash; length 0 for a root.
    pub parent: ([u8; 32], u8),
}

/// A frame's header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Whose bytes.
    pub identity: FrameIdentity,
    /// Tells this copy from earlier ones in the same place.
    pub generation: u64,
    /// How the payload is coded.
    pub codec: Codec,
    /// Bytes of the block once decoded.
    pub block_bytes: u64,
    /// Each section's stored bytes and checksum, in order; together they are the payload.
    pub sections: Vec<Section>,
}

/// A run of layers in the payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Section {
    /// Stored bytes.
    pub bytes: u32,
    /// CRC-32 of the identity, the generation and the stored bytes: see [`FrameHeader::section_crc32`].
    pub crc32: u32,
}

/// Why bytes are no frame of ours, or a damaged one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Cut off.
    #[error("a frame header of {need} bytes was cut off at {have}")]
    Short {
        /// Bytes that the header has.
        need: usize,
        /// Bytes given.
        have: usize,
    },
    /// Not a frame.
    #[error("this is not a kvstore frame: its magic is wrong")]
    Magic,
    /// A frame of another format.
    #[error("frame version {0} is unknown: this build reads version {FRAME_VERSION}")]
    Version(u16),
    /// Coded in a way that this build does not know.
    #[error("codec {0} is unknown: this build reads codec 0 (plain)")]
    Codec(u8),
    /// The header's own checksum does not match.
    #[error("the frame header's checksum does not match")]
    HeaderChecksum,
    /// A section's checksum does not match.
    #[error("section {0} of the frame does not match its checksum")]
    SectionChecksum(usize),
    /// Lengths that contradict each other.
    #[error("the frame's lengths contradict each other")]
    Lengths,
}

impl FrameHeader {
    /// From this payload on, the payload starts on a boundary of its own, behind one page of header.
    pub const APART_FROM_BYTES: u64 = ALIGNED_PAYLOAD_BYTES;

    /// The header of a plain frame of `payload`, cut into sections of `section_bytes`; the last may be
    /// shorter. `None` for an empty payload, or one that would need more than [`SECTIONS_MAX`] sections.
    pub fn plain(identity: FrameIdentity, generation: u64, payload: &[u8], section_bytes: u32) -> Option<Self> {
        let sections = payload.chunks(section_bytes.max(1) as usize);
        if payload.is_empty() || sections.len() > SECTIONS_MAX {
            return None;
        }
        let block_bytes = payload.len() as u64;
        let mut header = Self { identity, generation, codec: Codec::Plain, block_bytes, sections: Vec::new() };
        header.sections =
            sections.map(|bytes| Section { bytes: bytes.len() as u32, crc32: header.section_crc32(bytes) }).collect();
        Some(header)
    }

    /// The header of a plain frame of a block of `block_bytes`, whose sections of `section_bytes` have these
    /// CRC-32s. `None` where they cannot be those of such a block.
    pub fn of_sums(
        identity: FrameIdentity,
        generation: u64,
        block_bytes: u64,
        section_bytes: u32,
        sums: &[u32],
    ) -> Option<Self> {
        let count = block_bytes.div_ceil(u64::from(section_bytes.max(1)));
        if count == 0 || count > SECTIONS_MAX as u64 || count != sums.len() as u64 {
            return None;
        }
        let mut header = Self { identity, generation, codec: Codec::Plain, block_bytes, sections: Vec::new() };
        let front = header.front();
        let mut left = block_bytes;
        header.sections = sums
            .iter()
            .map(|sum| {
                let bytes = left.min(u64::from(section_bytes));
                left -= bytes;
                Section { bytes: bytes as u32, crc32: behind(&front, *sum, bytes) }
            })
            .collect();
        Some(header)
    }

    /// The header of the same block under another generation: from the checksums alone.
    pub fn rebind(&self, generation: u64) -> Self {
        let (old, new) = (self.front(), Self { generation, ..self.clone() }.front());
        let sections = self
            .sections
            .iter()
            .map(|section| {
                // CRC-32 is linear: what the front contributes can be taken out and put in.
                let bytes = u64::from(section.bytes);
                Section { crc32: section.crc32 ^ behind(&old, 0, bytes) ^ behind(&new, 0, bytes), ..*section }
            })
            .collect();
        Self { generation, sections, ..self.clone() }
    }

    fn front(&self) -> Hasher {
        let mut front = Hasher::new();
        front.update(&self.identity_bytes());
        front.update(&self.block_bytes.to_le_bytes());
        front
    }

    /// Checks every section of `payload`; the CRC-32 of the block, taken in the same pass.
    pub fn check(&self, payload: &[u8]) -> Result<u32, FrameError> {
        let front = self.front();
        let mut whole = Hasher::new();
        let mut rest = payload;
        for (at, section) in self.sections.iter().enumerate() {
            let (bytes, after) = rest.split_at_checked(section.bytes as usize).ok_or(FrameError::Lengths)?;
            let mut plain = Hasher::new();
            plain.update(bytes);
            whole.combine(&plain);
            if behind(&front, plain.finalize(), bytes.len() as u64) != section.crc32 {
                return Err(FrameError::SectionChecksum(at));
            }
            rest = after;
        }
        if rest.is_empty() { Ok(whole.finalize()) } else { Err(FrameError::Lengths) }
    }

    /// CRC-32 over the identity fields and the generation as the header stores them, then `stored`: bytes
    /// of another block, or of an earlier generation, never match.
    pub fn section_crc32(&self, stored: &[u8]) -> u32 {
        let mut crc = Hasher::new();
        crc.update(&self.identity_bytes());
        crc.update(&self.block_bytes.to_le_bytes());
        crc.update(stored);
        crc.finalize()
    }

    /// Stored bytes of all sections.
    pub fn payload_bytes(&self) -> u64 {
        self.sections.iter().map(|section| u64::from(section.bytes)).sum()
    }

    /// Where the payload starts in the frame.
    pub fn payload_offset(&self) -> usize {
        let end = FIXED_BYTES + self.sections.len() * 8 + 4;
        let align = if self.payload_bytes() >= ALIGNED_PAYLOAD_BYTES { FRAME_ALIGN } else { 64 };
        end.next_multiple_of(align)
    }

    /// Bytes of the whole frame, padding included.
    pub fn frame_bytes(&self) -> u64 {
        (self.payload_offset() as u64 + self.payload_bytes()).next_multiple_of(FRAME_ALIGN as u64)
    }

    /// The header's bytes, padded up to where the payload starts.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.payload_offset());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FRAME_VERSION.to_le_bytes());
        out.extend_from_slice(&(self.sections.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.payload_offset() as u32).to_le_bytes());
        out.extend_from_slice(&self.block_bytes.to_le_bytes());
        out.extend_from_slice(&self.payload_bytes().to_le_bytes());
        out.extend_from_slice(&self.identity_bytes());
        out.resize(FIXED_BYTES, 0);
        for section in &self.sections {
            out.extend_from_slice(&section.bytes.to_le_bytes());
            out.extend_from_slice(&section.crc32.to_le_bytes());
        }
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.resize(self.payload_offset(), 0);
        out
    }

    /// The header's own checksum, as it stands in an encoded header.
    pub fn header_crc32(encoded: &[u8]) -> u32 {
        let count = encoded.get(10..12).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes);
        let at = FIXED_BYTES + usize::from(count) * 8;
        encoded.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    /// Reads and checks the header at the start of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields { bytes, at: 0 };
        if &fields.take::<8>()? != MAGIC {
            return Err(FrameError::Magic);
        }
        let version = u16::from_le_bytes(fields.take()?);
        if version != FRAME_VERSION {
            return Err(FrameError::Version(version));
        }
        let section_count = usize::from(u16::from_le_bytes(fields.take()?));
        let payload_offset = u32::from_le_bytes(fields.take()?) as usize;
        let block_bytes = u64::from_le_bytes(fields.take()?);
        let payload_bytes = u64::from_le_bytes(fields.take()?);
        if section_count == 0 || section_count > SECTIONS_MAX {
            return Err(FrameError::Lengths);
        }
        let sum_at = FIXED_BYTES + section_count * 8;
        let covered = bytes.get(..sum_at).ok_or(FrameError::Short { need: sum_at + 4, have: bytes.len() })?;
        let mut sum = Fields { bytes, at: sum_at };
        if u32::from_le_bytes(sum.take()?) != crc32fast::hash(covered) {
            return Err(FrameError::HeaderChecksum);
        }
        let (identity, generation, codec) = decode_identity(&mut fields)?;
        fields.at = FIXED_BYTES;
        let sections = (0..section_count)
            .map(|_| {
                Ok(Section { bytes: u32::from_le_bytes(fields.take()?), crc32: u32::from_le_bytes(fields.take()?) })
            })
            .collect::<Result<Vec<_>, FrameError>>()?;
        let header = Self { identity, generation, codec, block_bytes, sections };
        let lengths_agree = header.payload_bytes() == payload_bytes
            && header.payload_offset() == payload_offset
            && block_bytes == payload_bytes;
        if lengths_agree { Ok(header) } else { Err(FrameError::Lengths) }
    }

    /// Checks every section of `payload`.
    pub fn verify(&self, payload: &[u8]) -> Result<(), FrameError> {
        let mut rest = payload;
        for (at, section) in self.sections.iter().enumerate() {
            let (bytes, after) = rest.split_at_checked(section.bytes as usize).ok_or(FrameError::Lengths)?;
            if self.section_crc32(bytes) != section.crc32 {
                return Err(FrameError::SectionChecksum(at));
            }
            rest = after;
        }
        Ok(())
    }

    fn identity_bytes(&self) -> Vec<u8> {
        let identity = &self.identity;
        let mut out = Vec::with_capacity(160);
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&identity.namespace_digest);
        out.extend_from_slice(&identity.layout_digest);
        out.extend_from_slice(&identity.group.to_le_bytes());
        let Codec::Plain = self.codec;
        out.extend_from_slice(&[identity.kind, 0, identity.hash.1, identity.parent.1]);
        out.extend_from_slice(&identity.hash.0);
        out.extend_from_slice(&identity.parent.0);
        out
    }
}

fn decode_identity(fields: &mut Fields<'_>) -> Result<(FrameIdentity, u64, Codec), FrameError> {
    let generation = u64::from_le_bytes(fields.take()?);
    let (namespace_digest, layout_digest) = (fields.take()?, fields.take()?);
    let group = u16::from_le_bytes(fields.take()?);
    let [kind, codec, hash_len, parent_len] = fields.take()?;
    let (hash, parent) = (fields.take()?, fields.take()?);
    if codec != 0 {
        return Err(FrameError::Codec(codec));
    }
    if hash_len == 0 || hash_len > 32 || parent_len > 32 {
        return Err(FrameError::Lengths);
    }
    let identity = FrameIdentity {
        namespace_digest,
        layout_digest,
        group,
        kind,
        hash: (hash, hash_len),
        parent: (parent, parent_len),
    };
    Ok((identity, generation, Codec::Plain))
}

struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let cut = FrameError::Short { need: self.at + N, have: self.bytes.len() };
        let field = self.bytes.get(self.at..self.at + N).and_then(|bytes| bytes.try_into().ok()).ok_or(cut)?;
        self.at += N;
        Ok(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> FrameIdentity {
        FrameIdentity {
            namespace_digest: [1; 32],
            layout_digest: [2; 32],
            group: 3,
            kind: 1,
            hash: ([4; 32], 32),
            parent: ([5; 32], 16),
        }
    }

    #[test]
    fn a_frame_comes_back_and_no_flipped_bit_does() {
        let payload: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        let header = FrameHeader::plain(identity(), 42, &payload, 4096).unwrap();
        assert_eq!(header.sections.len(), 3);
        let bytes = header.encode();
        assert_eq!(bytes.len(), header.payload_offset());
        assert_eq!(FrameHeader::decode(&bytes), Ok(header.clone()));
        header.verify(&payload).unwrap();
        assert_eq!(header.check(&payload), Ok(crate::crc32(&payload)));
        let sums: Vec<u32> = payload.chunks(4096).map(crate::crc32).collect();
        assert_eq!(FrameHeader::of_sums(identity(), 42, 10_000, 4096, &sums), Some(header.clone()));
        assert_eq!(FrameHeader::of_sums(identity(), 42, 10_000, 4096, &sums[1..]), None);
        let later = FrameHeader::plain(identity(), 43, &payload, 4096).unwrap();
        assert_eq!(header.rebind(43), later);
        for bit in 0..(FIXED_BYTES + 3 * 8 + 4) * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(FrameHeader::decode(&bad).is_err(), "bit {bit} of the header");
        }
        let mut bad = payload.clone();
        bad[5000] ^= 1;
        assert_eq!(header.verify(&bad), Err(FrameError::SectionChecksum(1)));
        assert_eq!(header.check(&bad), Err(FrameError::SectionChecksum(1)));
        for cut in 0..bytes.len().min(FIXED_BYTES + 28) {
            assert!(FrameHeader::decode(&bytes[..cut]).is_err());
        }
    }

    /// The same bytes under another name, or written earlier, must not pass for this block's.
    #[test]
    fn checksums_are_bound_to_identity_and_generation() {
        let header = FrameHeader::plain(identity(), 1, b"bytes", 4096).unwrap();
        let renamed = FrameIdentity { hash: ([6; 32], 32), ..identity() };
        let other_name = FrameHeader { identity: renamed, ..header.clone() };
        assert_eq!(other_name.verify(b"bytes"), Err(FrameError::SectionChecksum(0)));
        let later = FrameHeader { generation: 2, ..header.clone() };
        assert_eq!(later.verify(b"bytes"), Err(FrameError::SectionChecksum(0)));
        let elsewhere = FrameIdentity { layout_digest: [9; 32], ..identity() };
        assert!(FrameHeader { identity: elsewhere, ..header }.verify(b"bytes").is_err());
    }

    #[test]
    fn large_payloads_start_on_a_boundary() {
        let payload = vec![7; 1 << 20];
        let header = FrameHeader::plain(identity(), 1, &payload, 64 << 10).unwrap();
        assert_eq!(header.payload_offset() % FRAME_ALIGN, 0);
        assert_eq!(header.frame_bytes(), (1 << 20) + 4096);
        assert!(FrameHeader::plain(identity(), 1, &payload, 4096).is_none(), "256 sections do not fit");
        assert!(FrameHeader::plain(identity(), 1, &[], 4096).is_none());
    }
}
