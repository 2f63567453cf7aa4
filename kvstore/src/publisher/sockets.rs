//! The publisher's sockets: PUB for subscribers, and ROUTER for replays. Both read one list of the last messages. A subscriber has only a number in this
//! list, and no queue: a subscriber that falls off its end is disconnected, and can connect again and ask for a replay.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use kvstore_proto::zmtp::{Connection, Endpoint, ZmtpError, encode};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};

use crate::caps;

struct Messages {
    kept: VecDeque<Bytes>,
    bytes: usize,
    /// The number of the first that is kept.
    first: u64,
}

/// The last messages. Shared by `Arc`.
pub struct Outbox {
    messages: Mutex<Messages>,
    /// The number of the next one.
    next: watch::Sender<u64>,
    topic: String,
    /// Messages and bytes that are kept.
    bounds: (usize, usize),
}

/// It was published too long ago.
struct Gone;

impl Outbox {
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
pub enum Bound {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket, and its file, which goes with it.
    Ipc(UnixListener, SocketFile),
}

/// Removes a socket's file.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds an endpoint.
pub async fn bind(endpoint: &Endpoint) -> io::Result<Bound> {
    match endpoint {
        Endpoint::Tcp(host, port) => Ok(Bound::Tcp(TcpListener::bind((host.as_str(), *port)).await?)),
        Endpoint::Ipc(path) => {
            if let Ok(found) = path.symlink_metadata() {
                use std::os::unix::fs::FileTypeExt;
                if !found.file_type().is_socket() || std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                // A daemon that was killed left it.
                std::fs::remove_file(path)?;
            }
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            Ok(Bound::Ipc(listener, SocketFile(path.clone())))
        }
    }
}

impl Bound {
    /// Where it is: a port 0 is the chosen one.
    pub fn endpoint(&self) -> String {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(|_| "tcp".into(), |at| format!("tcp://{at}")),
            Self::Ipc(_, file) => format!("ipc://{}", file.0.display()),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// What is done with a connection.
#[derive(Clone, Copy)]
pub enum Service {
    /// PUB.
    Publish,
    /// ROUTER.
    Replay,
}

/// Serves a socket until the future is dropped.
pub async fn serve(bound: Bound, outbox: Arc<Outbox>, service: Service) {
    let peers = Arc::new(Semaphore::new(caps::PUBLISHER_PEERS_MAX));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted: io::Result<Box<dyn Stream>> = match &bound {
            Bound::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                let _ = stream.set_nodelay(true);
                Box::new(stream) as Box<dyn Stream>
            }),
            Bound::Ipc(listener, _) => listener.accept().await.map(|(stream, _)| Box::new(stream) as Box<dyn Stream>),
        };
        while connections.try_join_next().is_some() {}
        let Ok(stream) = accepted else {
            tokio::time::sleep(caps::ACCEPT_RETRY).await;
            continue;
        };
        // One too many is hung up on.
        let Ok(permit) = Arc::clone(&peers).try_acquire_owned() else { continue };
        let outbox = Arc::clone(&outbox);
        connections.spawn(async move {
            let _permit = permit;
            let ended = match service {
                Service::Publish => publish_to(stream, &outbox).await,
                Service::Replay => replay_to(stream, &outbox).await,
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a follower of the published events left");
            }
        });
    }
}

async fn greet(stream: Box<dyn Stream>, kind: &str) -> Result<Connection<Box<dyn Stream>>, ZmtpError> {
    let greeting = Connection::handshake(stream, kind, caps::PUBLISHER_REQUEST_BYTES_MAX);
    let late = |_| ZmtpError::Protocol("the peer did not send its greeting in time".into());
    tokio::time::timeout(caps::PUBLISHER_STALL, greeting).await.map_err(late)?
}

async fn publish_to(stream: Box<dyn Stream>, outbox: &Outbox) -> Result<(), ZmtpError> {
    let mut peer = greet(stream, "PUB").await?;
    let mut next = outbox.next.subscribe();
    let mut topics: Vec<Bytes> = Vec::new();
    // What is published from now on.
    let mut number = *next.borrow_and_update();
    loop {
        tokio::select! {
            received = peer.receive() => match received? {
                Some(frames) => subscribe(&mut topics, &frames)?,
                None => return Ok(()),
            },
            changed = next.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                next.borrow_and_update();
                loop {
                    let payload = match outbox.get(number) {
                        Ok(Some(payload)) => payload,
                        Ok(None) => break,
                        Err(Gone) => {
                            return Err(ZmtpError::Protocol("the subscriber was too slow and was disconnected".into()));
                        }
                    };
                    if topics.iter().any(|topic| outbox.topic.as_bytes().starts_with(topic)) {
                        let message = encode(&[outbox.topic.as_bytes(), &number.to_be_bytes(), &payload]);
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

/// Answers `[..., "", first number]` with `["", number, payload]` for each message that is kept, and -1 at the end.
async fn replay_to(stream: Box<dyn Stream>, outbox: &Outbox) -> Result<(), ZmtpError> {
    let mut peer = greet(stream, "ROUTER").await?;
    while let Some(frames) = peer.receive().await? {
        let asked = frames.last().and_then(|frame| frame.as_ref().try_into().ok()).map(u64::from_be_bytes);
        let Some(from) = asked else {
            return Err(ZmtpError::Protocol("a request for a replay must be a number of 8 bytes".into()));
        };
        let mut number = from.max(outbox.first());
        let end = *outbox.next.borrow();
        while number < end {
            match outbox.get(number) {
                Ok(Some(payload)) => {
                    let message = encode(&[b"", &number.to_be_bytes(), &payload]);
                    let late = |_| ZmtpError::Protocol("the peer took nothing for too long".into());
                    tokio::time::timeout(caps::PUBLISHER_STALL, peer.send_encoded(&message)).await.map_err(late)??;
                }
                Ok(None) => break,
                Err(Gone) => {
                    number = outbox.first();
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
        outbox: &Arc<Outbox>,
    ) -> (Connection<tokio::io::DuplexStream>, tokio::task::JoinHandle<Result<(), ZmtpError>>) {
        let (ours, theirs) = tokio::io::duplex(2048);
        let publishing = Arc::clone(outbox);
        let task = tokio::spawn(async move { publish_to(Box::new(ours), &publishing).await });
        let mut peer = Connection::handshake(theirs, "SUB", 1 << 20).await.unwrap();
        peer.send(&[b"\x01"]).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        (peer, task)
    }

    /// What a slow subscriber does not take is kept for as long as replays are, and then it is cut off; a quick one beside it loses nothing.
    #[tokio::test]
    async fn who_is_slow_is_cut_off_and_keeps_nobody_waiting() {
        let outbox = Outbox::bounded("t".into(), (20, 1 << 20));
        let (mut slow, slow_ended) = subscriber(&outbox).await;
        let (mut quick, _quick) = subscriber(&outbox).await;
        for number in 0..200u64 {
            outbox.publish(Bytes::from(vec![number as u8; 500]));
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
        let outbox = Outbox::bounded("t".into(), (1000, 1 << 20));
        let (_silent, ended) = subscriber(&outbox).await;
        (0..10).for_each(|_| outbox.publish(Bytes::from(vec![0; 500])));
        let error = ended.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("took nothing"), "{error}");
    }

    #[test]
    fn the_outbox_is_bounded_by_messages_and_by_bytes() {
        let outbox = Outbox::bounded("t".into(), (10, 1000));
        (0..5).for_each(|_| outbox.publish(Bytes::from(vec![0; 300])));
        assert!(outbox.get(1).is_err() && outbox.get(2).is_ok_and(|payload| payload.is_some()));
        (0..50).for_each(|_| outbox.publish(Bytes::from_static(b"x")));
        assert_eq!((outbox.first(), outbox.get(55).is_ok_and(|payload| payload.is_none())), (45, true));
    }
}
