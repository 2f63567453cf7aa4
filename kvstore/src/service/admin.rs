//! `kvstore.v1.Admin`: the calls of an operator to one daemon. They work while the daemon drains.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use kvstore_proto::v1::admin_server::Admin;
use kvstore_proto::v1::{
    AccessesChunk, AccessesRequest, CollectProgress, CollectRequest, DrainRequest, DrainResponse, GetConfigRequest,
    GetConfigResponse, ReloadConfigRequest, ReloadConfigResponse, SetConfigRequest, SetConfigResponse, StatusRequest,
    StatusResponse, VerifyProgress, VerifyRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Context;
use crate::caps;
use crate::config::{Change, ConfigError};
use crate::status;
use crate::verbs::{collect, verify};

type Answer<T> = Result<Response<T>, Status>;

fn changes(changes: Result<Vec<Change>, ConfigError>) -> Result<Vec<String>, Status> {
    let changes = changes.map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok(changes.iter().map(ToString::to_string).collect())
}

#[tonic::async_trait]
impl Admin for Context {
    async fn status(&self, _: Request<StatusRequest>) -> Answer<StatusResponse> {
        Ok(Response::new(status::status(&self.daemon)))
    }

    async fn get_config(&self, _: Request<GetConfigRequest>) -> Answer<GetConfigResponse> {
        Ok(Response::new(GetConfigResponse { toml: self.daemon.config_toml() }))
    }

    async fn set_config(&self, request: Request<SetConfigRequest>) -> Answer<SetConfigResponse> {
        let values: Vec<_> = request.into_inner().values.into_iter().collect();
        let changes = changes(self.daemon.set_config(&values))?;
        Ok(Response::new(SetConfigResponse { changes }))
    }

    async fn reload_config(&self, _: Request<ReloadConfigRequest>) -> Answer<ReloadConfigResponse> {
        let changes = changes(self.daemon.reload())?;
        Ok(Response::new(ReloadConfigResponse { changes }))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Answer<DrainResponse> {
        let deadline = match request.get_ref().deadline_ms {
            0 => self.daemon.config().drain_deadline,
            ms => Duration::from_millis(ms.into()).min(caps::DEADLINE_MAX),
        };
        let in_flight = self.daemon.drain(deadline).await;
        Ok(Response::new(DrainResponse { drained: in_flight == 0, in_flight }))
    }

    type VerifyStream = Pin<Box<dyn Stream<Item = Result<VerifyProgress, Status>> + Send>>;

    async fn verify(&self, _: Request<VerifyRequest>) -> Answer<Self::VerifyStream> {
        let permit = Arc::clone(&self.daemon.verifications).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("a verification is already in progress: try again when it has ended")
        })?;
        let (sender, receiver) = mpsc::channel(1);
        let daemon = Arc::clone(&self.daemon);
        tokio::spawn(async move {
            verify::verify(daemon, sender).await;
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(Ok))))
    }

    type CollectStream = Pin<Box<dyn Stream<Item = Result<CollectProgress, Status>> + Send>>;

    async fn collect(&self, request: Request<CollectRequest>) -> Answer<Self::CollectStream> {
        let rules = collect::rules(request.into_inner())?;
        let permit = Arc::clone(&self.daemon.collections).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("this daemon is already collecting: try again when it has finished")
        })?;
        let (sender, receiver) = mpsc::channel(1);
        let daemon = Arc::clone(&self.daemon);
        tokio::spawn(async move {
            collect::collect(daemon, rules, sender).await;
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type AccessesStream = Pin<Box<dyn Stream<Item = Result<AccessesChunk, Status>> + Send>>;

    async fn accesses(&self, _: Request<AccessesRequest>) -> Answer<Self::AccessesStream> {
        let chunks = self.daemon.accesses.chunks();
        Ok(Response::new(Box::pin(futures::stream::iter(chunks.into_iter().map(Ok)))))
    }
}
