//! What tells a whole index from one with a hole. RocksDB replays its log up to the first record that does not verify, takes what
//! lies behind for a torn end, and serves the rest as if it were all; a log that is missing it does not miss.
//!
//! So each batch has a number, one more than the batch before. The batch has it with it, under a key of a small ring: after a
//! start, the newest numbers must be there without a gap. What the ring is long enough for: batches that are in no table yet. Those
//! in tables are there with their tables, of which RocksDB keeps account.
//!
//! The end of the log is told by the *mark*, a small file beside the index: the number of the last batch of which the log was synced.
//! It is written after that sync and before the answers, and not synced itself: what a kill -9 leaves is in the page cache, and
//! after a loss of power it may be older than the log, never newer. A log that ends before its mark has lost what was acknowledged.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::ring::place_of;
use crate::caps;

const MAGIC: &[u8; 8] = b"KVMARK\n\x01";
const BYTES: usize = 20;

/// What the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marked {
    /// There is none, or an empty one: an earlier build had none, and between its making and its first number there may be a kill
    /// or a full disk.
    Nothing,
    /// It does not verify.
    Damaged,
    /// The log has this batch.
    At(u64),
}

/// See the head of this file.
pub(super) struct Mark(File);

impl Mark {
    /// What the mark in `path` says. Changes nothing.
    pub fn read(path: &Path) -> io::Result<Marked> {
        let mut bytes = [0; BYTES + 1];
        let length = match File::open(path) {
            Ok(file) => file.read_at(&mut bytes, 0)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(decode(bytes.get(..length).unwrap_or_default()))
    }

    /// Opens the mark in `path` to set it, or makes an empty one.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600).open(path).map(Self)
    }

    /// The log is synced up to this batch.
    pub fn set(&self, number: u64) -> io::Result<()> {
        self.0.write_all_at(&encode(number), 0)
    }

    /// The same, safe from a loss of power.
    pub fn set_synced(&self, number: u64) -> io::Result<()> {
        self.set(number)?;
        self.0.sync_data()
    }
}

fn encode(number: u64) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    let head: Vec<u8> = MAGIC.iter().copied().chain(number.to_le_bytes()).collect();
    let sum = kvstore_transfer::crc32(&head).to_le_bytes();
    out.iter_mut().zip(head.into_iter().chain(sum)).for_each(|(to, from)| *to = from);
    out
}

fn decode(bytes: &[u8]) -> Marked {
    if bytes.is_empty() {
        return Marked::Nothing;
    }
    let number = bytes.get(8..16).and_then(|number| number.try_into().ok()).map(u64::from_le_bytes);
    match number {
        Some(number) if bytes == encode(number) => Marked::At(number),
        _ => Marked::Damaged,
    }
}

/// The number of the newest batch, of what a ring holds; or what is wrong.
pub(super) fn newest(ring: &[(u16, u64)], marked: Marked) -> Result<u64, String> {
    let newest = ring.iter().map(|(_, number)| *number).max().unwrap_or(0);
    let mut there: Vec<u64> =
        ring.iter().filter(|(place, number)| place_of(*number) == *place).map(|link| link.1).collect();
    there.sort_unstable();
    let expected = newest.saturating_sub(caps::NVME_INDEX_RING).saturating_add(1)..newest.saturating_add(1);
    if let Some(missing) =
        expected.clone().zip(there.iter().copied().chain(std::iter::repeat(u64::MAX))).find(|(a, b)| a != b)
    {
        return Err(format!("change {} of {newest} is missing", missing.0));
    }
    match marked {
        Marked::At(marked) if marked > newest => {
            Err(format!("its log ends at change {newest}, and had been synced up to {marked}"))
        }
        Marked::Damaged => Err("the file `mark` beside it does not verify".into()),
        Marked::Nothing if newest > 0 => Err("the file `mark` beside it is missing".into()),
        _ => Ok(newest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(numbers: impl IntoIterator<Item = u64>) -> Vec<(u16, u64)> {
        let mut ring = std::collections::BTreeMap::new();
        numbers.into_iter().for_each(|number| _ = ring.insert(place_of(number), number));
        ring.into_iter().collect()
    }

    #[test]
    fn a_gap_a_lost_end_and_a_lost_mark_are_told() {
        assert_eq!(newest(&[], Marked::Nothing), Ok(0), "of an earlier build, or new");
        for count in [1, 5, caps::NVME_INDEX_RING - 1, caps::NVME_INDEX_RING, caps::NVME_INDEX_RING * 2 + 3] {
            assert_eq!(newest(&ring(1..=count), Marked::At(count)), Ok(count));
            assert_eq!(newest(&ring(1..=count), Marked::At(0)), Ok(count), "a mark may be older");
            assert!(newest(&ring(1..=count), Marked::At(count + 1)).is_err());
            assert!(newest(&ring(1..=count), Marked::Nothing).is_err());
            assert!(newest(&ring(1..=count), Marked::Damaged).is_err());
            let (from, to) = (count / 3 + 1, count / 2 + 1);
            if to < count && to + caps::NVME_INDEX_RING > count {
                assert!(
                    newest(&ring((1..from).chain(to + 1..=count)), Marked::At(count)).is_err(),
                    "{from}..={to} of {count}"
                );
            }
        }
    }

    #[test]
    fn a_mark_comes_back_and_no_flipped_bit_does() {
        let path = std::env::temp_dir().join(format!("kvstore-mark-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        assert_eq!(Mark::read(&path).unwrap(), Marked::Nothing);
        assert!(!path.exists(), "made by a read");
        let mark = Mark::create(&path).unwrap();
        assert_eq!(Mark::read(&path).unwrap(), Marked::Nothing, "killed before the first number");
        mark.set(70_000).unwrap();
        assert_eq!(Mark::read(&path).unwrap(), Marked::At(70_000));
        std::fs::remove_file(&path).unwrap();
        for bit in 0..BYTES * 8 {
            let mut bytes = encode(70_000);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bytes), Marked::Damaged);
        }
        for length in 1..BYTES {
            assert_eq!(decode(&encode(70_000)[..length]), Marked::Damaged, "cut off");
        }
    }
}
