//! Engines' own names: an engine says which blocks it stored by hashes that the router cannot compute, together with their tokens,
//! and later which of them left, by those hashes alone. The index remembers which block each means, while some holder has it.
//!
//! A *domain* is a set of holders whose hashes mean the same: replicas of one model under one configuration. Where two of them use
//! one hash for two blocks all the same, the second block is not taken: its removal could not be told from the first one's.

use super::map::{Look, Map, half};
use super::parts::{Place, Span};
use super::store::Hashed;
use super::{Runs, Writer};
use crate::caps::HASHES_COMPARED;
use crate::holders::HolderId;
use crate::mix::mixed;
use crate::sync::Ordering;

/// The parent that a stored run names is not known: an event was lost, and whoever follows the engine has to start anew.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the parent {0:#x} of stored blocks is not known")]
pub struct UnknownParent(pub u64);

#[inline(always)]
pub(super) fn key(domain: u64, hash: u64) -> u64 {
    mixed(hash ^ domain.rotate_left(17))
}

impl Runs {
    /// See [`crate::PrefixIndex::store_opaque`].
    pub fn store_opaque(
        &self,
        holder: HolderId,
        domain: u64,
        parent: Option<u64>,
        blocks: &[(u64, u64)],
    ) -> Result<(), UnknownParent> {
        let mut writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return Ok(()) };
        writer.has_domains |= *writer.domain.get_or_insert(domain) != domain;
        let blocks = Hashed { domain, blocks };
        if let Some((hashes, parent)) = self.hashes.as_ref().zip(parent) {
            hashes.prefetch(half(key(domain, parent)));
        }
        let ahead = self.begin_ahead(&writer, &blocks);
        let behind = match parent {
            None => None,
            Some(hash) => Some(self.locate_hash(key(domain, hash)).ok_or(UnknownParent(hash))?),
        };
        self.put(&mut writer, tag, behind, ahead, &blocks);
        self.sweep(&mut writer);
        Ok(())
    }

    /// The holder does not have these blocks any more, named by the engine.
    pub fn remove_opaque(&self, holder: HolderId, domain: u64, hashes: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return };
        self.owners.lose([tag].into_iter(), || {
            let is = |place: Place, hash: u64| {
                let chunk = self.chunks.get(place.chunk);
                chunk.is_some_and(|chunk| self.hashes_with(chunk, place.at, hash).is_some())
            };
            let hashes = hashes.iter().map(|hash| key(domain, *hash));
            let near = |hash: u64| {
                if let Some(map) = &self.hashes {
                    map.prefetch(half(hash));
                }
            };
            self.remove_all(&mut writer, tag, hashes, is, near, |hash| self.locate_hash(hash));
        });
        self.sweep(&mut writer);
    }

    /// Which of these blocks the holder has, named by the engine.
    pub fn has_opaque(&self, holder: HolderId, domain: u64, hashes: &[u64]) -> Vec<bool> {
        let writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return vec![false; hashes.len()] };
        let has = |hash: &u64| {
            let place = self.locate_hash(key(domain, *hash))?;
            let chunk = self.chunks.get(place.chunk)?;
            let (position, mut has) = (chunk.base() + place.at, false);
            self.each_span(self.runs.get(chunk.run.load(Ordering::Relaxed))?, |span: Span| {
                has |= span.tag == tag && span.common(position, position + 1) > 0;
            });
            Some(has)
        };
        hashes.iter().map(|hash| has(hash).unwrap_or(false)).collect()
    }

    /// The block that an engine's hash means.
    #[inline(always)]
    pub(super) fn locate_hash(&self, hash: u64) -> Option<Place> {
        let Look::There(word) = self.look_hash(self.hashes.as_ref()?, hash) else { return None };
        self.hashed(word)
    }

    /// The block that has a place among the hashes.
    #[inline(always)]
    pub(super) fn hashed(&self, word: u32) -> Option<Place> {
        let place = Place::of(word);
        let chunk = self.hash_chunks.get(place.chunk)?.chunk.load(Ordering::Relaxed);
        Some(Place { chunk, at: place.at })
    }

    #[inline(always)]
    pub(super) fn look_hash<'a>(&self, map: &'a Map, hash: u64) -> Look<'a> {
        map.look(half(hash), |word| {
            let place = Place::of(word);
            // Chunks and their hash chunks are taken and given back together: most often their numbers are the same.
            if let Some(chunk) = self.chunks.get(place.chunk) {
                chunk.prefetch(place.at);
            }
            self.hash_chunks.get(place.chunk).is_some_and(|hashes| hashes.hash(place.at) == hash)
        })
    }

    /// True where the engine's hash, which means no block, means this one now.
    pub(super) fn learn(&self, writer: &mut Writer, place: Place, hash: u64) -> bool {
        let Some(chunk) = self.chunks.get(place.chunk) else { return false };
        let first = chunk.hashes.load(Ordering::Relaxed);
        let mut number = first;
        for _ in 0..HASHES_COMPARED {
            let Some(known) = self.hash_chunks.get(number).filter(|_| number != 0) else { break };
            if known.hash(place.at) == 0 {
                return self.learn_in(writer, number, place.at, hash);
            }
            number = known.next.load(Ordering::Relaxed);
        }
        let Some(new) = self.begin_hashes(place.chunk) else { return false };
        let Some(hashes) = self.hash_chunks.get(new) else { return false };
        // The first one stays the first.
        match self.hash_chunks.get(first).filter(|_| first != 0) {
            Some(first) => {
                hashes.next.store(first.next.load(Ordering::Relaxed), Ordering::Relaxed);
                first.next.store(new, Ordering::Relaxed);
            }
            None => chunk.hashes.store(new, Ordering::Relaxed),
        }
        self.learn_in(writer, new, place.at, hash)
    }

    fn learn_in(&self, writer: &mut Writer, number: u32, at: u32, hash: u64) -> bool {
        let (Some(map), Some(known)) = (&self.hashes, self.hash_chunks.get(number)) else { return false };
        let word = Place { chunk: number, at }.word();
        let is_in = map.insert(half(hash), word, &self.budget, &mut writer.is_full);
        if is_in {
            known.set(at, hash);
        }
        is_in
    }
}
