//! Strings of bytes in records: ids of tokens, and what only an engine reads. One that is too long is refused while it is read.

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::caps;

/// At most `MOST` bytes, which are not looked into.
#[derive(Clone, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct Opaque<const MOST: usize = { caps::OPAQUE_BYTES_MAX }>(pub Vec<u8>);

impl<const MOST: usize> fmt::Debug for Opaque<MOST> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(32).try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl<const MOST: usize> Serialize for Opaque<MOST> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de, const MOST: usize> Deserialize<'de> for Opaque<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_byte_buf(Form::<MOST>).map(Self)
    }
}

/// Ids of tokens: stored as a string of bytes, four each, little-endian.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Ids(pub Vec<u32>);

impl Serialize for Ids {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|id| id.to_le_bytes()).collect();
        serializer.serialize_bytes(&bytes)
    }
}

impl<'de> Deserialize<'de> for Ids {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = deserializer.deserialize_byte_buf(Form::<{ 4 * caps::TOKENS_MAX }>)?;
        let (ids, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(D::Error::custom(format!("ids of {} bytes, which are no multiple of 4", bytes.len())));
        }
        Ok(Self(ids.iter().map(|id| u32::from_le_bytes(*id)).collect()))
    }
}

/// What is read is in memory already, and a string takes as much again at most.
struct Form<const MOST: usize>;

impl<'de, const MOST: usize> Visitor<'de> for Form<MOST> {
    type Value = Vec<u8>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "at most {MOST} bytes")
    }

    fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        if bytes.len() <= MOST { Ok(bytes) } else { Err(E::invalid_length(bytes.len(), &self)) }
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        if bytes.len() <= MOST { Ok(bytes.to_vec()) } else { Err(E::invalid_length(bytes.len(), &self)) }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Vec<u8>, A::Error> {
        Err(A::Error::invalid_type(serde::de::Unexpected::Seq, &self))
    }
}
