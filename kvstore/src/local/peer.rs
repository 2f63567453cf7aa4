//! The polling thread's view of one connection to the local plane: it is being greeted, attached with its slabs and rings, or
//! hung up.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_plane::{AttachmentView, FromDaemon, RingReader, fall_asleep, wake_up};
use kvstore_tiers::Slab;
use kvstore_tiers::host::NamespaceId;
use tokio::runtime::Handle;

use super::client::LocalClient;
use super::commands;
use super::socket::{self, Now};
use crate::caps;
use crate::daemon::Daemon;

/// A connection.
pub(super) struct Peer {
    pub(super) namespace: NamespaceId,
    pub(super) process: OwnedFd,
    pub(super) state: PeerState,
}

/// How far it came.
pub(super) enum PeerState {
    /// It has yet to say Hello, by then.
    Greeting(OwnedFd, Instant),
    /// Attached.
    Attached(Box<AttachedPeer>),
    /// It hung up, or broke the protocol; what it names stays until its process ends.
    Lingering(Arc<LocalClient>, #[expect(dead_code, reason = "kept mapped for accounting")] Vec<Arc<Slab>>),
}

/// An attached client.
pub(super) struct AttachedPeer {
    pub(super) client: Arc<LocalClient>,
    pub(super) kick: OwnedFd,
    pub(super) reader: RingReader,
    /// Slabs that it was told of, by serial number.
    slabs: HashMap<u64, (u32, Arc<Slab>)>,
    /// Slabs that left, and that it has yet to unmap.
    pub(super) leaving: HashMap<u64, Arc<Slab>>,
    /// Datagrams wait for room in its socket.
    pub(super) behind: bool,
    pub(super) active: bool,
    pub(super) last_command: Instant,
}

impl AttachedPeer {
    pub(super) fn new(client: Arc<LocalClient>, kick: OwnedFd) -> Self {
        Self {
            client,
            kick,
            reader: RingReader::new(),
            slabs: HashMap::new(),
            leaving: HashMap::new(),
            behind: false,
            active: false,
            last_command: Instant::now(),
        }
    }

    pub(super) fn view(&self) -> AttachmentView<'_> {
        self.client.attached.view()
    }

    /// Every slab that it may have mapped.
    pub(super) fn into_slabs(self) -> (Arc<LocalClient>, Vec<Arc<Slab>>) {
        let slabs = self.slabs.into_values().map(|(_, slab)| slab).chain(self.leaving.into_values());
        (self.client, slabs.collect())
    }

    /// Tells it which slabs came and left since it was told last. Later: its socket is full.
    pub(super) fn sync_slabs(&mut self, slabs: Vec<(u32, Arc<Slab>)>) -> Now<()> {
        let now: HashMap<u64, (u32, Arc<Slab>)> =
            slabs.into_iter().map(|(slab, memory)| (u64::from(memory.header().slab), (slab, memory))).collect();
        self.behind = false;
        let left: Vec<u64> = self.slabs.keys().filter(|serial| !now.contains_key(serial)).copied().collect();
        for serial in left {
            let Some((slab, memory)) = self.slabs.remove(&serial) else { continue };
            match socket::send(&self.client.socket, &FromDaemon::SlabLeft { slab, serial }.encode(), &[]) {
                Now::Done(()) => drop(self.leaving.insert(serial, memory)),
                later_or_gone => {
                    self.slabs.insert(serial, (slab, memory));
                    return self.fell_behind(later_or_gone);
                }
            }
        }
        for (serial, (slab, memory)) in now {
            if self.slabs.contains_key(&serial) {
                continue;
            }
            let came = FromDaemon::SlabCame { slab, serial }.encode();
            match socket::send(&self.client.socket, &came, &[memory.as_fd()]) {
                Now::Done(()) => drop(self.slabs.insert(serial, (slab, memory))),
                later_or_gone => return self.fell_behind(later_or_gone),
            }
        }
        Now::Done(())
    }

    fn fell_behind(&mut self, sent: Now<()>) -> Now<()> {
        self.behind = true;
        sent
    }

    /// Does the commands that wait. Whether the client keeps to the protocol, and whether it stays active.
    pub(super) fn poll_ring(
        &mut self,
        daemon: &Arc<Daemon>,
        runtime: &Handle,
        spin: Duration,
        payload: &mut Vec<u8>,
    ) -> (bool, bool) {
        let client = Arc::clone(&self.client);
        let view = client.attached.view();
        for _ in 0..caps::LOCAL_COMMANDS_PER_TURN {
            if client.flush() {
                // It does not read its completions: no more commands until it does.
                return (true, self.sleep(&view));
            }
            match self.reader.pop(&view.submissions(), payload) {
                Err(_) => return (false, false),
                Ok(None) => {
                    if self.last_command.elapsed() < spin {
                        return (true, true);
                    }
                    fall_asleep(view.daemon_sleeps());
                    if self.reader.has_record(&view.submissions()) {
                        wake_up(view.daemon_sleeps());
                        return (true, true);
                    }
                    self.active = false;
                    return (true, false);
                }
                Ok(Some(head)) => {
                    if !commands::run(daemon, runtime, &client, head, payload) {
                        return (false, false);
                    }
                    self.last_command = Instant::now();
                }
            }
        }
        (true, true)
    }

    fn sleep(&mut self, view: &AttachmentView<'_>) -> bool {
        fall_asleep(view.daemon_sleeps());
        self.active = false;
        false
    }
}
