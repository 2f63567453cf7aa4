//! Checksums of a block taken section by section while its bytes pass: one pass gives both the block's
//! CRC-32 and those of its sections, which the frame on disk has.

use crc32fast::Hasher;

/// See the head of this file.
#[derive(Clone, Debug)]
pub struct SectionSums {
    section_bytes: usize,
    /// Of the sections that are complete, as one.
    whole: Hasher,
    current: Hasher,
    current_bytes: usize,
    done: Vec<u32>,
}

impl SectionSums {
    /// Sections of `section_bytes`; the last may be shorter.
    pub fn new(section_bytes: usize) -> Self {
        Self {
            section_bytes: section_bytes.max(1),
            whole: Hasher::new(),
            current: Hasher::new(),
            current_bytes: 0,
            done: Vec::new(),
        }
    }

    /// The same sections, before the first byte.
    pub fn restarted(&self) -> Self {
        Self::new(self.section_bytes)
    }

    /// The next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.section_bytes - self.current_bytes;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.current.update(now);
            self.current_bytes += now.len();
            if self.current_bytes == self.section_bytes {
                self.end_section();
            }
            bytes = later;
        }
    }

    fn end_section(&mut self) {
        let section = std::mem::replace(&mut self.current, Hasher::new());
        self.whole.combine(&section);
        self.done.push(section.finalize());
        self.current_bytes = 0;
    }

    /// CRC-32 of everything.
    pub fn crc32(&self) -> u32 {
        let mut all = self.whole.clone();
        all.combine(&self.current);
        all.finalize()
    }

    /// CRC-32 of each section.
    pub fn sections(mut self) -> Vec<u32> {
        if self.current_bytes > 0 {
            self.end_section();
        }
        self.done
    }
}

/// CRC-32 of `front` and then bytes whose CRC-32 and number are given.
pub(crate) fn behind(front: &Hasher, crc32: u32, bytes: u64) -> u32 {
    let mut all = front.clone();
    all.combine(&Hasher::new_with_initial_len(crc32, bytes));
    all.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_gives_the_block_and_its_sections() {
        let data: Vec<u8> = (0..10_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
        for section_bytes in [1000, 3333, 10_000, usize::MAX] {
            let mut sums = SectionSums::new(section_bytes);
            for piece in data.chunks(777) {
                sums.update(piece);
            }
            assert_eq!(sums.crc32(), crate::crc32(&data));
            let expected: Vec<u32> = data.chunks(section_bytes).map(crate::crc32).collect();
            assert_eq!(sums.sections(), expected);
        }
        let mut front = Hasher::new();
        front.update(&data[..100]);
        assert_eq!(behind(&front, crate::crc32(&data[100..]), 9900), crate::crc32(&data));
    }
}
