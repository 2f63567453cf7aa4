//! Streams through the router, beside the same streams through nginx, through what only reads and writes, and straight from their source:
//! 2,000 at once, of 50 tokens a second each. The source says in each piece when it was sent; the sink, when it came.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::epoll;

use crate::bare;
use crate::figure::{self, median};
use crate::process::{Process, resident_bytes};

/// Streams at once: those that a router is to take, and half of them, which leave two cores some time.
const STREAMS: [usize; 2] = [2000, 1000];
const TOKEN_EVERY: Duration = Duration::from_millis(20);
/// How long each side is measured, after all its streams have begun.
const MEASURED: Duration = Duration::from_secs(6);
const ROUNDS: usize = 3;

fn now_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Serves streams without end: of each connection, in turn, a piece as vLLM sends them.
struct Source {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Source {
    fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        // All streams begin within a second.
        rustix::net::listen(&listener, 4096)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || serve(&listener, &stopped));
        Ok(Self { address, stop, thread: Some(thread) })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, stop: &AtomicBool) {
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut piece = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let round = Instant::now();
        while let Ok((stream, _)) = listener.accept() {
            streams.extend(begun(stream));
        }
        let count = streams.len().max(1);
        let mut at = 0;
        streams.retain_mut(|stream| {
            // Evenly over the round.
            let due = TOKEN_EVERY.mul_f64(at as f64 / count as f64);
            at += 1;
            if let Some(early) = due.checked_sub(round.elapsed()).filter(|early| *early > Duration::from_micros(200)) {
                std::thread::sleep(early);
            }
            piece.clear();
            let data = format!(
                "data: {{\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1764460800,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" token\"}},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}}],\"sent\":{:020}}}\n\n",
                now_ns()
            );
            let _ = write!(piece, "{:x}\r\n{data}\r\n", data.len());
            stream.write_all(&piece).is_ok()
        });
        if let Some(left) = TOKEN_EVERY.checked_sub(round.elapsed()) {
            std::thread::sleep(left);
        }
    }
}

/// Reads a request, and answers with the head of a stream; or all of an answer, where it asks for something else.
fn begun(mut stream: TcpStream) -> Option<TcpStream> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    stream.set_nodelay(true).ok()?;
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).ok().filter(|read| *read > 0)?;
        request.extend_from_slice(buffer.get(..read)?);
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        if !head.starts_with("POST ") {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}").ok()?;
            return None;
        }
        if body.ends_with('}') {
            break;
        }
    }
    stream
        .write_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .ok()?;
    Some(stream)
}

/// What came of some seconds of streams.
struct Seen {
    /// Milliseconds from source to sink, sorted.
    delays: Vec<f64>,
    cpu_seconds: f64,
    bytes_per_stream: f64,
}

impl Seen {
    fn p99(&self) -> f64 {
        self.delays.get(self.delays.len() * 99 / 100).copied().unwrap_or(f64::NAN)
    }

    fn cpu_us_per_token(&self) -> f64 {
        self.cpu_seconds * 1e6 / self.delays.len().max(1) as f64
    }
}

const BODY: &str =
    "{\"model\": \"m\", \"messages\": [{\"role\": \"user\", \"content\": \"hello there\"}], \"stream\": true}";

/// Opens all streams at `address`, and reads them for a while.
fn sink(address: SocketAddr, count: usize, process: Option<&Process>) -> anyhow::Result<Seen> {
    let resident = |process: Option<&Process>| process.map_or(0.0, |process| resident_bytes(process.id()));
    let before = resident(process);
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json";
    let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len());
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut streams = Vec::new();
    for at in 0..count {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.write_all(request.as_bytes())?;
        stream.set_nonblocking(true)?;
        epoll::add(&poll, &stream, epoll::EventData::new_u64(at as u64), epoll::EventFlags::IN)?;
        streams.push((stream, false));
        // The source takes them between its rounds.
        if at % 50 == 49 {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let (mut delays, mut began) = (Vec::new(), 0);
    let mut events = Vec::with_capacity(1024);
    let mut buffer = vec![0u8; 64 << 10];
    let until_all = Instant::now() + Duration::from_secs(20);
    let (mut started, mut cpu) = (None::<Instant>, 0.0);
    loop {
        if began == count && started.is_none() {
            started = Some(Instant::now());
            cpu = process.map_or(0.0, Process::cpu_seconds);
            delays.clear();
        }
        anyhow::ensure!(began == count || Instant::now() < until_all, "only {began} streams began");
        if started.is_some_and(|started| started.elapsed() > MEASURED) {
            break;
        }
        epoll::wait(
            &poll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 10_000_000 }),
        )?;
        for event in events.drain(..) {
            let Some((stream, has_begun)) = streams.get_mut(event.data.u64() as usize) else { continue };
            let read = match stream.read(&mut buffer) {
                Ok(0) => anyhow::bail!("a stream ended"),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
            let now = now_ns();
            let text = buffer.get(..read).unwrap_or_default();
            for at in text.windows(7).enumerate().filter(|(_, window)| window == b"\"sent\":").map(|(at, _)| at) {
                let sent =
                    text.get(at + 7..at + 27).and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<u64>().ok());
                if let Some(sent) = sent {
                    delays.push(now.saturating_sub(sent) as f64 / 1e6);
                    began += usize::from(!std::mem::replace(has_begun, true));
                }
            }
        }
    }
    let cpu_seconds = process.map_or(0.0, Process::cpu_seconds) - cpu;
    let bytes_per_stream = (resident(process) - before) / count as f64;
    delays.sort_by(f64::total_cmp);
    Ok(Seen { delays, cpu_seconds, bytes_per_stream })
}

/// What stands between source and sink.
struct Proxy {
    process: Process,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn router(program: &Path, source: &Source) -> anyhow::Result<Proxy> {
    let address = free_port()?;
    let mut command = Command::new(program);
    command.args(["serve", "--listen", &address.to_string(), "--log", "error"]);
    let worker = format!("id=a,url=http://{},model=m", source.address);
    command.args(["--worker", &worker]);
    // The source is one engine, and has no bound of its own.
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("router.toml");
    std::fs::write(&config, "[place]\nrequests_max = 100000\nwait_seconds_max = 3600.0\n")?;
    command.arg("--config").arg(config);
    Ok(Proxy { process: Process::start_listening(command, address)?, address, _folder: folder })
}

/// What only reads and writes ([`bare`]).
fn bare(source: &Source) -> anyhow::Result<Proxy> {
    let address = free_port()?;
    let process = Process::start_listening(bare::command(address, source.address)?, address)?;
    Ok(Proxy { process, address, _folder: tempfile::tempdir()? })
}

fn nginx(source: &Source) -> anyhow::Result<Proxy> {
    let address = free_port()?;
    let folder = tempfile::tempdir()?;
    let config = format!(
        "daemon off; master_process off; pid {0}/pid; error_log /dev/null; worker_rlimit_nofile 16384;\n\
         events {{ worker_connections 8192; }}\n\
         http {{ access_log off; client_body_temp_path {0}/b; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;\n\
           server {{ listen {address}; location / {{ proxy_pass http://{1}; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off; }} }} }}\n",
        folder.path().display(),
        source.address
    );
    let path = folder.path().join("nginx.conf");
    std::fs::write(&path, config)?;
    let program = std::env::var_os("NGINX").map_or_else(|| PathBuf::from("nginx"), PathBuf::from);
    let mut command = Command::new(program);
    command.arg("-p").arg(folder.path()).arg("-c").arg(&path);
    Ok(Proxy { process: Process::start_listening(command, address)?, address, _folder: folder })
}

/// Measures the group. The router's program lies beside the daemon's; nginx is on the PATH, or where NGINX says.
pub fn measure(daemon: &Path) -> anyhow::Result<()> {
    let program = daemon.with_file_name("kvstore-router");
    anyhow::ensure!(program.exists(), "{} is missing: build kvstore-router, too", program.display());
    for count in STREAMS {
        let infix = if count == STREAMS[0] { String::new() } else { format!("_{count}") };
        let rows = rounds(&program, count)?;
        let of = |name: fn(&Round) -> f64| median(rows.iter().map(name).collect());
        let target = |target: &'static str| if infix.is_empty() { target } else { "none" };
        figure::print(
            "relay",
            &format!("added_p99_ms{infix}"),
            of(|row| row.router.p99() - row.direct.p99()),
            target("< 5"),
        );
        figure::note("relay", &format!("nginx_added_p99_ms{infix}"), of(|row| row.nginx.p99() - row.direct.p99()));
        figure::note("relay", &format!("direct_p99_ms{infix}"), of(|row| row.direct.p99()));
        let of_nginx = of(|row| row.router.cpu_us_per_token() / row.nginx.cpu_us_per_token());
        figure::print("relay", &format!("cpu_of_nginx{infix}"), of_nginx, target("<= 0.5"));
        figure::note("relay", &format!("cpu_us_per_token{infix}"), of(|row| row.router.cpu_us_per_token()));
        figure::note("relay", &format!("nginx_cpu_us_per_token{infix}"), of(|row| row.nginx.cpu_us_per_token()));
        let of_bare = of(|row| row.router.cpu_us_per_token() / row.bare.cpu_us_per_token());
        figure::note("relay", &format!("cpu_of_bare{infix}"), of_bare);
        figure::note("relay", &format!("bare_cpu_us_per_token{infix}"), of(|row| row.bare.cpu_us_per_token()));
        figure::note("relay", &format!("bare_added_p99_ms{infix}"), of(|row| row.bare.p99() - row.direct.p99()));
        let tokens = |row: &Round| row.router.delays.len() as f64 / MEASURED.as_secs_f64();
        figure::note("relay", &format!("tokens_per_second{infix}"), of(tokens));
        if infix.is_empty() {
            figure::print("relay", "kib_per_stream", of(|row| row.router.bytes_per_stream / 1024.0), "<= 8");
            figure::note("relay", "nginx_kib_per_stream", of(|row| row.nginx.bytes_per_stream / 1024.0));
        }
    }
    Ok(())
}

struct Round {
    direct: Seen,
    bare: Seen,
    router: Seen,
    nginx: Seen,
}

fn rounds(program: &Path, count: usize) -> anyhow::Result<Vec<Round>> {
    let through = |start: &dyn Fn(&Source) -> anyhow::Result<Proxy>| {
        let source = Source::start()?;
        let proxy = start(&source)?;
        sink(proxy.address, count, Some(&proxy.process))
    };
    let round = |_| {
        let source = Source::start()?;
        let direct = sink(source.address, count, None).context("straight from the source")?;
        drop(source);
        Ok(Round {
            direct,
            bare: through(&bare).context("through what only reads and writes")?,
            router: through(&|source| router(program, source)).context("through the router")?,
            nginx: through(&nginx).context("through nginx")?,
        })
    };
    (0..ROUNDS).map(round).collect()
}
