//! The window: the blocks of a call, in order, each waited for in turn while those behind it are on their way already.
//!
//! Half a window is started at a time: each start may wake a disk's thread, and few wake-ups cost less; and what lies side by
//! side in the bucket comes with one request. A window never keeps more leases than its call may have: where there is no room
//! for the block that is next, those of blocks further on are given back, and taken again in their turn.

use std::collections::VecDeque;

use kvstore_plane::SequenceHash;

use super::promote::{Batch, Coming, Promotion, Settled};
use crate::host::Leasing;

/// A block that a call asks for.
pub struct Asked {
    /// Its place in the call.
    pub index: usize,
    /// Its name.
    pub hash: SequenceHash,
    /// Its answer, where that is known already; else it is brought.
    pub known: Option<Leasing>,
}

/// How a window deals with what does not come at once.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Blocks that are under way at once.
    pub ahead: usize,
    /// Ends once what would leave memory is worth more than what comes: for what is brought ahead of need.
    pub ends_outranked: bool,
    /// Ends before the first block for which there is no room, but for the first of all: what came so far is used first.
    pub ends_full: bool,
}

struct UnderWay {
    index: usize,
    hash: SequenceHash,
    coming: Coming,
}

/// See the head of this file.
pub struct Window<'a> {
    promotion: &'a Promotion,
    policy: Policy,
    left: VecDeque<Asked>,
    under_way: VecDeque<UnderWay>,
    /// All blocks, in the order of their chain: see [`Self::next`].
    chain: Vec<SequenceHash>,
    searched: bool,
    has_yielded: bool,
    /// Nothing more is started.
    closed: bool,
}

impl<'a> Window<'a> {
    /// The blocks of `asked`, in their order.
    pub fn new(promotion: &'a Promotion, policy: Policy, asked: impl IntoIterator<Item = Asked>) -> Self {
        let left: VecDeque<Asked> = asked.into_iter().collect();
        let chain = left.iter().map(|asked| asked.hash).collect();
        Self {
            promotion,
            policy,
            left,
            under_way: VecDeque::new(),
            chain,
            searched: false,
            has_yielded: false,
            closed: false,
        }
    }

    /// The next block's place, name and answer; `None` after the last.
    ///
    /// Where a tier did not give a block that it was thought to have, slower tiers are searched for the whole chain, once: what is
    /// near is not looked for there, and a bucket is searched along a chain.
    pub async fn next(&mut self) -> Option<(usize, SequenceHash, Leasing)> {
        self.refill().await;
        let UnderWay { index, hash, coming } = self.under_way.pop_front()?;
        let leasing = match self.settle(hash, coming).await? {
            Some(leasing) => leasing,
            None => {
                if !std::mem::replace(&mut self.searched, true) {
                    self.promotion.search_all(&self.chain).await;
                }
                let again = self.promotion.start(hash).await;
                self.settle(hash, again).await?.unwrap_or_else(|| self.promotion.not_given(hash))
            }
        };
        self.has_yielded = true;
        Some((index, hash, leasing))
    }

    /// Waits for a block; `Some(None)` where no tier gave it, `None` where the window ends with it.
    async fn settle(&mut self, hash: SequenceHash, coming: Coming) -> Option<Option<Leasing>> {
        let mut coming = coming;
        loop {
            match self.promotion.settle(coming).await {
                Settled::As(leasing) => return Some(Some(leasing)),
                Settled::NotGiven => return Some(None),
                Settled::Later => {}
            }
            if self.policy.ends_full && self.has_yielded {
                self.closed = true;
                self.under_way.clear();
                return None;
            }
            self.give_back();
            coming = self.promotion.start_later(hash).await;
        }
    }

    async fn refill(&mut self) {
        if self.closed || self.under_way.len() > self.policy.ahead / 2 {
            return;
        }
        let mut batch = Batch::default();
        while !self.closed
            && self.under_way.len() < self.policy.ahead
            && let Some(asked) = self.left.pop_front()
        {
            let coming = match asked.known {
                Some(leasing) => Coming::Now(leasing),
                None => self.promotion.start_in(&mut batch, asked.hash).await,
            };
            let full = self.policy.ends_full && matches!(coming, Coming::Later);
            self.closed |= full || (self.policy.ends_outranked && matches!(coming, Coming::Outranked));
            if !full || self.under_way.is_empty() {
                let Asked { index, hash, .. } = asked;
                self.under_way.push_back(UnderWay { index, hash, coming });
            }
        }
        self.promotion.send(batch);
    }

    /// It may be this very call whose leases leave no room.
    fn give_back(&mut self) {
        let held = |leasing: &Leasing| matches!(leasing, Leasing::Leased(_));
        for under_way in &mut self.under_way {
            // Also what has landed, and was not looked at yet: its lease is in the channel.
            let holds = match &mut under_way.coming {
                Coming::Now(leasing) => held(leasing),
                Coming::Soon(flight) => flight.has_landed(),
                Coming::Later | Coming::Outranked => false,
            };
            if holds {
                under_way.coming = Coming::Later;
            }
        }
        for asked in &mut self.left {
            asked.known = asked.known.take().filter(|leasing| !held(leasing));
        }
    }
}
