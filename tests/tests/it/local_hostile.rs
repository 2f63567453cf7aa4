//! Hostile and unlucky clients of the local plane: what they write is believed nowhere, what they hold ends with their
//! process, and nobody else notices.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_client::{Client, GroupRef, Plane};
use kvstore_plane::{
    AttachmentView, CLIENT_PAGE_BYTES, Command, Completion, DAEMON_PAGE_BYTES, FromClient, FromDaemon, Push,
    RecordHead, RingReader, RingWriter, SequenceHash, StageBlock, Welcome, must_kick,
};
use kvstore_tests::{BLOCK_BYTES, TestDaemon, chain, hashes};
use proptest::prelude::*;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};

/// A client that keeps to no rules: raw access to everything that the daemon passes.
struct Raw {
    socket: OwnedFd,
    welcome: Welcome,
    descriptors: Vec<OwnedFd>,
    client: &'static [AtomicU64],
    daemon: &'static [AtomicU64],
    writer: RingWriter,
    reader: RingReader,
}

fn connect(daemon: &TestDaemon) -> OwnedFd {
    let path = format!("{}.plane", daemon.address.strip_prefix("unix:").unwrap());
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

fn send(socket: &OwnedFd, bytes: &[u8]) -> bool {
    rustix::net::send(socket, bytes, SendFlags::NOSIGNAL).is_ok()
}

fn receive(socket: &OwnedFd) -> Option<(FromDaemon, Vec<OwnedFd>)> {
    let mut buffer = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::empty()).ok()?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    let datagram = FromDaemon::decode(&buffer[..message.bytes]).ok()?;
    Some((datagram, descriptors))
}

fn map(fd: &OwnedFd, bytes: usize, write: bool) -> Option<&'static [AtomicU64]> {
    let mut protection = rustix::mm::ProtFlags::READ;
    if write {
        protection |= rustix::mm::ProtFlags::WRITE;
    }
    let flags = rustix::mm::MapFlags::SHARED;
    // SAFETY: a fresh mapping, which this test process never unmaps.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) }.ok()?;
    // SAFETY: as above; atomics.
    Some(unsafe { std::slice::from_raw_parts(base.cast(), bytes / 8) })
}

impl Raw {
    fn attach(daemon: &TestDaemon) -> Self {
        let socket = connect(daemon);
        send(&socket, &FromClient::Hello { version_min: 1, version_max: 1, capabilities: u64::MAX }.encode());
        let (FromDaemon::Welcome(welcome), descriptors) = receive(&socket).unwrap() else { panic!("no welcome") };
        let client = map(&descriptors[0], CLIENT_PAGE_BYTES, true).unwrap();
        let daemon = map(&descriptors[1], DAEMON_PAGE_BYTES, false).unwrap();
        let (writer, reader) = (RingWriter::new(), RingReader::new());
        Self { socket, welcome, descriptors, client, daemon, writer, reader }
    }

    fn view(&self) -> AttachmentView<'static> {
        AttachmentView::new(self.client, self.daemon).unwrap()
    }

    fn kick(&self) {
        rustix::io::write(&self.descriptors[3], &1u64.to_ne_bytes()).unwrap();
    }

    fn push(&mut self, kind: u16, tag: u64, payload: &[u8]) -> bool {
        let pushed = self.writer.push(&self.view().submissions(), RecordHead { kind, tag }, payload);
        if must_kick(self.view().daemon_sleeps()) {
            self.kick();
        }
        pushed == Ok(Push::Written)
    }

    fn submit(&mut self, tag: u64, command: &Command) -> bool {
        let (kind, payload) = command.encode();
        self.push(kind, tag, &payload)
    }

    fn next(&mut self) -> (u64, Completion) {
        let mut payload = Vec::new();
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(head) = self.reader.pop(&self.view().completions(), &mut payload).unwrap() {
                return (head.tag, Completion::decode(head.kind, &payload).unwrap());
            }
            assert!(Instant::now() < until, "no completion");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn failure(&mut self) -> (u64, String) {
        match self.next() {
            (tag, Completion::Failed { message, .. }) => (tag, message),
            other => panic!("{other:?} instead of an error"),
        }
    }
}

/// A well-behaved client that must notice nothing.
struct Witness {
    client: Client,
    group: GroupRef,
    round: u64,
}

impl Witness {
    async fn new(daemon: &TestDaemon) -> Self {
        let (client, group) = daemon.group_over(Plane::Local, BLOCK_BYTES).await;
        Self { client, group, round: 0 }
    }

    async fn checks(&mut self) {
        self.round += 1;
        let ids = self.round * 1000..self.round * 1000 + 5;
        self.client.put(&self.group, chain(ids.clone(), BLOCK_BYTES)).await.unwrap();
        for (id, got) in ids.clone().zip(self.client.get(&self.group, &hashes(ids)).await.unwrap()) {
            assert!(got.bytes().unwrap() == &replay::content(id, BLOCK_BYTES as usize));
        }
    }
}

async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn stage(hash: u8, length: u32) -> Command {
    let hash = SequenceHash::new(&[hash; 20]).unwrap();
    let blocks = vec![StageBlock { hash, parent: None, length, tail: true }];
    Command::Stage { layout: 0, group: 0, local: false, upload: false, deadline_ms: 20_000, blocks }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_passed_cannot_be_written_resized_or_reopened_for_writing() {
    let daemon = TestDaemon::start(&[]).await;
    let mut witness = Witness::new(&daemon).await;
    witness.checks().await;
    let raw = Raw::attach(&daemon);
    let (FromDaemon::SlabCame { .. }, slab) = receive(&raw.socket).unwrap() else { panic!("no slab") };
    let [client_page, daemon_page, table, _] = &raw.descriptors[..] else { panic!() };
    for (name, fd) in [("daemon's page", daemon_page), ("key table", table), ("slab", &slab[0])] {
        assert!(map(fd, 4096, true).is_none(), "{name} was mapped for writing");
        assert!(rustix::io::write(fd, b"x").is_err(), "{name} was written to");
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
        if let Ok(again) = std::fs::OpenOptions::new().read(true).write(true).open(path) {
            let again = OwnedFd::from(again);
            assert!(map(&again, 4096, true).is_none(), "{name} was reopened and mapped for writing");
            assert!(rustix::io::write(&again, b"x").is_err(), "{name} was reopened and written to");
        }
    }
    for (name, fd) in [("daemon's page", daemon_page), ("key table", table), ("slab", &slab[0]), ("page", client_page)]
    {
        for size in [0, 1 << 30] {
            assert!(rustix::fs::ftruncate(fd, size).is_err(), "{name} was resized to {size}");
        }
        let seals = rustix::fs::fcntl_get_seals(fd).unwrap();
        assert!(seals.contains(rustix::fs::SealFlags::SEAL), "{name} takes more seals");
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        if name != "page" {
            assert!(rustix::fs::fallocate(fd, punch, 0, 4096).is_err(), "a hole was punched into the {name}");
        }
    }
    witness.checks().await;
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story, from its start to its end")]
async fn wild_commands_are_refused_and_harm_nobody() {
    let daemon = TestDaemon::start(&[]).await;
    let mut witness = Witness::new(&daemon).await;
    witness.checks().await;
    let mut raw = Raw::attach(&daemon);
    // No staging memory yet.
    assert!(raw.submit(1, &stage(1, BLOCK_BYTES)));
    assert_eq!(raw.next(), (1, Completion::Staged));
    raw.submit(1, &Command::Copy { offset: 0, bytes: 64, last: false, crc32: None });
    assert_eq!(raw.next(), (1, Completion::Copied));
    assert!(raw.failure().1.contains("no staging memory"));
    send(&raw.socket, &FromClient::WantsStaging.encode());
    let bytes = loop {
        if let (FromDaemon::Staging { bytes }, _) = receive(&raw.socket).unwrap() {
            break bytes;
        }
    };
    let wild = [
        (u64::MAX, 64, false),
        (bytes, 64, false),
        (bytes - 63, 64, false),
        (4, 64, false),
        (0, 63, false),
        (0, 0, true),
        (0, BLOCK_BYTES + 1, true),
        (0, u32::MAX, true),
        (0, 64, true),
    ];
    for (at, (offset, bytes, last)) in wild.into_iter().enumerate() {
        let tag = 10 + at as u64;
        assert!(raw.submit(tag, &stage(2, BLOCK_BYTES)));
        assert_eq!(raw.next(), (tag, Completion::Staged));
        assert!(raw.submit(tag, &Command::Copy { offset, bytes, last, crc32: None }));
        assert_eq!(raw.next(), (tag, Completion::Copied));
        assert_eq!(raw.failure().0, tag, "{offset} {bytes} {last}");
    }
    // Other wrong things: an unknown layout, group, length, tag, checksum; a tag that is in use; bytes too many.
    let wrong = [
        Command::Stage {
            layout: 99,
            group: 0,
            local: false,
            upload: false,
            deadline_ms: 0,
            blocks: stage_blocks(3, BLOCK_BYTES),
        },
        Command::Stage {
            layout: 0,
            group: 7,
            local: false,
            upload: false,
            deadline_ms: 0,
            blocks: stage_blocks(3, BLOCK_BYTES),
        },
        stage(3, BLOCK_BYTES - 1),
        stage(3, u32::MAX),
        Command::Promote { layout: 5, group: 0, deadline_ms: 0, ticket: 0, hashes: vec![hash(1)] },
        Command::Promote { layout: 0, group: 0, deadline_ms: 100, ticket: 77, hashes: vec![hash(1)] },
        Command::Call { verb: 999, deadline_ms: 0, request: vec![] },
        Command::Call { verb: 2, deadline_ms: 0, request: vec![255; 100] },
    ];
    for (at, command) in wrong.into_iter().enumerate() {
        let tag = 100 + at as u64;
        assert!(raw.submit(tag, &command));
        assert_eq!(raw.failure().0, tag, "{command:?}");
    }
    raw.submit(200, &stage(4, BLOCK_BYTES));
    assert_eq!(raw.next(), (200, Completion::Staged));
    raw.submit(200, &stage(5, BLOCK_BYTES));
    assert!(raw.failure().1.contains("already staged under this tag"));
    raw.submit(200, &Command::Copy { offset: 0, bytes: BLOCK_BYTES, last: true, crc32: Some(1) });
    assert_eq!(raw.next(), (200, Completion::Copied));
    assert!(raw.failure().1.contains("not stored"));
    for (tag, command) in [(300, Command::Abandon), (301, Command::Release)] {
        assert!(raw.submit(tag, &command));
    }
    raw.submit(302, &Command::Copy { offset: 0, bytes: 64, last: true, crc32: None });
    assert_eq!(raw.next(), (302, Completion::Copied), "bytes of no block go nowhere");
    let host = &daemon.running.daemon.host;
    eventually("no slot is kept", || host.status().flights == 0).await;
    for id in 1..6u8 {
        assert_eq!(witness.client.readable_blocks(&witness.group, &[vec![id; 20].into()]).await.unwrap(), 0);
    }
    witness.checks().await;
}

fn hash(id: u8) -> SequenceHash {
    SequenceHash::new(&[id; 20]).unwrap()
}

fn stage_blocks(id: u8, length: u32) -> Vec<StageBlock> {
    vec![StageBlock { hash: hash(id), parent: None, length, tail: false }]
}

/// Positions and records that no client writes cut the client off, and nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_the_rings_cuts_off_its_writer_alone() {
    let daemon = TestDaemon::start(&[]).await;
    let mut witness = Witness::new(&daemon).await;
    for (written, word) in [(u64::MAX, 0), (1 << 40, 0), (20_000, 0), (16, u64::MAX), (1, 0), (5, 9 << 32 | 3 << 60)] {
        let raw = Raw::attach(&daemon);
        let ring = raw.view().submissions();
        ring.words[0].store(word, Ordering::Relaxed);
        ring.written.store(written, Ordering::Release);
        raw.kick();
        witness.checks().await;
        // The daemon hung up.
        let until = Instant::now() + Duration::from_secs(60);
        while send(&raw.socket, &FromClient::Unmapped { serial: 9 }.encode()) {
            assert!(Instant::now() < until, "{written} {word} went unnoticed");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    // The same for the completion ring's reader.
    let mut raw = Raw::attach(&daemon);
    raw.view().completions().read.store(u64::MAX / 2, Ordering::Release);
    raw.submit(1, &stage(1, BLOCK_BYTES));
    witness.checks().await;
}

/// A lease page full of garbage keeps slots, never for others' reads, and never crashes the scan.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_page_full_of_garbage_keeps_what_it_names_and_no_more() {
    let daemon = TestDaemon::start(&["host.bytes=8MiB"]).await;
    let mut witness = Witness::new(&daemon).await;
    let raw = Raw::attach(&daemon);
    let mut random = 9u64;
    for word in raw.client.iter() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.store(random | 1 << 63, Ordering::Relaxed);
    }
    for _ in 0..40 {
        witness.checks().await;
    }
    // It names every slot that there can be: nothing may be evicted, puts say Busy, reads go on.
    for (at, word) in raw.client[512..512 + 8192].iter().enumerate() {
        word.store((1 << 63) | ((at as u64 / 2048) << 28) | (at as u64 % 2048), Ordering::Relaxed);
    }
    raw.client[0].store(u64::MAX, Ordering::Release);
    let mut busy = false;
    for round in 0..60u64 {
        let stored = witness.client.put(&witness.group, chain(90_000 + round * 40..90_040 + round * 40, BLOCK_BYTES));
        busy |= stored.await.unwrap().iter().any(|result| result.status() == kvstore_client::v1::PutStatus::Busy);
    }
    assert!(busy, "leased slots were given away");
    drop(raw.socket);
    // Its process lives: what it names stays, until it says goodbye or ends.
    let leases = daemon.running.daemon.host.local_leases().0;
    assert!(leases >= 8192, "{leases}");
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_and_clients_that_never_read_stay_bounded() {
    let daemon = TestDaemon::start(&[]).await;
    let mut witness = Witness::new(&daemon).await;
    let mut raws: Vec<Raw> = (0..4).map(|_| Raw::attach(&daemon)).collect();
    let before = resident_bytes();
    let until = Instant::now() + Duration::from_secs(2);
    let mut sent = 0u64;
    while Instant::now() < until {
        for raw in &mut raws {
            for _ in 0..50 {
                // Answers that are never read.
                sent += u64::from(raw.submit(sent, &Command::Call { verb: 999, deadline_ms: 0, request: vec![] }));
                sent += u64::from(raw.submit(sent, &stage((sent % 250) as u8, BLOCK_BYTES)));
            }
            send(&raw.socket, &FromClient::WantsStaging.encode());
        }
        witness.checks().await;
    }
    let grown = resident_bytes().saturating_sub(before);
    // The tier's 64 MiB count twice here, once for each of the daemon's and the client's mappings.
    assert!(grown < 160 << 20, "{grown} bytes for {sent} commands of clients that never read");
    assert!(sent > 1000);
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// What was promoted stayed leased for a second, and counted nowhere: a client that promoted as fast as it could, and never
/// released, had the daemon keep millions of leases.
#[tokio::test(flavor = "multi_thread")]
async fn promotions_that_are_never_released_are_bounded() {
    let daemon = TestDaemon::start(&[]).await;
    let mut witness = Witness::new(&daemon).await;
    let mut raw = Raw::attach(&daemon);
    let block = kvstore_client::PutBlock::new(vec![7; 20], vec![7; BLOCK_BYTES as usize]);
    witness.client.put(&witness.group, vec![block]).await.unwrap();
    let promote = Command::Promote { layout: 0, group: 0, deadline_ms: 0, ticket: 0, hashes: vec![hash(7); 256] };
    let (mut promoted, mut busy) = (0, 0);
    for tag in 0..150 {
        assert!(raw.submit(tag, &promote));
        match raw.next().1 {
            // All that were asked for, and fewer once less is left.
            Completion::Promoted { ready: ready @ 32..=256, .. } => promoted += ready,
            Completion::Failed { message, .. } if message.contains("try again later") => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(promoted <= 2 * 4 * 4096 && busy > 0, "{promoted} promoted blocks are kept at once");
    witness.checks().await;
    let leasable = &daemon.running.daemon.leasable;
    eventually("leases end by themselves", || leasable.available_permits() == 4 * 4096).await;
    assert!(raw.submit(999, &promote));
    assert_eq!(raw.next().0, 999);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_the_socket_are_turned_away() {
    let daemon = TestDaemon::start(&[]).await;
    let mut witness = Witness::new(&daemon).await;
    let socket = connect(&daemon);
    send(&socket, b"GET / HTTP/1.1\r\n\r\n");
    assert!(receive(&socket).is_none(), "hung up");
    let socket = connect(&daemon);
    send(&socket, &FromClient::Hello { version_min: 2, version_max: 9, capabilities: 0 }.encode());
    let (FromDaemon::Refused(why), _) = receive(&socket).unwrap() else { panic!() };
    assert!(why.contains("version 1"), "{why}");
    let socket = connect(&daemon);
    send(&socket, &FromClient::WantsStaging.encode());
    assert!(receive(&socket).is_none(), "no Hello");
    // Descriptors that a client sends are closed, not kept.
    let socket = connect(&daemon);
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = fds();
    let file = std::fs::File::open("/dev/null").unwrap();
    for _ in 0..20 {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let passed = [file.as_fd()];
        control.push(rustix::net::SendAncillaryMessage::ScmRights(&passed));
        let hello = FromClient::Hello { version_min: 1, version_max: 1, capabilities: u64::MAX }.encode();
        let _ = rustix::net::sendmsg(&socket, &[IoSlice::new(&hello)], &mut control, SendFlags::NOSIGNAL);
    }
    eventually("passed descriptors are closed", || fds() < before + 15).await;
    // A thousand connections that say nothing.
    let idle: Vec<OwnedFd> = (0..200).map(|_| connect(&daemon)).collect();
    witness.checks().await;
    drop(idle);
    witness.checks().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random records of every kind.
    #[test]
    fn random_records_never_stop_the_daemon(records in prop::collection::vec((0u16..9, any::<u64>(), prop::collection::vec(any::<u8>(), 0..200)), 200)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let daemon = TestDaemon::start(&[]).await;
            let mut witness = Witness::new(&daemon).await;
            let mut raw = Raw::attach(&daemon);
            for (kind, tag, payload) in &records {
                if !raw.push(*kind, *tag % 16, payload) || !send(&raw.socket, &FromClient::Unmapped { serial: 0 }.encode()) {
                    raw = Raw::attach(&daemon);
                }
            }
            assert_eq!(raw.welcome.version, 1);
            witness.checks().await;
        });
    }
}

/// A client that closed with something unread was taken for one that broke off: its pages stayed, and what they named, until
/// its process ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_goodbye_is_heard_whatever_was_left_unread() {
    let daemon = TestDaemon::start(&[]).await;
    let mut witness = Witness::new(&daemon).await;
    let host = &daemon.running.daemon.host;
    for round in 0..20 {
        let raw = Raw::attach(&daemon);
        witness.checks().await;
        // Said at once, and there is no reading of it; in every other round slabs come while it leaves.
        send(&raw.socket, &FromClient::WantsStaging.encode());
        if round % 2 == 0 {
            eventually("something is unread", || rustix::io::ioctl_fionread(&raw.socket).unwrap() > 0).await;
        }
        send(&raw.socket, &FromClient::Goodbye.encode());
        drop(raw);
        eventually("its pages have gone", || host.attached() == 1).await;
    }
}

/// A drain left behind what was on its way in over the local plane: the clients of gRPC were waited for, these were cut off.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_blocks_that_are_on_their_way_in() {
    let daemon = TestDaemon::start(&[]).await;
    let _witness = Witness::new(&daemon).await;
    let mut raw = Raw::attach(&daemon);
    send(&raw.socket, &FromClient::WantsStaging.encode());
    let staging = std::iter::from_fn(|| receive(&raw.socket)).find(|(it, _)| matches!(it, FromDaemon::Staging { .. }));
    assert_eq!(staging.unwrap().1.len(), 1, "staging memory is passed");
    raw.submit(1, &stage(1, BLOCK_BYTES));
    assert_eq!(raw.next(), (1, Completion::Staged));
    let serving = std::sync::Arc::clone(&daemon.running.daemon);
    let drain = tokio::spawn(async move { serving.drain(Duration::from_secs(60)).await });
    eventually("the daemon drains", || daemon.running.daemon.is_draining()).await;
    raw.submit(2, &stage(2, BLOCK_BYTES));
    assert!(raw.failure().1.contains("draining"), "what comes later is refused");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!drain.is_finished(), "a block is on its way");
    raw.submit(1, &Command::Copy { offset: 0, bytes: BLOCK_BYTES, last: true, crc32: None });
    assert_eq!(raw.next(), (1, Completion::Copied));
    assert!(matches!(raw.next(), (1, Completion::Stored { .. })));
    assert_eq!(drain.await.unwrap(), 0, "all was finished");
}

/// A client whose socket was full when its staging memory came waited for it until the deadline of its put.
#[tokio::test(flavor = "multi_thread")]
async fn staging_memory_that_found_a_full_socket_comes_later() {
    let daemon = TestDaemon::start(&[]).await;
    let _witness = Witness::new(&daemon).await;
    let mut raw = Raw::attach(&daemon);
    // As long as the client sleeps, every completion wakes it with a datagram.
    let (mut tag, mut before, mut waiting) = (0, 0, 1);
    while before != waiting {
        before = waiting;
        for _ in 0..64 {
            tag += 1;
            kvstore_plane::fall_asleep(raw.view().client_sleeps());
            raw.submit(tag, &stage(9, 1));
            raw.failure();
        }
        waiting = rustix::io::ioctl_fionread(&raw.socket).unwrap();
        assert!(tag < 100_000, "the socket takes everything");
    }
    send(&raw.socket, &FromClient::WantsStaging.encode());
    tokio::time::sleep(Duration::from_millis(100)).await;
    let within = Some(Duration::from_secs(60));
    rustix::net::sockopt::set_socket_timeout(&raw.socket, rustix::net::sockopt::Timeout::Recv, within).unwrap();
    let mut said = std::iter::from_fn(|| receive(&raw.socket));
    let staging = said.find(|(datagram, _)| matches!(datagram, FromDaemon::Staging { .. }));
    assert_eq!(staging.expect("the staging memory never came").1.len(), 1);
}
