//! Every decoder, against bytes that nobody meant: an error or a value, never a panic, never more memory
//! than the input deserves.

use bytes::Bytes;
use kvstore_plane::SlabHeader;
use kvstore_proto::data_stream::PartDecoder;
use kvstore_proto::v1::{GetResponse, PutRequest};
use kvstore_tiers::nvme::{IndexValue, SegmentHeader, VolumeHeader};
use kvstore_transfer::frame::FrameHeader;
use proptest::prelude::*;

/// Random bytes, or a valid encoding with a few bytes changed: what random bytes alone never reach.
fn damaged(valid: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let changed = (changes, any::<prop::sample::Index>(), any::<bool>()).prop_map(move |(changes, cut, whole)| {
        let mut bytes = valid.clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(if whole { bytes.len() } else { cut.index(bytes.len()) });
        bytes
    });
    prop_oneof![changed, proptest::collection::vec(any::<u8>(), 0..600)]
}

fn frame() -> Vec<u8> {
    FrameHeader::plain(kvstore_tests::sample_identity(), 77, &[9; 3000], 1000).unwrap().encode()
}

fn put_stream() -> Vec<u8> {
    use kvstore_proto::v1::{PutBlock, PutOpen, put_request::Part};
    let parts = [
        Part::Open(PutOpen { layout_digest: Bytes::from_static(&[1; 32]), ..PutOpen::default() }),
        Part::Block(PutBlock { sequence_hash: Bytes::from_static(b"hash"), length: 50, ..PutBlock::default() }),
        Part::Data(Bytes::from_static(&[7; 50])),
    ];
    parts.into_iter().flat_map(|part| kvstore_proto::data_stream::message(&PutRequest { part: Some(part) })).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames(bytes in damaged(frame())) {
        if let Ok(header) = FrameHeader::decode(&bytes) {
            prop_assert_eq!(&header.encode()[..], &frame()[..], "only the undamaged frame passes");
        }
    }

    #[test]
    fn volumes(bytes in damaged(VolumeHeader { volume_id: [1; 16], segment_bytes: 1 << 26, seed: 9 }.encode())) {
        let _ = VolumeHeader::decode(&bytes);
        let _ = SegmentHeader::decode(&bytes);
        let _ = IndexValue::decode(&bytes);
    }

    #[test]
    fn slab_headers(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
        prop_assert!(SlabHeader::decode(&bytes).is_err());
    }

    #[test]
    fn byte_streams(bytes in damaged(put_stream()), piece in 1..70usize) {
        let (mut puts, mut gets) = (PartDecoder::new(), PartDecoder::new());
        for chunk in bytes.chunks(piece) {
            puts.push(Bytes::copy_from_slice(chunk));
            gets.push(Bytes::copy_from_slice(chunk));
            while let Ok(Some(_)) = puts.next_part::<PutRequest>() {}
            while let Ok(Some(_)) = gets.next_part::<GetResponse>() {}
        }
        let _ = (puts.finish(), gets.finish());
    }

    #[test]
    fn configurations(text in "[a-z\\[\\]=\". 0-9\n]{0,200}") {
        let _ = kvstore::config::RawConfig::parse("test", &text).map(|raw| raw.check());
    }
}
