//! The publisher's sockets: PUB for subscribers, and ROUTER for replays. Both read one list of the last messages. A subscriber has only a number in this
//! list, and no queue: a subscriber that falls off its end is disconnected, and can connect again and ask for a replay.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use kvstore_proto::zmtp::{Connection, Endpoint, ZmtpError, encode};
use kvstore_tiers::claim::{self, Claim, SocketFile};
use parking_lot::Mutex;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::watch;

use crate::caps;
use crate::connections::Places;

struct Messages {
    kept: VecDeque<Bytes>,
    bytes: usize,
    /// The number of the first that is kept.
    first: u64,
}

/// The last messages. Shared by `Arc`.
pub struct Published {
    messages: Mutex<Messages>,
    /// The number of the next one.
    next: watch::Sender<u64>,
    topic: String,
    /// Messages and bytes that are kept.
    bounds: (usize, usize),
}

/// It was published too long ago.
struct Gone;

impl Published {
    /// Empty: numbers begin at 0 with the daemon's life.
    pub fn new(topic: String) -> Arc<Self> {
        Self::bounded(topic, (caps::PUBLISHED_KEPT, caps::PUBLISHED_BYTES_KEPT))
    }

    fn bounded(topic: String, bounds: (usize, usize)) -> Arc<Self> {
        let messages = Messages { kept: VecDeque::new(), bytes: 0, first: 0 };
        Arc::new(Self { messages: Mutex::new(messages), next: watch::Sender::new(0), topic, bounds })
    }

    /// Publishes a payload.
    pub fn publish(&self, payload: Bytes) {
        let mut messages = self.messages.lock();
        messages.bytes += payload.len();
        messages.kept.push_back(payload);
        while messages.kept.len() > self.bounds.0 || messages.bytes > self.bounds.1 {
            let Some(oldest) = messages.kept.pop_front() else { break };
            messages.bytes -= oldest.len();
            messages.first += 1;
        }
        drop(messages);
        self.next.send_modify(|next| *next += 1);
    }

    /// The payload with this number; `None` where it is yet to come.
    fn get(&self, number: u64) -> Result<Option<Bytes>, Gone> {
        let messages = self.messages.lock();
        let at = number.checked_sub(messages.first).ok_or(Gone)?;
        Ok(messages.kept.get(at as usize).cloned())
    }

    fn first(&self) -> u64 {
        self.messages.lock().first
    }
}

/// A socket that is bound.
pub enum BoundSocket {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket, its file, which goes with it, and the right to the path.
    Ipc(UnixListener, SocketFile, #[expect(dead_code, reason = "held until the socket is gone")] Claim),
}

/// Binds an endpoint.
pub async fn bind(endpoint: &Endpoint) -> anyhow::Result<BoundSocket> {
    match endpoint {
        Endpoint::Tcp(host, port) => Ok(BoundSocket::Tcp(TcpListener::bind((host.as_str(), *port)).await?)),
        Endpoint::Ipc(path) => {
            let claim = Claim::beside(path)?;
            let (listener, file) = claim::listen(path)?;
            Ok(BoundSocket::Ipc(UnixListener::from_std(listener)?, file, claim))
        }
    }
}

impl BoundSocket {
    /// Where it is: a port 0 is the chosen one.
    pub fn endpoint(&self) -> String {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(|_| "tcp".into(), |at| format!("tcp://{at}")),
            Self::Ipc(_, file, _) => format!("ipc://{}", file.path().display()),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// What is done with a connection.
#[derive(Clone, Copy)]
pub enum SocketKind {
    /// PUB.
    Publish,
    /// ROUTER.
    Replay,
}

/// Serves a socket until the future is dropped.
pub async fn serve(bound: BoundSocket, published: Arc<Published>, kind: SocketKind, places: Arc<Places>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted: io::Result<Box<dyn Stream>> = match &bound {
            BoundSocket::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                let _ = stream.set_nodelay(true);
                ask_whether_it_lives(&stream);
                Box::new(stream) as Box<dyn Stream>
            }),
            BoundSocket::Ipc(listener, ..) => {
                listener.accept().await.map(|(stream, _)| Box::new(stream) as Box<dyn Stream>)
            }
        };
        while connections.try_join_next().is_some() {}
        let Ok(stream) = accepted else {
            tokio::time::sleep(caps::ACCEPT_RETRY).await;
            continue;
        };
        // One too many is hung up on.
        let Some(place) = places.take_of_silent().await else { continue };
        let published = Arc::clone(&published);
        connections.spawn(async move {
            let follow = async {
                match kind {
                    SocketKind::Publish => publish_to(stream, &published, || place.keep()).await,
                    SocketKind::Replay => replay_to(stream, &published, || place.asked(caps::PUBLISHER_STALL)).await,
                }
            };
            let ended = tokio::select! {
                ended = follow => ended,
                () = place.evicted() => Err(ZmtpError::Protocol("it was silent, and others need its place".into())),
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a follower of the published events left");
            }
        });
    }
}

/// A TCP peer that vanished without a word is found out. Where the system takes no such option, it keeps its place.
fn ask_whether_it_lives(stream: &TcpStream) {
    let _ = sockopt::set_tcp_keepidle(stream, caps::PUBLISHER_KEEPALIVE_IDLE);
    let _ = sockopt::set_tcp_keepintvl(stream, caps::PUBLISHER_KEEPALIVE_INTERVAL);
    let _ = sockopt::set_tcp_keepcnt(stream, caps::PUBLISHER_KEEPALIVE_PROBES);
    let _ = sockopt::set_socket_keepalive(stream, true);
}

async fn greet(stream: Box<dyn Stream>, kind: &str) -> Result<Connection<Box<dyn Stream>>, ZmtpError> {
    let greeting = Connection::handshake(stream, kind, caps::PUBLISHER_REQUEST_BYTES_MAX);
    let late = |_| ZmtpError::Protocol("the peer did not send its greeting in time".into());
    tokio::time::timeout(caps::PUBLISHER_STALL, greeting).await.map_err(late)?
}

/// Publishes to a peer; `subscribed` is called once it has asked for something.
async fn publish_to(stream: Box<dyn Stream>, published: &Published, subscribed: impl Fn()) -> Result<(), ZmtpError> {
    let mut peer = greet(stream, "PUB").await?;
    let mut next = published.next.subscribe();
    let mut topics: Vec<Bytes> = Vec::new();
    // What is published from now on.
    let mut number = *next.borrow_and_update();
    loop {
        tokio::select! {
            received = peer.receive() => match received? {
                Some(frames) => {
                    subscribe(&mut topics, &frames)?;
                    if !topics.is_empty() {
                        subscribed();
                    }
                }
                None => return Ok(()),
            },
            changed = next.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                next.borrow_and_update();
                loop {
                    let payload = match published.get(number) {
                        Ok(Some(payload)) => payload,
                        Ok(None) => break,
                        Err(Gone) => {
                            return Err(ZmtpError::Protocol("the subscriber was too slow and was disconnected".into()));
                        }
                    };
                    if topics.iter().any(|topic| published.topic.as_bytes().starts_with(topic)) {
                        let message = encode(&[published.topic.as_bytes(), &number.to_be_bytes(), &payload]);
                        let problem = "the subscriber took nothing for too long and was disconnected";
                        let late = |_| ZmtpError::Protocol(problem.into());
                        tokio::time::timeout(caps::PUBLISHER_STALL, peer.send_encoded(&message)).await.map_err(late)??;
                    }
                    number += 1;
                }
            }
        }
    }
}

fn subscribe(topics: &mut Vec<Bytes>, frames: &[Bytes]) -> Result<(), ZmtpError> {
    let Some((kind, topic)) = frames.first().and_then(|frame| Some((*frame.first()?, frame.slice(1..)))) else {
        return Ok(());
    };
    match kind {
        1 if topics.len() >= caps::PUBLISHER_TOPICS_MAX => {
            Err(ZmtpError::Protocol("the subscriber has too many subscriptions".into()))
        }
        1 => {
            topics.push(topic);
            Ok(())
        }
        0 => {
            if let Some(at) = topics.iter().position(|known| *known == topic) {
                topics.swap_remove(at);
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Answers `[..., "", first number]` with `["", number, payload]` for each message that is kept, and -1 at the end. `asked` is called
/// at each request.
async fn replay_to(stream: Box<dyn Stream>, published: &Published, asked: impl Fn()) -> Result<(), ZmtpError> {
    let mut peer = greet(stream, "ROUTER").await?;
    while let Some(frames) = peer.receive().await? {
        asked();
        let first = frames.last().and_then(|frame| frame.as_ref().try_into().ok()).map(u64::from_be_bytes);
        let Some(from) = first else {
            return Err(ZmtpError::Protocol("a request for a replay must be a number of 8 bytes".into()));
        };
        let mut number = from.max(published.first());
        let end = *published.next.borrow();
        while number < end {
            match published.get(number) {
                Ok(Some(payload)) => {
                    let message = encode(&[b"", &number.to_be_bytes(), &payload]);
                    let late = |_| ZmtpError::Protocol("the peer took nothing for too long".into());
                    tokio::time::timeout(caps::PUBLISHER_STALL, peer.send_encoded(&message)).await.map_err(late)??;
                }
                Ok(None) => break,
                Err(Gone) => {
                    number = published.first();
                    continue;
                }
            }
            number += 1;
        }
        peer.send(&[b"", &(-1i64).to_be_bytes(), b""]).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn subscriber(
        published: &Arc<Published>,
    ) -> (Connection<tokio::io::DuplexStream>, tokio::task::JoinHandle<Result<(), ZmtpError>>) {
        let (ours, theirs) = tokio::io::duplex(2048);
        let publishing = Arc::clone(published);
        let task = tokio::spawn(async move { publish_to(Box::new(ours), &publishing, || {}).await });
        let mut peer = Connection::handshake(theirs, "SUB", 1 << 20).await.unwrap();
        peer.send(&[b"\x01"]).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        (peer, task)
    }

    /// What a slow subscriber does not take is kept for as long as replays are, and then it is cut off; a quick one beside it loses nothing.
    #[tokio::test]
    async fn who_is_slow_is_cut_off_and_keeps_nobody_waiting() {
        let published = Published::bounded("t".into(), (20, 1 << 20));
        let (mut slow, slow_ended) = subscriber(&published).await;
        let (mut quick, _quick) = subscriber(&published).await;
        for number in 0..200u64 {
            published.publish(Bytes::from(vec![number as u8; 500]));
            let frames = quick.receive().await.unwrap().unwrap();
            assert_eq!(frames[1].as_ref(), number.to_be_bytes());
        }
        let mut got = 0;
        while let Ok(Some(_)) = slow.receive().await {
            got += 1;
        }
        assert!((1..10).contains(&got), "what the connection held: {got}");
        let error = slow_ended.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("too slow"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_is_cut_off_in_time() {
        let published = Published::bounded("t".into(), (1000, 1 << 20));
        let (_silent, ended) = subscriber(&published).await;
        (0..10).for_each(|_| published.publish(Bytes::from(vec![0; 500])));
        let error = ended.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("took nothing"), "{error}");
    }

    #[test]
    fn what_is_kept_is_bounded_by_messages_and_by_bytes() {
        let published = Published::bounded("t".into(), (10, 1000));
        (0..5).for_each(|_| published.publish(Bytes::from(vec![0; 300])));
        assert!(published.get(1).is_err() && published.get(2).is_ok_and(|payload| payload.is_some()));
        (0..50).for_each(|_| published.publish(Bytes::from_static(b"x")));
        assert_eq!((published.first(), published.get(55).is_ok_and(|payload| payload.is_none())), (45, true));
    }
}
