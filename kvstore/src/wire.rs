//! Where wire types become domain types: every field of a request is checked here. Verbs fill in their own
//! replies.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvstore_proto::v1;
use kvstore_tiers::host::{HoldError, HoldId, LayoutGroup, NamespaceId, RegisterError, RegisteredLayout};
use kvstore_tiers::slots::Presence;
use kvstore_tiers::stack::{HoldRefused, Level};
use kvstore_tiers::tier::common_residency;
use kvstore_tiers::{BlockKind, DimensionOrder, LayerGroup, Layout, SequenceHash, Shard, Tier, TierSet};
use tonic::Status;

use crate::caps;
use crate::daemon::Daemon;

/// The bit of `LookupResponse.residency` that says: it is in no tier yet, but on its way into memory.
const ON_ITS_WAY: u32 = 256;

/// Where one part of a block is: one layer group of one shard.
#[derive(Clone, Copy)]
pub struct Located {
    /// In memory.
    pub host: Presence,
    /// In the tiers below.
    pub below: TierSet,
}

impl Located {
    /// Its residency.
    pub fn tiers(&self) -> TierSet {
        if self.host == Presence::Resident { self.below.with(Tier::Host) } else { self.below }
    }

    /// True where a tier of this node has it.
    pub fn is_here(&self) -> bool {
        !self.tiers().without(Tier::Object).is_empty()
    }
}

/// INVALID_ARGUMENT that names the field.
pub fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {problem}"))
}

/// The answer to calls while draining.
pub fn draining() -> Status {
    Status::unavailable("the daemon is draining and takes no new calls; restart it to use it again")
}

/// A layout from the wire; its numbers are checked when it is registered.
pub fn layout(wire: Option<v1::Layout>) -> Result<Layout, Status> {
    let wire = wire.ok_or_else(|| invalid("layout", "the request has no layout"))?;
    let groups = wire.groups.iter().map(layer_group).collect::<Result<_, _>>()?;
    let shard = wire.shard.unwrap_or(v1::Shard { index: 0, count: 1 });
    Ok(Layout {
        model: wire.model.to_vec(),
        weights_digest: wire.weights_digest.to_vec(),
        dtype: wire.dtype,
        block_tokens: wire.block_tokens,
        groups,
        shard: Shard { index: shard.index, count: shard.count },
        extra: wire.extra.to_vec(),
    })
}

fn layer_group(wire: &v1::LayerGroup) -> Result<LayerGroup, Status> {
    let kind = match wire.kind() {
        v1::BlockKind::Attention => BlockKind::Attention,
        v1::BlockKind::SlidingWindow => BlockKind::SlidingWindow { tokens: wire.window_tokens },
        v1::BlockKind::RecurrentState => BlockKind::RecurrentState,
        v1::BlockKind::EncoderOutput => BlockKind::EncoderOutput,
        v1::BlockKind::Chunk => BlockKind::Chunk,
        v1::BlockKind::Unspecified => return Err(invalid("layout.groups.kind", "the kind is missing or unknown")),
    };
    let order = match wire.order() {
        v1::DimensionOrder::Opaque => DimensionOrder::Opaque,
        v1::DimensionOrder::LayerOpaque => DimensionOrder::LayerOpaque,
        v1::DimensionOrder::LayerPlaneHeadToken => DimensionOrder::LayerPlaneHeadToken,
        v1::DimensionOrder::LayerPlaneTokenHead => DimensionOrder::LayerPlaneTokenHead,
        v1::DimensionOrder::Unspecified => {
            return Err(invalid("layout.groups.order", "the order is missing or unknown"));
        }
    };
    let (layers, planes, heads, head_bytes) = (wire.layers, wire.planes, wire.heads, wire.head_bytes);
    Ok(LayerGroup { kind, layers, planes, heads, head_bytes, order })
}

/// A layout as messages carry it: the opposite of [`layout`].
pub fn layout_message(layout: &Layout) -> v1::Layout {
    v1::Layout {
        model: layout.model.clone().into(),
        weights_digest: layout.weights_digest.clone().into(),
        dtype: layout.dtype.clone(),
        block_tokens: layout.block_tokens,
        groups: layout.groups.iter().map(layer_group_message).collect(),
        shard: Some(v1::Shard { index: layout.shard.index, count: layout.shard.count }),
        extra: layout.extra.clone().into(),
    }
}

fn layer_group_message(group: &LayerGroup) -> v1::LayerGroup {
    let (kind, window_tokens) = match group.kind {
        BlockKind::Attention => (v1::BlockKind::Attention, 0),
        BlockKind::SlidingWindow { tokens } => (v1::BlockKind::SlidingWindow, tokens),
        BlockKind::RecurrentState => (v1::BlockKind::RecurrentState, 0),
        BlockKind::EncoderOutput => (v1::BlockKind::EncoderOutput, 0),
        BlockKind::Chunk => (v1::BlockKind::Chunk, 0),
    };
    let order = match group.order {
        DimensionOrder::Opaque => v1::DimensionOrder::Opaque,
        DimensionOrder::LayerOpaque => v1::DimensionOrder::LayerOpaque,
        DimensionOrder::LayerPlaneHeadToken => v1::DimensionOrder::LayerPlaneHeadToken,
        DimensionOrder::LayerPlaneTokenHead => v1::DimensionOrder::LayerPlaneTokenHead,
    };
    let (layers, planes, heads, head_bytes) = (group.layers, group.planes, group.heads, group.head_bytes);
    v1::LayerGroup { kind: kind.into(), window_tokens, layers, planes, heads, head_bytes, order: order.into() }
}

/// Why a layout was refused.
pub fn register_error(error: RegisterError) -> Status {
    match error {
        RegisterError::TooMany | RegisterError::TooManySizes => Status::failed_precondition(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}

/// The registered layout with this digest.
pub fn known_layout(daemon: &Daemon, namespace: NamespaceId, digest: &[u8]) -> Result<Arc<RegisteredLayout>, Status> {
    let digest: &[u8; 32] =
        digest.try_into().map_err(|_| invalid("layout_digest", format!("must have 32 bytes, not {}", digest.len())))?;
    let unknown = || {
        let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Status::not_found(format!("layout {hex}... is not registered with this daemon: call RegisterLayout first"))
    };
    daemon.host.layout(namespace, digest).ok_or_else(unknown)
}

/// One of a layout's groups.
pub fn known_group(layout: &RegisteredLayout, group: u32) -> Result<(u16, &LayoutGroup), Status> {
    let problem = || {
        invalid(
            "group",
            format!("the layout has no group {group}: it has {} groups, counted from 0", layout.groups.len()),
        )
    };
    Ok((group as u16, layout.group(group).ok_or_else(problem)?))
}

/// The level that a call asks for.
pub fn level(field: &str, wire: i32) -> Result<Level, Status> {
    match v1::Level::try_from(wire) {
        Ok(v1::Level::Unspecified | v1::Level::Memory) => Ok(Level::Memory),
        Ok(v1::Level::Local) => Ok(Level::Local),
        Ok(v1::Level::Durable) => Ok(Level::Durable),
        Err(_) => Err(invalid(field, format!("{wire} is not a level: use MEMORY, LOCAL or DURABLE"))),
    }
}

/// The level that a block has, for the wire.
pub fn level_message(level: Option<Level>) -> v1::Level {
    match level {
        None => v1::Level::Unspecified,
        Some(Level::Memory) => v1::Level::Memory,
        Some(Level::Local) => v1::Level::Local,
        Some(Level::Durable) => v1::Level::Durable,
    }
}

/// A sequence hash.
pub fn hash(field: &str, bytes: &[u8]) -> Result<SequenceHash, Status> {
    SequenceHash::new(bytes).map_err(|error| invalid(field, error))
}

/// The hashes of a call.
pub fn hashes(bytes: &[Bytes], max: usize) -> Result<Vec<SequenceHash>, Status> {
    if bytes.is_empty() {
        return Err(invalid("sequence_hashes", "the list is empty: name at least one block"));
    }
    if bytes.len() > max {
        // Not a bound that waiting would help with.
        let problem = format!("the call names {} blocks, but it may name at most {max}", bytes.len());
        return Err(invalid("sequence_hashes", problem));
    }
    // With its memory taken at once: a list that is collected from results grows, and is copied as it does.
    let mut hashes = Vec::with_capacity(bytes.len());
    for bytes in bytes {
        hashes.push(hash("sequence_hashes", bytes)?);
    }
    Ok(hashes)
}

/// The name of a ticket or pin.
pub fn hold_id(field: &str, bytes: &[u8]) -> Result<HoldId, Status> {
    let bytes = bytes.try_into().map_err(|_| invalid(field, format!("must have 16 bytes, not {}", bytes.len())))?;
    Ok(HoldId(u128::from_le_bytes(bytes)))
}

/// The same, for the wire.
pub fn hold_bytes(id: HoldId) -> Bytes {
    Bytes::copy_from_slice(&id.0.to_le_bytes())
}

/// Why nothing was held.
pub fn hold_refused(error: &HoldRefused) -> Status {
    let message = error.to_string();
    match error {
        HoldRefused::Memory(HoldError::TooLarge { .. }) | HoldRefused::TooLarge(_) => {
            Status::failed_precondition(message)
        }
        HoldRefused::Memory(_) | HoldRefused::TooMuch(_) | HoldRefused::Left => Status::resource_exhausted(message),
        HoldRefused::NotWritten | HoldRefused::NotRecorded(_) | HoldRefused::NotReferred(_) => {
            Status::unavailable(message)
        }
    }
}

/// A range of layers or heads.
pub fn range(wire: Option<v1::Range>) -> Option<Range<u32>> {
    wire.map(|range| range.start..range.end)
}

/// A block's residency, from where each asked group and shard of it is: see [`common_residency`].
pub fn residency(parts: impl Iterator<Item = Located> + Clone) -> u32 {
    let nowhere = |on_its_way: bool| {
        parts.clone().any(|part| part.tiers().is_empty() && (part.host == Presence::InFlight) == on_its_way)
    };
    match (nowhere(false), nowhere(true)) {
        (true, _) => 0,
        (_, true) => ON_ITS_WAY,
        _ => common_residency(parts.map(|part| part.tiers())).bits(),
    }
}

/// The deadline that a call brings in its headers ("grpc-timeout": up to 8 digits and a unit), if any.
pub fn deadline_of(headers: &http::HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    let timeout = match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    };
    Some(timeout.min(caps::DEADLINE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        let read = |text: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            deadline_of(&headers)
        };
        assert_eq!(read("100m"), Some(Duration::from_millis(100)));
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        assert_eq!(read("99999999H"), Some(caps::DEADLINE_MAX));
        for bad in ["", "5", "m", "999999999m", "1x", "-1S"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_block_is_on_its_way_where_no_part_is_missing_and_one_is() {
        use Presence::{Absent, InFlight, Resident};
        let of = |parts: &[(Presence, &[Tier])]| {
            residency(parts.iter().map(|(host, below)| Located { host: *host, below: below.iter().copied().collect() }))
        };
        assert_eq!(of(&[(Resident, &[Tier::Nvme]), (Resident, &[])]), 2);
        assert_eq!(of(&[(Resident, &[]), (Absent, &[Tier::Object])]), 8, "the slower of both");
        assert_eq!(of(&[(Resident, &[Tier::Nvme]), (InFlight, &[])]), ON_ITS_WAY);
        assert_eq!(of(&[(InFlight, &[Tier::Nvme])]), 4);
        assert_eq!(of(&[(InFlight, &[]), (Absent, &[])]), 0);
    }
}
