//! The sockets of the local plane: one seqpacket listener beside each Unix socket for gRPC, datagrams with descriptors, and
//! the identity of the peer. Nothing here waits. Each call asks not to block, because a client can change the flags of a
//! descriptor that it shares.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use kvstore_plane::caps::{DATAGRAM_BYTES_MAX, DESCRIPTORS_MAX};
use kvstore_tiers::claim::{self, SocketFile};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::{PidfdFlags, pidfd_open};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Where the local plane of a gRPC socket listens: beside it.
pub fn plane_path(grpc_socket: &Path) -> PathBuf {
    let mut path = grpc_socket.as_os_str().to_owned();
    path.push(kvstore_plane::SOCKET_SUFFIX);
    PathBuf::from(path)
}

/// A bound listener, whose file goes with it.
pub struct PlaneListener {
    socket: OwnedFd,
    #[expect(dead_code, reason = "it removes the socket's file when it goes")]
    file: SocketFile,
}

impl PlaneListener {
    /// Listens at `path`, in a folder that was checked to be private. What a daemon that was killed left there goes:
    /// the caller owns the gRPC socket's path and this one beside it.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        claim::clear_dead_socket(path)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let file = SocketFile::of(path)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self { socket, file })
    }

    /// The next connection of this user or of root, if one waits.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let socket = match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let (peer, me) = (rustix::net::sockopt::socket_peercred(&socket)?.uid, rustix::process::geteuid());
        if peer == me || peer.is_root() {
            return Ok(Some(socket));
        }
        let problem = format!("user {} may not connect to a socket of user {}", peer.as_raw(), me.as_raw());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, problem))
    }
}

impl AsFd for PlaneListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A descriptor that becomes readable when the peer's process has ended.
pub fn peer_process(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut pidfd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option writes one int, for which there is room.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut len,
        )
    };
    if got == 0 && pidfd >= 0 {
        // SAFETY: the kernel made it for us, and nobody else has its number.
        return Ok(unsafe { OwnedFd::from_raw_fd(pidfd) });
    }
    // Kernels before 6.5: by number, which another process has by now only where the peer passed its socket on and
    // ended.
    let pid = rustix::net::sockopt::socket_peercred(socket)?.pid;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// What came of a send or a receive that does not wait.
#[derive(Debug)]
pub enum Now<T> {
    /// Done.
    Done(T),
    /// It would have to wait.
    Later,
    /// The peer has closed its end, or broke the connection.
    Gone,
}

/// Sends a datagram with descriptors.
pub fn send(socket: &OwnedFd, datagram: &[u8], descriptors: &[BorrowedFd<'_>]) -> Now<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Now::Gone;
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(socket, &[IoSlice::new(datagram)], &mut control, flags) {
        Ok(_) => Now::Done(()),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS | rustix::io::Errno::TOOMANYREFS) => Now::Later,
        Err(_) => Now::Gone,
    }
}

/// Receives a datagram into `buffer`; descriptors that a client sends are closed.
pub fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8; DATAGRAM_BYTES_MAX]) -> Now<&'a [u8]> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags);
    if matches!(received, Err(rustix::io::Errno::CONNRESET)) {
        // It closed with something unread. That is said once, before what it sent last: its Goodbye, perhaps.
        received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags);
    }
    // Dropping what was received closes it.
    control.drain().for_each(drop);
    match received {
        Ok(message) if message.bytes == 0 || message.flags.contains(ReturnFlags::TRUNC) => Now::Gone,
        Ok(message) => buffer.get(..message.bytes).map_or(Now::Gone, Now::Done),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Now::Later,
        Err(_) => Now::Gone,
    }
}
