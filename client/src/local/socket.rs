//! The attachment's socket, from the client's side.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use kvstore_plane::caps::{DATAGRAM_BYTES_MAX, DESCRIPTORS_MAX};
use kvstore_plane::{FromClient, FromDaemon};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

/// A daemon reads its sockets many times in this long.
const ROOM_WITHIN: Duration = Duration::from_millis(100);

/// Connects to a daemon's local plane.
pub(crate) fn connect(path: &Path, within: Duration) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // Where too many wait to be accepted, connecting waits as sending does.
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Send, Some(within))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Sends a datagram. A daemon that does not read makes it fail, not wait.
pub(crate) fn send(socket: &OwnedFd, datagram: &FromClient) -> io::Result<()> {
    rustix::net::send(socket, &datagram.encode(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// The same, for what the daemon would miss: waits a moment for room.
pub(crate) fn send_surely(socket: &OwnedFd, datagram: &FromClient) -> io::Result<()> {
    let until = Instant::now() + ROOM_WITHIN;
    loop {
        let sent = send(socket, datagram);
        let left = until.saturating_duration_since(Instant::now());
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !left.is_zero() => {
                wait_for(socket, PollFlags::OUT, Some(left))?;
            }
            sent => return sent,
        }
    }
}

/// Waits for the socket to have something to read.
pub(crate) fn wait(socket: &OwnedFd, timeout: Option<Duration>) -> io::Result<bool> {
    wait_for(socket, PollFlags::IN, timeout)
}

fn wait_for(socket: &OwnedFd, what: PollFlags, timeout: Option<Duration>) -> io::Result<bool> {
    let timeout =
        timeout.map(|timeout| Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() });
    match poll(&mut [PollFd::new(socket, what)], timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The next datagram with its descriptors, if one waits.
pub(crate) fn receive(socket: &OwnedFd) -> io::Result<Option<(FromDaemon, Vec<OwnedFd>)>> {
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags) {
        Ok(message) => message,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    if message.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let datagram = FromDaemon::decode(buffer.get(..message.bytes).unwrap_or_default())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((datagram, descriptors)))
}

/// Wakes the daemon.
pub(crate) fn kick(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}
