//! Peers that say nothing, or that read nothing of what they asked for: they cost themselves alone.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kvstore::caps::{CONNECTIONS_MAX, DATA_CALLS_MAX, LEASED_BLOCKS_MAX};
use kvstore::serve::{StartOptions, start};
use kvstore_client::v1::{GetRequest, Level};
use kvstore_client::{Client, GetOutcome, GroupRef, Plane, PutOptions};
use kvstore_proto::zmtp::Connection;
use kvstore_tests::fault_proxy::{Fault, FaultProxy, Meant};
use kvstore_tests::s3::{self, S3Server};
use kvstore_tests::{BLOCK_BYTES, TestDaemon, chain, hashes, until};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// Longer than anything takes here that ends at all.
const GUARD: Duration = Duration::from_secs(60);

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

async fn connect(address: &str) -> Box<dyn Stream> {
    match address.strip_prefix("unix:") {
        Some(path) => Box::new(UnixStream::connect(path).await.unwrap()),
        None => Box::new(TcpStream::connect(address.strip_prefix("http://").unwrap()).await.unwrap()),
    }
}

/// How many of these connections the daemon has closed. Each is at its end, or has nothing to read.
async fn closed(silent: &mut [Box<dyn Stream>]) -> usize {
    let mut closed = 0;
    for stream in silent {
        let mut bytes = [0; 256];
        let read = async {
            loop {
                if matches!(stream.read(&mut bytes).await, Ok(0) | Err(_)) {
                    return;
                }
            }
        };
        closed += usize::from(tokio::time::timeout(Duration::from_millis(1), read).await.is_ok());
    }
    closed
}

/// 256 sockets that said nothing held all places of a listener, for ever. The same with a preface and nothing after it, which ended
/// only with the keepalive.
#[tokio::test(flavor = "multi_thread")]
async fn silent_peers_lock_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", folder.path().join("test.sock").display());
    let settings = ["host.bytes=64MiB", "http.address=off", "log.level=error", "nvme.paths=off"];
    let settings = settings.iter().map(|setting| setting.to_string()).collect();
    let listen = vec![socket, "127.0.0.1:0".into()];
    let running = start(StartOptions { file: None, settings, listen }).await.unwrap();
    for address in &running.addresses {
        for first_words in
            [&b""[..], b"PRI * HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"]
        {
            let speaker = Client::connect_over(address, Plane::Grpc).await.unwrap();
            speaker.status().await.unwrap();
            let mut silent = Vec::new();
            for _ in 0..600 {
                let mut stream = connect(address).await;
                // One that was closed meanwhile cannot be written to.
                let _ = stream.write_all(first_words).await;
                silent.push(stream);
            }
            let newcomer = async { Client::connect_over(address, Plane::Grpc).await.unwrap().status().await };
            let served = tokio::time::timeout(GUARD, newcomer).await;
            assert!(matches!(served, Ok(Ok(_))), "{address}, after {first_words:?}: {served:?}");
            assert!(closed(&mut silent).await >= 300, "{address}, after {first_words:?}");
            speaker.status().await.unwrap();
        }
    }
    running.shut_down().await;
}

/// The HTTP listener took connections without end: 10,000 that said nothing were 10,000 descriptors.
#[tokio::test(flavor = "multi_thread")]
async fn the_http_listener_is_bounded_and_answers_newcomers() {
    let daemon = TestDaemon::start(&["http.address=127.0.0.1:0"]).await;
    let address = format!("http://{}", daemon.running.http.unwrap());
    let mut silent = Vec::new();
    for at in 0..400 {
        let mut stream = connect(&address).await;
        let words: &[u8] = if at % 2 == 0 { b"" } else { b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" };
        let _ = stream.write_all(words).await;
        silent.push(stream);
    }
    let newcomer = async {
        let mut stream = connect(&address).await;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = tokio::time::timeout(GUARD, newcomer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
    assert!(closed(&mut silent).await >= 300);
}

/// Followers of the events that say nothing gave their places up after ten seconds; on the replay socket they kept them, once greeted.
#[tokio::test(flavor = "multi_thread")]
async fn silent_followers_lock_nobody_out() {
    let daemon = TestDaemon::start(&["events.publish=tcp://127.0.0.1:0", "events.replay=tcp://127.0.0.1:0"]).await;
    let endpoints = daemon.running.publisher.as_ref().unwrap().endpoints.clone();
    for (endpoint, kind) in endpoints.iter().zip(["SUB", "DEALER"]) {
        let connect = async || TcpStream::connect(endpoint.strip_prefix("tcp://").unwrap()).await.unwrap();
        let mut silent = Vec::new();
        let mut greeted = Vec::new();
        for at in 0..160 {
            match at % 2 {
                0 => silent.push(connect().await),
                _ => greeted.extend(Connection::handshake(connect().await, kind, 1 << 20).await.ok()),
            }
        }
        let newcomer = Connection::handshake(connect().await, kind, 1 << 20);
        let mut newcomer = tokio::time::timeout(GUARD, newcomer).await.unwrap().unwrap();
        if kind == "DEALER" {
            newcomer.send(&[b"", &0u64.to_be_bytes()]).await.unwrap();
            let end = tokio::time::timeout(GUARD, newcomer.receive()).await.unwrap().unwrap().unwrap();
            assert_eq!(end[1].as_ref(), (-1i64).to_be_bytes());
        }
    }
}

/// So many gets on a connection of their own, whose answers have begun.
async fn gets(
    daemon: &TestDaemon,
    group: &GroupRef,
    count: usize,
    hashes: Vec<Bytes>,
) -> (SendRequest<Full<Bytes>>, Vec<Response<Incoming>>) {
    let path = daemon.address.strip_prefix("unix:").unwrap();
    let io = TokioIo::new(UnixStream::connect(path).await.unwrap());
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(65_535)
        .handshake(io)
        .await
        .unwrap();
    tokio::spawn(connection);
    let layout_digest = group.layout_digest.clone();
    let request = GetRequest { layout_digest, sequence_hashes: hashes, ..GetRequest::default() };
    let message = kvstore_proto::data_stream::message(&request);
    let mut answers = Vec::new();
    for _ in 0..count {
        let request = Request::post("http://kvstore/kvstore.v1.BlockData/Get")
            .header("content-type", "application/grpc")
            .header("grpc-timeout", "600S")
            .body(Full::new(message.clone()))
            .unwrap();
        sender.ready().await.unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert!(response.headers().get("grpc-status").is_none(), "{:?}", response.headers());
        answers.push(response);
    }
    (sender, answers)
}

/// 64 gets whose readers read nothing held all leases that gets may have: every other get of every namespace was answered Busy until
/// their deadline, ten minutes where they asked for that.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_read_nothing_cost_themselves_alone() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    for settings in [vec!["nvme.paths=off"], vec![path.as_str(), "nvme.bytes=256MiB", "host.bytes=16MiB"]] {
        let daemon = TestDaemon::start(&settings).await;
        let (client, group) = daemon.group(16 << 10).await;
        for at in (0..2048).step_by(256) {
            client.put(&group, chain(at..at + 256, 16 << 10)).await.unwrap();
        }
        let mut unread = Vec::new();
        for _ in 0..16 {
            unread.push(gets(&daemon, &group, 8, hashes(0..2048)).await);
        }
        let client = client.with_deadline(GUARD);
        let outcomes = client.get(&group, &hashes(1500..2048)).await.unwrap();
        let hits = outcomes.iter().filter(|outcome| matches!(outcome, GetOutcome::Hit(_))).count();
        assert_eq!(hits, 548, "{settings:?}");
        assert!(daemon.running.daemon.leasable.available_permits() > 0);
        drop(unread);
    }
}

/// Some thirty gets whose readers read nothing had nearly all the leases that gets and promotions share, and a promotion that wanted more
/// than was left was Busy until they ended.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_read_nothing_leave_the_local_plane_its_part() {
    let bucket = tempfile::tempdir().unwrap();
    let bucket = format!("object.url=file://{}", bucket.path().display());
    let first = TestDaemon::start(&[&bucket]).await;
    let (client, group) = first.group(4096).await;
    until(&client, |status| status.object.as_ref().unwrap().state == "SERVING").await;
    let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
    for ids in [0..2048, 10_000..10_064] {
        let results = client.put_with(&group, chain(ids, 4096), options).await.unwrap();
        assert!(results.iter().all(|result| result.level() == Level::Durable));
    }
    drop(first);
    let daemon = TestDaemon::start(&[&bucket, "host.bytes=256MiB"]).await;
    let (client, group) = daemon.group_over(Plane::Local, 4096).await;
    until(&client, |status| status.object.as_ref().unwrap().state == "SERVING").await;
    let mut unread = Vec::new();
    for _ in 0..40 {
        unread.push(gets(&daemon, &group, 1, hashes(0..2048)).await);
    }
    // Each has taken its part.
    let leasable = &daemon.running.daemon.leasable;
    let taken = async {
        while leasable.available_permits() > 1100 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(GUARD, taken).await.unwrap();
    // As many as one promotion asks for; the first of them are in the bucket.
    let mut windows = client.lease_windows(&group, &hashes(10_000..10_256), 64).await.unwrap();
    let leases = windows.next().await.unwrap().expect("blocks that are in the bucket");
    assert_eq!(leases.len(), 64);
    assert!(windows.next().await.unwrap().is_none());
    drop(unread);
}

/// A get took its leases before it searched the bucket, which takes seconds, and went on when its caller had gone: whoever began gets
/// and gave them up had a task for each, and the leases of everyone.
#[tokio::test(flavor = "multi_thread")]
async fn gets_that_are_given_up_while_they_search_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let proxy = FaultProxy::start(server.address).await;
    let settings = s3::settings(proxy.address, "p");
    let daemon = TestDaemon::start(&settings.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (client, group) = daemon.group(4096).await;
    until(&client, |status| status.object.as_ref().unwrap().state == "SERVING").await;
    proxy.always(Some((Meant::Any, Fault::Delay(GUARD))));
    // Somebody who waits for the same search, and is answered when it ends.
    let mut waits = tokio::spawn({
        let (client, group) = (client.with_deadline(GUARD), group.clone());
        async move { client.get(&group, &hashes(0..4096)).await }
    });
    let (calls, leasable) = (&daemon.running.daemon.data_calls, &daemon.running.daemon.leasable);
    while proxy.done() == 0 || calls.free() == DATA_CALLS_MAX {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (_connection, answers) = gets(&daemon, &group, 64, hashes(0..4096)).await;
    assert_eq!(calls.free(), DATA_CALLS_MAX - 65);
    drop(answers);
    let over = async {
        while calls.free() < DATA_CALLS_MAX - 1 || leasable.available_permits() < LEASED_BLOCKS_MAX {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        answered = &mut waits => panic!("the gets that were given up searched to the end: {answered:?}"),
        () = over => {}
    }
    waits.abort();
}

/// 256 connections that each had made one call, and made none any more, held all places of the listener for ever: an operator's command
/// waited without end.
#[tokio::test(flavor = "multi_thread")]
async fn peers_that_asked_once_lock_nobody_out() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(16 << 10).await;
    client.put(&group, chain(0..64, 16 << 10)).await.unwrap();
    // Its call is under way all the time.
    let (connection, mut answers) = gets(&daemon, &group, 1, hashes(0..64)).await;
    let mut idle = Vec::new();
    for at in 0..CONNECTIONS_MAX + 50 {
        let ask = async {
            let peer = daemon.client().await;
            peer.status().await.map(|_| peer)
        };
        let asked = tokio::time::timeout(GUARD, ask).await.unwrap_or_else(|_| panic!("after {at} others"));
        idle.push(asked.unwrap());
    }
    let body = answers.pop().unwrap().into_body().collect().await.expect("nobody takes the place of a call");
    assert!(body.to_bytes().len() > 64 * (16 << 10));
    drop((connection, idle));
}

/// A few bytes of one get in a thousand calls: each answers what is there.
#[tokio::test]
async fn a_get_of_many_blocks_answers_each() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK_BYTES).await;
    client.put(&group, chain(0..1000, BLOCK_BYTES)).await.unwrap();
    client.delete(&group, &hashes([0, 15, 16, 17, 500, 999])).await.unwrap();
    let outcomes = client.get(&group, &hashes(0..1000)).await.unwrap();
    for (id, outcome) in outcomes.iter().enumerate() {
        let is_gone = [0, 15, 16, 17, 500, 999].contains(&id);
        assert_eq!(matches!(outcome, GetOutcome::Miss), is_gone, "block {id}");
    }
    assert_eq!(outcomes.len(), 1000);
}

/// Peers of the local plane that said nothing kept newcomers out for five seconds each.
#[tokio::test(flavor = "multi_thread")]
async fn silent_peers_of_the_local_plane_lock_nobody_out() {
    let daemon = TestDaemon::start(&[]).await;
    let path = kvstore::local::plane_path(std::path::Path::new(daemon.address.strip_prefix("unix:").unwrap()));
    let flood = tokio::task::spawn_blocking(move || {
        let address = SocketAddrUnix::new(&path).unwrap();
        let connect = |_| {
            let kind = SocketType::SEQPACKET;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
            rustix::net::connect(&socket, &address).unwrap();
            socket
        };
        (0..kvstore::caps::LOCAL_PEERS_MAX + 200).map(connect).collect::<Vec<_>>()
    });
    let silent = flood.await.unwrap();
    let client = daemon.client_over(Plane::Local).await;
    client.status().await.unwrap();
    assert!(client.is_local(), "{} silent peers kept it out", silent.len());
}
