//! The hashes of a prompt's blocks, as its engines compute them.

use kvstore_proto::hashes::{EncodeError, ExtraKey, Sha256Cbor};

use crate::events::vllm::salt_extra;
use crate::names;

/// How the engines of a pool name blocks.
#[derive(Clone, Debug)]
pub enum Hashing {
    /// vLLM with `prefix_caching_hash_algo="sha256_cbor"`: the router computes what the engine and the store go by, so that it finds blocks in
    /// all tiers, and knows them after a restart without having seen their tokens.
    Sha256Cbor(Sha256Cbor),
    /// Hashes that only the engine can compute: its events say which tokens they stand for. Blocks in the store's tiers are not found, since
    /// they go by those hashes.
    Engine,
}

/// A prompt's whole blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// What the index of engines names them.
    pub names: Vec<u64>,
    /// What engines and the store go by; empty where only engines can compute it.
    pub hashes: Vec<[u8; 32]>,
}

/// The 64 bits of a SHA-256 that engines publish.
fn name_of(hash: &[u8; 32]) -> u64 {
    hash.last_chunk().map_or(0, |last| u64::from_be_bytes(*last))
}

impl Hashing {
    /// The chain of a prompt. An adapter, and a tenant's salt, make other blocks of the same tokens. An adapter's path is part of its hashes,
    /// and known to its engine alone: its blocks are named by their tokens, as the engine's events bring them (`events/learnt.rs`).
    pub fn chain(
        &self,
        tokens: &[u32],
        block_tokens: u32,
        adapter: Option<&str>,
        salt: Option<&str>,
    ) -> Result<Chain, EncodeError> {
        let mut chain = Chain { block_tokens, ..Chain::default() };
        let blocks = tokens.chunks_exact(block_tokens.max(1) as usize);
        match (self, adapter) {
            (Self::Sha256Cbor(sha), None) => {
                for (at, tokens) in blocks.enumerate() {
                    let keys: Vec<ExtraKey> =
                        salt.filter(|_| at == 0).map(|salt| ExtraKey::Salt(salt.into())).into_iter().collect();
                    let parent = chain.hashes.last().map(<[u8; 32]>::as_slice);
                    let hash = sha.block(parent, tokens, &keys)?;
                    chain.names.push(name_of(&hash));
                    chain.hashes.push(hash);
                }
            }
            _ => {
                let seed = names::adapter_seed(adapter);
                let extra = |at: usize| salt.filter(|_| at == 0).map_or(0, salt_extra);
                let hashes: Vec<u64> =
                    blocks.enumerate().map(|(at, tokens)| names::tokens_hash(tokens, seed) ^ extra(at)).collect();
                names::chain_names(&hashes, &mut chain.names);
            }
        }
        Ok(chain)
    }

    /// True where blocks in the store's tiers can be found by it.
    pub fn reaches_the_store(&self) -> bool {
        matches!(self, Self::Sha256Cbor(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::vllm::{Event, decode};

    /// What a running vLLM published for a prompt of 192 tokens.
    #[test]
    fn names_are_those_that_vllm_publishes() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kv_events");
        let batch = decode(&std::fs::read(folder.join("vllm0.32.0_sha256_cbor_00.msgpack")).unwrap()).unwrap();
        let Event::Stored(stored) = &batch.events[0] else { panic!() };
        let chain = Hashing::Sha256Cbor(Sha256Cbor::default()).chain(&stored.tokens, 32, None, None).unwrap();
        assert_eq!(chain.names, stored.hashes);
        assert_eq!((chain.hashes.len(), chain.block_tokens), (6, 32));
    }

    #[test]
    fn adapters_and_salts_make_other_blocks() {
        let tokens: Vec<u32> = (0..100).collect();
        for hashing in [Hashing::Sha256Cbor(Sha256Cbor::default()), Hashing::Engine] {
            let chain = |adapter, salt| hashing.chain(&tokens, 16, adapter, salt).unwrap().names;
            let plain = chain(None, None);
            assert_eq!(plain.len(), 6);
            for other in [chain(Some("a"), None), chain(None, Some("s"))] {
                assert!(plain.iter().zip(&other).all(|(plain, other)| plain != other));
            }
        }
    }
}
