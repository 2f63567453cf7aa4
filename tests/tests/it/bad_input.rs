//! Hostile and broken clients: each gets an error that names what is wrong, or a plain miss; no key
//! appears that was not stored whole, and memory stays within its bound.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream;
use http::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kvstore::replay;
use kvstore_client::v1::block_data_client::BlockDataClient;
use kvstore_client::v1::put_request::Part;
use kvstore_client::v1::{self, GetRequest, LookupRequest, PutBlock, PutOpen, PutRequest};
use kvstore_client::{Client, Error, GetOutcome, GroupRef, PutOptions};
use kvstore_tests::{BLOCK_BYTES, TestDaemon, chain, hashes, until};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// A client as any other language's generator would make it, without our framing.
async fn plain_client(daemon: &TestDaemon) -> BlockDataClient<Channel> {
    BlockDataClient::new(channel(daemon).await).max_decoding_message_size(16 << 20)
}

async fn channel(daemon: &TestDaemon) -> Channel {
    let path = daemon.address.strip_prefix("unix:").unwrap().to_owned();
    let connect = tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://kvstore").connect_with_connector(connect).await.unwrap()
}

fn open(group: &GroupRef) -> PutRequest {
    let open = PutOpen { layout_digest: group.layout_digest.clone(), group: group.group, ..PutOpen::default() };
    PutRequest { part: Some(Part::Open(open)) }
}

fn block(id: u64, length: u64, crc32: Option<u32>) -> PutRequest {
    let block = PutBlock { sequence_hash: replay::sequence_hash(id), length, crc32, ..PutBlock::default() };
    PutRequest { part: Some(Part::Block(block)) }
}

fn data(bytes: impl Into<Bytes>) -> PutRequest {
    PutRequest { part: Some(Part::Data(bytes.into())) }
}

async fn put(client: &mut BlockDataClient<Channel>, parts: Vec<PutRequest>) -> Result<v1::PutResponse, tonic::Status> {
    client.put(stream::iter(parts)).await.map(tonic::Response::into_inner)
}

/// The hand-made service speaks gRPC as generated clients expect it.
#[tokio::test]
async fn a_generated_client_puts_and_gets() {
    let daemon = TestDaemon::start(&[]).await;
    let (_, group) = daemon.group(3 << 20).await;
    let mut plain = plain_client(&daemon).await;
    let content = replay::content(1, 3 << 20);
    let mut parts = vec![open(&group), block(1, 3 << 20, None)];
    parts.extend(content.chunks(700_000).map(|chunk| data(chunk.to_vec())));
    let response = put(&mut plain, parts).await.unwrap();
    assert_eq!(response.results[0].status(), v1::PutStatus::Stored);
    let request = GetRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes([1, 2]),
        ..GetRequest::default()
    };
    let mut stream = plain.get(request).await.unwrap().into_inner();
    let (mut bytes, mut statuses) = (Vec::new(), Vec::new());
    while let Some(message) = stream.message().await.unwrap() {
        match message.part.unwrap() {
            v1::get_response::Part::Block(block) => statuses.push(block.status()),
            v1::get_response::Part::Data(data) => bytes.extend_from_slice(&data),
        }
    }
    assert_eq!(statuses, [v1::GetStatus::Hit, v1::GetStatus::Miss]);
    assert_eq!(bytes, content);
}

#[tokio::test]
async fn every_mistake_has_its_code_and_its_name() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    let mut plain = plain_client(&daemon).await;
    let size = u64::from(BLOCK_BYTES);
    let bytes = replay::content(1, BLOCK_BYTES as usize);
    let wrong = bytes.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>();
    let crc = kvstore_transfer::crc32(&bytes);
    let unknown = GroupRef { layout_digest: vec![9; 32].into(), group: 0 };
    let short = GroupRef { layout_digest: vec![9; 31].into(), group: 0 };
    let no_group = GroupRef { group: 7, ..group.clone() };
    let mut long_hash = block(1, size, None);
    if let Some(Part::Block(block)) = &mut long_hash.part {
        block.sequence_hash = vec![1; 33].into();
    }
    let cases: Vec<(Vec<PutRequest>, Code, &str)> = vec![
        (vec![open(&unknown)], Code::NotFound, "RegisterLayout"),
        (vec![open(&short)], Code::InvalidArgument, "layout_digest"),
        (vec![open(&no_group)], Code::InvalidArgument, "group"),
        (vec![], Code::InvalidArgument, "block"),
        (vec![open(&group)], Code::InvalidArgument, "no block"),
        (vec![open(&group), open(&group)], Code::InvalidArgument, "open"),
        (vec![block(1, size, None)], Code::InvalidArgument, "open"),
        (vec![open(&group), data("x")], Code::InvalidArgument, "data"),
        (vec![open(&group), PutRequest { part: None }], Code::InvalidArgument, "part"),
        (vec![open(&group), block(1, size - 1, None)], Code::InvalidArgument, "block.length"),
        (vec![open(&group), block(1, u64::MAX, None)], Code::InvalidArgument, "block.length"),
        (vec![open(&group), long_hash], Code::InvalidArgument, "sequence_hash"),
        (vec![open(&group), block(1, size, None), data(vec![0; 9])], Code::InvalidArgument, "brought 9"),
        (
            vec![open(&group), block(1, size, None), data(vec![0; BLOCK_BYTES as usize + 1])],
            Code::InvalidArgument,
            "more",
        ),
        (vec![open(&group), block(1, size, Some(crc)), data(wrong)], Code::InvalidArgument, "crc32"),
        (vec![open(&group), block(1, size, None), data(vec![0; 5 << 20])], Code::InvalidArgument, "at most"),
    ];
    for (parts, code, named) in cases {
        let error = put(&mut plain, parts).await.unwrap_err();
        assert!(error.code() == code && error.message().contains(named), "{named}: {error:?}");
        assert_eq!(client.get(&group, &hashes([1])).await.unwrap(), [GetOutcome::Miss], "{named}: the key is there");
    }
    let status = daemon.running.daemon.host.status();
    assert_eq!((status.blocks, status.flights), (0, 0));
    let lookup = |hashes: Vec<Bytes>| {
        let layout_digest = group.layout_digest.clone();
        client.lookup(LookupRequest { layout_digest, sequence_hashes: hashes, ..LookupRequest::default() })
    };
    assert!(matches!(lookup(vec![]).await, Err(Error::Invalid(m)) if m.contains("sequence_hashes")));
    assert!(matches!(lookup(vec![Bytes::new()]).await, Err(Error::Invalid(m)) if m.contains("1 to 32")));
    assert!(matches!(lookup(hashes(0..70_000)).await, Err(Error::Invalid(m)) if m.contains("65536")));
    assert!(matches!(client.get(&group, &hashes(0..70_000)).await, Err(Error::Invalid(m)) if m.contains("65536")));
    assert!(matches!(client.pin(&group, &hashes([1]), 0).await, Err(Error::Invalid(m)) if m.contains("ttl_ms")));
    assert!(matches!(client.unpin(Bytes::from_static(b"x")).await, Err(Error::Invalid(m)) if m.contains("pin")));
    let layout = replay::layout("", 1, v1::BlockKind::Attention);
    assert!(matches!(client.register_layout(layout).await, Err(Error::Invalid(m)) if m.contains("model")));
    let huge = replay::layout("m", 1 << 30, v1::BlockKind::Attention);
    assert!(matches!(client.register_layout(huge).await, Err(Error::Invalid(m)) if m.contains("host.bytes")));
}

/// A message that was too large had three codes, one of them Busy, and one that could not be decoded blamed the daemon (INTERNAL).
/// Both are the caller's mistake, whatever the method.
#[tokio::test]
async fn what_is_too_large_or_not_to_be_decoded_has_one_code() {
    let daemon = TestDaemon::start(&[]).await;
    let methods = ["Blocks/RegisterLayout", "Blocks/Lookup", "Blocks/ReleaseTicket", "Blocks/Prefetch"].into_iter();
    let methods = methods.chain(["Blocks/WatchPrefetch", "Blocks/CancelPrefetch", "Blocks/Pin", "Blocks/Unpin"]);
    let methods = methods.chain(["Blocks/Delete", "Blocks/DescribeBlocks", "BlockData/Put", "BlockData/Get"]);
    let methods = methods.chain(["Admin/SetConfig", "Admin/Drain", "Admin/Collect", "Events/Watch"]);
    for method in methods {
        for message in [vec![1; 5 << 20], vec![0xFF; 20]] {
            let prefixed = [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat();
            let body = tonic::body::Body::new(http_body_util::Full::new(Bytes::from(prefixed)));
            let request = Request::post(format!("http://kvstore/kvstore.v1.{method}"))
                .header("content-type", "application/grpc")
                .body(body)
                .unwrap();
            let response = tower::ServiceExt::oneshot(channel(&daemon).await, request).await.unwrap();
            let code = tonic::Status::from_header_map(response.headers()).map(|status| status.code());
            assert_eq!(code, Some(Code::InvalidArgument), "{method}, {} bytes", message.len());
        }
    }
    assert!(!daemon.running.daemon.is_draining());
}

/// The daemon refuses a put at its first message, while the client still sends megabytes: the client learns
/// why, not that "the stream was reset".
#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(1 << 20).await;
    let unknown = GroupRef { layout_digest: vec![9; 32].into(), group: 0 };
    for round in 0..30 {
        let error = client.put(&unknown, chain(0..24, 1 << 20)).await.unwrap_err();
        assert!(matches!(&error, Error::NotFound(m) if m.contains("RegisterLayout")), "round {round}: {error}");
    }
    let options = PutOptions { level: v1::Level::Durable, ..PutOptions::default() };
    let error = client.put_with(&group, chain(0..24, 1 << 20), options).await.unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    assert_eq!(client.put(&group, chain(0..4, 1 << 20)).await.unwrap().len(), 4, "the connection still works");
}

/// A client that announces a block and then says nothing, or dies, leaves nothing behind.
#[tokio::test]
async fn a_client_gone_in_the_middle_of_a_put_leaves_nothing() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    for round in 0..20 {
        let mut plain = plain_client(&daemon).await;
        let first = vec![open(&group), block(round, BLOCK_BYTES.into(), None), data(vec![1; 100])];
        let parts = futures::StreamExt::chain(stream::iter(first), stream::pending());
        let call = tokio::spawn(async move { plain.put(parts).await });
        let deadline = Instant::now() + Duration::from_secs(60);
        while daemon.running.daemon.host.status().flights == 0 {
            assert!(Instant::now() < deadline, "the put never began");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        call.abort();
        while daemon.running.daemon.host.status().flights > 0 {
            assert!(Instant::now() < deadline, "the half-filled block was not dropped");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(client.get(&group, &hashes([round])).await.unwrap(), [GetOutcome::Miss]);
    }
    client.put(&group, chain(0..20, BLOCK_BYTES)).await.unwrap();
    assert_eq!(client.readable_blocks(&group, &hashes(0..20)).await.unwrap(), 20);
}

/// A put that never ends is cut at its deadline.
#[tokio::test]
async fn an_endless_stream_ends_by_its_deadline() {
    let daemon = TestDaemon::start(&["calls.deadline=2s"]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    let mut plain = plain_client(&daemon).await;
    let opened = open(&group);
    let endless = futures::StreamExt::chain(
        stream::iter([opened]),
        stream::unfold(0u64, |id| async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let part =
                if id % 2 == 0 { block(id / 2, BLOCK_BYTES.into(), None) } else { data(vec![7; BLOCK_BYTES as usize]) };
            Some((part, id + 1))
        }),
    );
    let started = Instant::now();
    let error = plain.put(endless).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert!(client.readable_blocks(&group, &hashes([0])).await.unwrap() == 1, "what was whole by then stays");
    until(&client, |status| status.host.as_ref().unwrap().flights == 0).await;
}

/// A reader that does not read keeps nothing from being evicted for longer than its deadline.
#[tokio::test]
async fn a_slow_reader_gives_its_leases_back_at_the_deadline() {
    let daemon = TestDaemon::start(&["calls.deadline=400ms", "host.bytes=32MiB"]).await;
    let (client, group) = daemon.group(1 << 20).await;
    client.put(&group, chain(0..24, 1 << 20)).await.unwrap();
    let path = daemon.address.strip_prefix("unix:").unwrap();
    let io = TokioIo::new(tokio::net::UnixStream::connect(path).await.unwrap());
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    let request = GetRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes(0..24),
        ..GetRequest::default()
    };
    let body = tonic::body::Body::new(http_body_util::Full::new(kvstore_proto::data_stream::message(&request)));
    let request = Request::post("http://kvstore/kvstore.v1.BlockData/Get")
        .header("content-type", "application/grpc")
        .body(body)
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    // Not read. New blocks find room again once the deadline passed.
    let deadline = Instant::now() + Duration::from_secs(60);
    let put = async |from: u64| client.put(&group, chain(from..from + 8, 1 << 20)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    let mut stored = 0;
    let mut from = 100;
    while stored < 24 && Instant::now() < deadline {
        stored += put(from).await.iter().filter(|result| result.status() == v1::PutStatus::Stored).count();
        from += 8;
    }
    assert!(stored >= 24, "only {stored} blocks found room");
    assert!(daemon.mapped() <= 32 << 20);
    drop(response);
}

/// Junk on the socket neither harms the daemon nor its other clients.
#[tokio::test]
async fn junk_on_the_socket_is_survived() {
    use tokio::io::AsyncWriteExt;
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    client.put(&group, chain(0..3, BLOCK_BYTES)).await.unwrap();
    let path = daemon.address.strip_prefix("unix:").unwrap();
    for junk in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xFF; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xFF\xFF\xFF\xFF"] {
        let mut socket = tokio::net::UnixStream::connect(path).await.unwrap();
        let _ = socket.write_all(junk).await;
    }
    assert_eq!(client.readable_blocks(&group, &hashes(0..3)).await.unwrap(), 3);
}

/// A call that is given up at any point leaves whole blocks or none.
#[tokio::test]
async fn tiny_deadlines_end_in_time() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(1 << 20).await;
    let hasty = client.with_deadline(Duration::from_millis(1));
    for id in 0..20 {
        let started = Instant::now();
        let outcome = hasty.put_with(&group, chain(id..id + 8, 1 << 20), PutOptions::default()).await;
        assert!(started.elapsed() < Duration::from_secs(20));
        if let Err(error) = outcome {
            assert!(matches!(error, Error::Deadline(_)), "{error}");
        }
    }
    let outcomes = Client::get(&client, &group, &hashes(0..28)).await.unwrap();
    for (id, outcome) in outcomes.iter().enumerate() {
        if let GetOutcome::Hit(bytes) = outcome {
            assert_eq!(replay::wrong_bytes(id as u64, bytes), 0);
        }
    }
}

/// Calls by the thousand, many connections, the largest messages: memory stays within the tier's bound and
/// what the connections may buffer.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_stays_flat_whatever_clients_send() {
    let daemon = TestDaemon::start(&["host.bytes=16MiB"]).await;
    let (_, group) = daemon.group(256 << 10).await;
    let flood = async |rounds: u64| {
        let mut tasks = Vec::new();
        for task in 0..24u64 {
            let client = daemon.client().await;
            let group = group.clone();
            tasks.push(tokio::spawn(async move {
                for round in 0..rounds {
                    let from = task << 32 | round << 8;
                    client.put(&group, chain(from..from + 6, 256 << 10)).await.unwrap();
                    let _ = client.get(&group, &hashes(from..from + 6)).await;
                    let _ = client.get(&group, &hashes(from..from + 5000)).await;
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    };
    // Until the allocator has what these calls need at most: those of 5,000 blocks take some, and connections that end while others
    // begin take it twice.
    flood(12).await;
    flood(12).await;
    let before = resident_bytes();
    flood(30).await;
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more after three times as many calls");
    assert!(daemon.mapped() <= 16 << 20);
    assert_eq!(daemon.running.daemon.host.status().flights, 0);
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * rustix::param::page_size() as u64
}

/// What load balancers and people with grpcurl look at first.
#[tokio::test]
async fn health_and_reflection_answer() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let daemon = TestDaemon::start(&[]).await;
    let channel = channel(&daemon).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let mut status = async |service: &str| {
        let request = tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
        health.check(request).await.map(|response| response.into_inner().status())
    };
    for service in ["", "kvstore.v1.Blocks", "kvstore.v1.BlockData", "kvstore.v1.Admin"] {
        assert_eq!(status(service).await.unwrap(), ServingStatus::Serving, "{service:?}");
    }
    let mut reflection = tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(channel);
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = reflection.server_reflection_info(stream::iter([request])).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services");
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["kvstore.v1.Blocks", "kvstore.v1.BlockData", "kvstore.v1.Admin", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|found| found == name), "{name} is not among {names:?}");
    }
    daemon.client().await.drain(100).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    for service in ["kvstore.v1.Blocks", "kvstore.v1.BlockData"] {
        while status(service).await.unwrap() != ServingStatus::NotServing {
            assert!(Instant::now() < deadline, "{service} is said to serve");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What a client may leave behind is bounded too: pins of the same blocks over and over, prefetches that
/// nobody watches, layouts of every size.
#[tokio::test]
async fn what_clients_leave_behind_is_bounded() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(64).await;
    let names = hashes(0..4000);
    client.put(&group, chain(0..4000, 64)).await.unwrap();
    let mut pins = 0;
    let error = loop {
        match client.pin(&group, &names, 60_000).await {
            Ok(_) => pins += 1,
            Err(error) => break error,
        }
        assert!(pins < 1000, "pins without end");
    };
    assert!(matches!(&error, Error::Busy(m) if m.contains("1048576")), "{error}");
    let mut prefetches = 0;
    while client.prefetch(&group, &names, 0).await.is_ok() {
        prefetches += 1;
        assert!(prefetches < 1000, "prefetches without end");
    }
    let mut sizes = 0u32;
    let error = loop {
        let layout = replay::layout("sizes", 4096 * (sizes + 1), v1::BlockKind::Attention);
        match client.register_layout(layout).await {
            Ok(_) => sizes += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, Error::Unsupported(m) if m.contains("sizes")), "{error}");
    assert!(sizes >= 250);
}
