//! The gRPC services: each call is counted, timed, bounded by its deadline, and handed to its verb.

mod admin;
mod blocks;
mod data;
mod events;
mod get_body;
mod put_stream;
mod snapshots;

use std::sync::Arc;
use std::time::Duration;

use kvstore_proto::v1::admin_server::AdminServer;
use kvstore_proto::v1::blocks_server::BlocksServer;
use kvstore_proto::v1::events_server::EventsServer;
use kvstore_proto::v1::snapshots_server::SnapshotsServer;
use tonic::body::Body;
use tonic::service::interceptor::InterceptedService;
use tonic::service::{Routes, RoutesBuilder};
use tonic::{Code, Response, Status};
use tonic_health::pb::health_server::{Health, HealthServer};

use crate::caller::Caller;
use crate::caps;
use crate::daemon::{Daemon, InFlight};
use crate::{verbs, wire};

/// What every service of one listener shares.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) daemon: Arc<Daemon>,
    /// Whoever comes through this listener.
    pub(crate) caller: Caller,
}

impl Context {
    fn enter(&self) -> Result<InFlight, Status> {
        self.caller.check_blocks()?;
        self.daemon.enter().ok_or_else(wire::draining)
    }

    /// The time a call has: what it asks for, or the configured.
    fn deadline(&self, headers: &http::HeaderMap) -> Duration {
        wire::deadline_of(headers).unwrap_or_else(|| self.daemon.config().call_deadline)
    }

    /// See [`verbs::by_deadline`].
    async fn by_deadline<T>(
        &self,
        headers: &http::HeaderMap,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        verbs::by_deadline(self.deadline(headers), call).await.map(Response::new)
    }
}

/// A message that is too large, or that cannot be decoded, is the caller's mistake. What tonic refuses by itself has other codes, of
/// which no verb makes use: OUT_OF_RANGE, and INTERNAL, which blames the daemon.
pub(crate) fn blame_the_caller(mut response: http::Response<Body>) -> http::Response<Body> {
    if let Some(code) = response.headers_mut().get_mut(Status::GRPC_STATUS)
        && [Code::OutOfRange, Code::Internal].contains(&Code::from_bytes(code.as_bytes()))
    {
        *code = http::HeaderValue::from(Code::InvalidArgument as u16);
    }
    response
}

/// All services of one listener.
pub(crate) fn routes<H: Health>(context: &Context, health: HealthServer<H>) -> anyhow::Result<Routes> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(kvstore_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let mut routes = RoutesBuilder::default();
    routes.add_service(
        BlocksServer::new(context.clone())
            .max_decoding_message_size(caps::CONTROL_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(caps::CONTROL_MESSAGE_BYTES_MAX),
    );
    let caller = context.caller;
    // The one place where it is decided who administers the daemon.
    routes.add_service(InterceptedService::new(
        AdminServer::new(context.clone()).max_decoding_message_size(caps::CONTROL_MESSAGE_BYTES_MAX),
        move |request| caller.check_admin().map(|()| request),
    ));
    routes.add_service(InterceptedService::new(
        EventsServer::new(context.clone()).max_decoding_message_size(caps::CONTROL_MESSAGE_BYTES_MAX),
        move |request| caller.check_blocks().map(|()| request),
    ));
    routes.add_service(SnapshotsServer::new(context.clone()));
    routes.add_service(data::BlockDataService::new(context.clone()));
    routes.add_service(reflection);
    routes.add_service(health);
    Ok(routes.routes())
}
