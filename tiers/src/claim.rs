//! Claims a path for this process: folders, lock files and Unix sockets. Whoever finds a path taken is told by which process.
//!
//! A lock file stays when its claim ends: were it removed, two processes could each lock a file of that name.

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// A path cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The system says no.
    #[error("cannot {step} {path}: {cause}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Another process has it.
    #[error("{path} is in use by {}", by(pid))]
    Taken {
        /// What it has.
        path: PathBuf,
        /// Its number, as far as it is known.
        pid: Option<String>,
    },
    /// It is there, and something else.
    #[error("{path} is not a {expected} (symbolic links are not followed)")]
    Other {
        /// The path.
        path: PathBuf,
        /// What would be right.
        expected: &'static str,
    },
    /// It is another user's.
    #[error("{path} must belong to user {user}, but it belongs to user {owner}: chown it, or choose another folder")]
    NotOwn {
        /// The folder.
        path: PathBuf,
        /// This process's user.
        user: u32,
        /// The folder's user.
        owner: u32,
    },
    /// Others may write to a folder.
    #[error(
        "{path} must belong to user {user} and be writable only by that user, but it belongs to user {owner} and has mode \
         {mode:o}: chmod 700 it, or choose another folder"
    )]
    NotPrivate {
        /// The folder.
        path: PathBuf,
        /// This process's user.
        user: u32,
        /// The folder's user.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
}

/// Whoever has a path, in words.
fn by(pid: &Option<String>) -> String {
    pid.as_ref().map_or_else(|| "another process".into(), |pid| format!("process {pid}"))
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ClaimError {
    let path = path.to_owned();
    move |cause| ClaimError::Io { step, path, cause }
}

/// Makes a folder that only this user may enter, where there is none. One that is there must be this user's, and nobody else may
/// write to it: the kernel does not protect sockets in folders that others may write to.
pub fn private_folder(path: &Path) -> Result<(), ClaimError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("make the folder", path))?;
    let found = path.symlink_metadata().map_err(io_error("look at", path))?;
    if !found.is_dir() {
        return Err(ClaimError::Other { path: path.to_owned(), expected: "folder" });
    }
    let (mode, owner, user) = (found.mode() & 0o777, found.uid(), rustix::process::geteuid().as_raw());
    match owner == user && mode & 0o022 == 0 {
        true => Ok(()),
        false => Err(ClaimError::NotPrivate { path: path.to_owned(), user, owner, mode }),
    }
}

/// Makes a folder, or takes one of this user's that is there, so that only this user may enter it. A symbolic link is not followed:
/// somebody else could have chosen the folder that it leads to.
pub fn own_folder(path: &Path) -> Result<(), ClaimError> {
    std::fs::create_dir_all(path).map_err(io_error("make the folder", path))?;
    let found = path.symlink_metadata().map_err(io_error("look at", path))?;
    if !found.is_dir() {
        return Err(ClaimError::Other { path: path.to_owned(), expected: "folder" });
    }
    let (owner, user) = (found.uid(), rustix::process::geteuid().as_raw());
    if owner != user {
        return Err(ClaimError::NotOwn { path: path.to_owned(), user, owner });
    }
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o700)).map_err(io_error("make private", path))
}

/// A lock file that this process has, until it lets go of it or ends.
#[derive(Debug)]
pub struct Claim(File);

impl Claim {
    /// Takes the lock of the file at `path`, and writes this process's number into it. `of`: what the lock is for, which messages
    /// name.
    pub fn take(path: &Path, of: &Path) -> Result<Self, ClaimError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let opened = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(opened.map_err(|error| io_error("open", path)(error.into()))?);
        match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(ClaimError::Taken { path: of.to_owned(), pid: pid_in(&mut file) });
            }
            Err(error) => return Err(io_error("lock", path)(error.into())),
        }
        let named = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        named.map_err(io_error("write", path))?;
        Ok(Self(file))
    }

    /// Takes the right to `path` and to what lies beside it, by a lock file with `.lock` behind its name.
    pub fn beside(path: &Path) -> Result<Self, ClaimError> {
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        Self::take(Path::new(&lock), path)
    }

    /// Lets go: somebody else may have it now.
    pub fn let_go(&self) -> io::Result<()> {
        Ok(rustix::fs::flock(self.0.as_fd(), FlockOperation::Unlock)?)
    }
}

/// The number that the owner of a lock file wrote. None where it had no time yet, or wrote something else.
fn pid_in(file: &mut File) -> Option<String> {
    let mut text = String::new();
    file.rewind().and_then(|()| file.take(32).read_to_string(&mut text)).ok()?;
    text.trim().parse::<u32>().ok().map(|pid| pid.to_string())
}

/// Removes a Unix socket's file when it goes.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl SocketFile {
    /// Of the socket that is bound at `path`. Nobody but this user may connect to it.
    pub fn of(path: &Path) -> Result<Self, ClaimError> {
        let file = Self(path.to_owned());
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(io_error("make private", path))?;
        Ok(file)
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Removes a Unix socket at `path` where nobody answers: a process that was killed left it there. Never removes anything else.
pub fn clear_dead_socket(path: &Path) -> Result<(), ClaimError> {
    let Ok(found) = path.symlink_metadata() else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(ClaimError::Other { path: path.to_owned(), expected: "socket" });
    }
    if answers(path) {
        return Err(ClaimError::Taken { path: path.to_owned(), pid: None });
    }
    std::fs::remove_file(path).map_err(io_error("remove", path))
}

/// A listening Unix socket at `path`, which does not block. Takes the place of a dead one.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), ClaimError> {
    clear_dead_socket(path)?;
    let listener = UnixListener::bind(path).map_err(io_error("bind", path))?;
    let file = SocketFile::of(path)?;
    listener.set_nonblocking(true).map_err(io_error("set up", path))?;
    Ok((listener, file))
}

/// True where somebody listens at `path`. Does not wait for them.
fn answers(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let connected = socket.and_then(|socket| rustix::net::connect(&socket, &SocketAddrUnix::new(path)?));
    // A listener with a full queue of connections, or of another kind, is there all the same; and where nobody can tell, one may be.
    !matches!(connected, Err(Errno::CONNREFUSED | Errno::NOENT))
}
