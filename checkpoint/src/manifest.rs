//! Manifests: what a snapshot is made of. `docs/design/snapshot.md` has them byte by byte.
//!
//! A rank's manifest lists files, and their chunks in order. A commit names the manifests of all ranks by their digests: before it is there,
//! nothing of the snapshot is. Both are CBOR; what is read may come from anybody, and is checked before anything is done with it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::caps;
use crate::digest::Digest;
use crate::tensors::Tensor;

/// The version that is written, and the only one that is read.
pub const FORMAT: u32 = 1;

/// A manifest that cannot be used, and what of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

fn refused<T>(why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(why.into()))
}

/// A list of at most `MOST`: one that is longer is refused before it takes memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounded<T, const MOST: usize>(pub Vec<T>);

impl<T, const MOST: usize> Bounded<T, MOST> {
    /// Whether it has no item.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T, const MOST: usize> Default for Bounded<T, MOST> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize, const MOST: usize> Serialize for Bounded<T, MOST> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Bounded<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form<T, const MOST: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Form<T, MOST> {
            type Value = Bounded<T, MOST>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(out, "a list of at most {MOST}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element()? {
                    if all.len() == MOST {
                        return Err(A::Error::custom(format!("a list has more than {MOST} items")));
                    }
                    all.push(item);
                }
                Ok(Bounded(all))
            }
        }
        deserializer.deserialize_seq(Form(PhantomData))
    }
}

/// A part of a file, and the chunk that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Bytes.
    pub bytes: u64,
    /// The chunk's name.
    pub chunk: Digest,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its path below the folder, with `/` between names.
    pub path: String,
    /// Its bytes.
    pub bytes: u64,
    /// Its owner may run it.
    pub executable: bool,
    /// Its parts, in order.
    pub extents: Bounded<Extent, { caps::CHUNKS_MAX }>,
    /// Its tensors, in the order in which they lie; none where it is no safetensors file.
    pub tensors: Bounded<Tensor, { caps::TENSORS_MAX }>,
}

/// What one rank of a worker has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rank {
    /// [`FORMAT`].
    pub format: u32,
    /// What a reader must know of to read it right; it refuses what it does not know.
    pub critical: Bounded<String, { caps::FACTS_MAX }>,
    /// Its number.
    pub rank: u32,
    /// By path.
    pub files: Bounded<File, { caps::FILES_MAX }>,
}

/// A rank's manifest, as the commit names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankName {
    /// Its number.
    pub rank: u32,
    /// Bytes of its manifest.
    pub bytes: u64,
    /// The manifest's digest.
    pub digest: Digest,
}

/// What a snapshot comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Distinct chunks.
    pub chunks: u64,
    /// Their bytes, as they are in files.
    pub chunk_bytes: u64,
    /// Tensors.
    pub tensors: u64,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// [`FORMAT`].
    pub format: u32,
    /// As above.
    pub critical: Bounded<String, { caps::FACTS_MAX }>,
    /// Its identity: 32 hexadecimal digits.
    pub id: String,
    /// When it was begun, in milliseconds since 1970, by the saver's clock. For people: nothing is decided by it.
    pub created_ms: i64,
    /// Which program wrote it.
    pub writer: String,
    /// What was saved, for people.
    pub source: String,
    /// Facts that whoever restores it may ask for.
    pub facts: BTreeMap<String, String>,
    /// The ranks, by their numbers.
    pub ranks: Bounded<RankName, { caps::RANKS_MAX }>,
    /// What all of them come to.
    pub totals: Totals,
}

fn text(text: &str, what: &str) -> Result<(), Refused> {
    match text.len() <= caps::TEXT_BYTES_MAX && !text.contains('\0') {
        true => Ok(()),
        false => refused(format!("{what} has more than {} bytes, or a byte 0", caps::TEXT_BYTES_MAX)),
    }
}

fn format_of(format: u32, critical: &[String]) -> Result<(), Refused> {
    if format != FORMAT {
        return refused(format!("it has format {format}; this build reads format {FORMAT}"));
    }
    match critical.first() {
        Some(unknown) => refused(format!("it needs {unknown:?}, which this build does not know")),
        None => Ok(()),
    }
}

/// A path that stays below the folder, and is one way to write it.
fn path(path: &str) -> Result<(), Refused> {
    text(path, "a path")?;
    let is_plain = |name: &str| !name.is_empty() && name != "." && name != ".." && name.len() <= 255;
    match path.split('/').all(is_plain) {
        true => Ok(()),
        false => refused(format!("the path {path:?} does not stay below the folder, or has a name that no file has")),
    }
}

impl File {
    fn check(&self) -> Result<(), Refused> {
        path(&self.path)?;
        let of = |why: String| Refused(format!("{}: {why}", self.path));
        let mut bytes = 0_u64;
        for extent in &self.extents.0 {
            if extent.bytes == 0 || extent.bytes > caps::CHUNK_BYTES as u64 {
                return Err(of(format!("a chunk of {} bytes; it must have 1 to {}", extent.bytes, caps::CHUNK_BYTES)));
            }
            bytes = bytes.saturating_add(extent.bytes);
        }
        if bytes != self.bytes {
            return Err(of(format!("its chunks have {bytes} bytes, and it has {}", self.bytes)));
        }
        let mut names = HashSet::new();
        for tensor in &self.tensors.0 {
            text(&tensor.name, "a tensor's name")?;
            text(&tensor.dtype, "a tensor's type")?;
            if tensor.start > tensor.end || tensor.end > self.bytes || tensor.shape.len() > caps::DIMENSIONS_MAX {
                return Err(of(format!("the tensor {:?} does not lie in it", tensor.name)));
            }
            if !names.insert(tensor.name.as_str()) {
                return Err(of(format!("it has the tensor {:?} twice", tensor.name)));
            }
        }
        Ok(())
    }

    /// The chunks of a part of it that begins and ends where chunks do.
    pub fn chunks_of(&self, start: u64, end: u64) -> impl Iterator<Item = Digest> {
        let mut at = 0;
        self.extents.0.iter().filter_map(move |extent| {
            let from = at;
            at += extent.bytes;
            (start <= from && at <= end).then_some(extent.chunk)
        })
    }
}

impl Rank {
    /// As it is stored.
    pub fn encode(&self) -> Result<Vec<u8>, Refused> {
        encode(self)
    }

    /// Of what is stored, checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refused> {
        let rank: Self = decode(bytes)?;
        rank.check()?;
        Ok(rank)
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), Refused> {
        format_of(self.format, &self.critical.0)?;
        let (mut paths, mut folders, mut chunks) = (BTreeSet::new(), BTreeSet::new(), 0);
        for file in &self.files.0 {
            file.check()?;
            chunks += file.extents.0.len();
            if !paths.insert(file.path.as_str()) {
                return refused(format!("it has the file {:?} twice", file.path));
            }
            let parts = file.path.match_indices('/').filter_map(|(at, _)| file.path.get(..at));
            folders.extend(parts);
        }
        if chunks > caps::CHUNKS_MAX {
            return refused(format!("it has {chunks} chunks; the most are {}", caps::CHUNKS_MAX));
        }
        match paths.intersection(&folders).next() {
            Some(both) => refused(format!("{both:?} is a file and a folder")),
            None => Ok(()),
        }
    }

    /// What it comes to.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        let mut seen = HashSet::new();
        for file in &self.files.0 {
            totals.files += 1;
            totals.bytes += file.bytes;
            totals.tensors += file.tensors.0.len() as u64;
            for extent in file.extents.0.iter().filter(|extent| seen.insert(extent.chunk)) {
                totals.chunks += 1;
                totals.chunk_bytes += extent.bytes;
            }
        }
        totals
    }
}

impl Commit {
    /// As it is stored.
    pub fn encode(&self) -> Result<Vec<u8>, Refused> {
        encode(self)
    }

    /// Of what is stored, checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refused> {
        let commit: Self = decode(bytes)?;
        commit.check()?;
        Ok(commit)
    }

    fn check(&self) -> Result<(), Refused> {
        format_of(self.format, &self.critical.0)?;
        if !is_id(&self.id) {
            return refused(format!("its id {:?} is not 32 hexadecimal digits", self.id));
        }
        text(&self.writer, "its writer")?;
        text(&self.source, "its source")?;
        if self.facts.len() > caps::FACTS_MAX {
            return refused(format!("it has {} facts; the most are {}", self.facts.len(), caps::FACTS_MAX));
        }
        for (name, value) in &self.facts {
            text(name, "a fact's name")?;
            text(value, "a fact")?;
        }
        let numbers: Vec<u32> = self.ranks.0.iter().map(|rank| rank.rank).collect();
        if numbers.is_empty() || !numbers.iter().zip(0..).all(|(number, due)| *number == due) {
            return refused("its ranks are not numbered from 0 on");
        }
        match self.ranks.0.iter().find(|rank| rank.bytes > caps::MANIFEST_BYTES_MAX) {
            Some(rank) => {
                refused(format!("the manifest of rank {} has {} bytes, which is too many", rank.rank, rank.bytes))
            }
            None => Ok(()),
        }
    }
}

/// Whether a text is an identity of a snapshot.
pub fn is_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Refused> {
    let mut out = Vec::new();
    ciborium::into_writer(value, &mut out).map_err(|error| Refused(format!("it cannot be written: {error}")))?;
    Ok(out)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refused> {
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).map_err(|error| Refused(format!("it cannot be read: {error}")))?;
    if rest.is_empty() { Ok(value) } else { refused("it has bytes behind its end") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, chunks: &[u64]) -> File {
        let extent = |bytes: &u64| Extent { bytes: *bytes, chunk: Digest::of(&bytes.to_le_bytes()) };
        File {
            path: path.into(),
            bytes: chunks.iter().sum(),
            executable: false,
            extents: Bounded(chunks.iter().map(extent).collect()),
            tensors: Bounded::default(),
        }
    }

    fn rank(files: Vec<File>) -> Rank {
        Rank { format: FORMAT, critical: Bounded::default(), rank: 0, files: Bounded(files) }
    }

    fn tensor(name: &str, start: u64, end: u64) -> Tensor {
        Tensor { name: name.into(), dtype: "F32".into(), shape: vec![1], start, end }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let mut with_tensors = file("model.safetensors", &[4, 8]);
        with_tensors.tensors = Bounded(vec![tensor("a", 4, 12)]);
        let rank = rank(vec![with_tensors, file("empty", &[]), file("a/b", &[1, 1, 2])]);
        let read = Rank::decode(&rank.encode().unwrap()).unwrap();
        assert_eq!(read, rank);
        assert_eq!(
            read.totals(),
            Totals { files: 3, bytes: 16, chunks: 4, chunk_bytes: 15, tensors: 1 },
            "one chunk is there twice"
        );
        assert_eq!(read.files.0[0].chunks_of(4, 12).count(), 1);
    }

    #[test]
    fn hostile_manifests_are_refused_by_name() {
        let says = |rank: Rank, what: &str| {
            let error = Rank::decode(&rank.encode().unwrap()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        for path in
            ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/", "a\0b", &"x".repeat(256), &"x/".repeat(3000)]
        {
            says(rank(vec![file(path, &[1])]), "path");
        }
        says(rank(vec![file("a", &[1]), file("a", &[1])]), "twice");
        says(rank(vec![file("a", &[1]), file("a/b", &[1])]), "a file and a folder");
        says(rank(vec![file("a", &[0])]), "a chunk of 0 bytes");
        says(rank(vec![file("a", &[u64::MAX - 7])]), "chunk of");
        says(rank(vec![File { bytes: 9, ..file("a", &[8]) }]), "its chunks have 8 bytes");
        for (start, end) in [(0, 9), (5, 4), (u64::MAX, u64::MAX)] {
            says(
                rank(vec![File { tensors: Bounded(vec![tensor("t", start, end)]), ..file("a", &[8]) }]),
                "\"t\" does not lie",
            );
        }
        let twice = Bounded(vec![tensor("t", 0, 4), tensor("t", 4, 8)]);
        says(rank(vec![File { tensors: twice, ..file("a", &[8]) }]), "\"t\" twice");
        says(Rank { format: 2, ..rank(Vec::new()) }, "format 2");
        says(Rank { critical: Bounded(vec!["encryption".into()]), ..rank(Vec::new()) }, "encryption");
        let many: Vec<Tensor> = (0..=caps::TENSORS_MAX).map(|at| tensor(&at.to_string(), 0, 1)).collect();
        says(rank(vec![File { tensors: Bounded(many), ..file("a", &[8]) }]), "more than 262144 items");
        let mut longer = rank(Vec::new()).encode().unwrap();
        longer.push(0);
        assert!(Rank::decode(&longer).is_err() && Rank::decode(&longer[..9]).is_err() && Rank::decode(&[]).is_err());
    }

    #[test]
    fn commits_are_checked() {
        let name = |rank: u32| RankName { rank, bytes: 1, digest: Digest::of(b"") };
        let commit = Commit {
            format: FORMAT,
            critical: Bounded::default(),
            id: "0".repeat(32),
            created_ms: 0,
            writer: "w".into(),
            source: "s".into(),
            facts: BTreeMap::new(),
            ranks: Bounded(vec![name(0), name(1)]),
            totals: Totals::default(),
        };
        assert_eq!(Commit::decode(&commit.encode().unwrap()).unwrap(), commit);
        for wrong in [
            Commit { id: "x".repeat(32), ..commit.clone() },
            Commit { id: String::new(), ..commit.clone() },
            Commit { ranks: Bounded(vec![name(1)]), ..commit.clone() },
            Commit { ranks: Bounded::default(), ..commit.clone() },
            Commit { ranks: Bounded(vec![RankName { bytes: u64::MAX, ..name(0) }]), ..commit.clone() },
        ] {
            assert!(Commit::decode(&wrong.encode().unwrap()).is_err());
        }
    }
}
