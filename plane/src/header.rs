//! The slab header: the first page of every slab, enough to map and read the slab without asking anyone.

use std::ops::Range;

use crate::directory::SLOT_ENTRY_BYTES;

/// Bytes of the header: one page.
pub const HEADER_BYTES: usize = 4096;
/// The version that this build writes, and the only one that it reads.
pub const SLAB_VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"KVSLAB\r\n";
const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// From this size on, a slab is whole huge pages, so that hugetlbfs can back it: 6% at most is rounded up.
pub const HUGE_PAGES_FROM_BYTES: u64 = 32 << 20;

/// Where the parts of a slab lie, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlabGeometry {
    /// Bytes of one slot, a multiple of 4096.
    pub slot_bytes: u64,
    /// How many slots.
    pub slot_count: u32,
    /// Where the first slot starts.
    pub slots_offset: u64,
    /// Bytes of the whole slab.
    pub slab_bytes: u64,
}

impl SlabGeometry {
    /// The most slots of `slot_bytes` that fit in about `target_bytes` with their header and directory;
    /// one at least.
    pub fn new(slot_bytes: u64, target_bytes: u64) -> Self {
        let slot_bytes = slot_bytes.max(1).next_multiple_of(PAGE);
        let offset = |count: u64| (HEADER_BYTES as u64 + count * SLOT_ENTRY_BYTES as u64).next_multiple_of(PAGE);
        let mut count = (target_bytes / slot_bytes).clamp(1, 1 << 28);
        while count > 1 && offset(count) + count * slot_bytes > target_bytes {
            count -= (1 + (offset(count) + count * slot_bytes - target_bytes) / (slot_bytes + 64)).min(count - 1);
        }
        let slots_offset = offset(count);
        let used = slots_offset + count * slot_bytes;
        let slab_bytes = if used >= HUGE_PAGES_FROM_BYTES { used.next_multiple_of(HUGE_PAGE) } else { used };
        Self { slot_bytes, slot_count: count as u32, slots_offset, slab_bytes }
    }

    /// Where the directory lies.
    pub fn directory(&self) -> Range<u64> {
        HEADER_BYTES as u64..HEADER_BYTES as u64 + u64::from(self.slot_count) * SLOT_ENTRY_BYTES as u64
    }

    /// Where `slot` lies; `None` beyond the last.
    pub fn slot(&self, slot: u32) -> Option<Range<u64>> {
        let start = self.slots_offset + u64::from(slot) * self.slot_bytes;
        (slot < self.slot_count).then_some(start..start + self.slot_bytes)
    }

    fn is_sound(&self) -> bool {
        let slots = u64::from(self.slot_count).checked_mul(self.slot_bytes);
        let end = slots.and_then(|slots| slots.checked_add(self.slots_offset));
        self.slot_count > 0
            && self.slot_bytes > 0
            && self.slot_bytes.is_multiple_of(PAGE)
            && self.slots_offset.is_multiple_of(PAGE)
            && self.directory().end <= self.slots_offset
            && end.is_some_and(|end| end <= self.slab_bytes)
    }
}

/// Why a header was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeaderError {
    /// Fewer bytes than a header has.
    #[error("a slab header has {HEADER_BYTES} bytes, not {0}")]
    Short(usize),
    /// Not a slab.
    #[error("this is not a kvstore slab: its magic is wrong")]
    Magic,
    /// A slab of another format.
    #[error("slab version {0} is unknown: this build reads version {SLAB_VERSION}")]
    Version(u32),
    /// Damaged.
    #[error("the slab header's checksum does not match")]
    Checksum,
    /// Offsets or counts that cannot be.
    #[error("the slab header describes an impossible geometry")]
    Geometry,
}

/// What the first page says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlabHeader {
    /// Grows with every start of a daemon; a lease or layout ordinal of another epoch means nothing.
    pub epoch: u64,
    /// The daemon's number for the slab.
    pub slab: u32,
    /// BLAKE3 of the namespace's name: a slab holds blocks of one namespace.
    pub namespace_digest: [u8; 32],
    /// Where things lie.
    pub geometry: SlabGeometry,
}

impl SlabHeader {
    /// The header's page.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(HEADER_BYTES);
        page.extend_from_slice(MAGIC);
        page.extend_from_slice(&SLAB_VERSION.to_le_bytes());
        page.extend_from_slice(&self.slab.to_le_bytes());
        page.extend_from_slice(&self.epoch.to_le_bytes());
        page.extend_from_slice(&self.namespace_digest);
        page.extend_from_slice(&self.geometry.slot_bytes.to_le_bytes());
        page.extend_from_slice(&u64::from(self.geometry.slot_count).to_le_bytes());
        page.extend_from_slice(&self.geometry.slots_offset.to_le_bytes());
        page.extend_from_slice(&self.geometry.slab_bytes.to_le_bytes());
        page.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(&page).to_le_bytes());
        page.resize(HEADER_BYTES, 0);
        page
    }

    /// Reads and checks a header's page.
    pub fn decode(page: &[u8]) -> Result<Self, HeaderError> {
        if page.len() < HEADER_BYTES {
            return Err(HeaderError::Short(page.len()));
        }
        let mut fields = Fields { bytes: page, at: 0 };
        if &fields.take::<8>() != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = u32::from_le_bytes(fields.take());
        if version != SLAB_VERSION {
            return Err(HeaderError::Version(version));
        }
        let slab = u32::from_le_bytes(fields.take());
        let epoch = u64::from_le_bytes(fields.take());
        let namespace_digest = fields.take::<32>();
        let mut word = || u64::from_le_bytes(fields.take());
        let (slot_bytes, slot_count, slots_offset, slab_bytes) = (word(), word(), word(), word());
        let sum = xxhash_rust::xxh3::xxh3_64(page.get(..fields.at).unwrap_or_default());
        if u64::from_le_bytes(fields.take()) != sum {
            return Err(HeaderError::Checksum);
        }
        let slot_count = u32::try_from(slot_count).map_err(|_| HeaderError::Geometry)?;
        let geometry = SlabGeometry { slot_bytes, slot_count, slots_offset, slab_bytes };
        if !geometry.is_sound() {
            return Err(HeaderError::Geometry);
        }
        Ok(Self { epoch, slab, namespace_digest, geometry })
    }
}

struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Fields<'_> {
    /// The next `N` bytes; zeros past the end, which `decode` rules out by the page's length.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let field = self.bytes.get(self.at..self.at + N).and_then(|bytes| bytes.try_into().ok());
        self.at += N;
        field.unwrap_or([0; N])
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn geometry_fills_the_target() {
        for (slot, target) in
            [(4096, 1 << 20), (1 << 20, 64 << 20), (3 << 20, 64 << 20), (100 << 20, 64 << 20), (1, 8 << 20)]
        {
            let geometry = SlabGeometry::new(slot, target);
            assert!(geometry.is_sound(), "{geometry:?}");
            assert!(geometry.slab_bytes <= target.max(geometry.slot_bytes + (4 << 20)), "{geometry:?}");
            let next = SlabGeometry { slot_count: geometry.slot_count + 1, ..geometry };
            assert!(
                next.slots_offset + u64::from(next.slot_count) * next.slot_bytes > target,
                "room left: {geometry:?}"
            );
        }
    }

    #[test]
    fn header_survives_a_round_trip_and_no_flipped_bit() {
        let header =
            SlabHeader { epoch: 7, slab: 3, namespace_digest: [9; 32], geometry: SlabGeometry::new(1 << 20, 64 << 20) };
        let page = header.encode();
        assert_eq!(SlabHeader::decode(&page), Ok(header));
        for bit in 0..96 * 8 {
            let mut bad = page.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(SlabHeader::decode(&bad).is_err(), "bit {bit}");
        }
        assert_eq!(SlabHeader::decode(&page[..100]), Err(HeaderError::Short(100)));
    }
}
