//! Placement by policy: what one namespace may have, what goes to disk and to the bucket, and that all of it changes live.

use std::collections::HashMap;
use std::time::Duration;

use kvstore_client::v1::{Level, LookupRequest, StatusResponse};
use kvstore_client::{Client, Error, GroupRef, PutOptions};
use kvstore_tests::{TestDaemon, chain, hashes, two_namespaces, until};

const BLOCK: u32 = 64 << 10;

/// Bytes of slots of a namespace.
fn slots(status: &StatusResponse, namespace: &str) -> u64 {
    let pools = status.host.iter().flat_map(|host| &host.pools).filter(|pool| pool.namespace == namespace);
    pools.map(|pool| pool.slots * pool.slot_bytes).sum()
}

async fn put(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    for at in ids.step_by(20) {
        client.put(group, chain(at..at + 20, BLOCK)).await.unwrap();
    }
}

/// A namespace with a bound evicts its own blocks, however much it stores; the other one keeps what it has. The bound is
/// lowered, and raised, while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_has_no_more_memory_than_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let policy = |bytes: &str| format!("[[namespace]]\nname = \"a\"\nhost_bytes = \"{bytes}\"\n");
    let (running, [a, b], [group_a, group_b]) =
        two_namespaces(folder.path(), &["nvme.paths=off"], &policy("16MiB"), BLOCK).await;
    put(&b, &group_b, 0..400).await;
    put(&a, &group_a, 0..2000).await;
    let status = a.status().await.unwrap();
    let of_a = slots(&status, "a");
    assert!((8 << 20..=16 << 20).contains(&of_a), "{of_a}");
    assert_eq!(b.readable_blocks(&group_b, &hashes(0..400)).await.unwrap(), 400, "nothing of b had to go");
    let file = folder.path().join("kvstore.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("16MiB", "8MiB")).unwrap();
    let changes = a.reload_config().await.unwrap();
    assert!(changes.len() == 1 && changes[0].contains("a: ") && changes[0].contains("8.0 MiB"), "{changes:?}");
    until(&a, |status| slots(status, "a") <= 8 << 20).await;
    std::fs::write(&file, text.replace("16MiB", "32MiB")).unwrap();
    a.reload_config().await.unwrap();
    put(&a, &group_a, 3000..5000).await;
    let of_a = slots(&a.status().await.unwrap(), "a");
    assert!((16 << 20..=32 << 20).contains(&of_a), "{of_a}");
    // What cannot be is refused by name, and nothing changes.
    for (wrong, named) in [("1KiB", "namespace.host_bytes"), ("1TiB", "namespace.host_bytes")] {
        std::fs::write(&file, text.replace("16MiB", wrong)).unwrap();
        let error = a.reload_config().await.unwrap_err().to_string();
        assert!(error.contains(named) && error.contains(wrong), "{error}");
    }
    running.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespaces_pins_are_bounded_by_its_own_part() {
    let folder = tempfile::tempdir().unwrap();
    let policy = "[[namespace]]\nname = \"a\"\npin_percent = 10\n";
    let (running, [a, b], [group_a, group_b]) = two_namespaces(folder.path(), &["nvme.paths=off"], policy, BLOCK).await;
    put(&a, &group_a, 0..200).await;
    put(&b, &group_b, 0..200).await;
    let error = a.pin(&group_a, &hashes(0..200), 60_000).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("10%")), "{error}");
    assert_eq!(a.pin(&group_a, &hashes(0..100), 60_000).await.unwrap().pinned_blocks, 100);
    assert_eq!(b.pin(&group_b, &hashes(0..200), 60_000).await.unwrap().pinned_blocks, 200);
    running.shut_down().await;
}

/// A durable namespace beside one that is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_durable_by_policy() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("object.url=file://{}", folder.path().join("bucket").display());
    let policy = "[[namespace]]\nname = \"a\"\nupload = \"all\"\n";
    let (running, [a, b], [group_a, group_b]) =
        two_namespaces(folder.path(), &["nvme.paths=off", &url], policy, BLOCK).await;
    until(&a, |status| status.object.as_ref().is_some_and(|object| object.state == "SERVING")).await;
    put(&a, &group_a, 0..40).await;
    put(&b, &group_b, 0..40).await;
    until(&a, |status| status.object.as_ref().is_some_and(|object| object.written_blocks == 40)).await;
    let bucket = folder.path().join("bucket/v1");
    assert!(bucket.join("ns=a").exists() && !bucket.join("ns=b").exists());
    running.shut_down().await;
}

fn admitted(status: &StatusResponse) -> u64 {
    status.nvme.iter().flat_map(|nvme| &nvme.volumes).map(|volume| volume.admitted_blocks).sum()
}

async fn request(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: hashes(ids.clone()),
        ..LookupRequest::default()
    };
    let found = u64::from(client.lookup(request).await.unwrap().readable_blocks);
    if found < ids.end - ids.start {
        client.put(group, chain(ids, BLOCK)).await.unwrap();
    }
}

/// What one request asks for alone is not written to disk; what a second one asks for is, and so is what somebody waits for.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_asked_for_again_goes_to_disk() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let settings = [path.as_str(), "nvme.bytes=256MiB", "nvme.admit=reused"];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    for user in 0..10 {
        request(&client, &group, user * 100..user * 100 + 10).await;
    }
    assert_eq!(admitted(&client.status().await.unwrap()), 0);
    // The next turns of two of them: the prefix is asked for again, the new blocks are not.
    for user in [3, 7] {
        request(&client, &group, user * 100..user * 100 + 12).await;
    }
    until(&client, |status| admitted(status) == 20).await;
    let local = PutOptions { level: Level::Local, ..PutOptions::default() };
    let results = client.put_with(&group, chain(5000..5010, BLOCK), local).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Local), "{results:?}");
    let pinned = client.pin(&group, &hashes(0..10), 60_000).await.unwrap();
    assert_eq!(pinned.pinned_blocks, 10);
    until(&client, |status| admitted(status) == 40).await;
    // Changed while it runs.
    client.set_config(HashMap::from([("nvme.admit".to_owned(), "all".to_owned())])).await.unwrap();
    request(&client, &group, 7000..7010).await;
    until(&client, |status| admitted(status) == 50).await;
}

/// The same for the bucket.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_asked_for_again_goes_to_the_bucket() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("object.url=file://{}", folder.path().display());
    let daemon = TestDaemon::start(&[&url, "object.upload=reused"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let written = |status: &StatusResponse| status.object.as_ref().map_or(0, |object| object.written_blocks);
    until(&client, |status| status.object.as_ref().is_some_and(|object| object.state == "SERVING")).await;
    for user in 0..10 {
        request(&client, &group, user * 100..user * 100 + 10).await;
    }
    for user in [3, 7] {
        request(&client, &group, user * 100..user * 100 + 12).await;
    }
    until(&client, |status| written(status) == 20).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(written(&client.status().await.unwrap()), 20);
}

/// A drive takes no more than its budget; what is to be LOCAL is written all the same.
#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_written_to_disk_than_the_budget() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    // An hour's worth, which is there at the start, is 100 blocks; a second earns nothing to speak of.
    let budget = format!("nvme.write_budget={}", u64::from(BLOCK) * 100 * 24);
    let daemon = TestDaemon::start(&[&path, "nvme.bytes=256MiB", &budget]).await;
    let (client, group) = daemon.group(BLOCK).await;
    put(&client, &group, 0..300).await;
    // The last of it is kept for blocks that are worth more than these.
    let written = until(&client, |status| admitted(status) >= 75).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(admitted(&client.status().await.unwrap()) <= 105, "{written:?}");
    let local = PutOptions { level: Level::Local, ..PutOptions::default() };
    let results = client.put_with(&group, chain(5000..5010, BLOCK), local).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Local), "{results:?}");
}

/// What a request reads from the bucket goes to disk, by the same rules: not with a budget of nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_from_the_bucket_goes_to_disk_within_the_budget() {
    let bucket = tempfile::tempdir().unwrap();
    let url = format!("object.url=file://{}", bucket.path().display());
    let serving = |status: &StatusResponse| status.object.as_ref().is_some_and(|object| object.state == "SERVING");
    {
        let daemon = TestDaemon::start(&[&url]).await;
        let (client, group) = daemon.group(BLOCK).await;
        until(&client, serving).await;
        let durable = PutOptions { level: Level::Durable, ..PutOptions::default() };
        client.put_with(&group, chain(0..40, BLOCK), durable).await.unwrap();
    }
    for (budget, expected) in [("off", 40), ("0B", 0)] {
        let disk = tempfile::tempdir().unwrap();
        let path = format!("nvme.paths={}", disk.path().display());
        let budget = format!("nvme.write_budget={budget}");
        let daemon = TestDaemon::start(&[&url, &path, "nvme.bytes=256MiB", &budget]).await;
        let (client, group) = daemon.group(BLOCK).await;
        until(&client, serving).await;
        let outcomes = client.get(&group, &hashes(0..40)).await.unwrap();
        assert!(outcomes.iter().all(|outcome| outcome.bytes().is_some()), "{budget}");
        until(&client, |status| admitted(status) >= expected).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(admitted(&client.status().await.unwrap()), expected, "{budget}");
    }
}

/// The daemon's own accesses are what it is advised from.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_tells_what_was_asked_for() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    for round in 0..3 {
        for user in 0..200 {
            // A moment ago and again: one access.
            request(&client, &group, user * 100..user * 100 + 8 + round).await;
            request(&client, &group, user * 100..user * 100 + 8 + round).await;
        }
    }
    let (mut sampled, mut asked, mut one_in) = (0, 0, 0);
    let mut each = (0, 0);
    client
        .accesses(|chunk| {
            (one_in, each) = (chunk.one_in, (chunk.block_bytes, chunk.block_tokens));
            sampled += chunk.chains.iter().map(|chain| chain.names.len() as u64).sum::<u64>();
            asked += chunk.chains.iter().map(|chain| chain.asked).sum::<u64>();
        })
        .await
        .unwrap();
    assert_eq!(each.0, u64::from(BLOCK));
    let all = 200 * (8 + 9 + 10);
    assert!((all - 200..=all).contains(&asked), "{asked} of {all}");
    let expected = all / one_in;
    assert!((expected / 2..expected * 2).contains(&sampled), "{sampled} of {expected}");
}
