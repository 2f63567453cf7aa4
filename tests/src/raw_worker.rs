//! A worker that sends exactly the bytes that it is told to, cut where it is told to: for what a router must not change, and for breaks.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct RawRequest {
    /// The request line and the headers.
    pub head: String,
    /// The body.
    pub body: Bytes,
    /// How many came before it on its connection, and at this worker.
    pub at: (usize, usize),
}

impl RawRequest {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().skip(1);
        let mut pairs = lines.filter_map(|line| line.split_once(':'));
        pairs.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// The request line.
    pub fn line(&self) -> &str {
        self.head.lines().next().unwrap_or_default()
    }
}

/// A part of an answer.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sends these bytes.
    Send(Bytes),
    /// Does nothing for so long.
    Wait(Duration),
    /// Hangs up, without more.
    HangUp,
}

/// A whole answer with a body of this type.
pub fn whole(status: &str, kind: &str, body: &[u8]) -> Vec<Step> {
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
    vec![Step::Send([head.as_bytes(), body].concat().into())]
}

/// The head of a stream of events.
pub fn stream_head() -> Step {
    Step::Send(Bytes::from_static(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
    ))
}

/// One chunk of a stream.
pub fn chunk(data: &[u8]) -> Step {
    Step::Send([format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat().into())
}

/// The end of a stream, as HTTP has it.
pub fn stream_end() -> Step {
    Step::Send(Bytes::from_static(b"0\r\n\r\n"))
}

type Answers = dyn Fn(&RawRequest) -> Vec<Step> + Send + Sync;

struct Shared {
    answers: Box<Answers>,
    models: Mutex<String>,
    requests: Mutex<Vec<RawRequest>>,
}

/// See the head of this file. It answers `/health` and `/v1/models` by itself.
pub struct RawWorker {
    /// Where it serves.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl RawWorker {
    /// One that answers so.
    pub async fn start(answers: impl Fn(&RawRequest) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let models = r#"{"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 4096}]}"#;
        let shared =
            Shared { answers: Box::new(answers), models: Mutex::new(models.to_owned()), requests: Mutex::default() };
        let shared = Arc::new(shared);
        let serving = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, Arc::clone(&serving)));
            }
        });
        Self { address, shared, task: task.abort_handle() }
    }

    /// What it says under `/v1/models` from now on.
    pub fn set_models(&self, answer: &str) {
        *self.shared.models.lock().unwrap() = answer.to_owned();
    }

    /// What came.
    pub fn requests(&self) -> Vec<RawRequest> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// As workers are named.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for RawWorker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let mut stream = BufReader::new(stream);
    let mut on_connection = 0;
    while let Some((head, body)) = read(&mut stream).await {
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        // Connections that the router has used for these are not to be met again.
        let alone = |body: &str| {
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length:";
            vec![Step::Send(format!("{head} {}\r\n\r\n{body}", body.len()).into()), Step::HangUp]
        };
        let steps = match path.as_str() {
            "/health" => alone("{}"),
            "/v1/models" => alone(&shared.models.lock().unwrap().clone()),
            _ => {
                let request = {
                    let mut requests = shared.requests.lock().unwrap();
                    let request = RawRequest { head, body, at: (on_connection, requests.len()) };
                    requests.push(request.clone());
                    request
                };
                on_connection += 1;
                (shared.answers)(&request)
            }
        };
        for step in steps {
            match step {
                Step::Send(bytes) => {
                    if stream.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                Step::Wait(time) => tokio::time::sleep(time).await,
                Step::HangUp => return,
            }
        }
    }
}

/// A request's head, and its body, whole or in chunks.
async fn read(stream: &mut BufReader<TcpStream>) -> Option<(String, Bytes)> {
    let mut head = String::new();
    loop {
        let before = head.len();
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
        if head.get(before..) == Some("\r\n") {
            break;
        }
    }
    let lower = head.to_ascii_lowercase();
    let length = lower.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    if let Some(length) = length {
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        return Some((head, body.into()));
    }
    let mut body = Vec::new();
    while lower.contains("transfer-encoding: chunked") {
        let mut size = String::new();
        stream.read_line(&mut size).await.ok()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        let mut chunk = vec![0; size + 2];
        stream.read_exact(&mut chunk).await.ok()?;
        body.extend_from_slice(chunk.get(..size)?);
        if size == 0 {
            break;
        }
    }
    Some((head, body.into()))
}
