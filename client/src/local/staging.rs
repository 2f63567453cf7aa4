//! Staging memory: where a client leaves the bytes of the blocks that it puts, piece by piece, and the daemon fetches them.
//! A piece's place is the client's again once the daemon said so, whatever became of the put that used it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::mapping::{Access, Mapping};

/// Bytes of a piece, where there is room for eight: two threads then work side by side on one block, and a piece costs
/// them much longer than the command that announces it.
const PIECE_BYTES: u64 = 128 << 10;
const PIECES_MIN: u64 = 8;
/// Pieces are whole lines.
const ALIGN: u64 = 64;

#[derive(Default)]
pub(crate) struct Staging {
    inner: Mutex<Inner>,
    freed: Notify,
}

#[derive(Default)]
struct Inner {
    asked: bool,
    closed: bool,
    /// Set once the daemon has answered: `None` inside where it had no room.
    memory: Option<Option<Arc<Mapping>>>,
    piece_bytes: u64,
    free: Vec<u32>,
    /// Places that the daemon has, by the tag of their block, in the order in which it gives them back.
    out: HashMap<u64, VecDeque<u32>>,
}

/// A place for one piece; free again when it is dropped without having been handed over.
pub(crate) struct Place<'a> {
    staging: &'a Staging,
    memory: Arc<Mapping>,
    number: u32,
    /// Where in the staging memory.
    pub(crate) offset: u64,
    /// How large it is.
    pub(crate) bytes: usize,
}

impl Place<'_> {
    /// Leaves `source` in it from byte `from` on; what would lie behind its end is left out.
    pub(crate) fn fill(&self, from: usize, source: &[u8]) {
        debug_assert!(from + source.len() <= self.bytes);
        let source = source.get(..self.bytes.saturating_sub(from).min(source.len())).unwrap_or_default();
        if let Some(to) = self.memory.at(self.offset + from as u64, source.len() as u64) {
            // SAFETY: inside the mapping; the place is this caller's alone until it is announced; source is elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), to.as_ptr(), source.len()) };
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.staging.inner.lock().free.push(self.number);
        self.staging.freed.notify_waiters();
    }
}

impl Staging {
    pub(super) fn set(&self, memory: Option<Mapping>, bytes: u64) {
        let mut inner = self.inner.lock();
        let Some(memory) = memory else {
            inner.memory = Some(None);
            return;
        };
        memory.populate(Access::Write);
        let piece_bytes = PIECE_BYTES.min(bytes / PIECES_MIN) / ALIGN * ALIGN;
        if piece_bytes == 0 {
            inner.memory = Some(None);
            return;
        }
        inner.piece_bytes = piece_bytes;
        inner.free = (0..(bytes / piece_bytes) as u32).rev().collect();
        inner.memory = Some(Some(Arc::new(memory)));
    }

    /// Whether there is staging memory; `None` while that is not known.
    pub(super) fn state(&self) -> Option<bool> {
        self.inner.lock().memory.as_ref().map(Option::is_some)
    }

    /// True for the first that asks.
    pub(super) fn ask(&self) -> bool {
        !std::mem::replace(&mut self.inner.lock().asked, true)
    }

    /// The next put asks again: there was no room then.
    pub(crate) fn forget_refusal(&self) {
        let mut inner = self.inner.lock();
        if inner.memory.as_ref().is_some_and(Option::is_none) {
            inner.memory = None;
            inner.asked = false;
        }
    }

    pub(super) fn close(&self) {
        self.inner.lock().closed = true;
        self.freed.notify_waiters();
    }

    /// A free place, if there is one now.
    pub(crate) fn try_take(&self) -> Option<Place<'_>> {
        let mut inner = self.inner.lock();
        let memory = Arc::clone(inner.memory.as_ref()?.as_ref()?);
        let number = inner.free.pop()?;
        let offset = u64::from(number) * inner.piece_bytes;
        Some(Place { staging: self, memory, number, offset, bytes: inner.piece_bytes as usize })
    }

    /// The place goes to the daemon as the next piece of block `tag`.
    pub(crate) fn hand_over(&self, tag: u64, place: &Place<'_>) {
        self.inner.lock().out.entry(tag).or_default().push_back(place.number);
    }

    /// The place did not go after all.
    pub(crate) fn take_back(&self, tag: u64) {
        let mut inner = self.inner.lock();
        let Some(places) = inner.out.get_mut(&tag) else { return };
        places.pop_back();
        if places.is_empty() {
            inner.out.remove(&tag);
        }
    }

    /// The daemon is done with the oldest piece of block `tag`.
    pub(super) fn copied(&self, tag: u64) {
        let mut inner = self.inner.lock();
        let Some(places) = inner.out.get_mut(&tag) else { return };
        let number = places.pop_front();
        if places.is_empty() {
            inner.out.remove(&tag);
        }
        inner.free.extend(number);
        drop(inner);
        self.freed.notify_waiters();
    }

    fn is_worth_a_look(&self) -> bool {
        let inner = self.inner.lock();
        !inner.free.is_empty() || inner.closed
    }

    /// Until a place may be free, or there will be none.
    pub(crate) async fn freed(&self) {
        let freed = self.freed.notified();
        tokio::pin!(freed);
        freed.as_mut().enable();
        if !self.is_worth_a_look() {
            freed.await;
        }
    }
}
