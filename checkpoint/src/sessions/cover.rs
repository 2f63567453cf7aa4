//! Up to which token the KV of a session is there, by what its record names: blocks, and pieces behind them. Pure.
//!
//! A block holds a fixed number of tokens of one group of layers and one rank (a shard). A piece holds the KV of some tokens that no block
//! of its shard holds yet. The session's KV goes as far as that of the shard with the least.

use std::collections::BTreeMap;

use super::state::{Block, Piece, Shape};
use crate::manifest::Refused;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shard {
    /// The last block: its index and its name.
    last: Option<(u32, Vec<u8>)>,
    /// Tokens that blocks hold.
    blocks_end: u64,
    /// Where each piece begins and ends.
    pieces: Vec<(u64, u64)>,
}

impl Shard {
    fn end(&self) -> u64 {
        self.pieces.last().map_or(self.blocks_end, |(_, end)| self.blocks_end.max(*end))
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
        shard.pieces.retain(|(_, piece_end)| *piece_end > end);
        Ok(())
    }

    /// A piece that comes. It replaces what begins where it does, or behind.
    pub(super) fn add_piece(&mut self, piece: &Piece, tokens: u64) -> Result<(), Refused> {
        let shard = self.shard(piece.group, piece.rank)?;
        let of = |why: String| {
            Refused(format!("the piece at token {} of group {}, rank {}: {why}", piece.start, piece.group, piece.rank))
        };
        let end = piece.start.saturating_add(u64::from(piece.tokens));
        if piece.tokens == 0 || end > tokens {
            return Err(of(format!("it has {} tokens, and the session has {tokens} in all", piece.tokens)));
        }
        if end <= shard.blocks_end {
            return Err(of("blocks hold all of it".into()));
        }
        shard.pieces.retain(|(start, _)| *start < piece.start);
        if piece.start > shard.end() {
            return Err(of(format!("what is there ends at token {}", shard.end())));
        }
        shard.pieces.push((piece.start, end));
        Ok(())
    }

    /// Whether a piece is still needed: no block holds all of it, and nothing replaced it.
    pub(super) fn needs(&self, piece: &Piece) -> bool {
        let end = piece.start + u64::from(piece.tokens);
        self.shards.get(&(piece.group, piece.rank)).is_some_and(|shard| shard.pieces.contains(&(piece.start, end)))
    }

    /// Tokens whose KV is there.
    pub(super) fn tokens(&self) -> u64 {
        let shards = (0..self.shape.groups).flat_map(|group| (0..self.shape.ranks).map(move |rank| (group, rank)));
        shards.map(|shard| self.shards.get(&shard).map_or(0, Shard::end)).min().unwrap_or(0)
    }
}
