//! Where a file is cut into chunks. A chunk never crosses the border of a tensor, and never holds a header: two saves of one model with
//! other metadata, or in other files, share every chunk of its weights.

use crate::caps;
use crate::tensors::Tensor;

/// A part of a file that becomes one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first of its bytes.
    pub start: u64,
    /// How many.
    pub bytes: usize,
    /// Bytes of an element of the tensor that it is a part of; `None` outside of tensors.
    pub element_bytes: Option<u8>,
}

/// The pieces of a file of `bytes` bytes with these tensors, which are sorted; they cover it once, in order.
pub fn pieces(bytes: u64, tensors: &[Tensor]) -> Vec<Piece> {
    let mut borders: Vec<u64> = tensors.iter().flat_map(|tensor| [tensor.start, tensor.end]).collect();
    borders.push(bytes);
    borders.sort_unstable();
    borders.dedup();
    let (mut pieces, mut start, mut first) = (Vec::new(), 0, 0);
    for border in borders {
        // Tensors before `first` end before this part begins.
        while tensors.get(first).is_some_and(|tensor| tensor.end <= start) {
            first += 1;
        }
        let around = tensors.iter().skip(first).take_while(|tensor| tensor.start <= start);
        let element_bytes = around.filter(|tensor| tensor.end > start).map(Tensor::element_bytes).next();
        while start < border {
            let length = (border - start).min(caps::CHUNK_BYTES as u64) as usize;
            pieces.push(Piece { start, bytes: length, element_bytes });
            start += length as u64;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(start: u64, end: u64) -> Tensor {
        Tensor { name: format!("{start}"), dtype: "F16".into(), shape: vec![(end - start) / 2], start, end }
    }

    proptest! {
        /// Every byte once, no piece across a border or larger than a chunk, and a tensor is cut the same way wherever it lies.
        #[test]
        fn pieces_cover_a_file_and_cross_no_border(
            spans in prop::collection::vec((0_u64..60_000_000, 0_u64..20_000_000), 0..12),
            bytes in 80_000_000_u64..90_000_000,
        ) {
            let mut tensors: Vec<Tensor> = spans.iter().map(|(start, length)| tensor(*start, start + length)).collect();
            tensors.sort_by_key(|tensor| (tensor.start, tensor.end));
            let found = pieces(bytes, &tensors);
            let mut at = 0;
            for piece in &found {
                prop_assert_eq!(piece.start, at);
                at += piece.bytes as u64;
                prop_assert!(piece.bytes > 0 && piece.bytes <= caps::CHUNK_BYTES);
                let crosses = |border: u64| piece.start < border && border < at;
                prop_assert!(!tensors.iter().any(|tensor| crosses(tensor.start) || crosses(tensor.end)));
                let within = tensors.iter().any(|tensor| tensor.start <= piece.start && piece.start < tensor.end);
                prop_assert_eq!(piece.element_bytes.is_some(), within);
            }
            prop_assert_eq!(at, bytes);
        }
    }

    #[test]
    fn a_tensor_is_cut_alike_wherever_it_lies() {
        let length = 20_000_001;
        let of = |start: u64| -> Vec<usize> {
            let pieces = pieces(start + length + 5, &[tensor(start, start + length)]);
            pieces.iter().filter(|piece| piece.element_bytes.is_some()).map(|piece| piece.bytes).collect()
        };
        assert_eq!(of(100), of(12_345_678));
        assert_eq!(pieces(0, &[]), []);
    }
}
