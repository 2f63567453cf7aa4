//! How far a prefix can be used, given which of its blocks are there.

/// The blocks of one layer group (of one shard), in prefix order.
pub struct GroupRun<'a> {
    /// How many blocks before the end of a prefix must be there to go on after it; `usize::MAX`: all of them.
    pub needed: usize,
    /// One flag a block: whether it is there.
    pub present: &'a [bool],
}

/// Blocks that the last `tokens - 1` tokens of a window touch: what a sliding window needs.
pub fn window_blocks(tokens: u32, block_tokens: u32) -> usize {
    tokens.saturating_sub(1).div_ceil(block_tokens.max(1)) as usize
}

/// The largest `n` up to the shortest list such that every group has what it needs to go on after `n` blocks.
pub fn usable_prefix(groups: &[GroupRun<'_>]) -> usize {
    let blocks = groups.iter().map(|group| group.present.len()).min().unwrap_or(0);
    let mut usable = vec![true; blocks + 1];
    for group in groups {
        let mut run = 0;
        for (before, (usable, present)) in usable.iter_mut().skip(1).zip(group.present).enumerate() {
            run = if *present { run + 1 } else { 0 };
            *usable &= run >= group.needed.min(before + 1);
        }
    }
    usable.iter().rposition(|usable| *usable).unwrap_or(0)
}
