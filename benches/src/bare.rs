//! The least that a forwarder of streams can do: one read and one write for each piece that comes, by one thread, of bytes that it does
//! not look at. What it takes, no proxy that writes each piece when it comes can go below.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use anyhow::Context as _;
use rustix::event::epoll;

const LISTEN: &str = "KVSTORE_BENCH_FORWARD_FROM";
const WORKER: &str = "KVSTORE_BENCH_FORWARD_TO";

/// The command that starts it.
pub fn command(listen: SocketAddr, worker: SocketAddr) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(LISTEN, listen.to_string()).env(WORKER, worker.to_string());
    Ok(command)
}

/// Whether this process is the forwarder: it runs until it is killed.
pub fn is_helper() -> anyhow::Result<bool> {
    let (Ok(listen), Ok(worker)) = (std::env::var(LISTEN), std::env::var(WORKER)) else { return Ok(false) };
    forward(listen.parse()?, worker.parse()?)?;
    Ok(true)
}

/// A connection, and the one that its bytes go to.
struct Side {
    stream: TcpStream,
    other: usize,
}

fn forward(listen: SocketAddr, worker: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    // All streams begin within a second.
    rustix::net::listen(&listener, 4096)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let of_listener = u64::MAX;
    epoll::add(&poll, &listener, epoll::EventData::new_u64(of_listener), epoll::EventFlags::IN)?;
    let mut sides: Vec<Option<Side>> = Vec::new();
    let mut events = Vec::with_capacity(512);
    let mut buffer = vec![0; 16 << 10];
    loop {
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in events.drain(..) {
            let at = event.data.u64();
            if at == of_listener {
                while let Ok((client, _)) = listener.accept() {
                    add(&poll, &mut sides, client, worker)?;
                }
            } else {
                pass(&mut sides, usize::try_from(at)?, &mut buffer);
            }
        }
    }
}

fn add(
    poll: &rustix::fd::OwnedFd,
    sides: &mut Vec<Option<Side>>,
    client: TcpStream,
    worker: SocketAddr,
) -> anyhow::Result<()> {
    let worker = TcpStream::connect(worker).context("the source takes no connection")?;
    let at = sides.len();
    for (stream, other) in [(client, at + 1), (worker, at)] {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        epoll::add(poll, &stream, epoll::EventData::new_u64(sides.len() as u64), epoll::EventFlags::IN)?;
        sides.push(Some(Side { stream, other }));
    }
    Ok(())
}

/// Passes on what came; or ends both sides where one has ended, or takes no more.
fn pass(sides: &mut [Option<Side>], at: usize, buffer: &mut [u8]) {
    let Some(Some(side)) = sides.get(at) else { return };
    let other = side.other;
    let mut stream = &side.stream;
    let passed = match stream.read(buffer) {
        Ok(read) if read > 0 => match sides.get(other) {
            Some(Some(other)) => (&other.stream).write_all(buffer.get(..read).unwrap_or_default()),
            _ => Err(ErrorKind::BrokenPipe.into()),
        },
        Ok(_) => Err(ErrorKind::UnexpectedEof.into()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    };
    if passed.is_err() {
        for at in [at, other] {
            if let Some(side) = sides.get_mut(at) {
                *side = None;
            }
        }
    }
}
