//! Engines' own names: an engine says which blocks it stored by hashes that the router cannot compute, together with their tokens,
//! and later which of them left, by those hashes alone. The index remembers which of its names each means, while some holder has it.
//!
//! A *domain* is a set of holders whose hashes mean the same: replicas of one model under one configuration. Where two of them use
//! one hash for two blocks all the same, the second block is not taken: its removal could not be told from the first one's.

use crate::names::next_name;
use crate::sets::{Set, Tags};
use crate::table::{AHEAD, Home, Insert, mixed, unmixed};
use crate::unit::Found;
use crate::{HolderId, PrefixIndex, Writer, caps};

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
        let Some(tag) = writer.holders.tag(holder) else { return Ok(()) };
        let one = Tags::one(tag);
        let mut before = match parent {
            None => None,
            Some(hash) => {
                let known = self.opaque.find(key(domain, hash)).ok_or(UnknownParent(hash))?;
                Some(unmixed(known.set().0))
            }
        };
        let (mut homes, mut theirs) = ([None; AHEAD], [None; AHEAD]);
        for blocks in blocks.chunks(AHEAD) {
            // In steps, so that what the last one waits for is on its way meanwhile.
            self.opaque.begin(blocks.iter().map(|(hash, _)| key(domain, *hash)), &mut theirs);
            let names = blocks.iter().map(|(_, tokens_hash)| {
                let name = next_name(before, *tokens_hash);
                before = Some(name);
                mixed(name)
            });
            self.table.begin(names, &mut homes);
            for (home, their) in homes.iter().zip(&theirs).take(blocks.len()) {
                let (Some(home), Some(their)) = (home, their) else { continue };
                // What has no name here could not be removed: it is not stored either.
                if self.learn(&mut writer, their, home.key()) {
                    self.store_one(&mut writer, one, home);
                } else {
                    writer.refused += 1;
                }
            }
        }
        self.sweep(&mut writer, caps::UNITS_SWEPT_PER_EVENT);
        Ok(())
    }

    /// True where the engine's hash means the block `key` now.
    fn learn(&self, writer: &mut Writer, home: &Home<'_>, key: u64) -> bool {
        let Some(home) = self.opaque.now(*home) else { return false };
        let found = home.look_for();
        match found {
            Found::There(slot) => home.set_of(slot) == Set(key),
            found => match self.opaque.insert(&home, Set(key), found) {
                Insert::Done => true,
                _ => self.learn_more(writer, home, key),
            },
        }
    }

    /// Where a hash that is not there finds no place.
    #[cold]
    fn learn_more(&self, writer: &mut Writer, home: Home<'_>, key: u64) -> bool {
        let mut home = home;
        loop {
            match self.opaque.insert(&home, Set(key), home.look_for()) {
                Insert::Done => return true,
                Insert::Full => {
                    let before = self.opaque.units();
                    self.opaque.grow(home.key());
                    // What is yet to be forgotten may lie in a new one.
                    writer.to_forget += if writer.to_forget > 0 { self.opaque.units() - before } else { 0 };
                    let Some(now) = self.opaque.home(home.key()) else { return false };
                    home = now;
                }
                Insert::NoRoom(_) => {
                    // Perhaps some of it is of no use any more.
                    let units = self.opaque.group_of(home.key());
                    let is_worth_it = writer.to_forget > 0;
                    let units = units.into_iter().filter(|_| is_worth_it);
                    if units.map(|unit| self.forget(unit)).sum::<usize>() == 0 {
                        return false;
                    }
                }
            }
        }
    }

    /// The holder does not have these blocks any more, named by the engine.
    pub fn remove_opaque(&self, holder: HolderId, domain: u64, hashes: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return };
        let one = Tags::one(tag);
        self.owners.lose([tag].into_iter(), || {
            let (mut homes, mut theirs, mut known) = ([None; AHEAD], [None; AHEAD], [None; AHEAD]);
            for hashes in hashes.chunks(AHEAD) {
                self.opaque.begin(hashes.iter().map(|hash| key(domain, *hash)), &mut theirs);
                for (to, their) in known.iter_mut().zip(&theirs).take(hashes.len()) {
                    *to = their.as_ref().and_then(Home::find);
                }
                let known = || known.iter().take(hashes.len()).flatten();
                self.table.begin(known().map(|known| known.set().0), &mut homes);
                for (known, home) in known().zip(homes.iter().flatten()) {
                    // A hash may be there twice.
                    if self.remove_one(&mut writer, one, home) && self.opaque.is_still(known) {
                        self.opaque.clear(*known);
                    }
                }
            }
        });
        self.sweep(&mut writer, caps::UNITS_SWEPT_PER_EVENT);
    }

    /// Forgets the hashes of a unit that mean blocks which nobody has; how many those were.
    pub(super) fn forget(&self, unit: u32) -> usize {
        let mut forgotten = 0;
        self.opaque.each_of(unit, |at| {
            if self.table.find(at.set().0).is_none() {
                self.opaque.clear(at);
                forgotten += 1;
            }
        });
        forgotten
    }
}
