//! Up to which token the KV of a session is there, by what its record names: blocks, and pieces behind them. Pure.
//!
//! A block holds a fixed number of tokens of one group of layers and one rank (a shard). A piece holds the KV of some tokens that no block
//! of its shard holds yet. The session's KV goes as far as that of the shard with the least.

use std::collections::BTreeMap;

use super::state::{Block, Piece, Shape};
use crate::manifest::Refused;

/// A piece that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: u64,
    end: u64,
    /// What of it counts ends here: where the next one begins, or where it ends itself.
    until: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shard {
    /// The last block: its index and its name.
    last: Option<(u32, Vec<u8>)>,
    /// Tokens that blocks hold.
    blocks_end: u64,
    /// Behind them, without a gap and in their order.
    pieces: Vec<Span>,
}

impl Shard {
    fn end(&self) -> u64 {
        self.pieces.last().map_or(self.blocks_end, |last| self.blocks_end.max(last.until))
    }

    /// What is there from this token on counts no more, and neither does what blocks hold.
    fn cut(&mut self, start: u64) {
        let blocks_end = self.blocks_end;
        self.pieces.retain_mut(|piece| {
            piece.until = piece.until.min(start);
            piece.start < start && piece.until > blocks_end
        });
    }
}

/// See the head of this file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cover {
    shape: Shape,
    shards: BTreeMap<(u16, u16), Shard>,
}

impl Cover {
    pub(super) fn new(shape: Shape) -> Self {
        Self { shape, shards: BTreeMap::new() }
    }

    fn shard(&mut self, group: u16, rank: u16) -> Result<&mut Shard, Refused> {
        let Shape { groups, ranks, .. } = self.shape;
        if group >= groups || rank >= ranks {
            return Err(Refused(format!(
                "group {group}, rank {rank} is none of the session's {groups} groups and {ranks} ranks"
            )));
        }
        Ok(self.shards.entry((group, rank)).or_default())
    }

    /// A block that comes, of a session of so many tokens.
    pub(super) fn add_block(&mut self, block: &Block, tokens: u64) -> Result<(), Refused> {
        let size = u64::from(self.shape.block_tokens);
        let shard = self.shard(block.group, block.rank)?;
        let of = |why: String| {
            Refused(format!("block {} of group {}, rank {}: {why}", block.index, block.group, block.rank))
        };
        if block.name.0.is_empty() || block.parent.as_ref().is_some_and(|parent| parent.0.is_empty()) {
            return Err(of("a name of no bytes".into()));
        }
        let end = (u64::from(block.index) + 1).saturating_mul(size);
        if end > tokens {
            return Err(of(format!("it ends at token {end}, and the session has {tokens}")));
        }
        let parent = block.parent.as_ref().map(|parent| &parent.0);
        match &shard.last {
            Some((last, _)) if block.index <= *last => return Err(of(format!("it comes after block {last}"))),
            Some((last, name)) if block.index == last + 1 && parent != Some(name) => {
                return Err(of("its parent is not the block before it".into()));
            }
            _ if parent.is_some() != (block.index > 0) => {
                return Err(of("the first block has no parent, and each other one has".into()));
            }
            _ => {}
        }
        shard.last = Some((block.index, block.name.0.clone()));
        shard.blocks_end = end;
        shard.pieces.retain(|piece| piece.until > end);
        Ok(())
    }

    /// A piece that comes. It replaces what is there from its first token on. Where blocks hold all of it, that is all that it does.
    pub(super) fn add_piece(&mut self, piece: &Piece, tokens: u64) -> Result<(), Refused> {
        let shard = self.shard(piece.group, piece.rank)?;
        let of = |why: String| {
            Refused(format!("the piece at token {} of group {}, rank {}: {why}", piece.start, piece.group, piece.rank))
        };
        let end = piece.start.saturating_add(u64::from(piece.tokens));
        if piece.tokens == 0 || end > tokens {
            return Err(of(format!("it has {} tokens, and the session has {tokens} in all", piece.tokens)));
        }
        shard.cut(piece.start);
        if end <= shard.blocks_end {
            return Ok(());
        }
        if piece.start > shard.end() {
            return Err(of(format!("what is there ends at token {}", shard.end())));
        }
        shard.pieces.push(Span { start: piece.start, end, until: end });
        Ok(())
    }

    /// Refuses a piece that blocks hold: one that somebody appends, not one that was kept for what it replaced.
    pub(super) fn check_new(&self, piece: &Piece) -> Result<(), Refused> {
        let end = piece.start.saturating_add(u64::from(piece.tokens));
        match self.shards.get(&(piece.group, piece.rank)).is_some_and(|shard| end <= shard.blocks_end) {
            true => Err(Refused(format!(
                "the piece at token {} of group {}, rank {}: blocks hold all of it",
                piece.start, piece.group, piece.rank
            ))),
            false => Ok(()),
        }
    }

    /// Whether a piece that comes replaces some of the pieces that are there.
    pub(super) fn replaces(&self, piece: &Piece) -> bool {
        let last = self.shards.get(&(piece.group, piece.rank)).and_then(|shard| shard.pieces.last());
        last.is_some_and(|last| last.until > piece.start)
    }

    /// Whether a piece is still needed: no block holds all of it, and nothing replaced it.
    pub(super) fn needs(&self, piece: &Piece) -> bool {
        let end = piece.start + u64::from(piece.tokens);
        let pieces =
            self.shards.get(&(piece.group, piece.rank)).map(|shard| shard.pieces.as_slice()).unwrap_or_default();
        let at = pieces.binary_search_by_key(&piece.start, |span| span.start);
        at.ok().and_then(|at| pieces.get(at)).is_some_and(|span| span.end == end)
    }

    /// How many pieces are there.
    pub(super) fn pieces(&self) -> usize {
        self.shards.values().map(|shard| shard.pieces.len()).sum()
    }

    /// Tokens whose KV is there.
    pub(super) fn tokens(&self) -> u64 {
        let shards = (0..self.shape.groups).flat_map(|group| (0..self.shape.ranks).map(move |rank| (group, rank)));
        shards.map(|shard| self.shards.get(&shard).map_or(0, Shard::end)).min().unwrap_or(0)
    }
}
