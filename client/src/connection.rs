//! One HTTP/2 connection to a daemon, made when it is needed and made again when it broke.

use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;
use tonic::body::Body;

use crate::Error;

/// What the daemon may send on one stream before it is read: hides the latency of a wake-up.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// The same for the connection.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Bytes of an HTTP/2 frame.
const FRAME_BYTES: u32 = 256 << 10;
/// A daemon that says nothing for this long is asked whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
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

/// A client of one daemon, in one namespace: that of the socket it connects to. Cheap to clone; clones
/// share the connection.
#[derive(Clone)]
pub struct Client {
    target: Arc<Target>,
    connection: Arc<Mutex<Option<Connection>>>,
    deadline: Duration,
}

impl Client {
    /// Connects to `unix:/path/to/socket` or `http://host:port`.
    pub async fn connect(address: &str) -> Result<Self, Error> {
        let client = Self { target: Arc::new(Target::parse(address)?), connection: Arc::default(), deadline: DEADLINE };
        client.within(client.connection()).await?;
        Ok(client)
    }

    /// The same client, whose calls end after `deadline`.
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(crate) async fn connection(&self) -> Result<Connection, Error> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.sender.is_closed()) {
            return Ok(connection.clone());
        }
        let connection = self.dial().await?;
        *slot = Some(connection.clone());
        Ok(connection)
    }

    async fn dial(&self) -> Result<Connection, Error> {
        let failed = |error: std::io::Error| {
            Error::Unavailable(format!("no daemon answers at {}: {error}; start one with `kvstore serve`", self.target))
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
        let sender = match &*self.target {
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
        let late = || Error::Deadline(format!("no answer within {:?}", self.deadline));
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
