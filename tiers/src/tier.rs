//! Tiers, and sets of them. Pure.

/// A place where blocks are kept, fast to slow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Tier {
    /// This node's memory.
    Host = 1,
    /// This node's disks.
    Nvme = 2,
    /// The bucket that all nodes share, as far as this node knows it.
    Object = 3,
}

impl Tier {
    /// All of them, fast to slow.
    pub const ALL: [Self; 3] = [Self::Host, Self::Nvme, Self::Object];

    /// As messages and metrics write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Nvme => "nvme",
            Self::Object => "object",
        }
    }
}

/// Some tiers. A block's *residency* is the set of those that hold it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TierSet(u8);

impl TierSet {
    /// No tier.
    pub const NONE: Self = Self(0);

    /// Those of one block's tiers that `holds` says.
    pub fn of(holds: impl Fn(Tier) -> bool) -> Self {
        Tier::ALL.into_iter().filter(|tier| holds(*tier)).fold(Self::NONE, Self::with)
    }

    /// These and one more.
    #[must_use]
    pub const fn with(self, tier: Tier) -> Self {
        Self(self.0 | 1 << tier as u8)
    }

    /// These but one.
    #[must_use]
    pub const fn without(self, tier: Tier) -> Self {
        Self(self.0 & !(1 << tier as u8))
    }

    /// True where this tier is among them.
    pub const fn has(self, tier: Tier) -> bool {
        self.0 & 1 << tier as u8 != 0
    }

    /// True where there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those that are in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Each of them, fast to slow.
    pub fn iter(self) -> impl Iterator<Item = Tier> {
        Tier::ALL.into_iter().filter(move |tier| self.has(*tier))
    }

    /// The fastest of them.
    pub fn fastest(self) -> Option<Tier> {
        self.iter().next()
    }

    /// A bit for each tier, as `LookupResponse.residency` has them: 2 for Host, 4 for Nvme, 8 for Object.
    pub const fn bits(self) -> u32 {
        self.0 as u32
    }
}

impl FromIterator<Tier> for TierSet {
    fn from_iter<T: IntoIterator<Item = Tier>>(tiers: T) -> Self {
        tiers.into_iter().fold(Self::NONE, Self::with)
    }
}

/// Where the parts of one block are (its layer groups, its shards): where every part is, or else the slower of the tiers from
/// which all of it can be had. Nothing where a part is nowhere.
pub fn common_residency(parts: impl Iterator<Item = TierSet>) -> TierSet {
    let (mut common, mut slowest): (Option<TierSet>, Option<Tier>) = (None, None);
    for part in parts {
        let Some(fastest) = part.fastest() else { return TierSet::NONE };
        common = Some(common.map_or(part, |common| common.and(part)));
        slowest = slowest.max(Some(fastest));
    }
    match common {
        None => TierSet::NONE,
        Some(common) if common.is_empty() => slowest.into_iter().collect(),
        Some(common) => common,
    }
}

#[cfg(test)]
mod tests {
    use super::Tier::{Host, Nvme, Object};
    use super::*;

    fn set(tiers: &[Tier]) -> TierSet {
        tiers.iter().copied().collect()
    }

    #[test]
    fn a_set_has_what_was_put_in() {
        let both = set(&[Object, Host]);
        assert!(both.has(Host) && !both.has(Nvme) && both.has(Object));
        assert_eq!((both.fastest(), both.bits()), (Some(Host), 2 | 8));
        assert_eq!((both.without(Host), both.without(Nvme)), (set(&[Object]), both));
        assert!(TierSet::NONE.is_empty() && TierSet::NONE.fastest().is_none());
        assert_eq!(TierSet::of(|tier| tier > Host), set(&[Nvme, Object]));
    }

    #[test]
    fn a_block_is_where_every_part_of_it_is_or_in_the_slower_tier() {
        let of = |parts: &[&[Tier]]| common_residency(parts.iter().map(|part| set(part)));
        assert_eq!(of(&[&[Host], &[Host, Object]]), set(&[Host]));
        assert_eq!(of(&[&[Host, Nvme], &[Host, Nvme]]), set(&[Host, Nvme]));
        assert_eq!(of(&[&[Host, Nvme, Object], &[Nvme]]), set(&[Nvme]));
        assert_eq!(of(&[&[Host], &[Nvme, Object]]), set(&[Nvme]), "the slower of both");
        assert_eq!(of(&[&[Nvme], &[Object]]), set(&[Object]), "the slower of both");
        assert_eq!(of(&[&[Host], &[]]), TierSet::NONE);
        assert_eq!(of(&[]), TierSet::NONE);
    }
}
