//! The key of a block inside one namespace, as fixed-size words that shared memory can hold whole.
//!
//! The slot directory stores this key itself, not a digest of it: a comparison is exact, and a reader
//! computes nothing but the table's hash.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The longest sequence hash, in bytes: SHA-256 and BLAKE3 fit.
pub const SEQUENCE_HASH_BYTES_MAX: usize = 32;

/// A sequence hash has 1 to 32 bytes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a sequence hash has 1 to {SEQUENCE_HASH_BYTES_MAX} bytes, not {0}")]
pub struct InvalidHash(pub usize);

/// Names a block and its whole prefix: opaque bytes from the engine, zero-padded to 32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceHash {
    words: [u64; 4],
    len: u8,
}

/// Room for a hash that is yet to come: equal to none.
pub const NO_HASH: SequenceHash = SequenceHash { words: [0; 4], len: 0 };

impl SequenceHash {
    /// Checks the length and copies the bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, InvalidHash> {
        if bytes.is_empty() || bytes.len() > SEQUENCE_HASH_BYTES_MAX {
            return Err(InvalidHash(bytes.len()));
        }
        let mut padded = [0u8; SEQUENCE_HASH_BYTES_MAX];
        if let Some(to) = padded.get_mut(..bytes.len()) {
            to.copy_from_slice(bytes);
        }
        let mut words = [0u64; 4];
        for (word, chunk) in words.iter_mut().zip(padded.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*chunk);
        }
        Ok(Self { words, len: bytes.len() as u8 })
    }

    pub(crate) fn from_words(words: [u64; 4], len: u8) -> Self {
        Self { words, len: len.min(SEQUENCE_HASH_BYTES_MAX as u8) }
    }

    pub(crate) fn words(&self) -> [u64; 4] {
        self.words
    }

    /// How many bytes the engine gave.
    pub fn byte_len(&self) -> usize {
        usize::from(self.len)
    }

    /// The engine's bytes, zero-padded.
    pub fn padded(&self) -> [u8; SEQUENCE_HASH_BYTES_MAX] {
        let mut bytes = [0; SEQUENCE_HASH_BYTES_MAX];
        bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.words).for_each(|(to, word)| *to = word.to_le_bytes());
        bytes
    }

    /// The name by which events speak of its block: see [`crate::event_name`].
    pub fn event_name(&self, seed: u64) -> u64 {
        crate::event_name(seed, self.padded().get(..self.byte_len()).unwrap_or_default())
    }

    /// The engine's bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.padded().get(..self.byte_len()).unwrap_or_default().to_vec()
    }
}

impl std::fmt::Debug for SequenceHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for SequenceHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_vec().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A block's name inside its namespace: which layout (by the daemon's ordinal for its digest), which of
/// the layout's layer groups, which prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SlotKey {
    /// The daemon's number for the layout's digest, valid for one daemon epoch.
    pub layout: u32,
    /// The layer group of the layout.
    pub group: u16,
    /// The sequence hash.
    pub hash: SequenceHash,
}

impl SlotKey {
    /// The hash by which the key table files this key: XXH3-64, seeded with the table's secret, of the
    /// layout (u32), group (u16), hash length (u16), all little-endian, and the 32 padded hash bytes.
    pub fn table_hash(&self, seed: u64) -> u64 {
        let mut bytes = [0u8; 40];
        let head = u64::from(self.layout) | u64::from(self.group) << 32 | u64::from(self.hash.len) << 48;
        let words = std::iter::once(head).chain(self.hash.words);
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        xxh3_64_with_seed(&bytes, seed)
    }
}
