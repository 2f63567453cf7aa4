//! `kvstore.v1.BlockData`: the bytes of blocks. It speaks gRPC as the generated services do, but works
//! directly on the connection's buffers: it does not gather incoming bytes into messages, and does not copy
//! outgoing bytes into them.

use std::convert::Infallible;
use std::task::{Context as TaskContext, Poll};
use std::time::Instant;

use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use kvstore_proto::data_stream::{self, Part, PartDecoder};
use kvstore_proto::v1::{GetRequest, PutResponse};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;

use super::get_body::GetBody;
use super::{Context, put_stream};
use crate::caps;
use crate::verbs::get;
use crate::wire;

/// The service of one listener.
#[derive(Clone)]
pub(crate) struct BlockDataService(Context);

impl BlockDataService {
    pub(crate) fn new(context: Context) -> Self {
        Self(context)
    }
}

impl NamedService for BlockDataService {
    const NAME: &'static str = "kvstore.v1.BlockData";
}

impl tower::Service<Request<Body>> for BlockDataService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let context = self.0.clone();
        Box::pin(async move {
            let answer = match request.uri().path() {
                "/kvstore.v1.BlockData/Put" => answer_put(&context, request).await,
                "/kvstore.v1.BlockData/Get" => answer_get(&context, request).await,
                path => Err(Status::unimplemented(format!("there is no method {path}"))),
            };
            Ok(answer.unwrap_or_else(|status| status.into_http()))
        })
    }
}

fn grpc(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

async fn answer_put(context: &Context, request: Request<Body>) -> Result<Response<Body>, Status> {
    let _call = context.enter()?;
    let started = Instant::now();
    let deadline = tokio::time::Instant::now() + context.deadline(request.headers());
    let response = put_stream::put(&context.daemon, context.caller.namespace, request.into_body(), deadline).await?;
    metrics::histogram!("kvstore_put_seconds").record(started.elapsed().as_secs_f64());
    Ok(grpc(unary(&response)))
}

fn unary(response: &PutResponse) -> Body {
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Frame::data(data_stream::message(response)), Frame::trailers(trailers)];
    Body::new(StreamBody::new(futures::stream::iter(frames.map(Ok::<_, Status>))))
}

async fn answer_get(context: &Context, request: Request<Body>) -> Result<Response<Body>, Status> {
    let call = context.enter()?;
    let deadline = tokio::time::Instant::now() + context.deadline(request.headers());
    let asked = tokio::time::timeout_at(deadline, one_message(request.into_body()))
        .await
        .map_err(|_| Status::deadline_exceeded("the call's deadline passed before its request arrived"))??;
    let get = get::get(&context.daemon, context.caller.namespace, asked, deadline)?;
    Ok(grpc(Body::new(GetBody::new(&context.daemon, get, deadline, call))))
}

async fn one_message(mut body: Body) -> Result<GetRequest, Status> {
    let mut decoder = PartDecoder::new();
    let mut received = 0;
    while let Some(frame) = body.frame().await {
        let Ok(bytes) = frame?.into_data() else { continue };
        received += bytes.len();
        if received > caps::CONTROL_MESSAGE_BYTES_MAX {
            let problem =
                format!("the request is too large: it may have at most {} bytes", caps::CONTROL_MESSAGE_BYTES_MAX);
            return Err(Status::invalid_argument(problem));
        }
        decoder.push(bytes);
        match decoder.next_part::<GetRequest>().map_err(|error| Status::invalid_argument(error.to_string()))? {
            Some(Part::Message(message)) => return Ok(message),
            Some(Part::Data(_)) => return Err(wire::invalid("request", "the message is not a GetRequest")),
            None => {}
        }
    }
    Err(wire::invalid("request", "the GetRequest is missing"))
}
