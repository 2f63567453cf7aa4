//! How a chunk lies in the store: its bytes, perhaps compressed, and a footer of 32 bytes. Its name is that of the bytes themselves, so
//! that whoever reads it knows whether they are right, and one chunk has one name however it is compressed.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `KVCHUNK1` |
//! | 1 | how it is compressed: 0 not, 1 lz4, 2 byte planes and zstd |
//! | 1 | byte planes: bytes of an element; 0 otherwise |
//! | 6 | 0; the place of a key's number |
//! | 8 | bytes of the chunk, little-endian |
//! | 8 | bytes before the footer, little-endian |

use bytes::Bytes;

use crate::caps;
use crate::digest::Digest;

/// Bytes behind those of a chunk.
pub const FOOTER_BYTES: usize = 32;
const MAGIC: &[u8; 8] = b"KVCHUNK1";
/// The fastest: a save must not wait for its compressor.
const ZSTD_LEVEL: i32 = 1;

/// What is tried on a chunk. What does not make it smaller by a sixteenth is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    /// Nothing: the store is as fast as the compressor.
    Nothing,
    /// For texts, caches and records.
    Lz4,
    /// For weights of so many bytes an element.
    Planes(u8),
}

/// What is wrong with a chunk in the store.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Its footer.
    #[error("it has no footer of a chunk")]
    Footer,
    /// Its bytes cannot be had from it.
    #[error("it cannot be decompressed")]
    Compressed,
    /// They are not those that its name says.
    #[error("its bytes are not those that its name says")]
    Bytes,
}

/// A chunk's bytes, smaller, and what was done to them: the codec and the width of an element. `None`: that is not worth it.
pub(crate) fn compress(plain: &[u8], tried: Tried) -> Option<(u8, u8, Vec<u8>)> {
    let bytes = plain.len();
    let worth = |smaller: Vec<u8>| (smaller.len() <= bytes - bytes / 16).then_some(smaller);
    match tried {
        Tried::Nothing => None,
        Tried::Lz4 => worth(lz4_flex::block::compress(plain)).map(|packed| (1, 0, packed)),
        Tried::Planes(element) => {
            let planes = to_planes(plain, usize::from(element.max(1)));
            let packed = zstd::bulk::compress(&planes, ZSTD_LEVEL).ok().and_then(worth);
            packed.map(|packed| (2, element.max(1), packed))
        }
    }
}

/// What stands behind a chunk of `bytes` bytes that is stored as `stored` bytes.
pub(crate) fn footer_of((codec, element): (u8, u8), bytes: usize, stored: usize) -> [u8; FOOTER_BYTES] {
    let mut footer = [0; FOOTER_BYTES];
    let parts: [&[u8]; 4] =
        [MAGIC, &[codec, element, 0, 0, 0, 0, 0, 0], &(bytes as u64).to_le_bytes(), &(stored as u64).to_le_bytes()];
    footer.iter_mut().zip(parts.into_iter().flatten()).for_each(|(to, from)| *to = *from);
    footer
}

/// A chunk as it is stored.
pub fn encode(plain: Vec<u8>, tried: Tried) -> Bytes {
    let bytes = plain.len();
    let (codec, element, mut out) = compress(&plain, tried).unwrap_or((0, 0, plain));
    out.extend_from_slice(&footer_of((codec, element), bytes, out.len()));
    Bytes::from(out)
}

/// What a footer says.
struct Footer {
    codec: u8,
    element: u8,
    plain: usize,
}

fn footer(stored: &[u8]) -> Option<(Footer, &[u8])> {
    let (body, footer) = stored.split_at_checked(stored.len().checked_sub(FOOTER_BYTES)?)?;
    let word = |at: usize| footer.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let (codec, element) = (*footer.get(8)?, *footer.get(9)?);
    let plain = usize::try_from(word(16)?).ok().filter(|plain| *plain <= caps::CHUNK_BYTES)?;
    let is_zero = footer.get(10..16)?.iter().all(|byte| *byte == 0);
    let fits = footer.get(..8)? == MAGIC && is_zero && word(24)? == body.len() as u64;
    fits.then_some((Footer { codec, element, plain }, body))
}

/// Bytes of the chunk that an object is, by its end: the object's last [`FOOTER_BYTES`], and the bytes of all of it.
pub fn plain_bytes(end: &[u8], object: u64) -> Option<u64> {
    let word = |at: usize| end.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let fits = end.len() == FOOTER_BYTES && end.get(..8)? == MAGIC && word(24)?.checked_add(32)? == object;
    if fits { word(16) } else { None }
}

/// The bytes of a chunk, of what is stored under its name.
pub fn decode(stored: &Bytes, name: Digest) -> Result<Bytes, Damage> {
    let (footer, body) = footer(stored).ok_or(Damage::Footer)?;
    let plain = match footer.codec {
        0 if body.len() == footer.plain => stored.slice(..footer.plain),
        1 => {
            let plain = lz4_flex::block::decompress(body, footer.plain).map_err(|_| Damage::Compressed)?;
            Bytes::from(plain)
        }
        2 if footer.element > 0 => {
            let planes = zstd::bulk::decompress(body, footer.plain).map_err(|_| Damage::Compressed)?;
            Bytes::from(from_planes(&planes, usize::from(footer.element)))
        }
        _ => return Err(Damage::Footer),
    };
    if plain.len() != footer.plain || Digest::of(&plain) != name {
        return Err(Damage::Bytes);
    }
    Ok(plain)
}

/// The first bytes of all elements, then their second ones, and so on; what is left over comes last.
fn to_planes(plain: &[u8], element: usize) -> Vec<u8> {
    let elements = plain.len() / element;
    let mut planes = Vec::with_capacity(plain.len());
    for at in 0..element {
        planes.extend(plain.iter().skip(at).step_by(element).take(elements));
    }
    planes.extend_from_slice(plain.get(elements * element..).unwrap_or_default());
    planes
}

fn from_planes(planes: &[u8], element: usize) -> Vec<u8> {
    let elements = planes.len() / element;
    let mut plain = vec![0; planes.len()];
    if elements > 0 {
        for (at, plane) in planes.chunks_exact(elements).take(element).enumerate() {
            plain.iter_mut().skip(at).step_by(element).zip(plane).for_each(|(to, from)| *to = *from);
        }
    }
    if let (Some(to), Some(from)) = (plain.get_mut(elements * element..), planes.get(elements * element..)) {
        to.copy_from_slice(from);
    }
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tried() -> impl Strategy<Value = Tried> {
        prop_oneof![Just(Tried::Nothing), Just(Tried::Lz4), (1_u8..=8).prop_map(Tried::Planes)]
    }

    proptest! {
        #[test]
        fn what_is_stored_is_read_back(plain in prop::collection::vec(0_u8..4, 0..5000), tried in tried()) {
            let (stored, name) = (encode(plain.clone(), tried), Digest::of(&plain));
            prop_assert_eq!(decode(&stored, name).unwrap(), plain.clone());
            prop_assert!(stored.len() <= plain.len() + FOOTER_BYTES);
            let end = &stored[stored.len() - FOOTER_BYTES..];
            prop_assert_eq!(plain_bytes(end, stored.len() as u64), Some(plain.len() as u64));
        }

        /// Whatever becomes of the bytes, the chunk is found to be damaged, or they come out right.
        #[test]
        fn damage_is_found(plain in prop::collection::vec(0_u8..4, 1..2000), tried in tried(), at in 0_usize..100_000, bit in 0_u32..8, cut in 0_usize..64) {
            let (stored, name) = (encode(plain.clone(), tried), Digest::of(&plain));
            let mut flipped = stored.to_vec();
            let at = at % flipped.len();
            flipped[at] ^= 1 << bit;
            match decode(&flipped.into(), name) {
                Ok(read) => prop_assert_eq!(read, plain.clone()),
                Err(Damage::Footer | Damage::Compressed | Damage::Bytes) => {}
            }
            if cut > 0 {
                prop_assert!(decode(&stored.slice(..stored.len().saturating_sub(cut)), name).is_err());
            }
        }
    }

    #[test]
    fn weights_become_smaller_in_planes() {
        // Halves of small numbers: their upper bytes are alike.
        let plain: Vec<u8> = (0..100_000_u32)
            .flat_map(|at| [(at.wrapping_mul(2_654_435_761) >> 24) as u8, 0x3c + (at % 3) as u8])
            .collect();
        assert!(encode(plain.clone(), Tried::Planes(2)).len() * 10 < plain.len() * 8);
        assert_eq!(encode(plain[..10].to_vec(), Tried::Lz4).len(), 10 + FOOTER_BYTES, "what does not pay is not done");
    }
}
