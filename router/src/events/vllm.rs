//! KV events as vLLM publishes them, and SGLang after it: msgpack, in all forms that are about.
//!
//! A message is a batch `[time, [event, ...], rank]`, or a map of those. An event is a map with a `type` (vLLM since June 2026), or an array that
//! starts with it, whose fields have places (before, and SGLang). A hash is an integer, signed or not, or bytes, of which the last eight count,
//! big-endian: the same 64 bits, in vLLM. (Source: `vllm/distributed/kv_events.py` of 0.32 and 0.33.)
//!
//! Lengths that a message claims are not believed: nothing is set aside for more than it brings.

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::caps;

/// Some events of one engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Seconds since 1970, by the engine's clock.
    pub time: f64,
    /// In order.
    pub events: Vec<Event>,
    /// Which of the engine's data-parallel ranks.
    pub rank: Option<u32>,
}

/// How blocks of a layer group are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, PartialOrd, Ord)]
pub enum GroupKind {
    /// All of a prefix is needed.
    #[default]
    Attention,
    /// The last so many tokens of it.
    Window(u32),
    /// The state at its end.
    State,
    /// Nothing of a prompt's prefix: encoders, crossed attention, and kinds of a later day.
    Other,
}

/// A kind by vLLM's name for it. (Source: `vllm/v1/kv_cache_interface.py` of 0.32.) Engines that name none have attention alone.
fn kind_of(name: Option<&str>, window: Option<u32>) -> GroupKind {
    match (name, window) {
        (
            Some("sliding_window" | "sliding_window_mla" | "chunked_local_attention" | "SlidingWindow"),
            Some(window @ 1..),
        ) => GroupKind::Window(window),
        // Of a window that does not say how long it is, all is needed.
        (Some("sliding_window" | "sliding_window_mla" | "chunked_local_attention" | "SlidingWindow"), _) => {
            GroupKind::Attention
        }
        (Some("mamba" | "Mamba" | "linear_attention"), _) => GroupKind::State,
        (None | Some("full_attention" | "mla_attention" | "sink_full_attention" | "FullAttention"), _) => {
            GroupKind::Attention
        }
        _ => GroupKind::Other,
    }
}

/// Blocks that were stored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// The engine's hashes.
    pub hashes: Vec<u64>,
    /// The hash of the block before the first.
    pub parent: Option<u64>,
    /// Tokens of all of them, one block after another; none, where it was not said. Groups that keep the end of a prompt alone name the tokens
    /// of a whole span, of which the blocks are the last.
    pub tokens: Vec<u32>,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// The adapter's name.
    pub adapter: Option<String>,
    /// Where: none or `GPU` for the engine's own memory.
    pub medium: Option<String>,
    /// What else than its tokens and the adapter tells a block apart (images, a tenant's salt), hashed: one a block of the span, 0 for nothing;
    /// empty for nothing at all.
    pub extras: Vec<u64>,
    /// The layer group.
    pub group: u32,
    /// Its kind.
    pub kind: GroupKind,
}

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Blocks came.
    Stored(Stored),
    /// Blocks left.
    Removed {
        /// The engine's hashes.
        hashes: Vec<u64>,
        /// Where.
        medium: Option<String>,
        /// The layer group; `None` where it was not said: in all.
        group: Option<u32>,
    },
    /// All blocks left.
    Cleared,
    /// Something that this router does not know; it says nothing of where blocks are, as far as is known.
    Unknown(String),
    /// An event of a known kind that does not fit together: why.
    Unread(String),
}

/// What is wrong with a message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadEvents {
    /// It is too long.
    #[error("the message has {0} bytes; at most {max} are allowed", max = caps::EVENT_BYTES_MAX)]
    TooLong(usize),
    /// It is not msgpack of that form.
    #[error("the message is not a batch of KV events: {0}")]
    Form(String),
}

/// Reads a message's payload.
pub fn decode(payload: &[u8]) -> Result<Batch, BadEvents> {
    if payload.len() > caps::EVENT_BYTES_MAX {
        return Err(BadEvents::TooLong(payload.len()));
    }
    let mut reader = rmp_serde::Deserializer::from_read_ref(payload);
    // Batches nest five deep: messages that nest without end are refused, and no stack is used up.
    reader.set_max_depth(32);
    Batch::deserialize(&mut reader).map_err(|error| BadEvents::Form(error.to_string()))
}

/// The 64 bits of a hash.
#[derive(Clone, Copy)]
struct Hash(u64);

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Hash;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a hash: an integer of 64 bits, or 8 to 64 bytes")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Hash, E> {
                Ok(Hash(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Hash, E> {
                Ok(Hash(value.cast_unsigned()))
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Hash, E> {
                match bytes.last_chunk() {
                    Some(last) if bytes.len() <= 64 => Ok(Hash(u64::from_be_bytes(*last))),
                    _ => Err(E::invalid_length(bytes.len(), &self)),
                }
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// What tells a block apart beyond its tokens, hashed; 0 for nothing.
struct Extra(u64);

impl<'de> Deserialize<'de> for Extra {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Extra;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("extra keys")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Extra, E> {
                Ok(Extra(0))
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Extra, E> {
                Ok(extra_of(&[u8::from(value)]))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Extra, E> {
                Ok(extra_of(&value.to_le_bytes()))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Extra, E> {
                Ok(extra_of(&value.to_le_bytes()))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Extra, E> {
                Ok(extra_of(&value.to_le_bytes()))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Extra, E> {
                Ok(extra_of(value.as_bytes()))
            }

            fn visit_bytes<E: de::Error>(self, value: &[u8]) -> Result<Extra, E> {
                Ok(extra_of(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Extra, A::Error> {
                let mut all = Extra(0);
                while let Some(next) = seq.next_element::<Extra>()? {
                    all = all.and(&next);
                }
                Ok(all)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Extra, A::Error> {
                let mut all = Extra(0);
                while let Some((key, value)) = map.next_entry::<Extra, Extra>()? {
                    all = all.and(&key).and(&value);
                }
                Ok(all)
            }
        }
        deserializer.deserialize_any(Form)
    }
}

fn extra_of(bytes: &[u8]) -> Extra {
    Extra(xxh3_64_with_seed(bytes, 1).max(1))
}

impl Extra {
    fn and(&self, next: &Self) -> Self {
        let mut bytes = [0u8; 16];
        let (before, after) = bytes.split_at_mut(8);
        before.copy_from_slice(&self.0.to_le_bytes());
        after.copy_from_slice(&next.0.to_le_bytes());
        extra_of(&bytes)
    }
}

/// What tells one block apart, as its event lists it.
#[derive(Clone, Copy, Default)]
struct BlockKeys {
    all: u64,
    /// Its first key, and all the others: engines that publish extra keys begin an adapter's with its name.
    first: u64,
    others: u64,
}

impl<'de> Deserialize<'de> for BlockKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = BlockKeys;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of a block's extra keys")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<BlockKeys, A::Error> {
                let Some(first) = seq.next_element::<Extra>()? else { return Ok(BlockKeys::default()) };
                let (mut all, mut others) = (Extra(0).and(&first), Extra(0));
                while let Some(next) = seq.next_element::<Extra>()? {
                    (all, others) = (all.and(&next), others.and(&next));
                }
                Ok(BlockKeys { all: all.0, first: first.0, others: others.0 })
            }
        }
        deserializer.deserialize_seq(Form)
    }
}

/// The extra keys of blocks, by their place: those that have none cost nothing.
#[derive(Default)]
struct Keys {
    blocks: usize,
    some: Vec<(usize, BlockKeys)>,
}

impl Keys {
    /// Of each block what its tokens and the adapter do not say.
    fn beyond(&self, adapter: Option<&str>) -> Vec<u64> {
        let name = adapter.map(|name| extra_of(name.as_bytes()).0);
        let beyond = |keys: &BlockKeys| if name == Some(keys.first) { keys.others } else { keys.all };
        let found = self.some.iter().map(|(at, keys)| (*at, beyond(keys))).filter(|(_, extra)| *extra != 0);
        let mut extras = Vec::new();
        for (at, extra) in found {
            extras.resize(at, 0);
            extras.push(extra);
        }
        if !extras.is_empty() {
            extras.resize(self.blocks, 0);
        }
        extras
    }
}

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Keys;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of each block's extra keys")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Keys, E> {
                Ok(Keys::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Keys, A::Error> {
                let mut keys = Keys::default();
                while let Some(of_block) = seq.next_element::<Option<BlockKeys>>()? {
                    if let Some(of_block) = of_block {
                        keys.some.push((keys.blocks, of_block));
                    }
                    keys.blocks += 1;
                }
                Ok(keys)
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// A token; of a pair, as speculative decoding with EAGLE names them, the first.
#[derive(Clone, Copy)]
struct Token(u32);

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Token;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a token, or a pair of them")
            }

            #[inline]
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Token, E> {
                u32::try_from(value).map(Token).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
            }

            #[inline]
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Token, E> {
                u32::try_from(value).map(Token).map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Token, A::Error> {
                let first = seq.next_element::<u32>()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Token(first))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// What the first block of a request with this cache salt has as its extra.
pub fn salt_extra(salt: &str) -> u64 {
    Extra(0).and(&extra_of(salt.as_bytes())).0
}

/// An event's fields, wherever they stood.
#[derive(Default)]
struct Fields {
    hashes: Vec<Hash>,
    parent: Option<Hash>,
    tokens: Vec<Token>,
    block_tokens: u32,
    adapter_number: Option<i64>,
    adapter: Option<String>,
    medium: Option<String>,
    keys: Keys,
    salt: Option<String>,
    group: Option<u32>,
    kind: Option<String>,
    window: Option<u32>,
}

impl Fields {
    fn event(self, tag: &str) -> Event {
        let hashes: Vec<u64> = self.hashes.iter().map(|hash| hash.0).collect();
        match tag {
            "BlockStored" => self.stored(hashes),
            "BlockRemoved" => Event::Removed { hashes, medium: self.medium, group: self.group },
            "AllBlocksCleared" => Event::Cleared,
            other => Event::Unknown(other.chars().take(64).collect()),
        }
    }

    fn stored(self, hashes: Vec<u64>) -> Event {
        let kind = kind_of(self.kind.as_deref(), self.window);
        let (tokens, blocks) = (self.tokens.len(), hashes.len());
        let filled = blocks.saturating_mul(self.block_tokens as usize);
        // Windows and states name a span, and list the last blocks of it that they keep.
        let fits = tokens == filled || matches!(kind, GroupKind::Window(_) | GroupKind::State) && tokens > filled;
        if tokens > 0 && !fits && kind != GroupKind::Other {
            // The events beside it can be read.
            return Event::Unread(format!("{tokens} tokens do not fill {blocks} blocks of {}", self.block_tokens));
        }
        let adapter = self.adapter.or_else(|| self.adapter_number.map(|number| number.to_string()));
        let mut extras = self.keys.beyond(adapter.as_deref());
        // SGLang names the salt, and no extra keys.
        if let (Some(salt), true, None) = (&self.salt, extras.is_empty(), self.parent)
            && !salt.is_empty()
        {
            extras.push(salt_extra(salt));
        }
        Event::Stored(Stored {
            hashes,
            parent: self.parent.map(|hash| hash.0),
            tokens: self.tokens.into_iter().map(|token| token.0).collect(),
            block_tokens: self.block_tokens,
            adapter,
            medium: self.medium,
            extras,
            group: self.group.unwrap_or(0),
            kind,
        })
    }

    /// Field `at` behind the tag of an event that is an array.
    fn read_place<'de, A: SeqAccess<'de>>(&mut self, tag: &str, at: usize, seq: &mut A) -> Result<bool, A::Error> {
        const STORED: [&str; 13] = [
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
            "kv_cache_spec_sliding_window",
            "locality",
            "ownership",
        ];
        const REMOVED: [&str; 3] = ["block_hashes", "medium", "group_idx"];
        let names: &[&str] = match tag {
            "BlockStored" => &STORED,
            "BlockRemoved" => &REMOVED,
            _ => &[],
        };
        macro_rules! next {
            ($field:expr, $form:ty) => {
                match seq.next_element::<$form>()? {
                    Some(value) => $field = value,
                    None => return Ok(false),
                }
            };
        }
        match names.get(at).copied() {
            Some("block_hashes") => next!(self.hashes, Vec<Hash>),
            Some("parent_block_hash") => next!(self.parent, Option<Hash>),
            Some("token_ids") => next!(self.tokens, Vec<Token>),
            Some("block_size") => next!(self.block_tokens, u32),
            Some("lora_id") => next!(self.adapter_number, Option<i64>),
            Some("medium") => next!(self.medium, Option<String>),
            Some("lora_name") => next!(self.adapter, Option<String>),
            Some("extra_keys") => next!(self.keys, Keys),
            Some("group_idx") => next!(self.group, Option<u32>),
            Some("kv_cache_spec_kind") => next!(self.kind, Option<String>),
            Some("kv_cache_spec_sliding_window") => next!(self.window, Option<u32>),
            _ => return Ok(seq.next_element::<IgnoredAny>()?.is_some()),
        }
        Ok(true)
    }

    fn read_field<'de, A: MapAccess<'de>>(&mut self, name: &str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "block_hashes" => self.hashes = map.next_value()?,
            "parent_block_hash" => self.parent = map.next_value()?,
            "token_ids" => self.tokens = map.next_value()?,
            "block_size" => self.block_tokens = map.next_value()?,
            "lora_id" => self.adapter_number = map.next_value()?,
            "lora_name" => self.adapter = map.next_value()?,
            "medium" => self.medium = map.next_value()?,
            "extra_keys" => self.keys = map.next_value()?,
            "cache_salt" => self.salt = map.next_value()?,
            "group_idx" => self.group = map.next_value()?,
            "kv_cache_spec_kind" => self.kind = map.next_value()?,
            "kv_cache_spec_sliding_window" => self.window = map.next_value()?,
            _ => _ = map.next_value::<IgnoredAny>()?,
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Event;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an event: a map with a type, or an array that starts with it")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Event, A::Error> {
                let tag: String = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
                let mut fields = Fields::default();
                let mut at = 0;
                while fields.read_place(&tag, at, &mut seq)? {
                    at += 1;
                }
                Ok(fields.event(&tag))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Event, A::Error> {
                let (mut fields, mut tag) = (Fields::default(), None);
                while let Some(name) = map.next_key::<String>()? {
                    match name.as_str() {
                        "type" => tag = Some(map.next_value::<String>()?),
                        name => fields.read_field(name, &mut map)?,
                    }
                }
                Ok(fields.event(&tag.ok_or_else(|| de::Error::missing_field("type"))?))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// Events of a batch, as many as may be.
struct Events(Vec<Event>);

impl<'de> Deserialize<'de> for Events {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Events;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "at most {} events", caps::EVENTS_PER_MESSAGE_MAX)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Events, A::Error> {
                let mut events = Vec::new();
                while let Some(event) = seq.next_element()? {
                    if events.len() >= caps::EVENTS_PER_MESSAGE_MAX {
                        return Err(de::Error::invalid_length(events.len() + 1, &self));
                    }
                    events.push(event);
                }
                Ok(Events(events))
            }
        }
        deserializer.deserialize_seq(Form)
    }
}

impl<'de> Deserialize<'de> for Batch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Batch;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a batch: [time, [event, ...], rank], or a map of ts, events, data_parallel_rank")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Batch, A::Error> {
                let missing = |at| de::Error::invalid_length(at, &"a time, and events");
                let time = seq.next_element()?.ok_or_else(|| missing(0))?;
                let Events(events) = seq.next_element()?.ok_or_else(|| missing(1))?;
                let rank = seq.next_element::<Option<u32>>()?.flatten();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Batch { time, events, rank })
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Batch, A::Error> {
                let (mut batch, mut has_events) = (Batch::default(), false);
                while let Some(name) = map.next_key::<String>()? {
                    match name.as_str() {
                        "ts" => batch.time = map.next_value()?,
                        "events" => (batch.events, has_events) = (map.next_value::<Events>()?.0, true),
                        "data_parallel_rank" | "dp_rank" | "attn_dp_rank" => batch.rank = map.next_value()?,
                        _ => _ = map.next_value::<IgnoredAny>()?,
                    }
                }
                if has_events { Ok(batch) } else { Err(de::Error::missing_field("events")) }
            }
        }
        deserializer.deserialize_any(Form)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(value: &serde_json::Value) -> Vec<u8> {
        rmp_serde::to_vec(value).unwrap()
    }

    fn decoded(value: &serde_json::Value) -> Batch {
        decode(&message(value)).unwrap()
    }

    fn sample(name: &str) -> Batch {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kv_events");
        decode(&std::fs::read(folder.join(name)).unwrap()).unwrap()
    }

    #[test]
    fn what_vllm_published_is_understood() {
        for form in ["sha256_byteshash", "sha256_cbor", "sha256_cbor_byteshash"] {
            let batches: Vec<Batch> = (0..12).map(|at| sample(&format!("vllm0.32.0_{form}_{at:02}.msgpack"))).collect();
            assert!(batches.iter().all(|batch| batch.rank == Some(0) && batch.time > 1.7e9));
            let Event::Stored(first) = &batches[0].events[0] else { panic!("{:?}", batches[0]) };
            assert_eq!((first.hashes.len(), first.tokens.len(), first.block_tokens, first.parent), (6, 192, 32, None));
            assert_eq!((first.medium.as_deref(), first.group, first.kind), (Some("GPU"), 0, GroupKind::Attention));
            assert_eq!(first.extras, Vec::<u64>::new());
            // A removal names what was stored.
            let Event::Removed { hashes, group: Some(0), .. } = &batches[1].events[0] else { panic!() };
            assert_eq!(hashes[..], first.hashes[5..]);
            let Event::Stored(second) = &batches[1].events[1] else { panic!() };
            let Event::Stored(third) = &batches[2].events[0] else { panic!() };
            assert_eq!(third.parent, second.hashes.last().copied());
            assert_eq!(batches[11].events[0], Event::Cleared);
        }
        // An integer is the last eight bytes.
        let [Event::Stored(bytes), Event::Stored(integers)] = ["sha256_cbor_byteshash", "sha256_cbor"]
            .map(|form| sample(&format!("vllm0.32.0_{form}_00.msgpack")).events.remove(0))
        else {
            panic!()
        };
        assert_eq!(bytes.hashes, integers.hashes);
    }

    #[test]
    fn both_forms_say_the_same() {
        let stored = json!({"type": "BlockStored", "block_hashes": [1, -2], "parent_block_hash": 7, "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": 3, "medium": null, "lora_name": "a", "extra_keys": [["salt"], null], "group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 128, "unheard_of": {"a": [1]}});
        let by_name = decoded(
            &json!([1.5, [stored, {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"}, {"type": "AllBlocksCleared"}], 3]),
        );
        let by_place = decoded(&json!({"ts": 1.5, "data_parallel_rank": 3, "events": [
            ["BlockStored", [1, -2], 7, [1, 2, 3, 4], 2, 3, null, "a", [["salt"], null], 1, "sliding_window", 128, "here", "mine", "more"],
            ["BlockRemoved", [1], "GPU"],
            ["AllBlocksCleared"],
        ]}));
        assert_eq!(by_name, by_place);
        let Event::Stored(stored) = &by_name.events[0] else { panic!() };
        assert_eq!(stored.hashes, [1, u64::MAX - 1]);
        assert_eq!(stored.extras, [salt_extra("salt"), 0]);
        assert_eq!((stored.kind, stored.adapter.as_deref()), (GroupKind::Window(128), Some("a")));
        // The oldest form ends after the adapter's number; an event of a later day is passed over.
        let old = decoded(&json!([1.5, [["BlockStored", [1], null, [1, 2], 2, 5], ["Moved", 1, {}]]]));
        let Event::Stored(stored) = &old.events[0] else { panic!() };
        assert_eq!((stored.adapter.as_deref(), old.rank), (Some("5"), None));
        assert_eq!(old.events[1], Event::Unknown("Moved".into()));
    }

    #[test]
    fn kinds_of_groups_are_known_by_name() {
        let kind = |name: serde_json::Value, window: Option<u32>| {
            let event = json!({"type": "BlockStored", "block_hashes": [3], "parent_block_hash": null, "token_ids": [1, 2, 3, 4], "block_size": 4, "kv_cache_spec_kind": name, "kv_cache_spec_sliding_window": window});
            let Event::Stored(stored) = decoded(&json!([1.5, [event]])).events.remove(0) else { panic!() };
            stored.kind
        };
        for name in [json!(null), json!("full_attention"), json!("mla_attention"), json!("sink_full_attention")] {
            assert_eq!(kind(name, None), GroupKind::Attention);
        }
        for name in ["sliding_window", "sliding_window_mla", "chunked_local_attention"] {
            assert_eq!(kind(json!(name), Some(8)), GroupKind::Window(8));
        }
        assert_eq!(kind(json!("mamba"), None), GroupKind::State);
        for name in ["encoder_only_attention", "cross_attention", "of a later day"] {
            assert_eq!(kind(json!(name), Some(8)), GroupKind::Other);
        }
        // A state lists the last block of its span.
        let span = json!([1.5, [{"type": "BlockStored", "block_hashes": [3], "token_ids": [1, 2, 3, 4], "block_size": 2, "kv_cache_spec_kind": "mamba"}]]);
        assert!(matches!(&decoded(&span).events[0], Event::Stored(stored) if stored.tokens.len() == 4));
    }

    /// What vLLM 0.32 says of an adapter's blocks begins with the adapter's name, which is no key of its own.
    #[test]
    fn an_adapters_name_is_no_extra_key() {
        let extras = |more: serde_json::Value| {
            let mut event = json!({"type": "BlockStored", "block_hashes": [3, 4], "token_ids": [[1, 2], [2, 3], [3, 4], [4, 5]], "block_size": 2});
            event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let Event::Stored(stored) = decoded(&json!([1.5, [event]])).events.remove(0) else { panic!() };
            assert_eq!(stored.tokens, [1, 2, 3, 4], "of pairs the first");
            stored.extras
        };
        assert_eq!(extras(json!({"extra_keys": [["a"], ["a"]], "lora_name": "a"})), Vec::<u64>::new());
        assert_eq!(extras(json!({"extra_keys": [["a", "s"], ["a"]], "lora_name": "a"})), [salt_extra("s"), 0]);
        assert_eq!(extras(json!({"extra_keys": [["s"], null]})), [salt_extra("s"), 0]);
        let picture = extras(json!({"extra_keys": [null, ["a", ["picture", -3]]], "lora_name": "a"}));
        assert_eq!(picture, extras(json!({"extra_keys": [null, [["picture", -3]]]})));
        assert!(picture[0] == 0 && picture[1] != 0);
        // SGLang names the salt beside the hashes.
        assert_eq!(extras(json!({"cache_salt": "s"})), [salt_extra("s")]);
        assert_eq!(extras(json!({"cache_salt": "s", "parent_block_hash": 2})), Vec::<u64>::new());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |value: serde_json::Value| decode(&message(&value)).unwrap_err().to_string();
        for (value, says) in [
            (json!(7), "a batch"),
            (json!([1.0]), "a time, and events"),
            (json!({"ts": 1.0}), "events"),
            (json!([1.0, [["BlockStored", ["x"], null, [1], 1]]]), "a hash"),
            (json!([1.0, [{"block_hashes": []}]]), "type"),
            (json!([1.0, [[]]]), "starts with it"),
        ] {
            let error = wrong(value.clone());
            assert!(error.contains(says), "{value}: {error}");
        }
        // An event that does not fit together costs those beside it nothing.
        let odd = decoded(&json!([
            1.0,
            [["BlockStored", [1, 2], null, [1, 2, 3], 2], ["BlockStored", [1], null, [1, 2], 2]]
        ]));
        assert_eq!(odd.events[0], Event::Unread("3 tokens do not fill 2 blocks of 2".into()));
        assert!(matches!(&odd.events[1], Event::Stored(stored) if stored.hashes == [1]));
        assert!(decode(&[]).is_err());
        assert_eq!(decode(&vec![0; caps::EVENT_BYTES_MAX + 1]), Err(BadEvents::TooLong(caps::EVENT_BYTES_MAX + 1)));
        // Nested without end; and a length that the message does not have.
        assert!(decode(&vec![0x91; 100_000]).is_err());
        assert!(decode(&[0x92, 0xCA, 0, 0, 0, 0, 0xDD, 0xFF, 0xFF, 0xFF, 0xFF]).is_err());
        let many = json!([1.0, vec![json!(["X"]); caps::EVENTS_PER_MESSAGE_MAX + 1]]);
        assert!(wrong(many).contains("at most 65536 events"));
    }

    /// Sound messages with bytes changed, cut off and repeated: an answer or an error, never a panic, and never much memory.
    #[test]
    fn damaged_messages_do_no_harm() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kv_events");
        let samples: Vec<Vec<u8>> =
            std::fs::read_dir(folder).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect();
        let mut random = 99u64;
        let mut next = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below.max(1)
        };
        let mut sound = 0;
        for _ in 0..50_000 {
            let mut bytes = samples[next(samples.len())].clone();
            for _ in 0..=next(4) {
                let at = next(bytes.len());
                match next(4) {
                    0 => bytes.truncate(at),
                    1 => bytes.insert(at, next(256) as u8),
                    2 if !bytes.is_empty() => bytes[at] ^= 1 << next(8),
                    _ if !bytes.is_empty() => bytes[at] = next(256) as u8,
                    _ => {}
                }
            }
            sound += usize::from(decode(&bytes).is_ok());
        }
        assert!((100..49_000).contains(&sound), "{sound}");
    }
}
