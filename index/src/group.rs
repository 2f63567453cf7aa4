//! Groups of units, and which of its units a group has for each of its names.

use smallvec::SmallVec;

use crate::caps::UNITS_MAX;
use crate::mix::mixed;

/// Bits of a name that tell the units of a group apart.
pub const PART_BITS: u32 = 6;
const PARTS: usize = 1 << PART_BITS;

/// Of a group with so many units, the one that has each part of its names. From each to the next only what the new one gets changes.
#[expect(clippy::indexing_slicing, reason = "in a constant: an index that is wrong does not compile")]
const UNIT_OF: [[u8; PARTS]; UNITS_MAX + 1] = {
    let mut of = [[0; PARTS]; UNITS_MAX + 1];
    let mut count = 2;
    while count <= UNITS_MAX {
        // Of each unit's parts every so manieth is the new one's.
        let mut seen = [0; UNITS_MAX];
        let mut part = 0;
        while part < PARTS {
            let before = of[count - 1][part];
            seen[before as usize] += 1;
            of[count][part] = if seen[before as usize] % count == 0 { count as u8 - 1 } else { before };
            part += 1;
        }
        count += 1;
    }
    of
};

/// The unit that has a part.
#[inline(always)]
fn unit_of_part(count: usize, part: usize) -> usize {
    UNIT_OF.get(count).and_then(|of| of.get(part)).map_or(0, |unit| usize::from(*unit))
}

/// Units that belong together: all names with the same `depth` leading bits lie there.
#[derive(Clone, Default)]
pub struct Group {
    pub units: SmallVec<[u32; UNITS_MAX]>,
    pub depth: u32,
}

impl Group {
    #[inline(always)]
    fn part(&self, key: u64) -> usize {
        (key << self.depth >> (64 - PART_BITS)) as usize
    }

    /// True for a name that moves to the unit that comes next.
    #[inline(always)]
    pub fn moves_on(&self, key: u64) -> bool {
        let count = self.units.len();
        unit_of_part(count + 1, self.part(key)) == count
    }

    /// The unit, by its place, that has the names at a place of the directory: the `at`th of as many as `part_places` for each part.
    pub fn unit_at(&self, at: usize, part_places: usize) -> Option<u32> {
        self.units.get(unit_of_part(self.units.len(), at / part_places.max(1))).copied()
    }

    /// The unit that a name belongs in.
    #[inline(always)]
    pub fn unit_of(&self, key: u64) -> Option<u32> {
        self.units.get(unit_of_part(self.units.len(), self.part(key))).copied()
    }
}

/// A group with so many units grows where one of so many slots has so many blocks. Names are spread so evenly that all groups would grow at
/// the same moment: they differ by `spread`.
pub fn fullness(group: usize, count: usize, slots: usize, least: f64, spread: f64) -> u32 {
    let part = mixed((group * (UNITS_MAX + 1) + count) as u64) as f64 / u64::MAX as f64;
    (slots as f64 * (least + spread * part)) as u32
}
