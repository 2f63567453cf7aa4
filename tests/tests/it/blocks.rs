//! What every caller relies on: blocks come back as they went in, prefixes are found, promises are kept.

use std::time::Duration;

use bytes::Bytes;
use kvstore::replay;
use kvstore_client::v1::{BlockKind, DimensionOrder, LayerGroup, Level, LookupRequest, PrefetchState, PutStatus};
use kvstore_client::{Error, GetOptions, GetOutcome, PutBlock, PutOptions};
use kvstore_tests::{BLOCK_BYTES, TestDaemon, chain, hashes, sharded_layout};

#[tokio::test]
async fn blocks_come_back_as_they_went_in() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    let results = client.put(&group, chain(0..20, BLOCK_BYTES)).await.unwrap();
    assert!(results.iter().all(|r| r.status() == PutStatus::Stored && r.level() == Level::Memory));
    let again = client.put(&group, chain(0..21, BLOCK_BYTES)).await.unwrap();
    assert!(again[..20].iter().all(|r| r.status() == PutStatus::Present));
    assert_eq!(again[20].status(), PutStatus::Stored);
    let outcomes = client.get(&group, &hashes([3, 99, 0])).await.unwrap();
    assert_eq!(outcomes[0].bytes().unwrap(), &replay::content(3, BLOCK_BYTES as usize));
    assert_eq!(outcomes[1], GetOutcome::Miss);
    assert_eq!(outcomes[2].bytes().unwrap(), &replay::content(0, BLOCK_BYTES as usize));
    let mut buffers = vec![vec![0u8; BLOCK_BYTES as usize]; 4];
    let mut into: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    assert_eq!(client.get_into(&group, &hashes([5, 6, 99, 7]), &mut into).await.unwrap(), 2);
    assert_eq!(replay::wrong_bytes(6, &buffers[1]), 0);
    assert!(buffers[3].iter().all(|byte| *byte == 0), "blocks after the first miss are left alone");
}

#[tokio::test]
async fn blocks_of_many_sizes_come_back() {
    let daemon = TestDaemon::start(&[]).await;
    for bytes in [1, 7, 4096, 4097, 262_144, 1 << 20, (3 << 20) + 5] {
        let (client, group) = daemon.group(bytes).await;
        client.put(&group, chain(0..3, bytes)).await.unwrap();
        for (id, outcome) in client.get(&group, &hashes(0..3)).await.unwrap().iter().enumerate() {
            assert_eq!(outcome.bytes().unwrap(), &replay::content(id as u64, bytes as usize), "{bytes} bytes");
        }
    }
}

#[tokio::test]
async fn a_prefix_is_found_as_far_as_it_goes() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    client.put(&group, chain(0..10, BLOCK_BYTES)).await.unwrap();
    client.put(&group, chain(12..13, BLOCK_BYTES)).await.unwrap();
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes(0..13),
        ..LookupRequest::default()
    };
    let answer = client.lookup(request).await.unwrap();
    assert_eq!(answer.readable_blocks, 10);
    assert_eq!(answer.residency, [&[2; 10][..], &[0, 0, 2]].concat());
    let run = GetOptions { leading_run: true, ..GetOptions::default() };
    let outcomes = client.get_with(&group, &hashes(8..13), run).await.unwrap();
    assert_eq!(outcomes.len(), 3, "the run ends with its first miss");
}

#[tokio::test]
async fn a_range_of_layers_and_heads_is_cut_out() {
    let daemon = TestDaemon::start(&[]).await;
    let client = daemon.client().await;
    let registered = client.register_layout(sharded_layout(0, 1)).await.unwrap();
    let (group, bytes) = (registered.group(0), registered.block_bytes[0] as usize);
    assert_eq!(bytes, 4 * 2 * 2 * 16 * 8);
    let block = replay::content(1, bytes);
    client.put(&group, vec![PutBlock::new(replay::sequence_hash(1), block.clone())]).await.unwrap();
    let get = async |layers, heads| {
        let options = GetOptions { layers, heads, ..GetOptions::default() };
        client.get_with(&group, &hashes([1]), options).await.map(|outcomes| outcomes[0].bytes().unwrap().clone())
    };
    assert_eq!(get(Some(1..3), None).await.unwrap(), block.slice(bytes / 4..bytes * 3 / 4));
    // [layer][plane][head]: head 1 is the second half of each plane of 256 bytes.
    let planes: Vec<u8> = (0..8).flat_map(|plane| block[plane * 256 + 128..(plane + 1) * 256].to_vec()).collect();
    assert_eq!(get(None, Some(1..2)).await.unwrap(), planes);
    assert!(matches!(get(Some(3..5), None).await, Err(Error::Invalid(message)) if message.contains("layers")));
}

#[tokio::test]
async fn levels_without_a_tier_are_refused_with_the_reason() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    for (level, tier) in [(Level::Local, "Nvme"), (Level::Durable, "object store")] {
        let options = PutOptions { level, ..PutOptions::default() };
        let error = client.put_with(&group, chain(0..1, BLOCK_BYTES), options).await.unwrap_err();
        assert!(matches!(&error, Error::Unsupported(message) if message.contains(tier)), "{error}");
    }
    assert_eq!(client.get(&group, &hashes([0])).await.unwrap(), [GetOutcome::Miss]);
}

/// What the scheduler was told still holds when the worker, another process, reads.
#[tokio::test]
async fn a_ticket_holds_what_was_found() {
    let daemon = TestDaemon::start(&["host.bytes=8MiB"]).await;
    let (scheduler, group) = daemon.group(64 << 10).await;
    scheduler.put(&group, chain(0..20, 64 << 10)).await.unwrap();
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes(0..20),
        ticket_ttl_ms: 30_000,
        ..LookupRequest::default()
    };
    let answer = scheduler.lookup(request.clone()).await.unwrap();
    assert_eq!((answer.readable_blocks, answer.ticket.len()), (20, 16));
    // Many times what fits.
    for at in 0..20 {
        scheduler.put(&group, chain(1000 + at * 50..1050 + at * 50, 64 << 10)).await.unwrap();
    }
    let worker = daemon.client().await;
    let options = GetOptions { ticket: answer.ticket.clone(), ..GetOptions::default() };
    let outcomes = worker.get_with(&group, &hashes(0..20), options.clone()).await.unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.bytes().is_some()));
    assert!(worker.release_ticket(answer.ticket.clone()).await.unwrap());
    assert!(!worker.release_ticket(answer.ticket).await.unwrap());
    let late = worker.get_with(&group, &hashes(0..20), options).await.unwrap_err();
    assert!(matches!(late, Error::NotFound(message) if message.contains("ticket")));
    // A ticket that nobody releases ends by itself.
    scheduler.put(&group, chain(0..20, 64 << 10)).await.unwrap();
    // One that is released ends all the same: each try has another, and waits longer.
    let mut ends = false;
    for wait_ms in [400, 2000, 10_000, 30_000] {
        let short = LookupRequest { ticket_ttl_ms: 50, ..request.clone() };
        let short = scheduler.lookup(short).await.unwrap().ticket;
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        ends = !worker.release_ticket(short).await.unwrap();
        if ends {
            break;
        }
    }
    assert!(ends, "a ticket of 50 ms is there after half a minute");
}

#[tokio::test]
async fn a_pin_keeps_a_chain_and_half_the_tier_at_most() {
    let daemon = TestDaemon::start(&["host.bytes=8MiB"]).await;
    let (client, group) = daemon.group(64 << 10).await;
    client.put(&group, chain(0..20, 64 << 10)).await.unwrap();
    let pin = client.pin(&group, &hashes(0..20), 60_000).await.unwrap();
    assert_eq!(pin.pinned_blocks, 20);
    for at in 0..20 {
        client.put(&group, chain(1000 + at * 50..1050 + at * 50, 64 << 10)).await.unwrap();
    }
    assert_eq!(client.readable_blocks(&group, &hashes(0..20)).await.unwrap(), 20);
    assert_eq!(client.delete(&group, &hashes(0..20)).await.unwrap().pinned, 20);
    let mut pinned = 20;
    for id in 5000..5100 {
        client.put(&group, chain(id..id + 1, 64 << 10)).await.unwrap();
        match client.pin(&group, &hashes([id]), 60_000).await {
            Ok(answer) => pinned += answer.pinned_blocks,
            Err(error) => assert!(matches!(&error, Error::Busy(message) if message.contains("50%")), "{error}"),
        }
    }
    assert_eq!(pinned, 63, "half of 8 MiB is 64 blocks of 64 KiB; the bound is rounded down");
    assert!(client.unpin(pin.pin).await.unwrap());
    assert_eq!(client.delete(&group, &hashes(0..20)).await.unwrap().deleted, 20);
}

#[tokio::test]
async fn a_tensor_parallel_group_reads_as_far_as_its_slowest_shard() {
    let daemon = TestDaemon::start(&[]).await;
    let client = daemon.client().await;
    let first = client.register_layout(sharded_layout(0, 2)).await.unwrap();
    let request = LookupRequest {
        layout_digest: first.digest.clone(),
        sequence_hashes: hashes(0..8),
        all_shards: true,
        ..LookupRequest::default()
    };
    let bytes = first.block_bytes[0] as u32;
    client.put(&first.group(0), chain(0..8, bytes)).await.unwrap();
    assert_eq!(client.lookup(request.clone()).await.unwrap().readable_blocks, 0, "shard 1 has nothing");
    let second = client.register_layout(sharded_layout(1, 2)).await.unwrap();
    client.put(&second.group(0), chain(0..5, bytes)).await.unwrap();
    assert_eq!(client.lookup(request.clone()).await.unwrap().readable_blocks, 5);
    let alone = LookupRequest { all_shards: false, ..request };
    assert_eq!(client.lookup(alone).await.unwrap().readable_blocks, 8);
}

/// A hybrid model goes on from a block where its attention run is whole and its recurrent state is there.
#[tokio::test]
async fn hybrid_groups_are_answered_together() {
    let daemon = TestDaemon::start(&[]).await;
    let client = daemon.client().await;
    let group = |kind: BlockKind, window_tokens| LayerGroup {
        kind: kind.into(),
        window_tokens,
        layers: 1,
        planes: 1,
        heads: 1,
        head_bytes: 16,
        order: DimensionOrder::Opaque.into(),
    };
    let mut layout = sharded_layout(0, 1);
    layout.groups =
        vec![group(BlockKind::Attention, 0), group(BlockKind::RecurrentState, 0), group(BlockKind::SlidingWindow, 33)];
    let registered = client.register_layout(layout).await.unwrap();
    let sizes: Vec<u32> = registered.block_bytes.iter().map(|bytes| *bytes as u32).collect();
    client.put(&registered.group(0), chain(0..8, sizes[0])).await.unwrap();
    let put_one = async |at: u32, id: u64| {
        let bytes = replay::content(id, sizes[at as usize] as usize);
        client.put(&registered.group(at), vec![PutBlock::new(replay::sequence_hash(id), bytes)]).await.unwrap();
    };
    put_one(1, 3).await;
    put_one(1, 5).await;
    put_one(2, 2).await;
    put_one(2, 3).await;
    let lookup = async |groups: &[u32]| {
        let request = LookupRequest {
            layout_digest: registered.digest.clone(),
            groups: groups.to_vec(),
            sequence_hashes: hashes(0..8),
            ..LookupRequest::default()
        };
        client.lookup(request).await.unwrap().readable_blocks
    };
    assert_eq!(lookup(&[0]).await, 8);
    assert_eq!(lookup(&[0, 1]).await, 6);
    assert_eq!(lookup(&[]).await, 4, "blocks 2 and 3 of the window, the state after 3");
}

/// Encoder outputs are as long as their image needs, up to what the layout says.
#[tokio::test]
async fn encoder_outputs_vary_in_length() {
    let daemon = TestDaemon::start(&[]).await;
    let client = daemon.client().await;
    let layout = replay::layout("encoder", 1 << 20, BlockKind::EncoderOutput);
    let group = client.register_layout(layout).await.unwrap().group(0);
    let short = replay::content(1, 1234);
    client.put(&group, vec![PutBlock::new("image-1", short.clone())]).await.unwrap();
    assert_eq!(client.get(&group, &[Bytes::from_static(b"image-1")]).await.unwrap()[0].bytes(), Some(&short));
    let long = client.put(&group, vec![PutBlock::new("image-2", vec![0; (1 << 20) + 1])]).await;
    assert!(matches!(long, Err(Error::Invalid(message)) if message.contains("block.length")));
}

#[tokio::test]
async fn a_prefetch_reports_and_can_be_cancelled() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    client.put(&group, chain(0..5, BLOCK_BYTES)).await.unwrap();
    let ticket = client.prefetch(&group, &hashes(0..9), 0).await.unwrap();
    let last = client.watch_prefetch(ticket.clone(), |_| {}).await.unwrap();
    assert_eq!((last.state(), last.blocks, last.ready, last.missing), (PrefetchState::Done, 9, 5, 4));
    assert!(!client.cancel_prefetch(ticket).await.unwrap(), "it had ended");
    let ticket = client.prefetch(&group, &hashes(0..9), 0).await.unwrap();
    assert!(client.cancel_prefetch(ticket.clone()).await.unwrap());
    assert_eq!(client.watch_prefetch(ticket, |_| {}).await.unwrap().state(), PrefetchState::Cancelled);
}

#[tokio::test]
async fn deleted_blocks_are_gone_at_once() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    client.put(&group, chain(0..5, BLOCK_BYTES)).await.unwrap();
    assert_eq!(client.delete(&group, &hashes([1, 2, 77])).await.unwrap().deleted, 2);
    assert_eq!(client.readable_blocks(&group, &hashes(0..5)).await.unwrap(), 1);
    client.put(&group, chain(0..5, BLOCK_BYTES)).await.unwrap();
    assert_eq!(client.readable_blocks(&group, &hashes(0..5)).await.unwrap(), 5);
}

/// One key of two layouts is two blocks: another model's bytes are never found.
#[tokio::test]
async fn layouts_and_namespaces_are_worlds_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kvstore.toml");
    let address = |name: &str| format!("unix:{}", folder.path().join(name).display());
    let listen = |name: &str| format!("[[listen]]\naddress = \"{}\"\nnamespace = \"{name}\"\n", address(name));
    let head = "[host]\nbytes = \"64MiB\"\n[http]\naddress = \"off\"\n[log]\nlevel = \"error\"\n";
    std::fs::write(&path, format!("{head}{}{}", listen("red"), listen("blue"))).unwrap();
    let options = kvstore::serve::StartOptions { file: Some(path), ..Default::default() };
    let running = kvstore::serve::start(options).await.unwrap();
    let red = kvstore_client::Client::connect(&address("red")).await.unwrap();
    let blue = kvstore_client::Client::connect(&address("blue")).await.unwrap();
    let layout = |model: &str| replay::layout(model, BLOCK_BYTES, BlockKind::Attention);
    let group = red.register_layout(layout("a")).await.unwrap().group(0);
    red.put(&group, chain(0..3, BLOCK_BYTES)).await.unwrap();
    let unknown = blue.get(&group, &hashes([0])).await.unwrap_err();
    assert!(matches!(unknown, Error::NotFound(message) if message.contains("RegisterLayout")));
    assert_eq!(blue.register_layout(layout("a")).await.unwrap().group(0), group, "the digest is the same");
    assert_eq!(blue.get(&group, &hashes([0])).await.unwrap(), [GetOutcome::Miss]);
    let other = red.register_layout(layout("b")).await.unwrap().group(0);
    assert_eq!(red.get(&other, &hashes([0])).await.unwrap(), [GetOutcome::Miss]);
    assert!(running.shut_down().await);
}
