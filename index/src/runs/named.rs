//! Which blocks the map of names has.
//!
//! Where holders store and remove by names, the map has all. Where they do so by engines' hashes, those find a block, and names are only looked
//! for where a chain begins, or leaves a run: the map has the first name of each chunk, and each that nothing of its run leads to, since
//! the block before it left. So most blocks are in one map and not in two. The first holder that names blocks itself makes that change.

use super::map::half;
use super::parts::{CHUNK, Place};
use super::{Runs, Writer};
use crate::mix::mixed;
use crate::sync::Ordering;

impl Runs {
    /// From now on the map has all names.
    #[inline(always)]
    pub(super) fn name_all(&self, writer: &mut Writer) {
        if !writer.names_all {
            self.name_rest(writer);
        }
    }

    #[cold]
    fn name_rest(&self, writer: &mut Writer) {
        writer.names_all = true;
        for chunk in 1..self.chunks.made() {
            (0..CHUNK).for_each(|at| self.say_name(writer, Place { chunk, at }));
        }
    }

    /// The map has the name of a block, if that is there. Where there is no room for it, chains may seem to end before it.
    pub(super) fn say_name(&self, writer: &mut Writer, place: Place) {
        let Some(chunk) = self.chunks.get(place.chunk).filter(|chunk| chunk.is_live(place.at)) else { return };
        let named = chunk.named.load(Ordering::Relaxed);
        let Some(name) = chunk.name(place.at).filter(|_| named >> place.at & 1 == 0) else { return };
        if self.names.insert(half(mixed(name)), place.word(), &self.budget, &mut writer.is_full) {
            chunk.named.store(named | 1 << place.at, Ordering::Relaxed);
        }
    }
}
