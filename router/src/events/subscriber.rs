//! Following one rank of an engine over ZeroMQ: its events as they come, the lost ones over its replay socket, and nothing of what it said
//! before it restarted.
//!
//! Messages are numbered from 0 in an engine's life. A number that does not follow the last one is a gap: what is missing is asked for again.
//! After a connection broke, the last message that was seen is asked for first: where the engine still has it, and it is the same, the
//! engine lives, and what followed is taken; otherwise it is another life, and all that is known of it is forgotten. Without a replay
//! socket, a gap or a broken connection forgets everything.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvstore_proto::zmtp::{Connection, Endpoint, ZmtpError};
use parking_lot::Mutex;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use xxhash_rust::xxh3::xxh3_64;

use super::{EngineView, vllm};
use crate::caps;

/// A first try, and the longest pause between two.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// An engine that does not greet, or replays nothing for so long, is not there.
const PATIENCE: Duration = Duration::from_secs(10);
/// One that began to replay and pauses for so long was cut off: what its socket has no room for is dropped without a word.
const PATIENCE_IN_REPLAY: Duration = Duration::from_secs(2);

/// Where one rank's events are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its PUB socket.
    pub events: Endpoint,
    /// Its ROUTER socket.
    pub replay: Option<Endpoint>,
    /// Only messages whose topic starts so.
    pub topic: String,
    /// The rank.
    pub rank: u32,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}
type Socket = Connection<Box<dyn Stream>>;

async fn connect(endpoint: &Endpoint, socket_type: &str) -> Result<Socket, ZmtpError> {
    let whole = async {
        let stream: Box<dyn Stream> = match endpoint {
            Endpoint::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                // An engine whose host vanished looks like one with nothing to say: the kernel asks.
                keep_alive(&stream);
                Box::new(stream)
            }
            Endpoint::Ipc(path) => Box::new(UnixStream::connect(path).await?),
        };
        let connection = Connection::handshake(stream, socket_type, caps::EVENT_BYTES_MAX + 1024).await?;
        Ok(connection.passing_over_long())
    };
    match timeout(PATIENCE, whole).await {
        Ok(connected) => connected,
        Err(_) => Err(ZmtpError::Protocol("it sent no greeting within 10 s".into())),
    }
}

/// A peer that vanished without a goodbye is noticed within 40 s. What the system does not know is not asked of it.
fn keep_alive(stream: &TcpStream) {
    let _ = sockopt::set_tcp_keepidle(stream, caps::EVENTS_KEEPALIVE);
    let _ = sockopt::set_tcp_keepintvl(stream, caps::EVENTS_KEEPALIVE);
    let _ = sockopt::set_tcp_keepcnt(stream, caps::EVENTS_KEEPALIVE_TRIES);
    let _ = sockopt::set_socket_keepalive(stream, true);
}

/// A message: its number and its payload.
fn numbered(frames: &[Bytes]) -> Option<(u64, &Bytes)> {
    let [.., number, payload] = frames else { return None };
    Some((u64::from_be_bytes(number.as_ref().try_into().ok()?), payload))
}

/// Why a subscriber gets no events at the moment; `None` while it does.
#[derive(Debug)]
pub struct Following(Mutex<Option<String>>);

impl Default for Following {
    fn default() -> Self {
        Self(Mutex::new(Some("the router has not reached it yet".into())))
    }
}

impl Following {
    /// Why not, if so.
    pub fn problem(&self) -> Option<String> {
        self.0.lock().clone()
    }

    fn set(&self, problem: Option<String>) {
        *self.0.lock() = problem;
    }
}

/// See the head of this file.
pub struct Subscriber {
    source: Source,
    view: Arc<EngineView>,
    following: Arc<Following>,
    /// The last message: its number, and what it was.
    last: Option<(u64, u64)>,
    /// Messages that could not be read.
    bad: u64,
}

/// What came of asking for messages again.
#[derive(Debug, PartialEq, Eq)]
enum Replayed {
    /// They are the same life's, and everything is known up to the engine's present.
    Same,
    /// The engine does not have what was seen last.
    Another,
}

impl Subscriber {
    /// Of one rank; what it says goes into `view`.
    pub fn new(source: Source, view: Arc<EngineView>) -> Self {
        Self { source, view, following: Arc::default(), last: None, bad: 0 }
    }

    /// How that goes.
    pub fn following(&self) -> Arc<Following> {
        Arc::clone(&self.following)
    }

    /// Follows until the future is dropped.
    pub async fn follow(mut self) {
        let mut pause = PAUSE.0;
        let mut told = false;
        loop {
            match connect(&self.source.events, "SUB").await {
                Ok(socket) => {
                    tracing::info!(endpoint = %self.source.events, rank = self.source.rank, "the router follows the engine's events");
                    (pause, told) = (PAUSE.0, false);
                    self.following.set(None);
                    let error = self.listen(socket).await;
                    self.following.set(Some(error.to_string()));
                    tracing::warn!(endpoint = %self.source.events, %error, "the stream of the engine's events ended; the router connects again");
                }
                Err(error) if !told => {
                    self.following.set(Some(error.to_string()));
                    tracing::warn!(endpoint = %self.source.events, %error, "the router gets no events from the engine, and keeps trying");
                    told = true;
                }
                Err(_) => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn listen(&mut self, mut socket: Socket) -> ZmtpError {
        let mut subscription = vec![1];
        subscription.extend_from_slice(self.source.topic.as_bytes());
        if let Err(error) = socket.send(&[&subscription]).await {
            return error;
        }
        // From here on nothing is missed: what was published before is replayed, what comes meanwhile waits in the socket.
        self.catch_up().await;
        loop {
            let frames = match socket.receive().await {
                Ok(Some(frames)) => frames,
                Ok(None) => return ZmtpError::Protocol("it closed the connection".into()),
                Err(error) => return error,
            };
            let Some((number, payload)) = numbered(&frames) else {
                self.bad += 1;
                continue;
            };
            // The end of a replay has this number; no message has.
            if number == u64::MAX {
                self.view.passed_over(1);
                continue;
            }
            match self.last {
                // It was replayed.
                Some((last, _)) if number <= last && self.is_known_duplicate(number, payload) => {}
                Some((last, _)) if number == last + 1 => self.take(number, payload),
                None if number == 0 => self.take(number, payload),
                _ => {
                    self.catch_up().await;
                    // What the replay brought, or could not bring: this message is either in it, or the first that is known.
                    if self.last.is_none_or(|(last, _)| number > last) {
                        self.take(number, payload);
                    }
                }
            }
        }
    }

    fn is_known_duplicate(&self, number: u64, payload: &Bytes) -> bool {
        match self.last {
            Some((last, digest)) if last == number => digest == xxh3_64(payload),
            // Before the last one of a replay: another life would begin at 0, and its connection anew.
            Some((last, _)) => number < last && self.source.replay.is_some() && number > 0,
            None => false,
        }
    }

    fn take(&mut self, number: u64, payload: &Bytes) {
        self.last = Some((number, xxh3_64(payload)));
        match vllm::decode(payload) {
            Ok(batch) => self.view.apply(&batch, self.source.rank),
            Err(error) => {
                self.bad += 1;
                if self.bad.is_power_of_two() {
                    tracing::warn!(endpoint = %self.source.events, %error, bad = self.bad, "a message of the engine cannot be read, so the router passes it over");
                }
                // It may have said that blocks left. A prefix that is believed too long costs its request some time; to forget all would
                // cost every request as much.
                self.view.passed_over(1);
            }
        }
    }

    /// Asks for what is missing; where that is not to be had, everything is forgotten.
    async fn catch_up(&mut self) {
        let replayed = match self.source.replay.clone() {
            Some(endpoint) => self.replay_all(&endpoint).await,
            None => Replayed::Another,
        };
        if replayed == Replayed::Another && self.last.take().is_some() {
            tracing::warn!(endpoint = %self.source.events, "events of the engine were lost, or it restarted, so the router forgets what it knew of the engine");
            self.view.fence();
            // Another life's events, as far back as it has them.
            if let Some(endpoint) = self.source.replay.clone() {
                self.replay_all(&endpoint).await;
            }
        }
    }

    /// Asks again for what a replay that was cut off did not bring, for as long as something comes: engines send all that they have at once
    /// through a socket that drops what a slow reader does not take, the end marker too.
    async fn replay_all(&mut self, endpoint: &Endpoint) -> Replayed {
        let mut tried_in_vain = false;
        loop {
            let before = self.last;
            let error = match timeout(PATIENCE * 6, self.replay(endpoint)).await {
                Ok(Ok(replayed)) => return replayed,
                Ok(Err(error)) => error,
                Err(_) => ZmtpError::Protocol("its replay took more than 60 s".into()),
            };
            let in_vain = self.last == before;
            if in_vain && (tried_in_vain || before.is_none()) {
                tracing::warn!(%endpoint, %error, "the engine did not replay its events");
                return Replayed::Another;
            }
            tracing::info!(%endpoint, %error, "the engine's replay was cut off, so the router asks for the rest");
            tried_in_vain = in_vain;
        }
    }

    async fn replay(&mut self, endpoint: &Endpoint) -> Result<Replayed, ZmtpError> {
        let mut socket = connect(endpoint, "DEALER").await?;
        let from = self.last.map_or(0, |(last, _)| last);
        socket.send(&[b"", &from.to_be_bytes()]).await?;
        let mut seen_last = self.last.is_none();
        loop {
            let patience = if self.last.map_or(0, |(last, _)| last) > from { PATIENCE_IN_REPLAY } else { PATIENCE };
            let received = timeout(patience, socket.receive()).await;
            let frames = match received {
                Ok(frames) => {
                    frames?.ok_or_else(|| ZmtpError::Protocol("it closed the connection during a replay".into()))?
                }
                Err(_) => {
                    return Err(ZmtpError::Protocol(format!(
                        "it sent nothing for {} s during a replay",
                        patience.as_secs()
                    )));
                }
            };
            let Some((number, payload)) = numbered(&frames) else {
                return Err(ZmtpError::Protocol("it replayed a message without a number".into()));
            };
            if number == u64::MAX {
                return Ok(if seen_last { Replayed::Same } else { Replayed::Another });
            }
            match self.last {
                Some((last, digest)) if !seen_last => {
                    if number != last || digest != xxh3_64(payload) {
                        return Ok(Replayed::Another);
                    }
                    seen_last = true;
                }
                Some((last, _)) if number == last + 1 => self.take(number, payload),
                Some((last, _)) if number <= last => {}
                // The first of all that the engine still has.
                None => self.take(number, payload),
                Some((last, _)) => {
                    return Err(ZmtpError::Protocol(format!("it replayed message {number} behind message {last}")));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::events::Naming;
    use crate::index::PrefixIndex;

    fn payload(number: u64) -> Vec<u8> {
        rmp_serde::to_vec(&serde_json::json!([1.0, [["BlockStored", [number], null, [1, 2], 2, null]]])).unwrap()
    }

    /// An engine whose socket drops what its reader does not take at once: `at_once` messages of `all`, and no end marker behind them; then it
    /// leaves a hole. Where each replay began.
    async fn replays(listener: TcpListener, all: u64, at_once: u64, asked: Arc<Mutex<Vec<u64>>>) {
        let mut open = Vec::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut socket = Connection::handshake(stream, "ROUTER", 1000).await.unwrap();
            let frames = socket.receive().await.unwrap().unwrap();
            let from = u64::from_be_bytes(frames.last().unwrap().as_ref().try_into().unwrap());
            asked.lock().push(from);
            let holed = asked.lock().len() == 2;
            for number in (from..all).take(at_once as usize).filter(|number| !holed || *number != from + 3) {
                socket.send(&[b"", &number.to_be_bytes(), &payload(number)]).await.unwrap();
            }
            if from + at_once > all {
                socket.send(&[b"", &u64::MAX.to_be_bytes(), b""]).await.unwrap();
            }
            open.push(socket);
        }
    }

    /// Engines send a replay in one go, and their sockets drop what is beyond a mark, the end marker too: the router waited for the rest, and
    /// then forgot all that it knew.
    #[tokio::test]
    async fn a_replay_that_was_cut_off_is_gone_on_with() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let replay = Endpoint::Tcp("127.0.0.1".into(), listener.local_addr().unwrap().port());
        let asked = Arc::<Mutex<Vec<u64>>>::default();
        let engine = tokio::spawn(replays(listener, 20, 8, Arc::clone(&asked)));
        let view = Arc::new(EngineView::new(Arc::new(PrefixIndex::new(1 << 20)), Naming::Computed));
        let source = Source { events: replay.clone(), replay: Some(replay), topic: String::new(), rank: 0 };
        let mut subscriber = Subscriber::new(source, Arc::clone(&view));
        subscriber.catch_up().await;
        assert_eq!(subscriber.last.map(|(last, _)| last), Some(19));
        assert_eq!((view.counts().batches, view.counts().stored, view.counts().fences), (20, 20, 0));
        assert_eq!(asked.lock().clone(), [0, 7, 9, 16]);
        // Another life has other messages under these numbers.
        subscriber.last = Some((19, 1));
        subscriber.catch_up().await;
        assert_eq!(view.counts().fences, 1);
        engine.abort();
    }

    /// A host that vanishes says no goodbye.
    #[tokio::test]
    async fn the_kernel_asks_whether_a_silent_engine_lives() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        keep_alive(&stream);
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        let each = sockopt::tcp_keepidle(&stream).unwrap() + sockopt::tcp_keepintvl(&stream).unwrap() * 3;
        assert!(each <= Duration::from_secs(45));
    }
}
