//! Classes: what tells sessions apart whose blocks differ in worth.

use super::EvictionKind;

/// Uses that are counted of a block that stands for itself.
const USES: u8 = 7;
/// Turns that are counted; sessions with more are told apart by their rhythm.
const TURNS: u8 = 2;
/// Rhythms: mean gaps up to 8, 16, 32, ... seconds, and longer ones.
const RHYTHMS: u8 = 9;
const FIRST_RHYTHM_MS: f32 = 4000.0;

/// The last block of a session's first request. Partial blocks, which end most chats' requests, are hardly ever read again.
pub(super) const TAIL_UNKNOWN: u8 = TURNS + RHYTHMS;
/// The last block of a request of a session that did without the last one.
pub(super) const TAIL_LOST: u8 = TAIL_UNKNOWN + 1;
/// What a session left behind, when it went on without it.
pub(super) const LEFT_BEHIND: u8 = TAIL_LOST + 1;
/// A beginning that several sessions had in common, after the last of them went.
pub(super) const SHARED: u8 = LEFT_BEHIND + 1;
/// Blocks without a beginning: nobody can use them.
pub(super) const ORPHAN: u8 = SHARED + 1;
const FIRST_OTHER_KIND: u8 = ORPHAN + 1;
/// Those of attention.
pub(super) const CLASSES_OF_SESSIONS: usize = FIRST_OTHER_KIND as usize;
pub(super) const CLASSES: usize = FIRST_OTHER_KIND as usize + (EvictionKind::COUNT - 1) * USES as usize;

/// The class of a session of attention blocks, by its turns so far and the mean gap between them.
pub(super) fn of_session(turns: u8, gap_ms: f32) -> u8 {
    if turns <= TURNS {
        return turns.max(1) - 1;
    }
    let octave = (gap_ms / FIRST_RHYTHM_MS).max(1.0).log2() as u8;
    TURNS + octave.min(RHYTHMS - 1)
}

/// The class of a block that stands for itself, by its kind's ordinal, which is not that of attention, and its uses so far.
pub(super) fn of_block(kind: usize, uses: u8) -> u8 {
    FIRST_OTHER_KIND + (kind as u8).saturating_sub(1) * USES + uses.clamp(1, USES) - 1
}

/// True for classes of sessions that may come back.
pub(super) fn is_remembered(class: u8) -> bool {
    !(TAIL_UNKNOWN..FIRST_OTHER_KIND).contains(&class)
}
