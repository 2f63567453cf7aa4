//! Blocks whose names and bytes are derived from a number, so that a reader can find every wrong byte.

use bytes::{Bytes, BytesMut};
use kvstore_client::v1::{BlockKind, DimensionOrder, LayerGroup, Layout};

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The sequence hash of block `id`: 32 bytes, the first eight of which are the id.
pub fn sequence_hash(id: u64) -> Bytes {
    let words = [id, mix(id ^ 1), mix(id ^ 2), mix(id ^ 3)];
    words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// The `at`-th word of block `id`.
fn word(seed: u64, at: usize) -> [u8; 8] {
    let x = (seed ^ at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x ^ (x >> 29)).to_le_bytes()
}

/// The bytes of block `id`.
pub fn content(id: u64, bytes: usize) -> Bytes {
    let seed = mix(id.wrapping_add(0x9E37_79B9_7F4A_7C15));
    let mut block = BytesMut::zeroed(bytes);
    for (at, chunk) in block.chunks_mut(8).enumerate() {
        let word = word(seed, at);
        chunk.copy_from_slice(word.get(..chunk.len()).unwrap_or_default());
    }
    block.freeze()
}

/// How many bytes of `block` are not those of block `id`.
pub fn wrong_bytes(id: u64, block: &[u8]) -> u64 {
    let seed = mix(id.wrapping_add(0x9E37_79B9_7F4A_7C15));
    let wrong = |(at, chunk): (usize, &[u8])| {
        let word = word(seed, at);
        if chunk == word { 0 } else { chunk.iter().zip(word).filter(|(a, b)| **a != *b).count() as u64 }
    };
    block.chunks(8).enumerate().map(wrong).sum()
}

/// A layout of one opaque group whose blocks have `block_bytes`.
pub fn layout(model: &str, block_bytes: u32, kind: BlockKind) -> Layout {
    let group = LayerGroup {
        kind: kind.into(),
        layers: 1,
        planes: 1,
        heads: 1,
        head_bytes: block_bytes,
        order: DimensionOrder::Opaque.into(),
        ..LayerGroup::default()
    };
    Layout {
        model: Bytes::copy_from_slice(model.as_bytes()),
        dtype: "bytes".into(),
        block_tokens: 1,
        groups: vec![group],
        ..Layout::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_byte_is_seen() {
        let block = content(7, 1003);
        assert_eq!(wrong_bytes(7, &block), 0);
        for at in 0..block.len() {
            let mut bad = block.to_vec();
            bad[at] ^= 0x10;
            assert_eq!(wrong_bytes(7, &bad), 1, "byte {at}");
        }
        assert!(wrong_bytes(8, &block) > 900);
    }
}
