//! How far a prefix can be used, given which of its blocks are there, for each kind of layer group.

use kvstore_plane::{GroupRun, usable_prefix, window_blocks};

use crate::layout::BlockKind;

/// Which blocks of one group (of one shard) are readable, in prefix order.
pub struct GroupPresence<'a> {
    /// The group's kind.
    pub kind: BlockKind,
    /// One flag a block.
    pub present: &'a [bool],
}

/// The longest usable prefix in blocks: the largest `n` up to the shortest list such that every group has
/// what it needs to go on after `n` blocks.
///
/// Full attention needs all of 0..n; a sliding window the blocks that its last `tokens - 1` tokens touch;
/// recurrent state the state after block n - 1. Encoder outputs and chunks name no prefix: each is its own, so a
/// leading run is all that can be said.
pub fn readable_prefix<'a>(groups: &[GroupPresence<'a>], block_tokens: u32) -> usize {
    let run = |group: &GroupPresence<'a>| {
        let needed = match group.kind {
            BlockKind::Attention | BlockKind::EncoderOutput | BlockKind::Chunk => usize::MAX,
            BlockKind::SlidingWindow { tokens } => window_blocks(tokens, block_tokens),
            BlockKind::RecurrentState => 1,
        };
        GroupRun { needed, present: group.present }
    };
    usable_prefix(&groups.iter().map(run).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(text: &str) -> Vec<bool> {
        text.bytes().map(|byte| byte == b'x').collect()
    }

    fn readable(groups: &[(BlockKind, &str)]) -> usize {
        let present: Vec<_> = groups.iter().map(|(_, text)| flags(text)).collect();
        let groups: Vec<_> =
            groups.iter().zip(&present).map(|((kind, _), present)| GroupPresence { kind: *kind, present }).collect();
        readable_prefix(&groups, 16)
    }

    #[test]
    fn attention_reads_the_leading_run() {
        assert_eq!(readable(&[(BlockKind::Attention, "xxx.x")]), 3);
        assert_eq!(readable(&[(BlockKind::Attention, ".xxx")]), 0);
        assert_eq!(readable(&[(BlockKind::Attention, "")]), 0);
    }

    #[test]
    fn a_window_needs_its_last_blocks_only() {
        let window = BlockKind::SlidingWindow { tokens: 33 };
        assert_eq!(readable(&[(window, "..xx")]), 4);
        assert_eq!(readable(&[(window, "..xx.x")]), 4);
        assert_eq!(readable(&[(window, "x.x.x")]), 1, "one block is the whole of a prefix of one");
        assert_eq!(readable(&[(BlockKind::SlidingWindow { tokens: 1 }, "....")]), 4, "needs nothing but its own token");
    }

    #[test]
    fn hybrid_groups_meet_at_a_state() {
        let groups = [(BlockKind::Attention, "xxxxx"), (BlockKind::RecurrentState, "..x..")];
        assert_eq!(readable(&groups), 3);
        let groups = [(BlockKind::Attention, "xx..."), (BlockKind::RecurrentState, "..x.x")];
        assert_eq!(readable(&groups), 0, "no state within the attention run");
    }

    #[test]
    fn shards_and_groups_answer_their_minimum() {
        assert_eq!(readable(&[(BlockKind::Attention, "xxxx"), (BlockKind::Attention, "xx.x")]), 2);
        assert_eq!(readable(&[(BlockKind::Attention, "xxxx"), (BlockKind::Attention, "x")]), 1);
    }
}
