//! Stored formats stay readable: samples written by version 1, byte by byte, and what they must decode to.

use kvstore_plane::{SequenceHash, SlabGeometry, SlabHeader, SlotEntry, SlotKey};
use kvstore_tiers::nvme::{Extent, IndexValue, SegmentClass, SegmentHeader, VolumeHeader};
use kvstore_tiers::object::names::BlockName;
use kvstore_tiers::object::pack::{Footer, PackedBlock, begins_pack};
use kvstore_transfer::frame::FrameHeader;
use std::path::{Path, PathBuf};

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("compat").join(name)
}

/// The sample's bytes. With KVSTORE_WRITE_SAMPLES set, a missing sample is written: once for each version.
fn bytes_of(name: &str, current: &[u8]) -> Vec<u8> {
    let path = sample(name);
    if !path.exists() && std::env::var_os("KVSTORE_WRITE_SAMPLES").is_some() {
        std::fs::write(&path, current).unwrap();
    }
    std::fs::read(path).unwrap()
}

#[test]
fn slab_header_version_1() {
    let header = SlabHeader {
        epoch: 0x0102_0304_0506_0708,
        slab: 9,
        namespace_digest: std::array::from_fn(|at| at as u8),
        geometry: SlabGeometry { slot_bytes: 1 << 20, slot_count: 63, slots_offset: 2 << 20, slab_bytes: 65 << 20 },
    };
    let sample = bytes_of("slab_header_v1.bin", &header.encode());
    assert_eq!(SlabHeader::decode(&sample), Ok(header));
    assert_eq!(header.encode(), sample, "version 1 is written differently now: that needs a new version");
}

#[test]
fn frame_version_1() {
    let payload: Vec<u8> = (0..5000u32).map(|at| (at * 31 % 256) as u8).collect();
    let header = FrameHeader::plain(kvstore_tests::sample_identity(), 77, &payload, 2048).unwrap();
    let mut frame = header.encode();
    frame.extend_from_slice(&payload);
    frame.resize(header.frame_bytes() as usize, 0);
    let sample = bytes_of("frame_v1.bin", &frame);
    let decoded = FrameHeader::decode(&sample).unwrap();
    assert_eq!(decoded, header);
    let start = decoded.payload_offset();
    decoded.verify(&sample[start..start + decoded.payload_bytes() as usize]).unwrap();
    assert_eq!(frame, sample, "version 1 is written differently now: that needs a new version");
}

/// A volume's file and its index, as `docs/design/volume.md` draws them.
#[test]
fn volume_version_1() {
    let volume_id = std::array::from_fn(|at| at as u8 + 1);
    let volume = VolumeHeader { volume_id, segment_bytes: 64 << 20, seed: 0x1122_3344_5566_7788 };
    let sample = bytes_of("volume_header_v1.bin", &volume.encode());
    assert_eq!(VolumeHeader::decode(&sample), Ok(volume));
    assert_eq!(volume.encode(), sample, "version 1 is written differently now: that needs a new version");
    let segment = SegmentHeader { volume_id, number: 0x0A0B, life: 0x01_0203_0405, class: SegmentClass::Pinned };
    let sample = bytes_of("segment_header_v1.bin", &segment.encode());
    assert_eq!(SegmentHeader::decode(&sample), Ok(segment));
    assert_eq!(segment.encode(), sample, "version 1 is written differently now: that needs a new version");
    let extent = Extent { segment: 7, page: 0x0102, pages: 257, apart: true };
    let value = IndexValue {
        extent,
        generation: 0x0506_0708_090A,
        header_crc32: 0xDEAD_BEEF,
        parent_tag: 0x77,
        namespace: 0,
        name: 0x0102_0304_0506_0708,
    };
    let sample = bytes_of("index_value_v2.bin", &value.encode());
    assert_eq!(IndexValue::decode(&sample), Ok(value));
    assert_eq!(value.encode(), sample, "version 2 is written differently now: that needs a new version");
    let sample = bytes_of("index_value_v1.bin", &[]);
    assert_eq!(IndexValue::decode(&sample), Ok(IndexValue { name: 0, ..value }), "an earlier build's");
}

/// A pack's footer, and what any node computes to find it: `docs/design/object.md`.
#[test]
fn pack_version_1() {
    let hash = |at: u8| SequenceHash::new(&[at; 20]).unwrap();
    let block = |at: u8| PackedBlock { hash: hash(at), offset: u64::from(at) * 0x3000, frame_bytes: 0x3000 };
    let footer = Footer {
        namespace_digest: std::array::from_fn(|at| at as u8),
        layout_digest: std::array::from_fn(|at| at as u8 + 100),
        group: 0x0102,
        nonce: std::array::from_fn(|at| at as u8 + 200),
        blocks: vec![block(0), block(1), block(2)],
    };
    let sample = bytes_of("pack_footer_v1.bin", &footer.encode());
    assert_eq!(Footer::decode(&sample, 0x9000 + sample.len() as u64), Ok(footer.clone()));
    assert_eq!(footer.encode(), sample, "version 1 is written differently now: that needs a new version");
    assert_eq!(BlockName::of(&hash(7)).to_string(), "6d083df7e4e3a09ac5a29dad59b9ed2d");
    let begins: Vec<u8> = (0..40).filter(|at| begins_pack(&hash(*at), 8)).collect();
    assert_eq!(begins, [11, 16, 33], "packs begin elsewhere now: other nodes do not find them");
}

/// The directory entry, as another process maps it.
#[test]
fn slot_entry_version_1() {
    let entry = SlotEntry::free();
    let hash: Vec<u8> = (1..=32).collect();
    let key = SlotKey { layout: 0x0A0B_0C0D, group: 0x0102, hash: SequenceHash::new(&hash).unwrap() };
    entry.reserve(&key, 3);
    entry.publish(0x1234_5678, 0x9ABC_DEF0);
    entry.set_pins(5);
    entry.set_leases(6);
    // SAFETY: 64 bytes of atomics without padding, which nobody changes meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&entry).cast::<u8>(), 64) };
    let sample = bytes_of("slot_entry_v1.bin", bytes);
    assert_eq!(bytes, sample, "version 1 is laid out differently now: that needs a new version of the slab");
    let record = entry.read().unwrap();
    assert_eq!((record.key, record.length, record.crc32), (key, 0x1234_5678, 0x9ABC_DEF0));
}

/// The table hash is part of what clients of the same node compute: it must not drift.
#[test]
fn table_hash_version_1() {
    let key = SlotKey { layout: 1, group: 2, hash: SequenceHash::new(b"abc").unwrap() };
    assert_eq!(key.table_hash(3), 16_035_267_552_074_915_648);
}
