//! The bound of a volume: what it must allow at least, and what becomes of a volume that was made for a much larger one.

use std::path::{Path, PathBuf};

use kvstore_transfer::volume::Volume;

use super::NvmeOptions;
use super::batch::{IndexBatch, IndexItem};
use super::format::{SEGMENTS_AT, VolumeHeader};
use super::index::{Index, IndexFound};
use super::pins::Pins;
use super::store::{OpenError, Store, make_header};
use crate::caps;

/// A bound is too small for a volume, whose segments have the size that they were made with.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{bytes} is too small for {path}, whose segments have {segment} each: nvme.bytes must be at least {least} {why}. To start with an empty and smaller volume, move the folder away",
    bytes = size(*.bytes), path = .path.display(), segment = size(*.segment_bytes), least = size(*.bytes_min)
)]
pub struct BoundRefused {
    /// The folder.
    pub path: PathBuf,
    /// The bound.
    pub bytes: u64,
    /// The least that would do.
    pub bytes_min: u64,
    /// Of this volume.
    pub segment_bytes: u64,
    /// What stands in the way.
    pub why: &'static str,
}

/// Refuses a bound that does not allow the segments that writing needs.
pub(super) fn bound_of(path: &Path, bytes: u64, index_bytes: u64, segment_bytes: u64) -> Result<(), BoundRefused> {
    if Store::segments_allowed(bytes, index_bytes, segment_bytes) >= caps::NVME_SEGMENTS_MIN {
        return Ok(());
    }
    let bytes_min = bytes_for(caps::NVME_SEGMENTS_MIN as u64, index_bytes, segment_bytes);
    Err(BoundRefused {
        path: path.to_owned(),
        bytes,
        bytes_min,
        segment_bytes,
        why: "for the segments that writing needs",
    })
}

/// The bound that allows so many segments, in whole MiB.
pub(super) fn bytes_for(segments: u64, index_bytes: u64, segment_bytes: u64) -> u64 {
    (index_bytes + SEGMENTS_AT + segments * segment_bytes).next_multiple_of(1 << 20)
}

/// As one writes it in the configuration.
fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) { format!("{}MiB", bytes >> 20) } else { bytes.to_string() }
}

/// A volume that is much larger than its bound: hardly a block of it could stay. It is made anew, with segments that suit the
/// bound; refused where some of its blocks are pinned.
pub(super) fn make_anew(
    volume: &dyn Volume,
    index: &Index,
    found: IndexFound,
    header: &VolumeHeader,
    options: &NvmeOptions,
    refused: BoundRefused,
) -> Result<VolumeHeader, OpenError> {
    let mut pins = Pins::default();
    let loaded = index.load(b'p', |item| {
        if let IndexItem::Pin(id, record) = item {
            pins.restore(id, record, &options.boot_id, options.now);
        }
    });
    // Pins whose time is over have nobody to end them yet.
    while let Some((id, lasting)) = pins.next_expired(options.now) {
        pins.end(id, lasting);
    }
    if !pins.is_empty() {
        return Err(BoundRefused { why: "while blocks of it are pinned", ..refused }.into());
    }
    match found {
        // What a damaged index does not say, nobody knows.
        IndexFound::Damaged(_) => {}
        IndexFound::Closed(error) | IndexFound::Unread(error) => return Err(OpenError::index(error)),
        IndexFound::Whole => loaded.map_err(OpenError::index)?,
    }
    index.recreate(IndexBatch::default()).map_err(OpenError::index)?;
    let bytes = options.bytes;
    let file_path = volume.file().path().to_owned();
    let step = |cause| OpenError::Io { step: "make anew", path: file_path, cause };
    let made =
        volume.file().cut(SEGMENTS_AT).and_then(|()| make_header(volume, bytes, Some(header.seed))).map_err(step)?;
    tracing::warn!(
        path = %refused.path.display(), bytes, segment_bytes = header.segment_bytes,
        "the volume was made for a much larger nvme.bytes: its segments do not fit this one, so its blocks were dropped and it was made anew"
    );
    Ok(made)
}
