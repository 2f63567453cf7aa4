//! A ring of records between two processes: one writes, the other reads; each owns one of the two positions.
//!
//! A record is a head word (length in bytes, kind), a tag word, and the payload in whole words. Records are copied out
//! before anyone looks at them, so that what is checked is what is used. A position from the other side is
//! believed only as far as the ring's capacity.
//!
//! ```text
//! word 0   payload bytes (bits 0-31), kind (32-47)
//! word 1   tag
//! word 2.. payload, zero-padded
//! ```

use crate::sync::{AtomicU64, Ordering};

/// Words of a record before its payload.
const HEAD_WORDS: usize = 2;

/// The other side's position, or a record, is one that it cannot have by the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other side of the ring wrote invalid data into it")]
pub struct Corrupt;

/// What a record is, beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHead {
    /// What the payload means.
    pub kind: u16,
    /// Which call it belongs to.
    pub tag: u64,
}

/// Memory of a ring, and both positions, in words since the start.
#[derive(Clone, Copy)]
pub struct RingView<'a> {
    /// As many words as a power of two.
    pub words: &'a [AtomicU64],
    /// Written by the writer.
    pub written: &'a AtomicU64,
    /// Written by the reader.
    pub read: &'a AtomicU64,
}

impl RingView<'_> {
    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.words.get(at as usize & self.words.len().wrapping_sub(1))
    }

    /// Bytes of the largest payload: a quarter of the ring, so that one record never waits for an empty ring.
    pub fn payload_bytes_max(&self) -> usize {
        (self.words.len() / 4).saturating_sub(HEAD_WORDS) * 8
    }
}

/// The writing side.
#[derive(Debug, Default)]
pub struct RingWriter {
    written: u64,
}

/// What came of [`RingWriter::push`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Push {
    /// It is there.
    Written,
    /// No room now: once the reader has read.
    Full,
    /// Larger than any record may be.
    TooLarge,
}

impl RingWriter {
    /// A writer of a ring of which nothing was written yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a record, whole or not at all.
    pub fn push(&mut self, ring: &RingView<'_>, head: RecordHead, payload: &[u8]) -> Result<Push, Corrupt> {
        if payload.len() > ring.payload_bytes_max() {
            return Ok(Push::TooLarge);
        }
        let in_use = self.written.wrapping_sub(ring.read.load(Ordering::Acquire));
        let capacity = ring.words.len() as u64;
        if in_use > capacity {
            return Err(Corrupt);
        }
        let words = (HEAD_WORDS + payload.len().div_ceil(8)) as u64;
        if capacity - in_use < words {
            return Ok(Push::Full);
        }
        let mut at = self.written;
        let mut write = |word: u64| {
            if let Some(to) = ring.word(at) {
                to.store(word, Ordering::Relaxed);
            }
            at = at.wrapping_add(1);
        };
        write(payload.len() as u64 | u64::from(head.kind) << 32);
        write(head.tag);
        for chunk in payload.chunks(8) {
            let mut word = [0u8; 8];
            for (to, from) in word.iter_mut().zip(chunk) {
                *to = *from;
            }
            write(u64::from_le_bytes(word));
        }
        self.written = at;
        ring.written.store(at, Ordering::Release);
        Ok(Push::Written)
    }
}

/// The reading side.
#[derive(Debug, Default)]
pub struct RingReader {
    read: u64,
}

impl RingReader {
    /// A reader of a ring of which nothing was read yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// True where a record waits.
    pub fn has_record(&self, ring: &RingView<'_>) -> bool {
        ring.written.load(Ordering::Acquire) != self.read
    }

    /// The next record, its payload in `payload` instead of what was there.
    pub fn pop(&mut self, ring: &RingView<'_>, payload: &mut Vec<u8>) -> Result<Option<RecordHead>, Corrupt> {
        let waiting = ring.written.load(Ordering::Acquire).wrapping_sub(self.read);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > ring.words.len() as u64 || waiting < HEAD_WORDS as u64 {
            return Err(Corrupt);
        }
        let mut at = self.read;
        let mut next = || {
            let word = ring.word(at).map_or(0, |word| word.load(Ordering::Relaxed));
            at = at.wrapping_add(1);
            word
        };
        let (first, tag) = (next(), next());
        let bytes = first as u32 as usize;
        let words = bytes.div_ceil(8);
        if bytes > ring.payload_bytes_max() || (HEAD_WORDS + words) as u64 > waiting {
            return Err(Corrupt);
        }
        payload.clear();
        payload.reserve(words * 8);
        (0..words).for_each(|_| payload.extend_from_slice(&next().to_le_bytes()));
        payload.truncate(bytes);
        self.read = at;
        ring.read.store(at, Ordering::Release);
        Ok(Some(RecordHead { kind: (first >> 32) as u16, tag }))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Memory {
        words: Vec<AtomicU64>,
        written: AtomicU64,
        read: AtomicU64,
    }

    impl Memory {
        fn new(words: usize) -> Self {
            let words = (0..words).map(|_| AtomicU64::new(0)).collect();
            Self { words, written: AtomicU64::new(0), read: AtomicU64::new(0) }
        }

        fn view(&self) -> RingView<'_> {
            RingView { words: &self.words, written: &self.written, read: &self.read }
        }
    }

    proptest! {
        #[test]
        fn records_come_out_as_they_went_in(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..60)) {
            let memory = Memory::new(128);
            let (mut writer, mut reader) = (RingWriter::new(), RingReader::new());
            let mut expected = std::collections::VecDeque::new();
            let mut out = Vec::new();
            for (tag, payload) in payloads.iter().enumerate() {
                let head = RecordHead { kind: payload.len() as u16, tag: tag as u64 };
                loop {
                    match writer.push(&memory.view(), head, payload).unwrap() {
                        Push::Written => { expected.push_back((head, payload.clone())); break }
                        Push::TooLarge => break,
                        Push::Full => {
                            let got = reader.pop(&memory.view(), &mut out).unwrap().unwrap();
                            prop_assert_eq!((got, out.clone()), expected.pop_front().unwrap());
                        }
                    }
                }
            }
            while let Some(got) = reader.pop(&memory.view(), &mut out).unwrap() {
                prop_assert_eq!((got, out.clone()), expected.pop_front().unwrap());
            }
            prop_assert!(expected.is_empty());
        }

        /// Whatever a hostile peer writes, a reader reads inside the ring, allocates no more than a record's
        /// bytes, and ends.
        #[test]
        fn garbage_is_corrupt_or_a_record_of_bounded_size(words in prop::collection::vec(any::<u64>(), 64), written: u64, small in 0u64..70) {
            for written in [written, small] {
                let memory = Memory::new(64);
                memory.words.iter().zip(&words).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
                memory.written.store(written, Ordering::Relaxed);
                let (mut reader, mut out) = (RingReader::new(), Vec::new());
                for _ in 0..64 {
                    match reader.pop(&memory.view(), &mut out) {
                        Ok(Some(_)) => prop_assert!(out.len() <= memory.view().payload_bytes_max()),
                        Ok(None) | Err(Corrupt) => break,
                    }
                }
                prop_assert!(out.capacity() <= 256);
                memory.read.store(written, Ordering::Relaxed);
                let _ = RingWriter::new().push(&memory.view(), RecordHead { kind: 0, tag: 0 }, &[1; 9]);
            }
        }
    }
}
