//! Engines' own names: an engine says which blocks it stored by hashes that the router cannot compute, together with their tokens,
//! and later which of them left, by those hashes alone. The index remembers which of its names each means, while some holder has it.
//!
//! A *domain* is a set of holders whose hashes mean the same: replicas of one model under one configuration. Where two of them use
//! one hash for two blocks all the same, the second block is not taken: its removal could not be told from the first one's.

use smallvec::SmallVec;

use super::table::{At, Insert, Place, Set, mixed};
use super::{AHEAD, HolderId, PrefixIndex, Writer};
use crate::caps;
use crate::names::next_name;

/// The parent that a stored run names is not known: an event was lost, and whoever follows the engine has to start anew.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the parent {0:#x} of stored blocks is not known")]
pub struct UnknownParent(pub u64);

fn key(domain: u64, hash: u64) -> u64 {
    mixed(hash ^ domain.rotate_left(17))
}

impl PrefixIndex {
    /// The holder stored a run of blocks behind `parent`: of each the engine's hash, and the hash of its tokens.
    pub fn store_opaque(
        &self,
        holder: HolderId,
        domain: u64,
        parent: Option<u64>,
        blocks: &[(u64, u64)],
    ) -> Result<(), UnknownParent> {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return Ok(()) };
        let mut before = match parent {
            None => None,
            Some(hash) => Some(self.opaque.find(key(domain, hash)).ok_or(UnknownParent(hash))?.set().0),
        };
        for blocks in blocks.chunks(AHEAD) {
            let segments = self.table.segments();
            let named = blocks.iter().map(|(_, tokens_hash)| {
                let name = next_name(before, *tokens_hash);
                before = Some(name);
                name
            });
            let names: SmallVec<[u64; AHEAD]> = named.collect();
            let homes = self.table.homes(names.iter().map(|name| mixed(*name)));
            let theirs = self.opaque.homes(blocks.iter().map(|(hash, _)| key(domain, *hash)));
            for ((home, their), name) in homes.iter().zip(&theirs).zip(&names) {
                // What has no name here could not be removed: it is not stored either.
                if self.learn(&mut writer, their.key(), *name) {
                    let known = (self.table.segments() == segments).then_some(*home);
                    self.store_one(&mut writer, tag, home.key(), known);
                } else {
                    writer.refused += 1;
                }
            }
        }
        self.sweep(&mut writer, caps::SEGMENTS_SWEPT_PER_EVENT);
        Ok(())
    }

    /// True where the engine's hash means this name now.
    fn learn(&self, writer: &mut Writer, key: u64, name: u64) -> bool {
        loop {
            let place = self.opaque.home(key).map_or(Place::Nowhere, |home| self.opaque.look_for(&home));
            if let Place::Found(at) = place {
                return at.set() == Set(name);
            }
            match self.opaque.insert(key, Set(name), &place) {
                Insert::Done => return true,
                Insert::NeedsSplit => {
                    self.opaque.split(key);
                    // What is yet to be forgotten may lie in the new one.
                    writer.to_forget += usize::from(writer.to_forget > 0);
                }
                Insert::Full(_) => {
                    // Perhaps some of it is of no use any more.
                    return match self.opaque.place_of(key) {
                        Some(segment) if writer.to_forget > 0 && self.forget(segment) > 0 => {
                            self.learn(writer, key, name)
                        }
                        _ => false,
                    };
                }
            }
        }
    }

    /// The holder does not have these blocks any more, named by the engine.
    pub fn remove_opaque(&self, holder: HolderId, domain: u64, hashes: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return };
        self.holders.note_loss(tag);
        for hashes in hashes.chunks(AHEAD) {
            let theirs = self.opaque.homes(hashes.iter().map(|hash| key(domain, *hash)));
            let known: SmallVec<[At; AHEAD]> = theirs.iter().filter_map(|home| self.opaque.find_at(home)).collect();
            let homes = self.table.homes(known.iter().map(|known| mixed(known.set().0)));
            for (known, home) in known.iter().zip(&homes) {
                // A hash may be there twice.
                if self.remove_one(&mut writer, tag, home) && self.opaque.is_still(known) {
                    self.opaque.clear(*known);
                }
            }
        }
        self.holders.note_loss(tag);
        self.sweep(&mut writer, caps::SEGMENTS_SWEPT_PER_EVENT);
    }

    /// Forgets the hashes of a segment that mean blocks which nobody has; how many those were.
    pub(super) fn forget(&self, segment: usize) -> usize {
        let mut forgotten = 0;
        for at in self.opaque.of_segment(segment) {
            if self.table.find(mixed(at.set().0)).is_none() {
                self.opaque.clear(at);
                forgotten += 1;
            }
        }
        forgotten
    }
}
