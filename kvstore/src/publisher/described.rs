//! Blocks whose tokens are known, which other routers need beside the name. Pure and bounded: the oldest are forgotten first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kvstore_tiers::{Tier, TierSet};

use crate::describing::Description;

/// Bytes that a description takes here.
fn bytes_of(description: &Description) -> u64 {
    // Two maps' entries, and the tokens.
    200 + description.tokens.len() as u64 * 4
}

struct Known {
    description: Arc<Description>,
    order: u64,
    /// Tiers that it was published for.
    published: TierSet,
}

/// See the head of this file.
pub struct Described {
    blocks: HashMap<u64, Known>,
    /// By age.
    order: BTreeMap<u64, u64>,
    next: u64,
    bytes: u64,
    bytes_max: u64,
}

/// What is to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// The block.
    pub block: Arc<Description>,
    /// Where.
    pub tier: Tier,
    /// It came; or it left.
    pub stored: bool,
}

impl Described {
    /// Empty, and never larger than this.
    pub fn new(bytes_max: u64) -> Self {
        Self { blocks: HashMap::new(), order: BTreeMap::new(), next: 0, bytes: 0, bytes_max }
    }

    /// Describes a block. What has to be forgotten for it leaves, as far as others know: nobody could tell them later.
    pub fn describe(&mut self, name: u64, description: Description, news: &mut Vec<News>) {
        self.next += 1;
        let mut published = TierSet::NONE;
        if let Some(known) = self.blocks.remove(&name) {
            self.order.remove(&known.order);
            self.bytes -= bytes_of(&known.description);
            published = known.published;
        }
        self.bytes += bytes_of(&description);
        self.order.insert(self.next, name);
        self.blocks.insert(name, Known { description: Arc::new(description), order: self.next, published });
        while self.bytes > self.bytes_max {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            let Some(known) = self.blocks.remove(&oldest) else { continue };
            self.bytes -= bytes_of(&known.description);
            let left = known.published.iter();
            news.extend(left.map(|tier| News { block: Arc::clone(&known.description), tier, stored: false }));
        }
    }

    /// A block came or left; what others are to be told, if they do not know.
    pub fn change(&mut self, name: u64, tier: Tier, stored: bool) -> Option<News> {
        let known = self.blocks.get_mut(&name)?;
        if known.published.has(tier) == stored {
            return None;
        }
        known.published = if stored { known.published.with(tier) } else { known.published.without(tier) };
        Some(News { block: Arc::clone(&known.description), tier, stored })
    }

    /// Nothing is known to be anywhere any more.
    pub fn forget_places(&mut self) {
        self.blocks.values_mut().for_each(|known| known.published = TierSet::NONE);
    }

    /// Blocks that are described.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
mod tests {
    use kvstore_tiers::SequenceHash;

    use super::*;

    fn description(at: u8) -> Description {
        let hash = SequenceHash::new(&[at; 32]).unwrap();
        Description { hash, parent: None, tokens: vec![u32::from(at); 16].into(), group: 0, adapter: None }
    }

    #[test]
    fn each_change_is_told_once_and_nothing_is_told_of_strangers() {
        let mut described = Described::new(1 << 20);
        let mut news = Vec::new();
        assert_eq!(described.change(1, Tier::Host, true), None);
        described.describe(1, description(1), &mut news);
        assert!(described.change(1, Tier::Host, true).unwrap().stored);
        assert_eq!(described.change(1, Tier::Host, true), None);
        described.describe(1, description(1), &mut news);
        assert_eq!(described.change(1, Tier::Host, true), None, "described again, it is where it was");
        assert!(!described.change(1, Tier::Host, false).unwrap().stored);
        assert_eq!((news.len(), described.len()), (0, 1));
    }

    #[test]
    fn what_is_forgotten_leaves_for_others() {
        let mut described = Described::new(3 * 264);
        let mut news = Vec::new();
        for name in 1..=3 {
            described.describe(name, description(name as u8), &mut news);
            described.change(name, Tier::Host, true);
            described.change(name, Tier::Nvme, true);
        }
        assert_eq!(news, []);
        described.describe(4, description(4), &mut news);
        let left: Vec<_> = news.iter().map(|news| (news.block.tokens[0], news.tier, news.stored)).collect();
        assert_eq!(left, [(1, Tier::Host, false), (1, Tier::Nvme, false)]);
        assert_eq!((described.change(1, Tier::Host, false), described.len()), (None, 3));
    }
}
