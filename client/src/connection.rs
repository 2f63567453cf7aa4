//! One HTTP/2 connection to a daemon, made when it is needed and made again when it broke.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kvstore_proto::v1::Layout;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;
use tonic::body::Body;

use crate::Error;
use crate::caps::{FILES_KEPT_MAX, FILES_KEPT_PARTS};
use crate::local::{Attachment, forks};

/// What the daemon may send on one stream before it is read: hides the latency of a wake-up.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// The same for the connection.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Bytes of an HTTP/2 frame.
const FRAME_BYTES: u32 = 256 << 10;
/// A daemon that says nothing for this long is asked whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A daemon that was away is tried again after this long ...
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
/// ... and twice as long each time, up to this.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long a call may take unless [`Client::with_deadline`] says otherwise.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug)]
enum Target {
    Unix(PathBuf),
    Tcp(String),
}

impl Target {
    fn parse(address: &str) -> Result<Self, Error> {
        let wrong = || Error::Address(address.to_owned());
        if let Some(path) = address.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(wrong()) };
        }
        let authority = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
        let port = authority.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        port.map(|_| Self::Tcp(authority.to_owned())).ok_or_else(wrong)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(authority) => write!(f, "http://{authority}"),
        }
    }
}

/// A connection that calls share, safely: cheap to clone.
#[derive(Clone)]
pub(crate) struct Connection {
    sender: SendRequest<Body>,
}

impl tower::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Response<Incoming>, hyper::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.sender.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}

/// Which way a client goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Plane {
    /// The local plane where the daemon offers it, gRPC for what it does not carry.
    #[default]
    Auto,
    /// The local plane, or an error.
    Local,
    /// gRPC alone.
    Grpc,
}

/// A client of one daemon, in one namespace: that of the socket it connects to. Cheap to clone; clones
/// share the connection.
///
/// It survives the daemon: a call while the daemon is away fails with [`Error::Unavailable`], at once while it was away a
/// moment ago; once it is back, the next call connects, registers the layouts that this client registered, and finds what
/// is lost as misses. It survives a fork: the child connects anew.
#[derive(Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    deadline: Duration,
}

pub(crate) struct Shared {
    target: Target,
    pub(crate) plane: Plane,
    /// Files of the daemon's memory that the local plane keeps: see [`Client::connect_to_map`].
    files_kept: usize,
    life: ArcSwap<Life>,
    /// What every read passes; a child finds its parent's here, which says that it is not its own.
    local: ArcSwapOption<Attachment>,
    /// Every layout that was registered, by digest: to be registered again with the next daemon.
    pub(crate) layouts: ArcSwap<HashMap<Bytes, Layout>>,
}

/// What belongs to one process: connections and mappings are not inherited by a child.
pub(crate) struct Life {
    forks: u64,
    connection: Mutex<Dialled>,
    attaching: parking_lot::Mutex<Backoff>,
}

#[derive(Default)]
struct Dialled {
    connection: Option<Connection>,
    backoff: Backoff,
}

/// When the next try is worth making.
#[derive(Default)]
struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// How long to wait yet.
    fn left(&self) -> Option<Duration> {
        self.until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    fn failed(&mut self) {
        self.until = Some(Instant::now() + (BACKOFF_FIRST * 2u32.pow(self.failures.min(10))).min(BACKOFF_MAX));
        self.failures += 1;
    }
}

impl Life {
    fn new() -> Arc<Self> {
        Arc::new(Self { forks: forks(), connection: Mutex::default(), attaching: parking_lot::Mutex::default() })
    }
}

impl Client {
    /// Connects to `unix:/path/to/socket` or `http://host:port`. On a Unix socket, blocks go over the local plane where the
    /// daemon offers it.
    pub async fn connect(address: &str) -> Result<Self, Error> {
        Self::connect_over(address, Plane::Auto).await
    }

    /// A client that connects over gRPC with its first call, and again with any later one: for a daemon that may be away.
    pub fn lazy(address: &str) -> Result<Self, Error> {
        Ok(Self::of(Target::parse(address)?, Plane::Grpc, 0))
    }

    /// As [`Self::connect`], for a client whose leased blocks are mapped once more ([`crate::JoinedBlocks`]): it keeps a descriptor of each
    /// slab, up to a quarter of those that the process may have.
    pub async fn connect_to_map(address: &str) -> Result<Self, Error> {
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let files_kept = (most / FILES_KEPT_PARTS).min(FILES_KEPT_MAX);
        Self::of(Target::parse(address)?, Plane::Auto, files_kept as usize).connected().await
    }

    fn of(target: Target, plane: Plane, files_kept: usize) -> Self {
        let life = ArcSwap::new(Life::new());
        let shared =
            Shared { target, plane, files_kept, life, local: ArcSwapOption::empty(), layouts: ArcSwap::default() };
        Self { shared: Arc::new(shared), deadline: DEADLINE }
    }

    /// As [`Self::connect`], over this plane.
    pub async fn connect_over(address: &str, plane: Plane) -> Result<Self, Error> {
        let target = Target::parse(address)?;
        if plane == Plane::Local && matches!(target, Target::Tcp(_)) {
            return Err(Error::Unsupported(format!("{target} has no local plane; connect to a Unix socket")));
        }
        Self::of(target, plane, 0).connected().await
    }

    async fn connected(self) -> Result<Self, Error> {
        // Attached, it dials for gRPC when a call needs that.
        if self.attached_for_calls()?.is_none() {
            self.within(self.connection()).await?;
        }
        Ok(self)
    }

    /// The same client, whose calls end after `deadline`.
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// True while blocks go over the local plane.
    pub fn is_local(&self) -> bool {
        self.attached().is_some()
    }

    /// What belongs to this process.
    fn life(&self) -> Arc<Life> {
        let life = self.shared.life.load_full();
        if life.forks == forks() {
            return life;
        }
        // A child: what the parent had is the parent's, and is not even to be dropped here.
        let new = Life::new();
        std::mem::forget(self.shared.life.swap(Arc::clone(&new)));
        std::mem::forget(life);
        new
    }

    /// The attachment that calls go over; `None` where they go over gRPC for now.
    pub(crate) fn attached_for_calls(&self) -> Result<Option<Arc<Attachment>>, Error> {
        match self.shared.plane {
            Plane::Grpc => Ok(None),
            Plane::Local => self.attach().map(Some),
            Plane::Auto => Ok(self.attach().ok().filter(|attachment| !attachment.is_draining())),
        }
    }

    /// The attachment to the local plane; `None` where blocks go over gRPC for now.
    pub(crate) fn attached(&self) -> Option<Arc<Attachment>> {
        if self.shared.plane == Plane::Grpc {
            return None;
        }
        self.attach().ok()
    }

    fn live_attachment(&self) -> Option<Arc<Attachment>> {
        let attachment = self.shared.local.load();
        attachment.as_ref().filter(|attachment| attachment.is_live()).map(Arc::clone)
    }

    fn set_attachment(&self, attachment: Option<Arc<Attachment>>) {
        if let Some(old) = self.shared.local.swap(attachment)
            && !old.is_ours()
        {
            // The parent's, and not even to be dropped here.
            std::mem::forget(old);
        }
    }

    /// The same, or why there is none.
    pub(crate) fn attach(&self) -> Result<Arc<Attachment>, Error> {
        if let Some(attachment) = self.live_attachment() {
            return Ok(attachment);
        }
        let life = self.life();
        let Target::Unix(path) = &self.shared.target else {
            return Err(Error::Unsupported(format!(
                "{} has no local plane; connect to a Unix socket",
                self.shared.target
            )));
        };
        let mut backoff = life.attaching.lock();
        if let Some(attachment) = self.live_attachment() {
            return Ok(attachment);
        }
        if let Some(left) = backoff.left() {
            return Err(Error::Unavailable(format!(
                "the local plane did not answer a moment ago; the client tries again in {left:?}"
            )));
        }
        let mut plane = path.as_os_str().to_owned();
        plane.push(kvstore_plane::SOCKET_SUFFIX);
        match Attachment::open(std::path::Path::new(&plane), self.shared.files_kept) {
            Ok(attachment) => {
                *backoff = Backoff::default();
                self.set_attachment(Some(Arc::clone(&attachment)));
                Ok(attachment)
            }
            Err(error) => {
                backoff.failed();
                self.set_attachment(None);
                Err(error)
            }
        }
    }

    pub(crate) async fn connection(&self) -> Result<Connection, Error> {
        let life = self.life();
        let mut slot = life.connection.lock().await;
        if let Some(connection) = slot.connection.as_ref().filter(|connection| !connection.sender.is_closed()) {
            return Ok(connection.clone());
        }
        if let Some(left) = slot.backoff.left() {
            let target = &self.shared.target;
            return Err(Error::Unavailable(format!(
                "no daemon answered at {target} a moment ago; the client tries again in {left:?}"
            )));
        }
        match self.dial().await {
            Ok(connection) => {
                *slot = Dialled { connection: Some(connection.clone()), backoff: Backoff::default() };
                Ok(connection)
            }
            Err(error) => {
                slot.backoff.failed();
                Err(error)
            }
        }
    }

    async fn dial(&self) -> Result<Connection, Error> {
        let failed = |error: std::io::Error| {
            Error::Unavailable(format!(
                "no daemon answers at {}: {error}; start one with `kvstore serve`",
                self.shared.target
            ))
        };
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_send_buf_size(FRAME_BYTES as usize * 4)
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        let sender = match &self.shared.target {
            Target::Unix(path) => {
                let io = UnixStream::connect(path).await.map_err(failed)?;
                let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
                tokio::spawn(connection);
                sender
            }
            Target::Tcp(authority) => {
                let io = TcpStream::connect(authority).await.map_err(failed)?;
                io.set_nodelay(true).map_err(failed)?;
                let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
                tokio::spawn(connection);
                sender
            }
        };
        Ok(Connection { sender })
    }

    pub(crate) fn origin(&self) -> Uri {
        Uri::from_static("http://kvstore")
    }

    /// Ends `call` at the deadline.
    pub(crate) async fn within<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let late = || Error::Deadline(format!("the daemon did not answer within {:?}", self.deadline));
        tokio::time::timeout(self.deadline, call).await.map_err(|_| late())?
    }

    /// The deadline as gRPC writes it.
    pub(crate) fn grpc_timeout(&self) -> String {
        format!("{}m", self.deadline.as_millis().clamp(1, 99_999_999))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_or_refused_by_name() {
        for good in
            ["unix:/run/a.sock", "unix:///run/a.sock", "http://127.0.0.1:1", "localhost:7540", "http://[::1]:9/"]
        {
            Target::parse(good).unwrap();
        }
        for bad in ["", "unix:a.sock", "http://host", "/run/a.sock", "host:port"] {
            let error = Target::parse(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")) && error.contains("unix:/path"), "{error}");
        }
    }
}
