//! `kvstore.v1.Events`: the changes of blocks, for routers that follow this node.

use std::pin::Pin;

use futures::Stream;
use kvstore_proto::v1::events_server::Events;
use kvstore_proto::v1::{WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Context;
use crate::caps;
use crate::verbs::watch::Follower;

#[tonic::async_trait]
impl Events for Context {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let permit = std::sync::Arc::clone(&self.daemon.watches).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{} routers watch this node, which is the maximum: try again later",
                caps::WATCHES_MAX
            ))
        })?;
        let (sender, receiver) = mpsc::channel(1);
        let follower = Follower::new(self.daemon.clone(), self.caller.namespace, sender);
        tokio::spawn(async move {
            follower.follow(request.into_inner()).await;
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
