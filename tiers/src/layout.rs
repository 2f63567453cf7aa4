//! Layouts: what makes two blocks byte-compatible, and where a layer or a head lies in a block.
//!
//! A layout is registered once and named by its digest; the digest is part of every key, so that bytes of
//! another model, another version of its weights, another rank or another arrangement are never found.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::caps;
use crate::eviction::EvictionKind;

/// The state that the blocks of a layer group hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum BlockKind {
    /// Keys and values of full attention: readable as far as every block from the root is there.
    Attention,
    /// Keys and values of attention over the last `tokens` tokens.
    SlidingWindow {
        /// The window.
        tokens: u32,
    },
    /// The state of a recurrent layer after the block's last token.
    RecurrentState,
    /// The output of an encoder for one item (image, clip); names no prefix.
    EncoderOutput,
    /// A piece of a snapshot's files, named by the BLAKE3 of its bytes; names no prefix, and is in the object store already.
    Chunk,
}

impl BlockKind {
    /// The number in keys' documents, frames and slot directories.
    pub fn number(self) -> u8 {
        match self {
            Self::Attention => 1,
            Self::SlidingWindow { .. } => 2,
            Self::RecurrentState => 3,
            Self::EncoderOutput => 4,
            Self::Chunk => 5,
        }
    }

    /// How the eviction policy sees it.
    pub fn eviction(self) -> EvictionKind {
        match self {
            Self::Attention => EvictionKind::Attention,
            Self::SlidingWindow { .. } => EvictionKind::SlidingWindow,
            Self::RecurrentState => EvictionKind::RecurrentState,
            Self::EncoderOutput | Self::Chunk => EvictionKind::EncoderOutput,
        }
    }

    /// True where a block may be shorter than the layout says.
    pub fn varies_in_length(self) -> bool {
        matches!(self, Self::RecurrentState | Self::EncoderOutput | Self::Chunk)
    }
}

/// The order of a block's dimensions, slowest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DimensionOrder {
    /// Whole layers, one after another, of unknown inside: ranges of layers, not of heads.
    LayerOpaque,
    /// `[layer][plane][head][token][element]`.
    LayerPlaneHeadToken,
    /// `[layer][plane][token][head][element]`.
    LayerPlaneTokenHead,
    /// Bytes of unknown order: no ranges.
    Opaque,
}

/// Layers whose blocks are stored together.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LayerGroup {
    /// The state they hold.
    pub kind: BlockKind,
    /// How many layers.
    pub layers: u32,
    /// Planes of a layer: 2 for keys and values, 1 for latent attention and states.
    pub planes: u32,
    /// Heads of this shard.
    pub heads: u32,
    /// Bytes of one head's vector for one token (of the whole state of a head, where a block is one state).
    pub head_bytes: u32,
    /// The order of the dimensions.
    pub order: DimensionOrder,
}

/// A rank of a tensor-parallel group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shard {
    /// Which, from 0.
    pub index: u32,
    /// Of how many.
    pub count: u32,
}

/// What makes two blocks byte-compatible.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layout {
    /// What identifies the model, up to 64 bytes.
    pub model: Vec<u8>,
    /// Digest of the weights, up to 64 bytes: new weights, new blocks.
    pub weights_digest: Vec<u8>,
    /// The element type, as the engine names it ("bfloat16").
    pub dtype: String,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// The layer groups.
    pub groups: Vec<LayerGroup>,
    /// The rank.
    pub shard: Shard,
    /// Whatever else must match (backend, kernel arrangement), up to 256 bytes.
    pub extra: Vec<u8>,
}

/// Why a layout or a range was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct InvalidLayout {
    /// The field at fault.
    pub field: &'static str,
    /// What is wrong and what would be valid.
    pub problem: String,
}

fn invalid(field: &'static str, problem: impl Into<String>) -> InvalidLayout {
    InvalidLayout { field, problem: problem.into() }
}

fn within(field: &'static str, value: usize, range: Range<usize>) -> Result<(), InvalidLayout> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(invalid(field, format!("{value} is not within {} to {}", range.start, range.end - 1)))
}

/// Layers or heads `start..end`; `None` means all.
pub type PartRange = Option<Range<u32>>;

impl LayerGroup {
    /// Bytes of a layer in a block of `block_tokens`.
    pub fn layer_bytes(&self, block_tokens: u32) -> u64 {
        u64::from(self.planes)
            * u64::from(self.heads)
            * u64::from(self.head_bytes)
            * u64::from(self.tokens(block_tokens))
    }

    /// Bytes of a block of `block_tokens`.
    pub fn block_bytes(&self, block_tokens: u32) -> u64 {
        u64::from(self.layers) * self.layer_bytes(block_tokens)
    }

    /// True where a block is one layer after another, so that a run of layers is a run of bytes.
    pub fn has_layers(&self) -> bool {
        self.order != DimensionOrder::Opaque && !self.kind.varies_in_length()
    }

    fn tokens(&self, block_tokens: u32) -> u32 {
        if self.kind.varies_in_length() { 1 } else { block_tokens }
    }

    /// The bytes of a block that hold `layers` and `heads`, in order, neighbours joined.
    pub fn ranges(
        &self,
        block_tokens: u32,
        layers: PartRange,
        heads: PartRange,
    ) -> Result<Vec<Range<u64>>, InvalidLayout> {
        let all = 0..self.layers;
        let (layers, whole_layers) = checked_part("layers", layers, all)?;
        let (heads, whole_heads) = checked_part("heads", heads, 0..self.heads)?;
        match self.order {
            DimensionOrder::Opaque if !(whole_layers && whole_heads) => {
                return Err(invalid("order", "an opaque block has no ranges of layers or heads"));
            }
            DimensionOrder::LayerOpaque if !whole_heads => {
                return Err(invalid(
                    "order",
                    "this layout's layers are opaque; ask for ranges of layers, not of heads",
                ));
            }
            _ => {}
        }
        let layer_bytes = self.layer_bytes(block_tokens);
        if whole_heads {
            let bytes = u64::from(layers.start) * layer_bytes..u64::from(layers.end) * layer_bytes;
            return Ok(vec![bytes]);
        }
        let (tokens, head_bytes) = (u64::from(self.tokens(block_tokens)), u64::from(self.head_bytes));
        // Runs of neighbouring heads: one a plane where heads are outside tokens, else one a token.
        let (runs, run_bytes, unit) = match self.order {
            DimensionOrder::LayerPlaneHeadToken => {
                (1, u64::from(self.heads) * tokens * head_bytes, tokens * head_bytes)
            }
            _ => (tokens, u64::from(self.heads) * head_bytes, head_bytes),
        };
        let runs_per_layer = u64::from(self.planes) * runs;
        let first = u64::from(layers.start) * runs_per_layer;
        let end = u64::from(layers.end) * runs_per_layer;
        let range =
            |run: u64| run * run_bytes + u64::from(heads.start) * unit..run * run_bytes + u64::from(heads.end) * unit;
        Ok((first..end).map(range).collect())
    }
}

fn checked_part(field: &'static str, part: PartRange, all: Range<u32>) -> Result<(Range<u32>, bool), InvalidLayout> {
    let Some(part) = part else { return Ok((all, true)) };
    if part.start >= part.end || part.end > all.end {
        let problem = format!("{}..{} is not a range within 0..{}", part.start, part.end, all.end);
        return Err(invalid(field, problem));
    }
    let whole = part == all;
    Ok((part, whole))
}

impl Layout {
    /// Checks every field.
    pub fn validate(&self) -> Result<(), InvalidLayout> {
        within("model", self.model.len(), 1..65)?;
        within("weights_digest", self.weights_digest.len(), 0..65)?;
        within("dtype", self.dtype.len(), 1..33)?;
        within("extra", self.extra.len(), 0..257)?;
        within("block_tokens", self.block_tokens as usize, 1..(1 << 20) + 1)?;
        within("groups", self.groups.len(), 1..caps::GROUPS_MAX + 1)?;
        within("shard.count", self.shard.count as usize, 1..caps::SHARDS_MAX as usize + 1)?;
        within("shard.index", self.shard.index as usize, 0..self.shard.count as usize)?;
        for group in &self.groups {
            within("groups.layers", group.layers as usize, 1..65_536)?;
            within("groups.planes", group.planes as usize, 1..17)?;
            within("groups.heads", group.heads as usize, 1..65_536)?;
            within("groups.head_bytes", group.head_bytes as usize, 1..caps::BLOCK_BYTES_MAX as usize + 1)?;
            if group.kind == (BlockKind::SlidingWindow { tokens: 0 }) {
                return Err(invalid("groups.window_tokens", "a sliding window has at least 1 token"));
            }
            let bytes = u128::from(group.layers)
                * u128::from(group.planes)
                * u128::from(group.heads)
                * u128::from(group.head_bytes)
                * u128::from(group.tokens(self.block_tokens));
            if bytes > u128::from(caps::BLOCK_BYTES_MAX) {
                let problem = format!("a block of {bytes} bytes is larger than {}", caps::BLOCK_BYTES_MAX);
                return Err(invalid("groups", problem));
            }
        }
        Ok(())
    }

    /// BLAKE3 of the canonical encoding: `docs/design/key.md`.
    pub fn digest(&self) -> [u8; 32] {
        self.digest_of_shard(self.shard.index)
    }

    /// Equal for the shards of one tensor-parallel group, and for nothing else.
    pub fn family_digest(&self) -> [u8; 32] {
        self.digest_of_shard(u32::MAX)
    }

    fn digest_of_shard(&self, shard_index: u32) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u32).to_le_bytes());
            hasher.update(bytes);
        };
        bytes(b"kvstore layout 1");
        bytes(&self.model);
        bytes(&self.weights_digest);
        bytes(self.dtype.as_bytes());
        bytes(&self.extra);
        let mut numbers = vec![self.block_tokens, shard_index, self.shard.count, self.groups.len() as u32];
        for group in &self.groups {
            let window = if let BlockKind::SlidingWindow { tokens } = group.kind { tokens } else { 0 };
            let order = group.order as u32;
            let kind = u32::from(group.kind.number());
            numbers.extend([kind, window, group.layers, group.planes, group.heads, group.head_bytes, order]);
        }
        let numbers: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes(&numbers);
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(order: DimensionOrder) -> LayerGroup {
        LayerGroup { kind: BlockKind::Attention, layers: 3, planes: 2, heads: 4, head_bytes: 8, order }
    }

    /// Every byte of a block carries its own coordinates; a range must give exactly the right ones.
    #[test]
    fn ranges_give_the_asked_layers_and_heads() {
        let tokens = 5;
        for order in [DimensionOrder::LayerPlaneHeadToken, DimensionOrder::LayerPlaneTokenHead] {
            let group = group(order);
            let mut coordinates = Vec::new();
            for layer in 0..3u32 {
                for _plane in 0..2 {
                    let (outer, inner) = if order == DimensionOrder::LayerPlaneHeadToken { (4, 5) } else { (5, 4) };
                    for a in 0..outer {
                        for b in 0..inner {
                            let head = if order == DimensionOrder::LayerPlaneHeadToken { a } else { b };
                            coordinates.extend(std::iter::repeat_n((layer, head), 8));
                        }
                    }
                }
            }
            assert_eq!(coordinates.len() as u64, group.block_bytes(tokens));
            let ranges = group.ranges(tokens, Some(1..3), Some(1..3)).unwrap();
            let got: Vec<(u32, u32)> =
                ranges.iter().flat_map(|r| coordinates[r.start as usize..r.end as usize].to_vec()).collect();
            let want: Vec<_> =
                coordinates.iter().copied().filter(|(l, h)| (1..3).contains(l) && (1..3).contains(h)).collect();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn impossible_ranges_are_refused_by_name() {
        let opaque = group(DimensionOrder::Opaque);
        assert_eq!(opaque.ranges(5, None, None).unwrap(), vec![0..opaque.block_bytes(5)]);
        assert_eq!(opaque.ranges(5, Some(0..1), None).unwrap_err().field, "order");
        assert_eq!(group(DimensionOrder::LayerOpaque).ranges(5, None, Some(0..1)).unwrap_err().field, "order");
        let plain = group(DimensionOrder::LayerPlaneHeadToken);
        assert_eq!(plain.ranges(5, Some(2..4), None).unwrap_err().field, "layers");
        assert_eq!(plain.ranges(5, None, Some(Range { start: 2, end: 2 })).unwrap_err().field, "heads");
    }

    fn layout() -> Layout {
        Layout {
            model: b"llama".to_vec(),
            weights_digest: vec![1; 32],
            dtype: "bfloat16".into(),
            block_tokens: 16,
            groups: vec![group(DimensionOrder::LayerPlaneHeadToken)],
            shard: Shard { index: 0, count: 2 },
            extra: Vec::new(),
        }
    }

    type Change = fn(&mut Layout);

    #[test]
    fn every_field_changes_the_digest() {
        let base = layout();
        let changes: Vec<Change> = vec![
            |l| l.model.push(0),
            |l| l.weights_digest[0] = 9,
            |l| l.dtype = "float16".into(),
            |l| l.block_tokens = 32,
            |l| l.shard.index = 1,
            |l| l.shard.count = 4,
            |l| l.extra = b"x".to_vec(),
            |l| l.groups[0].heads = 5,
            |l| l.groups[0].order = DimensionOrder::Opaque,
            |l| l.groups[0].kind = BlockKind::SlidingWindow { tokens: 4 },
            |l| l.groups.push(l.groups[0].clone()),
        ];
        let mut digests = vec![base.digest()];
        for change in changes {
            let mut changed = base.clone();
            change(&mut changed);
            digests.push(changed.digest());
        }
        let distinct: std::collections::HashSet<_> = digests.iter().collect();
        assert_eq!(distinct.len(), digests.len());
        let mut sibling = base.clone();
        sibling.shard.index = 1;
        assert_eq!(sibling.family_digest(), base.family_digest());
    }

    #[test]
    fn invalid_layouts_are_refused_by_field() {
        let cases: Vec<(Change, &str)> = vec![
            (|l| l.model.clear(), "model"),
            (|l| l.groups.clear(), "groups"),
            (|l| l.shard.index = 2, "shard.index"),
            (|l| l.block_tokens = 0, "block_tokens"),
            (|l| l.groups[0].heads = 0, "groups.heads"),
            (|l| l.groups[0].head_bytes = 1 << 29, "groups"),
            (|l| l.groups[0].kind = BlockKind::SlidingWindow { tokens: 0 }, "groups.window_tokens"),
        ];
        for (change, field) in cases {
            let mut changed = layout();
            change(&mut changed);
            assert_eq!(changed.validate().unwrap_err().field, field);
        }
        layout().validate().unwrap();
    }
}
