//! A long outage of the object store: ten minutes, unless `KVSTORE_OUTAGE_SECONDS` says otherwise. `make soak` runs it.

use std::path::Path;
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_client::v1::{Level, ObjectTierStatus};
use kvstore_client::{Client, GroupRef, PutOptions};
use kvstore_tests::fault_proxy::{Fault, FaultProxy, Meant};
use kvstore_tests::s3::{self, S3Server};
use kvstore_tests::{TestDaemon, chain, hashes};

const BLOCK: u32 = 100_000;
/// The calls' deadline.
const DEADLINE: Duration = Duration::from_secs(3);

async fn daemon(bucket: &[String], disk: Option<&Path>) -> TestDaemon {
    let mut settings: Vec<String> = bucket.to_vec();
    settings.extend(["object.stall=1s".into(), "object.upload=all".into(), "host.bytes=32MiB".into()]);
    if let Some(disk) = disk {
        // Room for all that is put meanwhile.
        let backlog = "object.backlog_bytes=900MiB".into();
        settings.extend([format!("nvme.paths={}", disk.display()), "nvme.bytes=2GiB".into(), backlog]);
    }
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    TestDaemon::start(&settings).await
}

async fn object(client: &Client) -> ObjectTierStatus {
    client.status().await.unwrap().object.unwrap()
}

async fn until(client: &Client, within: Duration, reached: impl Fn(&ObjectTierStatus) -> bool) {
    let begun = Instant::now();
    while !reached(&object(client).await) {
        assert!(begun.elapsed() < within, "{:?}", object(client).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn assert_bytes(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    let outcomes = client.get(group, &hashes(ids.clone())).await.unwrap();
    for (id, outcome) in ids.zip(&outcomes) {
        assert_eq!(outcome.bytes().map(|bytes| replay::wrong_bytes(id, bytes)), Some(0), "{id}: {outcome:?}");
    }
}

/// The store is gone in every way it may be, by turns, and the daemon is restarted in the middle. Puts and reads go on from the node;
/// every call ends by its deadline and a second; memory and backlog stay within their bounds; and when the store is back, what is
/// owed is made up for without anybody's help: another node reads every block.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes ten minutes: make soak"]
async fn a_ten_minute_outage() {
    let seconds = std::env::var("KVSTORE_OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(600u64);
    let (folder, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let proxy = FaultProxy::start(server.address).await;
    let bucket = s3::settings(proxy.address, "p");
    let mut serving = daemon(&bucket, Some(disk.path())).await;
    let (mut client, mut group) = serving.group(BLOCK).await;
    client = client.with_deadline(DEADLINE);
    until(&client, Duration::from_secs(60), |object| object.state == "SERVING").await;
    let durable = PutOptions { level: Level::Durable, ..PutOptions::default() };
    client.put_with(&group, chain(0..10, BLOCK), durable).await.unwrap();

    let faults = [Fault::Status(503), Fault::Reset, Fault::Delay(Duration::from_secs(30)), Fault::Status(500)];
    let (begun, mut next, mut rounds, mut longest) = (Instant::now(), 10u64, 0u64, Duration::ZERO);
    let (mut restarted, mut runs) = (false, vec![0, 5]);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let part = begun.elapsed().as_secs() * faults.len() as u64 / seconds.max(1);
        proxy.always(Some((Meant::Any, faults[(part as usize).min(faults.len() - 1)])));
        if !restarted && begun.elapsed() >= Duration::from_secs(seconds / 2) {
            serving.running.shut_down().await;
            serving = daemon(&bucket, Some(disk.path())).await;
            (client, group) = serving.group(BLOCK).await;
            client = client.with_deadline(DEADLINE);
            restarted = true;
        }
        let call = Instant::now();
        let stored = client.put(&group, chain(next..next + 5, BLOCK)).await.unwrap();
        assert!(stored.iter().all(|result| result.level() != Level::Unspecified), "{stored:?}");
        runs.push(next);
        next += 5;
        if rounds % 5 == 0 {
            // Refused or late, never long; nothing is promised of these.
            let _ = client.put_with(&group, chain(next..next + 5, BLOCK), durable).await;
            next += 5;
        }
        longest = longest.max(call.elapsed());
        assert!(call.elapsed() < 2 * (DEADLINE + Duration::from_secs(1)), "{:?}", call.elapsed());
        let earlier = runs[(rounds * 7919) as usize % runs.len()];
        assert_bytes(&client, &group, earlier..earlier + 5).await;
        let status = client.status().await.unwrap();
        let (object, host) = (status.object.unwrap(), status.host.unwrap());
        assert!(object.backlog_bytes <= 2 * object.backlog_bytes_max, "{object:?}");
        assert!(host.bytes_mapped <= host.bytes_max, "{host:?}");
        rounds += 1;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let owed = object(&client).await;
    proxy.always(None);
    let back = Instant::now();
    until(&client, Duration::from_secs(120), |object| object.backlog_blocks == 0 && object.state == "SERVING").await;
    println!(
        "{rounds} rounds in {seconds} s, {next} blocks; the longest round {longest:?}; {} blocks owed, made up for in {:?}",
        owed.backlog_blocks,
        back.elapsed()
    );
    let end = object(&client).await;
    assert_eq!((end.lost_blocks, end.refused_blocks), (0, 0), "{end:?}");
    drop((client, group));
    serving.running.shut_down().await;

    let other = daemon(&s3::settings(server.address, "p"), None).await;
    let (client, group) = other.group(BLOCK).await;
    until(&client, Duration::from_secs(60), |object| object.state == "SERVING").await;
    for at in runs {
        assert_bytes(&client, &group, at..at + 5).await;
    }
}
