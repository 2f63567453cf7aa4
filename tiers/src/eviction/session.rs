//! A session, as far as it is known: what it did until now says what it will do.

use super::classes::{self, ORPHAN};
use super::lifetimes::{Lifetime, Lifetimes};

/// A mean gap follows a session's last few turns.
const GAP_WEIGHT: f32 = 0.3;

/// What became of the last block of a session's request when it went on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Tail {
    #[default]
    Unknown,
    Lost,
    Read,
}

/// What is known of a session.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Session {
    /// Since its last turn.
    pub(super) life: Lifetime,
    /// Mean time between turns, in milliseconds.
    pub(super) gap_ms: f32,
    pub(super) turns: u8,
    pub(super) tail: Tail,
    /// Its last block has a lifetime of its own, of this class, begun with the session's; 0: it has none.
    pub(super) tail_class: u8,
}

impl Session {
    /// One that nothing is known of.
    pub(super) fn new(life: Lifetime) -> Self {
        Self { life, turns: 1, ..Self::default() }
    }

    pub(super) fn class(&self) -> u8 {
        classes::of_session(self.turns, self.gap_ms)
    }

    pub(super) fn tail_life(&self) -> Option<Lifetime> {
        (self.tail_class != 0).then_some(Lifetime { class: self.tail_class, ..self.life })
    }

    /// After another turn, so long after the one before.
    pub(super) fn after(self, gap_ms: u64) -> Self {
        let gap = gap_ms as f32;
        let gap_ms = if self.turns < 2 { gap } else { self.gap_ms + GAP_WEIGHT * (gap - self.gap_ms) };
        Self { turns: self.turns.saturating_add(1), gap_ms, ..self }
    }

    /// The lifetime of its last block is none that anything is learnt from.
    pub(super) fn close_tail(&mut self, lifetimes: &mut Lifetimes) {
        if let Some(life) = self.tail_life() {
            lifetimes.close(life);
        }
        self.tail_class = 0;
    }

    /// It is not known what it would have done.
    pub(super) fn forget(mut self, lifetimes: &mut Lifetimes) {
        if self.life.class != ORPHAN {
            lifetimes.end_unknown(self.life);
        }
        self.close_tail(lifetimes);
    }
}
