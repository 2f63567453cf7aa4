//! What an index holds, and changes to it: keys and values, to bytes and back. Pure.

use kvstore_rocksdb::WriteBatch;

use super::format::{IndexValue, SegmentClass, VOLUME_VERSION};
use crate::block::Digest;

/// Changes that are made together.
#[derive(Default)]
pub struct IndexBatch {
    batch: WriteBatch,
}

impl IndexBatch {
    /// A block is there.
    pub fn put_block(&mut self, digest: Digest, value: &IndexValue) {
        self.batch.put(block_key(digest), value.encode());
    }

    /// A block is there no longer.
    pub fn delete_block(&mut self, digest: Digest) {
        self.batch.delete(block_key(digest));
    }

    /// A segment begins a life.
    pub fn put_segment(&mut self, segment: u32, life: u64, class: SegmentClass) {
        let mut value = life.to_le_bytes().to_vec();
        value.push(u8::from(class == SegmentClass::Pinned));
        self.batch.put(segment_key(segment), value);
    }

    /// A segment has no disk space any more.
    pub fn delete_segment(&mut self, segment: u32) {
        self.batch.delete(segment_key(segment));
    }

    /// What a segment holds is not to be trusted after a loss of power.
    pub fn put_suspect(&mut self, segment: u32) {
        self.batch.put(suspect_key(segment), b"");
    }

    /// The segment begins a life: nothing of that is left in it.
    pub fn delete_suspect(&mut self, segment: u32) {
        self.batch.delete(suspect_key(segment));
    }

    /// A block was deleted while some segments were still to be scanned.
    pub fn put_buried(&mut self, digest: Digest) {
        self.batch.put(buried_key(digest), b"");
    }

    /// All segments were scanned.
    pub fn delete_buried(&mut self, digest: Digest) {
        self.batch.delete(buried_key(digest));
    }

    /// Says again what the index is: a change that changes nothing, to see whether it takes one.
    pub fn put_version(&mut self) {
        self.batch.put(b"m", VOLUME_VERSION.to_le_bytes());
    }

    /// A namespace has a number.
    pub fn put_namespace(&mut self, number: u8, digest: &[u8; 32]) {
        self.batch.put([b'n', number], digest);
    }

    /// A pin begins.
    pub fn put_pin(&mut self, id: u128, record: &[u8]) {
        self.batch.put(pin_key(id), record);
    }

    /// A pin ended.
    pub fn delete_pin(&mut self, id: u128) {
        self.batch.delete(pin_key(id));
    }

    /// The number of this batch.
    pub fn put_link(&mut self, place: u16, number: u64) {
        let [high, low] = place.to_be_bytes();
        self.batch.put([b'g', high, low], number.to_le_bytes());
    }

    /// The same changes once more.
    pub fn copy(&self) -> Self {
        Self { batch: WriteBatch::from_data(self.batch.data()) }
    }

    /// For the database.
    pub fn into_inner(self) -> WriteBatch {
        self.batch
    }

    /// Nothing in it.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Bytes of it.
    pub fn bytes(&self) -> u64 {
        self.batch.size_in_bytes() as u64
    }

    /// Changes in it.
    #[cfg(test)]
    pub fn changes(&self) -> usize {
        self.batch.len()
    }
}

fn block_key(digest: Digest) -> [u8; 17] {
    let mut key = [b'b'; 17];
    key.iter_mut().skip(1).zip(digest.0.to_be_bytes()).for_each(|(to, from)| *to = from);
    key
}

fn segment_key(segment: u32) -> [u8; 5] {
    let [a, b, c, d] = segment.to_be_bytes();
    [b's', a, b, c, d]
}

fn suspect_key(segment: u32) -> [u8; 5] {
    let [a, b, c, d] = segment.to_be_bytes();
    [b't', a, b, c, d]
}

fn pin_key(id: u128) -> [u8; 17] {
    named(b'p', id)
}

fn buried_key(digest: Digest) -> [u8; 17] {
    named(b'd', digest.0)
}

fn named(kind: u8, name: u128) -> [u8; 17] {
    let mut key = block_key(Digest(name));
    if let Some(first) = key.first_mut() {
        *first = kind;
    }
    key
}

/// One thing that the index holds.
pub enum IndexItem<'a> {
    /// A block's place.
    Block(Digest, IndexValue),
    /// A segment's life.
    Segment(u32, u64, SegmentClass),
    /// A pin.
    Pin(u128, &'a [u8]),
    /// A namespace's number, and its digest.
    Namespace(u8, [u8; 32]),
    /// A segment whose blocks a failed sync was to make safe.
    Suspect(u32),
    /// A block that was deleted while segments were still to be scanned.
    Buried(Digest),
    /// A place in the ring, and the number of the batch there.
    Link(u16, u64),
}

impl<'a> IndexItem<'a> {
    /// What a key and its value say; `None`: nothing that this build knows.
    pub fn decode(key: &[u8], value: &'a [u8]) -> Option<Self> {
        let (kind, name) = key.split_first()?;
        let digest = || <[u8; 16]>::try_from(name).ok().map(u128::from_be_bytes);
        let segment = || <[u8; 4]>::try_from(name).ok().map(u32::from_be_bytes);
        match (kind, value) {
            (b'b', value) => Some(Self::Block(Digest(digest()?), IndexValue::decode(value).ok()?)),
            (b's', [life @ .., class]) => {
                let class = if *class == 1 { SegmentClass::Pinned } else { SegmentClass::Ordinary };
                Some(Self::Segment(segment()?, u64::from_le_bytes(life.try_into().ok()?), class))
            }
            (b'n', digest) => match name {
                [number] => Some(Self::Namespace(*number, digest.try_into().ok()?)),
                _ => None,
            },
            (b't', _) => Some(Self::Suspect(segment()?)),
            (b'd', _) => Some(Self::Buried(Digest(digest()?))),
            (b'g', number) => {
                let place = u16::from_be_bytes(name.try_into().ok()?);
                Some(Self::Link(place, u64::from_le_bytes(number.try_into().ok()?)))
            }
            (b'p', record) => Some(Self::Pin(digest()?, record)),
            _ => None,
        }
    }
}
