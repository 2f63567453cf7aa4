//! Room in the tiers below: calls that store blocks wait while too many blocks have yet to be written there.

use tokio::time::Instant;

use super::{Lower, Stack};
use crate::caps;
use crate::host::NamespaceId;
use crate::stack::admit::Admission;
use crate::tier::Tier;

/// How safe a block is, or shall be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Readable in memory.
    Memory,
    /// On this node's disk, with its place in the index: both synced.
    Local,
    /// In the bucket, length and checksum confirmed.
    Durable,
}

/// What whoever stores blocks wants for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wish {
    /// Whose they are.
    pub namespace: NamespaceId,
    /// The level that the call waits for.
    pub level: Level,
    /// They go to the bucket in the background, whatever the rules say.
    pub upload: bool,
}

impl Wish {
    /// True where the call waits for this tier.
    pub fn awaits(&self, tier: Tier) -> bool {
        match tier {
            Tier::Host => false,
            Tier::Nvme => self.level == Level::Local,
            Tier::Object => self.level == Level::Durable,
        }
    }

    /// True where the tier is to have them whatever the rules say. Where the bucket cannot be had, a DURABLE block is LOCAL at least.
    pub fn demands(&self, tier: Tier) -> bool {
        match tier {
            Tier::Host => false,
            Tier::Nvme => self.level >= Level::Local,
            Tier::Object => self.level == Level::Durable || self.upload,
        }
    }
}

impl Stack {
    /// True where what is stored now may go to the tiers below at once.
    pub fn has_room(&self, wish: &Wish) -> bool {
        self.below.iter().all(|lower| !self.waits_for(lower, wish) || lower.store.room(false).is_there)
    }

    /// Waits for that; false where it takes too long.
    pub async fn until_room(&self, wish: &Wish) -> bool {
        for lower in &self.below {
            if self.waits_for(lower, wish) && !lower.until_room(Instant::now() + caps::ROOM_BELOW_WITHIN, false).await {
                return false;
            }
        }
        true
    }

    /// Puts wait for the disk, which has what it is given within moments. They wait for the bucket where somebody waits for
    /// DURABLE, or where memory alone has the blocks until they are uploaded; a store that does not answer is waited for by
    /// nobody but the former.
    pub(super) fn waits_for(&self, lower: &Lower, wish: &Wish) -> bool {
        match lower.tier {
            Tier::Host => false,
            Tier::Nvme => true,
            Tier::Object => {
                let memory_alone =
                    !self.has(Tier::Nvme) || self.admission(wish.namespace, Tier::Nvme) != Admission::All;
                let uploads_all = || wish.upload || self.admission(wish.namespace, Tier::Object) == Admission::All;
                wish.level == Level::Durable || (memory_alone && uploads_all() && lower.store.room(false).answers)
            }
        }
    }
}

impl Lower {
    /// Waits for room; with `while_it_answers`, only as long as the tier does. True where there is some.
    pub(super) async fn until_room(&self, until: Instant, while_it_answers: bool) -> bool {
        loop {
            // Made before the look: what is freed after it wakes us.
            let room = self.store.room(true);
            if room.is_there || (while_it_answers && !room.answers) || Instant::now() >= until {
                return room.is_there;
            }
            // A tier that goes away in the meantime, or is given a larger bound, frees nothing.
            let _ = tokio::time::timeout_at(until.min(Instant::now() + caps::ROOM_BELOW_POLL), room.freed).await;
        }
    }
}
