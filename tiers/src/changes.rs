//! What became readable in a tier, or left it: numbered, in order, for whoever follows this node's blocks. Pure.
//!
//! The tiers say each change while they hold the lock under which it is made, so that the order here is theirs. The last
//! [`caps::CHANGES_KEPT`] are kept; who was away for longer starts from a snapshot. Nothing is kept before the first follower
//! comes: a node that nobody follows pays one load a change.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::caps;
use crate::tier::Tier;

/// A namespace, as changes name it: the first bytes of its digest. 0: not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NamespaceTag(pub u64);

impl NamespaceTag {
    /// Of the namespace with this digest.
    pub fn of(digest: &[u8; 32]) -> Self {
        Self(digest.first_chunk().map_or(1, |first| u64::from_le_bytes(*first)).max(1))
    }
}

/// One block, one tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The block: see [`kvstore_plane::event_name`].
    pub name: u64,
    /// Whose it is.
    pub namespace: NamespaceTag,
    /// Where.
    pub tier: Tier,
    /// True where it became readable, false where it left.
    pub stored: bool,
}

/// What a follower missed is not kept any more, or a tier changed as a whole: only a snapshot tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the log no longer has the changes that were asked for; start from a snapshot")]
pub struct Gap;

struct Ring {
    changes: Vec<Change>,
    /// The number of the next change.
    next: u64,
    /// The oldest number that a follower may go on from.
    first: u64,
}

/// See the head of this file. Shared by `Arc`.
pub struct ChangeLog {
    ring: Mutex<Ring>,
    followed: AtomicBool,
    /// A follower waits for a change.
    awaited: AtomicBool,
    changed: Notify,
    kept: usize,
    id: u64,
    pushed: AtomicU64,
}

impl ChangeLog {
    /// An empty log. `id` names it: numbers of another log mean nothing here.
    pub fn new(id: u64) -> Self {
        Self::with_kept(id, caps::CHANGES_KEPT)
    }

    fn with_kept(id: u64, kept: usize) -> Self {
        Self {
            ring: Mutex::new(Ring { changes: Vec::new(), next: 1, first: 1 }),
            followed: AtomicBool::new(false),
            awaited: AtomicBool::new(false),
            changed: Notify::new(),
            kept,
            id,
            pushed: AtomicU64::new(0),
        }
    }

    /// What names it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// True once somebody follows: before that, changes need not be worked out.
    pub fn is_followed(&self) -> bool {
        self.followed.load(Ordering::Relaxed)
    }

    /// Changes since the first follower came.
    pub fn count(&self) -> u64 {
        self.pushed.load(Ordering::Relaxed)
    }

    /// Somebody follows from now on: the number of the next change. What a tier holds when it is looked at afterwards, and all
    /// changes from that number, in order, are what it holds in the end.
    pub fn follow(&self) -> u64 {
        let mut ring = self.ring.lock();
        if !self.followed.swap(true, Ordering::Relaxed) {
            ring.changes.reserve_exact(self.kept);
        }
        ring.next
    }

    /// A block came or left. Called under the lock of whoever decides that.
    pub fn push(&self, change: Change) {
        if !self.is_followed() || change.name == 0 {
            return;
        }
        let mut ring = self.ring.lock();
        let at = (ring.next % self.kept as u64) as usize;
        match ring.changes.get_mut(at) {
            Some(place) => *place = change,
            // The ring is not full yet: places before `at` that were never written hold nothing that may be read.
            None => {
                while ring.changes.len() < at {
                    ring.changes.push(change);
                }
                ring.changes.push(change);
            }
        }
        ring.next += 1;
        ring.first = ring.first.max(ring.next.saturating_sub(self.kept as u64));
        drop(ring);
        self.pushed.fetch_add(1, Ordering::Relaxed);
        self.tell();
    }

    /// A tier changed as a whole (a disk is gone): all followers start from a snapshot.
    pub fn reset(&self) {
        let mut ring = self.ring.lock();
        ring.next += 1;
        ring.first = ring.next;
        drop(ring);
        self.tell();
    }

    fn tell(&self) {
        if self.awaited.swap(false, Ordering::AcqRel) {
            self.changed.notify_waiters();
        }
    }

    /// Copies changes from number `from` on into `out`, `most` of them at most; the number after the last.
    pub fn read(&self, from: u64, most: usize, out: &mut Vec<Change>) -> Result<u64, Gap> {
        let ring = self.ring.lock();
        if from < ring.first || from > ring.next {
            return Err(Gap);
        }
        let until = ring.next.min(from + most as u64);
        for number in from..until {
            let place = ring.changes.get((number % self.kept as u64) as usize);
            out.extend(place.copied());
        }
        Ok(until)
    }

    /// Resolves when there is a change from number `from` on, or the log was reset.
    pub async fn wait(&self, from: u64) {
        loop {
            let changed = self.changed.notified();
            self.awaited.store(true, Ordering::Release);
            {
                let ring = self.ring.lock();
                if ring.next != from || from < ring.first {
                    return;
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(name: u64) -> Change {
        Change { name, namespace: NamespaceTag(1), tier: Tier::Host, stored: true }
    }

    fn names(log: &ChangeLog, from: u64, most: usize) -> Result<(Vec<u64>, u64), Gap> {
        let mut out = Vec::new();
        let next = log.read(from, most, &mut out)?;
        Ok((out.iter().map(|change| change.name).collect(), next))
    }

    #[test]
    fn nothing_is_kept_before_somebody_follows() {
        let log = ChangeLog::with_kept(7, 8);
        log.push(change(1));
        assert_eq!(log.count(), 0);
        let from = log.follow();
        log.push(change(2));
        log.push(change(3));
        assert_eq!(names(&log, from, 10), Ok((vec![2, 3], from + 2)));
        assert_eq!(names(&log, from + 1, 10), Ok((vec![3], from + 2)));
        assert_eq!(names(&log, from, 1), Ok((vec![2], from + 1)));
        assert_eq!(names(&log, from + 2, 1), Ok((vec![], from + 2)));
    }

    #[test]
    fn who_falls_behind_is_told() {
        let log = ChangeLog::with_kept(7, 8);
        let from = log.follow();
        (1..=20).for_each(|name| log.push(change(name)));
        assert_eq!(names(&log, from, 10), Err(Gap));
        assert_eq!(names(&log, from + 12, 10), Ok(((13..=20).collect(), from + 20)));
        assert_eq!(names(&log, from + 21, 10), Err(Gap), "a number that is yet to come");
        log.reset();
        assert_eq!(names(&log, from + 20, 10), Err(Gap));
        let from = log.follow();
        log.push(change(21));
        assert_eq!(names(&log, from, 10), Ok((vec![21], from + 1)));
    }

    #[test]
    fn numbers_start_anywhere() {
        // The first follower came late: the ring's first places were never written.
        let log = ChangeLog::with_kept(7, 8);
        log.follow();
        (0..5).for_each(|_| log.reset());
        let from = log.follow();
        (1..=3).for_each(|name| log.push(change(name)));
        assert_eq!(names(&log, from, 10), Ok((vec![1, 2, 3], from + 3)));
    }

    #[tokio::test]
    async fn a_waiter_is_woken() {
        let log = std::sync::Arc::new(ChangeLog::with_kept(7, 8));
        let from = log.follow();
        let waiting = std::sync::Arc::clone(&log);
        let waiter = tokio::spawn(async move { waiting.wait(from).await });
        tokio::task::yield_now().await;
        log.push(change(1));
        waiter.await.unwrap();
        log.wait(from).await;
    }
}
