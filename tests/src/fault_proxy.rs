//! A proxy in front of an object store that does to requests what networks, load balancers and stores do to them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::sync::Mutex;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

type ProxyClient = Client<HttpConnector, ProxyBody>;
type ProxyBody = http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>;

/// What is done to one request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Nothing.
    None,
    /// The store answers so, and does nothing.
    Status(u16),
    /// The answer comes so much later.
    Delay(Duration),
    /// The connection is closed in the middle of the answer's body, or instead of the answer.
    Reset,
    /// The body ends early, as if that were all of it.
    Truncate,
    /// A bit of the body is flipped: of an object's that is read, or written.
    Flip,
    /// The store does what it was asked for, and the answer is lost: a repeated create is then refused (412).
    LostReply,
    /// The body comes a few bytes at a time.
    Slow,
}

/// Which requests are meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Meant {
    /// All.
    Any,
    /// Objects' bodies on their way from the store.
    Reads,
    /// Objects on their way to it.
    Writes,
    /// Those whose names end so.
    WritesOf(&'static str),
}

impl Meant {
    fn means(self, request: &Request<Incoming>) -> bool {
        match self {
            Self::Any => true,
            Self::Reads => request.method() == Method::GET,
            Self::Writes => request.method() == Method::PUT,
            Self::WritesOf(end) => request.method() == Method::PUT && request.uri().path().ends_with(end),
        }
    }
}

/// What happens, in order: each entry to the next request that it means. What is left over is done to no one.
#[derive(Default)]
struct Plan {
    next: VecDeque<(Meant, Fault)>,
    /// Every request, until this is taken back.
    always: Option<(Meant, Fault)>,
}

/// It runs until it is dropped.
pub struct FaultProxy {
    /// Where it listens.
    pub address: SocketAddr,
    plan: Arc<Mutex<Plan>>,
    done: Arc<AtomicU64>,
    read_bytes: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FaultProxy {
    /// A proxy to `store`, in the current runtime.
    pub async fn start(store: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (plan, done) = (Arc::new(Mutex::new(Plan::default())), Arc::new(AtomicU64::new(0)));
        let read_bytes = Arc::new(AtomicU64::new(0));
        let client: ProxyClient = Client::builder(TokioExecutor::new()).build_http();
        let task = tokio::spawn({
            let (plan, done, read_bytes) = (Arc::clone(&plan), Arc::clone(&done), Arc::clone(&read_bytes));
            async move {
                while let Ok((socket, _)) = listener.accept().await {
                    let (plan, done, client) = (Arc::clone(&plan), Arc::clone(&done), client.clone());
                    let read_bytes = Arc::clone(&read_bytes);
                    let serve = service_fn(move |request: Request<Incoming>| {
                        let (plan, done, client) = (Arc::clone(&plan), Arc::clone(&done), client.clone());
                        let read_bytes = Arc::clone(&read_bytes);
                        async move {
                            let fault = next_fault(&plan, &request);
                            done.fetch_add(u64::from(fault != Fault::None), Ordering::Relaxed);
                            let is_read = request.method() == Method::GET;
                            let answer = forward(store, client, request, fault).await?;
                            if is_read {
                                read_bytes.fetch_add(answer.size_hint().lower(), Ordering::Relaxed);
                            }
                            Ok::<_, std::io::Error>(answer)
                        }
                    });
                    tokio::spawn(async move {
                        // Faults end connections.
                        let _ = hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(socket), serve)
                            .await;
                    });
                }
            }
        });
        Self { address, plan, done, read_bytes, task }
    }

    /// These faults come next, one a request that is meant.
    pub fn plan(&self, faults: impl IntoIterator<Item = (Meant, Fault)>) {
        self.plan.lock().unwrap().next.extend(faults);
    }

    /// This is done to every request from now on; `None` ends it.
    pub fn always(&self, fault: Option<(Meant, Fault)>) {
        self.plan.lock().unwrap().always = fault;
    }

    /// What was planned and not done is taken back.
    pub fn forget(&self) {
        *self.plan.lock().unwrap() = Plan::default();
    }

    /// Bytes of the bodies of answers to reads, of objects and listings, as far as their length was said.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Faults that were done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

fn next_fault(plan: &Mutex<Plan>, request: &Request<Incoming>) -> Fault {
    let mut plan = plan.lock().unwrap();
    if let Some((_, fault)) = plan.always.filter(|(meant, _)| meant.means(request)) {
        return fault;
    }
    match plan.next.front() {
        Some((meant, _)) if meant.means(request) => plan.next.pop_front().map_or(Fault::None, |(_, fault)| fault),
        _ => Fault::None,
    }
}

fn broken() -> std::io::Error {
    std::io::Error::from(std::io::ErrorKind::ConnectionReset)
}

async fn forward(
    store: SocketAddr,
    client: ProxyClient,
    mut request: Request<Incoming>,
    fault: Fault,
) -> Result<Response<ProxyBody>, std::io::Error> {
    if let Fault::Status(status) = fault {
        let answer = Response::builder().status(StatusCode::from_u16(status).unwrap());
        let body = http_body_util::Full::new(Bytes::from_static(b"<Error><Code>Injected</Code></Error>"));
        // The request is read first, or the client sees a broken pipe instead of the answer.
        let _ = request.into_body().collect().await;
        return Ok(answer.body(body.map_err(|never| match never {}).boxed_unsync()).unwrap());
    }
    let is_read = request.method() == Method::GET;
    if fault == Fault::Reset && !is_read {
        return Err(broken());
    }
    // The Host header stays: it is signed.
    *request.uri_mut() = format!("http://{store}{}", request.uri().path_and_query().unwrap()).parse().unwrap();
    let (head, body) = request.into_parts();
    let body = match fault {
        Fault::Flip if head.method == Method::PUT => {
            full(flipped(&body.collect().await.map_err(|_| broken())?.to_bytes()))
        }
        _ => body.map_err(|_| broken()).boxed_unsync(),
    };
    let answer = client.request(Request::from_parts(head, body)).await.map_err(|_| broken())?;
    match fault {
        Fault::LostReply => {
            let _ = answer.into_body().collect().await;
            return Err(broken());
        }
        Fault::Delay(time) => tokio::time::sleep(time).await,
        _ => {}
    }
    let (mut head, body) = answer.into_parts();
    if !is_read || matches!(fault, Fault::None | Fault::Delay(_)) {
        return Ok(Response::from_parts(head, body.map_err(|_| broken()).boxed_unsync()));
    }
    let whole = body.collect().await.map_err(|_| broken())?.to_bytes();
    let body = match fault {
        Fault::Truncate => {
            let kept = whole.slice(..whole.len() / 2);
            head.headers.insert(http::header::CONTENT_LENGTH, kept.len().into());
            full(kept)
        }
        Fault::Flip => full(flipped(&whole)),
        Fault::Reset => {
            let kept = whole.slice(..whole.len() / 2);
            let frames = vec![Ok(Frame::data(kept)), Err(broken())];
            StreamBody::new(futures::stream::iter(frames)).boxed_unsync()
        }
        _ => {
            let pieces: Vec<Bytes> = whole.chunks((whole.len() / 20).max(1)).map(Bytes::copy_from_slice).collect();
            let slowly = futures::stream::unfold(pieces.into_iter(), |mut left| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                left.next().map(|piece| (Ok(Frame::data(piece)), left))
            });
            StreamBody::new(Box::pin(slowly)).boxed_unsync()
        }
    };
    Ok(Response::from_parts(head, body))
}

fn flipped(whole: &[u8]) -> Bytes {
    let mut flipped = whole.to_vec();
    let at = flipped.len() * 2 / 3;
    if let Some(byte) = flipped.get_mut(at) {
        *byte ^= 4;
    }
    flipped.into()
}

fn full(bytes: Bytes) -> ProxyBody {
    http_body_util::Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}
