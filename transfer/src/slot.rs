//! One slot's bytes: the right to fill them once, and the right to read them.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::frame::FRAME_ALIGN;
use crate::shared::SharedMemory;
use crate::slab::Slab;
use crate::sums::SectionSums;

/// Copied and checksummed in steps of this many bytes: small enough that the checksum reads the copy from
/// the cache.
const STEP_BYTES: usize = 32 << 10;

/// Bytes that are fetched from shared memory in one go: half of a first-level cache.
const BOUNCE_BYTES: usize = 16 << 10;
/// From this many bytes on a slot is written past the cache: smaller blocks are read again soon, by many at once.
const STREAM_FROM_BYTES: usize = 64 << 10;

/// More bytes than were announced.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{given} bytes were given, but only {room} are left of the block")]
pub struct FillError {
    /// Bytes that the caller wanted to add.
    pub given: usize,
    /// Bytes that the block still lacks.
    pub room: usize,
}

/// The exclusive right to fill one slot, front to back.
pub struct SlotFill {
    slab: Arc<Slab>,
    start: NonNull<u8>,
    filled: usize,
    length: usize,
    /// The most that it may become: what was announced.
    length_max: usize,
    sums: SectionSums,
}

// SAFETY: the slot belongs to this value alone (SlotFill::new), wherever it moves.
unsafe impl Send for SlotFill {}
// SAFETY: &SlotFill reads two integers; writing takes &mut.
unsafe impl Sync for SlotFill {}

impl SlotFill {
    /// The right to fill `slot` of `slab` with `length` bytes; `None` where the slot or that many bytes do
    /// not exist.
    ///
    /// # Safety
    /// Until this value is gone, nobody else fills the slot and nobody reads it.
    pub unsafe fn new(slab: Arc<Slab>, slot: u32, length: usize) -> Option<Self> {
        let start = slab.slot_start(slot)?;
        let fits = length as u64 <= slab.geometry().slot_bytes;
        fits.then(|| Self { slab, start, filled: 0, length, length_max: length, sums: SectionSums::new(usize::MAX) })
    }

    /// Takes the checksums of sections of this many bytes too. Before the first byte.
    pub fn with_sections(mut self, section_bytes: u32) -> Self {
        self.sums = SectionSums::new(section_bytes as usize);
        self
    }

    /// Copies `bytes` behind what is there; checksums the copy, never the source.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), FillError> {
        let room = self.length - self.filled;
        if bytes.len() > room {
            return Err(FillError { given: bytes.len(), room });
        }
        for step in bytes.chunks(STEP_BYTES) {
            // SAFETY: filled + step.len() <= length <= slot_bytes: inside the mapped slot.
            let to = unsafe { self.start.add(self.filled) };
            // SAFETY: the slot is ours alone (new), and `bytes` is a reference elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(step.as_ptr(), to.as_ptr(), step.len()) };
            // SAFETY: just written, and nobody else writes here.
            let copied = unsafe { std::slice::from_raw_parts(to.as_ptr(), step.len()) };
            self.sums.update(copied);
            self.filled += step.len();
        }
        Ok(())
    }

    /// Copies `bytes` bytes of `source` from `offset` on behind what is there, while others may write to the source;
    /// checksums the copy, never the source. False, and nothing copied, where they are not all inside of it.
    pub fn append_shared(&mut self, source: &SharedMemory, offset: u64, bytes: usize) -> Result<bool, FillError> {
        let room = self.length - self.filled;
        if bytes > room {
            return Err(FillError { given: bytes, room });
        }
        if !offset.is_multiple_of(8) || offset.checked_add(bytes as u64).is_none_or(|end| end > source.byte_len()) {
            return Ok(false);
        }
        // By way of a few KiB of our own, which stay in the nearest cache: the checksum is taken of what can no longer change,
        // and the slot is written past the cache, without being read first.
        let mut own = [0u8; BOUNCE_BYTES];
        let mut copied = 0;
        while copied < bytes {
            let step = BOUNCE_BYTES.min(bytes - copied);
            let own = own.get_mut(..step).unwrap_or_default();
            source.copy_racy(offset + copied as u64, own);
            self.sums.update(own);
            // SAFETY: filled + step <= length <= slot_bytes: inside the mapped slot.
            let to = unsafe { self.start.add(self.filled) };
            // SAFETY: mapped, initialised, and the slot is ours alone (new).
            let to = unsafe { std::slice::from_raw_parts_mut(to.as_ptr(), step) };
            if bytes >= STREAM_FROM_BYTES {
                kvstore_plane::stream_copy(own, to);
            } else {
                to.copy_from_slice(own);
            }
            self.filled += step;
            copied += step;
        }
        Ok(true)
    }

    /// Bytes still missing.
    pub fn room(&self) -> usize {
        self.length - self.filled
    }

    /// Bytes that the block will have.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The checksum of what was filled.
    pub fn crc32(&self) -> u32 {
        self.sums.crc32()
    }

    /// The checksums of the sections filled so far.
    pub fn section_sums(&self) -> Vec<u32> {
        self.sums.clone().sections()
    }

    /// The block turned out shorter than it might have been.
    pub fn shorten(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Begins again with the first byte: what was filled so far is not the block, nor is its length.
    pub fn restart(&mut self) {
        self.filled = 0;
        self.length = self.length_max;
        self.sums = self.sums.restarted();
    }

    /// The slot's pages that a transfer may fill: enough for the block.
    pub(crate) fn pages(&self) -> (NonNull<u8>, usize) {
        (self.start, self.length.next_multiple_of(FRAME_ALIGN))
    }

    /// The block's bytes, after a transfer filled the slot's pages and nobody does any more.
    pub fn transferred(&mut self) -> &[u8] {
        self.filled = self.length;
        // SAFETY: length bytes of the slot are mapped (new); the slot is ours alone, and a transfer owns
        // its SlotFill until the kernel is done, so that nothing writes while &mut self is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    /// The slab that the slot is in.
    pub fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }
}

/// The right to read one published block where it lies.
pub struct SlotBytes {
    slab: Arc<Slab>,
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: read-only bytes that nobody changes while this value exists (SlotBytes::new).
unsafe impl Send for SlotBytes {}
// SAFETY: as above.
unsafe impl Sync for SlotBytes {}

impl SlotBytes {
    /// The first `length` bytes of `slot`; `None` where they do not exist.
    ///
    /// # Safety
    /// Until this value is gone, nobody writes to the slot.
    pub unsafe fn new(slab: Arc<Slab>, slot: u32, length: usize) -> Option<Self> {
        let start = slab.slot_start(slot)?;
        let fits = length as u64 <= slab.geometry().slot_bytes;
        fits.then_some(Self { slab, start, length })
    }

    /// The slab that the slot is in.
    pub fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }

    /// The slot's pages that hold the block; behind its end, whatever earlier blocks left.
    pub(crate) fn pages(&self) -> (NonNull<u8>, usize) {
        (self.start, self.length.next_multiple_of(FRAME_ALIGN))
    }
}

impl Deref for SlotBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the slot (new), which stays mapped with the slab and unchanged by new's promise.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HugePages;
    use kvstore_plane::{SlabGeometry, SlabHeader};
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn slab(accounted: &Arc<AtomicU64>) -> Arc<Slab> {
        let geometry = SlabGeometry::new(8192, 1 << 20);
        let header = SlabHeader { epoch: 1, slab: 0, namespace_digest: [0; 32], geometry };
        accounted.fetch_add(geometry.slab_bytes, Ordering::AcqRel);
        Arc::new(Slab::create(header, HugePages::Auto, Arc::clone(accounted)).unwrap())
    }

    #[test]
    fn bytes_come_back_with_their_checksum() {
        let accounted = Arc::new(AtomicU64::new(0));
        let slab = slab(&accounted);
        let data: Vec<u8> = (0..8000u32).map(|i| (i * 7) as u8).collect();
        let last = slab.geometry().slot_count - 1;
        // SAFETY: the only user of the slab.
        let mut fill = unsafe { SlotFill::new(Arc::clone(&slab), last, data.len()) }.unwrap();
        fill.append(&data[..100]).unwrap();
        fill.append(&data[100..]).unwrap();
        assert_eq!(fill.append(&[1]), Err(FillError { given: 1, room: 0 }));
        assert_eq!(fill.crc32(), crate::crc32(&data));
        // A length that damaged bytes said must not cut off what comes from elsewhere.
        fill.shorten(10);
        fill.restart();
        assert_eq!((fill.room(), fill.length()), (data.len(), data.len()));
        fill.append(&data).unwrap();
        drop(fill);
        // SAFETY: filled, and no fill is left.
        let bytes = unsafe { SlotBytes::new(Arc::clone(&slab), last, data.len()) }.unwrap();
        assert_eq!(&*bytes, &data[..]);
        // SAFETY: never handed out.
        assert!(unsafe { SlotFill::new(Arc::clone(&slab), last + 1, 1) }.is_none());
        // SAFETY: never handed out.
        assert!(unsafe { SlotFill::new(Arc::clone(&slab), last, 8193) }.is_none());
    }

    #[test]
    fn bytes_are_counted_until_the_last_reader_goes() {
        let accounted = Arc::new(AtomicU64::new(0));
        let slab = slab(&accounted);
        assert_eq!(accounted.load(Ordering::Acquire), slab.geometry().slab_bytes);
        // SAFETY: nobody fills the slot.
        let reader = unsafe { SlotBytes::new(Arc::clone(&slab), 0, 4096) }.unwrap();
        drop(slab);
        assert!(accounted.load(Ordering::Acquire) > 0);
        drop(reader);
        assert_eq!(accounted.load(Ordering::Acquire), 0);
    }

    /// A client that is passed the descriptor must neither map it for writing, nor shrink it under the
    /// daemon, nor reopen it through /proc with more rights.
    #[test]
    fn a_passed_descriptor_cannot_be_written_or_truncated() {
        let slab = slab(&Arc::default());
        assert!(rustix::fs::ftruncate(slab.as_fd(), 0).is_err());
        assert!(rustix::io::write(slab.as_fd(), b"x").is_err());
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let flags = rustix::mm::MapFlags::SHARED;
        // SAFETY: a fresh mapping, which must fail.
        let mapped = unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4096, protection, flags, slab.as_fd(), 0) };
        assert!(mapped.is_err());
        let mode = rustix::fs::fstat(slab.as_fd()).unwrap().st_mode & 0o777;
        assert_eq!(mode, 0o600);
    }
}
