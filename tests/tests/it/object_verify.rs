//! What a DURABLE answer to an upload rests on: a store that was seen to compare checksums, or bytes that were read back.

use std::path::Path;
use std::time::Duration;

use kvstore::replay;
use kvstore_client::v1::Level;
use kvstore_client::{Client, Error, GroupRef, PutOptions};
use kvstore_tests::fault_proxy::{Fault, FaultProxy, Meant};
use kvstore_tests::s3::{self, Checksums, S3Server};
use kvstore_tests::{TestDaemon, chain, hashes, until};

const BLOCK: u32 = 100_000;
const BLOCKS: u64 = 5;

/// A daemon whose bucket is behind a proxy, in front of such a server.
struct Verified {
    server: S3Server,
    proxy: FaultProxy,
    _daemon: TestDaemon,
    client: Client,
    group: GroupRef,
    /// How the daemon confirms uploads.
    confirmed: String,
}

/// `options` for the client of the store, and `more` settings.
async fn verified(folder: &Path, checksums: Checksums, options: &[&str], more: &[&str]) -> Verified {
    verified_through(folder, checksums, options, more, &[]).await
}

/// The same, with a plan of the proxy.
async fn verified_through(
    folder: &Path,
    checksums: Checksums,
    options: &[&str],
    more: &[&str],
    plan: &[(Meant, Fault)],
) -> Verified {
    let server = S3Server::start_with(folder, "127.0.0.1:0", checksums).await;
    let proxy = FaultProxy::start(server.address).await;
    proxy.plan(plan.iter().copied());
    let mut settings = s3::settings(proxy.address, "p");
    settings.push("object.stall=2s".into());
    for setting in settings.iter_mut().filter(|setting| setting.starts_with("object.options=")) {
        options.iter().for_each(|option| setting.push_str(&format!(",{option}")));
    }
    settings.extend(more.iter().map(|setting| setting.to_string()));
    let daemon = TestDaemon::start(&settings.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, |status| status.object.as_ref().unwrap().state == "SERVING").await;
    let confirmed = client.status().await.unwrap().object.unwrap().confirmed;
    Verified { server, proxy, _daemon: daemon, client, group, confirmed }
}

impl Verified {
    async fn put(&self, ids: std::ops::Range<u64>) -> Result<(), Error> {
        let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
        let results = self.client.put_with(&self.group, chain(ids, BLOCK), options).await?;
        assert!(results.iter().all(|result| result.level() == Level::Durable), "{results:?}");
        Ok(())
    }

    /// Bytes that came from the store while blocks were put.
    async fn read_back(&self, ids: std::ops::Range<u64>) -> u64 {
        let before = self.proxy.read_bytes();
        self.put(ids).await.unwrap();
        self.proxy.read_bytes() - before
    }

    /// A byte flips in each upload: nothing is DURABLE. Then in one, which is made up for: what is DURABLE is right.
    async fn nothing_wrong_is_durable(&self) {
        self.proxy.always(Some((Meant::Writes, Fault::Flip)));
        let error = self.put(100..100 + BLOCKS).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_) | Error::Deadline(_)), "{error}");
        self.proxy.always(None);
        // A store that failed so often is left alone for a moment.
        let mut tries = 0..600;
        while let Err(error) = self.put(300..301).await {
            assert!(tries.next().is_some(), "{error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let done = self.proxy.done();
        self.proxy.plan([(Meant::Writes, Fault::Flip)]);
        self.put(200..200 + BLOCKS).await.unwrap();
        assert_eq!(self.proxy.done(), done + 1, "a byte flipped");
        let settings = s3::settings(self.server.address, "p");
        let other = TestDaemon::start(&settings.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let (reader, group) = other.group(BLOCK).await;
        until(&reader, |status| status.object.as_ref().unwrap().state == "SERVING").await;
        let outcomes = reader.get(&group, &hashes(200..200 + BLOCKS)).await.unwrap();
        for (id, outcome) in (200..).zip(&outcomes) {
            let wrong = outcome.bytes().map(|bytes| replay::wrong_bytes(id, bytes));
            assert_eq!(wrong, Some(0), "a DURABLE block is not what was put: {id}");
        }
    }
}

const ALL: u64 = BLOCKS * BLOCK as u64;

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_compares_checksums_is_believed_and_not_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = verified(folder.path(), Checksums::Compared, &[], &[]).await;
    assert!(store.confirmed.contains("the store checks each upload"), "{}", store.confirmed);
    let read = store.read_back(0..BLOCKS).await;
    assert!(read < ALL / 10, "{read} bytes were read back");
    store.nothing_wrong_is_durable().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_takes_anything_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = verified(folder.path(), Checksums::Ignored, &[], &[]).await;
    assert!(store.confirmed.contains("every upload is read back"), "{}", store.confirmed);
    let read = store.read_back(0..BLOCKS).await;
    assert!(read >= ALL, "{read} bytes were read back");
    store.nothing_wrong_is_durable().await;
}

/// The same server compares nothing where the client is told not to sign what it sends.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_are_not_signed_are_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = verified(folder.path(), Checksums::Compared, &["aws_unsigned_payload=true"], &[]).await;
    assert!(store.confirmed.contains("every upload is read back"), "{}", store.confirmed);
    let read = store.read_back(0..BLOCKS).await;
    assert!(read >= ALL, "{read} bytes were read back");
    store.nothing_wrong_is_durable().await;
}

/// This server refuses a body that does not match `x-amz-checksum-sha256`, after it has put it in its place: a refusal alone proves
/// nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_refuses_a_body_and_keeps_it_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["aws_unsigned_payload=true", "aws_checksum_algorithm=sha256"];
    let store = verified(folder.path(), Checksums::Compared, &options, &[]).await;
    assert!(store.confirmed.contains("every upload is read back"), "{}", store.confirmed);
    let read = store.read_back(0..BLOCKS).await;
    assert!(read >= ALL, "{read} bytes were read back");
    store.nothing_wrong_is_durable().await;
}

/// The probe took any 4xx for an answer to the body: two that came by accident (a request's time was over, a clock was late, somebody on
/// the way was busy) made a store that compares nothing trusted for the daemon's life.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_by_accident_prove_nothing() {
    for status in [400, 403, 422, 429] {
        let folder = tempfile::tempdir().unwrap();
        // One for the first body of each size.
        let plan = ["-1", "-2"].map(|end| (Meant::WritesOf(end), Fault::Status(status)));
        let store = verified_through(folder.path(), Checksums::Ignored, &[], &[], &plan).await;
        assert!(store.proxy.done() > 0, "{status}: nothing happened by accident");
        assert!(store.confirmed.contains("every upload is read back"), "{status}: {}", store.confirmed);
        let read = store.read_back(0..BLOCKS).await;
        assert!(read >= ALL, "{status}: {read} bytes were read back");
    }
}

/// They hide nothing either: a store that compares is believed once it is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_say_nothing_of_the_body_are_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let plan = ["-1", "-1-again", "-2", "-2-again"].map(|end| (Meant::WritesOf(end), Fault::Status(403)));
    let store = verified_through(folder.path(), Checksums::Compared, &[], &[], &plan).await;
    assert_eq!(store.proxy.done(), 4, "the accidents that were planned");
    assert!(store.confirmed.contains("the store checks each upload"), "{}", store.confirmed);
}

/// What the probe saw has no part in it.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_may_know_better() {
    for (verify, said, is_read) in [("always", "\"always\"", true), ("never", "\"never\"", false)] {
        let folder = tempfile::tempdir().unwrap();
        let checksums = if is_read { Checksums::Compared } else { Checksums::Ignored };
        let store = verified(folder.path(), checksums, &[], &[&format!("object.verify={verify}")]).await;
        assert!(store.confirmed.contains(said), "{}", store.confirmed);
        let read = store.read_back(0..BLOCKS).await;
        assert_eq!(read >= ALL, is_read, "{verify}: {read} bytes were read back");
    }
}
