//! The local plane: blocks read where they lie, put through shared memory, by clients in this process.

use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore::serve::{StartOptions, start};
use kvstore_client::v1::{GetStatus, Level, PutStatus};
use kvstore_client::{Client, Error, GetOptions, GetOutcome, Plane, PutBlock, PutOptions};
use kvstore_tests::{BLOCK_BYTES, TestDaemon, chain, hashes};
use rustix::fs::inotify;

/// Within this time, or the test fails: background work of the daemon comes ten times a second.
async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_put_and_read_over_either_plane_are_the_same() {
    let daemon = TestDaemon::start(&[]).await;
    for (bytes, blocks) in [(1u32, 3u64), (BLOCK_BYTES, 40), (1 << 20, 8), ((3 << 20) + 17, 3)] {
        let (local, group) = daemon.group_over(Plane::Local, bytes).await;
        let (grpc, same) = daemon.group_over(Plane::Grpc, bytes).await;
        assert_eq!(group, same);
        let (here, there) = (0..blocks, 1000..1000 + blocks);
        let stored = local.put(&group, chain(here.clone(), bytes)).await.unwrap();
        assert!(stored.iter().all(|result| result.status() == PutStatus::Stored && result.level() == Level::Memory));
        grpc.put(&group, chain(there.clone(), bytes)).await.unwrap();
        for ids in [here, there] {
            for client in [&local, &grpc] {
                assert_eq!(client.readable_blocks(&group, &hashes(ids.clone())).await.unwrap(), blocks as usize);
                let got = client.get(&group, &hashes(ids.clone())).await.unwrap();
                for (id, outcome) in ids.clone().zip(got) {
                    assert!(outcome.bytes().unwrap() == &replay::content(id, bytes as usize), "block {id}");
                }
                let mut buffers = vec![vec![0u8; bytes as usize]; blocks as usize];
                let mut slices: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
                assert_eq!(client.get_into(&group, &hashes(ids.clone()), &mut slices).await.unwrap(), blocks as usize);
                for (id, buffer) in ids.clone().zip(&buffers) {
                    assert!(*buffer == replay::content(id, bytes as usize), "block {id}");
                }
            }
        }
        let again = local.put(&group, chain(0..blocks, bytes)).await.unwrap();
        assert!(again.iter().all(|result| result.status() == PutStatus::Present));
    }
}

/// A client that found the gRPC socket and asked for the local plane at once was told that there is none: its socket came
/// a moment later. Whoever finds a daemon now finds its local plane.
#[tokio::test(flavor = "multi_thread")]
async fn the_local_plane_is_there_before_the_grpc_socket() {
    let folder = tempfile::tempdir().unwrap();
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, folder.path(), inotify::WatchFlags::CREATE).unwrap();
    let options = StartOptions {
        settings: ["host.bytes=8MiB", "http.address=off", "log.level=error", "nvme.paths=off"].map(String::from).into(),
        listen: vec![format!("unix:{}/a.sock", folder.path().display())],
        ..StartOptions::default()
    };
    let running = start(options).await.unwrap();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let mut made = Vec::new();
    while let Ok(event) = events.next() {
        made.push(event.file_name().unwrap().to_str().unwrap().to_owned());
    }
    assert_eq!(made, ["a.sock.lock", "a.sock.plane", "a.sock"]);
    running.shut_down().await;
    let left: Vec<_> = folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["a.sock.lock"], "a stopped daemon leaves the lock's file alone");
}

/// Two daemons that are started at once beside what a killed one left: each removed the other's socket. One serves now, both
/// planes, and the other says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_daemons_on_one_socket_one_serves() {
    for _ in 0..10 {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("a.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let address = format!("unix:{}", socket.display());
        let options = || StartOptions {
            settings: ["host.bytes=8MiB", "http.address=off", "log.level=error", "nvme.paths=off"]
                .map(String::from)
                .into(),
            listen: vec![address.clone()],
            ..StartOptions::default()
        };
        let two = [tokio::spawn(start(options())), tokio::spawn(start(options()))];
        let (mut serving, mut refused) = (Vec::new(), Vec::new());
        for one in two {
            match one.await.unwrap() {
                Ok(running) => serving.push(running),
                Err(error) => refused.push(format!("{error:#}")),
            }
        }
        assert_eq!(serving.len(), 1, "{refused:?}");
        assert!(refused[0].contains("another daemon serves there"), "{refused:?}");
        for plane in [Plane::Local, Plane::Grpc] {
            Client::connect_over(&address, plane).await.unwrap();
        }
        serving.pop().unwrap().shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_miss_is_a_value_wherever_it_is_in_the_chain() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group_over(Plane::Local, BLOCK_BYTES).await;
    client.put(&group, chain(0..6, BLOCK_BYTES)).await.unwrap();
    client.delete(&group, &hashes([3])).await.unwrap();
    let got = client.get(&group, &hashes(0..8)).await.unwrap();
    let hits: Vec<bool> = got.iter().map(|outcome| outcome.bytes().is_some()).collect();
    assert_eq!(hits, [true, true, true, false, true, true, false, false]);
    assert_eq!(got[3], GetOutcome::Miss);
    let options = GetOptions { leading_run: true, ..GetOptions::default() };
    assert_eq!(client.get_with(&group, &hashes(0..8), options).await.unwrap().len(), 4);
    let mut buffers = vec![vec![0u8; BLOCK_BYTES as usize]; 8];
    let mut slices: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    assert_eq!(client.get_into(&group, &hashes(0..8), &mut slices).await.unwrap(), 3);
    assert_eq!(client.leases(&group, &hashes(0..8)).await.unwrap().len(), 3);
    assert_eq!(client.leases_now(&group, &hashes([100])).unwrap().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn leased_blocks_stay_while_the_memory_turns_over() {
    let daemon = TestDaemon::start(&["host.bytes=16MiB", "host.eviction=lru"]).await;
    let bytes = 64 << 10;
    let (client, group) = daemon.group_over(Plane::Local, bytes).await;
    client.put(&group, chain(0..32, bytes)).await.unwrap();
    let leases = client.leases(&group, &hashes(0..32)).await.unwrap();
    assert_eq!(leases.len(), 32);
    for round in 1..20u64 {
        client.put(&group, chain(round * 1000..round * 1000 + 40, bytes)).await.unwrap();
    }
    for (id, block) in leases.iter().enumerate() {
        assert!(*block == replay::content(id as u64, bytes as usize), "block {id} changed while it was leased");
    }
    assert_eq!(client.readable_blocks(&group, &hashes(0..32)).await.unwrap(), 32, "what is read is not evicted");
    assert!(daemon.running.daemon.host.status().counts.evicted > 400);
    drop(leases);
    // The daemon looks again ten times a second, and when it finds no other room; until then they are no candidates.
    eventually("they may leave once nobody reads them", || daemon.running.daemon.host.local_leases() == (0, 0)).await;
    for round in 20..40u64 {
        client.put(&group, chain(round * 1000..round * 1000 + 40, bytes)).await.unwrap();
    }
    assert_eq!(client.readable_blocks(&group, &hashes(0..32)).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_block_is_not_found_and_not_overwritten_while_it_is_read() {
    let daemon = TestDaemon::start(&["host.bytes=8MiB"]).await;
    let bytes = 256 << 10;
    let (client, group) = daemon.group_over(Plane::Local, bytes).await;
    client.put(&group, chain(0..4, bytes)).await.unwrap();
    let leases = client.leases(&group, &hashes(0..4)).await.unwrap();
    assert_eq!(client.delete(&group, &hashes(0..4)).await.unwrap().deleted, 4);
    assert_eq!(client.leases(&group, &hashes(0..4)).await.unwrap().len(), 0);
    for round in 1..10u64 {
        client.put(&group, chain(round * 1000..round * 1000 + 20, bytes)).await.unwrap();
    }
    for (id, block) in leases.iter().enumerate() {
        assert!(*block == replay::content(id as u64, bytes as usize));
    }
    let host = &daemon.running.daemon.host;
    assert_eq!(host.local_leases(), (4, 4));
    drop(leases);
    eventually("slots are free again", || host.local_leases() == (0, 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_page_bounds_what_a_client_reads() {
    let daemon = TestDaemon::start(&["host.bytes=128MiB"]).await;
    let (client, group) = daemon.group_over(Plane::Local, 4096).await;
    let most = kvstore_plane::caps::LEASES_PER_CLIENT as u64;
    client.put(&group, chain(0..most + 10, 4096)).await.unwrap();
    let all = client.leases(&group, &hashes(0..most)).await.unwrap();
    assert_eq!(all.len(), most as usize);
    let error = client.leases_now(&group, &hashes([most])).unwrap().err().unwrap();
    assert!(matches!(&error, Error::Busy(why) if why.contains("8192")), "{error}");
    drop(all);
    assert_eq!(client.leases_now(&group, &hashes([most])).unwrap().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_reach_the_eviction_policy() {
    let daemon = TestDaemon::start(&["host.bytes=8MiB", "host.eviction=lru"]).await;
    let bytes = 64 << 10;
    let (client, group) = daemon.group_over(Plane::Local, bytes).await;
    client.put(&group, chain(0..8, bytes)).await.unwrap();
    for round in 1..30u64 {
        client.put(&group, chain(round * 1000..round * 1000 + 8, bytes)).await.unwrap();
        // Read over and over, by looks that no call tells the daemon of.
        assert_eq!(client.leases_now(&group, &hashes(0..8)).unwrap().unwrap().len(), 8, "round {round}");
        let host = &daemon.running.daemon.host;
        let reads = host.local_reads();
        eventually("the touches are taken", || host.local_reads() > reads).await;
    }
    assert_eq!(client.readable_blocks(&group, &hashes(1000..1008)).await.unwrap(), 0, "others left meanwhile");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_on_disk_are_brought_into_memory_for_a_local_reader() {
    let folder = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", folder.path().display());
    let daemon = TestDaemon::start(&["host.bytes=8MiB", &path, "nvme.bytes=256MiB"]).await;
    let bytes = 128 << 10;
    let (client, group) = daemon.group_over(Plane::Local, bytes).await;
    let options = PutOptions { level: Level::Local, ..PutOptions::default() };
    let stored = client.put_with(&group, chain(0..200, bytes), options).await.unwrap();
    let short: Vec<_> = stored.iter().enumerate().filter(|(_, result)| result.level() != Level::Local).collect();
    assert!(short.is_empty(), "{short:?}");
    // Three times the memory.
    let mut buffers = vec![vec![0u8; bytes as usize]; 200];
    let mut slices: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    assert_eq!(client.get_into(&group, &hashes(0..200), &mut slices).await.unwrap(), 200);
    for (id, buffer) in buffers.iter().enumerate() {
        assert!(*buffer == replay::content(id as u64, bytes as usize), "block {id}");
    }
    let leases = client.leases(&group, &hashes(0..20)).await.unwrap();
    assert_eq!(leases.len(), 20);
    let got = client.get(&group, &hashes([0, 500, 1])).await.unwrap();
    assert_eq!(got.iter().map(|got| got.bytes().is_some()).collect::<Vec<_>>(), [true, false, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_control_call_works_over_the_rings() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group_over(Plane::Local, BLOCK_BYTES).await;
    let blocks = hashes(0..10);
    client.put(&group, chain(0..10, BLOCK_BYTES)).await.unwrap();
    let pin = client.pin(&group, &blocks, 60_000).await.unwrap();
    assert_eq!(pin.pinned_blocks, 10);
    assert_eq!(client.delete(&group, &blocks).await.unwrap().pinned, 10);
    assert!(client.unpin(pin.pin).await.unwrap());
    let ticket = client.prefetch(&group, &blocks, 0).await.unwrap();
    assert_eq!(client.watch_prefetch(ticket.clone(), |_| {}).await.unwrap().ready, 10);
    assert!(!client.cancel_prefetch(ticket).await.unwrap());
    let request = kvstore_client::v1::LookupRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: blocks.clone(),
        ticket_ttl_ms: 30_000,
        ..Default::default()
    };
    let found = client.lookup(request).await.unwrap();
    assert_eq!(found.readable_blocks, 10);
    let options = GetOptions { ticket: found.ticket.clone(), ..GetOptions::default() };
    assert_eq!(client.get_with(&group, &blocks, options.clone()).await.unwrap().len(), 10);
    assert!(client.release_ticket(found.ticket).await.unwrap());
    let error = client.get_with(&group, &blocks, options).await.unwrap_err();
    assert!(matches!(&error, Error::NotFound(why) if why.contains("ticket")), "{error}");
    client.hint(&group, &blocks).unwrap();
    assert_eq!(client.delete(&group, &blocks).await.unwrap().deleted, 10);
    let commands = daemon.running.daemon.traffic.local_commands.load(std::sync::atomic::Ordering::Relaxed);
    assert!(commands > 10, "{commands} commands came over the rings");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_too_large_for_a_record_go_over_grpc() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group_over(Plane::Local, BLOCK_BYTES).await;
    client.put(&group, chain(0..100, BLOCK_BYTES)).await.unwrap();
    assert_eq!(client.readable_blocks(&group, &hashes(0..20_000)).await.unwrap(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_by_name_and_harms_nobody() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group_over(Plane::Local, BLOCK_BYTES).await;
    let short = PutBlock::new(hashes([1])[0].clone(), vec![0; 100]);
    let error = client.put(&group, vec![short]).await.unwrap_err();
    assert!(matches!(&error, Error::Invalid(why) if why.contains("100 bytes") && why.contains("5000")), "{error}");
    let long = PutBlock::new(vec![1; 33], vec![0; BLOCK_BYTES as usize]);
    assert!(matches!(client.put(&group, vec![long]).await.unwrap_err(), Error::Invalid(why) if why.contains("33")));
    let error = client.get_into(&group, &hashes([1]), &mut []).await.unwrap_err();
    assert!(matches!(error, Error::Invalid(_)));
    client.put(&group, chain(0..2, BLOCK_BYTES)).await.unwrap();
    let mut wrong = [0u8; 10];
    let error = client.get_into(&group, &hashes([0]), &mut [&mut wrong]).await.unwrap_err();
    assert!(matches!(&error, Error::Invalid(why) if why.contains("5000")), "{error}");
    let mut other = group.clone();
    other.group = 9;
    assert!(matches!(client.get(&other, &hashes([0])).await.unwrap_err(), Error::Invalid(_)));
    assert_eq!(client.readable_blocks(&group, &hashes(0..2)).await.unwrap(), 2);
    let tcp = kvstore_client::Client::connect_over("http://127.0.0.1:1", Plane::Local).await.err().unwrap();
    assert!(matches!(tcp, Error::Unsupported(_)), "{tcp}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_that_is_given_up_leaves_nothing_behind() {
    let daemon = TestDaemon::start(&[]).await;
    let bytes = 4 << 20;
    let (client, group) = daemon.group_over(Plane::Local, bytes).await;
    for round in 0..30u64 {
        let put = client.put(&group, chain(round * 100..round * 100 + 4, bytes));
        let _ = tokio::time::timeout(Duration::from_micros(200 * round), put).await;
    }
    let host = &daemon.running.daemon.host;
    eventually("fills end with their put", || host.status().flights == 0).await;
    client.put(&group, chain(9000..9004, bytes)).await.unwrap();
    for id in 9000..9004 {
        let got = client.get(&group, &hashes([id])).await.unwrap();
        assert!(got[0].bytes().unwrap() == &replay::content(id, bytes as usize));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tasks_share_one_attachment() {
    let daemon = TestDaemon::start(&["host.bytes=256MiB"]).await;
    let bytes = 100_000;
    let (client, group) = daemon.group_over(Plane::Local, bytes).await;
    let tasks: Vec<_> = (0..16u64)
        .map(|task| {
            let (client, group) = (client.clone(), group.clone());
            tokio::spawn(async move {
                for round in 0..12u64 {
                    // Half of the keys are shared by all tasks.
                    let own = task * 10_000 + round * 10;
                    let ids =
                        if round % 2 == 0 { own..own + 5 } else { 900_000 + round * 10..900_000 + round * 10 + 5 };
                    let stored = client.put(&group, chain(ids.clone(), bytes)).await.unwrap();
                    assert!(stored.iter().all(|result| result.level() == Level::Memory), "{stored:?}");
                    for (id, got) in ids.clone().zip(client.get(&group, &hashes(ids)).await.unwrap()) {
                        assert!(got.bytes().unwrap() == &replay::content(id, bytes as usize), "block {id}");
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(daemon.running.daemon.host.attached(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_namespaces_share_neither_keys_nor_memory() {
    let folder = tempfile::tempdir().unwrap();
    let address = |name: &str| format!("unix:{}", folder.path().join(format!("{name}.sock")).display());
    let config = folder.path().join("kvstore.toml");
    let listen = |name: &str| format!("[[listen]]\naddress = \"{}\"\nnamespace = \"{name}\"\n", address(name));
    std::fs::write(&config, format!("{}{}", listen("red"), listen("blue"))).unwrap();
    let settings = ["host.bytes=64MiB", "http.address=off", "log.level=error", "nvme.paths=off"];
    let options = kvstore::serve::StartOptions {
        file: Some(config),
        settings: settings.iter().map(|setting| setting.to_string()).collect(),
        listen: Vec::new(),
    };
    let running = kvstore::serve::start(options).await.unwrap();
    let layout = replay::layout("test", BLOCK_BYTES, kvstore_client::v1::BlockKind::Attention);
    let mut clients = Vec::new();
    for name in ["red", "blue"] {
        let client = kvstore_client::Client::connect_over(&address(name), Plane::Local).await.unwrap();
        let group = client.register_layout(layout.clone()).await.unwrap().group(0);
        clients.push((client, group));
    }
    let [(red, group), (blue, _)] = &clients[..] else { unreachable!() };
    red.put(group, chain(0..5, BLOCK_BYTES)).await.unwrap();
    assert_eq!(blue.leases(group, &hashes(0..5)).await.unwrap().len(), 0);
    assert_eq!(blue.get(group, &hashes(0..5)).await.unwrap(), vec![GetOutcome::Miss; 5]);
    let slabs = &running.daemon.host;
    let red_slabs = slabs.slabs_of(running.daemon.namespace("red").unwrap());
    let blue_slabs = slabs.slabs_of(running.daemon.namespace("blue").unwrap());
    assert!(!red_slabs.is_empty() && blue_slabs.is_empty(), "a slab is of one namespace");
    running.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slabs_that_leave_are_unmapped_and_their_memory_given_back() {
    let daemon = TestDaemon::start(&["host.bytes=64MiB"]).await;
    let (client, small) = daemon.group_over(Plane::Local, 16 << 10).await;
    client.put(&small, chain(0..3000, 16 << 10)).await.unwrap();
    let before = daemon.mapped();
    assert!(before > 40 << 20, "{before}");
    daemon.running.daemon.set_config(&[("host.bytes".into(), "16MiB".into())]).unwrap();
    eventually("the client lets go of slabs that left", || daemon.mapped() <= 16 << 20).await;
    let other = client
        .register_layout(replay::layout("other", 1 << 20, kvstore_client::v1::BlockKind::Attention))
        .await
        .unwrap()
        .group(0);
    // Its first slab has three slots, and a second must come from the other layout: a put may be answered Busy meanwhile.
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        client.put(&other, chain(5000..5004, 1 << 20)).await.unwrap();
        if client.leases(&other, &hashes(5000..5004)).await.unwrap().len() == 4 {
            break;
        }
        assert!(Instant::now() < until, "{:?}", daemon.running.daemon.host.status());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(daemon.mapped() <= 16 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_data_that_is_lost_is_an_error_over_the_local_plane_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", folder.path().display());
    let daemon = TestDaemon::start(&["host.bytes=8MiB", &path, "nvme.bytes=128MiB"]).await;
    let bytes = 256 << 10;
    let (client, group) = daemon.group_over(Plane::Local, bytes).await;
    let options = PutOptions { level: Level::Local, ..PutOptions::default() };
    client.put_with(&group, chain(0..2, bytes), options).await.unwrap();
    client.pin(&group, &hashes(0..2), 60_000).await.unwrap();
    let filler = client.put_with(&group, chain(100..150, bytes), options).await.unwrap();
    let short: Vec<_> = filler.iter().enumerate().filter(|(_, result)| result.level() != Level::Local).collect();
    assert!(short.is_empty(), "{short:?}");
    // Its frames are zeroed while the block is on disk alone.
    for entry in std::fs::read_dir(folder.path()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().contains("segments") || entry.metadata().unwrap().len() > 64 << 20 {
            let file = std::fs::OpenOptions::new().write(true).open(entry.path()).unwrap();
            let zeros = vec![0u8; 1 << 20];
            for at in 0..(entry.metadata().unwrap().len() >> 20) {
                std::os::unix::fs::FileExt::write_all_at(&file, &zeros, at << 20).unwrap();
            }
        }
    }
    let got = client.get(&group, &hashes([0])).await.unwrap();
    match &got[0] {
        GetOutcome::Hit(bytes_read) => assert!(*bytes_read == replay::content(0, bytes as usize), "still in memory"),
        outcome => {
            assert_eq!(*outcome, GetOutcome::DataLoss);
            let mut buffer = vec![0u8; bytes as usize];
            let error = client.get_into(&group, &hashes([0]), &mut [&mut buffer]).await.unwrap_err();
            assert!(matches!(error, Error::DataLoss(_)), "{error}");
            let error = client.leases(&group, &hashes([0])).await.err().unwrap();
            assert!(matches!(error, Error::DataLoss(_)), "{error}");
        }
    }
    let _ = GetStatus::DataLoss;
}

/// Each LOCAL put kept to the daemon's 256 waiting blocks of one client, and several puts at once did not: the blocks beyond were
/// answered MEMORY, and that was all their callers learned.
#[tokio::test(flavor = "multi_thread")]
async fn local_puts_of_one_process_share_what_may_wait_for_the_disk() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let daemon = TestDaemon::start(&[path.as_str(), "nvme.bytes=256MiB"]).await;
    let (client, group) = daemon.group_over(Plane::Local, 8192).await;
    let puts = (0..12u64).map(|put| {
        let (client, group) = (client.clone(), group.clone());
        tokio::spawn(async move {
            let options = PutOptions { level: Level::Local, ..PutOptions::default() };
            let ids = put * 1000..put * 1000 + 200;
            client.put_with(&group, kvstore_tests::chain(ids, 8192), options).await.unwrap()
        })
    });
    for put in puts.collect::<Vec<_>>() {
        let results = put.await.unwrap();
        let short = results.iter().filter(|result| result.level() != Level::Local).count();
        assert_eq!((results.len(), short), (200, 0));
    }
}
