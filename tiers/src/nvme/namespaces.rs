//! What each namespace has of the disks: a number in place of its digest, a bound on its bytes, how long its blocks stay
//! unused, and its fair share where the disks are full.
//!
//! A bound is held by dropping the namespace's own oldest blocks as it writes more, those that were never read first. Unused
//! blocks are swept an eighth of their time late at most; a block keeps its prefix. Where namespaces compete for a full disk,
//! those above their share give way first when a segment is emptied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::batch::IndexBatch;
use super::extents::Entry;
use super::format::PAGE;
use super::state::add;
use super::store::Store;
use super::{NvmeTier, Peers};
use crate::caps;
use crate::clock::BootTime;

/// What one namespace may have of the disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NvmeNamespace {
    /// Digest of its name.
    pub digest: [u8; 32],
    /// Bytes of its blocks on all disks at most; `None`: as many as there is room for.
    pub bytes: Option<u64>,
    /// What nobody stored or asked for in this long leaves; `None`: nothing does.
    pub ttl_ms: Option<u64>,
}

/// The numbers that the namespaces of a volume have in its index: they never change.
#[derive(Default)]
pub(super) struct Numbers {
    digests: BTreeMap<u8, [u8; 32]>,
    /// Those that the index has yet to take.
    unsaved: Vec<u8>,
    /// Those that it took, and its log was not synced since.
    unsynced: Vec<u8>,
}

impl Numbers {
    /// As the index says.
    pub fn restore(&mut self, number: u8, digest: [u8; 32]) {
        self.digests.insert(number, digest);
    }

    /// The index is to be made anew.
    pub fn save_again(&mut self) {
        self.unsaved = self.digests.keys().copied().collect();
    }

    /// The number of a namespace; 0 where it has none.
    pub fn get(&self, digest: &[u8; 32]) -> u8 {
        self.digests.iter().find(|(_, known)| *known == digest).map_or(0, |(number, _)| *number)
    }

    /// The same; it is given one, while there are some: 255 names of namespaces in a volume's life.
    pub fn assign(&mut self, digest: &[u8; 32]) -> u8 {
        let known = self.get(digest);
        let fresh = (1..=u8::MAX).find(|number| !self.digests.contains_key(number));
        match fresh.filter(|_| known == 0) {
            Some(number) => {
                self.digests.insert(number, *digest);
                self.unsaved.push(number);
                number
            }
            None => known,
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &[u8; 32])> {
        self.digests.iter().map(|(number, digest)| (*number, digest))
    }

    /// Puts what the index lacks into `batch`; how many those are, for [`Self::saved`].
    pub fn save(&self, batch: &mut IndexBatch) -> usize {
        let unsaved = self.unsaved.iter().filter_map(|number| Some((*number, self.digests.get(number)?)));
        unsaved.for_each(|(number, digest)| batch.put_namespace(number, digest));
        self.unsaved.len()
    }

    /// The index has the first `count` of what it lacked; with `synced`, its log has them and all before on the disk.
    pub fn saved(&mut self, count: usize, synced: bool) {
        self.unsynced.extend(self.unsaved.drain(..count.min(self.unsaved.len())));
        if synced {
            self.unsynced.clear();
        }
    }

    /// It failed: what it took since the last good sync, it may lack.
    pub fn failed(&mut self) {
        self.unsaved.append(&mut self.unsynced);
    }
}

/// How much a page of each namespace counts when a segment is to go: [`FULL`] where it is within its share, next to nothing
/// where it is beyond: then it gives way before all others.
pub(super) struct Standings {
    by_number: BTreeMap<u8, u64>,
    /// Somebody is above its share.
    pub contested: bool,
}

/// What a page counts whose namespace is within its share.
pub(super) const FULL: u64 = 16;

impl Standings {
    pub fn of(&self, namespace: u8) -> u64 {
        self.by_number.get(&namespace).copied().unwrap_or(FULL)
    }

    /// True where others should leave before this one's.
    pub fn spares(&self, namespace: u8) -> bool {
        self.contested && namespace != 0 && self.of(namespace) == FULL
    }
}

/// Standings from what each has, and what it may have, of `capacity`.
fn standings(capacity: u64, users: &[(u8, u64, Option<u64>)]) -> Standings {
    let count = users.iter().filter(|(_, used, _)| *used > 0).count().max(1) as u64;
    let weight = |bound: Option<u64>| u128::from(bound.map_or(capacity / count, |bound| bound.min(capacity)).max(1));
    let total: u128 = users.iter().filter(|(_, used, _)| *used > 0).map(|(_, _, bound)| weight(*bound)).sum();
    let standing = |used: u64, bound: Option<u64>| {
        let share = (u128::from(capacity) * weight(bound) / total.max(1)) as u64;
        if count < 2 || used <= share { FULL } else { 1 }
    };
    let by_number: BTreeMap<u8, u64> =
        users.iter().map(|(number, used, bound)| (*number, standing(*used, *bound))).collect();
    let contested = by_number.values().any(|standing| *standing < FULL);
    Standings { by_number, contested }
}

impl Peers {
    fn rule(&self, digest: &[u8; 32]) -> Option<NvmeNamespace> {
        self.namespaces.read().iter().find(|rule| rule.digest == *digest).copied()
    }

    /// Bytes of a namespace's blocks, of all volumes.
    fn bytes_of(&self, digest: &[u8; 32]) -> u64 {
        self.sum(|store| store.bytes_of(digest))
    }

    /// A block that was used at second `used` keeps its prefix.
    fn renew_prefix(&self, parent: u64, used: u32, since: u32) {
        let mut next = Some(parent);
        while let Some(tag) = next {
            next = self.find(|store| store.state.lock().extents.renew(tag, used, since));
        }
    }
}

impl Store {
    fn bytes_of(&self, digest: &[u8; 32]) -> u64 {
        let state = self.state.lock();
        match state.numbers.get(digest) {
            0 => 0,
            number => state.extents.pages_of(number) * PAGE,
        }
    }

    /// Before `more` bytes of a namespace are written: its oldest blocks here make room for them within its bound.
    pub fn keep_within_bound(&self, digest: &[u8; 32], more: u64) {
        let Some(bound) = self.peers.rule(digest).and_then(|rule| rule.bytes) else { return };
        let with_more = self.peers.bytes_of(digest) + more;
        if with_more > bound {
            self.drop_oldest(digest, with_more - within(bound));
        }
    }

    /// Drops `bytes` of a namespace, oldest first, what was read last. Looks at the segments alone that have some of it.
    fn drop_oldest(&self, digest: &[u8; 32], bytes: u64) {
        let (number, segments) = {
            let state = self.state.lock();
            let number = state.numbers.get(digest);
            let mut segments = state.segments.oldest_first();
            segments.retain(|segment| state.extents.has_of(*segment, number));
            (number, segments)
        };
        let mut wanted = bytes;
        for spares_read in [true, false] {
            for segment in &segments {
                if number == 0 || wanted == 0 {
                    return;
                }
                let mut goes = |entry: &Entry| {
                    let goes = entry.namespace == number && !(spares_read && entry.hits > 0) && wanted > 0;
                    if goes && !entry.pinned {
                        wanted = wanted.saturating_sub(entry.extent.bytes());
                    }
                    goes
                };
                self.drop_of_segment(*segment, &mut goes);
            }
        }
    }

    /// Forgets the blocks of a segment that `goes` names, but for pinned ones; some at a time under the lock.
    fn drop_of_segment(&self, segment: u32, goes: &mut dyn FnMut(&Entry) -> bool) {
        let (mut from, mut entries, mut dropped) = (None, Vec::new(), 0);
        loop {
            let mut state = self.state.lock();
            entries.clear();
            from = state.extents.walk(segment, from, caps::ENTRIES_PER_LOCK, &mut entries);
            for entry in entries.iter().filter(|entry| goes(entry) && !entry.pinned) {
                state.drop_block(entry.digest);
                dropped += 1;
            }
            if from.is_none() {
                break;
            }
        }
        if dropped > 0 {
            add(&self.counters.dropped_blocks, dropped);
            self.wake_committer();
        }
    }

    /// The blocks of namespaces with a time that nobody used within it leave; `since`: by number, the second before which a
    /// use is too long ago.
    fn sweep(&self, since: &BTreeMap<u8, u32>) {
        let concerned = || {
            let state = self.state.lock();
            let has = |segment: &u32| since.keys().any(|number| state.extents.has_of(*segment, *number));
            (0..state.segments.len() as u32).filter(has).collect::<Vec<u32>>()
        };
        for segment in concerned() {
            let entries = self.state.lock().extents.of_segment(segment);
            for entry in entries.iter().filter(|entry| entry.parent_tag != 0) {
                if let Some(since) = since.get(&entry.namespace).filter(|since| entry.used >= **since) {
                    self.peers.renew_prefix(entry.parent_tag, entry.used, *since);
                }
            }
        }
        for segment in concerned() {
            let mut is_old = |entry: &Entry| since.get(&entry.namespace).is_some_and(|since| entry.used < *since);
            self.drop_of_segment(segment, &mut is_old);
        }
    }

    /// See [`Standings`].
    pub fn standings(&self) -> Standings {
        let known: Vec<(u8, [u8; 32])> =
            self.state.lock().numbers.iter().map(|(number, digest)| (number, *digest)).collect();
        let capacity =
            (self.peers).sum(|store| store.state.lock().segments.allowed() as u64 * store.header.segment_bytes);
        let users: Vec<_> = known
            .into_iter()
            .map(|(number, digest)| {
                (number, self.peers.bytes_of(&digest), self.peers.rule(&digest).and_then(|rule| rule.bytes))
            })
            .collect();
        standings(capacity, &users)
    }
}

/// A bound is gone below by a part, so that not every block that is written has others dropped.
fn within(bound: u64) -> u64 {
    bound - bound / 16
}

impl NvmeTier {
    /// What each namespace may have, from now on. A smaller bound is reached by [`Self::tick`].
    pub fn set_namespaces(&self, rules: Vec<NvmeNamespace>) {
        *self.peers.namespaces.write() = rules;
    }

    /// Bytes of a namespace's blocks on disk.
    pub fn namespace_bytes(&self, digest: &[u8; 32]) -> u64 {
        self.peers.bytes_of(digest)
    }

    /// Holds the namespaces to their bounds and their times.
    pub(super) fn hold_namespaces(self: &Arc<Self>, now: BootTime) {
        let second = self.second(now);
        self.stores.iter().for_each(|store| store.state.lock().second = second);
        let rules = self.peers.namespaces.read().clone();
        for rule in &rules {
            let (Some(bound), used) = (rule.bytes, self.peers.bytes_of(&rule.digest)) else { continue };
            if used > bound {
                for store in &self.stores {
                    let part = u128::from(store.bytes_of(&rule.digest)) * u128::from(used - within(bound));
                    store.drop_oldest(&rule.digest, (part / u128::from(used)) as u64);
                }
            }
        }
        let shortest = rules.iter().filter_map(|rule| rule.ttl_ms).min();
        let Some(every) = shortest.map(|ttl| (ttl / caps::TTL_PARTS).max(1000)) else { return };
        let last = self.swept.load(Ordering::Acquire);
        if now.0.saturating_sub(last) < every || self.sweeping.swap(true, Ordering::AcqRel) {
            return;
        }
        self.swept.store(now.0, Ordering::Release);
        let tier = Arc::clone(self);
        let sweep = move || {
            for store in &tier.stores {
                let since = tier.since(store, &rules, second);
                store.sweep(&since);
            }
            tier.sweeping.store(false, Ordering::Release);
        };
        if let Err(error) = std::thread::Builder::new().name("kvstore-sweep".into()).spawn(sweep) {
            tracing::warn!(%error, "unused blocks of namespaces with a ttl cannot be removed for now");
            self.sweeping.store(false, Ordering::Release);
        }
    }

    fn since(&self, store: &Store, rules: &[NvmeNamespace], second: u32) -> BTreeMap<u8, u32> {
        let state = store.state.lock();
        let of = |rule: &NvmeNamespace| {
            let (number, ttl) = (state.numbers.get(&rule.digest), rule.ttl_ms?);
            Some((number, second.checked_sub((ttl / 1000) as u32)?)).filter(|_| number != 0)
        };
        rules.iter().filter_map(of).collect()
    }

    /// Seconds of this tier's life; it begins with the first, so that what was there before counts as used then.
    pub(super) fn second(&self, now: BootTime) -> u32 {
        (now.ms_since(self.opened) / 1000) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay() {
        let mut numbers = Numbers::default();
        assert_eq!((numbers.assign(&[1; 32]), numbers.assign(&[2; 32]), numbers.assign(&[1; 32])), (1, 2, 1));
        let mut again = Numbers::default();
        again.restore(2, [2; 32]);
        assert_eq!((again.get(&[2; 32]), again.get(&[1; 32])), (2, 0));
        assert_eq!((again.assign(&[3; 32]), again.assign(&[2; 32])), (1, 2));
        let many = (0..300u16).map(|at| again.assign(blake3::hash(&at.to_le_bytes()).as_bytes())).collect::<Vec<_>>();
        assert_eq!(many.iter().filter(|number| **number == 0).count(), 300 - 253, "no number is given twice");
    }

    /// A number that the index took without a sync, before it failed, was never written again: blocks of that namespace would have
    /// had a number that says nothing, or another's.
    #[test]
    fn numbers_that_a_failed_index_may_lack_are_saved_again() {
        let mut numbers = Numbers::default();
        numbers.assign(&[1; 32]);
        let lacking = |numbers: &Numbers| numbers.save(&mut IndexBatch::default());
        numbers.saved(1, false);
        assert_eq!(lacking(&numbers), 0);
        numbers.assign(&[2; 32]);
        numbers.failed();
        assert_eq!(lacking(&numbers), 2);
        numbers.saved(2, true);
        numbers.failed();
        assert_eq!(lacking(&numbers), 0, "what was synced is done");
    }

    #[test]
    fn who_has_more_than_its_share_counts_less() {
        let alone = standings(1000, &[(1, 1000, None), (2, 0, None)]);
        assert!(!alone.contested);
        let two = standings(1000, &[(1, 100, None), (2, 900, None)]);
        assert_eq!((two.of(1), two.of(2)), (FULL, 1));
        assert!(two.spares(1) && !two.spares(2) && !two.spares(0));
        // A bound of three quarters against one of a quarter: the shares are as the bounds.
        let bounds = standings(1000, &[(1, 600, Some(750)), (2, 400, Some(250))]);
        assert_eq!((bounds.of(1), bounds.of(2)), (FULL, 1));
    }
}
