//! An entry of a log, as it lies in the store: records and pieces one behind the other, then an index, then a footer. Pure.
//!
//! ```text
//! records and pieces     at the places that rows, pointers, paths and records name
//! index                  CBOR: what is in it, for which session
//! 32                     BLAKE3-256 of the index
//! 8                      bytes of the index, little-endian
//! 8                      KVSESLG1
//! ```
//!
//! A record is CBOR and 32 bytes behind it: the BLAKE3-256 of the log's id, the entry's number, the session's slot and the CBOR. So a record is
//! read by itself, with one ranged request, and is known to be the one that was asked for.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::state::{Delta, Session, refused};
use crate::caps;
use crate::digest::Digest;
use crate::manifest::{Bounded, Refused, is_id};

/// The version that is written, and the only one that is read.
pub(super) const FORMAT: u32 = 1;
const MAGIC: &[u8; 8] = b"KVSESLG1";
/// Bytes behind an index.
const FOOTER_BYTES: usize = 48;
/// Bytes behind a record's CBOR.
const DIGEST_BYTES: usize = 32;
const CONTEXT: &[u8] = b"kvstore session record 1";

/// Where a record lies in its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place(
    /// The number of the entry.
    pub u64,
    /// Its first byte there.
    pub u64,
    /// Its bytes.
    pub u64,
);

/// How a session's part of a log ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// The session is over.
    Closed,
    /// Its owner gave it away: whoever claims it need not seal the log.
    Moved,
}

/// A record of an entry: whose, how it ends the session here, its first byte and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row(
    /// The session's slot in the log.
    pub u32,
    /// Whether it is the last one.
    pub Option<End>,
    /// Its first byte.
    pub u64,
    /// Its bytes.
    pub u64,
);

/// Where the newest record of a session is that none of the last entries has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pointer(
    /// The session's slot in the log.
    pub u32,
    /// Whether it is the last one.
    pub Option<End>,
    /// The record.
    pub Place,
);

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The first of a log.
    Begin,
    /// One group commit.
    Commit,
    /// The last one: what is behind it counts for nothing.
    Seal,
}

/// Who wrote a first or a last entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealer {
    /// The log of the writer.
    pub log: String,
    /// What it calls itself, for people.
    pub writer: String,
}

/// An entry's index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// 1.
    pub format: u32,
    /// What a reader must know of to read it right; it refuses what it does not know.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    pub critical: Bounded<String, { caps::FACTS_MAX }>,
    /// The log's id: 32 hexadecimal digits.
    pub log: String,
    /// Its number.
    pub number: u64,
    /// What it is.
    pub kind: Kind,
    /// Who wrote it; commits do not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<Sealer>,
    /// Its records.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    pub rows: Bounded<Row, { caps::SESSIONS_HELD_MAX }>,
    /// Records elsewhere.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    pub pointers: Bounded<Pointer, { caps::SESSIONS_HELD_MAX }>,
}

/// A session's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// 1.
    pub format: u32,
    /// As above.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    pub critical: Bounded<String, { caps::FACTS_MAX }>,
    /// The session's epoch.
    pub epoch: u64,
    /// Whether it is the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ends: Option<End>,
    /// The records that it adds to, the full one first; none where it is full itself.
    pub path: Bounded<Place, { caps::PATH_MAX }>,
    /// All of the session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<Session>,
    /// What it adds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta>,
}

pub(super) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Refused> {
    let mut out = Vec::new();
    ciborium::into_writer(value, &mut out).map_err(|error| Refused(format!("it cannot be written: {error}")))?;
    Ok(out)
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refused> {
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).map_err(|error| Refused(format!("it cannot be read: {error}")))?;
    if rest.is_empty() { Ok(value) } else { refused("it has bytes behind its end") }
}

pub(super) fn check_format(format: u32, critical: &[String]) -> Result<(), Refused> {
    if format != FORMAT {
        return refused(format!("it has format {format}; this build reads format {FORMAT}"));
    }
    match critical.first() {
        Some(unknown) => refused(format!("it needs {unknown:?}, which this build does not know")),
        None => Ok(()),
    }
}

fn record_digest(log: &str, number: u64, slot: u32, cbor: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(CONTEXT).update(log.as_bytes()).update(&number.to_le_bytes()).update(&slot.to_le_bytes());
    Digest(*hasher.update(cbor).finalize().as_bytes())
}

impl Record {
    /// As it is stored.
    pub fn encode(&self, log: &str, number: u64, slot: u32) -> Result<Vec<u8>, Refused> {
        let mut out = encode(self)?;
        let digest = record_digest(log, number, slot, &out);
        out.extend_from_slice(&digest.0);
        Ok(out)
    }

    /// Of what is stored there for this slot, checked by itself.
    pub fn decode(stored: &[u8], log: &str, number: u64, slot: u32) -> Result<Self, Refused> {
        let split = stored.len().checked_sub(DIGEST_BYTES).and_then(|at| stored.split_at_checked(at));
        let Some((cbor, digest)) = split else { return refused("it is too short for a record") };
        if record_digest(log, number, slot, cbor).0 != digest {
            return refused("it is not the record that was written there");
        }
        let record: Self = decode(cbor)?;
        check_format(record.format, &record.critical.0)?;
        if record.full.is_some() == record.delta.is_some() || record.full.is_some() != record.path.0.is_empty() {
            return refused("it is neither all of a session nor what follows other records");
        }
        let is_before = |place: &Place| place.0 < number && place.2 <= caps::SESSION_BYTES_MAX;
        let rises = record.path.0.windows(2).all(|pair| matches!(pair, [one, other] if one.0 < other.0));
        if !rises || !record.path.0.iter().all(is_before) {
            return refused("the records that it adds to are not before it");
        }
        match &record.full {
            Some(full) if full.epoch != record.epoch => refused("it has two epochs"),
            _ => Ok(record),
        }
    }
}

impl Entry {
    /// One without records.
    pub(super) fn new(log: &str, number: u64, kind: Kind, by: Option<Sealer>) -> Self {
        let (rows, pointers) = (Bounded::default(), Bounded::default());
        Self { format: FORMAT, critical: Bounded::default(), log: log.to_owned(), number, kind, by, rows, pointers }
    }

    /// Puts itself behind its records and pieces.
    pub fn finish(&self, mut body: Vec<u8>) -> Result<Vec<u8>, Refused> {
        let index = encode(self)?;
        if index.len() as u64 > caps::INDEX_BYTES_MAX {
            return refused(format!("its index has {} bytes; the most are {}", index.len(), caps::INDEX_BYTES_MAX));
        }
        body.extend_from_slice(&index);
        body.extend_from_slice(&Digest::of(&index).0);
        body.extend_from_slice(&(index.len() as u64).to_le_bytes());
        body.extend_from_slice(MAGIC);
        Ok(body)
    }

    /// Bytes that an object's end must have for [`Self::decode`], by its last bytes.
    pub fn needs(end: &[u8]) -> Result<u64, Refused> {
        let footer = end.len().checked_sub(16).and_then(|at| end.get(at..));
        let Some((length, magic)) = footer.and_then(|footer| footer.split_at_checked(8)) else {
            return refused("it is too short for an entry of a log");
        };
        if magic != MAGIC {
            return refused("it is no entry of a log");
        }
        let length = length.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
        if length > caps::INDEX_BYTES_MAX {
            return refused(format!("its index has {length} bytes; the most are {}", caps::INDEX_BYTES_MAX));
        }
        Ok(length + FOOTER_BYTES as u64)
    }

    /// Of the end of an object of so many bytes, which is that of this log and number.
    pub fn decode(end: &[u8], object: u64, log: &str, number: u64) -> Result<Self, Refused> {
        let needs = Self::needs(end)?;
        let at = (end.len() as u64).checked_sub(needs).and_then(|at| usize::try_from(at).ok());
        let Some(stored) = at.and_then(|at| end.get(at..)) else { return refused("it has no whole index") };
        let Some((index, footer)) = stored.split_at_checked(stored.len() - FOOTER_BYTES) else {
            return refused("it has no whole index");
        };
        if footer.get(..DIGEST_BYTES) != Some(&Digest::of(index).0[..]) {
            return refused("its index is not the one that was written");
        }
        let entry: Self = decode(index)?;
        entry.check(object.saturating_sub(needs), log, number)?;
        Ok(entry)
    }

    fn check(&self, body: u64, log: &str, number: u64) -> Result<(), Refused> {
        check_format(self.format, &self.critical.0)?;
        if self.log != log || self.number != number || !is_id(log) {
            return refused(format!(
                "it is number {} of log {:?}, and lies where {number} of {log} does",
                self.number, self.log
            ));
        }
        if self.by.is_some() != (self.kind != Kind::Commit)
            || (self.kind == Kind::Begin) != (number == 0 && !self.is_seal())
        {
            return refused("it is not what can be at its place");
        }
        if self.by.iter().any(|by| by.writer.len() > caps::TEXT_BYTES_MAX || !is_id(&by.log)) {
            return refused("it does not say who wrote it");
        }
        if self.kind != Kind::Commit && !(self.rows.0.is_empty() && self.pointers.0.is_empty()) {
            return refused("it has records, and is no commit");
        }
        let mut slots = std::collections::HashSet::new();
        for Row(slot, _, first, bytes) in &self.rows.0 {
            if first.saturating_add(*bytes) > body || !slots.insert(*slot) {
                return refused(format!("the record of slot {slot} does not lie in it, or is there twice"));
            }
        }
        for Pointer(slot, _, place) in &self.pointers.0 {
            if place.0 >= number || !slots.insert(*slot) {
                return refused(format!("the pointer of slot {slot} is there twice, or points to what comes later"));
            }
        }
        Ok(())
    }

    pub(super) fn is_seal(&self) -> bool {
        self.kind == Kind::Seal
    }

    /// Where newest records are, as far as this entry says: slots, and how they ended.
    pub(super) fn mentions(&self) -> impl Iterator<Item = (u32, (Place, Option<End>))> {
        let row = move |Row(slot, ends, first, bytes): &Row| (*slot, (Place(self.number, *first, *bytes), *ends));
        let pointers = self.pointers.0.iter().map(|Pointer(slot, ends, place)| (*slot, (*place, *ends)));
        self.rows.0.iter().map(row).chain(pointers)
    }

    /// The same of one slot.
    pub(super) fn mention(&self, slot: u32) -> Option<(Place, Option<End>)> {
        self.mentions().find_map(|(other, found)| (other == slot).then_some(found))
    }
}
