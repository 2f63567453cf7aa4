//! The calls about snapshots.

use kvstore_proto::v1::snapshots_client::SnapshotsClient;
use kvstore_proto::v1::{
    CollectSnapshotsRequest, CollectSnapshotsResponse, DiffSnapshotsRequest, DiffSnapshotsResponse,
    InspectSnapshotRequest, InspectSnapshotResponse, ListSnapshotsRequest, ListSnapshotsResponse, PrewarmProgress,
    PrewarmSnapshotRequest, RemoveSnapshotRequest, SnapshotProgress, TagSnapshotRequest, VerifySnapshotRequest,
};

use crate::connection::Connection;
use crate::{Client, Error};

/// A manifest of a large model, and the list of a large store.
const MESSAGE_BYTES_MAX: usize = 256 << 20;

impl Client {
    async fn snapshots(&self) -> Result<SnapshotsClient<Connection>, Error> {
        let client = SnapshotsClient::with_origin(self.connection().await?, self.origin());
        Ok(client.max_decoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// All snapshots that the daemon knows, the newest first; `with_residency`: and how much of each its node has.
    pub async fn list_snapshots(&self, with_residency: bool) -> Result<ListSnapshotsResponse, Error> {
        let request = ListSnapshotsRequest { with_residency };
        self.within(async { Ok(self.snapshots().await?.list_snapshots(request).await?.into_inner()) }).await
    }

    /// What a snapshot is made of.
    pub async fn inspect_snapshot(&self, snapshot: &str, with_tensors: bool) -> Result<InspectSnapshotResponse, Error> {
        let request = InspectSnapshotRequest { snapshot: snapshot.to_owned(), with_tensors };
        self.within(async { Ok(self.snapshots().await?.inspect_snapshot(request).await?.into_inner()) }).await
    }

    /// Has the daemon bring a snapshot into its memory or onto its disk; `report` sees each step. The last step, which says that all of
    /// it is there. The request has a deadline of its own. Dropped, what has begun goes on.
    pub async fn prewarm_snapshot(
        &self,
        request: PrewarmSnapshotRequest,
        mut report: impl FnMut(&PrewarmProgress),
    ) -> Result<PrewarmProgress, Error> {
        let mut steps =
            self.within(async { Ok(self.snapshots().await?.prewarm_snapshot(request).await?.into_inner()) }).await?;
        let mut last = PrewarmProgress::default();
        while let Some(step) = steps.message().await? {
            report(&step);
            last = step;
        }
        if last.ready { Ok(last) } else { Err(Error::Unavailable("the prewarm was cut off: prewarm it again".into())) }
    }

    /// Has the daemon read and verify a snapshot where it lies; `report` sees each step. The last step.
    pub async fn verify_snapshot(
        &self,
        snapshot: &str,
        mut report: impl FnMut(&SnapshotProgress),
    ) -> Result<SnapshotProgress, Error> {
        let request = VerifySnapshotRequest { snapshot: snapshot.to_owned() };
        let mut steps =
            self.within(async { Ok(self.snapshots().await?.verify_snapshot(request).await?.into_inner()) }).await?;
        let mut last = SnapshotProgress::default();
        while let Some(step) = steps.message().await? {
            report(&step);
            last = step;
        }
        if last.done { Ok(last) } else { Err(Error::Unavailable("the verification was cut off".into())) }
    }

    /// What differs between two snapshots.
    pub async fn diff_snapshots(&self, first: &str, second: &str) -> Result<DiffSnapshotsResponse, Error> {
        let request = DiffSnapshotsRequest { first: first.to_owned(), second: second.to_owned() };
        self.within(async { Ok(self.snapshots().await?.diff_snapshots(request).await?.into_inner()) }).await
    }

    /// Lets a name mean a snapshot; its id.
    pub async fn tag_snapshot(&self, snapshot: &str, name: &str) -> Result<String, Error> {
        let request = TagSnapshotRequest { snapshot: snapshot.to_owned(), name: name.to_owned() };
        self.within(async { Ok(self.snapshots().await?.tag_snapshot(request).await?.into_inner().id) }).await
    }

    /// Takes a name away, or removes a snapshot without one.
    pub async fn remove_snapshot(&self, snapshot: &str) -> Result<(), Error> {
        let request = RemoveSnapshotRequest { snapshot: snapshot.to_owned() };
        self.within(async {
            self.snapshots().await?.remove_snapshot(request).await?;
            Ok(())
        })
        .await
    }

    /// Has the daemon delete what no snapshot needs.
    pub async fn collect_snapshots(&self, keep_last: u32, dry_run: bool) -> Result<CollectSnapshotsResponse, Error> {
        let request = CollectSnapshotsRequest { keep_last, dry_run };
        self.within(async { Ok(self.snapshots().await?.collect_snapshots(request).await?.into_inner()) }).await
    }
}
