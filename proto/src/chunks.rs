//! Chunks of snapshots as blocks: which layout a chunk has.
//!
//! A pool of memory has slots of one size, and chunks have any, so there is a layout for each of a few sizes. Daemon and clients have to agree
//! on them: what one of them calls a chunk, the other has to find.

use crate::v1;

/// Bytes of the largest chunks of each layout. Up to 4 MiB two to an octave, so that little of a slot is unused.
pub const CLASSES: [u32; 14] = {
    const KIB: u32 = 1 << 10;
    [
        64 * KIB,
        96 * KIB,
        128 * KIB,
        192 * KIB,
        256 * KIB,
        384 * KIB,
        512 * KIB,
        768 * KIB,
        1024 * KIB,
        1536 * KIB,
        2048 * KIB,
        3072 * KIB,
        4096 * KIB,
        8192 * KIB,
    ]
};

/// The place in [`CLASSES`] of a chunk with so many bytes. `None`: no chunk has so many.
pub fn class_of(bytes: u64) -> Option<usize> {
    CLASSES.iter().position(|most| (1..=u64::from(*most)).contains(&bytes))
}

/// The layout of a class.
pub fn layout(class_bytes: u32) -> v1::Layout {
    let group = v1::LayerGroup {
        kind: v1::BlockKind::Chunk.into(),
        window_tokens: 0,
        layers: 1,
        planes: 1,
        heads: 1,
        head_bytes: class_bytes,
        order: v1::DimensionOrder::Opaque.into(),
    };
    v1::Layout {
        model: "snapshot chunk".into(),
        dtype: "uint8".into(),
        block_tokens: 1,
        groups: vec![group],
        ..v1::Layout::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_has_the_smallest_class_that_it_fits() {
        let bytes_of = |bytes| class_of(bytes).map(|at| CLASSES[at] >> 10);
        assert_eq!(bytes_of(0), None);
        assert_eq!(bytes_of(1), Some(64));
        assert_eq!(bytes_of(64 << 10), Some(64));
        assert_eq!(bytes_of((64 << 10) + 1), Some(96));
        assert_eq!(bytes_of(8 << 20), Some(8192));
        assert_eq!(bytes_of((8 << 20) + 1), None);
        assert!(CLASSES.is_sorted());
    }
}
