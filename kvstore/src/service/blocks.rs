//! `kvstore.v1.Blocks`: everything about blocks but their bytes.

use std::pin::Pin;
use std::time::Instant;

use futures::Stream;
use kvstore_proto::v1::blocks_server::Blocks;
use kvstore_proto::v1::{
    CancelPrefetchRequest, CancelPrefetchResponse, DeleteRequest, DeleteResponse, DescribeBlocksRequest,
    DescribeBlocksResponse, LookupRequest, LookupResponse, PinRequest, PinResponse, PrefetchProgress, PrefetchRequest,
    PrefetchResponse, RegisterLayoutRequest, RegisterLayoutResponse, ReleaseTicketRequest, ReleaseTicketResponse,
    UnpinRequest, UnpinResponse, WatchPrefetchRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Context;
use crate::verbs::{delete, describe, lookup, pin, prefetch, register_layout};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Blocks for Context {
    async fn register_layout(&self, request: Request<RegisterLayoutRequest>) -> Answer<RegisterLayoutResponse> {
        let _call = self.enter()?;
        register_layout::register_layout(&self.daemon, self.caller.namespace, request.into_inner()).map(Response::new)
    }

    async fn lookup(&self, request: Request<LookupRequest>) -> Answer<LookupResponse> {
        let _call = self.enter()?;
        let started = Instant::now();
        let answer = match lookup::may_wait(&self.daemon, request.get_ref()) {
            true => {
                let call = lookup::lookup_patiently(&self.daemon, self.caller.namespace, request.get_ref());
                self.by_deadline(request.metadata().as_ref(), call).await
            }
            false => lookup::lookup(&self.daemon, self.caller.namespace, request.get_ref()).map(Response::new),
        };
        metrics::histogram!("kvstore_lookup_seconds").record(started.elapsed().as_secs_f64());
        answer
    }

    async fn release_ticket(&self, request: Request<ReleaseTicketRequest>) -> Answer<ReleaseTicketResponse> {
        let _call = self.enter()?;
        lookup::release_ticket(&self.daemon, self.caller.namespace, request.get_ref()).map(Response::new)
    }

    async fn prefetch(&self, request: Request<PrefetchRequest>) -> Answer<PrefetchResponse> {
        let _call = self.enter()?;
        prefetch::prefetch(&self.daemon, self.caller.namespace, request.get_ref()).map(Response::new)
    }

    type WatchPrefetchStream = Pin<Box<dyn Stream<Item = Result<PrefetchProgress, Status>> + Send>>;

    async fn watch_prefetch(&self, request: Request<WatchPrefetchRequest>) -> Answer<Self::WatchPrefetchStream> {
        let call = self.enter()?;
        let deadline = tokio::time::Instant::now() + self.deadline(request.metadata().as_ref());
        let id = prefetch::watched(request.get_ref())?;
        prefetch::progress(&self.daemon, self.caller.namespace, id)?;
        let (sender, receiver) = mpsc::channel(1);
        let context = self.clone();
        tokio::spawn(async move {
            let _call = call;
            let watch = async {
                loop {
                    let report = prefetch::progress(&context.daemon, context.caller.namespace, id);
                    let last = report.as_ref().map_or(true, |(_, last)| *last);
                    let sent = sender.send(report.map(|(progress, _)| progress)).await;
                    if last || sent.is_err() {
                        return;
                    }
                    prefetch::until_next().await;
                }
            };
            if tokio::time::timeout_at(deadline, watch).await.is_err() {
                let _ = sender.try_send(Err(Status::deadline_exceeded(
                    "the deadline of the watch passed before the prefetch ended: watch it again",
                )));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_prefetch(&self, request: Request<CancelPrefetchRequest>) -> Answer<CancelPrefetchResponse> {
        let _call = self.enter()?;
        prefetch::cancel(&self.daemon, self.caller.namespace, request.get_ref()).map(Response::new)
    }

    async fn pin(&self, request: Request<PinRequest>) -> Answer<PinResponse> {
        let _call = self.enter()?;
        let call = pin::pin(&self.daemon, self.caller.namespace, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }

    async fn unpin(&self, request: Request<UnpinRequest>) -> Answer<UnpinResponse> {
        let _call = self.enter()?;
        pin::unpin(&self.daemon, self.caller.namespace, request.get_ref()).map(Response::new)
    }

    async fn describe_blocks(&self, request: Request<DescribeBlocksRequest>) -> Answer<DescribeBlocksResponse> {
        let _call = self.enter()?;
        describe::describe(&self.daemon, self.caller.namespace, request.into_inner()).map(Response::new)
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Answer<DeleteResponse> {
        let _call = self.enter()?;
        let call = delete::delete(&self.daemon, self.caller.namespace, request.get_ref());
        self.by_deadline(request.metadata().as_ref(), call).await
    }
}
