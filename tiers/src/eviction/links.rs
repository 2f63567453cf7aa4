//! Doubly linked lists over dense indices: list heads and members share one index space, so that a
//! member leaves its list without knowing which list that is. Owns links alone.

#![expect(clippy::indexing_slicing, reason = "every index is a list head made in new() or a member grown by ensure()")]

/// No neighbour: the member is in no list.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    prev: u32,
    next: u32,
}

/// A fixed number of circular lists, and members 0, 1, 2, ... that are in at most one list each.
pub(super) struct Lists {
    heads: u32,
    links: Vec<Link>,
}

impl Lists {
    /// `heads` empty lists.
    pub(super) fn new(heads: u32) -> Self {
        let links = (0..heads).map(|head| Link { prev: head, next: head }).collect();
        Self { heads, links }
    }

    /// Makes room for member `member`.
    pub(super) fn ensure(&mut self, member: u32) {
        let len = (self.heads + member + 1) as usize;
        if self.links.len() < len {
            super::grow(&mut self.links, len, Link { prev: NONE, next: NONE });
        }
    }

    pub(super) fn is_linked(&self, member: u32) -> bool {
        self.links[(self.heads + member) as usize].next != NONE
    }

    /// Puts `member`, which is in no list, at the front of `head`.
    pub(super) fn push_front(&mut self, head: u32, member: u32) {
        let at = self.heads + member;
        let next = self.links[head as usize].next;
        self.links[at as usize] = Link { prev: head, next };
        self.links[head as usize].next = at;
        self.links[next as usize].prev = at;
    }

    /// Puts `member`, which is in no list, at the back of `head`.
    pub(super) fn push_back(&mut self, head: u32, member: u32) {
        let at = self.heads + member;
        let prev = self.links[head as usize].prev;
        self.links[at as usize] = Link { prev, next: head };
        self.links[head as usize].prev = at;
        self.links[prev as usize].next = at;
    }

    /// Takes `member` out of its list; false when it was in none.
    pub(super) fn unlink(&mut self, member: u32) -> bool {
        let at = (self.heads + member) as usize;
        let Link { prev, next } = self.links[at];
        if next == NONE {
            return false;
        }
        self.links[prev as usize].next = next;
        self.links[next as usize].prev = prev;
        self.links[at] = Link { prev: NONE, next: NONE };
        true
    }

    pub(super) fn back(&self, head: u32) -> Option<u32> {
        self.links[head as usize].prev.checked_sub(self.heads)
    }

    /// The member before `member`, which is in a list; `None` at its front.
    pub(super) fn before(&self, member: u32) -> Option<u32> {
        self.links[(self.heads + member) as usize].prev.checked_sub(self.heads)
    }

    /// Puts `member`, which is in no list, behind `after`, which is in one.
    pub(super) fn insert_after(&mut self, after: u32, member: u32) {
        let (prev, at) = (self.heads + after, self.heads + member);
        let next = self.links[prev as usize].next;
        self.links[at as usize] = Link { prev, next };
        self.links[prev as usize].next = at;
        self.links[next as usize].prev = at;
    }

    /// Moves all of `from` before the first member of `to`.
    pub(super) fn prepend(&mut self, to: u32, from: u32) {
        let Link { prev: last, next: first } = self.links[from as usize];
        if first == from {
            return;
        }
        let front = self.links[to as usize].next;
        self.links[to as usize].next = first;
        self.links[first as usize].prev = to;
        self.links[last as usize].next = front;
        self.links[front as usize].prev = last;
        self.links[from as usize] = Link { prev: from, next: from };
    }
}
