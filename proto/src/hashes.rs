//! The two hash forms that clients derive when they hash tokens themselves. The daemon takes any engine's
//! hashes as opaque bytes and never computes one.

use ciborium::Value;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Tokens could not be encoded; never happens for values this module makes.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode tokens as CBOR: {0}")]
pub struct EncodeError(String);

/// vLLM's `sha256_cbor`: SHA-256 of the canonical CBOR of `(parent, tokens, extra keys)`, for each full
/// block. (Source: vLLM 0.32, `vllm/v1/core/kv_cache_utils.py`.)
#[derive(Clone, Debug)]
pub struct Sha256Cbor {
    none_hash: [u8; 32],
}

/// A block's extra keys beyond its tokens, in the order in which they stand in the hash. Each is hashed with a tag that says where it comes
/// from; events bring them without. (Source: vLLM 0.32, `generate_block_hash_extra_keys`.)
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExtraKey {
    /// A LoRA adapter's name, and the path that it was loaded from: one name at two paths is two chains.
    Adapter(String, String),
    /// A multimodal item that reaches into the block (its content's hash, or a user's own id), and where it starts relative to the block.
    Multimodal(String, i64),
    /// The cache salt: in a prompt's first block alone.
    Salt(String),
    /// The hash of prompt embeddings.
    Embeddings(Vec<u8>),
}

impl Default for Sha256Cbor {
    /// The root that recent vLLM releases use unless PYTHONHASHSEED is set.
    fn default() -> Self {
        Self::with_seed("vllm-none-hash").unwrap_or(Self { none_hash: [0; 32] })
    }
}

impl Sha256Cbor {
    /// With the root that vLLM derives from `seed` (PYTHONHASHSEED, or its default text).
    pub fn with_seed(seed: &str) -> Result<Self, EncodeError> {
        Ok(Self { none_hash: digest(&Value::Text(seed.to_owned()))? })
    }

    /// The hash of a block after `parent` (`None` for the first).
    pub fn block(&self, parent: Option<&[u8]>, tokens: &[u32], extra: &[ExtraKey]) -> Result<[u8; 32], EncodeError> {
        // A router hashes every prompt: the tokens, nearly all of it, are encoded here.
        let mut encoded = Vec::with_capacity(64 + tokens.len() * 5);
        head(&mut encoded, 4, 3);
        let parent = parent.unwrap_or(&self.none_hash);
        head(&mut encoded, 2, parent.len() as u64);
        encoded.extend_from_slice(parent);
        head(&mut encoded, 4, tokens.len() as u64);
        tokens.iter().for_each(|token| head(&mut encoded, 0, u64::from(*token)));
        let extra = match extra {
            [] => Value::Null,
            keys => Value::Array(keys.iter().map(ExtraKey::value).collect()),
        };
        ciborium::into_writer(&extra, &mut encoded).map_err(|error| EncodeError(error.to_string()))?;
        Ok(Sha256::digest(&encoded).into())
    }

    /// The hashes of the full blocks of a prompt without extra keys.
    pub fn blocks(&self, tokens: &[u32], block_tokens: usize) -> Result<Vec<[u8; 32]>, EncodeError> {
        let mut hashes: Vec<[u8; 32]> = Vec::new();
        for block in tokens.chunks_exact(block_tokens.max(1)) {
            let parent = hashes.last().map(|hash| hash.as_slice());
            hashes.push(self.block(parent, block, &[])?);
        }
        Ok(hashes)
    }
}

impl ExtraKey {
    fn value(&self) -> Value {
        let text = |text: &str| Value::Text(text.to_owned());
        Value::Array(match self {
            Self::Adapter(name, path) => vec![text("lora"), text(name), text(path)],
            Self::Multimodal(item, at) => vec![text("mm"), text(item), Value::Integer((*at).into())],
            Self::Salt(salt) => vec![text("cache_salt"), text(salt)],
            Self::Embeddings(digest) => vec![text("prompt_embeds"), Value::Bytes(digest.clone())],
        })
    }
}

/// The head of a CBOR item: its major type, and a number in as few bytes as it takes.
fn head(out: &mut Vec<u8>, major: u8, number: u64) {
    let major = major << 5;
    match number {
        0..=23 => out.push(major | number as u8),
        24..=0xFF => out.extend_from_slice(&[major | 24, number as u8]),
        0x100..=0xFFFF => {
            out.push(major | 25);
            out.extend_from_slice(&(number as u16).to_be_bytes());
        }
        0x1_0000..=0xFFFF_FFFF => {
            out.push(major | 26);
            out.extend_from_slice(&(number as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&number.to_be_bytes());
        }
    }
}

/// Canonical CBOR (RFC 8949, 4.2) of arrays, integers, texts and bytes is what ciborium writes: definite
/// lengths, shortest integers.
fn digest(value: &Value) -> Result<[u8; 32], EncodeError> {
    let mut encoded = Vec::new();
    ciborium::into_writer(value, &mut encoded).map_err(|error| EncodeError(error.to_string()))?;
    Ok(Sha256::digest(&encoded).into())
}

/// Dynamo's token-block hashes: XXH3-64 of the tokens as u32 little-endian under a seed, chained by XXH3-64
/// of (parent, block). (Source: dynamo-kv-router 1.6.)
#[derive(Clone, Copy, Debug)]
pub struct Xxh3Blocks {
    seed: u64,
}

const XXH3_SEED: u64 = 1337;

impl Xxh3Blocks {
    /// For requests of this LoRA adapter and cache salt.
    pub fn new(lora_name: Option<&str>, cache_salt: Option<&str>) -> Self {
        let lora = lora_name.map_or(0, |name| xxh3_64(name.as_bytes()));
        let salt = cache_salt.map_or(0, |salt| xxh3_64_with_seed(salt.as_bytes(), 1));
        Self { seed: XXH3_SEED.wrapping_add(lora).wrapping_add(salt) }
    }

    /// The hash of each full block, alone.
    pub fn blocks(&self, tokens: &[u32], block_tokens: usize) -> Vec<u64> {
        let blocks = tokens.chunks_exact(block_tokens.max(1));
        blocks
            .map(|block| {
                let bytes: Vec<u8> = block.iter().flat_map(|token| token.to_le_bytes()).collect();
                xxh3_64_with_seed(&bytes, self.seed)
            })
            .collect()
    }

    /// The sequence hashes of a chain of blocks: each names its block and all before it.
    pub fn sequence(blocks: &[u64]) -> Vec<u64> {
        let mut sequence: Vec<u64> = Vec::with_capacity(blocks.len());
        for block in blocks {
            let next = sequence.last().map_or(*block, |parent| {
                let mut bytes = [0u8; 16];
                let (head, tail) = bytes.split_at_mut(8);
                head.copy_from_slice(&parent.to_le_bytes());
                tail.copy_from_slice(&block.to_le_bytes());
                xxh3_64_with_seed(&bytes, XXH3_SEED)
            });
            sequence.push(next);
        }
        sequence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden values of Dynamo 1.6.1, tokens 1 to 32 in blocks of 16.
    #[test]
    fn xxh3_matches_dynamo() {
        let tokens: Vec<u32> = (1..=32).collect();
        let cases: [(Option<&str>, Option<&str>, [u64; 3]); 4] = [
            (None, None, [16863443419780771464, 2287610619914608821, 12466389667045779788]),
            (Some("lora-a"), None, [505115133176759089, 3289525268460731972, 9189390670180411066]),
            (None, Some("tenant-a"), [8175209796170318505, 13248293275458056256, 1199464708288223189]),
            (Some("lora-a"), Some("tenant-a"), [8186450938971152506, 10293969575496940909, 5255762187509311563]),
        ];
        for (lora, salt, [first, second, chained]) in cases {
            let blocks = Xxh3Blocks::new(lora, salt).blocks(&tokens, 16);
            assert_eq!(blocks, [first, second]);
            assert_eq!(Xxh3Blocks::sequence(&blocks), [first, chained]);
        }
    }

    /// Captured from a running vLLM 0.32.0 (`prefix_caching_hash_algo="sha256_cbor"`, blocks of 32): the
    /// prompt's tokens are (14 + 37 i) mod 1000.
    #[test]
    fn sha256_cbor_matches_vllm() {
        let tokens: Vec<u32> = (0..192).map(|i| (14 + 37 * i) % 1000).collect();
        let hashes = Sha256Cbor::default().blocks(&tokens, 32).unwrap();
        let hex: Vec<String> =
            hashes.iter().map(|hash| hash.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        assert_eq!(
            hex,
            [
                "e4a6393c0e0249473a76d718127849c00fb54da1a1d11c1aace3ffc9a6d75331",
                "32f30a4535959bd45350a08719b61d1ea193a9f7479a91fb3ea5b616885c2c8e",
                "c4944099e627430704a5ae8ebd692119471d9e4e88a49b5c74a0a4d06b4918cb",
                "91897167a1c4368ded0d48fc6d567b92bae469f5e6a3ed0b4cd7121d060848da",
                "7b62cb01a265c8b1d4f997a21a55cb4a1d1a4b17bc7eff7168924dffa9a5c61e",
                "1020c6c2b5a478ecb3852b7d969880132c1626c81d04066d08b67cd3ba876388",
            ]
        );
    }

    /// What a running vLLM 0.32.0 published (the low 64 bits) for one prompt without a salt and with one. It hashes the salt under its tag, so
    /// that a bare one found nothing in any engine.
    #[test]
    fn salts_are_hashed_with_their_tag() {
        let tokens: Vec<u32> = (0..100).map(|i| (i * 37 + 11) % 1000 + 3).collect();
        let names = |salt: Option<&str>| {
            let (sha, mut parent, mut names) = (Sha256Cbor::default(), None::<[u8; 32]>, Vec::new());
            for (at, block) in tokens.chunks_exact(32).enumerate() {
                let extra: Vec<ExtraKey> =
                    salt.filter(|_| at == 0).map(|salt| ExtraKey::Salt(salt.into())).into_iter().collect();
                let hash = sha.block(parent.as_ref().map(|hash| hash.as_slice()), block, &extra).unwrap();
                names.push(u64::from_be_bytes(*hash.last_chunk().unwrap()));
                parent = Some(hash);
            }
            names
        };
        assert_eq!(names(None), [12_458_082_235_789_562_673, 4_514_214_409_402_068_110, 8_403_898_119_733_450_955]);
        let salted = [17_992_076_852_726_306_961, 12_039_619_209_171_420_587, 11_863_109_884_795_748_516];
        assert_eq!(names(Some("tenant-a")), salted);
    }

    /// What is encoded here by hand is what the library writes, for numbers of every length.
    #[test]
    fn the_encoding_is_canonical_cbor() {
        let tokens = [0, 23, 24, 255, 256, 65_535, 65_536, u32::MAX];
        let extra = [
            ExtraKey::Adapter("a".into(), "/a".into()),
            ExtraKey::Multimodal("image".into(), -3),
            ExtraKey::Salt("s".into()),
        ];
        let parent = [7u8; 32];
        let by_library = digest(&Value::Array(vec![
            Value::Bytes(parent.to_vec()),
            Value::Array(tokens.iter().map(|token| Value::Integer((*token).into())).collect()),
            Value::Array(extra.iter().map(ExtraKey::value).collect()),
        ]));
        assert_eq!(Sha256Cbor::default().block(Some(&parent), &tokens, &extra).unwrap(), by_library.unwrap());
    }

    #[test]
    fn partial_blocks_have_no_hash() {
        assert!(Xxh3Blocks::new(None, None).blocks(&[1, 2, 3], 16).is_empty());
        assert_eq!(Sha256Cbor::default().blocks(&[1; 40], 16).unwrap().len(), 2);
    }
}
