//! The polling thread of the local plane.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvstore_plane::caps::DATAGRAM_BYTES_MAX;
use kvstore_plane::{FromClient, FromDaemon, PLANE_VERSION, Welcome, capabilities, fall_asleep, wake_up};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use tokio::runtime::Handle;

use super::client::LocalClient;
use super::peer::{AttachedPeer, Peer, PeerState};
use super::socket::{self, Now, PlaneListener};
use super::stage;
use crate::caller::Caller;
use crate::caps;
use crate::daemon::Daemon;

/// What an event is about; the number of the client or listener is beside it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Wake,
    Listener,
    Socket,
    Process,
    Kick,
}

const SOURCES: [Source; 5] = [Source::Wake, Source::Listener, Source::Socket, Source::Process, Source::Kick];

fn event_data(source: Source, number: u32) -> EventData {
    EventData::new_u64((source as u64) << 32 | u64::from(number))
}

fn source_of(data: u64) -> Option<(Source, u32)> {
    Some((*SOURCES.get((data >> 32) as usize)?, data as u32))
}

/// The local plane, while it runs.
pub struct Plane {
    stop: Arc<Stop>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Stop {
    wake: OwnedFd,
    stopped: AtomicBool,
}

impl Stop {
    fn wake(&self) {
        // Full means that a wake-up waits already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Serves the local plane on `listeners`, and at most `peers_max` clients at once.
pub fn start(daemon: &Arc<Daemon>, listeners: Vec<(PlaneListener, Caller)>, peers_max: usize) -> io::Result<Plane> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let stop = Arc::new(Stop { wake, stopped: AtomicBool::new(false) });
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &stop.wake, event_data(Source::Wake, 0), EventFlags::IN | EventFlags::ET)?;
    for (number, (listener, _)) in (0..).zip(&listeners) {
        epoll::add(&epoll, listener, event_data(Source::Listener, number), EventFlags::IN)?;
    }
    let watching = Arc::downgrade(&stop);
    daemon.host.watch_slabs(move || {
        if let Some(stop) = watching.upgrade() {
            stop.wake();
        }
    });
    let mut server = Server {
        daemon: Arc::clone(daemon),
        runtime: Handle::current(),
        stop: Arc::clone(&stop),
        epoll,
        listeners,
        peers: HashMap::new(),
        peers_max,
        next: 0,
        active: Vec::new(),
        blocked: false,
        paused_until: None,
        payload: Vec::new(),
    };
    let thread = std::thread::Builder::new().name("kvstore-local".into()).spawn(move || server.run())?;
    Ok(Plane { stop, thread: Some(thread) })
}

impl Plane {
    /// Tells clients, and ends.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.stopped.store(true, Ordering::Release);
        self.stop.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.end();
    }
}

struct Server {
    daemon: Arc<Daemon>,
    runtime: Handle,
    stop: Arc<Stop>,
    epoll: OwnedFd,
    listeners: Vec<(PlaneListener, Caller)>,
    peers: HashMap<u32, Peer>,
    peers_max: usize,
    next: u32,
    /// Clients whose rings are looked at without a kick.
    active: Vec<u32>,
    /// Completions or datagrams of some client wait for room.
    blocked: bool,
    /// No connection is accepted before: the last try failed.
    paused_until: Option<Instant>,
    payload: Vec<u8>,
}

impl Server {
    fn run(&mut self) {
        let mut events = Vec::with_capacity(64);
        let mut tidied = Instant::now();
        let mut looked = Instant::now();
        while !self.stop.stopped.load(Ordering::Acquire) {
            let now = Instant::now();
            // While rings are active, sockets and processes are looked at now and then.
            if self.active.is_empty() || now.duration_since(looked) >= caps::LOCAL_SOCKET_POLL {
                looked = now;
                let timeout = if self.active.is_empty() { self.sleep_for() } else { Duration::ZERO };
                let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
                events.clear();
                let waited = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout));
                if let Err(error) = waited
                    && error != rustix::io::Errno::INTR
                {
                    tracing::error!(%error, "the local plane stops, because it cannot wait for events");
                    return;
                }
                for event in &events {
                    if let Some((source, number)) = source_of(event.data.u64()) {
                        self.on_event(source, number);
                    }
                }
            }
            self.poll_rings();
            let due = if self.blocked { caps::LOCAL_BLOCKED_POLL } else { caps::LOCAL_TIDY };
            if tidied.elapsed() >= due {
                tidied = Instant::now();
                self.tidy();
            }
        }
        for peer in self.peers.values() {
            if let PeerState::Attached(attached) = &peer.state {
                let _ = socket::send(&attached.client.socket, &FromDaemon::Draining.encode(), &[]);
                attached.client.leave();
            }
        }
    }

    fn sleep_for(&self) -> Duration {
        let quiet = self.peers.is_empty() && self.paused_until.is_none();
        if self.blocked {
            caps::LOCAL_BLOCKED_POLL
        } else if quiet {
            Duration::from_secs(3600)
        } else {
            caps::LOCAL_TIDY
        }
    }

    fn on_event(&mut self, source: Source, number: u32) {
        match source {
            Source::Wake => self.sync_all_slabs(),
            Source::Listener => self.accept(number),
            Source::Process => self.on_exit(number),
            Source::Kick => self.activate(number),
            Source::Socket => self.on_datagrams(number),
        }
    }

    fn add(&self, descriptor: BorrowedFd<'_>, source: Source, number: u32, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, descriptor, event_data(source, number), flags)?)
    }

    fn accept(&mut self, number: u32) {
        if self.paused_until.is_some() {
            return;
        }
        let Some((listener, caller)) = self.listeners.get(number as usize) else { return };
        let caller = *caller;
        let accepted = listener.accept().and_then(|socket| match socket {
            None => Ok(()),
            Some(socket) => self.greet(socket, caller),
        });
        if let Err(error) = accepted {
            tracing::warn!(%error, "cannot accept a client of the local plane; trying again");
            // Out of descriptors, perhaps: the connection still waits, and epoll would say so again at once.
            self.pause_listeners(true);
        }
    }

    fn pause_listeners(&mut self, pause: bool) {
        self.paused_until = pause.then(|| Instant::now() + caps::ACCEPT_RETRY);
        let flags = if pause { EventFlags::empty() } else { EventFlags::IN };
        for (number, (listener, _)) in (0..).zip(&self.listeners) {
            let _ = epoll::modify(&self.epoll, listener, event_data(Source::Listener, number), flags);
        }
    }

    fn greet(&mut self, socket: OwnedFd, caller: Caller) -> io::Result<()> {
        if let Err(refused) = caller.check_blocks() {
            let refused = FromDaemon::Refused(refused.message().to_owned());
            let _ = socket::send(&socket, &refused.encode(), &[]);
            return Ok(());
        }
        if self.peers.len() >= self.peers_max && !self.hang_up_on_silent() {
            let refused = FromDaemon::Refused(format!(
                "{} clients are connected, which is the maximum: try again later",
                self.peers_max
            ));
            let _ = socket::send(&socket, &refused.encode(), &[]);
            return Ok(());
        }
        let process = match socket::peer_process(&socket) {
            Ok(process) => process,
            Err(error) => {
                let reason = format!(
                    "the daemon cannot watch for the end of your process ({error}): your PID namespace must be visible to the daemon"
                );
                let _ = socket::send(&socket, &FromDaemon::Refused(reason).encode(), &[]);
                return Ok(());
            }
        };
        while self.peers.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.add(socket.as_fd(), Source::Socket, number, EventFlags::IN | EventFlags::RDHUP)?;
        self.add(process.as_fd(), Source::Process, number, EventFlags::IN)?;
        let state = PeerState::Greeting(socket, Instant::now() + caps::LOCAL_HELLO_WITHIN);
        self.peers.insert(number, Peer { namespace: caller.namespace, process, state });
        Ok(())
    }

    /// Hangs up on whoever has connected longest ago and said nothing. False where nobody is silent.
    fn hang_up_on_silent(&mut self) -> bool {
        let silent = self.peers.iter().filter_map(|(number, peer)| match peer.state {
            PeerState::Greeting(_, until) => Some((until, *number)),
            _ => None,
        });
        let Some((_, number)) = silent.min() else { return false };
        self.hang_up(number);
        true
    }

    /// The client's process has ended: what it named is free.
    fn on_exit(&mut self, number: u32) {
        let Some(peer) = self.peers.remove(&number) else { return };
        let _ = epoll::delete(&self.epoll, &peer.process);
        match peer.state {
            PeerState::Greeting(..) => {}
            PeerState::Attached(attached) => {
                attached.client.leave();
                self.daemon.host.detach(&attached.client.attached);
            }
            PeerState::Lingering(client, _) => self.daemon.host.detach(&client.attached),
        }
    }

    /// The client hung up, or did what no client does. What it reads stays until its process ends.
    fn hang_up(&mut self, number: u32) {
        let Some(mut peer) = self.peers.remove(&number) else { return };
        peer.state = match peer.state {
            PeerState::Greeting(..) => {
                let _ = epoll::delete(&self.epoll, &peer.process);
                return;
            }
            PeerState::Attached(attached) => {
                let _ = epoll::delete(&self.epoll, &attached.client.socket);
                let _ = epoll::delete(&self.epoll, &attached.kick);
                // The client kept the descriptor alive: it learns from this that it is cut off.
                let _ = rustix::net::shutdown(&attached.client.socket, rustix::net::Shutdown::Both);
                attached.client.leave();
                let (client, slabs) = attached.into_slabs();
                PeerState::Lingering(client, slabs)
            }
            lingering => lingering,
        };
        self.peers.insert(number, peer);
    }

    fn on_datagrams(&mut self, number: u32) {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        for _ in 0..caps::LOCAL_DATAGRAMS_PER_TURN {
            let Some(peer) = self.peers.get_mut(&number) else { return };
            let socket = match &peer.state {
                PeerState::Greeting(socket, _) => socket,
                PeerState::Attached(attached) => &attached.client.socket,
                PeerState::Lingering(..) => return,
            };
            match socket::receive(socket, &mut buffer) {
                Now::Later => return,
                Now::Gone => return self.hang_up(number),
                Now::Done(datagram) => {
                    let Ok(datagram) = FromClient::decode(datagram) else { return self.hang_up(number) };
                    self.on_datagram(number, datagram);
                }
            }
        }
    }

    fn on_datagram(&mut self, number: u32, datagram: FromClient) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        match (&mut peer.state, datagram) {
            (PeerState::Greeting(..), FromClient::Hello { version_min, version_max, capabilities: _ }) => {
                self.attach(number, version_min, version_max);
            }
            (PeerState::Attached(attached), FromClient::WantsStaging) => {
                attached.client.give_staging(&self.daemon, &self.runtime);
            }
            (PeerState::Attached(attached), FromClient::Unmapped { serial }) => {
                drop(attached.leaving.remove(&serial));
            }
            (PeerState::Attached(attached), FromClient::Goodbye) => {
                let client = Arc::clone(&attached.client);
                self.hang_up(number);
                self.daemon.host.detach(&client.attached);
                if let Some(peer) = self.peers.remove(&number) {
                    let _ = epoll::delete(&self.epoll, &peer.process);
                }
            }
            _ => self.hang_up(number),
        }
    }

    fn attach(&mut self, number: u32, version_min: u16, version_max: u16) {
        let Some(peer) = self.peers.remove(&number) else { return };
        let Peer { namespace, process, state: PeerState::Greeting(socket, _) } = peer else { return };
        let refuse = |reason: String| {
            let _ = socket::send(&socket, &FromDaemon::Refused(reason).encode(), &[]);
        };
        if !(version_min..=version_max).contains(&PLANE_VERSION) {
            return refuse(format!(
                "this daemon speaks version {PLANE_VERSION} of the local plane, but the client speaks {version_min} to {version_max}: upgrade the older one"
            ));
        }
        if self.daemon.is_draining() {
            return refuse("the daemon is draining and takes no new clients".into());
        }
        let (attached, view) = match self.daemon.host.attach(namespace) {
            Ok(made) => made,
            Err(error) => return refuse(error.to_string()),
        };
        let kick = match eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK) {
            Ok(kick) => kick,
            Err(error) => {
                self.daemon.host.detach(&attached);
                return refuse(format!("the daemon cannot make an eventfd: {error}"));
            }
        };
        let welcome = FromDaemon::Welcome(Welcome {
            version: PLANE_VERSION,
            epoch: self.daemon.epoch,
            namespace_digest: view.namespace_digest,
            table_seed: view.table_seed,
            table_bytes: view.table_bytes(),
            capabilities: capabilities::ALL,
        });
        let descriptors = [attached.client_page.as_fd(), attached.daemon_page.as_fd(), view.table_fd(), kick.as_fd()];
        // Edge-triggered and never read: a client shares the eventfd, and could make a read of it wait.
        let added = self.add(kick.as_fd(), Source::Kick, number, EventFlags::IN | EventFlags::ET);
        fall_asleep(attached.view().daemon_sleeps());
        let sent = added.is_ok() && matches!(socket::send(&socket, &welcome.encode(), &descriptors), Now::Done(()));
        if !sent {
            self.daemon.host.detach(&attached);
            return;
        }
        let client = Arc::new(LocalClient::new(attached, socket));
        let attached = AttachedPeer::new(client, kick);
        self.peers.insert(number, Peer { namespace, process, state: PeerState::Attached(Box::new(attached)) });
        self.sync_slabs(number);
    }

    fn attached_mut(&mut self, number: u32) -> Option<&mut AttachedPeer> {
        match &mut self.peers.get_mut(&number)?.state {
            PeerState::Attached(attached) => Some(attached),
            _ => None,
        }
    }

    fn sync_all_slabs(&mut self) {
        let numbers: Vec<u32> = self.peers.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.sync_slabs(number));
    }

    /// Tells a client which slabs came and left since it was told last.
    fn sync_slabs(&mut self, number: u32) {
        let Some(Peer { namespace, state: PeerState::Attached(attached), .. }) = self.peers.get_mut(&number) else {
            return;
        };
        match attached.sync_slabs(self.daemon.host.slabs_of(*namespace)) {
            Now::Done(()) => {}
            Now::Later => self.blocked = true,
            // What it sent before it left comes first: its Goodbye, perhaps.
            Now::Gone => self.on_datagrams(number),
        }
    }

    fn activate(&mut self, number: u32) {
        let Some(attached) = self.attached_mut(number).filter(|attached| !attached.active) else { return };
        attached.active = true;
        attached.last_command = Instant::now();
        wake_up(attached.view().daemon_sleeps());
        self.active.push(number);
    }

    /// Looks at the rings of active clients; those that were quiet for a while go to sleep.
    fn poll_rings(&mut self) {
        let spin = self.daemon.config().local_spin;
        let mut at = 0;
        while let Some(number) = self.active.get(at).copied() {
            let (sound, stays) = self.poll_ring(number, spin);
            if !sound {
                tracing::warn!("disconnected a client of the local plane, because it broke the protocol");
                self.hang_up(number);
            }
            if stays && sound {
                at += 1;
            } else {
                self.active.swap_remove(at);
            }
        }
        if !self.active.is_empty() {
            std::hint::spin_loop();
        }
    }

    /// Does the commands that wait. Whether the client keeps to the protocol, and whether it stays active.
    fn poll_ring(&mut self, number: u32, spin: Duration) -> (bool, bool) {
        let (daemon, runtime) = (Arc::clone(&self.daemon), self.runtime.clone());
        let mut payload = std::mem::take(&mut self.payload);
        let outcome = match self.attached_mut(number) {
            None => (true, false),
            Some(attached) => attached.poll_ring(&daemon, &runtime, spin, &mut payload),
        };
        if let Some(attached) = self.attached_mut(number)
            && attached.client.is_gone()
        {
            self.payload = payload;
            return (false, false);
        }
        self.blocked |=
            outcome == (true, false) && self.attached_mut(number).is_some_and(|attached| attached.client.flush());
        self.payload = payload;
        outcome
    }

    /// What is done now and then.
    fn tidy(&mut self) {
        let now = Instant::now();
        self.blocked = false;
        if self.paused_until.is_some_and(|until| until <= now) {
            self.pause_listeners(false);
        }
        let numbers: Vec<u32> = self.peers.keys().copied().collect();
        for number in numbers {
            match self.peers.get_mut(&number).map(|peer| &mut peer.state) {
                Some(PeerState::Greeting(_, until)) if *until <= now => self.hang_up(number),
                Some(PeerState::Attached(attached)) => {
                    stage::expire(&attached.client, tokio::time::Instant::now());
                    let (behind, waits) = (attached.behind, attached.client.flush());
                    self.blocked |= waits | !attached.client.send_staging_again();
                    if behind {
                        self.sync_slabs(number);
                    }
                    if !waits {
                        // Commands may wait that were left alone while completions did.
                        self.activate_if_waiting(number);
                    }
                }
                _ => {}
            }
        }
    }

    fn activate_if_waiting(&mut self, number: u32) {
        let waiting = self
            .attached_mut(number)
            .is_some_and(|attached| attached.reader.has_record(&attached.view().submissions()));
        if waiting {
            self.activate(number);
        }
    }
}
