//! Listeners: sockets, their folders, the bound on connections, and the servers behind them.

use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use futures::Stream;
use futures::stream;
use kvstore_proto::v1::admin_server::AdminServer;
use kvstore_proto::v1::blocks_server::BlocksServer;
use kvstore_proto::v1::events_server::EventsServer;
use kvstore_tiers::claim::{self, Claim, ClaimError, SocketFile};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tower::layer::layer_fn;
use tower::util::MapResponseLayer;

use crate::authority::AnyAuthority;
use crate::caller::{Caller, Proof, Rights};
use crate::caps;
use crate::config::{Address, Listener};
use crate::connections::{Connection, KeepPlace, Place, Places};
use crate::daemon::Daemon;
use crate::local::{PlaneListener, plane_path};
use crate::service::{self, Context};

/// A listener that is bound and not yet served.
pub struct BoundListener {
    /// Where, as clients name it: a TCP port 0 is the chosen one here.
    pub address: String,
    /// The local plane's listener beside it.
    pub plane: Option<PlaneListener>,
    /// Held until both sockets are gone.
    pub claim: Option<Claim>,
    listener: Listener,
    socket: Socket,
}

impl BoundListener {
    /// Whoever comes through it.
    pub fn caller(&self, daemon: &Daemon) -> anyhow::Result<Caller> {
        let namespace = daemon.namespace(&self.listener.namespace).context("the namespace is not configured")?;
        let proof = match &self.socket {
            Socket::Unix(..) => Proof::Socket,
            Socket::Tcp(_) => Proof::Loopback,
        };
        Ok(Caller { namespace, proof, rights: Rights::ALL })
    }
}

enum Socket {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener),
}

/// Binds a listener and, where `local_plane` says so, the local plane's beside a Unix socket. The socket's folder is made,
/// and must be this user's alone.
pub async fn bind(listener: &Listener, local_plane: bool) -> anyhow::Result<BoundListener> {
    let listener = listener.clone();
    match &listener.address {
        Address::Unix(path) => {
            let address = format!("unix:{}", path.display());
            let (claim, plane, socket) =
                bind_unix(path, local_plane).with_context(|| format!("cannot listen on {address}"))?;
            Ok(BoundListener { address, plane, claim: Some(claim), listener, socket })
        }
        Address::Tcp(address) => {
            let socket = TcpListener::bind(address).await;
            let socket =
                socket.with_context(|| format!("cannot listen on {address} (choose another address with --listen)"))?;
            let address = format!("http://{}", socket.local_addr()?);
            Ok(BoundListener { address, plane: None, claim: None, listener, socket: Socket::Tcp(socket) })
        }
    }
}

fn bind_unix(path: &Path, local_plane: bool) -> anyhow::Result<(Claim, Option<PlaneListener>, Socket)> {
    claim::private_folder(path.parent().unwrap_or(Path::new("/")))?;
    let claim = Claim::beside(path).map_err(taken)?;
    claim::clear_dead_socket(path).map_err(taken)?;
    // Before the other, so that whoever finds a daemon finds its local plane.
    let plane = if local_plane { bind_plane(path).context("cannot listen for the local plane")? } else { None };
    let (socket, file) = claim::listen(path).map_err(taken)?;
    Ok((claim, plane, Socket::Unix(UnixListener::from_std(socket)?, file)))
}

/// What an operator can do where another daemon has the path.
fn taken(error: ClaimError) -> anyhow::Error {
    match error {
        ClaimError::Taken { pid, .. } => {
            let process = pid.map(|pid| format!(" (process {pid})")).unwrap_or_default();
            anyhow::anyhow!("another daemon serves there{process}: stop it, or choose another socket with --listen")
        }
        other => other.into(),
    }
}

fn bind_plane(path: &Path) -> anyhow::Result<Option<PlaneListener>> {
    let path = plane_path(path);
    // sun_path has 108 bytes with its final zero.
    if path.as_os_str().len() > 107 {
        tracing::warn!(path = %path.display(), "a listener has no local plane, because the path of its socket would be longer than 107 bytes");
        return Ok(None);
    }
    PlaneListener::bind(&path).map(Some)
}

/// Serves a listener, and so many connections at once, until `stop` says so; calls under way are finished.
pub async fn serve(
    daemon: Arc<Daemon>,
    bound: BoundListener,
    places: usize,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let caller = bound.caller(&daemon)?;
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<BlocksServer<Context>>().await;
    health.set_serving::<AdminServer<Context>>().await;
    health.set_serving::<EventsServer<Context>>().await;
    health.set_service_status("kvstore.v1.BlockData", tonic_health::ServingStatus::Serving).await;
    let reporting = tokio::spawn(report_health(Arc::clone(&daemon), health));
    let routes = service::routes(&Context { daemon, caller }, health_service)?;
    let places = Places::new(places);
    let server = Server::builder()
        .initial_stream_window_size(caps::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(caps::CONNECTION_WINDOW_BYTES)
        .max_frame_size(caps::FRAME_BYTES)
        .max_concurrent_streams(caps::STREAMS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(caps::HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(caps::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(caps::KEEPALIVE_TIMEOUT))
        .tcp_nodelay(true)
        .layer(layer_fn(KeepPlace))
        .layer(MapResponseLayer::new(service::blame_the_caller))
        .add_routes(routes);
    let stopped = stopped(stop);
    let served = match bound.socket {
        Socket::Unix(socket, file) => {
            let incoming = incoming(
                places,
                socket,
                |socket: UnixListener| async move { (accept_own(&socket).await, socket) },
                AnyAuthority::new,
            );
            let served = server.serve_with_incoming_shutdown(incoming, stopped).await;
            drop(file);
            served
        }
        Socket::Tcp(socket) => {
            let accept = |socket: TcpListener| async move {
                let accepted = socket.accept().await.and_then(|(io, _)| io.set_nodelay(true).map(|()| io));
                (accepted, socket)
            };
            server
                .serve_with_incoming_shutdown(incoming(places, socket, accept, |connection| connection), stopped)
                .await
        }
    };
    reporting.abort();
    served.context("the server failed")
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The next connection of this user, or of root. The socket's mode keeps others out already; this holds
/// even where somebody changed it.
async fn accept_own(socket: &UnixListener) -> io::Result<UnixStream> {
    let (io, _) = socket.accept().await?;
    let (peer, me) = (io.peer_cred()?.uid(), rustix::process::geteuid().as_raw());
    if peer == me || peer == 0 {
        return Ok(io);
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("user {peer} may not connect to a socket of user {me}"),
    ))
}

/// gRPC health follows the daemon: NOT_SERVING while it drains.
async fn report_health(daemon: Arc<Daemon>, health: tonic_health::server::HealthReporter) {
    daemon.calls.until_draining().await;
    health.set_not_serving::<BlocksServer<Context>>().await;
    health.set_service_status("kvstore.v1.BlockData", tonic_health::ServingStatus::NotServing).await;
    health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
}

/// Connections as they come, at most so many at once; see [`Places`]. A failed accept (out of file descriptors, say) is tried again a
/// little later. `wrap` makes of a connection what is served.
fn incoming<L, F, A, IO, T>(
    places: Arc<Places>,
    listener: L,
    accept: F,
    wrap: impl Fn(Connection<IO>) -> T + Copy,
) -> impl Stream<Item = io::Result<T>>
where
    F: Fn(L) -> A + Copy,
    A: Future<Output = (io::Result<IO>, L)>,
{
    stream::unfold((places, listener), move |(places, mut listener)| async move {
        loop {
            let (accepted, back) = accept(listener).await;
            listener = back;
            match accepted {
                Ok(io) => {
                    let place = places.take().await;
                    let connection = Connection::new(io, place, caps::PREFACE_WITHIN, Some(caps::PREFACE_BYTES));
                    return Some((Ok(wrap(connection)), (places, listener)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(caps::ACCEPT_RETRY).await;
                }
            }
        }
    })
}

impl<IO> Connected for Connection<IO> {
    type ConnectInfo = Arc<Place>;

    fn connect_info(&self) -> Arc<Place> {
        Arc::clone(self.place())
    }
}

impl<IO> Connected for AnyAuthority<Connection<IO>> {
    type ConnectInfo = Arc<Place>;

    fn connect_info(&self) -> Arc<Place> {
        Arc::clone(self.inner().place())
    }
}
