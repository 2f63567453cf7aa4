//! `kvstore.v1.Snapshots`: snapshots in the object store, and their chunks on this node.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use kvstore_proto::v1::snapshots_server::Snapshots;
use kvstore_proto::v1::{
    CollectSnapshotsRequest, CollectSnapshotsResponse, DiffSnapshotsRequest, DiffSnapshotsResponse,
    InspectSnapshotRequest, InspectSnapshotResponse, ListSnapshotsRequest, ListSnapshotsResponse, PrewarmProgress,
    PrewarmSnapshotRequest, RemoveSnapshotRequest, RemoveSnapshotResponse, SnapshotProgress, TagSnapshotRequest,
    TagSnapshotResponse, VerifySnapshotRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Context;
use crate::verbs::{self, prewarm, snapshots};

type Answer<T> = Result<Response<T>, Status>;
type Reports<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn reports<T: Send + 'static>(receiver: mpsc::Receiver<Result<T, Status>>) -> Response<Reports<T>> {
    Response::new(Box::pin(ReceiverStream::new(receiver)))
}

#[tonic::async_trait]
impl Snapshots for Context {
    async fn list_snapshots(&self, request: Request<ListSnapshotsRequest>) -> Answer<ListSnapshotsResponse> {
        let _call = self.enter()?;
        let call = snapshots::list(&self.daemon, self.caller.namespace, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }

    async fn inspect_snapshot(&self, request: Request<InspectSnapshotRequest>) -> Answer<InspectSnapshotResponse> {
        let _call = self.enter()?;
        let call = snapshots::inspect(&self.daemon, self.caller.namespace, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }

    type PrewarmSnapshotStream = Reports<PrewarmProgress>;

    async fn prewarm_snapshot(&self, request: Request<PrewarmSnapshotRequest>) -> Answer<Self::PrewarmSnapshotStream> {
        let call = self.enter()?;
        let wanted = prewarm::wanted(&self.daemon, request.into_inner())?;
        let (sender, receiver) = mpsc::channel(1);
        let (daemon, namespace) = (Arc::clone(&self.daemon), self.caller.namespace);
        tokio::spawn(async move {
            let _call = call;
            prewarm::prewarm(daemon, namespace, wanted, sender).await;
        });
        Ok(reports(receiver))
    }

    type VerifySnapshotStream = Reports<SnapshotProgress>;

    async fn verify_snapshot(&self, request: Request<VerifySnapshotRequest>) -> Answer<Self::VerifySnapshotStream> {
        let call = self.enter()?;
        let permit = Arc::clone(&self.daemon.snapshot_verifications).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("a snapshot is being verified already: try again when that has ended")
        })?;
        let store = snapshots::store(&self.daemon)?.clone();
        let time = self.deadline(request.metadata().as_ref());
        let commit = verbs::by_deadline(time, snapshots::commit(&store, &request.get_ref().snapshot)).await?;
        let (sender, receiver) = mpsc::channel(1);
        let daemon = Arc::clone(&self.daemon);
        tokio::spawn(async move {
            let (_call, _permit) = (call, permit);
            snapshots::verify(&daemon, store, commit, sender).await;
        });
        Ok(reports(receiver))
    }

    async fn diff_snapshots(&self, request: Request<DiffSnapshotsRequest>) -> Answer<DiffSnapshotsResponse> {
        let _call = self.enter()?;
        let call = snapshots::diff(&self.daemon, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }

    async fn tag_snapshot(&self, request: Request<TagSnapshotRequest>) -> Answer<TagSnapshotResponse> {
        self.caller.check_admin()?;
        let _call = self.enter()?;
        let call = snapshots::tag(&self.daemon, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }

    async fn remove_snapshot(&self, request: Request<RemoveSnapshotRequest>) -> Answer<RemoveSnapshotResponse> {
        self.caller.check_admin()?;
        let _call = self.enter()?;
        let call = snapshots::remove(&self.daemon, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }

    async fn collect_snapshots(&self, request: Request<CollectSnapshotsRequest>) -> Answer<CollectSnapshotsResponse> {
        self.caller.check_admin()?;
        let _call = self.enter()?;
        let call = snapshots::collect(&self.daemon, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }
}
