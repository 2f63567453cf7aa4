//! Memory of chunks on their way to a store: a few pieces, each of which begins at a page and is used again and again. Finding memory anew
//! for each chunk takes longer than hashing it.

use std::sync::Arc;

use kvstore_bucket::ALIGNMENT;
use parking_lot::Mutex;

use crate::caps;
use crate::codec::FOOTER_BYTES;

/// Pieces that are not in use: at most as many as there are chunks under way.
#[derive(Default)]
pub(crate) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// One of `bytes` bytes, at most a chunk; its content is anything.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Buffer {
        let free = self.0.lock().pop();
        let memory = free.unwrap_or_else(|| vec![0; caps::CHUNK_BYTES + FOOTER_BYTES + ALIGNMENT]);
        let address = memory.as_ptr().addr();
        let start = address.next_multiple_of(ALIGNMENT) - address;
        Buffer { memory, start, bytes: bytes.min(caps::CHUNK_BYTES), home: Arc::clone(self) }
    }
}

/// A chunk's bytes, with room for a footer behind them.
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
    home: Arc<Buffers>,
}

impl Buffer {
    /// Its bytes, to be filled.
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.start..self.start + self.bytes).unwrap_or_default()
    }

    /// The same memory with a footer behind the bytes.
    pub(crate) fn with_footer(mut self, footer: &[u8; FOOTER_BYTES]) -> Self {
        let end = self.start + self.bytes;
        if let Some(behind) = self.memory.get_mut(end..end + FOOTER_BYTES) {
            behind.copy_from_slice(footer);
            self.bytes += FOOTER_BYTES;
        }
        self
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.bytes).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.home.0.lock();
        if free.len() < caps::PLAIN_CHUNKS_AT_ONCE {
            free.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_used_again_and_begin_at_a_page() {
        let buffers = Arc::new(Buffers::default());
        let mut first = buffers.take(caps::CHUNK_BYTES);
        first.as_mut().fill(7);
        let address = first.as_ref().as_ptr();
        assert!(address.addr().is_multiple_of(ALIGNMENT));
        let stored = bytes::Bytes::from_owner(first.with_footer(&[9; FOOTER_BYTES]));
        assert_eq!((stored.len(), stored.as_ptr()), (caps::CHUNK_BYTES + FOOTER_BYTES, address));
        assert!(stored.ends_with(&[9; FOOTER_BYTES]) && stored[..caps::CHUNK_BYTES].iter().all(|byte| *byte == 7));
        let copies = [stored.clone(), stored.slice(5..10)];
        drop(stored);
        assert_ne!(buffers.take(1).as_ref().as_ptr(), address, "it is in use");
        drop(copies);
        assert_eq!(buffers.take(10).as_ref().as_ptr(), address);
        let many: Vec<Buffer> = (0..2 * caps::PLAIN_CHUNKS_AT_ONCE).map(|_| buffers.take(1)).collect();
        drop(many);
        assert_eq!(buffers.0.lock().len(), caps::PLAIN_CHUNKS_AT_ONCE);
    }
}
